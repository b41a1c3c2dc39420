"""Stage 1 for one token: nothing before it, neither routing nor quantisation of x.

A token's experts are its topk_ids, so there is nothing to sort; its row of x is short, so every CTA
quantises it for itself into shared memory while its first weights are on their way. The roles are
those of `gemm1_decode` but for the gathering one. Stage 2 is `gemm2_tokens`, which reads topk_ids
as well: a layer of one token is two launches.
"""

from functools import lru_cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mixmoe.backends.hopper.decode import (
    HELPER_REGISTERS,
    Blocks,
    Ring,
    Stream,
    Sums,
    barriers,
    fragments,
    hand_over,
    own_parity,
    own_slice,
    zeros,
)
from mixmoe.backends.hopper.gemm1_decode import Act, Columns, Sizes, activate_tiles
from mixmoe.backends.hopper.mainloop import (
    KINDS,
    activation_scalars,
    advance,
    decode,
    fragment,
    load_raw,
    tma_load,
)
from mixmoe.backends.hopper.resident import Hidden, make_resident, resident_layout
from mixmoe.spec import Recipe, Tile, Weights

SLICES = gl.constexpr(8)  # of K, one to a matrix warp


@gluon.jit
def stream_token(w_desc, s_desc, ring, blocks, sizes, tiles, STAGES: gl.constexpr):
    """Role of the producer warp: the weights of every tile of this CTA.

    A skipped route streams expert 0, for the bytes a stage expects; stage 2 does not read its h.
    """
    gdc_wait()
    gdc_launch_dependents()
    COLUMNS: gl.constexpr = w_desc.block_type.shape[1]
    units = (sizes.intermediate + 7) // 8
    stage = tiles * 0
    phase = stage + 1
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        expert = gl.load(blocks.experts + tile // sizes.row_tiles).to(gl.int32)
        expert = gl.where((expert >= 0) & (expert < sizes.experts), expert, 0)
        unit = expert * units + tile % sizes.row_tiles * w_desc.block_type.shape[0]
        for step in range(sizes.steps):
            barrier = ring.full.index(stage)
            mbarrier.wait(ring.empty.index(stage), phase)
            mbarrier.expect(barrier, w_desc.block_type.nbytes + s_desc.block_type.nbytes)
            tma_load(w_desc, [unit, step * COLUMNS, 0], barrier, ring.words.index(stage))
            tma_load(s_desc, [unit, step * (COLUMNS * 16)], barrier, ring.scales.index(stage))
            stage, phase = advance(stage, phase, STAGES)


@gluon.jit
def multiply_token(ring, resident, x_memory, sums, x, sizes, tiles, STAGES: gl.constexpr,
                   WIDE: gl.constexpr):
    """Role of the matrix warps: quantise x, its scale to `x_memory`; then this CTA's tiles."""
    WARPS: gl.constexpr = gl.num_warps()
    L: gl.constexpr = resident_layout(SLICES, WARPS, False)
    zero = zeros(1, SLICES)
    A: gl.constexpr = gl.DotOperandLayout(0, zero.type.layout, 4)
    gdc_wait()
    row = gl.zeros([SLICES], gl.int64, gl.SliceLayout(1, L))
    scale = make_resident(resident, x, row, row == 0, sizes.columns, SLICES, 1, L)
    x_memory.store(scale)  # all slices are of one row
    stage = tiles * 0
    phase = tiles * 0
    done = tiles * 0
    mbarrier.wait(ring.full.index(stage), phase, pred=gl.program_id(0) < tiles)
    raw, byte = load_raw(ring.words.index(stage), ring.scales.index(stage), 1, WARPS)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        total = own_parity(zero, SLICES)
        for step in range(sizes.steps):
            lo, hi = decode(raw, byte, WIDE)
            ahead, ahead_phase = advance(stage, phase, STAGES)
            more = (step + 1 < sizes.steps) | (tile + gl.num_programs(0) < tiles)
            mbarrier.wait(ring.full.index(ahead), ahead_phase, pred=more)
            part = warpgroup_mma(
                fragment(lo, hi, A, 1, WARPS), resident.index(step).permute((1, 0)), zero,
                use_acc=False, is_async=True,
            )
            raw, byte = load_raw(ring.words.index(ahead), ring.scales.index(ahead), 1, WARPS)
            part = warpgroup_mma_wait(0, deps=[part])
            mbarrier.arrive(ring.empty.index(stage), count=1)
            total += own_parity(part, SLICES)
            stage = ahead
            phase = ahead_phase
        hand_over(own_slice(total, 1, SLICES), sums, done)
        done += 1


@gluon.jit
def gemm1_token(
    w_desc, s_desc, x, h_ptr, w, weight_ptr, blocks, sizes, act, tiles,
    GROUPS: gl.constexpr, STAGES: gl.constexpr, KIND: gl.constexpr, WIDE: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    ROWS: gl.constexpr = w_desc.block_type.shape[0]
    ring = Ring(
        gl.allocate_shared_memory(gl.int32, [STAGES] + w_desc.block_type.shape, w_desc.layout),
        gl.allocate_shared_memory(gl.int32, [STAGES] + s_desc.block_type.shape, s_desc.layout),
        None, barriers(STAGES, 1), barriers(STAGES, 1),
    )
    resident = gl.allocate_shared_memory(
        gl.float8e4nv, [GROUPS, SLICES, 128], gl.NVMMASharedLayout(128, 8, 2)
    )
    x_memory = gl.allocate_shared_memory(
        gl.float32, [SLICES], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    buffer = gl.allocate_shared_memory(
        gl.float32, [2, ROWS, SLICES, 2, 8, 1], gl.SwizzledSharedLayout(1, 1, 1, [4, 3, 2, 1, 0])
    )
    sums = Sums(buffer, barriers(2, 1), barriers(2, 1))
    fence_async_shared()
    gl.warp_specialize(
        [
            (multiply_token, (ring, resident, x_memory, sums, x, sizes, tiles, STAGES, WIDE)),
            (stream_token, (w_desc, s_desc, ring, blocks, sizes, tiles, STAGES)),
            (activate_tiles, (sums, h_ptr, None, x_memory, w, weight_ptr, blocks, sizes, act, 1, 1,
                              1, 1, KIND)),
        ],
        [1, 1],
        [REGISTERS, REGISTERS],
    )


@lru_cache
def one_token(topk: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The lists of a `Routed` of one token in blocks of one route: slots, and how many."""
    slots = torch.arange(topk, dtype=torch.int32, device=device) << 24
    return slots, torch.tensor([topk], dtype=torch.int32, device=device)


def launch(
    x: Tensor, weights: Weights, topk_ids: Tensor, topk_weights: Tensor, recipe: Recipe,
    tile: Tile, out: Tensor,
) -> Tensor:
    """Run stage 1 of one token: out (topk, I) float32, a row per slot, undefined where skipped.

    x (1, H) of a float type, H contiguous and rows 16-byte aligned: quantised as fp8_token is;
    topk_ids (1, topk) int32 or int64, topk_weights (1, topk) float32, contiguous; weights.w13 as
    for `gemm1_decode`. tile: 8 slices of K, one 16-row unit, `choose.one_token`.
    """
    w13, topk = fragments(weights.w13), topk_ids.shape[1]
    cut = Stream.of(tile, w13)
    experts, double, hidden = w13.shape
    row_tiles = -(-double // (16 * cut.rows))
    tiles = topk * row_tiles
    steps = cut.steps(hidden)
    slots, total = one_token(topk, x.device)
    gemm1_token[(cut.grid(tiles),)](
        *cut.boxes(w13, cut.rows, tile.split_k), Hidden(x, None), out,
        Columns(w13.row_scale, weights.w13_bias), topk_weights if recipe.weight_on == 1 else None,
        Blocks(slots, topk_ids, total),
        Sizes(hidden, double // 2, experts, topk, row_tiles, steps),
        Act(*activation_scalars(recipe.act)), tiles, steps, tile.stages, KINDS[recipe.act.kind],
        cut.wide, HELPER_REGISTERS, **cut.options,
    )
    return out
