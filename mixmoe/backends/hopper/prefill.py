"""The grouped GEMM of both stages for many rows per expert, at the FP8 tensor rate.

A tile is 128 weight rows x up to MAIN + EXTRA routes of one expert. Its rows of x are gathered by
cp.async; an expert with slightly more than MAIN routes adds a second, narrow accumulator that
reuses the dequantised weights. Persistent: CTA c takes items c, 2G - 1 - c, 2G + c, ... of a list
sorted by size, so that loads come out even without a scheduler, and the CTAs that share rows of x
run side by side.

Roles of a CTA: TEAMS x (8 / TEAMS) matrix warps and 4 warps that gather. Two teams (64 weight rows
each) share the ring of x but not their time: while one dequantises or is in its epilogue the other
has the tensor cores to itself.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mixmoe.backends.hopper.mainloop import activate, advance, cp_async, smem_cast, tma_load
from mixmoe.backends.hopper.prefill_products import multiply, multiply_precise

SENTINEL_MASK = gl.constexpr((1 << 24) - 1)


@gluon.jit
def item(tiles_ptr, turn, total, row_tiles):
    """The turn-th item of this CTA: its tile's record address, its row tile, whether it exists."""
    grid = gl.num_programs(0)
    c = gl.program_id(0)
    index = turn * grid + gl.where(turn % 2 == 0, c, grid - 1 - c)
    return tiles_ptr + index // row_tiles * 4, index % row_tiles, index < total


@gluon.jit
def addresses(x_ptr, ids_ptr, start, first: gl.constexpr, routes, pitch, N: gl.constexpr,
              L: gl.constexpr, BY_TOKEN: gl.constexpr):  # fmt: skip
    """Pointers (N, 128) to the first 128 columns of rows `first`.. of a tile, their mask, rows."""
    n = gl.arange(0, N, layout=gl.SliceLayout(1, L)) + first
    live = n < routes
    if BY_TOKEN:
        row = gl.load(ids_ptr + start + n, mask=live, other=0) & SENTINEL_MASK
    else:
        row = start + n
    k = gl.arange(0, 128, layout=gl.SliceLayout(0, L))
    return row[:, None] * pitch + k[None, :], live[:, None] & (k >= 0)[None, :], row, live


@gluon.jit
def clear(ptr, at, end):
    """2 KB of zeros from bf16 number `at` on, as far as `end`; the next place."""
    SPAN: gl.constexpr = gl.num_warps() * 256
    n = at + gl.arange(0, SPAN, layout=gl.BlockedLayout([8], [32], [gl.num_warps()], [0]))
    gl.store(ptr + n, gl.full([SPAN], 0.0, gl.bfloat16, n.type.layout), mask=n < end)
    return at + SPAN


