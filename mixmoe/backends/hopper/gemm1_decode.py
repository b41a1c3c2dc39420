"""Stage 1 for few rows per expert: h = act(x Wg^T + bg, x Wu^T + bu), a stream of weight bytes.

Four roles in a CTA: `multiply` (matrix warps), `stream_weights` and `gather_rows`, which keep the
ring full, and `activate_tiles` (sum over the K slices in fixed order, scales, bias, activation,
store), so that the stream never stops for an epilogue. The grid is persistent and sweeps the tiles
of one block after the other. Launched dependently (PDL): the CTAs are set up while the kernel
before still runs; the kernel after may start once this one has seen its input.
"""

from typing import Any, NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mixmoe.backends.hopper.decode import (
    HELPER_REGISTERS,
    SENTINEL_MASK,
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
from mixmoe.backends.hopper.mainloop import (
    KINDS,
    activate,
    activation_scalars,
    advance,
    cp_async,
    cta_barrier,
    decode,
    fragment,
    load_raw,
    smem_cast,
    tma_load,
)
from mixmoe.backends.hopper.slots import SlotRows
from mixmoe.spec import Recipe, Routed, Tile, Weights


class Rows(NamedTuple):
    """x: e4m3 slots, their row pitch, float32 scales."""

    codes: Any
    pitch: Any
    scales: Any


class Columns(NamedTuple):
    """What w13's rows are worth: scale and bias (E, 2 I), float32, gate rows above up rows."""

    scale: Any
    bias: Any


class Sizes(NamedTuple):
    """Slots of a row of x, I, routes of a token; tiles of a block, stages of a tile."""

    columns: Any
    intermediate: Any
    topk: Any
    row_tiles: Any
    steps: Any


class Act(NamedTuple):
    """Scalars of the activation function."""

    limit: Any
    alpha: Any
    beta: Any
    beta2: Any


@gluon.jit
def tiles_of(blocks, sizes, TOKENS: gl.constexpr):
    """Tiles that the routing of this call has made."""
    return gl.load(blocks.total) // TOKENS * sizes.row_tiles


@gluon.jit
def stream_weights(w_desc, s_desc, ring, blocks, sizes, limit, TOKENS: gl.constexpr,
                   STAGES: gl.constexpr):
    """Role of the producer warp: the weights of every tile of this CTA.

    The experts of `limit` tiles may be read, so that the first load waits for no count.
    """
    gdc_wait()
    gdc_launch_dependents()
    COLUMNS: gl.constexpr = w_desc.block_type.shape[1]
    expert = gl.load(blocks.experts + gl.program_id(0) // sizes.row_tiles)
    tiles = tiles_of(blocks, sizes, TOKENS)
    units = (sizes.intermediate + 7) // 8
    stage = tiles * 0
    phase = stage + 1
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        unit = expert * units + tile % sizes.row_tiles * w_desc.block_type.shape[0]
        ahead = tile + gl.num_programs(0)
        expert = gl.load(blocks.experts + ahead // sizes.row_tiles, mask=ahead < limit, other=0)
        for step in range(sizes.steps):
            barrier = ring.full.index(stage)
            mbarrier.wait(ring.empty.index(stage), phase)
            mbarrier.expect(barrier, w_desc.block_type.nbytes + s_desc.block_type.nbytes)
            tma_load(w_desc, [unit, step * COLUMNS, 0], barrier, ring.words.index(stage))
            tma_load(s_desc, [unit, step * (COLUMNS * 16)], barrier, ring.scales.index(stage))
            stage, phase = advance(stage, phase, STAGES)


@gluon.jit
def gather_rows(x, ring, blocks, sizes, tokens, limit, TOKENS: gl.constexpr,
                SLICES: gl.constexpr, STAGES: gl.constexpr):
    """Role of the gather warps: each block's rows of x, as B = (token, slice) rows of 128 columns.

    The copies of a step are announced LAG steps later, once they have landed and a fence has made
    them visible to the tensor cores; rows of padding and slots past the row are filled with zeros.
    """
    LAG: gl.constexpr = 3
    N: gl.constexpr = TOKENS * SLICES
    L: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [gl.num_warps(), 1], [1, 0])
    n = gl.arange(0, N, layout=gl.SliceLayout(1, L))
    column = gl.arange(0, 128, layout=gl.SliceLayout(0, L))
    k = (n % SLICES * 128)[:, None] + column[None, :]
    gdc_wait()
    packed = gl.load(blocks.ids + gl.program_id(0) // sizes.row_tiles * TOKENS + n // SLICES)
    tiles = tiles_of(blocks, sizes, TOKENS)
    stage = tiles * 0
    phase = stage + 1
    late = stage
    issued = stage
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        token = packed & SENTINEL_MASK
        live = token < tokens
        row = x.codes + token.to(gl.int64) * x.pitch
        ahead = tile + gl.num_programs(0)
        packed = gl.load(blocks.ids + ahead // sizes.row_tiles * TOKENS + n // SLICES,
                         mask=ahead < limit, other=0)
        for step in range(sizes.steps):
            at = step * (SLICES * 128) + k
            mbarrier.wait(ring.empty.index(stage), phase)
            cp_async(ring.rows.index(stage), row[:, None] + at,
                     mask=live[:, None] & (at < sizes.columns))
            async_copy.commit_group()
            stage, phase = advance(stage, phase, STAGES)
            issued += 1
            if issued > LAG:
                async_copy.wait_group(LAG)
                fence_async_shared()
                cta_barrier()  # of the role: every warp's fence before one thread's arrival
                mbarrier.arrive(ring.full.index(late), count=1)
                late = gl.where(late + 1 == STAGES, 0, late + 1)
    async_copy.wait_group(0)
    fence_async_shared()
    cta_barrier()
    for _ in range(gl.minimum(issued, LAG)):
        mbarrier.arrive(ring.full.index(late), count=1)
        late = gl.where(late + 1 == STAGES, 0, late + 1)


@gluon.jit
def multiply(ring, sums, blocks, sizes, TOKENS: gl.constexpr, SLICES: gl.constexpr,
             REP: gl.constexpr, STAGES: gl.constexpr, WIDE: gl.constexpr):
    """Role of the matrix warps: every tile of this CTA, handed over through `sums`.

    The words of the next stage, be it the next tile's, are read while a product is under way.
    """
    WARPS: gl.constexpr = gl.num_warps()
    zero = zeros(REP, TOKENS * SLICES)
    A: gl.constexpr = gl.DotOperandLayout(0, zero.type.layout, 4)
    gdc_wait()
    tiles = tiles_of(blocks, sizes, TOKENS)
    stage = tiles * 0
    phase = tiles * 0
    done = tiles * 0
    mbarrier.wait(ring.full.index(stage), phase, pred=gl.program_id(0) < tiles)
    raw, scale = load_raw(ring.words.index(stage), ring.scales.index(stage), REP, WARPS)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        total = own_parity(zero, SLICES)
        for step in range(sizes.steps):
            lo, hi = decode(raw, scale, WIDE)
            ahead, ahead_phase = advance(stage, phase, STAGES)
            more = (step + 1 < sizes.steps) | (tile + gl.num_programs(0) < tiles)
            mbarrier.wait(ring.full.index(ahead), ahead_phase, pred=more)
            part = warpgroup_mma(
                fragment(lo, hi, A, REP, WARPS), ring.rows.index(stage).permute((1, 0)), zero,
                use_acc=False, is_async=True,
            )
            raw, scale = load_raw(ring.words.index(ahead), ring.scales.index(ahead), REP, WARPS)
            part = warpgroup_mma_wait(0, deps=[part])
            mbarrier.arrive(ring.empty.index(stage), count=1)
            total += own_parity(part, SLICES)
            stage = ahead
            phase = ahead_phase
        hand_over(own_slice(total, TOKENS, SLICES), sums, done)
        done += 1


@gluon.jit
def load_pair(ptr, expert, columns, column):
    """The values of a gate column and of its up column: ptr is (E, 2 I) float32."""
    row = ptr + expert * (2 * columns) + column
    ok = column < columns
    return gl.load(row, mask=ok, other=0.0), gl.load(row + columns, mask=ok, other=0.0)


@gluon.jit
def activate_tiles(sums, h_ptr, x_scales, w, weight_ptr, blocks, sizes, act, tokens,
                   TOKENS: gl.constexpr, KIND: gl.constexpr):
    """Role of the epilogue warps: sums over the slices -> scale, bias, activation -> h (float32).

    A row unit at a time; what does not depend on the sums is fetched before they are waited for.
    """
    ROWS: gl.constexpr = sums.buffer.shape[1]
    SLICES: gl.constexpr = sums.buffer.shape[2]
    L: gl.constexpr = gl.BlockedLayout(
        [1, 2, 1, 1], [1, 1, 8, 4], [1, 1, 1, gl.num_warps()], [2, 3, 1, 0]
    )
    LY: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, L))  # (8, TOKENS)
    m = gl.arange(0, 8, layout=gl.SliceLayout(1, LY))[:, None]
    n = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, LY))[None, :]
    I = sizes.intermediate  # noqa: E741
    gdc_wait()
    tiles = tiles_of(blocks, sizes, TOKENS)
    done = tiles * 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        block = tile // sizes.row_tiles
        expert = gl.load(blocks.experts + block).to(gl.int64)
        packed = gl.load(blocks.ids + block * TOKENS + n)
        token = packed & SENTINEL_MASK
        column = tile % sizes.row_tiles * (ROWS * 8) + m
        gate_scale, up_scale = load_pair(w.scale, expert, I, column)
        if w.bias is not None:
            gate_bias, up_bias = load_pair(w.bias, expert, I, column)
        x_scale = gl.load(x_scales + token, mask=token < tokens, other=0.0)
        if weight_ptr is not None:
            weight = gl.load(weight_ptr + block * TOKENS + n)
        row = h_ptr + (token * sizes.topk + (packed >> 24)).to(gl.int64) * I
        mbarrier.wait(sums.ready.index(done & 1), (done >> 1) & 1)
        units = smem_cast(
            sums.buffer.index(done & 1), gl.float32, [ROWS, SLICES, 2, 8, TOKENS],
            gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0]),
        )
        for u in range(ROWS):
            total = gl.sum(units.index(u).load(L), axis=0)
            gate, up = total.permute((1, 2, 0)).split()
            gate = gl.convert_layout(gate, LY, assert_trivial=True) * (gate_scale * x_scale)
            up = gl.convert_layout(up, LY, assert_trivial=True) * (up_scale * x_scale)
            gate_scale, up_scale = load_pair(w.scale, expert, I, column + 8)
            if w.bias is not None:
                gate += gate_bias
                up += up_bias
                gate_bias, up_bias = load_pair(w.bias, expert, I, column + 8)
            h = activate(gate, up, act.limit, act.alpha, act.beta, act.beta2, KIND)
            if weight_ptr is not None:
                h *= weight
            gl.store(row + column, h, mask=(column < I) & (token < tokens))
            column += 8
        mbarrier.arrive(sums.taken.index(done & 1), count=1)
        done += 1


