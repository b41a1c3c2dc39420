"""Prefill tiles of 256 weight rows, and of 128 added every 256 of K, on the GPU: every form, same
bits, weights that overhang."""

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
