"""Stage 1 for few rows per expert: h = act(x Wg^T + bg, x Wu^T + bu), a stream of weight bytes.

Roles of a CTA: `multiply` (two teams of four matrix warps, each with half of the K slices),
`stream_weights` and `gather_rows`, which keep the ring full, and `activate_tiles` (sum over the K
slices in fixed order, scales, bias, activation, store), so that the stream never stops for an
epilogue. Two teams and two CTAs make four chains an SM whose latencies hide behind each other. The
grid is persistent and sweeps the tiles of one block after the other. Launched dependently (PDL):
the CTAs are set up while the kernel before still runs; the kernel after may start once this one has
seen its input.
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
    SENTINEL_MASK,
    TEAM_HELPERS,
    TEAM_REGISTERS,
    TEAMS,
    Blocks,
    Ring,
    Stream,
    Sums,
    barriers,
    fragments,
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
    """Slots of a row of x, I, E, routes of a token; tiles of a block, stages of a tile."""

    columns: Any
    intermediate: Any
    experts: Any
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
def tiles_of(blocks, sizes, BLOCK: gl.constexpr):
    """Tiles that the routing of this call has made."""
    return gl.load(blocks.total) // BLOCK * sizes.row_tiles


@gluon.jit
def routes_of(blocks, block, n, limit, BLOCK: gl.constexpr):
    """Routes n of a block, token | slot << 24; no token where the block or the list is shorter."""
    return gl.load(
        blocks.ids + block * BLOCK + n, mask=(n < BLOCK) & (block < limit), other=SENTINEL_MASK
    )


@gluon.jit
def stream_weights(w_desc, s_desc, ring, blocks, sizes, limit, BLOCK: gl.constexpr,
                   STAGES: gl.constexpr):
    """Role of the producer warp: the weights of every tile of this CTA.

    The experts of `limit` blocks may be read, so that the first load waits for no count.
    """
    gdc_wait()
    gdc_launch_dependents()
    COLUMNS: gl.constexpr = w_desc.block_type.shape[1]
    expert = gl.load(blocks.experts + gl.program_id(0) // sizes.row_tiles)
    tiles = tiles_of(blocks, sizes, BLOCK)
    units = (sizes.intermediate + 7) // 8
    stage = tiles * 0
    phase = stage + 1
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        unit = expert * units + tile % sizes.row_tiles * w_desc.block_type.shape[0]
        ahead = tile + gl.num_programs(0)
        block = ahead // sizes.row_tiles
        expert = gl.load(blocks.experts + block, mask=block < limit, other=0)
        for step in range(sizes.steps):
            barrier = ring.full.index(stage)
            mbarrier.wait(ring.empty.index(stage), phase)
            mbarrier.expect(
                barrier, TEAMS * (w_desc.block_type.nbytes + s_desc.block_type.nbytes)
            )
            for team in gl.static_range(TEAMS):
                k = (step * TEAMS + team) * COLUMNS
                slot = stage * TEAMS + team
                tma_load(w_desc, [unit, k, 0], barrier, ring.words.index(slot))
                tma_load(s_desc, [unit, k * 16], barrier, ring.scales.index(slot))
            stage, phase = advance(stage, phase, STAGES)


@gluon.jit
def gather_rows(x, ring, blocks, sizes, tokens, limit, BLOCK: gl.constexpr,
                TOKENS: gl.constexpr, PART: gl.constexpr, STAGES: gl.constexpr):
    """Role of the gather warps: each block's rows of x, as each team's B = (token, slice) rows of
    128 columns.

    The copies of a step are announced LAG steps later, once they have landed and a fence has made
    them visible to the tensor cores; rows of padding and slots past the row are filled with zeros.
    The teams give a stage back after they have seen the next one, so LAG + 2 stages are in use.
    """
    gl.static_assert(STAGES >= 3)
    LAG: gl.constexpr = 3 if STAGES > 4 else STAGES - 2
    N: gl.constexpr = TOKENS * PART
    L: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [gl.num_warps(), 1], [1, 0])
    n = gl.arange(0, N, layout=gl.SliceLayout(1, L))
    column = gl.arange(0, 128, layout=gl.SliceLayout(0, L))
    k = (n % PART * 128)[:, None] + column[None, :]
    gdc_wait()
    packed = routes_of(blocks, gl.program_id(0) // sizes.row_tiles, n // PART, limit, BLOCK)
    tiles = tiles_of(blocks, sizes, BLOCK)
    stage = tiles * 0
    phase = stage + 1
    late = stage
    issued = stage
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        token = packed & SENTINEL_MASK
        live = token < tokens
        row = x.codes + token.to(gl.int64) * x.pitch
        ahead = tile + gl.num_programs(0)
        packed = routes_of(blocks, ahead // sizes.row_tiles, n // PART, limit, BLOCK)
        for step in range(sizes.steps):
            mbarrier.wait(ring.empty.index(stage), phase)
            for team in gl.static_range(TEAMS):
                at = (step * TEAMS + team) * (PART * 128) + k
                cp_async(ring.rows.index(stage * TEAMS + team), row[:, None] + at,
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
def multiply(team: gl.constexpr, ring, sums, blocks, sizes, BLOCK: gl.constexpr,
             TOKENS: gl.constexpr, PART: gl.constexpr, STAGES: gl.constexpr, WIDE: gl.constexpr):
    """Role of a team of matrix warps: its slices of K of every tile of this CTA, to `sums`.

    The words of the next stage, be it the next tile's, are read while a product is under way.
    """
    WARPS: gl.constexpr = gl.num_warps()
    zero = zeros(1, TOKENS * PART)
    A: gl.constexpr = gl.DotOperandLayout(0, zero.type.layout, 4)
    gdc_wait()
    tiles = tiles_of(blocks, sizes, BLOCK)
    stage = tiles * 0
    phase = tiles * 0
    done = tiles * 0
    mbarrier.wait(ring.full.index(stage), phase, pred=gl.program_id(0) < tiles)
    raw, scale = load_raw(ring.words.index(team), ring.scales.index(team), 1, WARPS)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        total = own_parity(zero, PART)
        for step in range(sizes.steps):
            lo, hi = decode(raw, scale, WIDE)
            ahead, ahead_phase = advance(stage, phase, STAGES)
            more = (step + 1 < sizes.steps) | (tile + gl.num_programs(0) < tiles)
            mbarrier.wait(ring.full.index(ahead), ahead_phase, pred=more)
            part = warpgroup_mma(
                fragment(lo, hi, A, 1, WARPS),
                ring.rows.index(stage * TEAMS + team).permute((1, 0)), zero,
                use_acc=False, is_async=True,
            )
            slot = ahead * TEAMS + team
            raw, scale = load_raw(ring.words.index(slot), ring.scales.index(slot), 1, WARPS)
            part = warpgroup_mma_wait(0, deps=[part])
            mbarrier.arrive(ring.empty.index(stage), count=1)
            total += own_parity(part, PART)
            stage = ahead
            phase = ahead_phase
        mbarrier.wait(sums.taken.index(done & 1), ((done >> 1) & 1) ^ 1)
        sums.buffer.index((done & 1) * TEAMS + team).store(own_slice(total, TOKENS, PART))
        mbarrier.arrive(sums.ready.index(done & 1), count=1)
        done += 1


@gluon.jit
def team_sum(sums, slot, unit, TOKENS: gl.constexpr, L: gl.constexpr):
    """What one slot of the buffer says of a row unit: the sum over its slices."""
    ROWS: gl.constexpr = sums.buffer.shape[1]
    PART: gl.constexpr = sums.buffer.shape[2]
    units = smem_cast(
        sums.buffer.index(slot), gl.float32, [ROWS, PART, 2, 8, TOKENS],
        gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0]),
    )
    return gl.sum(units.index(unit).load(L), axis=0)


@gluon.jit
def load_pair(ptr, expert, columns, column):
    """The values of a gate column and of its up column: ptr is (E, 2 I) float32."""
    row = ptr + expert * (2 * columns) + column
    ok = column < columns
    return gl.load(row, mask=ok, other=0.0), gl.load(row + columns, mask=ok, other=0.0)


@gluon.jit
def activate_tiles(sums, h_ptr, x_scales, x_memory, w, weight_ptr, blocks, sizes, act, tokens,
                   BLOCK: gl.constexpr, TOKENS: gl.constexpr, SLOTS: gl.constexpr,
                   KIND: gl.constexpr):
    """Role of the epilogue warps: sums over the slices -> scale, bias, activation -> h (float32).

    SLOTS of the buffer make a tile. x_memory: where the matrix warps have put the scale of the only
    token, 8 times; or None, and x_scales are loaded. A row unit at a time; what does not depend on
    the sums is fetched before they are waited for.
    """
    ROWS: gl.constexpr = sums.buffer.shape[1]
    L: gl.constexpr = gl.BlockedLayout(
        [1, 2, 1, 1], [1, 1, 8, 4], [1, 1, 1, gl.num_warps()], [2, 3, 1, 0]
    )
    LY: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, L))  # (8, TOKENS)
    m = gl.arange(0, 8, layout=gl.SliceLayout(1, LY))[:, None]
    n = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, LY))[None, :]
    I = sizes.intermediate  # noqa: E741
    gdc_wait()
    tiles = tiles_of(blocks, sizes, BLOCK)
    done = tiles * 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        block = tile // sizes.row_tiles
        expert = gl.load(blocks.experts + block).to(gl.int64)
        expert = gl.where((expert >= 0) & (expert < sizes.experts), expert, 0)
        packed = routes_of(blocks, block, n, block + 1, BLOCK)
        token = packed & SENTINEL_MASK
        column = tile % sizes.row_tiles * (ROWS * 8) + m
        gate_scale, up_scale = load_pair(w.scale, expert, I, column)
        if w.bias is not None:
            gate_bias, up_bias = load_pair(w.bias, expert, I, column)
        if x_memory is None:
            x_scale = gl.load(x_scales + token, mask=token < tokens, other=0.0)
        if weight_ptr is not None:
            weight = gl.load(weight_ptr + block * BLOCK + n, mask=n < BLOCK, other=0.0)
        row = h_ptr + (token * sizes.topk + (packed >> 24)).to(gl.int64) * I
        mbarrier.wait(sums.ready.index(done & 1), (done >> 1) & 1)
        if x_memory is not None:
            x_scale = x_memory.load(gl.SliceLayout(1, LY))[:, None]
        for u in range(ROWS):
            total = team_sum(sums, (done & 1) * SLOTS, u, TOKENS, L)
            for slot in gl.static_range(1, SLOTS):
                total += team_sum(sums, (done & 1) * SLOTS + slot, u, TOKENS, L)
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
    BLOCK: gl.constexpr, PART: gl.constexpr, STAGES: gl.constexpr, KIND: gl.constexpr,
    WIDE: gl.constexpr, TEAM_REGISTERS: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    ROWS: gl.constexpr = w_desc.block_type.shape[0]
    TOKENS: gl.constexpr = BLOCK if BLOCK * PART > 8 else 8 // PART  # columns of an expert's tile
    ring = Ring(
        gl.allocate_shared_memory(
            gl.int32, [STAGES * TEAMS] + w_desc.block_type.shape, w_desc.layout
        ),
        gl.allocate_shared_memory(
            gl.int32, [STAGES * TEAMS] + s_desc.block_type.shape, s_desc.layout
        ),
        gl.allocate_shared_memory(
            gl.float8e4nv, [STAGES * TEAMS, TOKENS * PART, 128], gl.NVMMASharedLayout(128, 8, 2)
        ),
        barriers(STAGES, 2),  # weights, rows of x
        barriers(STAGES, TEAMS),
    )
    buffer = gl.allocate_shared_memory(
        gl.float32, [2 * TEAMS, ROWS, PART, 2, 8, TOKENS],
        gl.SwizzledSharedLayout(1, 1, 1, [4, 3, 2, 1, 0]),
    )
    sums = Sums(buffer, barriers(2, TEAMS), barriers(2, 1))
    fence_async_shared()
    gl.warp_specialize(
        [
            (multiply, (0, ring, sums, blocks, sizes, BLOCK, TOKENS, PART, STAGES, WIDE)),
            (multiply, (1, ring, sums, blocks, sizes, BLOCK, TOKENS, PART, STAGES, WIDE)),
            (stream_weights, (w_desc, s_desc, ring, blocks, sizes, limit, BLOCK, STAGES)),
            (activate_tiles, (sums, h_ptr, x.scales, None, w, weight_ptr, blocks, sizes, act,
                              tokens, BLOCK, TOKENS, TEAMS, KIND)),
            (gather_rows, (x, ring, blocks, sizes, tokens, limit, BLOCK, TOKENS, PART, STAGES)),
        ],
        [4, 1, 1, 2],
        [TEAM_REGISTERS, REGISTERS, REGISTERS, REGISTERS],
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
        *stream.boxes(w13, stream.rows, tile.split_k // 2),
        Rows(x.codes, x.codes.stride(0), x.scales), out,
        Columns(w13.row_scale, weights.w13_bias),
        routed.sorted_weights if recipe.weight_on == 1 else None,
        Blocks(routed.sorted_token_ids, routed.sorted_expert_ids, routed.num_valid_ids),
        Sizes(x.codes.shape[1], p.intermediate, p.experts, p.topk, row_tiles,
              stream.steps(p.hidden)),
        Act(*activation_scalars(recipe.act)), p.tokens, limit,
        tile.tokens, tile.split_k // 2, tile.stages, KINDS[recipe.act.kind], stream.wide,
        TEAM_REGISTERS, TEAM_HELPERS, **stream.options,
    )
    return out
