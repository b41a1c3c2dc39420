"""Stage 1 for few rows per expert: h = act(x Wg^T + bg, x Wu^T + bu), a stream of weight bytes.

Four roles in a CTA: `consume` (matrix warps), `produce` and `gather`, which keep the ring full of
weights and of rows of x, and `activate_tiles` (the float32 sum over the K slices in fixed order,
scales, bias, activation, store), so that the stream never stops for an epilogue. Launched
dependently (PDL): the CTAs are set up while the kernel before it still runs.
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
    stream_rows,
    stream_weights,
)
from mixmoe.backends.hopper.mainloop import (
    KINDS,
    activate,
    activation_scalars,
    smem_cast,
)
from mixmoe.formats import Quantised
from mixmoe.spec import Recipe, Routed, Tile, Weights

HELPER_REGISTERS = 48  # producer and epilogue warps: 40 spill; the matrix warps get the rest


@gluon.jit
def produce(
    w_desc, s_desc, words, scales, full, empty, expert_ptr, count_ptr, limit, row_tiles, units,
    steps, TOKENS: gl.constexpr, STAGES: gl.constexpr,
):
    """Role of the producer warp: the weights."""
    gdc_wait()
    gdc_launch_dependents()
    tiles = gl.load(count_ptr) // TOKENS * row_tiles
    stream_weights(
        w_desc, s_desc, words, scales, full, empty, expert_ptr, tiles, limit, row_tiles, units,
        steps, STAGES,
    )


@gluon.jit
def gather(
    x_ptr, pitch, H, xs, full, empty, ids_ptr, count_ptr, tokens, limit, row_tiles, steps,
    TOKENS: gl.constexpr, SLICES: gl.constexpr, STAGES: gl.constexpr,
):
    """Role of the gather warps: the rows of x."""
    gdc_wait()
    tiles = gl.load(count_ptr) // TOKENS * row_tiles
    stream_rows(
        x_ptr, pitch, H, ids_ptr, xs, full, empty, tokens, tiles, limit, row_tiles, steps,
        TOKENS, SLICES, STAGES,
    )


@gluon.jit
def load_pair(ptr, expert, I, column):  # noqa: E741
    """The values of a gate column and of its up column: ptr is (E, 2 I) float32."""
    row = ptr + expert * (2 * I) + column
    return gl.load(row, mask=column < I, other=0.0), gl.load(row + I, mask=column < I, other=0.0)


@gluon.jit
def activate_tiles(
    sums, ready, taken, h_ptr, row_scale_ptr, bias_ptr, x_scale_ptr, ids_ptr, weight_ptr,
    expert_ptr, count_ptr, tokens, topk, I, row_tiles, clamp, alpha, beta, beta2,  # noqa: E741
    TOKENS: gl.constexpr, KIND: gl.constexpr,
):
    """Role of the epilogue warp: sums over the slices -> scale, bias, activation -> h (float32).

    A row unit at a time; what does not depend on the sums is fetched before they are waited for.
    """
    ROWS: gl.constexpr = sums.shape[1]
    SLICES: gl.constexpr = sums.shape[2]
    L: gl.constexpr = gl.BlockedLayout(
        [1, 2, 1, 1], [1, 1, 8, 4], [1, 1, 1, gl.num_warps()], [2, 3, 1, 0]
    )
    LY: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, L))  # (8, TOKENS)
    m = gl.arange(0, 8, layout=gl.SliceLayout(1, LY))[:, None]
    n = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, LY))[None, :]
    gdc_wait()
    tiles = gl.load(count_ptr) // TOKENS * row_tiles
    done = tiles * 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        block = tile // row_tiles
        expert = gl.load(expert_ptr + block).to(gl.int64)
        packed = gl.load(ids_ptr + block * TOKENS + n)
        token = packed & SENTINEL_MASK
        first = tile % row_tiles * (ROWS * 8) + m
        gate_scale, up_scale = load_pair(row_scale_ptr, expert, I, first)
        if bias_ptr is not None:
            gate_bias, up_bias = load_pair(bias_ptr, expert, I, first)
        x_scale = gl.load(x_scale_ptr + token, mask=token < tokens, other=0.0)
        if weight_ptr is not None:
            weight = gl.load(weight_ptr + block * TOKENS + n)
        row = h_ptr + (token * topk + (packed >> 24)).to(gl.int64) * I
        mbarrier.wait(ready.index(done & 1), (done >> 1) & 1)
        units = smem_cast(
            sums.index(done & 1), gl.float32, [ROWS, SLICES, 2, 8, TOKENS],
            gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0]),
        )
        for u in range(ROWS):
            total = gl.sum(units.index(u).load(L), axis=0)
            gate, up = total.permute((1, 2, 0)).split()
            gate = gl.convert_layout(gate, LY, assert_trivial=True) * (gate_scale * x_scale)
            up = gl.convert_layout(up, LY, assert_trivial=True) * (up_scale * x_scale)
            column = first + u * 8
            gate_scale, up_scale = load_pair(row_scale_ptr, expert, I, column + 8)
            if bias_ptr is not None:
                gate += gate_bias
                up += up_bias
                gate_bias, up_bias = load_pair(bias_ptr, expert, I, column + 8)
            h = activate(gate, up, clamp, alpha, beta, beta2, KIND)
            if weight_ptr is not None:
                h *= weight
            gl.store(row + column, h, mask=(column < I) & (token < tokens))
        mbarrier.arrive(taken.index(done & 1), count=1)
        done += 1


@gluon.jit
def gemm1_decode(
    w_desc, s_desc, x_ptr, pitch, h_ptr, row_scale_ptr, bias_ptr, x_scale_ptr, ids_ptr, weight_ptr,
    expert_ptr, count_ptr, tokens, topk, H, I, limit, row_tiles, steps,  # noqa: E741
    clamp, alpha, beta, beta2,
    TOKENS: gl.constexpr, SLICES: gl.constexpr, REP: gl.constexpr, STAGES: gl.constexpr,
    KIND: gl.constexpr, WIDE: gl.constexpr, EPILOGUE_WARPS: gl.constexpr, HELPER: gl.constexpr,
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
        mbarrier.init(full.index(i), count=2)  # weights, rows of x
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(taken.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (consume, (words, scales, xs, sums, full, empty, ready, taken, count_ptr, row_tiles,
                       steps, TOKENS, SLICES, REP, STAGES, WIDE)),
            (produce, (w_desc, s_desc, words, scales, full, empty, expert_ptr, count_ptr, limit,
                       row_tiles, (I + 7) // 8, steps, TOKENS, STAGES)),
            (activate_tiles, (sums, ready, taken, h_ptr, row_scale_ptr, bias_ptr, x_scale_ptr,
                              ids_ptr, weight_ptr, expert_ptr, count_ptr, tokens, topk, I,
                              row_tiles, clamp, alpha, beta, beta2, TOKENS, KIND)),
            (gather, (x_ptr, pitch, H, xs, full, empty, ids_ptr, count_ptr, tokens, limit,
                      row_tiles, steps, TOKENS, SLICES, STAGES)),
        ],
        [1, EPILOGUE_WARPS, 3 - EPILOGUE_WARPS],
        [HELPER, HELPER, HELPER],
    )


def launch(
    x: Quantised, weights: Weights, routed: Routed, recipe: Recipe, tile: Tile, out: Tensor
) -> Tensor:
    """Run stage 1: out (T * topk, I) float32, a row per route; skipped routes are not written.

    x: e4m3 codes (T, H) with a float32 scale per row, 16-byte aligned rows; weights.w13 in the
    order hopper_fp4_gu_w1 (or _wide); routed.block == tile.tokens.
    """
    p = routed.problem
    stream = Stream.of(tile, weights.w13)
    row_tiles = -(-p.intermediate // (8 * stream.rows))
    grid = min(stream.ctas, routed.sorted_expert_ids.shape[0] * row_tiles)
    if not grid:
        return out
    words, scales = stream.boxes(weights.w13)
    gemm1_decode[(grid,)](
        words, scales, x.codes, x.codes.stride(0), out, weights.w13.row_scale, weights.w13_bias,
        x.scales, routed.sorted_token_ids,
        routed.sorted_weights if recipe.weight_on == 1 else None,
        routed.sorted_expert_ids, routed.num_valid_ids, p.tokens, p.topk, p.hidden, p.intermediate,
        routed.sorted_expert_ids.shape[0] * row_tiles, row_tiles,
        -(-p.hidden // (128 * stream.slices)), *activation_scalars(recipe.act), tile.tokens,
        stream.slices, stream.rep, tile.stages, KINDS[recipe.act.kind], stream.wide,
        1 if tile.tokens < 32 else 2, HELPER_REGISTERS, **stream.options,
    )
    return out
