"""What the decode kernels share: the weight ring, K slices over warps, and what a `Tile` means.

Decode is a stream of weight bytes. A tile is ROWS units of 16 weight rows x all of K for a few
rows of x or h. The matrix warps share K: of every SLICES consecutive chunks of 128 columns, chunk s
goes to the warps of slice s. wgmma shares B between warps, so B holds the block's rows once per
slice, N = TOKENS * SLICES columns (token, slice), and a warp keeps the columns of its own slice.
However few rows a tile has, all warps have work, and nothing is exchanged between CTAs.
Every 128 or 256 K the product is added to a float32 total: the FP8 tensor core keeps about 14 bits,
and in decode the flush is free (H200, 2026-11-23: 27.9 against 27.3 us, the spread of a run).
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from mixmoe.backends.hopper.mainloop import (
    UNIT_COLUMNS,
    UNIT_SCALES,
    UNIT_WORDS,
    weight_descriptors,
)
from mixmoe.errors import MixMoEError
from mixmoe.fold import Fold
from mixmoe.formats import Quantised
from mixmoe.preshuffle import Packed
from mixmoe.spec import Tile

SENTINEL_MASK = gl.constexpr((1 << 24) - 1)
SHARED = 227 * 1024  # bytes a CTA may use; an SM has 1 KB more and takes 1 KB for each CTA
MATRIX_WARPS = 8
HELPER_WARPS = 4  # producer, epilogue, gather
HELPER_REGISTERS = 48  # of those warps at most; the matrix warps get the rest of the CTA's
# Where two teams of four warps share a CTA: registers of the second team (the first gets the
# same) and of the helpers.
TEAMS = gl.constexpr(2)
TEAM_REGISTERS, TEAM_HELPERS = 88, 64
OWN_REGISTERS, OWN_HELPERS = 96, 48  # where the teams do the epilogue as well


class Ring(NamedTuple):
    """Stages of loaded weights (and rows of x, in stage 1); `full` and `empty` guard each stage."""

    words: Any
    scales: Any
    rows: Any
    full: Any
    empty: Any


class Sums(NamedTuple):
    """Double buffer of float32 totals, from the matrix warps to the epilogue."""

    buffer: Any
    ready: Any
    taken: Any


class Blocks(NamedTuple):
    """Pointers of a `Routed`: routes, the expert of each block, how many routes with padding.

    ids and total are None where the tokens' own topk_ids stand for the experts (`gemm1_token`).
    """

    ids: Any
    experts: Any
    total: Any


class Columns(NamedTuple):
    """What the rows of the weights are worth: scale and bias (E, rows), float32; bias or None."""

    scale: Any
    bias: Any


@gluon.jit
def barriers(N: gl.constexpr, ARRIVALS: gl.constexpr):
    """N mbarriers that complete after ARRIVALS arrivals."""
    bars = gl.allocate_shared_memory(gl.int64, [N, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(N):
        mbarrier.init(bars.index(i), count=ARRIVALS)
    return bars


@gluon.jit
def own_parity(part, SLICES: gl.constexpr):
    """Of each pair of columns the one whose slice has the parity of the warp's: a free selection.

    The two columns of a pair lie in one thread, so that totals need half the registers.
    """
    if SLICES == 1:
        return part
    else:
        M: gl.constexpr = part.shape[0]
        even, odd = part.reshape([M, part.shape[1] // 2, 2]).split()
        row = gl.arange(0, M, layout=gl.SliceLayout(1, even.type.layout)) // 16
        return gl.where((row % 2 == 1)[:, None], odd, even)


@gluon.jit
def own_slice(total, TOKENS: gl.constexpr, SLICES: gl.constexpr):
    """Totals -> (ROWS, SLICES, 2, 8, TOKENS): what each warp computed for its own slice.

    One column survives of those that are summed, so that the sum selects and rounds nothing.
    """
    M: gl.constexpr = total.shape[0]
    ROWS: gl.constexpr = M // (16 * SLICES)
    if SLICES > 2:
        layout: gl.constexpr = total.type.layout
        row = gl.arange(0, M, layout=gl.SliceLayout(1, layout)) // 16 % SLICES // 2
        column = gl.arange(0, total.shape[1], layout=gl.SliceLayout(0, layout)) % (SLICES // 2)
        total = gl.where(row[:, None] == column[None, :], total, 0.0)
        total = gl.sum(total.reshape([ROWS, SLICES, 16, TOKENS, SLICES // 2]), axis=4)
    return total.reshape([ROWS, SLICES, 2, 8, TOKENS])


@gluon.jit
def zeros(REP: gl.constexpr, N: gl.constexpr):
    """A zero accumulator (REP * WARPS * 16, N)."""
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[gl.num_warps(), 1], instr_shape=[16, N, 32]
    )
    return gl.zeros([REP * gl.num_warps() * 16, N], gl.float32, mma)


@gluon.jit
def hand_over(own, sums, done):
    """Put a tile's totals into the epilogue's buffer once that is free; `done` counts tiles."""
    mbarrier.wait(sums.taken.index(done & 1), ((done >> 1) & 1) ^ 1)
    sums.buffer.index(done & 1).store(own)
    mbarrier.arrive(sums.ready.index(done & 1), count=1)


def fragments(weights: Packed | Quantised) -> Packed:
    """The weights, which must be packed 4-bit codes with block scales."""
    if not isinstance(weights, Packed) or weights.scales is None:
        raise MixMoEError("decode streams weights in fragment order", "plain rows", "prepare()")
    return weights


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 132 (H200) where there is none, to compile."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


@dataclass(frozen=True, slots=True)
class Stream:
    """How a decode kernel cuts the weights: what a `Tile` means here.

    tile.rows / 16 = `rows` units a tile; tile.split_k = `slices` of K over the warps; tile.tokens
    rows of x or h a block; tile.k columns a slice and stage; `rep` units a warp takes in a stage.
    """

    tile: Tile
    wide: bool
    sms: int

    def __post_init__(self) -> None:
        t = self.tile
        if t.warps not in (MATRIX_WARPS // 2, MATRIX_WARPS) or t.k not in (128, 256):
            rule = "a decode tile has 4 warps (of each of two teams) or 8, and k 128 or 256"
            raise MixMoEError(rule, (t.warps, t.k))
        if self.rep < 1 or self.rows * t.split_k % t.warps:
            raise MixMoEError("rows / 16 * split_k must be a multiple of the warps", t, t.warps)
        if t.tokens * t.split_k > 64:
            raise MixMoEError("tokens * split_k is an N of wgmma", t.tokens * t.split_k, 64)

    @classmethod
    def of(cls, tile: Tile, packed: Packed) -> "Stream":
        """For weights in fragment order."""
        return cls(tile, packed.order.fold is Fold.WIDE, multiprocessors(packed.codes.device))

    @property
    def rows(self) -> int:
        """16-row units of a tile."""
        return self.tile.rows // 16

    @property
    def split(self) -> int:
        """Of two teams those that part K between them; 1: each has weight rows of its own."""
        return min(self.tile.split_k, 2)

    @property
    def part(self) -> int:
        """Slices of K of a team of two."""
        return self.tile.split_k // self.split

    @property
    def team_rows(self) -> int:
        """16-row units of a team of two."""
        return self.rows * self.split // 2

    @property
    def registers(self) -> tuple[int, int]:
        """Of a thread of a team of two, and of the helpers."""
        return (OWN_REGISTERS, OWN_HELPERS) if self.split == 1 else (TEAM_REGISTERS, TEAM_HELPERS)

    @property
    def rep(self) -> int:
        """Units that a warp multiplies in one stage."""
        return self.rows * self.tile.split_k // self.tile.warps

    @property
    def chunks(self) -> int:
        """Chunks of 128 columns that a slice takes in one stage."""
        return self.tile.k // 128

    def steps(self, k: int) -> int:
        """Stages that K columns take."""
        return -(-k // (self.tile.k * self.tile.split_k))

    def grid(self, tiles: int) -> int:
        """Persistent CTAs."""
        return min(self.sms * self.tile.ctas_per_sm, tiles)

    @property
    def options(self) -> dict[str, Any]:
        """Launch options; the tile's registers, or all of the SM's, shared by ctas_per_sm CTAs."""
        threads = 32 * (MATRIX_WARPS + HELPER_WARPS)
        registers = self.tile.registers or 65536 // (self.tile.ctas_per_sm * threads) // 8 * 8
        return {"num_warps": self.tile.warps, "maxnreg": registers, "launch_pdl": True}

    @property
    def helpers(self) -> int:
        """Registers of a helper's thread beside one team of eight matrix warps."""
        return min(HELPER_REGISTERS, self.options["maxnreg"] * 2 // 3 // 8 * 8)

    def boxes(self, packed: Packed, rows: int, slices: int) -> tuple[Any, Any]:
        """TMA boxes of one stage: `rows` units x the columns of `slices` slices, and scales."""
        assert packed.scales is not None
        units = -(-packed.shape[2] // UNIT_COLUMNS)
        words = packed.codes.view(-1, units, UNIT_WORDS)
        scales = packed.scales.view(torch.int32).view(-1, units * UNIT_SCALES // 4)
        return weight_descriptors(words, scales, rows, slices * self.chunks)