@gluon.jit
def gather(
    w_desc, s_desc, x_ptr, ids_ptr, x_scale_ptr, weight_ptr, clear_ptr, clear_end, tiles_ptr,
    count_ptr, words, scales, xs, extra, x_scales, weights, full, empty, units, row_tiles, base,
    steps, pitch,
    MAIN: gl.constexpr, STAGES: gl.constexpr, TEAMS: gl.constexpr, BY_TOKEN: gl.constexpr,
):
    """Role of the gathering warps: weights by TMA, rows of x by cp.async, scales of the rows.

    Beside that they zero their share of what a later kernel adds to, a little in every step: the
    memory is idle enough here to take it.
    """
    L: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [gl.num_warps(), 1], [1, 0])
    EXTRA: gl.constexpr = extra.shape[1]
    TEAM_UNITS: gl.constexpr = w_desc.block_type.shape[0]
    total = gl.load(count_ptr) * row_tiles
    turn = 0
    at, row_tile, more = item(tiles_ptr, turn, total, row_tiles)
    stage, phase = 0, 1
    if clear_ptr is not None:
        share = gl.cdiv(gl.cdiv(clear_end, gl.num_programs(0)), 8) * 8
        clear_at = gl.program_id(0) * share
        clear_end = gl.minimum(clear_end, clear_at + share)
    while more:
        unit = gl.load(at) * units + (base + row_tile) * (TEAMS * TEAM_UNITS)
        start = gl.load(at + 1)
        routes = gl.load(at + 2)
        offset, mask, row, live = addresses(
            x_ptr, ids_ptr, start, 0, routes, pitch, MAIN, L, BY_TOKEN
        )
        offset2, mask2, row2, live2 = addresses(
            x_ptr, ids_ptr, start, MAIN, routes, pitch, EXTRA, L, BY_TOKEN
        )
        parity = turn % 2
        # A free stage means that both teams are past the tile that used these scales last: a tile
        # has at least as many steps as the ring has stages.
        mbarrier.wait(empty.index(stage), phase)
        x_scales.index(parity).slice(0, MAIN).store(
            gl.load(x_scale_ptr + row, mask=live, other=0.0)
        )
        x_scales.index(parity).slice(MAIN, EXTRA).store(
            gl.load(x_scale_ptr + row2, mask=live2, other=0.0)
        )
        if weight_ptr is not None:
            n = gl.arange(0, MAIN, layout=gl.SliceLayout(1, L))
            n2 = gl.arange(0, EXTRA, layout=gl.SliceLayout(1, L)) + MAIN
            weights.index(parity).slice(0, MAIN).store(
                gl.load(weight_ptr + start + n, mask=live, other=0.0)
            )
            weights.index(parity).slice(MAIN, EXTRA).store(
                gl.load(weight_ptr + start + n2, mask=live2, other=0.0)
            )
        for k in range(steps):
            ready = full.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(
                ready, TEAMS * (w_desc.block_type.nbytes + s_desc.block_type.nbytes)
            )
            for t in gl.static_range(TEAMS):
                slot = stage * TEAMS + t
                tma_load(w_desc, [unit + t * TEAM_UNITS, k, 0], ready, words.index(slot))
                tma_load(s_desc, [unit + t * TEAM_UNITS, 16 * k], ready, scales.index(slot))
            cp_async(xs.index(stage), x_ptr + k * 128 + offset, mask=mask)
            if routes > MAIN:
                cp_async(extra.index(stage), x_ptr + k * 128 + offset2, mask=mask2)
            async_copy.mbarrier_arrive(ready, increment_count=False)
            stage, phase = advance(stage, phase, STAGES)
            if clear_ptr is not None:
                clear_at = clear(clear_ptr, clear_at, clear_end)
        turn += 1
        at, row_tile, more = item(tiles_ptr, turn, total, row_tiles)
    if clear_ptr is not None:
        while clear_at < clear_end:
            clear_at = clear(clear_ptr, clear_at, clear_end)


@gluon.jit
def store_rows(
    value, out, ptr, pitch, columns, column, start, first, routes, COLUMNS: gl.constexpr
):
    """value (COLUMNS, N) -> bf16 rows start + first + n, columns column + m, transposed in smem."""
    N: gl.constexpr = value.shape[1]
    tile = out.slice(0, N, dim=0)
    tile.permute((1, 0)).store(value.to(gl.bfloat16))
    L: gl.constexpr = gl.BlockedLayout(
        [1, 8], [256 // COLUMNS, COLUMNS // 8], [gl.num_warps(), 1], [1, 0]
    )
    n = first + gl.arange(0, N, layout=gl.SliceLayout(1, L))
    m = column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, L))
    gl.store(
        ptr + (start + n).to(gl.int64)[:, None] * pitch + m[None, :], tile.load(L),
        mask=(n < routes)[:, None] & (m < columns)[None, :],
    )


