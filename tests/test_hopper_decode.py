"""Every decode kernel that the tile chooser can pick compiles for sm_90a without a complaint.

The launchers run on meta tensors with a kernel that only notes its arguments; those are compiled.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hopper_compile import TUNED_FOR, Resources, compile_gluon

from mixmoe.activations import gelu, silu, situv2, swiglu
from mixmoe.backends.hopper import (
    choose,
    gemm1_decode,
    gemm1_token,
    gemm2_decode,
    gemm2_long,
    gemm2_tokens,
    quantise,
)
from mixmoe.backends.hopper.decode import Stream
from mixmoe.backends.hopper.prefill_schedule import PREFILL
from mixmoe.backends.hopper.schedule import DECODE, Call, schedule_for
from mixmoe.backends.hopper.slots import SlotRows, padded
from mixmoe.errors import MixMoEError
from mixmoe.fold import Fold
from mixmoe.formats import mxfp4
from mixmoe.preshuffle import HopperTile, Packed, hopper_fp4
from mixmoe.spec import Problem, Recipe, Routed, Tile, Weights

SHAPES = {
    "dsv3_tp8": (7168, 256, 256, 8),
    "dsv3_ep": (7168, 2048, 32, 8),
    "gptoss": (2880, 2880, 128, 4),
    "kimi_tp8": (7168, 256, 384, 8),
    "qwen3_tp4": (4096, 384, 128, 8),
    "qwen3_tp8": (4096, 192, 128, 8),
}
HALF_SM = 228 * 1024 // 2 - 1024


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def packed(experts: int, rows: int, k: int, gate_up: bool, fold: Fold) -> Packed:
    order = hopper_fp4(HopperTile(gate_up=gate_up, warps=1), fold)
    units, wide = -(-rows // 16), -(-k // 128)
    codes = meta(experts, units * wide * 8, 32, dtype=torch.int32)
    scales = meta(experts, units * wide, 64, dtype=torch.uint8)
    return Packed(codes, scales, meta(experts, rows), order, mxfp4, (experts, rows, k))


def weights(shape: tuple[int, ...], bias: bool = False, fold: Fold = Fold.NARROW) -> Weights:
    hidden, inter, experts, _ = shape
    return Weights(
        packed(experts, 2 * inter, hidden, True, fold), packed(experts, hidden, inter, False, fold),
        meta(experts, 2 * inter) if bias else None, meta(experts, hidden) if bias else None,
    )


def routed(problem: Problem, block: int) -> Routed:
    p = problem.padded_routes(block)
    ids, experts, valid, offsets, counts = (
        meta(n, dtype=torch.int32)
        for n in (p, p // block, 2, problem.experts + 1, problem.experts)
    )
    return Routed(ids, meta(p), experts, valid, offsets, counts, block, problem)


class Recorder:
    """Stands where a kernel stands and keeps the arguments of its launch."""

    def __getitem__(self, grid: tuple[int, ...]) -> "Recorder":
        self.grid = grid
        return self

    def __call__(self, *args: Any, **options: Any) -> None:
        self.args, self.options = args, options


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch):
    """compiled(module, name, launch) -> Resources of the kernel that launch() starts."""

    def run(module: Any, name: str, launch: Any) -> Resources:
        kernel, recorder = getattr(module, name), Recorder()
        monkeypatch.setattr(module, name, recorder)
        launch()
        monkeypatch.setattr(module, name, kernel)
        return compile_gluon(kernel, *recorder.args, **recorder.options)

    return run


def assert_good(resources: Resources, tile: Tile) -> None:
    """No complaint; no spill in a loop over K, a few values outside may wait in local memory."""
    assert not resources.messages, (tile, resources.messages)
    inner = resources.loops()[0][1]  # the tile's where K is one step: it holds a block's beginning
    spilled = sum(n for op, n in inner.items() if op.startswith(("STL", "LDL")))
    assert spilled <= (4 if tile.rows == 64 and tile.tokens == 1 else 0), (tile, inner)
    assert resources.spills <= 96, (tile, resources.spills)
    teams = 2 if tile.warps == 4 else 1
    assert resources.qgmma in (4 * teams, 8 * teams), (tile, resources.qgmma)
    room = HALF_SM if tile.ctas_per_sm == 2 else 227 * 1024
    assert resources.shared <= room, (tile, resources.shared)


def rows_of(rows: int, columns: int) -> SlotRows:
    return SlotRows(meta(rows, padded(columns), dtype=torch.float8_e4m3fn), meta(rows, 1))


def stage1(compiled, problem: Problem, w: Weights, recipe: Recipe, tile: Tile) -> Resources:
    x = rows_of(problem.tokens, problem.hidden)
    h, lists = meta(problem.routes, problem.intermediate), routed(problem, tile.tokens)
    return compiled(
        gemm1_decode, "gemm1_decode",
        lambda: gemm1_decode.launch(x, w, lists, recipe, tile, h),
    )


def hidden(problem: Problem, quantised: bool) -> torch.Tensor | SlotRows:
    shape = problem.routes, problem.intermediate
    return rows_of(*shape) if quantised else meta(*shape)


@pytest.mark.parametrize("block", [1, 2, 4, 8, 16, 32])
def test_stage1(compiled, block):
    problem = Problem(64, 7168, 256, 256, 8)
    tile = choose.decode_stream(block)
    resources = stage1(
        compiled, problem, weights(SHAPES["dsv3_tp8"]), Recipe.named("a8w4"), tile
    )
    assert_good(resources, tile)
    assert_lean(resources)


def assert_lean(resources: Resources) -> None:
    """The loop over 16 x 256 weights: two PRMT a word, scale bytes loaded as they are, and what a
    stage costs once (128 of K took 113 to 128 instructions)."""
    count, opcodes = resources.loops()[0]
    assert opcodes["PRMT"] == 32 and opcodes["LDS.U8"] == 4, opcodes
    assert count <= (208 if TUNED_FOR else 216), count


@pytest.mark.parametrize("act", [silu(1.0), swiglu(), gelu(), situv2()])
def test_stage1_activations_with_bias_and_weight(compiled, act):
    problem = Problem(64, 2880, 2880, 128, 4)
    recipe = Recipe("fp8_token", "mxfp4", act=act, weight_on=1)
    tile = choose.decode_stream(8)
    assert_good(stage1(compiled, problem, weights(SHAPES["gptoss"], True), recipe, tile), tile)


def test_stage1_wide_fold(compiled):
    problem, tile = Problem(8, 7168, 256, 256, 8), choose.decode_stream(2)
    w = weights(SHAPES["dsv3_tp8"], fold=Fold.WIDE)
    resources = stage1(compiled, problem, w, Recipe.named("a8w4"), tile)
    assert_good(resources, tile)
    narrow = stage1(compiled, problem, weights(SHAPES["dsv3_tp8"]), Recipe.named("a8w4"), tile)
    assert resources.count("SEL") > narrow.count("SEL"), "the wide table is chosen, the narrow not"
    assert_lean(narrow)
    with pytest.raises(AssertionError):
        assert_lean(resources)


SHORT = [s for s in SHAPES if SHAPES[s][1] <= choose.RESIDENT_COLUMNS]
ROWS = [(s, block) for s in SHORT for block in (1, 2, 8, 16, 32)]


@pytest.mark.parametrize(("shape", "block"), ROWS)
def test_stage2_rows(compiled, shape, block):
    hidden_size, inter, experts, topk = SHAPES[shape]
    problem = Problem(64, hidden_size, inter, experts, topk)
    tile, w = choose.decode_rows(problem, block), weights(SHAPES[shape], bias=shape == "kimi_tp8")
    h = hidden(problem, not choose.quantises_rows(problem, block))
    out = meta(problem.routes, problem.hidden)
    resources = compiled(
        gemm2_decode, "gemm2_rows",
        lambda: gemm2_decode.launch_rows(
            h, w, routed(problem, block), Recipe.named("a8w4"), tile, out
        ),
    )
    assert_good(resources, tile)


LONG = {"dsv3_ep": False, "gptoss": True}  # whether with a bias
LONG_ROWS = [(s, block) for s in LONG for block in (1, 2, 8, 16, 32)] + [("gptoss", 4)]


@pytest.mark.parametrize(("shape", "block"), LONG_ROWS)
def test_stage2_of_long_rows(compiled, shape, block):
    hidden_size, inter, experts, topk = SHAPES[shape]
    problem, tile = Problem(64, hidden_size, inter, experts, topk), choose.decode_stream(block)
    assert_good(long_rows(compiled, problem, weights(SHAPES[shape], LONG[shape]), tile), tile)


def long_rows(compiled, problem: Problem, w: Weights, tile: Tile) -> Resources:
    h = rows_of(problem.routes, problem.intermediate)
    out = meta(problem.routes, problem.hidden, dtype=torch.bfloat16)
    lists = routed(problem, tile.tokens)
    return compiled(
        gemm2_long, "gemm2_long",
        lambda: gemm2_long.launch(h, w, lists, Recipe.named("a8w4"), tile, out, early=True),
    )


def test_both_stages_share_their_loop(compiled):
    """Long rows cost stage 2 what stage 1 pays a unit; the wide fold pays for its tables."""
    problem, tile = Problem(64, *SHAPES["gptoss"]), choose.decode_stream(8)
    resources = long_rows(compiled, problem, weights(SHAPES["gptoss"]), tile)
    assert_lean(resources)
    wide = long_rows(compiled, problem, weights(SHAPES["gptoss"], fold=Fold.WIDE), tile)
    assert_good(wide, tile)
    with pytest.raises(AssertionError):
        assert_lean(wide)


FEW = [(shape, 1) for shape in SHAPES] + [("qwen3_tp4", 2), ("qwen3_tp8", 2)]


@pytest.mark.parametrize(("shape", "tokens"), FEW)
def test_stage1_of_few_tokens(compiled, shape, tokens):
    hidden_size, inter, experts, topk = SHAPES[shape]
    tile, _ = choose.few_tokens(Problem(tokens, *SHAPES[shape]))
    w = weights(SHAPES[shape], bias=shape == "gptoss")
    ids, given = meta(tokens, topk, dtype=torch.int64), meta(tokens, topk)
    resources = compiled(
        gemm1_token, "gemm1_token",
        lambda: gemm1_token.launch(
            meta(tokens, hidden_size, dtype=torch.bfloat16), w, ids, given, Recipe.named("a8w4"),
            tile, meta(tokens * topk, inter),
        ),
    )
    assert_good(resources, tile)


def one_token(compiled, shape: tuple[int, ...], tiles: tuple[Tile, Tile]) -> list[Resources]:
    """Both stages, the most that their epilogues do."""
    hidden_size, inter, _, topk = shape
    problem, w, recipe = Problem(1, *shape), weights(shape, bias=True), Recipe.named("a8w4")
    ids, given = meta(1, topk, dtype=torch.int64), meta(1, topk)
    row, rows = meta(1, hidden_size, dtype=torch.bfloat16), meta(topk, inter)
    launches = {
        gemm1_token: lambda: gemm1_token.launch(
            row, w, ids, given, replace(recipe, act=swiglu()), tiles[0], rows
        ),
        gemm2_tokens: lambda: gemm2_tokens.launch_tokens(
            hidden(problem, not choose.quantises_tokens(problem)), w, ids, given, None, recipe,
            tiles[1], row,
        ),
    }
    return [compiled(module, module.__name__.split(".")[-1], f) for module, f in launches.items()]


def assert_both_fit(stage1: Resources, stage2: Resources) -> None:
    """Two CTAs of stage 1 and one of stage 2 on an SM: 64 K registers, 228 KB."""
    assert 384 * (2 * stage1.registers + stage2.registers) <= 65536
    assert 2 * (stage1.shared + 1024) + stage2.shared + 1024 <= 228 * 1024


BESIDE = [SHAPES["gptoss"], SHAPES["qwen3_tp4"], (4224, 2048, 5, 8), (96, 160, 3, 4)]


@pytest.mark.parametrize("shape", BESIDE)
def test_stages_of_one_token_beside_each_other(compiled, shape):
    problem = Problem(1, *shape)
    tiles = choose.few_tokens(problem)
    assert [(tile.ctas_per_sm, tile.stages) for tile in tiles] == [(2, 6), (1, 5)]
    made = one_token(compiled, shape, tiles)
    assert_both_fit(*made)
    for tile, resources in zip(tiles, made, strict=True):
        assert_good(resources, tile)


@pytest.mark.parametrize("which", [0, 1])
def test_stages_that_do_not_fit_beside_each_other(compiled, which, monkeypatch):
    """Either stage as it is where each has all of an SM: a ring too long, too many registers."""
    problem = Problem(1, *SHAPES["gptoss"])
    tiles = list(choose.few_tokens(problem))
    made = one_token(compiled, SHAPES["gptoss"], (tiles[0], tiles[1]))
    monkeypatch.setattr(choose, "beside", lambda problem: False)
    tiles[which] = choose.few_tokens(problem)[which]
    with pytest.raises(AssertionError):
        assert_both_fit(*one_token(compiled, SHAPES["gptoss"], (tiles[0], tiles[1])))
    made[which] = replace(made[which], registers=80)
    with pytest.raises(AssertionError):
        assert_both_fit(*made)


def test_which_stages_share_an_sm():
    """At most two tiles of stage 2 a CTA, a ring of five stages."""
    served = {shape for shape in SHAPES if choose.beside(Problem(1, *SHAPES[shape]))}
    assert served == {"gptoss", "qwen3_tp4", "qwen3_tp8"}
    assert not choose.beside(Problem(2, 2048, 768, 128, 8)), "more than a token"
    assert not choose.beside(Problem(1, 4096, 14336, 8, 2)), "h fills what the ring needs"


def test_few_tokens_go_without_routing():
    """One token always; two of them where a CTA's quantisation of x is short (as measured)."""
    served = {
        (shape, tokens)
        for shape, sizes in SHAPES.items() for tokens in range(5)
        if choose.is_few(Problem(tokens, *sizes))
    }  # fmt: skip
    short = {(shape, 2) for shape, sizes in SHAPES.items() if sizes[0] <= 4096}
    assert served == {(shape, 1) for shape in SHAPES} | short


