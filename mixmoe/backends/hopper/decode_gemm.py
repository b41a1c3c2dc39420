"""A grouped GEMM over a long K for few rows per expert: the roles of both stages in decode.

A stream of weight bytes that nothing stops. Roles of a CTA: `multiply` (two teams of four matrix
warps, each with half of the K slices), `stream_weights` and `gather_rows`, which keep the ring
full, and the stage's own epilogue, which takes the teams' totals from `Sums` a row unit at a time
(`unit_total`). Two teams and two CTAs make four chains an SM whose latencies hide behind each
other. The grid is persistent and sweeps the tiles of one block after the other. Launched
dependently (PDL): the CTAs are set up while the kernel before still runs; the kernel after may
start once this one has seen its input.

What differs between the stages is in the records: which row of the activation a route reads
(`Rows.topk`), how many weight units an expert has (`Sizes.units`), what the epilogue makes of a
unit. One token without routing (`gemm1_token`) is the same with one team of eight warps, its row
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
    Ring,
    Sums,
    barriers,
    own_parity,
    own_slice,
    zeros,
)
from mixmoe.backends.hopper.mainloop import (
    advance,
    cp_async,
    cta_barrier,
    decode,
    fragment,
    load_raw,
    smem_cast,
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


class Sizes(NamedTuple):
    """Slots of a row of the activation; columns of the result (I or H); E, routes of a token;
    weight units of an expert, tiles of a block, stages of a tile; tiles, None: as routing made."""

    slots: Any
    columns: Any
    experts: Any
    topk: Any
    units: Any
    row_tiles: Any
    steps: Any
    tiles: Any


@constexpr_function
def tokens_of(block, part):
    """Columns of a team's product for each of `part` slices: an N of wgmma is 8 at least."""
    return block if block * part > 8 else 8 // part


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
    """STAGES of every team's weights, filled by FILLERS roles. rows: STAGES * TEAMS of them, or
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
def tiles_of(blocks, sizes, BLOCK: gl.constexpr):
    """Tiles of this call."""
    if sizes.tiles is None:
        return gl.load(blocks.total) // BLOCK * sizes.row_tiles
    else:
        return sizes.tiles


@gluon.jit
def routes_of(blocks, block, n, limit, BLOCK: gl.constexpr):
    """Routes n of a block, token | slot << 24; no token where the block or the list is shorter."""
    if blocks.ids is None:  # of one token, a block each
        return gl.where(n < BLOCK, block << 24, SENTINEL_MASK)
    else:
        return gl.load(
            blocks.ids + block * BLOCK + n, mask=(n < BLOCK) & (block < limit), other=SENTINEL_MASK
        )


@gluon.jit
def row_of(packed, topk):
    """The row that a route reads or writes: its own, or its token's where topk is None."""
    token = packed & SENTINEL_MASK
    if topk is None:
        return token.to(gl.int64)
    else:
        return (token * topk + (packed >> 24)).to(gl.int64)


@gluon.jit
def known(expert, sizes):
    """The expert, 0 instead of none: a stage expects bytes, and what comes of them is not used."""
    return gl.where((expert >= 0) & (expert < sizes.experts), expert, 0)


@gluon.jit
def stream_weights(w_desc, s_desc, ring, blocks, sizes, limit, BLOCK: gl.constexpr,
                   TEAMS: gl.constexpr, STAGES: gl.constexpr, EARLY: gl.constexpr):
    """Role of the producer warp: the weights of every tile of this CTA.

    The experts of `limit` blocks may be read, so that the first load waits for no count.
    """
    if not EARLY:
        gdc_wait()
    COLUMNS: gl.constexpr = w_desc.block_type.shape[1]
    expert = gl.load(blocks.experts + gl.program_id(0) // sizes.row_tiles).to(gl.int32)
    tiles = tiles_of(blocks, sizes, BLOCK)
    stage = tiles * 0
    phase = stage + 1
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        unit = known(expert, sizes) * sizes.units
        unit += tile % sizes.row_tiles * w_desc.block_type.shape[0]
        block = (tile + gl.num_programs(0)) // sizes.row_tiles
        expert = gl.load(blocks.experts + block, mask=block < limit, other=0).to(gl.int32)
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
                TOKENS: gl.constexpr, PART: gl.constexpr, TEAMS: gl.constexpr,
                STAGES: gl.constexpr, EARLY: gl.constexpr):
    """Role of the gather warps: each block's rows of the activation, as each team's B = (token,
    slice) rows of 128 slots.

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
    if not EARLY:
        gdc_wait()
    packed = routes_of(blocks, gl.program_id(0) // sizes.row_tiles, n // PART, limit, BLOCK)
    tiles = tiles_of(blocks, sizes, BLOCK)
    gdc_wait()
    gdc_launch_dependents()
    stage = tiles * 0
    phase = stage + 1
    late = stage
    issued = stage
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        live = (packed & SENTINEL_MASK) < tokens
        row = x.codes + row_of(packed, x.topk) * x.pitch
        ahead = tile + gl.num_programs(0)
        packed = routes_of(blocks, ahead // sizes.row_tiles, n // PART, limit, BLOCK)
        for step in range(sizes.steps):
            mbarrier.wait(ring.empty.index(stage), phase)
            for team in gl.static_range(TEAMS):
                at = (step * TEAMS + team) * (PART * 128) + k
                cp_async(ring.rows.index(stage * TEAMS + team), row[:, None] + at,
                         mask=live[:, None] & (at < sizes.slots))
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
             TOKENS: gl.constexpr, PART: gl.constexpr, TEAMS: gl.constexpr,
             STAGES: gl.constexpr, WIDE: gl.constexpr, EARLY: gl.constexpr,
             RESIDENT: gl.constexpr = False):
    """Role of a team of matrix warps: its slices of K of every tile of this CTA, to `sums`.

    The words of the next stage, be it the next tile's, are read while a product is under way.
    RESIDENT: ring.rows hold a row that stays, a step after the other.
    """
    WARPS: gl.constexpr = gl.num_warps()
    zero = zeros(1, TOKENS * PART)
    A: gl.constexpr = gl.DotOperandLayout(0, zero.type.layout, 4)
    if not EARLY:
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
            rows = ring.rows.index(step if RESIDENT else stage * TEAMS + team)
            part = warpgroup_mma(
                fragment(lo, hi, A, 1, WARPS), rows.permute((1, 0)), zero,
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
