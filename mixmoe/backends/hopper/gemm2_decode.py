"""Stage 2 for few rows per expert: out = h Wd^T + bd, a stream of weight bytes; two forms.

`gemm2_rows`: a tile is weight rows x one block of routes, the result a row per route, which combine
adds up. `gemm2_tokens`: a tile is 16 weight rows x ALL experts of one token, an expert (or half or
quarter of one) to a warp, and the epilogue adds the experts in fixed order, so the result is y itself.
An expert that two tokens share is then streamed twice, the second time out of L2.

h arrives as float32 and is quantised here, once for each block or token that a CTA works on (its share
of the tiles is contiguous), into shared memory that stays. So nothing but h ties this kernel to the
one before: under programmatic dependent launch the weight ring fills while stage 1 still runs.
"""

from torch import Tensor
from triton import constexpr_function
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mixmoe.backends.hopper.decode import SENTINEL_MASK, Stream, own_parity, own_slice
from mixmoe.backends.hopper.mainloop import (
    advance,
    chunk_of,
    fragment,
    load_chunks,
    tma_load,
)
from mixmoe.spec import Problem, Routed, Tile, Weights

TINY = gl.constexpr(2.0**-126)  # the least scale of a row, as in mixmoe.formats
HELPER_REGISTERS = 48  # producer and epilogue warps


