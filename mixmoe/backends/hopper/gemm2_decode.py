"""Stage 2 for few rows per expert, by blocks: out = h Wd^T + bd, a row per route for combine.

A tile is 128 weight rows x all of K x one block of routes; a CTA takes a contiguous share of the
tiles, block by block, so that it meets few blocks. With K of a few hundred a tile lasts a
microsecond, so nothing that comes from memory may be waited for within it:

========================  =======================================================================
`multiply` (matrix warps)  the products of a tile, scaled, as rows of the output type in `out`
`stream` (producer warp)   weights, and with them the scales (and biases) of the tile's rows
`prepare` (2 warps)        the h of the NEXT block: loaded, quantised, in shared memory
`store` (1 warp)           a tile's live rows from `out` to memory
========================  =======================================================================

The other form is `launch_tokens`.
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

from mixmoe.backends.hopper.choose import rows_buffers
from mixmoe.backends.hopper.decode import (
    SENTINEL_MASK,
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
    hidden_of,
    load_groups,
    place_of,
    share,
)
from mixmoe.formats import Quantised
from mixmoe.spec import Recipe, Routed, Tile, Weights

__all__ = ["launch_rows", "launch_tokens"]

ROWS = 128  # weight rows of a tile
REGISTERS = 64  # a thread of the helper warps: `prepare` holds 32 values of h


class Prepared(NamedTuple):
    """h of a block as wgmma's B: codes (buffer, group of K, eight rows; 8, 128), their scales."""

    codes: Any
    scales: Any
    ready: Any
    free: Any


class Staged(NamedTuple):
    """Finished tiles (2, N, 128 columns) on their way to memory."""

    rows: Any
    ready: Any
    taken: Any


class Vectors(NamedTuple):
    """Ring of the scales and biases of the streamed rows, a stage each; bias may be None."""

    scale: Any
    bias: Any


