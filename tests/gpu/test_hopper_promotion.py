"""`accumulate="precise"` on the worst data there is, products that are all positive: 2^-8 a row.

FP8 tensor cores cut every product to about 14 bits of the running sum, so a sum of 7168 products of
one sign that is never added up in float32 is some 5 % too small (and silu(g) * u doubles it).
"""

from dataclasses import replace

import hopper_cases as cases
import pytest

from mixmoe.backends.hopper import hopper
from mixmoe.backends.hopper.prefill_cut import Cut
from mixmoe.backends.hopper.prefill_schedule import PREFILL, cut_tiles
from mixmoe.backends.hopper.quantise import slot_rows
from mixmoe.backends.hopper.route import Placed
from mixmoe.backends.hopper.schedule import DECODE, schedule_for

DEVICE, BACKEND = "cuda", hopper()
HIDDEN, INTER, EXPERTS, TOPK = 7168, 256, 4, 2
TOKENS = (1, 8, 32, 60, 140, 240, 340, 512)  # decode; then each form of prefill


def worst(tokens: int, accumulate: str) -> float:
    """Of all rows of h, as stage 1 leaves them for its requantisation."""
    recipe = replace(cases.RECIPES["a8w4"], accumulate=accumulate)
    case = cases.make_case(recipe, tokens, HIDDEN, INTER, EXPERTS, TOPK)
    dense = (w.dequantise().abs() for w in (case.weights.w13, case.weights.w2))
    small = (w * w.shape[-1] ** -0.5 for w in dense)
    weights = cases.Weights.from_dense(*small, format=recipe.weight)
    packed = BACKEND.prepare(weights, recipe).to(DEVICE)
    routed = BACKEND.route(case.ids.to(DEVICE), case.topk_weights.to(DEVICE), case.problem, None)
    assert isinstance(routed, Placed)
    x = recipe.activation.quantise(case.x.abs().float(), recipe.rounding)
    chosen = schedule_for(recipe, packed, case.problem, routed.block)
    rows = slot_rows(x.to(DEVICE))
    if chosen is DECODE:
        h = DECODE.stage1(rows, packed, routed, recipe)
    else:
        assert chosen is PREFILL
        h = PREFILL.stage1(rows, packed, routed, recipe, *cut_tiles(routed, recipe))
        h = h[routed.position.long()]
    want = cases.exact_h(x, weights, cases.to_cpu(routed), recipe)
    return cases.worst_row(h.cpu(), want)


def test_every_form_is_there() -> None:
    problems = [cases.Problem(t, HIDDEN, INTER, EXPERTS, TOPK) for t in TOKENS[3:]]
    forms = [Cut.of(p, True) for p in problems]
    assert [c.added(HIDDEN) for c in forms] == [128, 128, 256, 256, 128]
    assert len({c.form for c in forms}) == len(forms)


@pytest.mark.parametrize("tokens", TOKENS)
def test_precise(tokens: int) -> None:
    assert worst(tokens, "precise") <= 2**-8


@pytest.mark.parametrize("tokens", TOKENS[3:])
def test_fast_is_not(tokens: int) -> None:
    assert worst(tokens, "fast") > 2**-6
