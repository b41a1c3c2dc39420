"""The products of `prefill.grouped_prefill`: all of K for one tile, by one team of matrix warps.

`multiply` leaves the sum to the tensor cores' accumulator; `multiply_precise` adds it in float32
every 128 of K, `multiply_pairs` every 256. A team has one or two fragments of 64 weight rows. Sums
come as a tuple: for each fragment the parts of the main routes, then the extra ones (N2 > 8).

A team waits for its own product inside every step, and the other team multiplies: with two teams
ptxas would serialise wgmma in flight over a loop edge (C7512). Before it waits it reads the words
of the next step, and decodes them behind the wait (before it: C7513).
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
    fragment,
    half_fragment,
    halves,
    load_raw,
)

TEAMS = gl.constexpr(2)


class Ring(NamedTuple):
    """Stages of both teams' weights, of the rows of a tile's main routes and of its extra ones;
    `full` and `empty` guard each stage."""

    words: Any
    scales: Any
    rows: Any
    extra: Any
    full: Any
    empty: Any


@constexpr_function
def parts_of(n, n2, fragments, paired):
    """Into how many products `multiply_precise` and (paired) `multiply_pairs` cut the n routes of a
    tile: of 64, or of 32 where there are few, or where registers allow no more."""
    many = (n == 256 and n2 > 8) or (paired and n2 == 64)
    return n // (32 if n * fragments < 128 or many else 64)


@gluon.jit
def next_words(ring, stage, phase, team: gl.constexpr, more):
    """The words and the scale bytes of each fragment once a stage is full; undefined where there is
    no `more`."""
    WARPS: gl.constexpr = gl.num_warps()
    slot = stage * TEAMS + team
    mbarrier.wait(ring.full.index(stage), phase, pred=more)
    fence_async_shared()  # cp.async writes through the generic proxy, wgmma reads by async
    words = ()
    scales = ()
    for f in gl.static_range(ring.words.shape[1] // WARPS):
        raw, scale = load_raw(
            ring.words.index(slot).slice(f * WARPS, WARPS, dim=0),
            ring.scales.index(slot).slice(f * WARPS, WARPS, dim=0), 1, WARPS,
        )  # fmt: skip
        words = words + (raw,)  # type: ignore[assignment]
        scales = scales + (scale,)  # type: ignore[assignment]
    return words, scales


@gluon.jit
def zeros(N: gl.constexpr):
    """The sums of 64 weight rows x N routes."""
    WARPS: gl.constexpr = gl.num_warps()
    L: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, N, 32]
    )
    return gl.zeros([WARPS * 16, N], gl.float32, L)


@gluon.jit
def no_sums(N: gl.constexpr, N2: gl.constexpr, PARTS: gl.constexpr, FRAGMENTS: gl.constexpr):
    """The tuple of sums, all zero."""
    sums = ()
    for _ in gl.static_range(FRAGMENTS):
        for _part in gl.static_range(PARTS):
            sums = sums + (zeros(N // PARTS),)  # type: ignore[assignment]
        if N2 > 8:
            sums = sums + (zeros(N2),)  # type: ignore[assignment]
    return sums


@gluon.jit
def multiply(
    ring, stage, phase, steps, team: gl.constexpr, N: gl.constexpr, N2: gl.constexpr,
    FRAGMENTS: gl.constexpr, WIDE: gl.constexpr,
):
    """All of K for one tile: (rows, N) and, if N2 > 8, (rows, N2) of each fragment.

    Half of a fragment's K is dequantised while the half before it multiplies.
    """
    STAGES: gl.constexpr = ring.rows.shape[0]
    BOTH: gl.constexpr = 2 if N2 > 8 else 1
    sums = no_sums(N, N2, 1, FRAGMENTS)
    words, scales = next_words(ring, stage, phase, team, steps > 0)
    for step in range(steps):
        x = ring.rows.index(stage)
        if ring.rows.shape[1] != N:
            x = x.slice(0, N, dim=0)
        issued = ()
        for f in gl.static_range(FRAGMENTS):
            lo, hi = decode(words[f], scales[f], WIDE)
            acc = add_product(lo, hi, x, sums[f * BOTH])
            issued = issued + (acc,)  # type: ignore[assignment]
            if N2 > 8:
                acc = add_product(lo, hi, ring.extra.index(stage), sums[f * BOTH + 1])
                issued = issued + (acc,)  # type: ignore[assignment]
        ahead, ahead_phase = advance(stage, phase, STAGES)
        words, scales = next_words(ring, ahead, ahead_phase, team, step + 1 < steps)
        if FRAGMENTS * BOTH > 1:
            sums = warpgroup_mma_wait(0, deps=issued)
        else:
            sums = (warpgroup_mma_wait(0, deps=issued),)
        mbarrier.arrive(ring.empty.index(stage), count=1)
        stage = ahead
        phase = ahead_phase
    return sums, stage, phase


@gluon.jit
def multiply_precise(
    ring, stage, phase, steps, team: gl.constexpr, N: gl.constexpr, N2: gl.constexpr,
    PARTS: gl.constexpr, FRAGMENTS: gl.constexpr, WIDE: gl.constexpr,
):
    """`multiply` with every 128 of K added in float32, the main routes in parts (rows, N / PARTS).

    FP8 tensor cores keep about 14 bits of a running sum. Two products are in flight: one is added
    to its total while the tensor cores have the next.
    """
    STAGES: gl.constexpr = ring.rows.shape[0]
    EACH: gl.constexpr = PARTS + (1 if N2 > 8 else 0)
    COUNT: gl.constexpr = EACH * FRAGMENTS
    totals = no_sums(N, N2, PARTS, FRAGMENTS)
    words, scales = next_words(ring, stage, phase, team, steps > 0)
    for step in range(steps):
        lo, hi = decode(words[0], scales[0], WIDE)
        sums = ()
        part = product(lo, hi, ring, stage, 0, PARTS, totals[0])
        ahead, ahead_phase = advance(stage, phase, STAGES)
        for i in gl.static_range(COUNT):
            if i + 1 < COUNT:
                if (i + 1) % EACH == 0:
                    lo, hi = decode(words[(i + 1) // EACH], scales[(i + 1) // EACH], WIDE)
                following = product(lo, hi, ring, stage, (i + 1) % EACH, PARTS, totals[i + 1])
                part = warpgroup_mma_wait(2 if (i + 1) % EACH == 0 else 1, deps=[part])
            else:
                words, scales = next_words(ring, ahead, ahead_phase, team, step + 1 < steps)
                part = warpgroup_mma_wait(0, deps=[part])
            sums = sums + (totals[i] + part,)  # type: ignore[assignment]
            if i + 1 < COUNT:
                part = following
        totals = sums
        mbarrier.arrive(ring.empty.index(stage), count=1)
        stage = ahead
        phase = ahead_phase
    return totals, stage, phase


@gluon.jit
def multiply_pairs(
    ring, stage, phase, steps, team: gl.constexpr, N: gl.constexpr, N2: gl.constexpr,
    PARTS: gl.constexpr, WIDE: gl.constexpr,
):
    """`multiply_precise` of one fragment, added every 256 of K.

    Half as many additions, but two stages are given back at once, so the ring is long: with four
    stages of 288 routes this is slower (docs/measured-prefill.md).
    """
    totals = no_sums(N, N2, PARTS, 1)
    words, scales = next_words(ring, stage, phase, team, steps > 0)
    left = steps
    for _ in range(steps // 2):
        totals, words, scales, stage, phase = add_stages(
            ring, totals, words, scales, stage, phase, left, team, PARTS, 2, WIDE
        )
        left -= 2
    for _ in range(steps % 2):
        totals, words, scales, stage, phase = add_stages(
            ring, totals, words, scales, stage, phase, left, team, PARTS, 1, WIDE
        )
    return totals, stage, phase


@gluon.jit
def add_stages(
    ring, totals, words, scales, stage, phase, left, team: gl.constexpr, PARTS: gl.constexpr,
    SPAN: gl.constexpr, WIDE: gl.constexpr,
):
    """totals + the products of SPAN stages, of which the first one's words are there; then the
    words of the stage after them, if there are more `left`."""
    STAGES: gl.constexpr = ring.rows.shape[0]
    COUNT: gl.constexpr = len(totals)
    after, after_phase = advance(stage, phase, STAGES)
    lo, hi = decode(words[0], scales[0], WIDE)
    first = (lo, hi, stage)
    part = product(lo, hi, ring, stage, 0, PARTS, totals[0])
    second = first
    ahead, ahead_phase = after, after_phase
    if SPAN == 2:
        words, scales = next_words(ring, after, after_phase, team, True)
        lo, hi = decode(words[0], scales[0], WIDE)
        second = (lo, hi, after)
        part = more_product(second, ring, 0, PARTS, part, totals[0])
        ahead, ahead_phase = advance(after, after_phase, STAGES)
    sums = ()
    for i in gl.static_range(COUNT):
        if i + 1 < COUNT:
            following = product(first[0], first[1], ring, stage, i + 1, PARTS, totals[i + 1])
            if SPAN == 2:
                following = more_product(second, ring, i + 1, PARTS, following, totals[i + 1])
            part = warpgroup_mma_wait(SPAN, deps=[part])
        else:
            words, scales = next_words(ring, ahead, ahead_phase, team, left > SPAN)
            part = warpgroup_mma_wait(0, deps=[part])
        sums = sums + (totals[i] + part,)  # type: ignore[assignment]
        if i + 1 < COUNT:
            part = following
    mbarrier.arrive(ring.empty.index(stage), count=1)
    if SPAN == 2:
        mbarrier.arrive(ring.empty.index(after), count=1)
    return sums, words, scales, ahead, ahead_phase


@gluon.jit
def more_product(weights, ring, part: gl.constexpr, PARTS: gl.constexpr, acc, like):
    """Issue acc, whose type is that of `like`, + weights (lo, hi, stage) times a part of their
    stage's rows."""
    lo, hi, stage = weights
    L: gl.constexpr = like.type.layout
    x = rows_of(ring, stage, part, PARTS, like.shape[1])
    return whole_product(lo, hi, x, acc, L, ADD=True)