@gluon.jit
def finish_gated(
    acc, out, x_scales, weights, first: gl.constexpr, record, block, out_ptr, row_scale_ptr,
    bias_ptr, weight_ptr, columns, limit, alpha, beta, beta2, KIND: gl.constexpr,
):
    """Stage 1: scales, bias, activation, routing weight. `block` counts blocks of 8 row pairs
    times warps; `columns` is I."""
    expert, start, routes = record
    WARPS: gl.constexpr = gl.num_warps()
    N: gl.constexpr = acc.shape[1]
    acc = acc * x_scales.slice(first, N).load(gl.SliceLayout(0, acc.type.layout))[None, :]
    gate, up = acc.reshape([WARPS, 2, 8, N]).permute((0, 2, 3, 1)).split()
    gate = gate.reshape([WARPS * 8, N])
    up = up.reshape([WARPS * 8, N])
    L: gl.constexpr = gate.type.layout
    m = block * (WARPS * 8) + gl.arange(0, WARPS * 8, layout=gl.SliceLayout(1, L))
    at = expert.to(gl.int64) * (2 * columns) + m
    live = m < columns
    gate = gate * gl.load(row_scale_ptr + at, mask=live, other=0.0)[:, None]
    up = up * gl.load(row_scale_ptr + at + columns, mask=live, other=0.0)[:, None]
    if bias_ptr is not None:
        gate += gl.load(bias_ptr + at, mask=live, other=0.0)[:, None]
        up += gl.load(bias_ptr + at + columns, mask=live, other=0.0)[:, None]
    h = activate(gate, up, limit, alpha, beta, beta2, KIND)
    if weight_ptr is not None:
        h *= weights.slice(first, N).load(gl.SliceLayout(0, L))[None, :]
    store_rows(
        h, out, out_ptr, columns, columns, block * (WARPS * 8), start, first, routes, WARPS * 8
    )


