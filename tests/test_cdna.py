"""The CDNA backend in the simulator: every kernel variant against float64, hazards and races on.

A launch reads registers before their wait as NaN and reports two waves at one byte without a
barrier between; the wave schedule changes from case to case. All results are simulated.
"""

import pytest
import torch

pytest.importorskip("flydsl")

from cdna_cases import CASES, RECIPES, failures, findings, judge, simulate

import mixmoe.backends.cdna as package
from mixmoe import backends, prepare, verify
from mixmoe import moe as layer
from mixmoe.activations import situv2, swiglu
from mixmoe.backends.cdna import cdna, stages
from mixmoe.backends.cdna.atoms import E2M1, E4M3, E4M3_ROW, GFX950
from mixmoe.backends.cdna.config import Gemm
from mixmoe.backends.cpu import reference
from mixmoe.errors import MixMoEError
from mixmoe.formats import ScaleKind
from mixmoe.preshuffle import order_named
from mixmoe.spec import Problem, Recipe, Weights

# The check engine's cases on one recipe, but for those that repeat another's kernels and routing;
# on the others what their formats touch: tails of K and of rows, rounding, an epilogue each.
REPEATED = {"T=3", "E=7", "duplicate ids", "swiglu alpha 1 limit 2", "situv2 beta 2, 9", "bias"}
EVERY = [("a4w4", name) for name in CASES if name not in REPEATED]
TOUCHED = ("tail 288 x 96", "tail 96 x 288", "tail 32 x 320", "swiglu", "rounding EVEN")
OTHERS = [(r, name) for r in RECIPES[1:] for name in TOUCHED] + [("a8w4_mx", "weight on 1")]
# Tokens with one scale a row, and weights: the sums take them.
ROWS = [("a8w4", name) for name in ("tail 288 x 96", "bias", "weight on 1")]
ROWS += [("a8w8_mxw", "tail 96 x 288")]
ROWS += [("a8w8", name) for name in ("tail 288 x 96", "tail 96 x 288", "bias")]
# Both with scales along K that the MFMA does not take.
ROWS += [("a8w8_block", name) for name in ("tail 288 x 96", "tail 96 x 288", "weight on 1")]
SCHEDULES = ("serial", "reverse", "random", "lockstep")


@pytest.mark.parametrize(("recipe", "case"), EVERY + OTHERS + ROWS)
def test_against_float64(recipe, case):
    schedule = SCHEDULES[(len(case) + len(recipe)) % len(SCHEDULES)]
    with simulate(schedule, seed=len(case)) as session:
        rows = judge(recipe, case, session)
    assert findings(session) == []
    assert len(rows) == len(verify.STAGES) and failures(rows) == []
    exact = {row.stage: row for row in rows}
    assert exact["quantise"].worst == 0


@pytest.mark.parametrize("schedule", ["reverse", "random"])
def test_schedules(schedule):
    with simulate(schedule, seed=3) as session:
        rows = judge("a8w4_mx", "bias", session, act=situv2())
    assert findings(session) == [] and failures(rows) == []


@pytest.mark.parametrize(("recipe", "hidden", "inter"), [
    ("a8w8_mx", 1152, 320), ("a4w4", 1280, 544), ("a8w8_block", 1408, 160)
])
def test_long_k(recipe, hidden, inter):
    """Loops of three to five K tiles, with and without a short last one; several row tiles."""
    with simulate("reverse") as session:
        rows = judge(recipe, "bias", session, tokens=5, hidden=hidden, intermediate=inter,
                     experts=2, topk=2)
    assert findings(session) == [] and failures(rows) == []


def layer_parts(recipe, tokens, topk=2, experts=2, hidden=160, inter=96, seed=0):
    """x, weights, ids, routing weights."""
    g = torch.Generator().manual_seed(seed)
    w13 = torch.randn(experts, 2 * inter, hidden, generator=g) * hidden**-0.5
    w2 = torch.randn(experts, hidden, inter, generator=g) * inter**-0.5
    weights = Weights.from_dense(w13, w2, recipe.weight)
    ids = torch.rand(tokens, experts, generator=g).argsort(dim=1)[:, :topk]
    x = torch.randn(tokens, hidden, generator=g)
    return x.bfloat16(), weights, ids, torch.rand(tokens, topk, generator=g)


