"""The grouped GEMM of both stages for many rows per expert, at the FP8 tensor rate.

A tile is 128 or 256 weight rows x up to MAIN + EXTRA routes of one expert. Its rows of x are
gathered by cp.async; an expert with slightly more than MAIN routes adds a second, narrow
accumulator that reuses the dequantised weights, and a tile of few routes has a loop of its own.
Persistent: CTA c takes items c, 2G - 1 - c, 2G + c, ... of a list sorted by size, so that loads
come out even without a scheduler, and the CTAs that share rows of x run side by side.

Roles of a CTA: two teams of 4 matrix warps, and 4 warps that gather. The teams (64 or 128 weight
rows each) share the ring of x but not their time: while one dequantises or is in its epilogue the
other has the tensor cores to itself.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mixmoe.backends.hopper.decode import SENTINEL_MASK, barriers
from mixmoe.backends.hopper.mainloop import advance, cp_async, fields_of, tma_load
from mixmoe.backends.hopper.prefill_end import End, Factors, Tile, finish
from mixmoe.backends.hopper.prefill_products import (
    TEAMS,
    Ring,
    first_of,
    multiply,
    multiply_pairs,
    multiply_precise,
    rows_of,
    widths_of,
)


class Rows(NamedTuple):
    """The activation: e4m3 slots, their row pitch, float32 scales; ids: the sorted routes, which
    name the rows, or None where rows lie in sorted order."""

    codes: Any
    pitch: Any
    scales: Any
    ids: Any


class Work(NamedTuple):
    """Pointers of `worklist.Tiles`: records, how many."""

    records: Any
    count: Any


class Items(NamedTuple):
    """Tiles of routes x tiles of weight rows: the former's records, the latter's number, all."""

    records: Any
    row_tiles: Any
    total: Any


class Sizes(NamedTuple):
    """Of the weights: units of an expert, row tiles of this launch and the first of them."""

    units: Any
    row_tiles: Any
    base: Any


class Result(NamedTuple):
    """A row per sorted position: bf16, its pitch; columns of the layer (I or H)."""

    rows: Any
    pitch: Any
    columns: Any


class Clear(NamedTuple):
    """bf16 to fill with zeros, and how many."""

    memory: Any
    end: Any


@gluon.jit
def all_items(work, sizes):
    """The items of this launch."""
    return Items(work.records, sizes.row_tiles, gl.load(work.count) * sizes.row_tiles)


@gluon.jit
def item(items, turn):
    """The turn-th item of this CTA: its tile's record address, its row tile, whether it exists."""
    index = item_index(turn)
    at = items.records + index // items.row_tiles * 4
    return at, index % items.row_tiles, index < items.total


@gluon.jit
def item_index(turn):
    """The turn-th item of this CTA, by its number."""
    grid = gl.num_programs(0)
    c = gl.program_id(0)
    return turn * grid + gl.where(turn % 2 == 0, c, grid - 1 - c)


@gluon.jit
def piece_of(x, start, first: gl.constexpr, routes, N: gl.constexpr, L: gl.constexpr):
    """Rows `first` .. first + N of a tile: where their first 128 columns lie (N, 128), and whether
    they exist; the rows themselves, and the same of those."""
    n = gl.arange(0, N, layout=gl.SliceLayout(1, L)) + first
    live = n < routes
    if x.ids is None:
        row = start + n
    else:
        row = gl.load(x.ids + start + n, mask=live, other=0) & SENTINEL_MASK
    k = gl.arange(0, 128, layout=gl.SliceLayout(0, L))
    offset = row[:, None] * x.pitch + k[None, :]
    return offset, live[:, None] & (k >= 0)[None, :], row, live


@gluon.jit
def own_share(clear):
    """What this CTA has to clear."""
    share = gl.cdiv(gl.cdiv(clear.end, gl.num_programs(0)), 8) * 8
    first = gl.program_id(0) * share
    return first, gl.minimum(clear.end, first + share)


@gluon.jit
def clear_some(memory, at, end):
    """2 KB of zeros from bf16 number `at` on, as far as `end`; the next place."""
    SPAN: gl.constexpr = gl.num_warps() * 256
    n = at + gl.arange(0, SPAN, layout=gl.BlockedLayout([8], [32], [gl.num_warps()], [0]))
    gl.store(memory + n, gl.full([SPAN], 0.0, gl.bfloat16, n.type.layout), mask=n < end)
    return at + SPAN