@gluon.jit
def product(lo, hi, ring, stage, part: gl.constexpr, PARTS: gl.constexpr, like):
    """Issue a fragment times a part of a stage's rows: the extra ones are the part after PARTS."""
    N: gl.constexpr = like.shape[1]
    L: gl.constexpr = like.type.layout
    nothing = zeros(N)
    x = rows_of(ring, stage, part, PARTS, N)
    if part == 0:
        return add_product(lo, hi, x, nothing, ADD=False)
    else:
        return whole_product(lo, hi, x, nothing, L)


@gluon.jit
def rows_of(ring, stage, part: gl.constexpr, PARTS: gl.constexpr, N: gl.constexpr):
    """The N rows of a part of a stage."""
    if part < PARTS:
        return ring.rows.index(stage).slice(part * N, N, dim=0)
    else:
        return ring.extra.index(stage)


@gluon.jit
def add_product(lo, hi, x, acc, ADD: gl.constexpr = True):
    """Issue acc + a decoded fragment times rows x (N, 128), or the product alone, in two halves of
    K: the first does not wait until the second is decoded."""
    WARPS: gl.constexpr = gl.num_warps()
    A: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 4)
    low, high = halves(lo), halves(hi)
    for h in gl.static_range(2):
        acc = warpgroup_mma(
            half_fragment(low[h], high[h], A, 1, WARPS),
            x.slice(h * 64, 64, dim=1).permute((1, 0)), acc, use_acc=ADD or h > 0, is_async=True,
        )  # fmt: skip
    return acc


@gluon.jit
def whole_product(lo, hi, x, acc, L: gl.constexpr, ADD: gl.constexpr = False):
    """`add_product` at once, a group and a descriptor less. L: the layout of acc."""
    A: gl.constexpr = gl.DotOperandLayout(0, L, 4)
    a = fragment(lo, hi, A, 1, gl.num_warps())
    return warpgroup_mma(a, x.permute((1, 0)), acc, use_acc=ADD, is_async=True)