@gluon.jit
def finish_plain(
    acc, out, x_scales, first: gl.constexpr, record, block, base, out_ptr, out_pitch,
    row_scale_ptr, bias_ptr, columns,
):
    """Stage 2: scales and bias. `block` counts blocks of 16 rows times warps, from row tile `base`
    on; `columns` is H. Long tiles go through the staging buffer in two halves."""
    N: gl.constexpr = acc.shape[1]
    M: gl.constexpr = acc.shape[0]
    ROOM: gl.constexpr = out.shape[0] * out.shape[1]
    if M * N > ROOM:
        low, high = acc.reshape([M, 2, N // 2]).permute((0, 2, 1)).split()
        finish_plain(
            low, out, x_scales, first, record, block, base, out_ptr, out_pitch, row_scale_ptr,
            bias_ptr, columns,
        )
        finish_plain(
            high, out, x_scales, first + N // 2, record, block, base, out_ptr, out_pitch,
            row_scale_ptr, bias_ptr, columns,
        )
    else:
        expert, start, routes = record
        L: gl.constexpr = acc.type.layout
        acc = acc * x_scales.slice(first, N).load(gl.SliceLayout(0, L))[None, :]
        m = (base * 2 + block) * M + gl.arange(0, M, layout=gl.SliceLayout(1, L))
        at = expert.to(gl.int64) * columns + m
        acc = acc * gl.load(row_scale_ptr + at, mask=m < columns, other=0.0)[:, None]
        if bias_ptr is not None:
            acc += gl.load(bias_ptr + at, mask=m < columns, other=0.0)[:, None]
        whole = smem_cast(
            out, gl.bfloat16, [ROOM // M, M],
            gl.NVMMASharedLayout(128, 16, 2),
        )
        store_rows(
            acc, whole, out_ptr, out_pitch, columns - base * (2 * M), block * M, start, first,
            routes, M,
        )


@gluon.jit
def finish(
    acc, out, x_scales, weights, first: gl.constexpr, record, block, end, KIND: gl.constexpr
):
    """The epilogue of rows first .. of a tile; `end` is what the kernel was given for it."""
    (
        out_ptr, out_pitch, row_scale_ptr, bias_ptr, weight_ptr, columns, base,
        limit, alpha, beta, beta2,
    ) = end  # fmt: skip
    if KIND is None:
        finish_plain(
            acc, out, x_scales, first, record, block, base, out_ptr, out_pitch, row_scale_ptr,
            bias_ptr, columns,
        )
    else:
        finish_gated(
            acc, out, x_scales, weights, first, record, block, out_ptr, row_scale_ptr, bias_ptr,
            weight_ptr, columns, limit, alpha, beta, beta2, KIND,
        )


@gluon.jit
def tile(
    words, scales, xs, extra, x_scales, weights, out, full, empty, stage, phase, tiles_ptr, turn,
    total, row_tiles, steps, end, team: gl.constexpr, N: gl.constexpr, N2: gl.constexpr,
    STAGES: gl.constexpr, TEAMS: gl.constexpr, KIND: gl.constexpr, WIDE: gl.constexpr,
    PRECISE: gl.constexpr, PART: gl.constexpr,
):
    """N, and if N2 > 8 N2 more, routes. The record is read late: registers are short."""
    if PRECISE:
        PARTS: gl.constexpr = max(1, N // min(PART, max(32, N // 2)))
        totals, acc2, stage, phase = multiply_precise(
            words, scales, xs, extra, full, empty, stage, phase, steps, team, N, N2, STAGES,
            TEAMS, WIDE, PARTS,
        )
        at, row_tile, more = item(tiles_ptr, turn, total, row_tiles)
        record = (gl.load(at), gl.load(at + 1), gl.load(at + 2))
        block = row_tile * TEAMS + team
        for i in gl.static_range(PARTS):
            finish(
                totals[i], out, x_scales, weights, i * totals[i].shape[1], record, block, end, KIND
            )
    else:
        acc, acc2, stage, phase = multiply(
            words, scales, xs, extra, full, empty, stage, phase, steps, team, N, N2, STAGES,
            TEAMS, WIDE,
        )
        at, row_tile, more = item(tiles_ptr, turn, total, row_tiles)
        record = (gl.load(at), gl.load(at + 1), gl.load(at + 2))
        block = row_tile * TEAMS + team
        finish(acc, out, x_scales, weights, 0, record, block, end, KIND)
    if N2 > 8:
        finish(acc2, out, x_scales, weights, N, record, block, end, KIND)
    return stage, phase


@gluon.jit
def consume(
    team: gl.constexpr, words, scales, xs, extra, x_scales, weights, out, full, empty, tiles_ptr,
    count_ptr, row_tiles, steps, end, MAIN: gl.constexpr, SMALL: gl.constexpr,
    STAGES: gl.constexpr, TEAMS: gl.constexpr, KIND: gl.constexpr, WIDE: gl.constexpr,
    PRECISE: gl.constexpr, PART: gl.constexpr, LONG_PART: gl.constexpr,
):
    """Role of a team of matrix warps: each tile of this CTA, in the narrowest form that fits."""
    EXTRA: gl.constexpr = extra.shape[1]
    total = gl.load(count_ptr) * row_tiles
    turn = 0
    at, row_tile, more = item(tiles_ptr, turn, total, row_tiles)
    stage, phase = 0, 0
    while more:
        routes = gl.load(at + 2)
        sx = x_scales.index(turn % 2)
        sw = weights.index(turn % 2)
        if routes > MAIN:
            stage, phase = tile(
                words, scales, xs, extra, sx, sw, out, full, empty, stage, phase, tiles_ptr, turn,
                total, row_tiles, steps, end, team, MAIN, EXTRA, STAGES, TEAMS, KIND, WIDE, PRECISE,
                LONG_PART,
            )
        elif routes > SMALL:
            stage, phase = tile(
                words, scales, xs, extra, sx, sw, out, full, empty, stage, phase, tiles_ptr, turn,
                total, row_tiles, steps, end, team, MAIN, 8, STAGES, TEAMS, KIND, WIDE, PRECISE,
                PART,
            )
        else:
            stage, phase = tile(
                words, scales, xs, extra, sx, sw, out, full, empty, stage, phase, tiles_ptr, turn,
                total, row_tiles, steps, end, team, SMALL, 8, STAGES, TEAMS, KIND, WIDE, PRECISE,
                PART,
            )
        turn += 1
        at, row_tile, more = item(tiles_ptr, turn, total, row_tiles)


@gluon.jit(do_not_specialize=["base", "units", "row_tiles"])
def grouped_prefill(
    w_desc, s_desc, x_ptr, ids_ptr, x_scale_ptr, tiles_ptr, count_ptr,
    out_ptr, out_pitch, row_scale_ptr, bias_ptr, weight_ptr, clear_ptr, clear_end, columns, base,
    limit, alpha, beta, beta2, units, row_tiles, K, pitch,
    MAIN: gl.constexpr, EXTRA: gl.constexpr, SMALL: gl.constexpr, STAGES: gl.constexpr,
    TEAMS: gl.constexpr, KIND: gl.constexpr, WIDE: gl.constexpr,
    PRECISE: gl.constexpr, PART: gl.constexpr, LONG_PART: gl.constexpr,
    TEAM_REGISTERS: gl.constexpr, GATHER_REGISTERS: gl.constexpr, PDL: gl.constexpr,
):
    """KIND None: rows of x lie in sorted order, plain epilogue; else rows by token, gated.

    clear_ptr: clear_end bf16 to fill with zeros, or None.
    """
    WARPS: gl.constexpr = gl.num_warps()
    words = gl.allocate_shared_memory(
        gl.int32, [STAGES * TEAMS] + w_desc.block_type.shape, w_desc.layout
    )
    scales = gl.allocate_shared_memory(
        gl.int32, [STAGES * TEAMS] + s_desc.block_type.shape, s_desc.layout
    )
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 8, 2)
    xs = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, MAIN, 128], swizzled)
    extra = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, EXTRA, 128], swizzled)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    x_scales = gl.allocate_shared_memory(gl.float32, [2, 2 * MAIN], flat)
    weights = gl.allocate_shared_memory(gl.float32, [2, 2 * MAIN], flat)
    out = gl.allocate_shared_memory(
        gl.bfloat16, [TEAMS, MAIN, WARPS * 8], gl.NVMMASharedLayout(WARPS * 16, 16, 2)
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1 + 32 * 4)
        mbarrier.init(empty.index(i), count=TEAMS)
    fence_async_shared()
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    steps = (K + 127) // 128
    gl.warp_specialize(
        [
            (consume, (0, words, scales, xs, extra, x_scales, weights, out.index(0), full, empty,
                       tiles_ptr, count_ptr, row_tiles, steps,
                       (out_ptr, out_pitch, row_scale_ptr, bias_ptr, weight_ptr, columns, base,
                        limit, alpha, beta, beta2),
                       MAIN, SMALL, STAGES, TEAMS, KIND, WIDE, PRECISE, PART, LONG_PART)),
            (consume, (1, words, scales, xs, extra, x_scales, weights, out.index(1), full, empty,
                       tiles_ptr, count_ptr, row_tiles, steps,
                       (out_ptr, out_pitch, row_scale_ptr, bias_ptr, weight_ptr, columns, base,
                        limit, alpha, beta, beta2),
                       MAIN, SMALL, STAGES, TEAMS, KIND, WIDE, PRECISE, PART, LONG_PART)),
            (gather, (w_desc, s_desc, x_ptr, ids_ptr, x_scale_ptr, weight_ptr, clear_ptr, clear_end,
                      tiles_ptr, count_ptr, words, scales, xs, extra, x_scales, weights, full,
                      empty, units, row_tiles, base, steps, pitch, MAIN, STAGES, TEAMS,
                      KIND is not None)),
        ],
        [4, 4], [TEAM_REGISTERS, GATHER_REGISTERS],
    )
