"""Stage 2 for few rows per expert: out = h Wd^T + bd, a stream of weight bytes; two forms.

`gemm2_rows`: a tile is weight rows x one block of routes, the result a row per route, which combine
adds up. `gemm2_tokens`: a tile is 16 weight rows x ALL experts of one token, an expert (or a part
of its K) to a warp, and the epilogue adds the experts in fixed order, so the result is y itself. An
expert that two tokens share is then streamed twice, the second time out of L2.

h arrives as float32 and is quantised here, once for each block or token that a CTA works on (its
share of the tiles is contiguous), into shared memory that stays. So only h ties this kernel to the
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
    smem_cast,
    tma_load,
)
from mixmoe.formats import Quantised
from mixmoe.spec import Recipe, Routed, Tile, Weights

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


@constexpr_function
def slice_layout(layout):
    """Layout of a vector along the second of five dimensions."""
    for dim in (4, 3, 2, 0):
        layout = gl.SliceLayout(dim, layout)
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
def load_group(h_ptr, row, live, group, I,  # noqa: E741
               SPAN: gl.constexpr, CHUNKS: gl.constexpr, L: gl.constexpr):
    """Group `group` of h as wgmma's B: (N, 128) float32, row n = chunk n mod SPAN of route n // SPAN.

    A step holds SPAN * CHUNKS consecutive chunks, CHUNKS of them to a slice.
    """
    piece = gl.arange(0, row.shape[0], layout=gl.SliceLayout(1, L)) % SPAN
    chunk = group // CHUNKS * (SPAN * CHUNKS) + piece * CHUNKS + group % CHUNKS
    k = chunk[:, None] * 128 + gl.arange(0, 128, layout=gl.SliceLayout(0, L))[None, :]
    return gl.load(h_ptr + row[:, None] * I + k, mask=live[:, None] & (k < I), other=0.0)


@gluon.jit
def make_resident(hs, h_ptr, h_scale_ptr, row, live, I, SPAN: gl.constexpr,  # noqa: E741
                  CHUNKS: gl.constexpr, L: gl.constexpr):
    """Rows of h as e4m3 in `hs` (GROUPS, N, 128); returns the scale of each of the N rows.

    float32 rows are quantised: scale = max(amax / 448, 2^-126), codes = rne(h / scale), which is
    fp8_token bit for bit. Codes that come with a scale per row are copied.
    """
    GROUPS: gl.constexpr = hs.shape[0]
    N: gl.constexpr = hs.shape[1]
    if h_scale_ptr is not None:
        scale = gl.load(h_scale_ptr + row, mask=live, other=0.0)
        for group in range(GROUPS):
            hs.index(group).store(load_group(h_ptr, row, live, group, I, SPAN, CHUNKS, L))
    else:
        top = gl.abs(load_group(h_ptr, row, live, 0, I, SPAN, CHUNKS, L))
        for group in range(1, GROUPS):
            top = gl.maximum(top, gl.abs(load_group(h_ptr, row, live, group, I, SPAN, CHUNKS, L)))
        amax = gl.max(top, axis=1)
        if SPAN > 1:
            pieces = amax.reshape([N // SPAN, SPAN])
            whole, _ = gl.broadcast(gl.max(pieces, axis=1).expand_dims(1), pieces)
            amax = gl.convert_layout(whole.reshape([N]), gl.SliceLayout(1, L))
        top_code = gl.full([N], 448.0, gl.float32, gl.SliceLayout(1, L))
        scale = gl.maximum(gl.div_rn(amax, top_code), TINY)
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
    """(ROWS, SLICES, 2, 8, TOKENS) -> the epilogue's double buffer (TOKENS * SLICES, columns)."""
    flat = own.permute((4, 1, 0, 2, 3)).reshape([sums.shape[1], sums.shape[2]])
    mbarrier.wait(taken.index(done & 1), ((done >> 1) & 1) ^ 1)
    sums.index(done & 1).store(flat)
    mbarrier.arrive(ready.index(done & 1), count=1)


