"""Every Triton kernel of the Hopper backend against its CPU twin, under Triton's interpreter.

Run by test_hopper_interpreter.py in a process of its own: `TRITON_INTERPRET=1 pytest <this file>`.
"""

import os
from dataclasses import replace

assert os.environ.get("TRITON_INTERPRET") == "1", "run me through test_hopper_interpreter.py"

import hopper_cases as cases  # noqa: E402
import interpreted  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from mixmoe.activations import gelu, silu, situv2, swiglu  # noqa: E402
from mixmoe.backends.hopper import hopper, stages  # noqa: E402
from mixmoe.backends.hopper import quantise as quantise_stage  # noqa: E402
from mixmoe.backends.hopper import route as route_stage  # noqa: E402
from mixmoe.backends.hopper.operands import order_of  # noqa: E402
from mixmoe.backends.hopper.schedule import GENERAL  # noqa: E402
from mixmoe.backends.hopper.slots import SlotRows, padded  # noqa: E402
from mixmoe.errors import MixMoEError  # noqa: E402
from mixmoe.fold import Fold  # noqa: E402
from mixmoe.formats import FORMATS, Rounding  # noqa: E402
from mixmoe.preshuffle import order_named  # noqa: E402
from mixmoe.spec import Problem, Recipe, Routed, Weights  # noqa: E402

interpreted.mend()
torch.set_num_threads(1)
BACKEND = hopper()
ORDER = order_named("cdna_n16")
ACTS = [silu(), swiglu(), gelu(), situv2(), silu(limit=1.0)]
LISTS = [n for n in Routed.__dataclass_fields__ if n not in ("block", "problem")]


@pytest.mark.parametrize("name", cases.RECIPES)
def test_recipe(name: str) -> None:
    at = list(cases.RECIPES).index(name)
    recipe = cases.with_act(cases.RECIPES[name], ACTS[at % 5], 1 + at % 2)
    hidden, inter = (160, 96) if cases.fits(recipe, 160, 96) else (256, 128)
    case = cases.make_case(recipe, 5, hidden, inter, bias=at % 2 == 0, skew="masked")
    result = cases.judge(case, BACKEND, "cpu")
    assert cases.passed(result), str(result)


MUTATIONS = ["zero row", "swap experts", "drop K tail", "swap gate and up", "shift scale"]


@pytest.mark.parametrize("how", MUTATIONS)
@pytest.mark.parametrize("name", ["a8w4", "a16i4"])
def test_judge_sees(name: str, how: str) -> None:
    case = cases.make_case(cases.RECIPES[name])

    class Broken(type(BACKEND)):  # type: ignore[misc]
        def prepare(self, weights: Weights, recipe: Recipe) -> Weights:
            return super().prepare(cases.mutated(case, how).weights, recipe)

    assert not cases.passed(cases.judge(case, Broken(), "cpu"))


