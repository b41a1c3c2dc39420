"""How the GEMMs are cut for a problem: tokens and rows of a tile, rings, who shares K, the walk."""

from collections.abc import Callable
from dataclasses import replace

from mixmoe.backends.cdna import results
from mixmoe.backends.cdna.atoms import MFMA_ROWS
from mixmoe.backends.cdna.config import WAVES, Gemm, RowsOut
from mixmoe.backends.cdna.grid import Walk
from mixmoe.errors import MixMoEError
from mixmoe.spec import Problem

TILES = (128, 64, 32, 16)  # tokens
CUS = 256  # of a MI355X
NEAR_BYTES = 1 << 32  # what a lane's 32-bit offset reaches


def cut(
    make: Callable[..., Gemm], block: int, problem: Problem | None, bits: int = 32
) -> Gemm:
    """How a GEMM of sizes is cut: the most tokens that divide the sorted block and whose scales
    fit in LDS. ``bits``: of a column of its results.

    Prefill: the path from L2 carries 64 bytes a cycle and an MFMA of e2m1 takes 16 cycles, so
    ``rows x tokens / (rows + tokens)`` decides whether the matrix unit waits; 64 tokens take 512
    rows where there are as many. What an XCD runs at a time are neighbours, that share tokens and
    weights in its L2. Decode: bytes in flight decide, so seven steps of weights, read once and not
    kept; where tiles are fewer than CUs, the waves of a workgroup share K instead of rows.
    """
    legal = [t for t in TILES if block % t == 0]
    tokens = next((t for t in legal[:-1] if fits(make, t)), legal[-1])
    few = tokens <= 32
    out = make(
        tokens=tokens, sort_tiles=block // tokens, ring=8 if few else 4,
        streaming=few and block == tokens, walk=Walk(together=not few),
    )
    many = tokens == 64 and out.weight.bits == 4 == out.token.bits
    blocks = (8 if many else 4) // out.halves
    while blocks > 2 and WAVES * blocks * MFMA_ROWS > out.rows:
        blocks //= 2
    out = replace(out, blocks=blocks)
    twice = replace(out, waves_per_eu=2)
    if twice.stages > 2:
        out = twice
    if problem is not None:
        rows = problem.tokens if out.halves == 2 else problem.routes
        far_rows = problem.routes * out.rows * bits // 8 > results.NEAR_BYTES
        far = rows * out.token.row_bytes(out.k) >= NEAR_BYTES
        out = replace(out, far=far, far_rows=far_rows)
    if problem is not None and few:
        tiles = out.row_tiles * min(problem.routes, problem.experts)
        out = share_k(out, tiles)
    return out


def fits(make: Callable[..., object], tokens: int) -> bool:
    """Whether tiles of that many tokens have room in LDS."""
    try:
        make(tokens=tokens)
    except MixMoEError:
        return False
    return True


def share_k(gemm: Gemm, tiles: int) -> Gemm:
    """With fewer tiles than CUs: four or two waves share K, where that leaves few of them idle."""
    for waves in (4, 2):
        shared = replace(gemm, k_waves=waves)
        if tiles < CUS and 8 * gemm.k_tiles >= 7 * waves * shared.part_tiles:
            return shared
    return gemm


def rows_for(problem: Problem, block: int, deterministic: bool) -> RowsOut:
    """What stage 2 leaves: with few routes, and where the order of a sum is free, the sums
    themselves, which spares a launch. Four bytes added and two bytes written and read again are
    the same traffic. Codes cost accuracy (2^-4 of an element), so they come only on demand."""
    if not deterministic and block <= 32 and problem.routes:
        return RowsOut.SUMS
    return RowsOut.ROWS
