"""The other half of `gemm2_prefill.gemm2_ring`: who watches the ring, and who reads it."""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from mixmoe.backends.hopper.mainloop import advance, cta_barrier
from mixmoe.backends.hopper.signals import PITCH, glance, observe

LOOK = gl.constexpr(4)  # counters of a poll


class Slots(NamedTuple):
    """The barriers of the ring's slots in a CTA."""

    granted: Any
    done: Any
    ready: Any


class Counters(NamedTuple):
    """Of each group, how many CTAs have written and how many have read it."""

    written: Any
    reduced: Any


class Routes(NamedTuple):
    """Where a token's routes lie (T, topk), and by that position the scales of h and the routing
    weights, or None."""

    position: Any
    scales: Any
    weights: Any


class Places(NamedTuple):
    """The positions of the routes of this CTA's tokens and their factors, in shared memory."""

    positions: Any
    factors: Any


class Result(NamedTuple):
    """y, its row pitch, T, H."""

    rows: Any
    pitch: Any
    tokens: Any
    columns: Any


@gluon.jit
def complete(counts, i, grid):
    """How many of the first LOOK counts are complete before one is not."""
    return gl.min(gl.where(counts >= grid, LOOK, i), 0)


@gluon.jit
def watch(counters, slots, groups):
    """Role of the watching warp. Groups that all CTAs have written and slots that all have read are
    polled for together, LOOK of each, so that neither is held up by the other and a poll that took
    long may find several.

    A granted slot needs no acquire: the loads from it had returned before they were counted, and
    the stores to it are issued when the count has been seen.
    """
    RING: gl.constexpr = slots.granted.shape[0]
    grid = gl.num_programs(0)
    i = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0])) % LOOK
    full, free = grid * 0, grid * 0
    while full < groups:
        reads = glance(counters.reduced + gl.minimum(free + i, groups - 1) * PITCH)
        writes = observe(counters.written + gl.minimum(full + i, groups - 1) * PITCH)
        frees = gl.minimum(complete(reads, i, grid), gl.maximum(groups - RING - free, 0))
        fulls = gl.minimum(complete(writes, i, grid), groups - full)
        cta_barrier()  # every lane's acquire before one lane's arrival
        for _ in range(frees):
            mbarrier.arrive(slots.granted.index(free % RING), count=1)
            free += 1
        for _ in range(fulls):
            mbarrier.arrive(slots.ready.index(full % RING), count=1)
            full += 1


@gluon.jit
def place(routes, places, t0, t1, TOPK: gl.constexpr, SCALED: gl.constexpr):
    """Where the rows of this CTA's tokens lie in a slot (-1: nowhere), and their factors."""
    N: gl.constexpr = places.positions.shape[1]
    n = gl.arange(0, N, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    for i in range(places.positions.shape[0] // TOPK):
        t = t0 + i * N + n
        rows = ()
        for k in gl.static_range(TOPK):
            p = gl.load(routes.position + t * TOPK + k, mask=t < t1, other=-1)
            rows = rows + (p,)  # type: ignore[assignment]
        for k in gl.static_range(TOPK):
            p = rows[k]
            f = gl.where(p >= 0, 1.0, 0.0)
            if routes.weights is not None:
                f *= gl.load(routes.weights + p, mask=p >= 0, other=0.0)
            if SCALED:
                f *= gl.load(routes.scales + p, mask=p >= 0, other=0.0)
            places.positions.index(i * TOPK + k).store(p)
            places.factors.index(i * TOPK + k).store(f)


@gluon.jit
def ring_rows(ring_ptr, first, slot_rows, positions, i: gl.constexpr, L: gl.constexpr):
    """The i-th of a lane's rows of the slices from the ring's `first` on."""
    ROWS: gl.constexpr = positions.shape[0]
    base = ring_ptr + ((first + i // ROWS) * slot_rows).to(gl.int64) * 64
    p = positions.index(i % ROWS).load(gl.SliceLayout(1, L))
    c = gl.arange(0, 64, layout=gl.SliceLayout(0, L))
    return gl.load(
        base + p[:, None] * 64 + c[None, :], mask=(p >= 0)[:, None], other=0.0,
        cache_modifier=".cg",
    )  # fmt: skip


@gluon.jit
def reduce(
    ring_ptr, out, routes, places, ready, reduced_ptr, slot_rows, groups, TOPK: gl.constexpr,
    GROUP: gl.constexpr, AHEAD: gl.constexpr, SCALED: gl.constexpr,
):
    """Role of the reducing warps: y = sum over the slots, float32, of ring rows x their factors.

    AHEAD rows a lane are under way at any time within a slice.
    """
    N: gl.constexpr = places.positions.shape[1]
    L: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    n = gl.arange(0, N, layout=gl.SliceLayout(1, L))
    c = gl.arange(0, 64, layout=gl.SliceLayout(0, L))
    grid = gl.num_programs(0)
    t0 = (gl.program_id(0).to(gl.int64) * out.tokens // grid).to(gl.int32)
    t1 = ((gl.program_id(0) + 1).to(gl.int64) * out.tokens // grid).to(gl.int32)
    place(routes, places, t0, t1, TOPK, SCALED)
    cta_barrier()
    slot, turn = 0, 0
    ROWS: gl.constexpr = places.positions.shape[0]  # of a lane and slice
    for group in range(groups):
        mbarrier.wait(ready.index(slot), turn)
        row = ()
        for i in gl.static_range(AHEAD if AHEAD < GROUP * ROWS else GROUP * ROWS):
            ahead = ring_rows(ring_ptr, slot * GROUP, slot_rows, places.positions, i, L)
            row = row + (ahead,)  # type: ignore[assignment]
        total = gl.zeros([N, 64], gl.float32, L)
        for i in gl.static_range(GROUP * ROWS):
            f = places.factors.index(i % ROWS).load(gl.SliceLayout(1, L))
            total += row[i].to(gl.float32) * f[:, None]
            if i + AHEAD < GROUP * ROWS:
                ahead = ring_rows(ring_ptr, slot * GROUP, slot_rows, places.positions, i + AHEAD, L)
                row = row + (ahead,)
            if i % TOPK + 1 == TOPK:
                t = t0 + i % ROWS // TOPK * N + n
                column = (group * GROUP + i // ROWS) * 64 + c
                gl.store(
                    out.rows + t.to(gl.int64)[:, None] * out.pitch + column[None, :],
                    total.to(out.rows.dtype.element_ty),
                    mask=(t < t1)[:, None] & (column < out.columns)[None, :], cache_modifier=".cs",
                )
                total = gl.zeros([N, 64], gl.float32, L)
        # Relaxed: a store above was issued only when the loads it needs had returned, which is all
        # that a later write to the slot has to wait for.
        cta_barrier()
        gl.atomic_add(reduced_ptr + group * PITCH, 1, sem="relaxed")
        slot, turn = advance(slot, turn, ready.shape[0])
