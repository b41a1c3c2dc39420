"""CDNA recipes without scaled MFMAs in the simulator, gfx950 and gfx942, against float64.

Hazards and races are checked in every launch; the wave schedule changes from case to case. All
results are simulated.
"""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("flydsl")

from cdna_cases import CASES, failures, findings, simulate
from test_cdna import layer_parts, staged

from mixmoe import verify
from mixmoe.backends.cdna import cdna
from mixmoe.backends.cdna import stages as all_stages
from mixmoe.backends.cdna.atoms import GFX942, GFX950
from mixmoe.backends.cdna.plain import stages
from mixmoe.backends.cdna.plain.config import SCALE_WORDS, Gemm
from mixmoe.errors import MixMoEError
from mixmoe.formats import ScaleKind, e4m3fn, fp8_1x128, fp8_block, int4_group
from mixmoe.preshuffle import order_named
from mixmoe.spec import CELLS, Problem, Recipe

SCHEDULES = ("serial", "reverse", "random", "lockstep")
# (architecture, recipe, case): each cell once, and what is peculiar to gfx942: its own e4m3,
# MFMAs of half the K, MX formats without scaled MFMAs. The rest of the matrix is in make test-sim.
SHORT = (
    ("gfx950", "a16w16", "tail 288 x 96"),
    ("gfx950", "a16w4", "tail 96 x 288"),
    ("gfx950", "a16i4", "swiglu"),
    ("gfx950", "a8i4", "tail 320 x 32"),
    ("gfx950", "w8a8", "weight on 1"),
    ("gfx950", "w4a8", "tail 32 x 320"),
    ("gfx950", "w8a8_smooth", "masked ids"),
    ("gfx950", "fp8_token x int4_group128", "bias"),
    ("gfx942", "a16w16", "tail 96 x 288"),
    ("gfx942", "fp16 x mxfp4", "tail 320 x 32"),
    ("gfx942", "a8w8", "tail 288 x 96"),
    ("gfx942", "a8w4", "tail 288 x 96"),
    ("gfx942", "a8w8_mxw", "masked ids"),
    ("gfx942", "fp8_token_fnuz x fp8_channel_fnuz", "plain"),
    ("gfx942", "a8w8_block", "tail 96 x 288"),
    ("gfx942", "a4w4", "tail 288 x 96"),
    ("gfx942", "a8w8_mx", "rounding EVEN"),
)
LONG = tuple(
    (arch, recipe, case)
    for arch in ("gfx950", "gfx942")
    for recipe in verify.recipes()
    for case in CASES
    if (len(recipe) + len(case)) % 4 == 0 or case in ("tail 288 x 96", "masked ids")
)


def check(arch, name, case, **session):
    """A case must be right at every stage, or refused before a launch where it is listed so."""
    recipe = verify.recipes([name])[name]
    if not verify.fits(CASES[case], recipe):
        pytest.skip("the formats do not take these sizes")
    with simulate(arch=arch, **session) as simulated:
        rows = list(verify.judge(cdna(), name, recipe, CASES[case]))
    if arch == "gfx950" and "fnuz" in name:
        assert [row.refused for row in rows] == [True] and simulated.launches == []
        return
    assert findings(simulated) == []
    assert len(rows) == len(verify.STAGES) and failures(rows) == []
    assert {row.stage: row for row in rows}["quantise"].worst == 0


@pytest.mark.parametrize(("arch", "recipe", "case"), SHORT)
def test_against_float64(arch, recipe, case):
    seed = len(arch + recipe + case)
    check(arch, recipe, case, schedule=SCHEDULES[seed % 4], seed=seed)


@pytest.mark.sim_long
@pytest.mark.parametrize(("arch", "recipe", "case"), LONG)
def test_the_whole_matrix(arch, recipe, case):
    """Every recipe with two cases, and the cases shared out among the recipes."""
    seed = len(recipe + case)
    check(arch, recipe, case, schedule=SCHEDULES[seed % 4], seed=seed)