@gluon.jit
def put_values(target, first: gl.constexpr, ptr, at, live):
    """Values of a tile's rows first .., loaded into shared memory; zeros where there is no row."""
    N: gl.constexpr = live.shape[0]
    target.slice(first, N).store(gl.load(ptr + at, mask=live, other=0.0))


@gluon.jit
def put_routes(factors, first: gl.constexpr, x, weight_ptr, start, piece, L: gl.constexpr):
    """Scales and routing weights of a tile's rows `first` .."""
    _, _, row, live = piece
    put_values(factors.scales, first, x.scales, row, live)
    if weight_ptr is not None:
        n = gl.arange(0, live.shape[0], layout=gl.SliceLayout(1, L)) + first
        put_values(factors.weights, first, weight_ptr + start, n, live)


@gluon.jit
def load_rows(ring, stage, first: gl.constexpr, routes, codes, piece):
    """128 columns of a tile's rows `first` .., if it has any: rows that do not exist cost as much
    time as others. What lies there instead is multiplied and never stored."""
    offset, mask, _, live = piece
    if first == 0 or routes > first:
        cp_async(rows_of(ring, stage, first, live.shape[0]), codes + offset, mask=mask)


@gluon.jit
def weight_rows(expert, row_tile, columns, ROWS: gl.constexpr, GATED: gl.constexpr):
    """Where a tile's weight rows have their scales and biases, in the order of the accumulators,
    and which rows exist. Gated: 8 gate rows, then the 8 up rows of the same columns."""
    r = gl.arange(0, ROWS, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    expert = expert.to(gl.int64)
    if GATED:
        m = row_tile * (ROWS // 2) + r // 16 * 8 + r % 8
        return expert * (2 * columns) + r // 8 % 2 * columns + m, m < columns
    else:
        m = row_tile * ROWS + r
        return expert * columns + m, m < columns


@gluon.jit
def put_record(target, start, routes, row_tile):
    """The three numbers of a tile that the matrix warps need."""
    field = gl.arange(0, 4, layout=gl.BlockedLayout([4], [32], [gl.num_warps()], [0]))
    target.store(gl.where(field == 0, start, gl.where(field == 1, routes, row_tile)))


@gluon.jit
def load_weights(w_desc, s_desc, ring, unit, k, stage):
    """Both teams' weights of a step of K, by TMA."""
    ready = ring.full.index(stage)
    mbarrier.expect(ready, w_desc.block_type.nbytes + s_desc.block_type.nbytes)
    tma_load(w_desc, [unit, k, 0], ready, ring.words.index(stage))
    tma_load(s_desc, [unit, 16 * k], ready, ring.scales.index(stage))


@gluon.jit
def gather(
    w_desc, s_desc, x, weight_ptr, columns, width, clear, work, sizes, ring, factors, steps,
    GATED: gl.constexpr,
):
    """Role of the gathering warps: weights by TMA, rows of x by cp.async, the tile's `Factors`.

    width: columns of the layer. The matrix warps load nothing from global memory: a tile's record,
    then its scales, then its epilogue would be a chain of latencies that no product hides.
    Beside that they zero their share of what a later kernel adds to, a little in every step: the
    memory is idle enough here to take it.
    """
    L: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [gl.num_warps(), 1], [1, 0])
    STAGES: gl.constexpr = ring.rows.shape[0]
    MAIN: gl.constexpr = ring.rows.shape[1]
    EXTRA: gl.constexpr = ring.extra.shape[1]
    PIECE: gl.constexpr = 128 if MAIN > 128 else MAIN
    items = all_items(work, sizes)
    turn = 0
    at, row_tile, more = item(items, turn)
    stage, phase = 0, 1
    if clear is not None:
        clear_at, clear_end = own_share(clear)
    while more:
        expert = gl.load(at)
        unit = expert * sizes.units + (sizes.base + row_tile) * w_desc.block_type.shape[0]
        start = gl.load(at + 1)
        routes = gl.load(at + 2)
        pieces = ()
        for p in gl.static_range(MAIN // PIECE):
            piece = piece_of(x, start, p * PIECE, routes, PIECE, L)
            pieces = pieces + (piece,)  # type: ignore[assignment]
        if EXTRA > 8:
            last = piece_of(x, start, MAIN, routes, EXTRA, L)
            pieces = pieces + (last,)  # type: ignore[assignment]
        m, exists = weight_rows(
            expert, sizes.base + row_tile, width, factors.columns.shape[1], GATED
        )
        scale = gl.load(columns.scale + m, mask=exists, other=0.0)
        mine = factors_of(factors, turn)
        # A free stage means that both teams are past the tile that used these factors last: a tile
        # has at least as many steps as the ring has stages.
        mbarrier.wait(ring.empty.index(stage), phase)
        put_record(mine.record, start, routes, row_tile)
        mine.columns.store(scale)
        if columns.bias is not None:
            put_values(mine.bias, 0, columns.bias, m, exists)
        for p in gl.static_range(len(pieces)):
            put_routes(mine, p * PIECE, x, weight_ptr, start, pieces[p], L)
        for k in range(steps):
            mbarrier.wait(ring.empty.index(stage), phase)
            load_weights(w_desc, s_desc, ring, unit, k, stage)
            for p in gl.static_range(len(pieces)):
                load_rows(ring, stage, p * PIECE, routes, x.codes + k * 128, pieces[p])
            async_copy.mbarrier_arrive(ring.full.index(stage), increment_count=False)
            stage, phase = advance(stage, phase, STAGES)
            if clear is not None:
                clear_at = clear_some(clear.memory, clear_at, clear_end)
        turn += 1
        at, row_tile, more = item(items, turn)
    if clear is not None:
        while clear_at < clear_end:
            clear_at = clear_some(clear.memory, clear_at, clear_end)


@gluon.jit
def own_tile(factors, team: gl.constexpr, FRAGMENTS: gl.constexpr):
    """A tile's record, as a team's first fragment needs it."""
    start, routes, row_tile, _ = fields_of(factors.record)
    return Tile(start, routes, (row_tile * TEAMS + team) * FRAGMENTS)


@gluon.jit
def factors_of(factors, turn):
    """Those of the turn-th tile."""
    parity = turn % 2
    return Factors(
        factors.record.index(parity), factors.scales.index(parity), factors.weights.index(parity),
        factors.columns.index(parity), factors.bias.index(parity),
    )  # fmt: skip


@gluon.jit
def of_fragment(factors, fragment: gl.constexpr):
    """A tile's factors with those of 64 of its weight rows."""
    ROWS: gl.constexpr = gl.num_warps() * 16
    return Factors(
        factors.record, factors.scales, factors.weights,
        factors.columns.slice(fragment * ROWS, ROWS), factors.bias.slice(fragment * ROWS, ROWS),
    )  # fmt: skip


@gluon.jit
def run_tile(
    ring, factors, end, stage, phase, steps, team: gl.constexpr, WIDTHS: gl.constexpr,
    KIND: gl.constexpr, WIDE: gl.constexpr, ADDED: gl.constexpr,
):
    """As many routes as WIDTHS has. The record is read again, late: registers are short."""
    FRAGMENTS: gl.constexpr = ring.words.shape[1] // (TEAMS * gl.num_warps())
    if ADDED == 256:
        sums, stage, phase = multiply_pairs(ring, stage, phase, steps, team, WIDTHS, WIDE)
    elif ADDED:
        sums, stage, phase = multiply_precise(
            ring, stage, phase, steps, team, WIDTHS, FRAGMENTS, WIDE
        )
    else:
        sums, stage, phase = multiply(ring, stage, phase, steps, team, WIDTHS, FRAGMENTS, WIDE)
    tile = own_tile(factors, team, FRAGMENTS)
    EACH: gl.constexpr = len(WIDTHS)
    for i in gl.static_range(EACH * FRAGMENTS):
        mine = Tile(tile.start, tile.routes, tile.block + i // EACH)
        its = of_fragment(factors, team * FRAGMENTS + i // EACH)
        finish(sums[i], its, first_of(WIDTHS, i % EACH), mine, end, KIND)
    return stage, phase


@gluon.jit
def run_smallest(
    ring, factors, end, stage, phase, steps, team: gl.constexpr, SIZES: gl.constexpr,
    at: gl.constexpr, KIND: gl.constexpr, WIDE: gl.constexpr, ADDED: gl.constexpr,
):
    """A tile in the least of SIZES, from number `at` on, that holds its routes."""
    FRAGMENTS: gl.constexpr = ring.words.shape[1] // (TEAMS * gl.num_warps())
    WIDTHS: gl.constexpr = widths_of(SIZES[at], ring.rows.shape[1], FRAGMENTS, ADDED)
    if at + 1 == len(SIZES):
        return run_tile(ring, factors, end, stage, phase, steps, team, WIDTHS, KIND, WIDE, ADDED)
    else:
        _, routes, _, _ = fields_of(factors.record)
        if routes > SIZES[at]:
            stage, phase = run_smallest(
                ring, factors, end, stage, phase, steps, team, SIZES, at + 1, KIND, WIDE, ADDED
            )
        else:
            stage, phase = run_tile(
                ring, factors, end, stage, phase, steps, team, WIDTHS, KIND, WIDE, ADDED
            )
        return stage, phase


@gluon.jit
def consume(
    team: gl.constexpr, ring, factors, work, sizes, end, steps, SIZES: gl.constexpr,
    KIND: gl.constexpr, WIDE: gl.constexpr, ADDED: gl.constexpr,
):
    """Role of a team of matrix warps: each tile of this CTA, in the narrowest form that fits."""
    total = all_items(work, sizes).total
    turn = 0
    stage, phase = 0, 0
    while item_index(turn) < total:
        mine = factors_of(factors, turn)
        mbarrier.wait(ring.full.index(stage), phase)  # the factors come before the first stage
        stage, phase = run_smallest(
            ring, mine, end, stage, phase, steps, team, SIZES, 0, KIND, WIDE, ADDED
        )
        turn += 1


@gluon.jit
def make_ring(w_desc, s_desc, MAIN: gl.constexpr, EXTRA: gl.constexpr, STAGES: gl.constexpr):
    """STAGES of both teams' weights and of the rows they share."""
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 8, 2)
    words = gl.allocate_shared_memory(
        gl.int32, [STAGES] + w_desc.block_type.shape, w_desc.layout
    )
    scales = gl.allocate_shared_memory(
        gl.int32, [STAGES] + s_desc.block_type.shape, s_desc.layout
    )
    rows = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, MAIN, 128], swizzled)
    extra = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, EXTRA, 128], swizzled)
    return Ring(words, scales, rows, extra, barriers(STAGES, 1 + 32 * 4), barriers(STAGES, TEAMS))