@pytest.fixture(autouse=True)
def general(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs Triton, not Gluon: every test goes through the general schedule."""
    monkeypatch.setattr(stages, "schedule_for", lambda *ignored: GENERAL)


@pytest.mark.parametrize("fold", list(Fold))
@pytest.mark.parametrize("name", ["a16w4", "a8w4", "a4w4"])
def test_packed_orders(name: str, fold: Fold) -> None:
    case = cases.make_case(cases.RECIPES[name], bias=True, skew="masked")

    class Packs(type(BACKEND)):  # type: ignore[misc]
        def prepare(self, weights: Weights, recipe: Recipe) -> Weights:
            return weights.packed(order_of(fold, True), order_of(fold, False))

    result = cases.judge(case, Packs(), "cpu")
    assert cases.passed(result), str(result)


@pytest.mark.parametrize("block, tokens", [(1, 9), (8, 30), (32, 70)])
def test_tiles_join_blocks(block: int, tokens: int) -> None:
    case = cases.make_case(cases.RECIPES["a8w8"], tokens)
    result = cases.judge(case, BACKEND, "cpu", block=block)
    assert cases.passed(result), str(result)


def test_folded_codes_are_those_of_the_values() -> None:
    x = torch.randn(9, 320) * torch.exp2(torch.randint(-9, 9, (9, 1)).float())
    x[3] = 0
    for name in ("mxfp8", "mxfp4"):
        got = quantise_stage.folded(quantise_stage.quantise(x, FORMATS[name]))
        want = quantise_stage.quantise_fp8(x, FORMATS[name])
        assert cases.differing(got.natural(320), want.natural(320)) == 0


@pytest.mark.parametrize("columns", [32, 128, 352])
def test_rows_in_slot_order(columns: int) -> None:
    """The writers' order is `SlotRows.of` the natural one, with zeros past K; a handed-over row
    and one quantised here are the same bytes."""
    x = torch.randn(5, columns, generator=torch.Generator().manual_seed(columns))
    want = SlotRows.of(FORMATS["fp8_token"].quantise(x))
    got = quantise_stage.quantise_fp8(x, FORMATS["fp8_token"])
    assert torch.equal(got.codes.view(torch.uint8), want.codes.view(torch.uint8))
    assert torch.equal(got.scales, want.scales)
    assert not got.natural(padded(columns)).codes.view(torch.uint8)[:, columns:].any()
    natural = torch.nn.functional.pad(FORMATS["fp8_token"].quantise(x).codes.view(torch.uint8),
                                      (0, padded(columns) - columns))
    assert not torch.equal(got.codes.view(torch.uint8), natural)


def same_lists(got: Routed, want: Routed) -> bool:
    return all(torch.equal(getattr(got, n), getattr(want, n)) for n in LISTS)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize(
    "tokens, topk, experts, block",
    [(0, 2, 4, 16), (1, 8, 256, 16), (3, 2, 7, 32), (64, 8, 256, 16), (300, 8, 31, 64),
     (5, 1, 1, 8), (513, 2, 384, 128), (1025, 8, 40, 32)],
)  # fmt: skip
def test_route(tokens: int, topk: int, experts: int, block: int, mapped: bool) -> None:
    g = torch.Generator().manual_seed(tokens)
    ids = torch.randint(-1, experts + 3, (tokens, topk), generator=g)
    ids = ids if tokens % 2 else ids.to(torch.int32)
    weight = torch.rand(tokens, topk, generator=g)
    map_ = torch.randint(-1, experts, (experts + 2,), generator=g) if mapped else None
    p = Problem(tokens, 64, 64, experts, topk)
    got = route_stage.route(ids, weight, p, block, map_)
    want = cases.REFERENCE.route(ids, weight, p, map_, block)
    assert same_lists(got, want)
    assert torch.equal(got.position, route_stage.placed(want).position)
    if (got.position >= 0).any():  # a weight that moved must be seen
        moved = cases.REFERENCE.route(ids, weight + 1, p, map_, block)
        assert not same_lists(got, moved)


@pytest.mark.parametrize("tokens", [9, 300, 1100])
def test_rows_ride_along(tokens: int) -> None:
    """Codes of x made beside the routing, small and large, are those made alone."""
    g = torch.Generator().manual_seed(tokens)
    ids, weight = torch.randint(-1, 31, (tokens, 8), generator=g), torch.rand(tokens, 8)
    x = torch.randn(tokens, 320, generator=g)
    made = quantise_stage.empty_rows(tokens, 320, x.device)
    writer = quantise_stage.FP8_WRITERS["fp8_token"]
    rows = route_stage.Rows(x, made.codes, made.scales, made.codes.shape[1], writer, 0)
    p = Problem(tokens, 64, 64, 31, 8)
    got = route_stage.route(ids, weight, p, 32, None, rows)
    assert same_lists(got, cases.REFERENCE.route(ids, weight, p, None, 32))
    want = quantise_stage.quantise_fp8(x, FORMATS["fp8_token"])
    have, codes = made.codes.view(torch.uint8), want.codes.view(torch.uint8)
    assert torch.equal(have, codes) and torch.equal(made.scales, want.scales)
    assert codes.any() and not torch.equal(have[1:], codes[:-1])


@pytest.mark.parametrize("rounding", list(Rounding))
@pytest.mark.parametrize("name", quantise_stage.WRITERS)
def test_quantise_bits(name: str, rounding: Rounding) -> None:
    fmt, g = FORMATS[name], torch.Generator().manual_seed(1)
    for columns in (32, 320, 384, 2880):
        if fmt.rows == 1 and fmt.cols and columns % fmt.cols:
            continue
        x = torch.randn(7, columns, generator=g)
        x *= torch.exp2(torch.randint(-40, 40, x.shape, generator=g) / 4)
        x[1], x[2], x[3] = -0.0, x[2] * 1e-39, x[3] * 1e30
        for given in (x, x.to(torch.bfloat16)):
            want = fmt.quantise(given, rounding)
            got = quantise_stage.quantise(given, fmt, rounding)
            assert cases.differing(got, want) == 0
            assert cases.differing(got, fmt.quantise(given * 1.5, rounding)) > 0


@pytest.mark.parametrize("name, bound", [("mxfp8", 2.0**-17.8), ("mxfp4", 2.0**-17.5)])
def test_folded_bound(name: str, bound: float) -> None:
    g = torch.Generator().manual_seed(2)
    x = torch.randn(20, 320, generator=g)
    x *= torch.exp2(torch.randint(-20, 1, (20, 10), generator=g)).repeat_interleave(32, 1)
    x[0] = torch.randn(320, generator=g)  # blocks near each other fold exactly
    want = FORMATS[name].quantise(x).dequantise(torch.float64)
    got = quantise_stage.quantise_fp8(x, FORMATS[name]).natural(320).dequantise(torch.float64)
    error = (got - want).abs().amax(1) / want.abs().amax(1)
    assert 0 < error.max() <= bound
    assert name == "mxfp8" or error[0] == 0


def test_skipped_rows_are_zero_and_combine_ignores_them() -> None:
    recipe = cases.RECIPES["a16w4"]
    case = cases.make_case(recipe, 6, skew="masked")
    routed = BACKEND.route(case.ids, case.topk_weights, case.problem)
    xq = BACKEND.quantise(case.x, case.weights, routed, recipe)
    h = BACKEND.gemm1(xq, case.weights, routed, recipe)
    rows = BACKEND.gemm2(h, case.weights, routed, recipe)
    skipped = case.ids.flatten() < 0
    assert skipped.any() and not h.codes[skipped].any() and not rows[skipped].any()
    out = torch.empty(6, case.weights.H, dtype=torch.bfloat16)
    BACKEND.combine(rows, routed, recipe, out)
    rows[skipped] = torch.nan
    assert torch.equal(out, BACKEND.combine(rows, routed, recipe, torch.empty_like(out)))
    rows[~skipped] *= 2
    assert not torch.equal(out, BACKEND.combine(rows, routed, recipe, torch.empty_like(out)))


def test_refused() -> None:
    case = cases.make_case(cases.RECIPES["a16w4"], hidden=256, inter=128)
    good = order_of(Fold.NARROW, True), order_of(Fold.NARROW, False)
    for orders in ((ORDER, ORDER), (good[1], good[1]), (good[0], good[0])):
        with pytest.raises(MixMoEError, match="rows"):
            BACKEND.check(case.recipe, case.weights.packed(*orders), case.problem)
    BACKEND.check(case.recipe, case.weights.packed(*good), case.problem)
    fnuz = replace(case.recipe, activation=FORMATS["fp8_token_fnuz"])
    with pytest.raises(MixMoEError, match="fp8_token"):
        BACKEND.check(fnuz, case.weights, case.problem)


def test_block_must_be_a_power_of_two() -> None:
    case = cases.make_case(cases.RECIPES["a16w4"])
    with pytest.raises(MixMoEError, match="power of two"):
        BACKEND.route(case.ids, case.topk_weights, case.problem, None, 24)
