"""`deterministic=False` on the GPU: sums by atomics against float64, and who gets them."""

from typing import Any

import hopper_cases as cases
import pytest
import torch

from mixmoe.activations import silu
from mixmoe.backends.hopper import gemm2_red, hopper
from mixmoe.moe import moe

DEVICE, BACKEND = "cuda", hopper()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The cuts of the launches."""
    seen, launch = [], gemm2_red.launch

    def record(*operands: Any, **more: Any) -> torch.Tensor:
        seen.append(operands[6])
        return launch(*operands, **more)

    monkeypatch.setattr(gemm2_red, "launch", record)
    return seen


def on_device(case: cases.Case) -> tuple[Any, ...]:
    weights = BACKEND.prepare(case.weights, case.recipe).to(DEVICE)
    return case.x.to(DEVICE), weights, case.ids.to(DEVICE), case.topk_weights.to(DEVICE)


def exact(case: cases.Case, h: Any) -> torch.Tensor:
    """float64 stage 2 and sum of the backend's own h."""
    recipe, p = case.recipe, case.problem
    routed = cases.REFERENCE.route(case.ids, case.topk_weights, p, None, 32)
    rows = cases.REFERENCE.gemm2(cases.to_cpu(h), case.weights, routed, recipe)
    out = torch.empty(p.tokens, p.hidden, dtype=torch.float64)
    return cases.REFERENCE.combine(rows, routed, recipe, out)


def errors(case: cases.Case) -> dict[str, float]:
    """Worst rows of the layer and of `down`, both by atomics."""
    recipe, p = case.recipe, case.problem
    x, weights, ids, topk = on_device(case)
    routed = BACKEND.route(ids, topk, p, None, None)
    h = BACKEND.gemm1(BACKEND.quantise(x, weights, routed, recipe), weights, routed, recipe)
    want = exact(case, h)
    out = torch.full((p.tokens, p.hidden), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    BACKEND.layer(x, weights, ids, topk, recipe, out=out, deterministic=False)
    layer = cases.worst_row(out.cpu(), want)
    out.fill_(torch.nan)
    BACKEND.down(h, weights, routed, recipe, out, deterministic=False)
    return {"layer": layer, "down": cases.worst_row(out.cpu(), want)}


@pytest.mark.parametrize(
    "inter, hidden, tokens, bias, weight_on",
    [(128, 320, 300, False, 2), (192, 448, 900, True, 2), (256, 7168, 300, False, 1),
     (384, 352, 700, True, 1), (256, 512, 2500, True, 2)],
)  # fmt: skip
@pytest.mark.parametrize("name", ["a8w4", "a8w4_mx", "a4w4"])
def test_sums(name: str, inter: int, hidden: int, tokens: int, bias: bool, weight_on: int,
              launches: list[Any]) -> None:  # fmt: skip
    recipe = cases.with_act(cases.RECIPES[name], silu(), weight_on)
    case = cases.make_case(recipe, tokens, hidden, inter, 7, 3, bias=bias, skew="masked")
    worst = errors(case)
    assert max(worst.values()) < 2.0**-7, worst
    assert len(launches) == 2


def test_judge_sees_a_lost_row(monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases.make_case(cases.RECIPES["a8w4"], 300, 320, 128, 7, 3)
    launch = gemm2_red.launch

    def lossy(*operands: Any, **more: Any) -> torch.Tensor:
        out = launch(*operands, **more)
        out[17] *= 1.02
        return out

    monkeypatch.setattr(gemm2_red, "launch", lossy)
    assert min(errors(case).values()) > 2.0**-7


@pytest.mark.parametrize("inter, tokens", [(512, 300), (128, 8)])
def test_deterministic_where_nothing_is_faster(
    inter: int, tokens: int, launches: list[Any]
) -> None:
    case = cases.make_case(cases.RECIPES["a8w4"], tokens, 320, inter, 7, 3)
    outs = []
    for deterministic in (True, False):
        out = torch.empty(tokens, 320, dtype=torch.bfloat16, device=DEVICE)
        outs.append(
            BACKEND.layer(*on_device(case), case.recipe, out=out, deterministic=deterministic)
        )
    assert torch.equal(*outs) and not launches


def test_public_flag(launches: list[Any]) -> None:
    case = cases.make_case(cases.RECIPES["a8w4"], 300, 320, 128, 7, 3)
    moe(*on_device(case), recipe=case.recipe, backend="hopper")
    assert not launches
    moe(*on_device(case), recipe=case.recipe, backend="hopper", deterministic=False)
    assert len(launches) == 1


def test_graph_replay() -> None:
    recipe = cases.RECIPES["a8w4"]
    given = [
        cases.make_case(recipe, 600, 512, 256, 16, 4, seed=s, skew=k)
        for s, k in enumerate(("uniform", "one", "masked"))
    ]
    x, weights, ids, topk = on_device(given[0])
    out, want = (torch.empty(600, 512, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))

    def run() -> None:
        BACKEND.layer(x, weights, ids, topk, recipe, out=out, deterministic=False)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for case in given:
        x.copy_(case.x)
        ids.copy_(case.ids)
        topk.copy_(case.topk_weights)
        BACKEND.layer(x, weights, ids, topk, recipe, out=want)
        for _ in range(3):
            out.fill_(torch.nan)
            graph.replay()
            assert cases.worst_row(out.cpu(), want.double().cpu()) < 2.0**-7
