"""The products of `prefill.grouped_prefill`: all of K for one tile, by one team of matrix warps.

`multiply` leaves the sum to the tensor cores' accumulator, `multiply_precise` adds it in float32
every FLUSH steps of 128. A team waits for its own product inside every step or two, and the other
team multiplies: with two teams ptxas would serialise wgmma in flight over a loop edge (C7512).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mixmoe.backends.hopper.mainloop import advance, half_fragment, halves, load_units


@gluon.jit
def multiply(
    words, scales, xs, extra, full, empty, stage, phase, steps, team: gl.constexpr,
    N: gl.constexpr, N2: gl.constexpr, STAGES: gl.constexpr, TEAMS: gl.constexpr,
    WIDE: gl.constexpr,
):
    """All of K for one tile: acc (rows, N) and, if N2 > 8, acc2 (rows, N2).

    The second half of a step is dequantised while the first multiplies; then the team waits.
    """
    WARPS: gl.constexpr = gl.num_warps()
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
    for _ in range(steps):
        mbarrier.wait(full.index(stage), phase)
        fence_async_shared()  # cp.async writes through the generic proxy, wgmma reads by async
        x = xs.index(stage)
        x2 = extra.index(stage)
        if xs.shape[1] != N:
            x = x.slice(0, N, dim=0)
        lo, hi = load_units(
            words.index(stage * TEAMS + team), scales.index(stage * TEAMS + team), 1, WARPS, WIDE
        )
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
        if N2 > 8:
            acc, acc2 = warpgroup_mma_wait(0, deps=[acc, acc2])
        else:
            acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(stage), count=1)
        stage, phase = advance(stage, phase, STAGES)
    return acc, acc2, stage, phase


@gluon.jit
def multiply_precise(
    words, scales, xs, extra, full, empty, stage, phase, steps, team: gl.constexpr,
    N: gl.constexpr, N2: gl.constexpr, STAGES: gl.constexpr, TEAMS: gl.constexpr,
    WIDE: gl.constexpr, PARTS: gl.constexpr, FLUSH: gl.constexpr,
):
    """`multiply` with every FLUSH steps of K added in float32: totals (rows, N / PARTS), acc2.

    FP8 tensor cores keep about 14 bits of a running sum. `steps` is a multiple of FLUSH.
    """
    WARPS: gl.constexpr = gl.num_warps()
    L: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, N // PARTS, 32]
    )
    L2: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, N2, 32]
    )
    totals = ()
    for _ in gl.static_range(PARTS):
        zero = gl.zeros([WARPS * 16, N // PARTS], gl.float32, L)
        totals = totals + (zero,)  # type: ignore[assignment]
    acc2 = gl.zeros([WARPS * 16, N2], gl.float32, L2)
    for _ in range(steps // FLUSH):
        totals, acc2, stage, phase = flush(
            words, scales, xs, extra, full, empty, stage, phase, totals, acc2, team, STAGES, TEAMS,
            WIDE, FLUSH,
        )
    return totals, acc2, stage, phase


@gluon.jit
def flush(
    words, scales, xs, extra, full, empty, stage, phase, totals, acc2, team: gl.constexpr,
    STAGES: gl.constexpr, TEAMS: gl.constexpr, WIDE: gl.constexpr, STEPS: gl.constexpr,
):
    """STEPS steps of K, a part of the rows of x after the other.

    A part is added to its total while the tensor cores have the next one: two parts are in flight,
    none over the loop edge.
    """
    WARPS: gl.constexpr = gl.num_warps()
    PARTS: gl.constexpr = len(totals)
    N2: gl.constexpr = acc2.shape[1]
    low, high, slots = (), (), ()
    at, at_phase = stage, phase
    for _ in gl.static_range(STEPS):
        mbarrier.wait(full.index(at), at_phase)
        fence_async_shared()
        lo, hi = load_units(
            words.index(at * TEAMS + team), scales.index(at * TEAMS + team), 1, WARPS, WIDE
        )
        low = low + halves(lo)
        high = high + halves(hi)
        slots = slots + (at,)  # type: ignore[assignment]
        at, at_phase = advance(at, at_phase, STAGES)
    sums = ()
    part = product(low, high, xs, slots, 0, totals[0])
    for i in gl.static_range(PARTS):
        if i + 1 < PARTS:
            following = product(low, high, xs, slots, i + 1, totals[0])
            part = warpgroup_mma_wait(2 * STEPS, deps=[part])
        elif N2 > 8:
            following = product(low, high, extra, slots, 0, acc2)
            part = warpgroup_mma_wait(2 * STEPS, deps=[part])
        else:
            part = warpgroup_mma_wait(0, deps=[part])
        sums = sums + (totals[i] + part,)  # type: ignore[assignment]
        if i + 1 < PARTS or N2 > 8:
            part = following
    if N2 > 8:
        acc2 += warpgroup_mma_wait(0, deps=[part])
    for i in gl.static_range(STEPS):
        mbarrier.arrive(empty.index(slots[i]), count=1)
    return sums, acc2, at, at_phase


@gluon.jit
def product(low, high, rows, slots, part: gl.constexpr, like):
    """Issue the dequantised weights times rows part * N .. of x, over the steps in `slots`."""
    L: gl.constexpr = like.type.layout
    N: gl.constexpr = like.shape[1]
    A: gl.constexpr = gl.DotOperandLayout(0, L, 4)
    WARPS: gl.constexpr = gl.num_warps()
    acc = gl.zeros([WARPS * 16, N], gl.float32, L)
    for h in gl.static_range(len(low)):
        x = rows.index(slots[h // 2]).slice(part * N, N, dim=0).slice(h % 2 * 64, 64, dim=1)
        acc = warpgroup_mma(
            half_fragment(low[h], high[h], A, 1, WARPS), x.permute((1, 0)), acc, use_acc=h > 0,
            is_async=True,
        )  # fmt: skip
    return acc