@constexpr_function
def resident_layout(rows, warps):
    """Registers of (rows, 128) values of h: up to 16 consecutive ones a thread."""
    run = min(16, max(4, rows * 4 // warps))
    return gl.BlockedLayout([1, run], [run // 4, 128 // run], [warps, 1], [1, 0])


@constexpr_function
def token_layout(layout):
    """Layout of a vector along the last of five dimensions."""
    for _ in range(4):
        layout = gl.SliceLayout(0, layout)
    return layout


@gluon.jit
def zeros(N: gl.constexpr):
    """A zero accumulator (WARPS * 16, N)."""
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[gl.num_warps(), 1], instr_shape=[16, N, 32]
    )
    return gl.zeros([gl.num_warps() * 16, N], gl.float32, mma)


@gluon.jit
def share(total):
    """The contiguous part [first, last) of `total` tiles that this CTA takes."""
    grid = gl.num_programs(0)
    first = gl.program_id(0).to(gl.int64) * total // grid
    last = (gl.program_id(0) + 1).to(gl.int64) * total // grid
    return first.to(gl.int32), last.to(gl.int32)


@gluon.jit
def expert_of(ids_ptr, map_ptr, route, live, E):
    """Local expert of a route, -1 where the route is skipped or not live."""
    expert = gl.load(ids_ptr + route, mask=live, other=-1).to(gl.int32)
    if map_ptr is not None:
        known = expert >= 0
        expert = gl.load(map_ptr + expert, mask=live & known, other=-1).to(gl.int32)
    return gl.where((expert >= 0) & (expert < E), expert, -1)


@gluon.jit
def load_group(h_ptr, row, live, group, I, SPAN: gl.constexpr, CHUNKS: gl.constexpr, L: gl.constexpr):  # noqa: E741, E501
    """Group `group` of h as wgmma's B: (N, 128) float32, row n = chunk n mod SPAN of route n // SPAN.

    A step holds SPAN * CHUNKS consecutive chunks, CHUNKS of them to a slice.
    """
    piece = gl.arange(0, row.shape[0], layout=gl.SliceLayout(1, L)) % SPAN
    chunk = group // CHUNKS * (SPAN * CHUNKS) + piece * CHUNKS + group % CHUNKS
    k = chunk[:, None] * 128 + gl.arange(0, 128, layout=gl.SliceLayout(0, L))[None, :]
    return gl.load(h_ptr + row[:, None] * I + k, mask=live[:, None] & (k < I), other=0.0)


@gluon.jit
def quantise_rows(hs, h_ptr, row, live, I, SPAN: gl.constexpr, CHUNKS: gl.constexpr,  # noqa: E741
                  L: gl.constexpr):
    """Rows of h -> e4m3 in `hs` (GROUPS, N, 128); returns the scale of each of the N rows.

    scale = max(amax / 448, 2^-126), codes = rne(h / scale): fp8_token, bit for bit.
    """
    GROUPS: gl.constexpr = hs.shape[0]
    N: gl.constexpr = hs.shape[1]
    top = gl.abs(load_group(h_ptr, row, live, 0, I, SPAN, CHUNKS, L))
    for group in range(1, GROUPS):
        top = gl.maximum(top, gl.abs(load_group(h_ptr, row, live, group, I, SPAN, CHUNKS, L)))
    amax = gl.max(top, axis=1)
    if SPAN > 1:
        owner = gl.max(amax.reshape([N // SPAN, SPAN]), axis=1)
        spread, _ = gl.broadcast(owner.expand_dims(1), amax.reshape([N // SPAN, SPAN]))
        amax = gl.convert_layout(spread.reshape([N]), gl.SliceLayout(1, L))
    scale = gl.maximum(gl.div_rn(amax, gl.full([N], 448.0, gl.float32, gl.SliceLayout(1, L))), TINY)
    for group in range(GROUPS):
        value = load_group(h_ptr, row, live, group, I, SPAN, CHUNKS, L)
        divisor, value = gl.broadcast(scale.expand_dims(1), value)
        code = gl.minimum(gl.maximum(gl.div_rn(value, divisor), -448.0), 448.0)
        hs.index(group).store(code.to(gl.float8e4nv))
    fence_async_shared()
    return scale


@gluon.jit
def multiply_tile(words, scales, hs, full, empty, stage, phase, steps, SLICES: gl.constexpr,
                  CHUNKS: gl.constexpr, STAGES: gl.constexpr, WIDE: gl.constexpr):
    """(WARPS * 16, N) float32 totals of one tile over the resident h, `own_parity` of each."""
    WARPS: gl.constexpr = gl.num_warps()
    N: gl.constexpr = hs.shape[1]
    zero = zeros(N)
    A: gl.constexpr = gl.DotOperandLayout(0, zero.type.layout, 4)
    total = own_parity(zero, WARPS, SLICES)
    for step in range(steps):
        mbarrier.wait(full.index(stage), phase)
        lo, hi = load_chunks(words.index(stage), scales.index(stage), CHUNKS, WARPS, WIDE)
        part = warpgroup_mma(
            fragment(chunk_of(lo, 0), chunk_of(hi, 0), A, 1, WARPS),
            hs.index(step * CHUNKS).permute((1, 0)), zero, use_acc=False, is_async=True,
        )
        if CHUNKS == 2:
            second = warpgroup_mma(
                fragment(chunk_of(lo, 1), chunk_of(hi, 1), A, 1, WARPS),
                hs.index(step * CHUNKS + 1).permute((1, 0)), zero, use_acc=False, is_async=True,
            )
            part, second = warpgroup_mma_wait(0, deps=[part, second])
            mbarrier.arrive(empty.index(stage), count=1)
            total += own_parity(part, WARPS, SLICES) + own_parity(second, WARPS, SLICES)
        else:
            part = warpgroup_mma_wait(0, deps=[part])
            mbarrier.arrive(empty.index(stage), count=1)
            total += own_parity(part, WARPS, SLICES)
        stage, phase = advance(stage, phase, STAGES)
    return total, stage, phase


@gluon.jit
def hand_over(own, sums, ready, taken, done):
    """(ROWS, SLICES, 2, 8, TOKENS) -> the double buffer of the epilogue, (TOKENS * SLICES, columns)."""
    flat = own.permute((4, 1, 0, 2, 3)).reshape([sums.shape[1], sums.shape[2]])
    mbarrier.wait(taken.index(done & 1), ((done >> 1) & 1) ^ 1)
    sums.index(done & 1).store(flat)
    mbarrier.arrive(ready.index(done & 1), count=1)


@gluon.jit
def consume_rows(
    words, scales, hs, sums, full, empty, ready, taken, h_ptr, ids_ptr, count_ptr,
    tokens, topk, I, row_tiles, steps,  # noqa: E741
    TOKENS: gl.constexpr, SLICES: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr,
    WIDE: gl.constexpr,
):
    """Role of the matrix warps: quantise the h of a block when it changes, multiply its tiles."""
    WARPS: gl.constexpr = gl.num_warps()
    N: gl.constexpr = TOKENS * SLICES
    L: gl.constexpr = resident_layout(N, WARPS)
    gdc_wait()
    gdc_launch_dependents()
    first, last = share(gl.load(count_ptr) // TOKENS * row_tiles)
    n = gl.arange(0, N, layout=gl.SliceLayout(1, L)) // SLICES
    stage = first * 0
    phase = first * 0
    done = first * 0
    block = first * 0 - 1
    own = own_slice(own_parity(zeros(N), WARPS, SLICES), TOKENS, SLICES)
    C: gl.constexpr = token_layout(own.type.layout)
    factor = gl.full([TOKENS], 0.0, gl.float32, C)
    for tile in range(first, last):
        if tile // row_tiles != block:
            block = tile // row_tiles
            packed = gl.load(ids_ptr + block * TOKENS + n)
            token = packed & SENTINEL_MASK
            row = token.to(gl.int64) * topk + (packed >> 24)
            scale = quantise_rows(hs, h_ptr, row, token < tokens, I, SLICES, CHUNKS, L)
            each = gl.max(scale.reshape([TOKENS, SLICES]), axis=1)  # equal over a token's slices
            factor = gl.convert_layout(each, C)
        total, stage, phase = multiply_tile(
            words, scales, hs, full, empty, stage, phase, steps, SLICES, CHUNKS, STAGES, WIDE
        )
        own = own_slice(total, TOKENS, SLICES)
        own = own * factor.expand_dims(0).expand_dims(0).expand_dims(0).expand_dims(0)
        hand_over(own, sums, ready, taken, done)
        done += 1


@gluon.jit
def produce_rows(
    w_desc, s_desc, words, scales, full, empty, expert_ptr, count_ptr, units, row_tiles, steps,
    TOKENS: gl.constexpr, STAGES: gl.constexpr,
):
    """Role of the producer warp. It does not wait for stage 1: routing ended before that began."""
    UNITS: gl.constexpr = w_desc.block_type.shape[1]
    first, last = share(gl.load(count_ptr) // TOKENS * row_tiles)
    stage = first * 0
    phase = first * 0 + 1
    for tile in range(first, last):
        expert = gl.load(expert_ptr + tile // row_tiles)
        unit = expert * units + tile % row_tiles * w_desc.block_type.shape[0]
        for step in range(steps):
            barrier = full.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(barrier, w_desc.block_type.nbytes + s_desc.block_type.nbytes)
            tma_load(w_desc, [unit, step * UNITS, 0], barrier, words.index(stage))
            tma_load(s_desc, [unit, step * (UNITS * 8)], barrier, scales.index(stage))
            stage, phase = advance(stage, phase, STAGES)


@gluon.jit
def store_rows(
    sums, ready, taken, out_ptr, row_scale_ptr, bias_ptr, ids_ptr, expert_ptr, count_ptr,
    tokens, topk, H, row_tiles, TOKENS: gl.constexpr, SLICES: gl.constexpr,
):
    """Role of the epilogue warps: sum over the slices, row scale, bias -> a row per route."""
    gdc_wait()
    C: gl.constexpr = sums.shape[2]
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
    first, last = share(gl.load(count_ptr) // TOKENS * row_tiles)
    done = first * 0
    for tile in range(first, last):
        block = tile // row_tiles
        expert = gl.load(expert_ptr + block).to(gl.int64)
        column = tile % row_tiles * C + c
        scale = gl.load(row_scale_ptr + expert * H + column, mask=column < H, other=0.0)
        if bias_ptr is not None:
            bias = gl.load(bias_ptr + expert * H + column, mask=column < H, other=0.0)
        packed = gl.load(ids_ptr + block * TOKENS + n)
        mbarrier.wait(ready.index(done & 1), (done >> 1) & 1)
        for part in gl.static_range(TOKENS // PART):
            some = sums.index(done & 1).slice(part * PART * SLICES, PART * SLICES, dim=0).load(L)
            total = gl.sum(gl.convert_layout(
                some.reshape([PART, SLICES, C]), L3, assert_trivial=True
            ), axis=1) * scale[None, :]
            if bias_ptr is not None:
                total += bias[None, :]
            token = packed & SENTINEL_MASK
            row = token.to(gl.int64) * topk + (packed >> 24)
            live = (token < tokens)[:, None] & (column < H)[None, :]
            if part + 1 < TOKENS // PART:
                packed = gl.load(ids_ptr + block * TOKENS + (part + 1) * PART + n)
            at = row[:, None] * H + column[None, :]
            gl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=live)
        mbarrier.arrive(taken.index(done & 1), count=1)
        done += 1


@gluon.jit
def gemm2_rows(
    w_desc, s_desc, h_ptr, out_ptr, row_scale_ptr, bias_ptr, ids_ptr, expert_ptr, count_ptr,
    tokens, topk, H, I, units, row_tiles, steps,  # noqa: E741
    TOKENS: gl.constexpr, SLICES: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr,
    GROUPS: gl.constexpr, WIDE: gl.constexpr, EPILOGUE_WARPS: gl.constexpr,
    HELPER: gl.constexpr,
):
    C: gl.constexpr = w_desc.block_type.shape[0] * 16
    words = gl.allocate_shared_memory(
        gl.int32, [STAGES] + w_desc.block_type.shape, w_desc.layout
    )
    scales = gl.allocate_shared_memory(
        gl.int32, [STAGES] + s_desc.block_type.shape, s_desc.layout
    )
    hs = gl.allocate_shared_memory(
        gl.float8e4nv, [GROUPS, TOKENS * SLICES, 128], gl.NVMMASharedLayout(128, 8, 2)
    )
    # 8-word groups of a row are swapped by its number: the warps write without a bank conflict
    sums = gl.allocate_shared_memory(
        gl.float32, [2, TOKENS * SLICES, C], gl.SwizzledSharedLayout(8, 2, 4, [1, 0])
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
            (consume_rows, (words, scales, hs, sums, full, empty, ready, taken, h_ptr, ids_ptr,
                            count_ptr, tokens, topk, I, row_tiles, steps,
                            TOKENS, SLICES, CHUNKS, STAGES, WIDE)),
            (produce_rows, (w_desc, s_desc, words, scales, full, empty, expert_ptr, count_ptr,
                            units, row_tiles, steps, TOKENS, STAGES)),
            (store_rows, (sums, ready, taken, out_ptr, row_scale_ptr, bias_ptr, ids_ptr,
                          expert_ptr, count_ptr, tokens, topk, H, row_tiles, TOKENS, SLICES)),
        ],
        [1, EPILOGUE_WARPS],
        [HELPER, HELPER],
    )
