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
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_wait

from mixmoe.backends.hopper.mainloop import (
    UNIT_SCALES,
    UNIT_WORDS,
    advance,
    fragment,
    load_units,
    smem_cast,
    tma_load,
    weight_descriptors,
)
from mixmoe.preshuffle import Fold, Packed
from mixmoe.spec import Tile

SENTINEL_MASK = gl.constexpr((1 << 24) - 1)


@gluon.jit
def block_row(ids_ptr, at, topk, BY_ROUTE: gl.constexpr):
    """Row of X of sorted position `at`: its token or its route. Padding lies past the last row."""
    packed = gl.load(ids_ptr + at)
    token = packed & SENTINEL_MASK
    if BY_ROUTE:
        return token * topk + (packed >> 24)
    else:
        return token


@gluon.jit
def load_step(
    w_desc, s_desc, x_desc, unit, step, rows, full, words, scales, xs, stage,
    TOKENS: gl.constexpr, SLICES: gl.constexpr, WEIGHTS: gl.constexpr, INPUT: gl.constexpr,
):
    """Issue the loads of one ring stage: a box of words, its scales, a box of X for every row.

    WEIGHTS also announces the bytes of all, so that INPUT may follow later.
    """
    barrier = full.index(stage)
    if WEIGHTS:
        mbarrier.expect(
            barrier,
            w_desc.block_type.nbytes + s_desc.block_type.nbytes + TOKENS * x_desc.block_type.nbytes,
        )
        tma_load(w_desc, [unit, step * (2 * SLICES), 0], barrier, words.index(stage))
        tma_load(s_desc, [unit, step * (16 * SLICES)], barrier, scales.index(stage))
    if INPUT:
        layout: gl.constexpr = gl.NVMMASharedLayout(128, 8, 3)
        tile = smem_cast(xs.index(stage), gl.float8e4nv, [TOKENS, 1, SLICES, 128], layout)
        for n in gl.static_range(TOKENS):
            tma_load(x_desc, [rows[n], step * SLICES, 0], barrier, tile.index(n))


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
        threads = 32 * (tile.warps + 4)  # one producer and one epilogue warp, padded to four
        registers = 65536 // (tile.ctas_per_sm * threads) // 8 * 8
        return cls(
            rows,
            tile.split_k,
            rows * tile.split_k // tile.warps,
            multiprocessors(packed.codes.device) * tile.ctas_per_sm,
            packed.order.fold is Fold.WIDE,
            {"num_warps": tile.warps, "maxnreg": min(registers, 248), "launch_pdl": True},
        )

    def boxes(self, packed: Packed) -> tuple[Any, Any]:
        """TMA boxes of one step: rows x (2 * slices) units of words, and their scales."""
        _, _, k = packed.shape
        padded = -(-k // 128) * 2
        words = packed.codes.view(-1, padded, UNIT_WORDS)[:, : -(-k // 64)]
        scales = packed.scales.view(torch.int32).view(-1, padded * UNIT_SCALES // 4)
        return weight_descriptors(words, scales, self.rows, 2 * self.slices)
