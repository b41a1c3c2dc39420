"""The weight stream of the decode kernels: a TMA producer warp and the warps that consume it.

A tile is ROWS units of 16 weight rows x all of K for one block of TOKENS rows of one expert. The
consumer warps share K: of every SLICES consecutive chunks of 128 columns, chunk s goes to the warps
of slice s. wgmma shares B between warps, so B holds the block's rows once per slice, N = TOKENS *
SLICES columns (token, slice), and a warp keeps the columns of its own slice. A step then loads
REP * 8 KB of weights however few rows a tile has, and nothing is exchanged between CTAs.
Every 128 K the product is added to a float32 total: the FP8 tensor core keeps about 14 bits, and in
decode the flush is free (H200, 2026-11-23: 27.9 against 27.3 us, the spread of a run).
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_wait

from mixmoe.backends.hopper.mainloop import (
    UNIT_SCALES,
    UNIT_WORDS,
    advance,
    cp_async,
    fragment,
    load_units,
    tma_load,
    weight_descriptors,
)
from mixmoe.preshuffle import Fold, Packed
from mixmoe.spec import Tile

SENTINEL_MASK = gl.constexpr((1 << 24) - 1)


@gluon.jit
def stream_weights(
    w_desc, s_desc, words, scales, full, empty, expert_ptr, tiles, limit, row_tiles, units, steps,
    STAGES: gl.constexpr,
):
    """Fill the ring with the weights of every tile of this CTA: the work of one warp.

    The experts of the first `limit` tiles may be read, so that no load waits for the tile count.
    """
    ROWS: gl.constexpr = w_desc.block_type.shape[0]
    COLUMNS: gl.constexpr = w_desc.block_type.shape[1]
    stage = gl.program_id(0) * 0
    phase = stage + 1
    expert = gl.load(expert_ptr + gl.program_id(0) // row_tiles)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        unit = expert * units + tile % row_tiles * ROWS
        ahead = tile + gl.num_programs(0)
        expert = gl.load(expert_ptr + ahead // row_tiles, mask=ahead < limit, other=0)
        for step in range(steps):
            barrier = full.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(barrier, w_desc.block_type.nbytes + s_desc.block_type.nbytes)
            tma_load(w_desc, [unit, step * COLUMNS, 0], barrier, words.index(stage))
            tma_load(s_desc, [unit, step * (COLUMNS * 8)], barrier, scales.index(stage))
            stage, phase = advance(stage, phase, STAGES)


@gluon.jit
def stream_rows(
    x_ptr, pitch, K, ids_ptr, xs, full, empty, tokens, tiles, limit, row_tiles, steps,
    TOKENS: gl.constexpr, SLICES: gl.constexpr, STAGES: gl.constexpr,
):
    """Gather each block's rows of X beside its weights, B = (token, slice) rows of 128 columns.

    The copies of a step are announced LAG steps later, once they have landed and a fence has made
    them visible to the tensor cores; rows of padding and columns past K are filled with zeros.
    """
    LAG: gl.constexpr = 3
    N: gl.constexpr = TOKENS * SLICES
    L: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [gl.num_warps(), 1], [1, 0])
    n = gl.arange(0, N, layout=gl.SliceLayout(1, L))
    column = gl.arange(0, 128, layout=gl.SliceLayout(0, L))
    k = (n % SLICES * 128)[:, None] + column[None, :]
    stage = gl.program_id(0) * 0
    phase = stage + 1
    late = stage
    issued = stage
    packed = gl.load(ids_ptr + gl.program_id(0) // row_tiles * TOKENS + n // SLICES)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        token = packed & SENTINEL_MASK
        row = x_ptr + token.to(gl.int64) * pitch
        live = token < tokens
        ahead = tile + gl.num_programs(0)
        packed = gl.load(ids_ptr + ahead // row_tiles * TOKENS + n // SLICES, mask=ahead < limit,
                         other=0)
        for step in range(steps):
            at = step * (SLICES * 128) + k
            mbarrier.wait(empty.index(stage), phase)
            cp_async(xs.index(stage), row[:, None] + at, mask=live[:, None] & (at < K))
            async_copy.commit_group()
            stage, phase = advance(stage, phase, STAGES)
            issued += 1
            if issued > LAG:
                async_copy.wait_group(LAG)
                fence_async_shared()
                mbarrier.arrive(full.index(late), count=1)
                late = gl.where(late + 1 == STAGES, 0, late + 1)
    async_copy.wait_group(0)
    fence_async_shared()
    for _ in range(gl.minimum(issued, LAG)):
        mbarrier.arrive(full.index(late), count=1)
        late = gl.where(late + 1 == STAGES, 0, late + 1)


@gluon.jit
def own_parity(part, WARPS: gl.constexpr, SLICES: gl.constexpr):
    """Of each pair of columns the one whose slice has the parity of the warp's: a free selection.

    The two columns of a pair lie in one thread, so that the totals need half the registers.
    """
    if SLICES == 1:
        return part
    else:
        M: gl.constexpr = part.shape[0]
        even, odd = part.reshape([M, part.shape[1] // 2, 2]).split()
        row = gl.arange(0, M, layout=gl.SliceLayout(1, even.type.layout)) // 16
        return gl.where((row % 2 == 1)[:, None], odd, even)


@gluon.jit
def consume_tile(
    words, scales, xs, full, empty, stage, phase, steps,
    TOKENS: gl.constexpr, SLICES: gl.constexpr, REP: gl.constexpr, STAGES: gl.constexpr,
    WIDE: gl.constexpr,
):
    """float32 totals of one tile, a column of each pair (`own_parity`), and the ring position."""
    WARPS: gl.constexpr = gl.num_warps()
    N: gl.constexpr = TOKENS * SLICES
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, N, 32]
    )
    A: gl.constexpr = gl.DotOperandLayout(0, mma, 4)
    zero = gl.zeros([REP * WARPS * 16, N], gl.float32, mma)
    total = own_parity(zero, WARPS, SLICES)
    for _ in range(steps):
        mbarrier.wait(full.index(stage), phase)
        lo, hi = load_units(words.index(stage), scales.index(stage), REP, WARPS, WIDE)
        part = warpgroup_mma(
            fragment(lo, hi, A, REP, WARPS), xs.index(stage).permute((1, 0)), zero,
            use_acc=False, is_async=True,
        )
        part = warpgroup_mma_wait(0, deps=[part])
        mbarrier.arrive(empty.index(stage), count=1)
        total += own_parity(part, WARPS, SLICES)
        stage, phase = advance(stage, phase, STAGES)
    return total, stage, phase


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
def consume(
    words, scales, xs, sums, full, empty, ready, taken, count_ptr, row_tiles, steps,
    TOKENS: gl.constexpr, SLICES: gl.constexpr, REP: gl.constexpr, STAGES: gl.constexpr,
    WIDE: gl.constexpr,
):
    """Role of the matrix warps: every tile of this CTA, handed over through `sums`."""
    gdc_wait()
    tiles = gl.load(count_ptr) // TOKENS * row_tiles
    stage = tiles * 0
    phase = tiles * 0
    done = tiles * 0
    for _ in range(gl.program_id(0), tiles, gl.num_programs(0)):
        total, stage, phase = consume_tile(
            words, scales, xs, full, empty, stage, phase, steps,
            TOKENS, SLICES, REP, STAGES, WIDE,
        )
        own = own_slice(total, TOKENS, SLICES)
        mbarrier.wait(taken.index(done & 1), ((done >> 1) & 1) ^ 1)
        sums.index(done & 1).store(own)
        mbarrier.arrive(ready.index(done & 1), count=1)
        done += 1


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 132 (H200) where there is none, to compile."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


@dataclass(frozen=True, slots=True)
class Stream:
    """How a decode kernel cuts the weights: what a `Tile` means here.

    rows: 16-row units of a tile; slices: warps that share a row unit, each with its part of K; rep:
    units a warp multiplies in one step; ctas: of the persistent grid; wide: 15 exponents.
    """

    rows: int
    slices: int
    rep: int
    ctas: int
    wide: bool
    options: dict[str, Any]

    @classmethod
    def of(cls, tile: Tile, packed: Packed) -> "Stream":
        """rows = tile.rows / 16, slices = tile.split_k; `ctas_per_sm` sets the register budget."""
        rows = tile.rows // 16
        threads = 32 * (tile.warps + 4)  # producer, epilogue and gather warps, padded to four
        registers = 65536 // (tile.ctas_per_sm * threads) // 8 * 8
        return cls(
            rows,
            tile.split_k,
            rows * tile.split_k // tile.warps,
            multiprocessors(packed.codes.device) * tile.ctas_per_sm,
            packed.order.fold is Fold.WIDE,
            {"num_warps": tile.warps, "maxnreg": min(registers, 248), "launch_pdl": True},
        )

    def boxes(self, packed: Packed, chunks: int = 1) -> tuple[Any, Any]:
        """TMA boxes of one step: rows x (2 * slices * chunks) units of words, and their scales."""
        _, _, k = packed.shape
        padded = -(-k // 128) * 2
        words = packed.codes.view(-1, padded, UNIT_WORDS)[:, : -(-k // 64)]
        scales = packed.scales.view(torch.int32).view(-1, padded * UNIT_SCALES // 4)
        return weight_descriptors(words, scales, self.rows, 2 * self.slices * chunks)