# Loops of several rounds and a short last tile: (architecture, recipe, tokens of a tile).
LOOPS = (
    ("gfx942", "a8w8_block", 32), ("gfx950", "a16w16", 128), ("gfx950", "a8w8_block", 64),
)
MORE_LOOPS = (
    ("gfx942", "a4w4", 64), ("gfx942", "a8w8", 64), ("gfx942", "a8w8_mx", 32),
    ("gfx942", "a16w4", 64), ("gfx942", "a16w16", 64), ("gfx942", "w4a8", 64),
    ("gfx942", "a8w8_block", 64), ("gfx942", "fp8_token x int4_group128", 64),
    ("gfx950", "a8w8", 128), ("gfx950", "a8w8_block", 32), ("gfx950", "a16w4", 128),
    ("gfx950", "a16i4", 64), ("gfx950", "a8i4", 64), ("gfx950", "w8a8", 128),
)


def loops(arch, recipe, tokens, monkeypatch):
    """A layer with tiles of so many tokens, 1,408 + 96 values of K in stage 1."""
    monkeypatch.setattr(all_stages, "sort_block", lambda problem, block: tokens)
    monkeypatch.setitem(CASES, "loops", replace(CASES["plain"], tokens=24, hidden=1504))
    check(arch, recipe, "loops", schedule="random", seed=tokens)


@pytest.mark.parametrize(("arch", "recipe", "tokens"), LOOPS)
def test_loops(arch, recipe, tokens, monkeypatch):
    loops(arch, recipe, tokens, monkeypatch)


@pytest.mark.sim_long
@pytest.mark.parametrize(("arch", "recipe", "tokens"), MORE_LOOPS)
def test_loops_of_other_recipes(arch, recipe, tokens, monkeypatch):
    loops(arch, recipe, tokens, monkeypatch)


def same(a, b):
    """Bit for bit: h's codes and scales, rows and y."""
    (h, *others), (g, *more) = a, b
    pairs = [(h.codes.view(torch.uint8), g.codes.view(torch.uint8))]
    pairs += [] if h.scales is None else [(h.scales, g.scales)]
    return all(torch.equal(p, q) for p, q in [*pairs, *zip(others, more, strict=True)])


@pytest.mark.parametrize(("arch", "recipe", "hidden"), [
    ("gfx950", "w8a8", 800), ("gfx942", "w4a8", 416)
])
def test_every_token_tile_gives_the_same_bits(arch, recipe, hidden):
    """Tiles of 16, 32 and 64 tokens, loops of four K tiles with a short last one; the
    first against float64."""
    recipe = Recipe.named(recipe)
    parts = layer_parts(recipe, tokens=24, hidden=hidden, inter=64)
    with simulate("reverse", arch=arch) as session:
        first = staged(recipe, parts, 16)
        assert all(same(first, staged(recipe, parts, block)) for block in (32, 192))
    assert findings(session) == []
    x, weights, ids, share = parts
    exact = verify.EXACT
    routed = exact.route(ids, share, Problem(24, hidden, 64, 2, 2), None, 16)
    rows = exact.gemm2(first[0], weights, routed, recipe)
    assert verify.accuracy.worst(verify.accuracy.row_errors(first[1], rows)) < 2**-8


# What is refused.


def refusal(arch, name):
    """Why a recipe does not run."""
    recipe = verify.recipes([name])[name]
    with simulate(arch=arch) as session:
        (row,) = verify.judge(cdna(), name, recipe, CASES["bias"])
    assert row.refused and session.launches == []
    return row.note


def test_only_fnuz_is_refused_and_only_on_gfx950():
    for name in verify.recipes():
        if "fnuz" in name:
            note = refusal("gfx950", name)
            assert "no MFMA of gfx950 takes" in note and note.endswith("nearest legal: fp8_token")
        for atoms in (GFX950, GFX942):
            recipe = verify.recipes([name])[name]
            if "fnuz" not in name or atoms is GFX942:
                stages.operands(atoms, recipe)