def staged(recipe, parts, block, orders=None):
    """h, rows and y of the backend's stages with a sort block and weight orders of our choice."""
    x, weights, ids, share = parts
    backend = cdna()
    if orders is not None:
        weights = weights.packed(*map(order_named, orders))
    weights = backend.prepare(weights, recipe)
    problem = Problem(len(x), weights.H, weights.I, weights.E, ids.shape[1])
    backend.check(recipe, weights, problem)
    routed = backend.route(ids, share, problem, None, block)
    h = backend.gemm1(backend.quantise(x, weights, routed, recipe), weights, routed, recipe)
    rows = backend.gemm2(h, weights, routed, recipe)
    y = torch.empty(len(x), weights.H, dtype=recipe.out_dtype)
    return h, rows, backend.combine(rows, routed, recipe, y)


def same(a, b):
    """Bit for bit: h's codes and scales, rows and y."""
    (h, *others), (g, *more) = a, b
    pairs = [(h.codes.view(torch.uint8), g.codes.view(torch.uint8)), (h.scales, g.scales)]
    return all(torch.equal(p, q) for p, q in [*pairs, *zip(others, more, strict=True)])


@pytest.mark.parametrize("orders", [
    ("cdna_n16", "cdna_n16"), ("cdna_k_major", "cdna_k_major"), ("cdna_k_major_gui", "cdna_n16")
])
@pytest.mark.parametrize("recipe", ["a4w4", "a8w8_mx"])
def test_every_weight_order_gives_the_same_bits(recipe, orders):
    recipe = Recipe.named(recipe)
    parts = layer_parts(recipe, tokens=9, hidden=320)
    with simulate() as session:
        assert same(staged(recipe, parts, 32), staged(recipe, parts, 32, orders))
    assert findings(session) == []


@pytest.mark.parametrize(("recipe", "block"), [
    ("a4w4", 16), ("a4w4", 64), ("a4w4", 96), ("a4w4", 128), ("a8w8_mx", 64), ("a8w8_mx", 256),
    ("a8w4", 64), ("a8w8", 128), ("a8w8_block", 64), ("a8w8_block", 128),
])
def test_every_token_tile_gives_the_same_bits(recipe, block):
    """Tiles of 16 to 128 tokens; 96 and 256 are sort blocks of several tiles."""
    recipe = Recipe.named(recipe)
    parts = layer_parts(recipe, tokens=70)
    with simulate("reverse") as session:
        assert same(staged(recipe, parts, 32), staged(recipe, parts, block))
    assert findings(session) == []


def test_rows_with_a_scale_each_in_every_weight_order():
    recipe = Recipe.named("a8w8")
    parts = layer_parts(recipe, tokens=9, hidden=320)
    with simulate() as session:
        orders = ("cdna_k_major_gui", "cdna_k_major")
        assert same(staged(recipe, parts, 32), staged(recipe, parts, 32, orders))
    assert findings(session) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_stored_in_lines_or_in_fours_are_the_same_bits(dtype):
    """Tiles of 128 tokens stage rows in LDS, tiles of 32 store what a lane holds."""
    recipe = Recipe.named("a4w4", out_dtype=dtype)
    parts = layer_parts(recipe, tokens=70, hidden=288)
    with simulate("random") as session:
        assert same(staged(recipe, parts, 32), staged(recipe, parts, 128))
    assert findings(session) == []


def test_a_row_does_not_depend_on_its_batch():
    recipe = Recipe.named("a8w4_mx")
    x, weights, ids, share = layer_parts(recipe, tokens=40)
    with simulate() as session:
        whole = staged(recipe, (x, weights, ids, share), 32)
        alone = staged(recipe, (x[7:8], weights, ids[7:8], share[7:8]), 32)
    assert torch.equal(whole[2][7:8], alone[2]) and findings(session) == []


def test_the_public_door():
    recipe = Recipe.named("a4w4", act=swiglu(), weight_on=1)
    x, weights, ids, share = layer_parts(recipe, tokens=6)
    exact = layer(x, weights, ids, share, recipe=recipe, backend="reference")
    with simulate() as session:
        packed = prepare(weights, recipe, backend="cdna")
        y = layer(x, packed, ids, share, recipe=recipe, backend="cdna")
    assert findings(session) == []
    assert verify.accuracy.worst(verify.accuracy.row_errors(y, exact)) < 0.1  # two roundings of h


