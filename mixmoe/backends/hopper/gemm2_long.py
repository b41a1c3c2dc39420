"""Stage 2 for few rows per expert and a long K: out = h Wd^T + bd, a row per route for combine.

With I in the thousands stage 2 is what stage 1 is, a stream of weights beside a few gathered rows:
the roles of `decode_gemm` over rows of h, and `store_tiles` (sum over the K slices in fixed order,
scales, bias, store) as their epilogue. Rows short enough to stay in shared memory are
`gemm2_decode`'s, few tokens `gemm2_tokens`'s.
"""

from typing import Any, NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.language.extra.cuda import gdc_wait

from mixmoe.backends.hopper.decode import (
    SENTINEL_MASK,
    Blocks,
    Columns,
    Stream,
    fragments,
)
from mixmoe.backends.hopper.decode_gemm import Rows, read_ahead, run, tile_total, unit_total
from mixmoe.backends.hopper.decode_tiles import Sizes, known, routes_of, row_of, tiles_of, tokens_of
from mixmoe.backends.hopper.gemm2_decode import rows_of, store
from mixmoe.backends.hopper.slots import SlotRows
from mixmoe.spec import Recipe, Routed, Tile, Weights


class Stored(NamedTuple):
    """What turns sums into rows of the result: the rows, scales of h, columns."""

    out: Any
    h_scales: Any
    w: Any


@gluon.jit
def load_column(ptr, expert, columns, column):
    """The values of columns of the result: ptr is (E, H) float32."""
    return gl.load(ptr + expert * columns + column, mask=column < columns, other=0.0)


@gluon.jit
def store_tiles(sums, to, blocks, sizes, tokens, BLOCK: gl.constexpr, TOKENS: gl.constexpr,
                TEAMS: gl.constexpr, EARLY: gl.constexpr):
    """Role of the epilogue warp: sums over the slices -> scales, bias -> rows of the result.

    A row unit at a time: 16 columns of each route, two to a lane, 32 bytes of a 16-bit row. What
    does not depend on the sums is fetched before they are waited for.
    """
    out_ptr, h_scales, w = to
    ROWS: gl.constexpr = sums.buffer.shape[1]
    UNIT: gl.constexpr = [sums.buffer.shape[2], 16, TOKENS]
    L: gl.constexpr = gl.BlockedLayout(
        [1, 2, 1], [1, 8, 4], [1, 1, gl.num_warps()], [1, 2, 0]
    )
    LY: gl.constexpr = gl.SliceLayout(0, L)  # (16, TOKENS)
    m = gl.arange(0, 16, layout=gl.SliceLayout(1, LY))[:, None]
    n = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, LY))[None, :]
    H = sizes.columns
    if not EARLY:
        gdc_wait()
    tiles = tiles_of(blocks, sizes, BLOCK)
    gdc_wait()  # for the scales of h; and the rows may still be read by what ran before
    done = tiles * 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        block = tile // sizes.row_tiles
        expert = known(gl.load(blocks.experts + block).to(gl.int64), sizes)
        packed = routes_of(blocks, block, n, block + 1, BLOCK)
        live = (packed & SENTINEL_MASK) < tokens
        route = row_of(packed, sizes.topk)
        column = tile % sizes.row_tiles * (ROWS * 16) + m
        scale = load_column(w.scale, expert, H, column)
        if w.bias is not None:
            bias = load_column(w.bias, expert, H, column)
        h_scale = gl.load(h_scales + route, mask=live, other=0.0)
        row = out_ptr + route * H
        mbarrier.wait(sums.ready.index(done & 1), (done >> 1) & 1)
        for u in range(ROWS):
            value = unit_total(sums, done, u, TEAMS, UNIT, L) * (scale * h_scale)
            scale = load_column(w.scale, expert, H, column + 16)
            if w.bias is not None:
                value += bias
                bias = load_column(w.bias, expert, H, column + 16)
            value = value.to(out_ptr.dtype.element_ty)
            gl.store(row + column, value, mask=(column < H) & live)
            column += 16
        mbarrier.arrive(sums.taken.index(done & 1), count=1)
        done += 1


