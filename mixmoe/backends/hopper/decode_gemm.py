"""A grouped GEMM over a long K for few rows per expert: the roles of both stages in decode.

A stream of weight bytes that nothing stops. Roles of a CTA: two teams of four matrix warps,
`stream_weights` and `gather_rows`, which keep the ring full. The teams share a tile in one of two
ways:

SPLIT 2: both have the same weight rows and each half of the K slices (`multiply`); the stage's own
    epilogue warp takes the totals from `Sums` a row unit at a time (`unit_total`).
SPLIT 1: each has weight rows of its own, all of K, and does its part of the epilogue itself, in
    registers (`tile_total`). Both read one B: for many routes a block.

Two teams and two CTAs make four chains an SM whose latencies hide behind each
other. The grid is persistent and sweeps the tiles of one block after the other. Launched
dependently (PDL): the CTAs are set up while the kernel before still runs; the kernel after may
start once this one has seen its input.

What differs between the stages is in the records: which row of the activation a route reads
(`Rows.topk`), how many weight units an expert has (`Sizes.units`), what the epilogue makes of a
unit. Few tokens without routing (`gemm1_token`): the same with one team of eight warps, a row
resident instead of gathered.

EARLY: the lists of routing were complete when the kernel before started its dependents, so they are
read, and weights streamed, before that kernel is waited for.
"""

from typing import Any, NamedTuple

from triton import constexpr_function
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
    TEAMS,
    Ring,
    Sums,
    barriers,
    own_parity,
    own_slice,
    zeros,
)
from mixmoe.backends.hopper.decode_tiles import (
    known,
    routes_of,
    row_of,
    tiles_of,
    tokens_of,
    turns_of,
)
from mixmoe.backends.hopper.mainloop import (
    advance,
    chunk_of,
    cp_async,
    cta_barrier,
    fragment,
    load_chunks,
    look_up,
    smem_cast,
    tables_of,
    tma_load,
)


class Rows(NamedTuple):
    """The activation: e4m3 slots, their row pitch, float32 scales.

    topk: None where a route reads its token's row (x); where every route has a row of its own (h),
    the routes of a token.
    """

    codes: Any
    pitch: Any
    scales: Any
    topk: Any


@constexpr_function
def dense(rank):
    """Shared memory of `rank` dimensions, the last one fastest, or of an array of such."""
    return gl.SwizzledSharedLayout(1, 1, 1, list(range(rank))[::-1])


@gluon.jit
def make_rows(COUNT: gl.constexpr, N: gl.constexpr):
    """wgmma's B, COUNT times: N rows of 128 slots of the activation."""
    return gl.allocate_shared_memory(
        gl.float8e4nv, [COUNT, N, 128], gl.NVMMASharedLayout(128, 8, 2)
    )


@gluon.jit
def make_ring(w_desc, s_desc, rows, STAGES: gl.constexpr, TEAMS: gl.constexpr,
              FILLERS: gl.constexpr):
    """STAGES of every team's weights, filled by FILLERS roles. rows: STAGES * SPLIT of them, or
    those of a whole row that stays."""
    words = gl.allocate_shared_memory(
        gl.int32, [STAGES * TEAMS] + w_desc.block_type.shape, w_desc.layout
    )
    scales = gl.allocate_shared_memory(
        gl.int32, [STAGES * TEAMS] + s_desc.block_type.shape, s_desc.layout
    )
    return Ring(words, scales, rows, barriers(STAGES, FILLERS), barriers(STAGES, TEAMS))


@gluon.jit
def make_sums(TEAMS: gl.constexpr, ROWS: gl.constexpr, PART: gl.constexpr, TOKENS: gl.constexpr):
    """Two tiles' totals of every team: (unit, slice, row half, row, token)."""
    buffer = gl.allocate_shared_memory(gl.float32, [2 * TEAMS, ROWS, PART, 2, 8, TOKENS], dense(5))
    return Sums(buffer, barriers(2, TEAMS), barriers(2, 1))