# What is refused.


def test_says_why_it_cannot_run_here(monkeypatch):
    reason = cdna().unavailable()
    assert "no AMD GPU" in reason and "MI300X, MI350X or MI355X" in reason
    with pytest.raises(MixMoEError, match="cannot run here"):
        backends.pick("cpu", "cdna")
    for arch in ("gfx942", "gfx950"):
        with simulate(arch=arch):
            assert cdna().unavailable() is None
    monkeypatch.setattr(package, "architecture", lambda: "gfx90a")
    assert "gfx90a" in cdna().unavailable()


def test_bad_requests_are_refused_before_a_launch():
    recipe = Recipe.named("a4w4")
    x, weights, ids, share = layer_parts(recipe, tokens=4)
    with simulate() as session:
        for orders in (("rows", "rows"), ("cdna_n16_gui", "cdna_n16_gui")):
            with pytest.raises(MixMoEError):
                problem = Problem(4, weights.H, weights.I, weights.E, 2)
                cdna().check(recipe, weights.packed(*map(order_named, orders)), problem)
        for block in (8, 33):
            with pytest.raises(MixMoEError, match="multiple of 16"):
                staged(recipe, (x, weights, ids, share), block)
    assert session.launches == []
    with pytest.raises(MixMoEError, match="split_k is for tokens with a scale for each block"):
        Gemm(GFX950, E2M1, E4M3_ROW, "cdna_n16_gui", 2, 64, 1024, split_k=2)
    with pytest.raises(MixMoEError, match="LDS"):
        Gemm(GFX950, E4M3, E4M3, "cdna_n16", 1, 64, 32768, tokens=128)
    for wrong in ({"tokens": 48}, {"blocks": 3}, {"ring": 6}):
        with pytest.raises(MixMoEError):
            Gemm(GFX950, E4M3, E4M3, "cdna_n16", 1, 64, 256, **wrong)


# The layouts the kernels read are those that weights are packed by.


def offset(modes, coordinate):
    """Dot product of a flat coordinate with the strides."""
    return sum(c * s for c, (_, s) in zip(coordinate, modes, strict=True))


@pytest.mark.parametrize("name", ["cdna_n16", "cdna_n16_gui", "cdna_k_major", "cdna_k_major_gui"])
@pytest.mark.parametrize("operand", [E2M1, E4M3])
def test_device_layouts_are_the_packed_ones(name, operand):
    rows, k, order = 96, 640, order_named(name)
    cfg = Gemm(GFX950, operand, E2M1, name, 2, rows, k)
    (row_modes, col_modes), n = cfg.code_modes(), 2 * rows
    per_word = 32 // operand.bits
    for row in range(n):
        half, inside = divmod(row, rows)
        for at in range(0, k, per_word):
            column, word = divmod(at // per_word, 4)
            parts = [word]
            for size, _ in col_modes[1:]:
                parts.append(column % size)
                column //= size
            place = offset(row_modes, (inside % 16, inside // 16, half))
            place += offset(col_modes, parts)
            assert 32 * place == order.bit_of(row, at, 0, (n, k), operand.bits)
    layout = order.scale_order(ScaleKind.E8M0)
    (row_modes, col_modes) = cfg.scale_modes()
    shared = 1 if cfg.halves_share_scales else 2
    for row in range(n):
        half, inside = divmod(row, rows)
        block = inside // 16
        for b in range(k // 32):
            at = offset(row_modes, (inside % 16, block // shared, 0 if shared == 1 else half))
            at += offset(col_modes, (b % 4, b // 8))
            byte = 4 * at + cfg.scale_byte(half, block, b // 4 % 2)
            padded = layout.layout(n, k // 32)
            assert byte == padded(layout.row_of(row, n), b)


def test_route_and_weights_are_the_twins():
    problem = Problem(17, 64, 64, 5, 3)
    ids = torch.randint(-1, 5, (17, 3), generator=torch.Generator().manual_seed(1))
    share = torch.rand(17, 3)
    got = stages.route(ids, share, problem, None, 64)
    want = reference().route(ids, share, problem, None, 64)
    assert sum(verify.routed_differences(got, want).values()) == 0
    live = (ids >= 0).flatten()
    weights = stages.routing.route_weights(got)
    assert torch.equal(weights, torch.where(live, share.flatten(), 0.0))
