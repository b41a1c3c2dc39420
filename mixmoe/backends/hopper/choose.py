"""Choosing tiles: candidates are enumerated, refused for a physical reason, and costed.

The model counts what an SM must do for one K step (bytes from HBM or L2, weights decoded by the
ALUs, tensor-core work), takes the slowest, and multiplies by steps and waves. ``tuned/*.json`` only
replaces its answer for shapes that were timed. Constants: one H200, 2026-11-24 unless stated.
"""

import json
from dataclasses import dataclass, replace
from functools import cache
from math import exp, log1p
from pathlib import Path

from mixmoe.backends.hopper.launch import pow2
from mixmoe.backends.hopper.operands import Operand, math_of, operand
from mixmoe.errors import MixMoEError
from mixmoe.formats import Format, ScaleKind
from mixmoe.spec import Problem, Tile

SMS = 132
SMEM = 227 * 1024  # bytes a CTA may use; 228 KB an SM
HBM = 4.48e6  # bytes/us, measured read with a clean L2
L2 = 5.5e6  # bytes/us into all SMs
TENSOR = {  # FLOP/us, dense
    "int8": 1.4e9, "fp8e4nv": 1.4e9, "bf16": 0.75e9, "fp16": 0.75e9, "fp32": 0.37e9,
}  # fmt: skip
DECODE = 132 * 128 * 1.7e3 / 8  # weights/us: 8 ALU lanes' instructions for one decoded weight
SYNC = 0.05  # us: barriers of a K step; a promoted sum also waits for the tensor core
START = 3.0  # us: launch, first loads, epilogue
TUNED = Path(__file__).parents[2] / "tuned" / "hopper.json"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A tile with its predicted time in us, or the reason why it cannot run."""

    tile: Tile
    us: float
    refusal: str | None


@dataclass(frozen=True, slots=True)
class Gemm:
    """One grouped GEMM: ``routes`` rows over ``experts``, ``rows`` weight rows of ``k`` each."""

    routes: int
    experts: int
    rows: int
    k: int
    activation: Format
    weight: Format
    accumulate: str = "auto"

    @property
    def hit(self) -> float:
        """Experts that uniform routing is expected to hit."""
        return experts_hit(self.routes, self.experts)

    def blocks(self, block: int) -> float:
        """Blocks of that many routes, expected: half a block is lost per expert that is hit."""
        per_expert = self.routes / self.hit
        return self.hit * max(1.0, per_expert / block + (0.5 if per_expert > block else 0.0))


def experts_hit(routes: int, experts: int) -> float:
    """Experts that get at least one of ``routes`` uniform routes, expected."""
    if experts == 1:
        return 1.0
    return max(1.0, experts * (1 - exp(routes * log1p(-1 / experts))))


def stage(
    problem: Problem, number: int, activation: Format, weight: Format, accumulate: str
) -> Gemm:  # fmt: skip
    """gemm1 (1) or gemm2 (2) of a layer."""
    n, k = (2 * problem.intermediate, problem.hidden)
    if number == 2:
        n, k = problem.hidden, problem.intermediate
    return Gemm(problem.routes, problem.experts, n, k, activation, weight, accumulate)


def block_for(problem: Problem) -> int:
    """Routes per sorted block: about what an expert that is hit gets, at most 32.

    Small blocks waste no place in decode, and the wider tiles of the general path join blocks.
    """
    mean = problem.routes / experts_hit(problem.routes, problem.experts)
    if problem.tokens == 1:
        return 1
    return next((block for block, most in ((2, 1.3), (8, 4.6), (16, 9.5)) if mean <= most), 32)


def check_block(block: int) -> int:
    """``block``, the routes that are sorted together; refused where no kernel takes it."""
    if block & (block - 1) or not 1 <= block <= 128:
        near = min(128, 1 << max(0, block).bit_length())
        raise MixMoEError("hopper's sort block is a power of two up to 128", block, near)
    return block


def stored_bytes(fmt: Format) -> float:
    """Bytes of a value with its share of the scale."""
    return fmt.bits_per_value / 8


def candidates(gemm: Gemm, block: int) -> list[Candidate]:
    """Every tile of the general path on routes sorted in blocks of ``block``, costed or refused."""
    w, x = operand(gemm.weight), operand(gemm.activation)
    group = min(w.step_of(128), x.step_of(128))  # columns that share a scale of either operand
    tiles = [
        Tile(tokens, rows, k, stages, warps)
        for tokens in (16, 32, 64, 128)
        for rows, warps in ((64, 4), (128, 4), (128, 8), (256, 8))
        for k in ((64, 128) if group > 32 else (32,))
        for stages in (3, 5)
    ]
    return [costed(gemm, tile, block, w, x) for tile in tiles]


def refusal(gemm: Gemm, tile: Tile, block: int, w: Operand, x: Operand) -> str | None:
    """Why a tile cannot run, in one line of physics; None where it can."""
    if tile.tokens < block:
        return f"a tile holds whole sorted blocks, and these have {block} routes"
    k = min(w.step_of(tile.k), x.step_of(tile.k))
    if k != tile.k:
        return f"a K step of {tile.k} would straddle scale groups of {k}"
    sums = tile.tokens * tile.rows // (32 * tile.warps)
    if math_of(gemm.activation, gemm.weight, gemm.accumulate).promote:
        scaled = w.step is not None or x.step is not None
        if sums > (32 if scaled and tile.rows > 64 else 64) or min(tile.tokens, tile.rows) > 64:
            return "sums, promoted sums and their scales spill out of a thread's 255 registers"
    decoded = 0 if whole(gemm.weight) else tile.rows * k // (64 * tile.warps)
    if sums > 128 or (decoded and sums + decoded >= 128):
        return "sums and decoded weights fill more than half of a thread's 255 registers"
    if tile.rows > 128 and tile.tokens < 64:
        return "tall tiles of few tokens leave most SMs without one"
    smem = shared(gemm, tile)
    if smem > SMEM:
        return f"{smem} bytes of shared memory, an SM has {SMEM}"
    return None


def shared(gemm: Gemm, tile: Tile) -> int:
    """Bytes of the load ring, and of one decoded tile on its way to the tensor core."""
    weight, activation = stored_bytes(gemm.weight), stored_bytes(gemm.activation)
    stored = tile.k * (tile.rows * weight + tile.tokens * activation)
    decoded = 0 if whole(gemm.weight) else tile.k * (tile.rows + tile.tokens) * 2
    return int(stored) * tile.stages + decoded


def whole(fmt: Format) -> bool:
    """Whether values reach the tensor core as stored."""
    return fmt.scale is not ScaleKind.E8M0 and fmt.element.bits > 4


def costed(gemm: Gemm, tile: Tile, block: int, w: Operand, x: Operand) -> Candidate:
    """The candidate with its time, or infinity and the refusal."""
    why = refusal(gemm, tile, block, w, x)
    if why is not None:
        return Candidate(tile, float("inf"), why)
    ctas = max(1.0, gemm.blocks(tile.tokens)) * -(-gemm.rows // tile.rows)
    warps = 16 if tile.tokens * tile.rows > 8192 or not whole(gemm.weight) else 24
    resident = max(1, min(warps // tile.warps, SMEM // max(1, shared(gemm, tile))))
    busy = min(1.0, ctas / (SMS * resident))
    share = SMS * resident * busy  # CTAs that run at once
    math = math_of(gemm.activation, gemm.weight, gemm.accumulate)
    weights, values = tile.rows * tile.k, tile.tokens * tile.k
    reused = gemm.blocks(tile.tokens) / gemm.hit
    hbm = weights * stored_bytes(gemm.weight) / reused
    l2 = weights * stored_bytes(gemm.weight) + values * stored_bytes(gemm.activation)
    active = min(SMS, share)
    decode = 0.0 if whole(gemm.weight) else weights / (DECODE * active / SMS) * share
    tensor = 2.0 * weights * max(tile.tokens, 16) / (TENSOR[str(math.dtype)] * active / SMS) * share
    promote = tile.rows * tile.tokens * share / (DECODE * 4 * active / SMS) if math.promote else 0.0
    flight = tile.stages * l2 / 0.9  # a load takes about 0.9 us: bytes/us that one CTA can ask for
    latency = l2 / flight
    step = max(hbm * share / HBM, l2 * share / L2, decode + promote, tensor, latency)
    if math.promote:  # two warpgroups wait for each other at every sum
        step = (step + 2 * SYNC) * (1.3 if tile.warps > 4 else 1.0)
    step += SYNC
    waves = -(-ctas // (SMS * resident))
    return Candidate(tile, START + waves * (step * -(-gemm.k // tile.k) + 1.0), None)


@cache
def tuned() -> dict[str, Tile]:
    """Timed choices, ``key(gemm, block) -> Tile``; empty where the file is not installed."""
    if not TUNED.exists():
        return {}
    return {name: Tile(**fields) for name, fields in json.loads(TUNED.read_text()).items()}


def key(gemm: Gemm) -> str:
    """What a timed choice is filed under: formats, sizes, and the power of two of routes."""
    sizes = f"{gemm.rows}x{gemm.k}x{gemm.experts}"
    return f"{gemm.activation}x{gemm.weight}/{sizes}/{pow2(gemm.routes)}"


@cache
def general(gemm: Gemm, block: int = 1) -> Tile:
    """The general path's tile: a timed one that fits, else the cheapest by the model."""
    if (found := tuned().get(key(gemm))) is not None and found.tokens >= block:
        return found
    best = min(candidates(gemm, block), key=lambda c: c.us)
    if best.refusal is not None:
        raise MixMoEError("no tile of the general path", best.refusal)
    return best.tile


