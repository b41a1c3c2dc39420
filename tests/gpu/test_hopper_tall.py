"""Prefill tiles of 256 weight rows, and of 128 added every 256 of K, on the GPU: every form, every
number of routes that a form tells apart, same bits, weights that overhang."""

from dataclasses import replace
from typing import Any

import hopper_cases as cases
import pytest
import torch

from mixmoe.activations import swiglu
from mixmoe.backends.hopper import hopper
from mixmoe.backends.hopper.prefill_cut import Cut

DEVICE, BACKEND = "cuda", hopper()
# Tokens of four experts, topk 2 -> routes of a tile, precise and fast.
FORMS = {64: ((64, 0), (64, 0)), 130: ((64, 32), (64, 32)), 160: ((64, 32), (128, 32)),
         240: ((128, 32), (128, 32)), 340: ((128, 64), (128, 64))}  # fmt: skip
# Routes of each expert, on both sides of every size of a tile, by the tile's main routes.
SHARES = {
    64: (1, 31, 32, 33, 63, 64, 65, 95, 96, 97, 160, 161),
    128: (1, 32, 33, 64, 65, 127, 128, 129, 159, 160, 161, 290),
    256: (1, 63, 64, 65, 100, 128, 129, 191, 192, 193, 256, 257, 288, 289, 300, 700),
}
SIZES = {"256": (512, 256), "overhang": (352, 704), "long": (448, 2880)}


def case_of(tokens: int, size: str, precise: bool, **how: Any) -> cases.Case:
    """A layer of a form."""
    recipe = cases.RECIPES["a8w4"]
    if size != "256":
        recipe = cases.with_act(recipe, swiglu())
    recipe = replace(recipe, accumulate="precise" if precise else "fast")
    hidden, inter = SIZES[size]
    case = cases.make_case(recipe, tokens, hidden, inter, 4, 2, bias=size != "256", **how)
    form = Cut.of(case.problem, precise).form
    assert (form.main, form.extra) == FORMS[tokens][0 if precise else 1]
    assert form.rows == (128 if tokens == 340 or precise and tokens == 240 else 256)
    return case


@pytest.mark.parametrize("precise", [True, False])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tokens", FORMS)
def test_forms(tokens: int, size: str, precise: bool) -> None:
    for skew in ("uniform", "masked", "one"):
        result = cases.judge(case_of(tokens, size, precise, skew=skew), BACKEND, DEVICE)
        assert cases.passed(result), str(result)


def skewed(main: int, size: str, precise: bool) -> cases.Case:
    """A layer whose experts have SHARES of the routes, in a random order of tokens."""
    shares = torch.tensor(SHARES[main])
    recipe = replace(cases.RECIPES["a8w4"], accumulate="precise" if precise else "fast")
    case = cases.make_case(recipe, int(shares.sum()), *SIZES[size], len(shares), 1)
    experts = torch.arange(len(shares)).repeat_interleave(shares)
    order = torch.randperm(len(experts), generator=torch.Generator().manual_seed(1))
    case = replace(case, ids=experts[order][:, None])
    assert Cut.of(case.problem, precise).main == main
    return case


@pytest.mark.parametrize("precise", [True, False])
@pytest.mark.parametrize("size", ["256", "long"])
@pytest.mark.parametrize("main", SHARES)
def test_sizes_of_a_tile(main: int, size: str, precise: bool) -> None:
    """What lies in shared memory where a tile has no rows must not matter: the layer before left
    NaN there, if anything."""
    case = skewed(main, size, precise)
    weights = BACKEND.prepare(case.weights, case.recipe).to(DEVICE)
    poison = torch.full_like(case.x, torch.nan, device=DEVICE)
    routes = case.ids.to(DEVICE), case.topk_weights.to(DEVICE)
    BACKEND.layer(poison, weights, *routes, case.recipe, out=torch.empty_like(poison))
    result = cases.judge(case, BACKEND, DEVICE)
    assert cases.passed(result), str(result)


@pytest.mark.parametrize("how", ["zero row", "swap experts", "swap gate and up", "drop K tail"])
def test_judge_sees(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of(130, "256", True)
    broken, prepare = cases.mutated(case, how).weights, BACKEND.prepare
    monkeypatch.setattr(BACKEND, "prepare", lambda weights, recipe: prepare(broken, recipe))
    assert not cases.passed(cases.judge(case, BACKEND, DEVICE))


@pytest.mark.parametrize("precise", [True, False])
@pytest.mark.parametrize("tokens", FORMS)
def test_same_bits_every_run(tokens: int, precise: bool) -> None:
    case = case_of(tokens, "overhang", precise)
    weights = BACKEND.prepare(case.weights, case.recipe).to(DEVICE)
    operands = case.x.to(DEVICE), weights, case.ids.to(DEVICE), case.topk_weights.to(DEVICE)
    outs = []
    for _ in range(20):
        out = torch.full((tokens, 352), torch.nan, dtype=torch.bfloat16, device=DEVICE)
        outs.append(BACKEND.layer(*operands, case.recipe, out=out))
    assert torch.isfinite(outs[0]).all() and all(torch.equal(outs[0], o) for o in outs[1:])