@gluon.jit(do_not_specialize=["tokens", "limit"])
def gemm1_decode(
    w_desc, s_desc, x, h_ptr, w, weight_ptr, blocks, sizes, act, tokens, limit,
    TOKENS: gl.constexpr, SLICES: gl.constexpr, REP: gl.constexpr, STAGES: gl.constexpr,
    KIND: gl.constexpr, WIDE: gl.constexpr, EPILOGUE_WARPS: gl.constexpr, REGISTERS: gl.constexpr,
):
    ROWS: gl.constexpr = w_desc.block_type.shape[0]
    ring = Ring(
        gl.allocate_shared_memory(gl.int32, [STAGES] + w_desc.block_type.shape, w_desc.layout),
        gl.allocate_shared_memory(gl.int32, [STAGES] + s_desc.block_type.shape, s_desc.layout),
        gl.allocate_shared_memory(
            gl.float8e4nv, [STAGES, TOKENS * SLICES, 128], gl.NVMMASharedLayout(128, 8, 2)
        ),
        barriers(STAGES, 2),  # weights, rows of x
        barriers(STAGES, 1),
    )
    buffer = gl.allocate_shared_memory(
        gl.float32, [2, ROWS, SLICES, 2, 8, TOKENS],
        gl.SwizzledSharedLayout(1, 1, 1, [4, 3, 2, 1, 0]),
    )
    sums = Sums(buffer, barriers(2, 1), barriers(2, 1))
    fence_async_shared()
    gl.warp_specialize(
        [
            (multiply, (ring, sums, blocks, sizes, TOKENS, SLICES, REP, STAGES, WIDE)),
            (stream_weights, (w_desc, s_desc, ring, blocks, sizes, limit, TOKENS, STAGES)),
            (activate_tiles, (sums, h_ptr, x.scales, w, weight_ptr, blocks, sizes, act, tokens,
                              TOKENS, KIND)),
            (gather_rows, (x, ring, blocks, sizes, tokens, limit, TOKENS, SLICES, STAGES)),
        ],
        [1, EPILOGUE_WARPS, 3 - EPILOGUE_WARPS],
        [REGISTERS, REGISTERS, REGISTERS],
    )