@gluon.jit
def store_rows(team: gl.constexpr, ring, to, blocks, sizes, tokens, BLOCK: gl.constexpr,
               TEAMS: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr,
               WIDE: gl.constexpr, EARLY: gl.constexpr):
    """Role of a team with weight rows of its own: products, scales, bias -> rows of the result."""
    out_ptr, h_scales, w = to
    WARPS: gl.constexpr = gl.num_warps()
    N: gl.constexpr = tokens_of(BLOCK, 1)
    O: gl.constexpr = gl.BlockedLayout([4, 1], [4, 8], [WARPS, 1], [0, 1])
    if not EARLY:
        gdc_wait()
    tiles = tiles_of(blocks, sizes, BLOCK)
    gdc_wait()  # for the scales of h; and the rows may still be read by what ran before
    ahead = read_ahead(
        team, ring, tiles * 0, tiles * 0, gl.program_id(0) < tiles, TEAMS, CHUNKS
    )
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        value, ahead = tile_total(
            team, ring, ahead, sizes, tile + gl.num_programs(0) >= tiles, N, 1, TEAMS, 1, CHUNKS,
            STAGES, WIDE,
        )
        L: gl.constexpr = value.type.layout
        block = tile // sizes.row_tiles
        expert = known(gl.load(blocks.experts + block).to(gl.int64), sizes)
        first = (tile % sizes.row_tiles * TEAMS + team) * (WARPS * 16)
        column = first + gl.arange(0, WARPS * 16, layout=gl.SliceLayout(1, L))
        row = rows_of(blocks, sizes, block, tokens, N, BLOCK, gl.SliceLayout(0, L))
        h_scale = gl.load(h_scales + row, mask=row >= 0, other=0.0)
        value *= load_column(w.scale, expert, sizes.columns, column)[:, None] * h_scale[None, :]
        if w.bias is not None:
            value += load_column(w.bias, expert, sizes.columns, column)[:, None]
        row = rows_of(blocks, sizes, block, tokens, N, BLOCK, gl.SliceLayout(0, O))
        store(value, out_ptr, row, first, sizes.columns, O)


@gluon.jit(do_not_specialize=["tokens", "limit"])
def gemm2_long(
    w_desc, s_desc, h, out_ptr, w, blocks, sizes, tokens, limit,
    BLOCK: gl.constexpr, PART: gl.constexpr, SPLIT: gl.constexpr, CHUNKS: gl.constexpr,
    STAGES: gl.constexpr, WIDE: gl.constexpr, EARLY: gl.constexpr,
    TEAM_REGISTERS: gl.constexpr, REGISTERS: gl.constexpr,
):
    run(
        w_desc, s_desc, h, blocks, sizes, tokens, limit, store_rows, store_tiles,
        Stored(out_ptr, h.scales, w),
        BLOCK, PART, SPLIT, CHUNKS, STAGES, WIDE, EARLY, TEAM_REGISTERS, REGISTERS,
    )


def launch(
    h: SlotRows, weights: Weights, routed: Routed, recipe: Recipe, tile: Tile, out: Tensor,
    early: bool = False,
) -> Tensor:
    """Run stage 2: out (T * topk, H), a row per route without its routing weight.

    h: rows (T * topk, I); weights.w2 in the order hopper_fp4q_w1 (or _wide); routed.block ==
    tile.tokens. Rows of skipped routes are not written. early: the lists of `routed` are complete
    when this kernel may start. They are behind gemm1_decode, which starts its dependents after it
    has waited for them, and behind what follows it: no CTA of that starts before.
    """
    p, w2 = routed.problem, fragments(weights.w2)
    stream = Stream.of(tile, w2)
    row_tiles = -(-p.hidden // tile.rows)
    limit = routed.sorted_expert_ids.shape[0]
    if not limit or not p.tokens:
        return out
    gemm2_long[(stream.grid(limit * row_tiles),)](
        *stream.boxes(w2, stream.team_rows, stream.part),
        Rows(h.codes, h.codes.stride(0), h.scales, p.topk), out,
        Columns(w2.row_scale, weights.w2_bias),
        Blocks(routed.sorted_token_ids, routed.sorted_expert_ids, routed.num_valid_ids),
        Sizes(h.codes.shape[1], p.hidden, p.experts, p.topk, -(-p.hidden // 16), row_tiles,
              stream.steps(p.intermediate), None),
        p.tokens, limit, tile.tokens, stream.part, stream.split, stream.chunks, tile.stages,
        stream.wide, early, *stream.registers, **stream.options,
    )
    return out
