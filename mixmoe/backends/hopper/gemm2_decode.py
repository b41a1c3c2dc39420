"""Stage 2 for few rows per expert, by blocks: out = h Wd^T + bd, a row per route for combine.

A tile is 64 weight rows x all of K x one block of routes; a CTA takes a contiguous share of the
tiles, block by block, so that it meets few blocks. With K of a few hundred a tile lasts half a
microsecond, so nothing that comes from memory may be waited for within it:

========================  =======================================================================
`multiply` (2 teams of 4)  every second tile: products, scales, bias, the rows to memory
`stream` (producer warp)   weights, and with them the scales (and biases) of the tile's rows
`prepare` (2 warps)        the h of the NEXT block: loaded, quantised, in shared memory
========================  =======================================================================

Two teams and two CTAs make four tiles an SM whose latencies (LDS, decoding, wgmma, barriers) hide
behind each other: with one team of eight warps a tile of 128 rows took 2200 clocks where its
instructions take 1120 (H100, 2026-11-28). Few tokens gained by it, 64 tokens did not
(docs/measured-decode.md). The other form is `launch_tokens`.
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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mixmoe.backends.hopper.decode import (
    SENTINEL_MASK,
    TEAM_HELPERS,
    TEAM_REGISTERS,
    TEAMS,
    Blocks,
    Ring,
    Stream,
    barriers,
    fragments,
    zeros,
)
from mixmoe.backends.hopper.gemm2_tokens import launch_tokens
from mixmoe.backends.hopper.mainloop import (
    advance,
    chunk_of,
    cp_async,
    cta_barrier,
    decode,
    fragment,
    load_chunks,
    smem_cast,
    tma_load,
)
from mixmoe.backends.hopper.resident import (
    TINY,
    Sizes,
    amax_of,
    encode,
    hidden_of,
    load_groups,
    place_of,
)
from mixmoe.backends.hopper.slots import SlotRows
from mixmoe.spec import Recipe, Routed, Tile, Weights

__all__ = ["launch_rows", "launch_tokens"]

ROWS = 64  # weight rows of a tile: a warpgroup's
BUFFERS = gl.constexpr(2)  # blocks of h in shared memory: the next one waits


class Prepared(NamedTuple):
    """h of a block as wgmma's B: codes (BUFFERS * GROUPS, N, 128), scales (BUFFERS, N)."""

    codes: Any
    scales: Any
    ready: Any
    free: Any


class Vectors(NamedTuple):
    """Ring of the scales and biases of the streamed rows, a stage each; bias may be None."""

    scale: Any
    bias: Any


class Operands(NamedTuple):
    """What a team needs beside the ring: `Vectors`, `Prepared`, the result (T * topk, H)."""

    vectors: Any
    prepared: Any
    out: Any


@gluon.jit
def vector_ring(desc, STAGES: gl.constexpr):
    """Shared memory for a ring of these boxes of float32."""
    return gl.allocate_shared_memory(gl.float32, [STAGES] + desc.block_type.shape, desc.layout)


@gluon.jit
def share_of_blocks(blocks, sizes, TOKENS: gl.constexpr):
    """This CTA's contiguous part [first, last) of all tiles."""
    total = gl.load(blocks.total) // TOKENS * sizes.row_tiles
    grid = gl.num_programs(0)
    first = gl.program_id(0).to(gl.int64) * total // grid
    last = (gl.program_id(0) + 1).to(gl.int64) * total // grid
    return first.to(gl.int32), last.to(gl.int32)


@gluon.jit
def routes_of(blocks, sizes, block, part, tokens, TOKENS: gl.constexpr, L: gl.constexpr):
    """Rows of h of the part-th eight routes of a block, and which are live."""
    n = part * 8 + gl.arange(0, 8, layout=L)
    packed = gl.load(
        blocks.ids + block * TOKENS + n, mask=n < TOKENS, other=SENTINEL_MASK
    )
    token = packed & SENTINEL_MASK
    live = token < tokens
    return gl.where(live, token.to(gl.int64) * sizes.topk + (packed >> 24), 0), live


