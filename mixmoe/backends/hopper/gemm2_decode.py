"""Stage 2 for few rows per expert, by blocks: out = h Wd^T + bd, a row per route for combine.

A tile is ROWS units of weight rows x one block of routes. Roles: `multiply_rows` (matrix warps),
`stream_rows` (producer warp), `store_rows` (epilogue warp). The other form is `launch_tokens`.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
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
from mixmoe.backends.hopper.gemm2_tokens import launch_tokens
from mixmoe.backends.hopper.mainloop import advance, tma_load
from mixmoe.backends.hopper.resident import (
    Columns,
    Sizes,
    flat,
    hidden_of,
    make_resident,
    multiply_tile,
    resident_layout,
    share,
    take,
    vector_layout,
)
from mixmoe.backends.hopper.slots import SlotRows
from mixmoe.spec import Recipe, Routed, Tile, Weights

__all__ = ["launch_rows", "launch_tokens"]


@gluon.jit
def share_of_blocks(blocks, sizes, TOKENS: gl.constexpr):
    """This CTA's tiles of `gemm2_rows`."""
    return share(gl.load(blocks.total) // TOKENS * sizes.row_tiles)


@gluon.jit
def multiply_rows(ring, resident, sums, h, blocks, sizes, tokens, TOKENS: gl.constexpr,
                  SLICES: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr,
                  WIDE: gl.constexpr):
    """Role of the matrix warps: quantise the h of a block when it changes, multiply its tiles."""
    N: gl.constexpr = TOKENS * SLICES
    L: gl.constexpr = resident_layout(N, gl.num_warps(), h.scales is not None)
    own = own_slice(own_parity(zeros(1, N), SLICES), TOKENS, SLICES)
    F: gl.constexpr = vector_layout(own.type.layout, (0, 0, 0, 0))
    factor = gl.full([TOKENS], 0.0, gl.float32, F)
    gdc_wait()
    gdc_launch_dependents()
    first, last = share_of_blocks(blocks, sizes, TOKENS)
    n = gl.arange(0, N, layout=gl.SliceLayout(1, L)) // SLICES
    stage = first * 0
    phase = first * 0
    done = first * 0
    block = first * 0 - 1
    raw, word_scale = take(ring, stage, phase, first < last, CHUNKS)
    for tile in range(first, last):
        if tile // sizes.row_tiles != block:
            block = tile // sizes.row_tiles
            packed = gl.load(blocks.ids + block * TOKENS + n)
            token = packed & SENTINEL_MASK
            row = gl.where(token < tokens, token.to(gl.int64) * sizes.topk + (packed >> 24), 0)
            scale = make_resident(
                resident, h, row, token < tokens, sizes.intermediate, SLICES, CHUNKS, L
            )
            each = gl.max(scale.reshape([TOKENS, SLICES]), axis=1)  # equal over a token's slices
            factor = gl.convert_layout(each, F)
        total, raw, word_scale, stage, phase = multiply_tile(
            ring, resident, raw, word_scale, stage, phase, (tile + 1 == last).to(gl.int32),
            sizes.steps, SLICES, CHUNKS, STAGES, WIDE,
        )
        own = own_slice(total, TOKENS, SLICES)
        own = own * factor.expand_dims(0).expand_dims(0).expand_dims(0).expand_dims(0)
        hand_over(flat(own, sums), sums, done)
        done += 1


@gluon.jit
def stream_rows(w_desc, s_desc, ring, blocks, sizes, TOKENS: gl.constexpr, STAGES: gl.constexpr):
    """Role of the producer warp. It does not wait for stage 1: routing ended before that began."""
    UNITS: gl.constexpr = w_desc.block_type.shape[0]
    COLUMNS: gl.constexpr = w_desc.block_type.shape[1]
    first, last = share_of_blocks(blocks, sizes, TOKENS)
    stage = first * 0
    phase = first * 0 + 1
    for tile in range(first, last):
        expert = gl.load(blocks.experts + tile // sizes.row_tiles)
        unit = expert * sizes.units + tile % sizes.row_tiles * UNITS
        for step in range(sizes.steps):
            barrier = ring.full.index(stage)
            mbarrier.wait(ring.empty.index(stage), phase)
            mbarrier.expect(barrier, w_desc.block_type.nbytes + s_desc.block_type.nbytes)
            tma_load(w_desc, [unit, step * COLUMNS, 0], barrier, ring.words.index(stage))
            tma_load(s_desc, [unit, step * (COLUMNS * 16)], barrier, ring.scales.index(stage))
            stage, phase = advance(stage, phase, STAGES)


@gluon.jit
def block_columns(ptr, blocks, sizes, tile, live, c, C: gl.constexpr):
    """The part of a tile's expert's row of ptr (E, H) that belongs to the tile's columns."""
    expert = gl.load(blocks.experts + tile // sizes.row_tiles, mask=live, other=0).to(gl.int64)
    column = tile % sizes.row_tiles * C + c
    return gl.load(ptr + expert * sizes.hidden + column, mask=(column < sizes.hidden) & live,
                   other=0.0)


@gluon.jit
def store_rows(sums, out_ptr, w, blocks, sizes, tokens, TOKENS: gl.constexpr,
               SLICES: gl.constexpr):
    """Role of the epilogue warp: sum over the slices, row scale, bias -> a row per route."""
    C: gl.constexpr = sums.buffer.shape[2]
    LANES: gl.constexpr = C // 4 if C < 128 else 32
    PART: gl.constexpr = min(TOKENS, 8)  # tokens at a time, 32 values a lane
    L: gl.constexpr = gl.BlockedLayout(
        [SLICES, 4], [32 // LANES, LANES], [gl.num_warps(), 1], [1, 0]
    )
    L3: gl.constexpr = gl.BlockedLayout(
        [1, SLICES, 4], [32 // LANES, 1, LANES], [gl.num_warps(), 1, 1], [2, 1, 0]
    )
    LY: gl.constexpr = gl.SliceLayout(1, L3)
    c = gl.arange(0, C, layout=gl.SliceLayout(0, LY))
    n = gl.arange(0, PART, layout=gl.SliceLayout(1, LY))
    H = sizes.hidden
    first, last = share_of_blocks(blocks, sizes, TOKENS)
    done = first * 0
    scale = block_columns(w.scale, blocks, sizes, first, first < last, c, C)
    gdc_wait()
    for tile in range(first, last):
        column = tile % sizes.row_tiles * C + c
        if w.bias is not None:
            bias = block_columns(w.bias, blocks, sizes, tile, tile < last, c, C)
        id_ptr = blocks.ids + tile // sizes.row_tiles * TOKENS + n
        packed = gl.load(id_ptr)
        next_scale = block_columns(  # a tile ahead: it comes from memory
            w.scale, blocks, sizes, tile + 1, tile + 1 < last, c, C
        )
        mbarrier.wait(sums.ready.index(done & 1), (done >> 1) & 1)
        buffer = sums.buffer.index(done & 1)
        for part in gl.static_range(TOKENS // PART):
            some = buffer.slice(part * PART * SLICES, PART * SLICES, dim=0).load(L)
            some = gl.convert_layout(some.reshape([PART, SLICES, C]), L3, assert_trivial=True)
            total = gl.sum(some, axis=1) * scale[None, :]
            if w.bias is not None:
                total += bias[None, :]
            token = packed & SENTINEL_MASK
            row = token.to(gl.int64) * sizes.topk + (packed >> 24)
            live = (token < tokens)[:, None] & (column < H)[None, :]
            if part + 1 < TOKENS // PART:
                packed = gl.load(id_ptr + (part + 1) * PART)
            at = row[:, None] * H + column[None, :]
            gl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=live)
        mbarrier.arrive(sums.taken.index(done & 1), count=1)
        scale = next_scale
        done += 1


@gluon.jit(do_not_specialize=["tokens"])
def gemm2_rows(
    w_desc, s_desc, h, out_ptr, w, blocks, sizes, tokens,
    TOKENS: gl.constexpr, SLICES: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr,
    GROUPS: gl.constexpr, WIDE: gl.constexpr, REGISTERS: gl.constexpr,
):
    C: gl.constexpr = w_desc.block_type.shape[0] * 16
    ring = Ring(
        gl.allocate_shared_memory(gl.int32, [STAGES] + w_desc.block_type.shape, w_desc.layout),
        gl.allocate_shared_memory(gl.int32, [STAGES] + s_desc.block_type.shape, s_desc.layout),
        None, barriers(STAGES, 1), barriers(STAGES, 1),
    )
    resident = gl.allocate_shared_memory(
        gl.float8e4nv, [GROUPS, TOKENS * SLICES, 128], gl.NVMMASharedLayout(128, 8, 2)
    )
    # 8-word groups of a row are swapped by its number: the warps write without a bank conflict
    buffer = gl.allocate_shared_memory(
        gl.float32, [2, TOKENS * SLICES, C], gl.SwizzledSharedLayout(8, 2, 4, [1, 0])
    )
    sums = Sums(buffer, barriers(2, 1), barriers(2, 1))
    fence_async_shared()
    gl.warp_specialize(
        [
            (multiply_rows, (ring, resident, sums, h, blocks, sizes, tokens,
                             TOKENS, SLICES, CHUNKS, STAGES, WIDE)),
            (stream_rows, (w_desc, s_desc, ring, blocks, sizes, TOKENS, STAGES)),
            (store_rows, (sums, out_ptr, w, blocks, sizes, tokens, TOKENS, SLICES)),
        ],
        [1, 1],
        [REGISTERS, REGISTERS],
    )


def launch_rows(
    h: Tensor | SlotRows, weights: Weights, routed: Routed, recipe: Recipe, tile: Tile, out: Tensor
) -> Tensor:
    """Run stage 2 by blocks: out (T * topk, H), a row per route without its routing weight.

    h: (T * topk, I) float32 or e4m3 slots, a row per route; weights.w2 in the order hopper_fp4q_w1
    (or _wide); routed.block == tile.tokens. Rows of skipped routes are not written.
    The kernel before must be one that starts its dependents after it has waited (gemm1_decode).
    """
    p, w2 = routed.problem, fragments(weights.w2)
    stream = Stream.of(tile, w2)
    row_tiles = -(-p.hidden // tile.rows)
    limit = routed.sorted_expert_ids.shape[0] * row_tiles
    if not limit or not p.tokens:
        return out
    steps = stream.steps(p.intermediate)
    gemm2_rows[(stream.grid(limit),)](
        *stream.boxes(w2, stream.rows, tile.split_k), hidden_of(h), out,
        Columns(w2.row_scale, weights.w2_bias),
        Blocks(routed.sorted_token_ids, routed.sorted_expert_ids, routed.num_valid_ids),
        Sizes(p.hidden, p.intermediate, p.experts, p.topk, -(-p.hidden // 16), row_tiles, steps),
        p.tokens, tile.tokens, tile.split_k, stream.chunks, tile.stages, steps * stream.chunks,
        stream.wide, HELPER_REGISTERS, **stream.options,
    )
    return out