@gluon.jit
def stream_weights(w_desc, s_desc, ring, blocks, sizes, limit, BLOCK: gl.constexpr,
                   TEAMS: gl.constexpr, SPLIT: gl.constexpr, STAGES: gl.constexpr,
                   EARLY: gl.constexpr, SHARED: gl.constexpr = False):
    """Role of the producer warp: the weights of every tile of this CTA.

    The experts of `limit` blocks may be read, so that the first load waits for no count.
    """
    if not EARLY:
        gdc_wait()
    UNITS: gl.constexpr = w_desc.block_type.shape[0]
    COLUMNS: gl.constexpr = w_desc.block_type.shape[1]
    if not SHARED:  # at once: how many tiles there are is not known yet
        expert = gl.load(blocks.experts + gl.program_id(0) // sizes.row_tiles).to(gl.int32)
    tiles = tiles_of(blocks, sizes, BLOCK)
    begin, end, turn = turns_of(tiles, SHARED)
    if SHARED:
        expert = gl.load(blocks.experts + begin // sizes.row_tiles).to(gl.int32)
    stage = tiles * 0
    phase = stage + 1
    for tile in range(begin, end, turn):
        unit = known(expert, sizes) * sizes.units
        unit += tile % sizes.row_tiles * (UNITS * (TEAMS // SPLIT))
        block = (tile + turn) // sizes.row_tiles
        expert = gl.load(blocks.experts + block, mask=block < limit, other=0).to(gl.int32)
        for step in range(sizes.steps):
            barrier = ring.full.index(stage)
            mbarrier.wait(ring.empty.index(stage), phase)
            mbarrier.expect(
                barrier, TEAMS * (w_desc.block_type.nbytes + s_desc.block_type.nbytes)
            )
            for team in gl.static_range(TEAMS):
                first = unit + team // SPLIT * UNITS
                k = (step * SPLIT + team % SPLIT) * COLUMNS
                slot = stage * TEAMS + team
                tma_load(w_desc, [first, k, 0], barrier, ring.words.index(slot))
                tma_load(s_desc, [first, k * 16], barrier, ring.scales.index(slot))
            stage, phase = advance(stage, phase, STAGES)


@constexpr_function
def group_of(n):
    """Rows of B that are gathered, or left out, together."""
    return min(n, 16)


@gluon.jit
def group(rows, i, G: gl.constexpr):
    """The i-th G rows of a B."""
    return smem_cast(
        rows, gl.float8e4nv, [rows.shape[0] // G, G, 128], gl.NVMMASharedLayout(128, 8, 2)
    ).index(i)


@gluon.jit
def groups_of(blocks, block, limit, BLOCK: gl.constexpr, PART: gl.constexpr, N: gl.constexpr,
              L: gl.constexpr):
    """Of each group of a block's B = N rows (token, slice): its routes, and the first of them; live
    ones come first."""
    G: gl.constexpr = group_of(N)
    routes = ()
    first = ()
    for i in gl.static_range(N // G):
        n = (i * G + gl.arange(0, G, layout=L)) // PART
        routes = routes + (routes_of(blocks, block, n, limit, BLOCK),)  # type: ignore[assignment]
        first = first + (routes_of(blocks, block, i * G // PART, limit, BLOCK),)  # type: ignore[assignment]
    return routes, first


@gluon.jit
def gather_rows(x, ring, blocks, sizes, tokens, limit, BLOCK: gl.constexpr,
                TOKENS: gl.constexpr, PART: gl.constexpr, SPLIT: gl.constexpr,
                CHUNKS: gl.constexpr, STAGES: gl.constexpr, EARLY: gl.constexpr):
    """Role of the gather warps: each block's rows of the activation, as B = (token, slice) rows of
    128 slots for each of SPLIT parts of K and CHUNKS of a slice.

    The copies of a step are announced LAG steps later, once they have landed and a fence has made
    them visible to the tensor cores. Rows of padding and slots past the row are filled with zeros;
    a later group without a route is left as it is, and nobody reads their product. The teams give
    a stage back after they have seen the next one, so LAG + 2 stages are in use.
    """
    gl.static_assert(STAGES >= 3)
    LAG: gl.constexpr = 3 if STAGES > 4 else STAGES - 2
    N: gl.constexpr = TOKENS * PART
    L: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [gl.num_warps(), 1], [1, 0])
    G: gl.constexpr = group_of(N)
    n = gl.arange(0, G, layout=gl.SliceLayout(1, L))
    slot = gl.arange(0, 128, layout=gl.SliceLayout(0, L))
    k = (n % PART * (CHUNKS * 128))[:, None] + slot[None, :]
    if not EARLY:
        gdc_wait()
    block = gl.program_id(0) // sizes.row_tiles
    routes, first = groups_of(blocks, block, limit, BLOCK, PART, N, gl.SliceLayout(1, L))
    tiles = tiles_of(blocks, sizes, BLOCK)
    gdc_wait()
    gdc_launch_dependents()
    stage = tiles * 0
    phase = stage + 1
    late = stage
    issued = stage
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        rows = ()
        live = ()
        used = ()  # the first group always is
        for i in gl.static_range(N // G):
            rows = rows + (x.codes + row_of(routes[i], x.topk) * x.pitch,)  # type: ignore[assignment]
            live = live + ((routes[i] & SENTINEL_MASK) < tokens,)  # type: ignore[assignment]
            used = used + ((first[i] & SENTINEL_MASK) < tokens,)  # type: ignore[assignment]
        block = (tile + gl.num_programs(0)) // sizes.row_tiles
        routes, first = groups_of(blocks, block, limit, BLOCK, PART, N, gl.SliceLayout(1, L))
        for step in range(sizes.steps):
            mbarrier.wait(ring.empty.index(stage), phase)
            for i in gl.static_range(SPLIT * CHUNKS):
                at = (step * SPLIT + i // CHUNKS) * (PART * CHUNKS * 128) + i % CHUNKS * 128 + k
                b = ring.rows.index(stage * (SPLIT * CHUNKS) + i)
                for j in gl.static_range(N // G):
                    if j == 0 or used[j]:
                        cp_async(group(b, j, G), rows[j][:, None] + at,
                                 mask=live[j][:, None] & (at < sizes.slots))
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


class Ahead(NamedTuple):
    """The stage that a team takes next, its words already read."""

    stage: Any
    phase: Any
    raw: Any
    scale: Any


@gluon.jit
def read_ahead(team: gl.constexpr, ring, stage, phase, more, TEAMS: gl.constexpr,
               CHUNKS: gl.constexpr):
    """Wait for a stage, if there is to be one, and read the team's words."""
    mbarrier.wait(ring.full.index(stage), phase, pred=more)
    slot = stage * TEAMS + team
    raw, scale = load_chunks(
        ring.words.index(slot), ring.scales.index(slot), CHUNKS, gl.num_warps()
    )
    return Ahead(stage, phase, raw, scale)


@gluon.jit
def product(words, rows, acc, CHUNK: gl.constexpr, A: gl.constexpr):
    """acc + the CHUNK-th chunk of the weights x rows, under way; the first begins a new sum.

    words: raw and the tables of `tables_of`.
    """
    raw, low, high = words
    lo, hi = look_up(chunk_of(raw, CHUNK), chunk_of(low, CHUNK), chunk_of(high, CHUNK))
    return warpgroup_mma(
        fragment(lo, hi, A, 1, gl.num_warps()), rows.permute((1, 0)), acc, use_acc=CHUNK > 0,
        is_async=True,
    )


@gluon.jit
def tile_total(team: gl.constexpr, ring, ahead, sizes, last, N: gl.constexpr, PART: gl.constexpr,
               TEAMS: gl.constexpr, SPLIT: gl.constexpr, CHUNKS: gl.constexpr,
               STAGES: gl.constexpr, WIDE: gl.constexpr, RESIDENT: gl.constexpr = False):
    """A team's total of a tile, and the stage after: its rows and slices of K times the block's
    rows, float32 (rows, N).

    A stage's products are summed by the tensor cores, 128 or 256 of K, and added to the total in
    float32. The second chunk is decoded under the first one's product, and the words of the next
    stage, be it the next tile's, are read under the last. RESIDENT: ring.rows hold a row that
    stays, a step after the other.
    """
    zero = zeros(1, N)
    A: gl.constexpr = gl.DotOperandLayout(0, zero.type.layout, 4)
    total = own_parity(zero, PART)
    for step in range(sizes.steps):
        stage, phase, raw, scale = ahead
        first = (step if RESIDENT else stage * SPLIT + team % SPLIT) * CHUNKS
        low, high = tables_of(raw, scale, WIDE)
        after, after_phase = advance(stage, phase, STAGES)
        more = (step + 1 < sizes.steps) | (not last)
        mbarrier.wait(ring.full.index(after), after_phase, pred=more)
        part = product((raw, low, high), ring.rows.index(first), zero, 0, A)
        if CHUNKS == 2:
            part = product((raw, low, high), ring.rows.index(first + 1), part, 1, A)
        slot = after * TEAMS + team
        raw, scale = load_chunks(
            ring.words.index(slot), ring.scales.index(slot), CHUNKS, gl.num_warps()
        )
        part = warpgroup_mma_wait(0, deps=[part])
        mbarrier.arrive(ring.empty.index(stage), count=1)
        total += own_parity(part, PART)
        ahead = Ahead(after, after_phase, raw, scale)
    return total, ahead


@gluon.jit
def multiply(team: gl.constexpr, ring, sums, blocks, sizes, BLOCK: gl.constexpr,
             TOKENS: gl.constexpr, PART: gl.constexpr, TEAMS: gl.constexpr, CHUNKS: gl.constexpr,
             STAGES: gl.constexpr, WIDE: gl.constexpr, EARLY: gl.constexpr,
             RESIDENT: gl.constexpr = False):
    """Role of a team that shares its rows: its slices of K of every tile of this CTA, to `sums`."""
    if not EARLY:
        gdc_wait()
    tiles = tiles_of(blocks, sizes, BLOCK)
    done = tiles * 0
    ahead = read_ahead(team, ring, done, done, gl.program_id(0) < tiles, TEAMS, CHUNKS)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        total, ahead = tile_total(
            team, ring, ahead, sizes, tile + gl.num_programs(0) >= tiles, TOKENS * PART, PART,
            TEAMS, TEAMS, CHUNKS, STAGES, WIDE, RESIDENT,
        )
        mbarrier.wait(sums.taken.index(done & 1), ((done >> 1) & 1) ^ 1)
        sums.buffer.index((done & 1) * TEAMS + team).store(own_slice(total, TOKENS, PART))
        mbarrier.arrive(sums.ready.index(done & 1), count=1)
        done += 1


@gluon.jit
def team_sum(sums, slot, unit, SHAPE: gl.constexpr, L: gl.constexpr):
    """What a team has put into a slot for a row unit, seen as SHAPE (slices, ..): their sum."""
    units = smem_cast(
        sums.buffer.index(slot), gl.float32, [sums.buffer.shape[1]] + SHAPE, dense(len(SHAPE))
    )
    return gl.sum(units.index(unit).load(L), axis=0)


@gluon.jit
def unit_total(sums, done, unit, TEAMS: gl.constexpr, SHAPE: gl.constexpr, L: gl.constexpr):
    """The float32 total of a row unit of the done-th tile: slices, then teams, in fixed order."""
    total = team_sum(sums, (done & 1) * TEAMS, unit, SHAPE, L)
    for team in gl.static_range(1, TEAMS):
        total += team_sum(sums, (done & 1) * TEAMS + team, unit, SHAPE, L)
    return total


@gluon.jit
def own_role(role: gl.constexpr, team: gl.constexpr, ring, operands, blocks, sizes, tokens,
             BLOCK: gl.constexpr, TEAMS: gl.constexpr, CHUNKS: gl.constexpr,
             STAGES: gl.constexpr, WIDE: gl.constexpr, EARLY: gl.constexpr):
    """`own` of `run`: a list of roles takes functions by name only."""
    role(team, ring, operands, blocks, sizes, tokens, BLOCK, TEAMS, CHUNKS, STAGES, WIDE, EARLY)


@gluon.jit
def shared_role(role: gl.constexpr, sums, operands, blocks, sizes, tokens, BLOCK: gl.constexpr,
                TOKENS: gl.constexpr, TEAMS: gl.constexpr, EARLY: gl.constexpr):
    """`shared` of `run`."""
    role(sums, operands, blocks, sizes, tokens, BLOCK, TOKENS, TEAMS, EARLY)


@gluon.jit
def run(w_desc, s_desc, x, blocks, sizes, tokens, limit, own: gl.constexpr,
        shared: gl.constexpr, operands,
        BLOCK: gl.constexpr, PART: gl.constexpr, SPLIT: gl.constexpr, CHUNKS: gl.constexpr,
        STAGES: gl.constexpr, WIDE: gl.constexpr, EARLY: gl.constexpr,
        TEAM_REGISTERS: gl.constexpr, REGISTERS: gl.constexpr):
    """The roles of a CTA; a stage brings two with its own `operands`.

    own(team, ring, operands, blocks, sizes, tokens, BLOCK, TEAMS, CHUNKS, STAGES, WIDE, EARLY): a
    team's with SPLIT 1. shared(sums, operands, blocks, sizes, tokens, BLOCK, TOKENS, TEAMS, EARLY):
    the epilogue of teams that share their rows.
    """
    TOKENS: gl.constexpr = tokens_of(BLOCK, PART)
    rows = make_rows(STAGES * SPLIT * CHUNKS, TOKENS * PART)
    ring = make_ring(w_desc, s_desc, rows, STAGES, TEAMS, 2)
    if SPLIT == 1:
        fence_async_shared()
        gl.warp_specialize(
            [
                (own_role, (own, 0, ring, operands, blocks, sizes, tokens, BLOCK, TEAMS, CHUNKS,
                            STAGES, WIDE, EARLY)),
                (own_role, (own, 1, ring, operands, blocks, sizes, tokens, BLOCK, TEAMS, CHUNKS,
                            STAGES, WIDE, EARLY)),
                (stream_weights, (w_desc, s_desc, ring, blocks, sizes, limit, BLOCK, TEAMS, SPLIT,
                                  STAGES, EARLY)),
                (gather_rows, (x, ring, blocks, sizes, tokens, limit, BLOCK, TOKENS, PART, SPLIT,
                               CHUNKS, STAGES, EARLY)),
            ],
            [4, 1, 2],
            [TEAM_REGISTERS, REGISTERS, REGISTERS],
        )
    else:
        sums = make_sums(TEAMS, w_desc.block_type.shape[0], PART, TOKENS)
        fence_async_shared()
        gl.warp_specialize(
            [
                (multiply, (0, ring, sums, blocks, sizes, BLOCK, TOKENS, PART, TEAMS, CHUNKS,
                            STAGES, WIDE, EARLY)),
                (multiply, (1, ring, sums, blocks, sizes, BLOCK, TOKENS, PART, TEAMS, CHUNKS,
                            STAGES, WIDE, EARLY)),
                (stream_weights, (w_desc, s_desc, ring, blocks, sizes, limit, BLOCK, TEAMS, SPLIT,
                                  STAGES, EARLY)),
                (shared_role, (shared, sums, operands, blocks, sizes, tokens, BLOCK, TOKENS, TEAMS,
                               EARLY)),
                (gather_rows, (x, ring, blocks, sizes, tokens, limit, BLOCK, TOKENS, PART, SPLIT,
                               CHUNKS, STAGES, EARLY)),
            ],
            [4, 1, 1, 2],
            [TEAM_REGISTERS, REGISTERS, REGISTERS, REGISTERS],
        )