@gluon.jit
def consume_rows(
    words, scales, hs, sums, full, empty, ready, taken, h_ptr, h_scale_ptr, ids_ptr, count_ptr,
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
            scale = make_resident(
                hs, h_ptr, h_scale_ptr, row, token < tokens, I, SLICES, CHUNKS, L
            )
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
def block_row(ptr, expert_ptr, tile, live, c, H, row_tiles, C: gl.constexpr):
    """The part of a tile's expert's row of ptr (E, H) that belongs to the tile's columns."""
    expert = gl.load(expert_ptr + tile // row_tiles, mask=live, other=0).to(gl.int64)
    column = tile % row_tiles * C + c
    return gl.load(ptr + expert * H + column, mask=(column < H) & live, other=0.0)


@gluon.jit
def store_rows(
    sums, ready, taken, out_ptr, row_scale_ptr, bias_ptr, ids_ptr, expert_ptr, count_ptr,
    tokens, topk, H, row_tiles, TOKENS: gl.constexpr, SLICES: gl.constexpr,
):
    """Role of the epilogue warp: sum over the slices, row scale, bias -> a row per route."""
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
    scale = block_row(row_scale_ptr, expert_ptr, first, first < last, c, H, row_tiles, C)
    gdc_wait()
    for tile in range(first, last):
        block = tile // row_tiles
        column = tile % row_tiles * C + c
        if bias_ptr is not None:
            bias = block_row(bias_ptr, expert_ptr, tile, tile < last, c, H, row_tiles, C)
        packed = gl.load(ids_ptr + block * TOKENS + n)
        ahead = tile + 1
        next_scale = block_row(  # a tile ahead: it comes from memory
            row_scale_ptr, expert_ptr, ahead, ahead < last, c, H, row_tiles, C
        )
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
        scale = next_scale
        done += 1


@gluon.jit
def gemm2_rows(
    w_desc, s_desc, h_ptr, h_scale_ptr, out_ptr, row_scale_ptr, bias_ptr, ids_ptr, expert_ptr,
    count_ptr, tokens, topk, H, I, units, row_tiles, steps,  # noqa: E741
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
            (consume_rows, (words, scales, hs, sums, full, empty, ready, taken, h_ptr,
                            h_scale_ptr, ids_ptr, count_ptr, tokens, topk, I, row_tiles, steps,
                            TOKENS, SLICES, CHUNKS, STAGES, WIDE)),
            (produce_rows, (w_desc, s_desc, words, scales, full, empty, expert_ptr, count_ptr,
                            units, row_tiles, steps, TOKENS, STAGES)),
            (store_rows, (sums, ready, taken, out_ptr, row_scale_ptr, bias_ptr, ids_ptr,
                          expert_ptr, count_ptr, tokens, topk, H, row_tiles, TOKENS, SLICES)),
        ],
        [1, EPILOGUE_WARPS],
        [HELPER, HELPER],
    )


@gluon.jit
def consume_tokens(
    words, scales, hs, sums, full, empty, ready, taken, h_ptr, h_scale_ptr, ids_ptr, map_ptr,
    weight_ptr, tokens, E, I, row_tiles, steps,  # noqa: E741
    TOPK: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr, WIDE: gl.constexpr,
):
    """Role of the matrix warps: warp s works for route s // SPAN of the token."""
    WARPS: gl.constexpr = gl.num_warps()
    SPAN: gl.constexpr = WARPS // TOPK
    L: gl.constexpr = resident_layout(WARPS, WARPS)
    own = own_slice(own_parity(zeros(WARPS), WARPS, WARPS), 1, WARPS)
    F: gl.constexpr = slice_layout(own.type.layout)
    gdc_wait()
    gdc_launch_dependents()
    first, last = share(tokens * row_tiles)
    n = gl.arange(0, WARPS, layout=gl.SliceLayout(1, L)) // SPAN
    stage = first * 0
    phase = first * 0
    done = first * 0
    token = first * 0 - 1
    factor = gl.full([WARPS], 0.0, gl.float32, F)
    for tile in range(first, last):
        if tile // row_tiles != token:
            token = tile // row_tiles
            row = token.to(gl.int64) * TOPK + n
            live = expert_of(ids_ptr, map_ptr, row, n >= 0, E) >= 0
            scale = make_resident(hs, h_ptr, h_scale_ptr, row, live, I, SPAN, CHUNKS, L)
            if weight_ptr is not None:
                scale *= gl.load(weight_ptr + row)
            factor = gl.convert_layout(gl.where(live, scale, 0.0), F)
        total, stage, phase = multiply_tile(
            words, scales, hs, full, empty, stage, phase, steps, WARPS, CHUNKS, STAGES, WIDE
        )
        own = own_slice(total, 1, WARPS)
        own = own * factor.expand_dims(0).expand_dims(2).expand_dims(3).expand_dims(4)
        hand_over(own, sums, ready, taken, done)
        done += 1


@gluon.jit
def produce_tokens(
    w_desc, s_desc, words, scales, full, empty, ids_ptr, map_ptr, tokens, E, units, row_tiles,
    steps, TOPK: gl.constexpr, STAGES: gl.constexpr,
):
    """Role of the producer warp: a box of each expert. It does not wait for stage 1.

    A skipped route streams expert 0, for the bytes a stage expects; its h is zero.
    """
    COLUMNS: gl.constexpr = w_desc.block_type.shape[1]
    first, last = share(tokens * row_tiles)
    stage = first * 0
    phase = first * 0 + 1
    for tile in range(first, last):
        route = tile // row_tiles * TOPK
        rows = ()
        for r in gl.static_range(TOPK):
            expert = gl.maximum(expert_of(ids_ptr, map_ptr, route + r, route >= 0, E), 0)
            rows = rows + (expert * units + tile % row_tiles,)
        for step in range(steps):
            barrier = full.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(barrier, TOPK * (w_desc.block_type.nbytes + s_desc.block_type.nbytes))
            word = smem_cast(
                words.index(stage), gl.int32, [TOPK, 1, COLUMNS, 128], w_desc.layout
            )
            byte = smem_cast(
                scales.index(stage), gl.int32, [TOPK, 1, COLUMNS * 8], s_desc.layout
            )
            for r in gl.static_range(TOPK):
                tma_load(w_desc, [rows[r], step * COLUMNS, 0], barrier, word.index(r))
                tma_load(s_desc, [rows[r], step * (COLUMNS * 8)], barrier, byte.index(r))
            stage, phase = advance(stage, phase, STAGES)


@gluon.jit
def row_factors(row_scale_ptr, ids_ptr, map_ptr, tile, live, s, c, E, H, row_tiles,
                TOPK: gl.constexpr, SPAN: gl.constexpr):
    """(SLICES, 16): the row scale of every slice's expert, and which expert that is (or -1)."""
    route = tile // row_tiles * TOPK + s // SPAN
    expert = expert_of(ids_ptr, map_ptr, route, live, E)
    column = tile % row_tiles * 16 + c
    at = gl.maximum(expert, 0).to(gl.int64) * H + column
    return gl.load(row_scale_ptr + at, mask=(column < H) & live, other=0.0), expert


@gluon.jit
def store_tokens(
    sums, ready, taken, out_ptr, row_scale_ptr, bias_ptr, ids_ptr, map_ptr, weight_ptr,
    tokens, E, H, row_tiles, TOPK: gl.constexpr,
):
    """Role of the epilogue warp: row scales and bias, sum over a token's experts -> y."""
    SLICES: gl.constexpr = sums.shape[1]
    SPAN: gl.constexpr = SLICES // TOPK
    L: gl.constexpr = gl.BlockedLayout([SLICES // 2, 1], [2, 16], [1, gl.num_warps()], [1, 0])
    s = gl.arange(0, SLICES, layout=gl.SliceLayout(1, L))[:, None]
    c = gl.arange(0, 16, layout=gl.SliceLayout(0, L))[None, :]
    first, last = share(tokens * row_tiles)
    done = first * 0
    scale, expert = row_factors(
        row_scale_ptr, ids_ptr, map_ptr, first, first < last, s, c, E, H, row_tiles, TOPK, SPAN
    )
    gdc_wait()
    for tile in range(first, last):
        token = tile // row_tiles
        column = tile % row_tiles * 16 + c
        if bias_ptr is not None:
            whole = (expert >= 0) & (s % SPAN == 0) & (column < H)
            at = gl.maximum(expert, 0).to(gl.int64) * H + column
            bias = gl.load(bias_ptr + at, mask=whole, other=0.0)
            if weight_ptr is not None:
                bias *= gl.load(weight_ptr + token * TOPK + s // SPAN)
        next_scale, expert = row_factors(  # a tile ahead: it comes from memory
            row_scale_ptr, ids_ptr, map_ptr, tile + 1, tile + 1 < last, s, c, E, H, row_tiles,
            TOPK, SPAN,
        )
        mbarrier.wait(ready.index(done & 1), (done >> 1) & 1)
        part = sums.index(done & 1).load(L) * scale
        mbarrier.arrive(taken.index(done & 1), count=1)
        if bias_ptr is not None:
            part += bias
        y = gl.sum(part, axis=0)
        where = tile % row_tiles * 16 + gl.arange(0, 16, layout=gl.SliceLayout(0, L))
        gl.store(
            out_ptr + token.to(gl.int64) * H + where, y.to(out_ptr.dtype.element_ty),
            mask=where < H,
        )
        scale = next_scale
        done += 1


@gluon.jit
def gemm2_tokens(
    w_desc, s_desc, h_ptr, h_scale_ptr, out_ptr, row_scale_ptr, bias_ptr, ids_ptr, map_ptr,
    weight_ptr, tokens, E, H, I, units, row_tiles, steps,  # noqa: E741
    TOPK: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr,
    WIDE: gl.constexpr, HELPER: gl.constexpr,
):
    WARPS: gl.constexpr = gl.num_warps()
    COLUMNS: gl.constexpr = w_desc.block_type.shape[1]
    words = gl.allocate_shared_memory(
        gl.int32, [STAGES, TOPK, COLUMNS, 128], w_desc.layout
    )
    scales = gl.allocate_shared_memory(gl.int32, [STAGES, TOPK, COLUMNS * 8], s_desc.layout)
    hs = gl.allocate_shared_memory(
        gl.float8e4nv, [GROUPS, WARPS, 128], gl.NVMMASharedLayout(128, 8, 2)
    )
    sums = gl.allocate_shared_memory(
        gl.float32, [2, WARPS, 16], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
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
            (consume_tokens, (words, scales, hs, sums, full, empty, ready, taken, h_ptr,
                              h_scale_ptr, ids_ptr, map_ptr, weight_ptr, tokens, E, I, row_tiles,
                              steps, TOPK, CHUNKS, STAGES, WIDE)),
            (produce_tokens, (w_desc, s_desc, words, scales, full, empty, ids_ptr, map_ptr, tokens,
                              E, units, row_tiles, steps, TOPK, STAGES)),
            (store_tokens, (sums, ready, taken, out_ptr, row_scale_ptr, bias_ptr, ids_ptr, map_ptr,
                            weight_ptr, tokens, E, H, row_tiles, TOPK)),
        ],
        [1, 1],
        [HELPER, HELPER],
    )


def operands(h: Tensor | Quantised) -> tuple[Tensor, Tensor | None]:
    """float32 rows, to be quantised to fp8_token; or e4m3 codes with their scale per row."""
    return (h.codes, h.scales) if isinstance(h, Quantised) else (h, None)


def launch_rows(
    h: Tensor | Quantised, weights: Weights, routed: Routed, recipe: Recipe, tile: Tile, out: Tensor
) -> Tensor:
    """Run stage 2 by blocks: out (T * topk, H), a row per route without its routing weight.

    h: (T * topk, I) float32 or e4m3 with a scale per row, a row per route; weights.w2 in the order
    hopper_fp4_w1 (or _wide); routed.block == tile.tokens; rows of skipped routes are not written.
    """
    p = routed.problem
    stream = Stream.of(tile, weights.w2)
    row_tiles = -(-p.hidden // (16 * stream.rows))
    grid = min(stream.ctas, routed.sorted_expert_ids.shape[0] * row_tiles)
    if not grid:
        return out
    chunks = tile.k // 128
    steps = -(-p.intermediate // (tile.k * stream.slices))
    words, scales = stream.boxes(weights.w2, chunks)
    gemm2_rows[(grid,)](
        words, scales, *operands(h), out, weights.w2.row_scale, weights.w2_bias,
        routed.sorted_token_ids, routed.sorted_expert_ids, routed.num_valid_ids,
        p.tokens, p.topk, p.hidden, p.intermediate, -(-p.hidden // 16), row_tiles, steps,
        tile.tokens, stream.slices, chunks, tile.stages, steps * chunks, stream.wide, 1,
        HELPER_REGISTERS, **stream.options,
    )
    return out


def launch_tokens(
    h: Tensor | Quantised, weights: Weights, topk_ids: Tensor, topk_weights: Tensor,
    expert_map: Tensor | None, recipe: Recipe, tile: Tile, out: Tensor,
) -> Tensor:
    """Run stage 2 and combine at once: out (T, H) = sum over a token's routes in slot order.

    topk_ids: (T, topk) int32 or int64, contiguous, topk a divisor of 8; topk_weights: (T, topk)
    float32; h, weights.w2 as for `launch_rows`, rows of skipped routes are not read.
    """
    tokens, topk = topk_ids.shape
    experts, hidden, intermediate = weights.w2.shape
    stream = Stream.of(tile, weights.w2)
    row_tiles = -(-hidden // 16)
    grid = min(stream.ctas, tokens * row_tiles)
    if not grid:
        return out
    chunks = tile.k // 128
    span = tile.warps // topk
    steps = -(-intermediate // (tile.k * span))
    words, scales = Stream(
        1, span, 1, stream.ctas, stream.wide, stream.options
    ).boxes(weights.w2, chunks)
    gemm2_tokens[(grid,)](
        words, scales, *operands(h), out, weights.w2.row_scale, weights.w2_bias,
        topk_ids, expert_map, topk_weights if recipe.weight_on == 2 else None,
        tokens, experts, hidden, intermediate, row_tiles, row_tiles, steps,
        topk, chunks, tile.stages, steps * chunks, stream.wide, HELPER_REGISTERS, **stream.options,
    )
    return out
