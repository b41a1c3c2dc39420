"""Stage 1 for few rows per expert: h = act(x Wg^T + bg, x Wu^T + bu), a stream of weight bytes.

Three roles in a CTA: `consume` (matrix warps), `produce` (one warp that keeps the ring of TMA loads
full) and `activate_tiles` (the float32 sum over the K slices in fixed order, scales, bias, activation,
store), so that the stream never stops for an epilogue. Launched dependently (PDL): barriers and
ring are set up while the kernel before it still runs.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mixmoe.backends.hopper.decode import (
    SENTINEL_MASK,
    Stream,
    consume,
    load_step,
)
from mixmoe.backends.hopper.mainloop import (
    KINDS,
    activate,
    activation_scalars,
    advance,
    row_descriptor,
)
from mixmoe.formats import Quantised
from mixmoe.spec import Recipe, Routed, Tile, Weights

HELPER_REGISTERS = 48  # producer and epilogue warps: 40 spill; the matrix warps get the rest


@gluon.jit
def block_of(tile, tiles, row_tiles, units, ids_ptr, expert_ptr, topk, ROWS: gl.constexpr,
             TOKENS: gl.constexpr):
    """First weight unit of a tile, and the row of X of each of its tokens (past the last: none)."""
    block = tile // row_tiles
    expert = gl.load(expert_ptr + block, mask=tile < tiles, other=0)
    rows = ()
    for n in gl.static_range(TOKENS):
        packed = gl.load(ids_ptr + block * TOKENS + n, mask=tile < tiles, other=0)
        rows = rows + (packed & SENTINEL_MASK,)
    return expert * units + tile % row_tiles * ROWS, rows


@gluon.jit
def produce(
    w_desc, s_desc, x_desc, ids_ptr, expert_ptr, count_ptr, words, scales, xs, full, empty,
    units, topk, row_tiles, steps,
    TOKENS: gl.constexpr, SLICES: gl.constexpr, STAGES: gl.constexpr,
):
    """Role of the producer warp: weights, scales and rows of X of every step of every tile."""
    gdc_wait()
    gdc_launch_dependents()
    ROWS: gl.constexpr = w_desc.block_type.shape[0]
    tiles = gl.load(count_ptr) // TOKENS * row_tiles
    stage = tiles * 0
    phase = tiles * 0 + 1
    unit, rows = block_of(gl.program_id(0), tiles, row_tiles, units, ids_ptr, expert_ptr, topk,
                          ROWS, TOKENS)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        next_unit, next_rows = block_of(tile + gl.num_programs(0), tiles, row_tiles, units, ids_ptr,
                                        expert_ptr, topk, ROWS, TOKENS)  # a tile ahead: latency
        for step in range(steps):
            mbarrier.wait(empty.index(stage), phase)
            load_step(
                w_desc, s_desc, x_desc, unit, step, rows, full, words, scales, xs, stage,
                TOKENS, SLICES, True, True,
            )
            stage, phase = advance(stage, phase, STAGES)
        unit = next_unit
        rows = next_rows


@gluon.jit
def activate_tiles(
    sums, ready, taken, h_ptr, row_scale_ptr, bias_ptr, x_scale_ptr, ids_ptr, weight_ptr,
    expert_ptr, count_ptr, tokens, topk, I, row_tiles, limit, alpha, beta, beta2,
    TOKENS: gl.constexpr, KIND: gl.constexpr,
):
    """Role of the epilogue warp: sums over the slices -> scale, bias, activation -> h (float32)."""
    gdc_wait()
    ROWS: gl.constexpr = sums.shape[1]
    SLICES: gl.constexpr = sums.shape[2]
    L: gl.constexpr = gl.BlockedLayout(
        [ROWS, 1, 2, 1, 1], [1, 1, 1, 8, 4], [1, 1, 1, 1, gl.num_warps()], [3, 4, 2, 1, 0]
    )
    LY: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, L))  # (ROWS, 8, TOKENS)
    m = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, LY)))[None, :, None]
    u = gl.arange(0, ROWS, layout=gl.SliceLayout(1, gl.SliceLayout(2, LY)))[:, None, None]
    n = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, gl.SliceLayout(1, LY)))[None, None, :]
    tiles = gl.load(count_ptr) // TOKENS * row_tiles
    done = tiles * 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        block = tile // row_tiles
        expert = gl.load(expert_ptr + block).to(gl.int64)
        packed = gl.load(ids_ptr + block * TOKENS + n)
        token = packed & SENTINEL_MASK
        column = tile % row_tiles * (ROWS * 8) + u * 8 + m
        live = (column < I) & (token < tokens)
        gate_scale = gl.load(row_scale_ptr + expert * (2 * I) + column, mask=column < I, other=0.0)
        up_scale = gl.load(row_scale_ptr + expert * (2 * I) + I + column, mask=column < I, other=0.0)
        x_scale = gl.load(x_scale_ptr + token, mask=token < tokens, other=0.0)
        if bias_ptr is not None:
            gate_bias = gl.load(bias_ptr + expert * (2 * I) + column, mask=column < I, other=0.0)
            up_bias = gl.load(bias_ptr + expert * (2 * I) + I + column, mask=column < I, other=0.0)
        mbarrier.wait(ready.index(done & 1), (done >> 1) & 1)
        total = gl.sum(sums.index(done & 1).load(L), axis=1)
        mbarrier.arrive(taken.index(done & 1), count=1)
        gate, up = total.permute((0, 2, 3, 1)).split()
        gate = gl.convert_layout(gate, LY, assert_trivial=True) * (gate_scale * x_scale)
        up = gl.convert_layout(up, LY, assert_trivial=True) * (up_scale * x_scale)
        if bias_ptr is not None:
            gate += gate_bias
            up += up_bias
        h = activate(gate, up, limit, alpha, beta, beta2, KIND)
        if weight_ptr is not None:
            h *= gl.load(weight_ptr + block * TOKENS + n)
        route = token * topk + (packed >> 24)
        gl.store(h_ptr + route.to(gl.int64) * I + column, h, mask=live)
        done += 1


@gluon.jit
def gemm1_decode(
    w_desc, s_desc, x_desc, h_ptr, row_scale_ptr, bias_ptr, x_scale_ptr, ids_ptr, weight_ptr,
    expert_ptr, count_ptr, tokens, topk, I, units, row_tiles, steps, limit, alpha, beta, beta2,
    TOKENS: gl.constexpr, SLICES: gl.constexpr, REP: gl.constexpr, STAGES: gl.constexpr,
    KIND: gl.constexpr, WIDE: gl.constexpr, HELPER_REGISTERS: gl.constexpr,
):
    ROWS: gl.constexpr = REP * gl.num_warps() // SLICES
    words = gl.allocate_shared_memory(
        gl.int32, [STAGES] + w_desc.block_type.shape, w_desc.layout
    )
    scales = gl.allocate_shared_memory(
        gl.int32, [STAGES] + s_desc.block_type.shape, s_desc.layout
    )
    xs = gl.allocate_shared_memory(
        gl.float8e4nv, [STAGES, TOKENS * SLICES, 128], gl.NVMMASharedLayout(128, 8, 2)
    )
    sums = gl.allocate_shared_memory(
        gl.float32, [2, ROWS, SLICES, 2, 8, TOKENS],
        gl.SwizzledSharedLayout(1, 1, 1, [4, 3, 2, 1, 0]),
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(taken.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (consume, (words, scales, xs, sums, full, empty, ready, taken, count_ptr, row_tiles,
                       steps, TOKENS, SLICES, REP, STAGES, WIDE)),
            (produce, (w_desc, s_desc, x_desc, ids_ptr, expert_ptr, count_ptr, words, scales, xs,
                       full, empty, units, topk, row_tiles, steps, TOKENS, SLICES, STAGES)),
            (activate_tiles, (sums, ready, taken, h_ptr, row_scale_ptr, bias_ptr, x_scale_ptr,
                              ids_ptr, weight_ptr, expert_ptr, count_ptr, tokens, topk, I,
                              row_tiles, limit, alpha, beta, beta2, TOKENS, KIND)),
        ],
        [1, 1],
        [HELPER_REGISTERS, HELPER_REGISTERS],
    )


def launch(
    x: Quantised, weights: Weights, routed: Routed, recipe: Recipe, tile: Tile, out: Tensor
) -> Tensor:
    """Run stage 1: out (T * topk, I) float32, a row per route; skipped routes are not written.

    x: e4m3 codes (T, H) with a float32 scale per row, the row pitch a multiple of 128; weights.w13
    in the order hopper_fp4_gu_w1 (or _wide); routed.block == tile.tokens. `tile` is one of
    `decode.Stream.of`'s.
    """
    p = routed.problem
    stream = Stream.of(tile, weights.w13)
    row_tiles = -(-p.intermediate // (8 * stream.rows))
    grid = min(stream.ctas, routed.sorted_expert_ids.shape[0] * row_tiles)
    if not grid:
        return out
    words, scales = stream.boxes(weights.w13)
    gemm1_decode[(grid,)](
        words, scales, row_descriptor(x.codes, 1, stream.slices), out, weights.w13.row_scale,
        weights.w13_bias, x.scales, routed.sorted_token_ids,
        routed.sorted_weights if recipe.weight_on == 1 else None,
        routed.sorted_expert_ids, routed.num_valid_ids, p.tokens, p.topk, p.intermediate,
        -(-p.intermediate // 8), row_tiles, -(-p.hidden // (128 * stream.slices)),
        *activation_scalars(recipe.act), tile.tokens, stream.slices, stream.rep, tile.stages,
        KINDS[recipe.act.kind], stream.wide, HELPER_REGISTERS, **stream.options,
    )
    return out