@gluon.jit
def eight(codes, group, part):
    """The part-th eight rows of a group of `Prepared.codes`."""
    N: gl.constexpr = codes.shape[1]
    rows = smem_cast(
        codes.index(group), gl.float8e4nv, [N // 8, 8, 128], gl.NVMMASharedLayout(128, 8, 2)
    )
    return rows.index(part)


@gluon.jit
def store_eight(codes, values, scale, group, part):
    """The codes of eight rows, a group of 128 columns after the other."""
    for i in gl.static_range(len(values)):
        eight(codes, group + i, part).store(encode(values[i], scale))


@gluon.jit
def quantise_eight(codes, h, row, live, columns, base, part, GROUPS: gl.constexpr,
                   L: gl.constexpr):
    """float32 rows -> e4m3: scale = max(amax / 448, 2^-126), fp8_token bit for bit.

    A row stays in registers: two groups of 128 columns at most.
    """
    gl.static_assert(GROUPS <= 2)
    values = load_groups(h, row, live, 0, columns, GROUPS, 1, 1, L)
    largest = gl.full([8], 448.0, gl.float32, gl.SliceLayout(1, L))
    scale = gl.maximum(gl.div_rn(amax_of(values, 1, L), largest), TINY)
    store_eight(codes, values, scale, base, part)
    return scale


@gluon.jit
def copy_eight(codes, h, row, live, columns, base, part, GROUPS: gl.constexpr,
               L: gl.constexpr):
    """Rows of e4m3 slots, asynchronously, all of them under way at once."""
    wide = (columns + 127) // 128 * 128
    slot = gl.arange(0, 128, layout=gl.SliceLayout(0, L))
    for group in range(GROUPS):
        offset, inside = place_of(row, group, wide, slot, 1, 1, L)
        cp_async(eight(codes, base + group, part), h.rows + offset, mask=inside & live[:, None])
    async_copy.commit_group()
    return gl.load(h.scales + row, mask=live, other=0.0)


@gluon.jit
def prepare(prepared, h, blocks, sizes, tokens, TOKENS: gl.constexpr, GROUPS: gl.constexpr,
            EARLY: gl.constexpr):
    """Role of two warps: each block's h, as soon as a buffer is free."""
    L: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [gl.num_warps(), 1], [1, 0])
    N: gl.constexpr = prepared.scales.shape[1]
    if not EARLY:
        gdc_wait()
    first, last = share_of_blocks(blocks, sizes, TOKENS)
    gdc_wait()
    gdc_launch_dependents()
    turn = first * 0
    blocks_end = (last + sizes.row_tiles - 1) // sizes.row_tiles
    for block in range(first // sizes.row_tiles, blocks_end):
        slot = turn % BUFFERS
        mbarrier.wait(prepared.free.index(slot), ((turn // BUFFERS) & 1) ^ 1)
        for part in range(N // 8):
            row, live = routes_of(
                blocks, sizes, block, part, tokens, TOKENS, gl.SliceLayout(1, L)
            )
            fill: gl.constexpr = quantise_eight if h.scales is None else copy_eight
            scale = fill(
                prepared.codes, h, row, live, sizes.intermediate, slot * GROUPS, part, GROUPS, L
            )
            scales = smem_cast(
                prepared.scales.index(slot), gl.float32, [N // 8, 8],
                gl.SwizzledSharedLayout(1, 1, 1, [0]),
            )
            scales.index(part).store(scale)
        async_copy.wait_group(0)
        fence_async_shared()
        cta_barrier()  # of the role: every warp's fence before one thread's arrival
        mbarrier.arrive(prepared.ready.index(slot), count=1)
        turn += 1


@gluon.jit
def stream(w_desc, s_desc, r_desc, b_desc, ring, vectors, blocks, sizes, TOKENS: gl.constexpr,
           STAGES: gl.constexpr, EARLY: gl.constexpr):
    """Role of the producer warp. EARLY: it does not wait for stage 1, as routing ended before."""
    if not EARLY:
        gdc_wait()
    UNITS: gl.constexpr = w_desc.block_type.shape[0]
    COLUMNS: gl.constexpr = w_desc.block_type.shape[1]
    VECTORS: gl.constexpr = r_desc.block_type.nbytes * (1 if b_desc is None else 2)
    first, last = share_of_blocks(blocks, sizes, TOKENS)
    stage = first * 0
    phase = first * 0 + 1
    block = first // sizes.row_tiles
    row_tile = first - block * sizes.row_tiles
    expert = gl.load(blocks.experts + block, mask=first < last, other=0)
    more = (block + 1) * sizes.row_tiles < last
    after = gl.load(blocks.experts + block + 1, mask=more, other=0)
    for tile in range(first, last):
        if row_tile == sizes.row_tiles:
            row_tile = 0
            block += 1
            expert = after
            after = gl.load(
                blocks.experts + block + 1, mask=tile + sizes.row_tiles < last, other=0
            )
        unit = expert * sizes.units + row_tile * UNITS
        for step in range(sizes.steps):
            barrier = ring.full.index(stage)
            mbarrier.wait(ring.empty.index(stage), phase)
            mbarrier.expect(
                barrier, w_desc.block_type.nbytes + s_desc.block_type.nbytes + VECTORS
            )
            tma_load(w_desc, [unit, step * COLUMNS, 0], barrier, ring.words.index(stage))
            tma_load(s_desc, [unit, step * (COLUMNS * 16)], barrier, ring.scales.index(stage))
            column = row_tile * (UNITS * 16)
            tma_load(r_desc, [expert, column], barrier, vectors.scale.index(stage))
            if b_desc is not None:
                tma_load(b_desc, [expert, column], barrier, vectors.bias.index(stage))
            stage, phase = advance(stage, phase, STAGES)
        row_tile += 1


@gluon.jit
def vector(memory, stage, L: gl.constexpr):
    """A stage of `Vectors` in the rows' layout of the sums."""
    flat = smem_cast(
        memory.index(stage), gl.float32, [memory.shape[2]], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    return flat.load(gl.SliceLayout(1, L))


@gluon.jit
def take(ring, vectors, stage, CHUNKS: gl.constexpr, L: gl.constexpr):
    """A stage's row scales (and biases), then its words and scales: the vectors' loads are done
    when the words are used, so that the product of the words may give the stage back."""
    scale = vector(vectors.scale, stage, L)
    bias = scale
    if vectors.bias is not None:
        bias = vector(vectors.bias, stage, L)
    raw, byte = load_chunks(
        ring.words.index(stage), ring.scales.index(stage), CHUNKS, gl.num_warps()
    )
    return raw, byte, scale, bias


@gluon.jit
def meet(prepared, turn, L: gl.constexpr):
    """Give the h of the block before back and wait for the turn-th block's; its buffer, scales."""
    slot = turn % BUFFERS
    mbarrier.arrive(prepared.free.index((turn + BUFFERS - 1) % BUFFERS), count=1, pred=turn > 0)
    mbarrier.wait(prepared.ready.index(slot), (turn // BUFFERS) & 1)
    return slot, prepared.scales.index(slot).load(L)


@gluon.jit
def rows_of(blocks, sizes, block, tokens, N: gl.constexpr, TOKENS: gl.constexpr, L: gl.constexpr):
    """Rows of the result of a block's N routes, -1 where there is none."""
    n = gl.arange(0, N, layout=L)
    packed = gl.load(blocks.ids + block * TOKENS + n, mask=n < TOKENS, other=SENTINEL_MASK)
    token = packed & SENTINEL_MASK
    return gl.where(token < tokens, token * sizes.topk + (packed >> 24), -1)


@gluon.jit
def store(value, out_ptr, row, column, columns, O: gl.constexpr):
    """value (64 columns, N) -> out[row[n], column ..]. The conversion stays within warps; a lane
    stores four columns, a warp whole sectors of 32 bytes of eight rows (16-bit values)."""
    value = gl.convert_layout(value.to(out_ptr.dtype.element_ty), O)
    m = column + gl.arange(0, value.shape[0], layout=gl.SliceLayout(1, O))
    at = (row.to(gl.int64) * columns)[None, :] + m[:, None]
    gl.store(out_ptr + at, value, mask=(row >= 0)[None, :] & (m < columns)[:, None])


@gluon.jit
def multiply(team: gl.constexpr, ring, operands, blocks, sizes, tokens, TOKENS: gl.constexpr,
             CHUNKS: gl.constexpr, STAGES: gl.constexpr, WIDE: gl.constexpr,
             EARLY: gl.constexpr):
    """Role of a team: every TEAMS-th tile. The words of its next stage are read while a product is
    under way; every 128 or 256 of K are added in float32."""
    vectors, prepared, out_ptr = operands
    WARPS: gl.constexpr = gl.num_warps()
    N: gl.constexpr = prepared.codes.shape[1]
    GROUPS: gl.constexpr = prepared.codes.shape[0] // BUFFERS
    zero = zeros(1, N)
    L: gl.constexpr = zero.type.layout
    A: gl.constexpr = gl.DotOperandLayout(0, L, 4)
    O: gl.constexpr = gl.BlockedLayout([4, 1], [4, 8], [WARPS, 1], [0, 1])
    if not EARLY:
        gdc_wait()
    first, last = share_of_blocks(blocks, sizes, TOKENS)
    gdc_wait()  # the rows may still be read by what ran before
    origin = first // sizes.row_tiles
    met = (last + sizes.row_tiles - 1) // sizes.row_tiles - origin  # blocks of this CTA
    turn = first * 0
    slot = first * 0
    until = first  # the tile at which the next block begins
    row = rows_of(blocks, sizes, origin, tokens, N, TOKENS, gl.SliceLayout(0, O))
    h_scale = gl.full([N], 0.0, gl.float32, gl.SliceLayout(0, L))
    at = first * 0 + team * sizes.steps  # stages before this team's next one
    mbarrier.wait(ring.full.index(at % STAGES), (at // STAGES) & 1, pred=first + team < last)
    raw, byte, scale, bias = take(ring, vectors, at % STAGES, CHUNKS, L)
    for tile in range(first + team, last, TEAMS):
        while tile >= until:
            slot, h_scale = meet(prepared, turn, gl.SliceLayout(0, L))
            row = rows_of(
                blocks, sizes, origin + turn, tokens, N, TOKENS, gl.SliceLayout(0, O)
            )
            turn += 1
            until = (origin + turn) * sizes.row_tiles
        total = zero
        row_scale = scale
        row_bias = bias
        for step in range(sizes.steps):
            row_scale = scale
            row_bias = bias
            lo, hi = decode(raw, byte, WIDE)
            stage = at % STAGES
            at += gl.where(step + 1 < sizes.steps, 1, 1 + (TEAMS - 1) * sizes.steps)
            more = (step + 1 < sizes.steps) | (tile + TEAMS < last)
            mbarrier.wait(ring.full.index(at % STAGES), (at // STAGES) & 1, pred=more)
            group = slot * GROUPS + step * CHUNKS
            part = warpgroup_mma(
                fragment(chunk_of(lo, 0), chunk_of(hi, 0), A, 1, WARPS),
                prepared.codes.index(group).permute((1, 0)), zero, use_acc=False, is_async=True,
            )
            if CHUNKS == 2:
                part = warpgroup_mma(
                    fragment(chunk_of(lo, 1), chunk_of(hi, 1), A, 1, WARPS),
                    prepared.codes.index(group + 1).permute((1, 0)), part, is_async=True,
                )
            raw, byte, scale, bias = take(ring, vectors, at % STAGES, CHUNKS, L)
            part = warpgroup_mma_wait(0, deps=[part])
            mbarrier.arrive(ring.empty.index(stage), count=1)
            total = part if GROUPS == CHUNKS else total + part
        value = total * row_scale[:, None] * h_scale[None, :]
        if vectors.bias is not None:
            value += row_bias[:, None]
        column = (tile - (until - sizes.row_tiles)) * (WARPS * 16)
        store(value, out_ptr, row, column, sizes.hidden, O)
    for later in range(turn, met):
        meet(prepared, later, gl.SliceLayout(0, L))


@gluon.jit(do_not_specialize=["tokens"])
def gemm2_rows(
    w_desc, s_desc, r_desc, b_desc, h, out_ptr, blocks, sizes, tokens,
    TOKENS: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr,
    WIDE: gl.constexpr, EARLY: gl.constexpr,
    TEAM_REGISTERS: gl.constexpr, REGISTERS: gl.constexpr,
):
    N: gl.constexpr = TOKENS if TOKENS > 8 else 8
    ring = Ring(
        gl.allocate_shared_memory(gl.int32, [STAGES] + w_desc.block_type.shape, w_desc.layout),
        gl.allocate_shared_memory(gl.int32, [STAGES] + s_desc.block_type.shape, s_desc.layout),
        None, barriers(STAGES, 1), barriers(STAGES, 1),
    )
    bias = None
    if b_desc is not None:
        bias = vector_ring(b_desc, STAGES)
    vectors = Vectors(vector_ring(r_desc, STAGES), bias)
    prepared = Prepared(
        gl.allocate_shared_memory(
            gl.float8e4nv, [BUFFERS * GROUPS, N, 128], gl.NVMMASharedLayout(128, 8, 2)
        ),
        gl.allocate_shared_memory(
            gl.float32, [BUFFERS, N], gl.SwizzledSharedLayout(1, 1, 1, [0])
        ),
        barriers(BUFFERS, 1), barriers(BUFFERS, TEAMS),
    )
    operands = Operands(vectors, prepared, out_ptr)
    fence_async_shared()
    gl.warp_specialize(
        [
            (multiply, (0, ring, operands, blocks, sizes, tokens, TOKENS, CHUNKS, STAGES, WIDE,
                        EARLY)),
            (multiply, (1, ring, operands, blocks, sizes, tokens, TOKENS, CHUNKS, STAGES, WIDE,
                        EARLY)),
            (stream, (w_desc, s_desc, r_desc, b_desc, ring, vectors, blocks, sizes, TOKENS,
                      STAGES, EARLY)),
            (prepare, (prepared, h, blocks, sizes, tokens, TOKENS, GROUPS, EARLY)),
        ],
        [4, 1, 2],
        [TEAM_REGISTERS, REGISTERS, REGISTERS],
    )


def row_box(vectors: Tensor) -> TensorDescriptor:
    """TMA boxes of a tile's part of an expert's row of (E, H) float32."""
    return TensorDescriptor.from_tensor(vectors, [1, ROWS], gl.NVMMASharedLayout(0, 32, 2))


def launch_rows(
    h: Tensor | SlotRows, weights: Weights, routed: Routed, recipe: Recipe, tile: Tile,
    out: Tensor, early: bool = False,
) -> Tensor:
    """Run stage 2 by blocks: out (T * topk, H), a row per route without its routing weight.

    h: (T * topk, I) e4m3 slots, or float32 where I <= 256, a row per route; weights.w2 in the order
    hopper_fp4q_w1 (or _wide); routed.block == tile.tokens. Rows of skipped routes are not written.
    early: the lists of `routed` are complete when the kernel before this one starts its dependents
    (gemm1_decode does so after it has waited for them), so weights may be streamed at once.
    """
    p, w2 = routed.problem, fragments(weights.w2)
    cut = Stream.of(tile, w2)
    row_tiles = -(-p.hidden // ROWS)
    limit = routed.sorted_expert_ids.shape[0] * row_tiles
    if not limit or not p.tokens:
        return out
    steps = cut.steps(p.intermediate)
    bias = None if weights.w2_bias is None else row_box(weights.w2_bias)
    gemm2_rows[(cut.grid(limit),)](
        *cut.boxes(w2, cut.rows, tile.split_k),
        row_box(w2.row_scale), bias,  # type: ignore[arg-type]
        hidden_of(h), out,
        Blocks(routed.sorted_token_ids, routed.sorted_expert_ids, routed.num_valid_ids),
        Sizes(p.hidden, p.intermediate, p.experts, p.topk, -(-p.hidden // 16), row_tiles, steps),
        p.tokens, tile.tokens, cut.chunks, tile.stages, steps * cut.chunks, cut.wide, early,
        TEAM_REGISTERS, TEAM_HELPERS, **cut.options,
    )
    return out
