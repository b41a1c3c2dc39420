"""Stage 1 for few rows per expert: h = act(x Wg^T + bg, x Wu^T + bu), a stream of weight bytes.

The roles of `decode_gemm` over the rows of x that a block's tokens have, and `activate_tiles` (sum
over the K slices in fixed order, scales, bias, activation, store) as their epilogue.
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
from mixmoe.backends.hopper.decode_tiles import (
    Sizes,
    known,
    routes_of,
    row_of,
    tiles_of,
    tokens_of,
    turns_of,
)
from mixmoe.backends.hopper.mainloop import KINDS, activate, activation_scalars
from mixmoe.backends.hopper.slots import SlotRows
from mixmoe.spec import Recipe, Routed, Tile, Weights


class Act(NamedTuple):
    """Scalars of the activation function."""

    limit: Any
    alpha: Any
    beta: Any
    beta2: Any


class Activated(NamedTuple):
    """What turns sums into h: h float32 (routes, I), scales of x, columns, routing weights or None,
    `Act` and its kind.

    x_memory: where the matrix warps have put the scale of the only token, 8 times; or None, and
    x_scales are loaded. Neither: the sums hold the scales already.
    """

    h: Any
    x_scales: Any
    x_memory: Any
    w: Any
    weight: Any
    act: Any
    kind: Any


@gluon.jit
def load_pair(ptr, expert, columns, column):
    """The values of a gate column and of its up column: ptr is (E, 2 I) float32."""
    row = ptr + expert * (2 * columns) + column
    ok = column < columns
    return gl.load(row, mask=ok, other=0.0), gl.load(row + columns, mask=ok, other=0.0)


@gluon.jit
def activate_tiles(sums, to, blocks, sizes, tokens, BLOCK: gl.constexpr, TOKENS: gl.constexpr,
                   TEAMS: gl.constexpr, EARLY: gl.constexpr, SHARED: gl.constexpr = False):
    """Role of the epilogue warps: sums over the slices -> scale, bias, activation -> h (float32).

    A row unit at a time; what does not depend on the sums is fetched before they are waited for.
    """
    h_ptr, x_scales, x_memory, w, weight_ptr, act, _ = to
    KIND: gl.constexpr = to.kind
    ROWS: gl.constexpr = sums.buffer.shape[1]
    UNIT: gl.constexpr = [sums.buffer.shape[2], 2, 8, TOKENS]
    L: gl.constexpr = gl.BlockedLayout(
        [1, 2, 1, 1], [1, 1, 8, 4], [1, 1, 1, gl.num_warps()], [2, 3, 1, 0]
    )
    LY: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, L))  # (8, TOKENS)
    m = gl.arange(0, 8, layout=gl.SliceLayout(1, LY))[:, None]
    n = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, LY))[None, :]
    I = sizes.columns  # noqa: E741
    gdc_wait()
    tiles = tiles_of(blocks, sizes, BLOCK)
    done = tiles * 0
    begin, end, turn = turns_of(tiles, SHARED)
    for tile in range(begin, end, turn):
        block = tile // sizes.row_tiles
        expert = known(gl.load(blocks.experts + block).to(gl.int64), sizes)
        packed = routes_of(blocks, block, n, block + 1, BLOCK)
        token = packed & SENTINEL_MASK
        column = tile % sizes.row_tiles * (ROWS * 8) + m
        gate_scale, up_scale = load_pair(w.scale, expert, I, column)
        if w.bias is not None:
            gate_bias, up_bias = load_pair(w.bias, expert, I, column)
        x_scale = 1.0
        if x_scales is not None:
            x_scale = gl.load(x_scales + token, mask=token < tokens, other=0.0)
        if weight_ptr is not None:
            weight = gl.load(weight_ptr + block * BLOCK + n, mask=n < BLOCK, other=0.0)
        row = h_ptr + row_of(packed, sizes.topk) * I
        mbarrier.wait(sums.ready.index(done & 1), (done >> 1) & 1)
        if x_memory is not None:
            x_scale = x_memory.load(gl.SliceLayout(1, LY))[:, None]
        for u in range(ROWS):
            total = unit_total(sums, done, u, TEAMS, UNIT, L)
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


@gluon.jit
def activate_rows(team: gl.constexpr, ring, to, blocks, sizes, tokens, BLOCK: gl.constexpr,
                  TEAMS: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr,
                  WIDE: gl.constexpr, EARLY: gl.constexpr):
    """Role of a team with rows of its own: products, scale, bias, activation -> h (float32).

    A thread's two rows of a product are a gate and the up row of the same column.
    """
    h_ptr, x_scales, _, w, weight_ptr, act, _ = to
    KIND: gl.constexpr = to.kind
    WARPS: gl.constexpr = gl.num_warps()
    N: gl.constexpr = tokens_of(BLOCK, 1)
    gdc_wait()
    tiles = tiles_of(blocks, sizes, BLOCK)
    ahead = read_ahead(
        team, ring, tiles * 0, tiles * 0, gl.program_id(0) < tiles, TEAMS, CHUNKS
    )
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        total, ahead = tile_total(
            team, ring, ahead, sizes, tile + gl.num_programs(0) >= tiles, N, 1, TEAMS, 1, CHUNKS,
            STAGES, WIDE,
        )
        gate, up = total.reshape([WARPS, 2, 8, N]).permute((0, 2, 3, 1)).split()
        gate = gate.reshape([WARPS * 8, N])
        up = up.reshape([WARPS * 8, N])
        LY: gl.constexpr = gate.type.layout
        m = gl.arange(0, WARPS * 8, layout=gl.SliceLayout(1, LY))[:, None]
        n = gl.arange(0, N, layout=gl.SliceLayout(0, LY))[None, :]
        block = tile // sizes.row_tiles
        expert = known(gl.load(blocks.experts + block).to(gl.int64), sizes)
        packed = routes_of(blocks, block, n, block + 1, BLOCK)
        token = packed & SENTINEL_MASK
        column = (tile % sizes.row_tiles * TEAMS + team) * (WARPS * 8) + m
        gate_scale, up_scale = load_pair(w.scale, expert, sizes.columns, column)
        x_scale = gl.load(x_scales + token, mask=token < tokens, other=0.0)
        gate *= gate_scale * x_scale
        up *= up_scale * x_scale
        if w.bias is not None:
            gate_bias, up_bias = load_pair(w.bias, expert, sizes.columns, column)
            gate += gate_bias
            up += up_bias
        h = activate(gate, up, act.limit, act.alpha, act.beta, act.beta2, KIND)
        if weight_ptr is not None:
            h *= gl.load(weight_ptr + block * BLOCK + n, mask=n < BLOCK, other=0.0)
        row = h_ptr + row_of(packed, sizes.topk) * sizes.columns
        gl.store(row + column, h, mask=(column < sizes.columns) & (token < tokens))


@gluon.jit(do_not_specialize=["tokens", "limit"])
def gemm1_decode(
    w_desc, s_desc, x, h_ptr, w, weight_ptr, blocks, sizes, act, tokens, limit,
    BLOCK: gl.constexpr, PART: gl.constexpr, SPLIT: gl.constexpr, CHUNKS: gl.constexpr,
    STAGES: gl.constexpr, KIND: gl.constexpr, WIDE: gl.constexpr,
    TEAM_REGISTERS: gl.constexpr, REGISTERS: gl.constexpr,
):
    run(
        w_desc, s_desc, x, blocks, sizes, tokens, limit, activate_rows, activate_tiles,
        Activated(h_ptr, x.scales, None, w, weight_ptr, act, KIND),
        BLOCK, PART, SPLIT, CHUNKS, STAGES, WIDE, False, TEAM_REGISTERS, REGISTERS,
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
    limit = routed.sorted_expert_ids.shape[0]
    if not limit or not p.tokens:
        return out
    gemm1_decode[(stream.grid(limit * row_tiles),)](
        *stream.boxes(w13, stream.team_rows, stream.part),
        Rows(x.codes, x.codes.stride(0), x.scales, None), out,
        Columns(w13.row_scale, weights.w13_bias),
        routed.sorted_weights if recipe.weight_on == 1 else None,
        Blocks(routed.sorted_token_ids, routed.sorted_expert_ids, routed.num_valid_ids),
        Sizes(x.codes.shape[1], p.intermediate, p.experts, p.topk, -(-p.intermediate // 8),
              row_tiles, stream.steps(p.hidden), None),
        Act(*activation_scalars(recipe.act)), p.tokens, limit,
        tile.tokens, stream.part, stream.split, stream.chunks, tile.stages,
        KINDS[recipe.act.kind], stream.wide, *stream.registers, **stream.options,
    )
    return out
