"""Choosing tiles: candidates are enumerated, refused for a physical reason, and costed.

The model counts what an SM must do for one K step (bytes from HBM or L2, weights decoded by the
ALUs, tensor-core work), takes the slowest, and multiplies by steps and waves. ``tuned/*.json`` only
replaces its answer for shapes that were timed. Constants: one H200, 2026-11-24 unless stated.
"""

import json
from dataclasses import dataclass
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
START = 3.0  # us: launch, first loads, epilogue
BLOCKS = (16, 32, 64, 128)
TUNED = Path(__file__).parents[3] / "tuned" / "hopper.json"


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
    accumulate: str = "precise"

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
    """Routes per block: the least block that holds an average expert's routes, 16 to 128."""
    per_expert = problem.routes / experts_hit(problem.routes, problem.experts)
    return next((b for b in BLOCKS if per_expert <= 0.75 * b), BLOCKS[-1])


def stored_bytes(fmt: Format) -> float:
    """Bytes of a value with its share of the scale."""
    return fmt.bits_per_value / 8


def candidates(gemm: Gemm, block: int) -> list[Candidate]:
    """Every tile of the general path for blocks of that many routes, costed or refused."""
    w, x = operand(gemm.weight), operand(gemm.activation)
    tiles = [
        Tile(block, rows, k, stages, warps)
        for rows in (64, 128)
        for k in (32, 64, 128)
        for stages in (3, 4, 5)
        for warps in (4, 8)
    ]
    return [costed(gemm, tile, w, x) for tile in tiles]


def refusal(gemm: Gemm, tile: Tile, w: Operand, x: Operand) -> str | None:
    """Why a tile cannot run, in one line of physics; None where it can."""
    k = min(w.step_of(tile.k), x.step_of(tile.k))
    if k != tile.k:
        return f"a K step of {tile.k} would straddle scale groups of {k}"
    if tile.tokens * tile.rows // (32 * tile.warps) > 128:
        return "the accumulator alone fills more than half of the 255 registers of a thread"
    if tile.rows // 16 < tile.warps:
        return "a warpgroup is 64 rows: more warps than rows to give them"
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


def costed(gemm: Gemm, tile: Tile, w: Operand, x: Operand) -> Candidate:
    """The candidate with its time, or infinity and the refusal."""
    why = refusal(gemm, tile, w, x)
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
    waves = -(-ctas // (SMS * resident))
    return Candidate(tile, START + waves * (step * -(-gemm.k // tile.k) + 1.0), None)


@cache
def tuned() -> dict[str, Tile]:
    """Timed choices, ``key(gemm, block) -> Tile``; empty where the file is not installed."""
    if not TUNED.exists():
        return {}
    return {name: Tile(**fields) for name, fields in json.loads(TUNED.read_text()).items()}


def key(gemm: Gemm, block: int) -> str:
    """What a timed choice is filed under: formats, sizes, and the power of two of routes."""
    sizes = f"{gemm.rows}x{gemm.k}x{gemm.experts}"
    return f"{gemm.activation}x{gemm.weight}/{sizes}/{pow2(gemm.routes)}/{block}"


@cache
def choose(gemm: Gemm, block: int) -> Tile:
    """The tile for blocks of ``block`` routes: a timed one, else the cheapest by the model."""
    if (found := tuned().get(key(gemm, block))) is not None:
        return found
    best = min(candidates(gemm, block), key=lambda c: c.us)
    if best.refusal is not None:
        raise MixMoEError(f"no tile for blocks of {block} routes: {best.refusal}", block, BLOCKS)
    return best.tile
