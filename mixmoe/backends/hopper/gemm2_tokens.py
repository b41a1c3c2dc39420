"""Stage 2 for very few tokens, with the sum over a token's experts: y itself, no combine.

A tile is 16 weight rows x ALL experts of one token, an expert (or a part of its K) to a warp; the
epilogue adds the experts in fixed order. An expert that two tokens share is streamed twice, the
second time out of L2. It reads the caller's topk_ids, not their sorted form. Roles:
`multiply_tokens` (matrix warps), `stream_tokens` (producer warp), `store_tokens` (epilogue warp).
"""

from typing import Any, NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mixmoe.backends.hopper.decode import (
    Columns,
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
from mixmoe.backends.hopper.decode_gemm import make_rows, read_ahead, tile_total
from mixmoe.backends.hopper.decode_tiles import share
from mixmoe.backends.hopper.mainloop import advance, smem_cast, tma_load
from mixmoe.backends.hopper.resident import (
    Sizes,
    flat,
    hidden_of,
    make_resident,
    resident_layout,
    vector_layout,
)
from mixmoe.backends.hopper.slots import SlotRows
from mixmoe.errors import MixMoEError
from mixmoe.spec import Recipe, Tile, Weights


class Routes(NamedTuple):
    """A token's experts as the caller gave them: ids and weights (T, topk), map of experts."""

    ids: Any
    weights: Any
    map: Any


@gluon.jit
def expert_of(routes, route, live, experts):
    """Local expert of a route, -1 where the route is skipped or not live."""
    expert = gl.load(routes.ids + route, mask=live, other=-1).to(gl.int32)
    if routes.map is not None:
        known = expert >= 0
        expert = gl.load(routes.map + expert, mask=live & known, other=-1).to(gl.int32)
    return gl.where((expert >= 0) & (expert < experts), expert, -1)


@gluon.jit
def multiply_tokens(ring, sums, h, routes, sizes, tokens, TOPK: gl.constexpr,
                    CHUNKS: gl.constexpr, STAGES: gl.constexpr, WIDE: gl.constexpr):
    """Role of the matrix warps: warp s works for route s // SPAN of the token.

    All that a token needs is asked for at once, before the first weights are waited for.
    """
    WARPS: gl.constexpr = gl.num_warps()
    SPAN: gl.constexpr = WARPS // TOPK
    L: gl.constexpr = resident_layout(WARPS, WARPS, h.scales is not None)
    own = own_slice(own_parity(zeros(1, WARPS), WARPS), 1, WARPS)
    F: gl.constexpr = vector_layout(own.type.layout, (4, 3, 2, 0))
    gdc_wait()
    gdc_launch_dependents()
    first, last = share(tokens * sizes.row_tiles)
    n = gl.arange(0, WARPS, layout=gl.SliceLayout(1, L)) // SPAN
    stage = first * 0
    phase = first * 0
    done = first * 0
    for token in range(first // sizes.row_tiles, (last - 1) // sizes.row_tiles + 1):
        row = gl.cast(token, gl.int64) * TOPK + n
        live = expert_of(routes, row, n >= 0, sizes.experts) >= 0
        weight = gl.full([WARPS], 1.0, gl.float32, gl.SliceLayout(1, L))
        if routes.weights is not None:
            weight = gl.load(routes.weights + row)
        scale = make_resident(
            ring.rows, h, row, live, sizes.intermediate, SPAN, CHUNKS, L
        )
        factor = gl.convert_layout(gl.where(live, scale * weight, 0.0), F)
        until = gl.minimum(last, (token + 1) * sizes.row_tiles)
        ahead = read_ahead(0, ring, stage, phase, True, 1, CHUNKS)
        for tile in range(gl.maximum(first, token * sizes.row_tiles), until):
            total, ahead = tile_total(
                0, ring, ahead, sizes, tile + 1 == until, WARPS, WARPS, 1, 1, CHUNKS, STAGES, WIDE,
                True,
            )
            own = own_slice(total, 1, WARPS)
            own = own * factor.expand_dims(0).expand_dims(2).expand_dims(3).expand_dims(4)
            hand_over(flat(own, sums), sums, done)
            done += 1
        stage = ahead.stage
        phase = ahead.phase


@gluon.jit
def stream_tokens(w_desc, s_desc, ring, routes, sizes, tokens, TOPK: gl.constexpr,
                  STAGES: gl.constexpr):
    """Role of the producer warp: a box of each expert. It does not wait for stage 1.

    A skipped route streams expert 0, for the bytes a stage expects; its h is zero.
    """
    COLUMNS: gl.constexpr = w_desc.block_type.shape[1]
    first, last = share(tokens * sizes.row_tiles)
    stage = first * 0
    phase = first * 0 + 1
    for tile in range(first, last):
        route = tile // sizes.row_tiles * TOPK
        units = ()
        for r in gl.static_range(TOPK):
            expert = gl.maximum(expert_of(routes, route + r, route >= 0, sizes.experts), 0)
            unit = expert * sizes.units + tile % sizes.row_tiles
            units = units + (unit,)  # type: ignore[assignment]
        for step in range(sizes.steps):
            barrier = ring.full.index(stage)
            mbarrier.wait(ring.empty.index(stage), phase)
            mbarrier.expect(barrier, TOPK * (w_desc.block_type.nbytes + s_desc.block_type.nbytes))
            words = smem_cast(
                ring.words.index(stage), gl.int32, [TOPK, 1, COLUMNS, 256], w_desc.layout
            )
            scales = smem_cast(
                ring.scales.index(stage), gl.int32, [TOPK, 1, COLUMNS * 16], s_desc.layout
            )
            for r in gl.static_range(TOPK):
                tma_load(w_desc, [units[r], step * COLUMNS, 0], barrier, words.index(r))
                tma_load(s_desc, [units[r], step * (COLUMNS * 16)], barrier, scales.index(r))
            stage, phase = advance(stage, phase, STAGES)


@gluon.jit
def expert_columns(ptr, routes, sizes, tile, live, s, c, TOPK: gl.constexpr, SPAN: gl.constexpr):
    """(SLICES, 16) of ptr (E, H) at the tile's columns, row s from the expert of slice s; 0 where
    a route is skipped."""
    expert = expert_of(routes, tile // sizes.row_tiles * TOPK + s // SPAN, live, sizes.experts)
    column = tile % sizes.row_tiles * 16 + c
    at = gl.maximum(expert, 0).to(gl.int64) * sizes.hidden + column
    return gl.load(ptr + at, mask=(column < sizes.hidden) & (expert >= 0) & live, other=0.0)


@gluon.jit
def store_tokens(sums, out_ptr, w, routes, sizes, tokens, TOPK: gl.constexpr):
    """Role of the epilogue warp: row scales and bias, sum over a token's experts -> y."""
    SLICES: gl.constexpr = sums.buffer.shape[1]
    SPAN: gl.constexpr = SLICES // TOPK
    L: gl.constexpr = gl.BlockedLayout([SLICES // 2, 1], [2, 16], [1, gl.num_warps()], [1, 0])
    s = gl.arange(0, SLICES, layout=gl.SliceLayout(1, L))[:, None]
    column = gl.arange(0, 16, layout=gl.SliceLayout(0, L))
    c = column[None, :]
    first, last = share(tokens * sizes.row_tiles)
    done = first * 0
    scale = expert_columns(w.scale, routes, sizes, first, first < last, s, c, TOPK, SPAN)
    gdc_wait()
    for tile in range(first, last):
        token = tile // sizes.row_tiles
        if w.bias is not None:
            bias = expert_columns(w.bias, routes, sizes, tile, s % SPAN == 0, s, c, TOPK, SPAN)
            if routes.weights is not None:
                bias *= gl.load(routes.weights + token * TOPK + s // SPAN)
        next_scale = expert_columns(  # a tile ahead: it comes from memory
            w.scale, routes, sizes, tile + 1, tile + 1 < last, s, c, TOPK, SPAN
        )
        mbarrier.wait(sums.ready.index(done & 1), (done >> 1) & 1)
        part = sums.buffer.index(done & 1).load(L) * scale
        mbarrier.arrive(sums.taken.index(done & 1), count=1)
        if w.bias is not None:
            part += bias
        at = tile % sizes.row_tiles * 16 + column
        gl.store(
            out_ptr + token.to(gl.int64) * sizes.hidden + at,
            gl.sum(part, axis=0).to(out_ptr.dtype.element_ty), mask=at < sizes.hidden,
        )
        scale = next_scale
        done += 1


@gluon.jit(do_not_specialize=["tokens"])
def gemm2_tokens(
    w_desc, s_desc, h, out_ptr, w, routes, sizes, tokens,
    TOPK: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr,
    WIDE: gl.constexpr, REGISTERS: gl.constexpr,
):
    WARPS: gl.constexpr = gl.num_warps()
    COLUMNS: gl.constexpr = w_desc.block_type.shape[1]
    ring = Ring(
        gl.allocate_shared_memory(gl.int32, [STAGES, TOPK, COLUMNS, 256], w_desc.layout),
        gl.allocate_shared_memory(gl.int32, [STAGES, TOPK, COLUMNS * 16], s_desc.layout),
        make_rows(GROUPS, WARPS), barriers(STAGES, 1), barriers(STAGES, 1),
    )
    buffer = gl.allocate_shared_memory(
        gl.float32, [2, WARPS, 16], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    )
    sums = Sums(buffer, barriers(2, 1), barriers(2, 1))
    fence_async_shared()
    gl.warp_specialize(
        [
            (multiply_tokens, (ring, sums, h, routes, sizes, tokens, TOPK, CHUNKS, STAGES, WIDE)),
            (stream_tokens, (w_desc, s_desc, ring, routes, sizes, tokens, TOPK, STAGES)),
            (store_tokens, (sums, out_ptr, w, routes, sizes, tokens, TOPK)),
        ],
        [1, 1],
        [REGISTERS, REGISTERS],
    )


def launch_tokens(
    h: Tensor | SlotRows, weights: Weights, topk_ids: Tensor, topk_weights: Tensor,
    expert_map: Tensor | None, recipe: Recipe, tile: Tile, out: Tensor,
) -> Tensor:
    """Run stage 2 and combine at once: out (T, H) = sum over a token's routes in slot order.

    topk_ids: (T, topk) int32 or int64, contiguous, topk a divisor of 8; topk_weights: (T, topk)
    float32; h, weights.w2, the kernel before as for gemm2_decode; skipped routes are not read.
    """
    tokens, topk = topk_ids.shape
    w2 = fragments(weights.w2)
    experts, hidden, intermediate = w2.shape
    stream = Stream.of(tile, w2)
    if not tokens:
        return out
    row_tiles, span = -(-hidden // 16), tile.warps // topk
    if span * topk != tile.warps or span * stream.chunks < 2:  # a box of scales is 128 bytes
        raise MixMoEError("topk divides the 8 warps, and k is 256 for topk 8", (topk, tile.k))
    steps = -(-intermediate // (tile.k * span))
    gemm2_tokens[(stream.grid(tokens * row_tiles),)](
        *stream.boxes(w2, 1, span), hidden_of(h), out, Columns(w2.row_scale, weights.w2_bias),
        Routes(topk_ids, topk_weights if recipe.weight_on == 2 else None, expert_map),
        Sizes(hidden, intermediate, experts, topk, row_tiles, row_tiles, steps), tokens,
        topk, stream.chunks, tile.stages, steps * stream.chunks, stream.wide, stream.helpers,
        **stream.options,
    )
    return out