# Columns of h up to which decode stage 2 keeps a block's rows in shared memory; longer ones come
# through the ring with the weights, as x does in stage 1.
RESIDENT_COLUMNS = 384
# Tokens up to which a layer's stage 2 adds the experts up in one kernel: as far as rows and a sum
# behind them were not faster; rows longer than RESIDENT_COLUMNS: one token (H200, 2026-11-28).
SUM_TOKENS = 4
# Values of x up to which a layer of two tokens, or three, goes without routing: CTAs quantise x for
# themselves (H200, 2026-11-28, T 2, us: H 4096 17.7 of 19.5 and 12.3 of 14.8, H 7168 22.4 of 21.6).
FEW_VALUES = 8192
# By routes of a block: columns that a slice of K takes in a stage, slices of K. Few routes take
# many slices, because tiles of few weight rows end together; 1: each team has rows of its own
# (H200, 2026-11-28).
STREAMS = {1: (256, 4), 2: (256, 4), 4: (256, 4), 8: (256, 2), 16: (256, 2), 32: (256, 1)}
HALF_SM = 113 * 1024  # bytes of shared memory of each of two CTAs on an SM


@dataclass(frozen=True, slots=True)
class Part:
    """What CTAs of a kernel take of an SM: how many, bytes of shared memory of each, registers of a
    thread at the launch (None: all that there are)."""

    ctas: int
    room: int
    registers: int | None = None