def test_bad_requests_are_refused():
    def gemm(weight, token=fp8_1x128, order="cdna_n16", **changes):
        return Gemm(GFX950, GFX950.mma_of(e4m3fn), weight, token, order, 1, 64, 256, **changes)

    with pytest.raises(MixMoEError, match="16, 32, 64 or 128 tokens"):
        gemm(fp8_block(), tokens=256)
    with pytest.raises(MixMoEError, match="K of a weight scale on gfx950: got 64"):
        gemm(fp8_block(128, 64))
    with pytest.raises(MixMoEError, match="rows of a weight scale on gfx950, a multiple of: got 8"):
        gemm(fp8_block(8, 128))
    recipe = Recipe.named("w4a8")
    _, weights, _, _ = layer_parts(recipe, tokens=4)
    problem = Problem(4, weights.H, weights.I, weights.E, 2)
    for orders in (("rows", "rows"), ("cdna_int4_gui", "cdna_int4"), ("cdna_runs4_gui",) * 2):
        with pytest.raises(MixMoEError):
            stages.check(GFX950, recipe, weights.packed(*map(order_named, orders)), problem)


# The layouts the kernels read are those that weights are packed by.


def offset(modes, coordinate):
    """Dot product of a flat coordinate with the strides."""
    return sum(c * s for c, (_, s) in zip(coordinate, modes, strict=True))


@pytest.mark.parametrize("gate_up", ["", "_gui"])
@pytest.mark.parametrize("recipe", [
    "a8w8", "w8a8", "a16w16", "w4a8", "a8w4", "a8w8_mxw", "bf16 x int4_group64_f32"
])
def test_device_layouts_are_the_packed_ones(recipe, gate_up):
    rows, k = 96, 640
    recipe = verify.recipes([recipe])[recipe]
    name = stages.orders(recipe.weight)[1] + gate_up
    order, mma = order_named(name), stages.operands(GFX942, recipe)
    cfg = Gemm(GFX942, mma, recipe.weight, recipe.activation, name, 2, rows, k)
    bits, n = recipe.weight.element.bits, 2 * rows
    row_modes, col_modes = cfg.code_modes()
    for row in range(n):
        half, inside = divmod(row, rows)
        for at in range(0, k, cfg.run):
            step, lane = divmod(at, 4 * cfg.run)
            bit = step * cfg.run * bits  # of the lane's share
            column, low = bit // 128 * 4 + lane // cfg.run, bit % 128
            place = offset(row_modes, (inside % 16, inside // 16, half))
            place += offset(col_modes, (0, column))
            assert 32 * place + low == order.bit_of(row, at, 0, (n, k), bits)
    if not cfg.weight_period:
        return
    kind = recipe.weight.scale
    layout = order.scale_order(kind)
    row_modes, col_modes = cfg.scale_modes()
    blocks, per = k // cfg.weight_period, 4 // SCALE_WORDS[kind]
    per_word = {ScaleKind.E8M0: 4, ScaleKind.BF16: 2, ScaleKind.F32: 1}[kind]
    for row in range(n):
        half, inside = divmod(row, rows)
        for b in range(blocks):
            words = offset(row_modes, (inside % 16 // 4, inside // 16, half))
            words += offset(col_modes, (0, b % per, b // per))
            want = layout.layout(n, blocks)(layout.row_of(row, n), b)
            assert words * per_word + inside % 4 == want


def test_orders_follow_the_scales():
    assert stages.orders(int4_group(64)) == ("cdna_runs4_gui", "cdna_runs4")
    assert stages.orders(fp8_block()) == ("cdna_n16_gui", "cdna_n16")
    assert set(CELLS) <= set(verify.recipes())