def launch(
    x: SlotRows, weights: Weights, routed: Routed, recipe: Recipe, tile: Tile, out: Tensor
) -> Tensor:
    """Run stage 1: out (T * topk, I) float32, a row per route; skipped routes are not written.

    x: rows (T, H); weights.w13 in the order hopper_fp4q_gu_w1 (or _wide); routed.block ==
    tile.tokens.
    """
    p, w13 = routed.problem, fragments(weights.w13)
    stream = Stream.of(tile, w13)
    row_tiles = -(-p.intermediate // (8 * stream.rows))
    limit = routed.sorted_expert_ids.shape[0] * row_tiles
    if not limit or not p.tokens:
        return out
    gemm1_decode[(stream.grid(limit),)](
        *stream.boxes(w13, stream.rows, tile.split_k),
        Rows(x.codes, x.codes.stride(0), x.scales), out,
        Columns(w13.row_scale, weights.w13_bias),
        routed.sorted_weights if recipe.weight_on == 1 else None,
        Blocks(routed.sorted_token_ids, routed.sorted_expert_ids, routed.num_valid_ids),
        Sizes(x.codes.shape[1], p.intermediate, p.topk, row_tiles, stream.steps(p.hidden)),
        Act(*activation_scalars(recipe.act)), p.tokens, limit,
        tile.tokens, tile.split_k, stream.rep, tile.stages, KINDS[recipe.act.kind], stream.wide,
        1 if tile.tokens < 32 else 2, HELPER_REGISTERS, **stream.options,
    )
    return out