HALVES = Part(2, HALF_SM)
# Two CTAs of stage 1 and one of stage 2 beside them: 228 KB with the 1 KB that each takes, and
# 384 x (2 x 48 + 72) registers of 64 K: no more than they need, with 64 stage 2 spills.
BESIDE = Part(2, 60 * 1024, 48), Part(1, 105 * 1024, 72)


def ring(tokens: int, k: int, slices: int, resident: int | None, part: Part = HALVES) -> Tile:
    """A decode tile with as many ring stages as a CTA's part of an SM holds beside sums and
    resident rows.

    Eight warps hold 128 / slices weight rows. ``resident`` is bytes of rows that stay in shared
    memory; None: rows come through the ring with the weights.
    """
    rows = 128 // slices
    weights = rows // 16 * (k * slices // 128) * 1088  # 16 x 128: 1 KiB of codes, 64 B of scales
    columns = max(16 if slices > 1 else 8, tokens * slices)  # of both teams' products
    a_stage = weights + (columns * k if resident is None else 0)
    sums = 2 * columns * rows * 4 if slices > 1 else 0  # teams that part K hand two tiles over
    left = part.room - sums - (resident or 0) - 1024
    stages = max(0, min(16, left // a_stage))
    return Tile(tokens, rows, k, stages, 8, slices, part.ctas, part.registers)


def decode_stream(block: int) -> Tile:
    """Decode stage 1, and stage 2 with long rows of h, which come through the ring: two teams of 4
    warps."""
    k, slices = STREAMS[block]
    return replace(ring(block, k, slices, None), warps=4)


def few_tokens(problem: Problem) -> tuple[Tile, Tile]:
    """Both stages of `is_few` tokens; of stage 1 a row of x is resident: one 16-row unit, K over
    the 8 matrix warps."""
    first, second = BESIDE if beside(problem) else (HALVES, HALVES)
    x = resident_bytes(problem.hidden, 128 * 8)
    return ring(1, 128, 8, x, first), sums_ring(problem, second)


def beside(problem: Problem) -> bool:
    """Whether CTAs of both stages of one token share an SM: stage 2's ring is full when h comes.

    It pays where one CTA an SM has two tiles of stage 2 at most, and its ring is long enough (H200,
    2026-11-28, layer, us: gpt-oss 24.7 -> 23.4, Qwen3 TP8 10.2 -> 9.5; 3.4 tiles: DeepSeek-V3 TP8
    13.6 -> 14.8; three stages: Mixtral 55.4 -> 57.7).
    """
    two_tiles = problem.hidden <= 2 * SMS * 16
    return problem.tokens == 1 and two_tiles and sums_ring(problem, BESIDE[1]).stages >= 5


def rows_memory(tile: Tile, intermediate: int) -> int:
    """Bytes of shared memory of decode stage 2 with resident h: the ring, two blocks of h."""
    n = max(8, tile.tokens)
    a_stage = tile.rows // 16 * (tile.k // 128) * 1088 + 2 * 4 * tile.rows
    h = n * -(-intermediate // tile.k) * tile.k
    transposing = 640 * n  # of both teams' results, with what alignment takes
    return tile.stages * a_stage + 2 * (h + 4 * n) + transposing + 1024


def decode_rows(problem: Problem, block: int) -> Tile:
    """Decode stage 2 with a row per route, h resident: 64 weight rows for each of two teams of 4
    warps.

    The ring is longer than a tile's steps: a team skips the other's tile, and a barrier's phase
    tells a stage's fill only from the one before it. Where it then keeps 50 KB of weights in flight
    it holds whole pairs of tiles, so that a stage is always the same team's.
    """
    k = 256 if block <= 8 and problem.intermediate % 256 == 0 else 128
    steps = -(-problem.intermediate // k)
    for stages in range(16, steps + 1, -1):
        tile = Tile(block, 64, k, stages, 4, 1, 2)
        if rows_memory(tile, problem.intermediate) <= HALF_SM:
            pairs = stages // (2 * steps) * (2 * steps)
            return replace(tile, stages=pairs) if pairs >= 1536 // k else tile
    rule = "rows of h that stay in shared memory have few columns: I"
    raise MixMoEError(rule, problem.intermediate, RESIDENT_COLUMNS)


def quantises_rows(problem: Problem, block: int) -> bool:
    """Whether decode stage 2 quantises its float32 rows of h itself: short rows, and few a block,
    for which it waits at its start."""
    return problem.intermediate <= 256 and block <= 16


def quantises_tokens(problem: Problem) -> bool:
    """The same where stage 2 adds up a token's routes. Every CTA then quantises all of a token's
    rows: at I 2048 that is 64 KB, two times out of the L2, before its first product."""
    return problem.intermediate <= RESIDENT_COLUMNS


def is_few(problem: Problem) -> bool:
    """Whether a layer of tokens that `decode_sums` serves skips the routing."""
    return problem.tokens == 1 or 0 < problem.tokens * problem.hidden <= FEW_VALUES


def decode_sums(problem: Problem) -> Tile | None:
    """Decode stage 2 that adds up a token's routes; None where a row per route is better.

    An expert (or half, a quarter) goes to a warp, so topk divides 8; an expert that two tokens
    share is read twice, so tokens are few.
    """
    most = SUM_TOKENS if problem.intermediate <= RESIDENT_COLUMNS else 1
    if problem.tokens > most or 8 % problem.topk:
        return None
    tile = sums_ring(problem)
    return tile if tile.stages > 1 else None  # a stage is read while the one before is multiplied


def sums_ring(problem: Problem, part: Part = HALVES) -> Tile:
    """The tile of `decode_sums` in a CTA's part of an SM."""
    span = 8 // problem.topk  # warps of an expert, each with a part of h's columns
    resident = problem.topk * resident_bytes(problem.intermediate, 256 * span)
    return ring(1, 256, 8, resident, part)


def resident_bytes(columns: int, step: int) -> int:
    """Bytes of a row of e4m3 in shared memory, where a ring stage takes ``step`` columns of it."""
    return -(-columns // step) * step