@pytest.mark.parametrize("shape", SHAPES)
def test_stage2_tokens(compiled, shape):
    hidden_size, inter, experts, topk = SHAPES[shape]
    tokens = choose.SUM_TOKENS if shape in SHORT else 1
    problem = Problem(tokens, hidden_size, inter, experts, topk)
    assert choose.decode_sums(Problem(tokens + 1, hidden_size, inter, experts, topk)) is None
    tile, w = choose.decode_sums(problem), weights(SHAPES[shape], bias=shape == "gptoss")
    assert tile is not None
    ids, given = meta(tokens, topk, dtype=torch.int64), meta(tokens, topk)
    h = hidden(problem, not choose.quantises_tokens(problem))
    out = meta(tokens, hidden_size, dtype=torch.bfloat16)
    resources = compiled(
        gemm2_tokens, "gemm2_tokens",
        lambda: gemm2_tokens.launch_tokens(
            h, w, ids, given, None, Recipe.named("a8w4"), tile, out
        ),
    )
    assert_good(resources, tile)
    if shape in SHORT:  # float32 h: four columns a load, in slot order too
        assert resources.count("LDG.E.128") >= 4
    else:
        assert resources.count("LDGSTS.E.BYPASS.128") >= 1


@pytest.mark.parametrize("shape", SHAPES)
def test_long_rows_of_one_token_are_quantised_apart(shape, monkeypatch):
    hidden_size, inter, experts, topk = SHAPES[shape]
    seen: list[Any] = []
    monkeypatch.setattr(gemm1_token, "launch", lambda *args: None)
    monkeypatch.setattr(quantise, "launch_rows", lambda *args, **options: None)
    monkeypatch.setattr(gemm2_decode, "launch_tokens", lambda h, *args: seen.append(h))
    x = meta(1, hidden_size, dtype=torch.bfloat16)
    call = Call(
        x, weights(SHAPES[shape]), meta(1, topk, dtype=torch.int64), meta(1, topk), None,
        Recipe.named("a8w4"), Problem(1, hidden_size, inter, experts, topk),
    )
    DECODE.few(call, torch.empty_like(x))
    assert len(seen) == 1 and isinstance(seen[0], SlotRows) == (shape not in SHORT)


