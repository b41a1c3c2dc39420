"""The products of `prefill.grouped_prefill`: all of K for one tile, by one team of matrix warps.

`multiply` leaves the sum to the tensor cores' accumulator, `multiply_precise` adds it in float32
every 128 of K. A team waits for its own product inside every step, and the other team multiplies:
with two teams ptxas would serialise wgmma in flight over a loop edge (C7512). Before it waits it
reads the words of the next step, and decodes them behind the wait (before it: C7513).
"""

from typing import Any, NamedTuple

from triton import constexpr_function
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mixmoe.backends.hopper.mainloop import (
    advance,
    decode,
    half_fragment,
    halves,
    load_raw,
)


class Ring(NamedTuple):
    """Stages of every team's weights, of the rows of a tile's main routes and of its extra ones;
    `full` and `empty` guard each stage."""

    words: Any
    scales: Any
    rows: Any
    extra: Any
    full: Any
    empty: Any


@constexpr_function
def parts_of(n, n2):
    """Into how many products `multiply_precise` cuts the n routes of a tile: of 64, or of 32 where
    n is less than 128, or 256 and n2 more."""
    part = 32 if n < 128 or (n == 256 and n2 > 8) else 64
    return n // part


@gluon.jit
def next_words(ring, stage, phase, team: gl.constexpr, more):
    """The words and scale bytes of a stage once it is full; undefined where there is no `more`."""
    slot = stage * (ring.words.shape[0] // ring.rows.shape[0]) + team
    mbarrier.wait(ring.full.index(stage), phase, pred=more)
    fence_async_shared()  # cp.async writes through the generic proxy, wgmma reads by async
    return load_raw(ring.words.index(slot), ring.scales.index(slot), 1, gl.num_warps())


@gluon.jit
def multiply(
    ring, stage, phase, steps, team: gl.constexpr, N: gl.constexpr, N2: gl.constexpr,
    WIDE: gl.constexpr,
):
    """All of K for one tile: acc (rows, N) and, if N2 > 8, acc2 (rows, N2).

    The second half of a step is dequantised while the first multiplies.
    """
    WARPS: gl.constexpr = gl.num_warps()
    STAGES: gl.constexpr = ring.rows.shape[0]
    L: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, N, 32]
    )
    L2: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, N2, 32]
    )
    A: gl.constexpr = gl.DotOperandLayout(0, L, 4)
    A2: gl.constexpr = gl.DotOperandLayout(0, L2, 4)
    acc = gl.zeros([WARPS * 16, N], gl.float32, L)
    acc2 = gl.zeros([WARPS * 16, N2], gl.float32, L2)
    raw, scale = next_words(ring, stage, phase, team, steps > 0)
    for step in range(steps):
        x = ring.rows.index(stage)
        x2 = ring.extra.index(stage)
        if ring.rows.shape[1] != N:
            x = x.slice(0, N, dim=0)
        lo, hi = decode(raw, scale, WIDE)
        low, high = halves(lo), halves(hi)
        for h in gl.static_range(2):
            a = half_fragment(low[h], high[h], A, 1, WARPS)
            acc = warpgroup_mma(
                a, x.slice(h * 64, 64, dim=1).permute((1, 0)), acc, is_async=True
            )
            if N2 > 8:
                a2 = gl.convert_layout(a, A2, assert_trivial=True)
                acc2 = warpgroup_mma(
                    a2, x2.slice(h * 64, 64, dim=1).permute((1, 0)), acc2, is_async=True
                )
        ahead, ahead_phase = advance(stage, phase, STAGES)
        raw, scale = next_words(ring, ahead, ahead_phase, team, step + 1 < steps)
        if N2 > 8:
            acc, acc2 = warpgroup_mma_wait(0, deps=[acc, acc2])
        else:
            acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(ring.empty.index(stage), count=1)
        stage = ahead
        phase = ahead_phase
    return acc, acc2, stage, phase


@gluon.jit
def multiply_precise(
    ring, stage, phase, steps, team: gl.constexpr, N: gl.constexpr, N2: gl.constexpr,
    PARTS: gl.constexpr, WIDE: gl.constexpr,
):
    """`multiply` with every 128 of K added in float32: totals (rows, N / PARTS), acc2.

    FP8 tensor cores keep about 14 bits of a running sum. Two parts of the rows of x are in flight:
    one is added to its total while the tensor cores have the next.
    """
    WARPS: gl.constexpr = gl.num_warps()
    STAGES: gl.constexpr = ring.rows.shape[0]
    L: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, N // PARTS, 32]
    )
    L2: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, N2, 32]
    )
    zero = gl.zeros([WARPS * 16, N // PARTS], gl.float32, L)
    totals = ()
    for _ in gl.static_range(PARTS):
        totals = totals + (zero,)  # type: ignore[assignment]
    acc2 = gl.zeros([WARPS * 16, N2], gl.float32, L2)
    raw, scale = next_words(ring, stage, phase, team, steps > 0)
    for step in range(steps):
        lo, hi = decode(raw, scale, WIDE)
        low, high = halves(lo), halves(hi)
        sums = ()
        part = product(low, high, ring.rows.index(stage), 0, zero)
        ahead, ahead_phase = advance(stage, phase, STAGES)
        for i in gl.static_range(PARTS):
            if i + 1 < PARTS:
                following = product(low, high, ring.rows.index(stage), i + 1, zero)
                part = warpgroup_mma_wait(2, deps=[part])
            elif N2 > 8:
                following = product(low, high, ring.extra.index(stage), 0, acc2)
                part = warpgroup_mma_wait(2, deps=[part])
            else:
                raw, scale = next_words(ring, ahead, ahead_phase, team, step + 1 < steps)
                part = warpgroup_mma_wait(0, deps=[part])
            sums = sums + (totals[i] + part,)  # type: ignore[assignment]
            if i + 1 < PARTS or N2 > 8:
                part = following
        if N2 > 8:
            raw, scale = next_words(ring, ahead, ahead_phase, team, step + 1 < steps)
            acc2 += warpgroup_mma_wait(0, deps=[part])
        totals = sums
        mbarrier.arrive(ring.empty.index(stage), count=1)
        stage = ahead
        phase = ahead_phase
    return totals, acc2, stage, phase


@gluon.jit
def product(low, high, rows, part: gl.constexpr, like):
    """Issue the dequantised weights times rows part * N .. of a stage of x."""
    L: gl.constexpr = like.type.layout
    N: gl.constexpr = like.shape[1]
    A: gl.constexpr = gl.DotOperandLayout(0, L, 4)
    WARPS: gl.constexpr = gl.num_warps()
    acc = gl.zeros([WARPS * 16, N], gl.float32, L)
    for h in gl.static_range(2):
        x = rows.slice(part * N, N, dim=0).slice(h * 64, 64, dim=1)
        acc = warpgroup_mma(
            half_fragment(low[h], high[h], A, 1, WARPS), x.permute((1, 0)), acc, use_acc=h > 0,
            is_async=True,
        )  # fmt: skip
    return acc