@gluon.jit
def make_factors(ROUTES: gl.constexpr, ROWS: gl.constexpr):
    """Room for the `Factors` of two tiles."""
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return Factors(
        gl.allocate_shared_memory(gl.int32, [2, 4], flat),
        gl.allocate_shared_memory(gl.float32, [2, ROUTES], flat),
        gl.allocate_shared_memory(gl.float32, [2, ROUTES], flat),
        gl.allocate_shared_memory(gl.float32, [2, ROWS], flat),
        gl.allocate_shared_memory(gl.float32, [2, ROWS], flat),
    )


@gluon.jit(do_not_specialize=["sizes"])
def grouped_prefill(
    w_desc, s_desc, x, weight_ptr, work, sizes, out, columns, act, clear, K,
    MAIN: gl.constexpr, EXTRA: gl.constexpr, SIZES: gl.constexpr, STAGES: gl.constexpr,
    KIND: gl.constexpr, WIDE: gl.constexpr, ADDED: gl.constexpr,
    TEAM_REGISTERS: gl.constexpr, GATHER_REGISTERS: gl.constexpr, PDL: gl.constexpr,
):
    """out (P, I or H) = epilogue of x times the weights, a row per sorted position.

    columns: scales and biases of the weights' rows (`decode.Columns`); weight_ptr: routing weights
    by sorted position, or None; clear: a `Clear`, or None.
    KIND None: the plain epilogue, act None. SIZES: routes of the tiles that have a loop of their
    own, ascending. ADDED: columns of K after which products are added in float32; 0: never.
    """
    WARPS: gl.constexpr = gl.num_warps()
    ring = make_ring(w_desc, s_desc, MAIN, EXTRA, STAGES)
    factors = make_factors(2 * MAIN, w_desc.block_type.shape[0] * 16)
    staging = gl.allocate_shared_memory(
        gl.bfloat16, [TEAMS, MAIN, WARPS * 8], gl.NVMMASharedLayout(WARPS * 16, 16, 2)
    )
    fence_async_shared()
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    steps = (K + 127) // 128
    low, high = staging.index(0), staging.index(1)
    base = sizes.base * (w_desc.block_type.shape[0] // WARPS)
    gl.warp_specialize(
        [
            (consume, (0, ring, factors, work, sizes,
                       End(low, out, weight_ptr, columns.bias, act, base),
                       steps, SIZES, KIND, WIDE, ADDED)),
            (consume, (1, ring, factors, work, sizes,
                       End(high, out, weight_ptr, columns.bias, act, base),
                       steps, SIZES, KIND, WIDE, ADDED)),
            (gather, (w_desc, s_desc, x, weight_ptr, columns, out.columns, clear, work, sizes, ring,
                      factors, steps, KIND is not None)),
        ],
        [4, 4], [TEAM_REGISTERS, GATHER_REGISTERS],
    )