@gluon.jit
def share_of_blocks(blocks, sizes, TOKENS: gl.constexpr):
    """This CTA's tiles [first, last)."""
    return share(gl.load(blocks.total) // TOKENS * sizes.row_tiles)


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
def encode(codes, values, scale, at, EIGHTS: gl.constexpr):
    """codes = rne(h / scale), saturated."""
    for i in gl.static_range(len(values)):
        divisor, value = gl.broadcast(scale.expand_dims(1), values[i])
        code = gl.minimum(gl.maximum(gl.div_rn(value, divisor), -448.0), 448.0)
        codes.index(at + i * EIGHTS).store(code.to(gl.float8e4nv))


@gluon.jit
def quantise_eight(codes, h, row, live, columns, at, GROUPS: gl.constexpr, EIGHTS: gl.constexpr,
                   L: gl.constexpr):
    """float32 rows -> e4m3: scale = max(amax / 448, 2^-126), fp8_token bit for bit.

    Two groups of 128 columns stay in registers; of a longer row each group is read twice, the
    second time near by.
    """
    KEPT: gl.constexpr = GROUPS if GROUPS <= 2 else 1
    values = load_groups(h, row, live, 0, columns, KEPT, 1, 1, L)
    amax = amax_of(values, 1, L)
    for group in range(KEPT, GROUPS):
        more = load_groups(h, row, live, group, columns, 1, 1, 1, L)
        amax = gl.maximum(amax, amax_of(more, 1, L))
    largest = gl.full([8], 448.0, gl.float32, gl.SliceLayout(1, L))
    scale = gl.maximum(gl.div_rn(amax, largest), TINY)
    encode(codes, values, scale, at, EIGHTS)
    for group in range(KEPT, GROUPS):
        more = load_groups(h, row, live, group, columns, 1, 1, 1, L)
        encode(codes, more, scale, at + group * EIGHTS, EIGHTS)
    return scale


@gluon.jit
def copy_eight(codes, h, row, live, columns, at, GROUPS: gl.constexpr, EIGHTS: gl.constexpr,
               L: gl.constexpr):
    """e4m3 rows, asynchronously, all of them under way at once."""
    for group in range(GROUPS):
        offset, inside = place_of(row, group, columns, 1, 1, L)
        cp_async(codes.index(at + group * EIGHTS), h.rows + offset, mask=inside & live[:, None])
    async_copy.commit_group()
    return gl.load(h.scales + row, mask=live, other=0.0)


@gluon.jit
def prepare(prepared, h, blocks, sizes, tokens, TOKENS: gl.constexpr, GROUPS: gl.constexpr,
            BUFFERS: gl.constexpr):
    """Role of two warps: each block's h, as soon as a buffer is free."""
    L: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [gl.num_warps(), 1], [1, 0])
    EIGHTS: gl.constexpr = prepared.scales.shape[0] // BUFFERS
    first, last = share_of_blocks(blocks, sizes, TOKENS)
    gdc_wait()
    gdc_launch_dependents()
    turn = first * 0
    blocks_end = (last + sizes.row_tiles - 1) // sizes.row_tiles
    for block in range(first // sizes.row_tiles, blocks_end):
        slot = turn % BUFFERS
        mbarrier.wait(prepared.free.index(slot), ((turn // BUFFERS) & 1) ^ 1)
        for part in range(EIGHTS):
            row, live = routes_of(
                blocks, sizes, block, part, tokens, TOKENS, gl.SliceLayout(1, L)
            )
            at = slot * (GROUPS * EIGHTS) + part
            fill: gl.constexpr = quantise_eight if h.scales is None else copy_eight
            scale = fill(
                prepared.codes, h, row, live, sizes.intermediate, at, GROUPS, EIGHTS, L
            )
            prepared.scales.index(slot * EIGHTS + part).store(scale)
        async_copy.wait_group(0)
        fence_async_shared()
        cta_barrier()  # of the role: every warp's fence before one thread's arrival
        mbarrier.arrive(prepared.ready.index(slot), count=1)
        turn += 1


@gluon.jit
def stream(w_desc, s_desc, r_desc, b_desc, ring, vectors, blocks, sizes, TOKENS: gl.constexpr,
           STAGES: gl.constexpr):
    """Role of the producer warp. It does not wait for stage 1: routing ended before that began."""
    UNITS: gl.constexpr = w_desc.block_type.shape[0]
    COLUMNS: gl.constexpr = w_desc.block_type.shape[1]
    VECTORS: gl.constexpr = r_desc.block_type.nbytes * (1 if b_desc is None else 2)
    first, last = share_of_blocks(blocks, sizes, TOKENS)
    stage = first * 0
    phase = first * 0 + 1
    expert = gl.load(blocks.experts + first // sizes.row_tiles, mask=first < last, other=0)
    for tile in range(first, last):
        row_tile = tile % sizes.row_tiles
        unit = expert * sizes.units + row_tile * UNITS
        mine = expert
        ahead = (tile + 1) // sizes.row_tiles
        expert = gl.load(blocks.experts + ahead, mask=tile + 1 < last, other=0)
        for step in range(sizes.steps):
            barrier = ring.full.index(stage)
            mbarrier.wait(ring.empty.index(stage), phase)
            mbarrier.expect(
                barrier, w_desc.block_type.nbytes + s_desc.block_type.nbytes + VECTORS
            )
            tma_load(w_desc, [unit, step * COLUMNS, 0], barrier, ring.words.index(stage))
            tma_load(s_desc, [unit, step * (COLUMNS * 8)], barrier, ring.scales.index(stage))
            tma_load(r_desc, [mine, row_tile * (UNITS * 16)], barrier, vectors.scale.index(stage))
            if b_desc is not None:
                tma_load(
                    b_desc, [mine, row_tile * (UNITS * 16)], barrier, vectors.bias.index(stage)
                )
            stage, phase = advance(stage, phase, STAGES)


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
def operand(prepared, group, N: gl.constexpr):
    """A group of 128 columns of all N rows as wgmma's B (128, N)."""
    rows = smem_cast(
        prepared.codes.index(group * (N // 8)), gl.float8e4nv, [N, 128],
        gl.NVMMASharedLayout(128, 8, 2),
    )
    return rows.permute((1, 0))


@gluon.jit
def multiply(ring, vectors, prepared, staged, blocks, sizes, TOKENS: gl.constexpr,
             N: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr,
             BUFFERS: gl.constexpr, WIDE: gl.constexpr):
    """Role of the matrix warps. The words of the next stage, be it the next tile's, are read while
    a product is under way; every 128 of K is added in float32."""
    WARPS: gl.constexpr = gl.num_warps()
    zero = zeros(1, N)
    L: gl.constexpr = zero.type.layout
    A: gl.constexpr = gl.DotOperandLayout(0, L, 4)
    first, last = share_of_blocks(blocks, sizes, TOKENS)
    stage = first * 0
    phase = first * 0
    done = first * 0
    turn = first * 0  # blocks met
    slot = first * 0
    origin = first // sizes.row_tiles
    until = first  # the tile at which the next block begins
    mbarrier.wait(ring.full.index(stage), phase, pred=first < last)
    raw, byte, scale, bias = take(ring, vectors, stage, CHUNKS, L)
    for tile in range(first, last):
        if tile == until:
            mbarrier.arrive(prepared.free.index(slot), count=1, pred=turn > 0)
            slot = turn % BUFFERS
            mbarrier.wait(prepared.ready.index(slot), (turn // BUFFERS) & 1)
            turn += 1
            until = (origin + turn) * sizes.row_tiles
        total = zero
        row_scale = scale
        row_bias = bias
        for step in range(sizes.steps):
            row_scale = scale
            row_bias = bias
            lo, hi = decode(raw, byte, WIDE)
            ahead, ahead_phase = advance(stage, phase, STAGES)
            more = (step + 1 < sizes.steps) | (tile + 1 < last)
            mbarrier.wait(ring.full.index(ahead), ahead_phase, pred=more)
            group = slot * GROUPS + step * CHUNKS
            part = warpgroup_mma(
                fragment(chunk_of(lo, 0), chunk_of(hi, 0), A, 1, WARPS),
                operand(prepared, group, N), zero, use_acc=False, is_async=True,
            )
            if CHUNKS == 2:
                second = warpgroup_mma(
                    fragment(chunk_of(lo, 1), chunk_of(hi, 1), A, 1, WARPS),
                    operand(prepared, group + 1, N), zero, use_acc=False,
                    is_async=True,
                )
                raw, byte, scale, bias = take(ring, vectors, ahead, CHUNKS, L)
                part, second = warpgroup_mma_wait(0, deps=[part, second])
                part += second
            else:
                raw, byte, scale, bias = take(ring, vectors, ahead, CHUNKS, L)
                part = warpgroup_mma_wait(0, deps=[part])
            mbarrier.arrive(ring.empty.index(stage), count=1)
            total += part
            stage = ahead
            phase = ahead_phase
        value = total * row_scale[:, None]
        h_scale = smem_cast(
            prepared.scales.index(slot * (N // 8)), gl.float32, [N],
            gl.SwizzledSharedLayout(1, 1, 1, [0]),
        )
        value *= h_scale.load(gl.SliceLayout(0, L))[None, :]
        if vectors.bias is not None:
            value += row_bias[:, None]
        mbarrier.wait(staged.taken.index(done & 1), ((done >> 1) & 1) ^ 1)
        rows = staged.rows.index(done & 1)
        rows.permute((1, 0)).store(value.to(rows.dtype))
        mbarrier.arrive(staged.ready.index(done & 1), count=1)
        done += 1


@gluon.jit
def store(staged, out_ptr, blocks, sizes, tokens, TOKENS: gl.constexpr):
    """Role of a warp: the live rows of each tile, 8 at a time, 128 columns each."""
    PARTS: gl.constexpr = staged.rows.shape[1] // 8
    L: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [gl.num_warps(), 1], [1, 0])
    c = gl.arange(0, staged.rows.shape[2], layout=gl.SliceLayout(0, L))
    first, last = share_of_blocks(blocks, sizes, TOKENS)
    gdc_wait()
    done = first * 0
    for tile in range(first, last):
        block = tile // sizes.row_tiles
        column = tile % sizes.row_tiles * staged.rows.shape[2] + c
        row, live = routes_of(blocks, sizes, block, 0, tokens, TOKENS, gl.SliceLayout(1, L))
        mbarrier.wait(staged.ready.index(done & 1), (done >> 1) & 1)
        rows = staged.rows.index(done & 1)
        for part in gl.static_range(PARTS):
            some = rows
            if PARTS > 1:
                some = rows.slice(part * 8, 8, dim=0)
            gl.store(
                out_ptr + (row * sizes.hidden)[:, None] + column[None, :], some.load(L),
                mask=live[:, None] & (column < sizes.hidden)[None, :],
            )
            if part + 1 < PARTS:
                row, live = routes_of(
                    blocks, sizes, block, part + 1, tokens, TOKENS, gl.SliceLayout(1, L)
                )
        mbarrier.arrive(staged.taken.index(done & 1), count=1)
        done += 1


@gluon.jit(do_not_specialize=["tokens"])
def gemm2_rows(
    w_desc, s_desc, r_desc, b_desc, h, out_ptr, blocks, sizes, tokens,
    TOKENS: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr,
    BUFFERS: gl.constexpr, WIDE: gl.constexpr, REGISTERS: gl.constexpr,
):
    N: gl.constexpr = TOKENS if TOKENS > 8 else 8
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    ring = Ring(
        gl.allocate_shared_memory(gl.int32, [STAGES] + w_desc.block_type.shape, w_desc.layout),
        gl.allocate_shared_memory(gl.int32, [STAGES] + s_desc.block_type.shape, s_desc.layout),
        None, barriers(STAGES, 1), barriers(STAGES, 1),
    )
    bias = None
    if b_desc is not None:
        bias = gl.allocate_shared_memory(
            gl.float32, [STAGES] + b_desc.block_type.shape, b_desc.layout
        )
    vectors = Vectors(
        gl.allocate_shared_memory(
            gl.float32, [STAGES] + r_desc.block_type.shape, r_desc.layout
        ),
        bias,
    )
    prepared = Prepared(
        gl.allocate_shared_memory(
            gl.float8e4nv, [BUFFERS * GROUPS * N // 8, 8, 128], gl.NVMMASharedLayout(128, 8, 2)
        ),
        gl.allocate_shared_memory(
            gl.float32, [BUFFERS * N // 8, 8], gl.SwizzledSharedLayout(1, 1, 1, [0])
        ),
        barriers(BUFFERS, 1), barriers(BUFFERS, 1),
    )
    staged = Staged(
        gl.allocate_shared_memory(
            dtype, [2, N, r_desc.block_type.shape[1]],
            gl.NVMMASharedLayout(128, dtype.primitive_bitwidth, 2),
        ),
        barriers(2, 1), barriers(2, 1),
    )
    fence_async_shared()
    gl.warp_specialize(
        [
            (multiply, (ring, vectors, prepared, staged, blocks, sizes, TOKENS, N, CHUNKS,
                        STAGES, GROUPS, BUFFERS, WIDE)),
            (stream, (w_desc, s_desc, r_desc, b_desc, ring, vectors, blocks, sizes, TOKENS,
                      STAGES)),
            (store, (staged, out_ptr, blocks, sizes, tokens, TOKENS)),
            (prepare, (prepared, h, blocks, sizes, tokens, TOKENS, GROUPS, BUFFERS)),
        ],
        [1, 1, 2],
        [REGISTERS, REGISTERS, REGISTERS],
    )


def row_box(vectors: Tensor) -> TensorDescriptor:
    """TMA boxes of a tile's part of an expert's row of (E, H) float32."""
    return TensorDescriptor.from_tensor(vectors, [1, ROWS], gl.NVMMASharedLayout(0, 32, 2))


def launch_rows(
    h: Tensor | Quantised, weights: Weights, routed: Routed, recipe: Recipe, tile: Tile, out: Tensor
) -> Tensor:
    """Run stage 2 by blocks: out (T * topk, H), a row per route without its routing weight.

    h: (T * topk, I) float32 or e4m3 with a scale per row, a row per route; weights.w2 in the order
    hopper_fp4_w1 (or _wide); routed.block == tile.tokens. Rows of skipped routes are not written.
    The kernel before must be one that starts its dependents after it has waited (gemm1_decode).
    """
    p, w2 = routed.problem, fragments(weights.w2)
    cut = Stream.of(tile, w2)
    row_tiles = -(-p.hidden // ROWS)
    limit = routed.sorted_expert_ids.shape[0] * row_tiles
    if not limit or not p.tokens:
        return out
    steps = cut.steps(p.intermediate)
    buffers = rows_buffers(tile, p.intermediate, out.element_size())
    bias = None if weights.w2_bias is None else row_box(weights.w2_bias)
    gemm2_rows[(cut.grid(limit),)](
        *cut.boxes(w2, cut.rows, tile.split_k), row_box(w2.row_scale), bias,
        hidden_of(h), out,
        Blocks(routed.sorted_token_ids, routed.sorted_expert_ids, routed.num_valid_ids),
        Sizes(p.hidden, p.intermediate, p.experts, p.topk, -(-p.hidden // 16), row_tiles, steps),
        p.tokens, tile.tokens, cut.chunks, tile.stages, steps * cut.chunks, buffers, cut.wide,
        REGISTERS, **cut.options,
    )
    return out