def test_a_tile_that_fits_no_warps_is_refused():
    w = packed(2, 64, 256, True, Fold.NARROW)
    for tile in (Tile(8, 32, 128, 4, 8, 2), Tile(33, 64, 128, 4, 8, 2), Tile(8, 64, 64, 4, 4, 2)):
        with pytest.raises(MixMoEError):
            Stream.of(tile, w)


def test_too_few_registers_are_seen(compiled):
    """Four CTAs an SM leave 40 registers a thread: the checks above must be able to fail."""
    problem, tile = Problem(64, 7168, 256, 256, 8), Tile(8, 64, 128, 4, 4, 2, ctas_per_sm=4)
    resources = stage1(compiled, problem, weights(SHAPES["dsv3_tp8"]), Recipe.named("a8w4"), tile)
    with pytest.raises(AssertionError):
        assert_good(resources, tile)


@pytest.mark.parametrize("inter", [*range(32, 385, 32), 512])
@pytest.mark.parametrize("block", [1, 8, 32])
def test_a_ring_outlasts_a_tile(inter, block):
    """A team that has skipped the other's tile still knows a stage's fill from the one before."""
    tile = choose.decode_rows(Problem(64, 7168, inter, 256, 8), block)
    assert tile.stages > -(-inter // tile.k) + 1, tile


@pytest.mark.parametrize("block", [1, 2, 4, 8, 16, 32])
def test_rows_too_long_to_stay_are_refused(block):
    with pytest.raises(MixMoEError, match="stay in shared memory"):
        choose.decode_rows(Problem(64, 7168, 7168, 32, 8), block)


@pytest.mark.parametrize("block", [0, 3, 24, 48, 256])
def test_a_block_that_is_no_power_of_two_is_refused(block):
    """Routes that another backend sorted may come in any blocks."""
    w, problem = weights(SHAPES["dsv3_tp8"]), Problem(64, *SHAPES["dsv3_tp8"])
    with pytest.raises(MixMoEError, match="power of two"):
        schedule_for(Recipe.named("a8w4"), w, problem, block)
    assert schedule_for(Recipe.named("a8w4"), w, problem, 16) is DECODE


INTER = [32, 96, 320, 384, 416, 512, 768, 1024, 2048, 2880, 4064, 7168, 14336, 32768]


@pytest.mark.parametrize("inter", INTER)
@pytest.mark.parametrize("topk", [1, 2, 3, 4, 8])
def test_decode_serves_every_row(inter, topk):
    """From one token to few: decode, with tiles that fit, whatever the length of a row."""
    recipe, shape = Recipe.named("a8w4"), (256, inter, 16, topk)
    for tokens in (1, 2, 16, 40):
        problem = Problem(tokens, *shape)
        block = choose.block_for(problem)
        if block == 32:
            continue  # enough routes an expert for prefill
        assert schedule_for(recipe, weights(shape), problem, block) is DECODE
        long = inter > choose.RESIDENT_COLUMNS
        tile = choose.decode_stream(block) if long else choose.decode_rows(problem, block)
        assert tile.stages >= 3 and tile.tokens == block
        sums = choose.decode_sums(problem)
        if topk * inter > 1 << 16:
            assert sums is None, "a token's rows of h do not stay in shared memory"
        elif tokens == 1 and topk != 3:
            assert sums is not None and sums.stages >= 2


def test_prefill_takes_over():
    for shape, tokens in ((SHAPES["gptoss"], 1024), ((4096, 14336, 8, 2), 1024)):
        problem = Problem(tokens, *shape)
        block = choose.block_for(problem)
        assert schedule_for(Recipe.named("a8w4"), weights(shape), problem, block) is PREFILL
