"""Stage 2 and the sum over a token's routes, against float64 on the backend's own h."""

from types import ModuleType
from typing import Any

import hopper_cases as cases
import pytest
import torch

from mixmoe.activations import silu
from mixmoe.backends.hopper import hopper

DEVICE, BACKEND = "cuda", hopper()
# inter, hidden, tokens, bias, weight_on
SIZES = [  # fmt: skip
    (128, 320, 300, False, 2), (192, 448, 900, True, 2), (256, 7168, 700, False, 1),
    (384, 352, 700, True, 1), (256, 2880, 2500, True, 2), (256, 1024, 5000, False, 2),
]


def runs(case: cases.Case, count: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """float64 stage 2 and sum of the backend's own h, and so many results of `down`."""
    recipe, p = case.recipe, case.problem
    weights = BACKEND.prepare(case.weights, recipe).to(DEVICE)
    ids, topk = case.ids.to(DEVICE), case.topk_weights.to(DEVICE)
    routed = BACKEND.route(ids, topk, p, None, None)
    x = BACKEND.quantise(case.x.to(DEVICE), weights, routed, recipe)
    h = BACKEND.gemm1(x, weights, routed, recipe)
    placed = cases.REFERENCE.route(case.ids, case.topk_weights, p, None, 32)
    rows = cases.REFERENCE.gemm2(cases.to_cpu(h), case.weights, placed, recipe)
    want = torch.empty(p.tokens, p.hidden, dtype=torch.float64)
    cases.REFERENCE.combine(rows, placed, recipe, want)
    results = []
    for _ in range(count):
        out = torch.full((p.tokens, p.hidden), torch.nan, dtype=torch.bfloat16, device=DEVICE)
        BACKEND.down(h, weights, routed, recipe, out)
        results.append(out.cpu())
    return want, results


def judge(inter: int, hidden: int, tokens: int, bias: bool, weight_on: int, count: int) -> None:
    """A layer of `SIZES`: right, and the same bits in so many runs."""
    recipe = cases.with_act(cases.RECIPES["a8w4"], silu(), weight_on)
    case = cases.make_case(recipe, tokens, hidden, inter, 7, 3, bias=bias, skew="masked")
    want, results = runs(case, count)
    assert cases.worst_row(results[0], want) < 2.0**-8 * 1.5
    assert all(torch.equal(results[0], other) for other in results)


def judge_sees_stale_columns(
    stage2: ModuleType, hidden: int, first: int, patch: pytest.MonkeyPatch
) -> None:
    """64 columns of a row from another slot of what `stage2.launch` keeps are seen."""
    case = cases.make_case(cases.RECIPES["a8w4"], 300, hidden, 128, 7, 3)
    launch = stage2.launch

    def stale(*operands: Any, **more: Any) -> torch.Tensor:
        out = launch(*operands, **more)
        out[17, first : first + 64] = out[17, :64]
        return out

    patch.setattr(stage2, "launch", stale)
    want, results = runs(case, 1)
    assert cases.worst_row(results[0], want) > 2.0**-6
