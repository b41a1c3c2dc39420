"""The products of `prefill.grouped_prefill`: all of K for one tile, by one team of matrix warps.

`multiply` leaves the sum to the tensor cores' accumulator; `multiply_precise` adds it in float32
every 128 of K, `multiply_pairs` every 256. A team has one or two fragments of 64 weight rows. Sums
come as a tuple: for each fragment those of the products in WIDTHS, from the tile's first route on.

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
def widths_of(routes, main, fragments, added):
    """The products that a tile of so many routes is cut into, those beyond `main` in the last.

    added: columns of K after which they are added, and then they have 64 routes, or 32 where there
    are few or where registers allow no more; 0: never, and they have powers of two.
    """
    extra = max(routes - main, 0)
    routes -= extra
    if not added:
        low = 1 << (routes.bit_length() - 1)
        widths = (low,) if low == routes else (low, routes - low)
    else:
        many = (routes == 256 and extra) or (added == 256 and extra == 64)
        width = 32 if routes * fragments < 128 or many else 64
        widths = (width,) * (routes // width)
    return (*widths, extra) if extra else widths


@constexpr_function
def first_of(widths, i):
    """The first route of the i-th product."""
    return sum(widths[:i])


@gluon.jit
def next_words(ring, stage, phase, team: gl.constexpr, more):
    """The words and the scale bytes of each fragment once a stage is full; undefined where there is
    no `more`."""
    WARPS: gl.constexpr = gl.num_warps()
    FRAGMENTS: gl.constexpr = ring.words.shape[1] // (TEAMS * WARPS)
    mbarrier.wait(ring.full.index(stage), phase, pred=more)
    fence_async_shared()  # cp.async writes through the generic proxy, wgmma reads by async
    words = ()
    scales = ()
    for f in gl.static_range(team * FRAGMENTS, team * FRAGMENTS + FRAGMENTS):
        raw, scale = load_raw(
            ring.words.index(stage).slice(f * WARPS, WARPS, dim=0),
            ring.scales.index(stage).slice(f * WARPS, WARPS, dim=0), 1, WARPS,
        )  # fmt: skip
        words = words + (raw,)  # type: ignore[assignment]
        scales = scales + (scale,)  # type: ignore[assignment]
    return words, scales


@constexpr_function
def sums_layout(n):
    """Of the sums of 64 weight rows x n routes."""
    return gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, n, 32]
    )


@gluon.jit
def zeros(N: gl.constexpr):
    """The sums of 64 weight rows x N routes."""
    L: gl.constexpr = sums_layout(N)
    return gl.zeros([64, N], gl.float32, L)


@gluon.jit
def no_sums(WIDTHS: gl.constexpr, FRAGMENTS: gl.constexpr):
    """The tuple of sums, all zero."""
    sums = ()
    for _ in gl.static_range(FRAGMENTS):
        for i in gl.static_range(len(WIDTHS)):
            sums = sums + (zeros(WIDTHS[i]),)  # type: ignore[assignment]
    return sums


@gluon.jit
def multiply(
    ring, stage, phase, steps, team: gl.constexpr, WIDTHS: gl.constexpr, FRAGMENTS: gl.constexpr,
    WIDE: gl.constexpr,
):
    """All of K for one tile: (rows, width) of each fragment and product.

    Half of a fragment's K is dequantised while the half before it multiplies.
    """
    STAGES: gl.constexpr = ring.rows.shape[0]
    EACH: gl.constexpr = len(WIDTHS)
    sums = no_sums(WIDTHS, FRAGMENTS)
    words, scales = next_words(ring, stage, phase, team, steps > 0)
    for step in range(steps):
        issued = ()
        for f in gl.static_range(FRAGMENTS):
            lo, hi = decode(words[f], scales[f], WIDE)
            for i in gl.static_range(EACH):
                x = rows_of(ring, stage, first_of(WIDTHS, i), WIDTHS[i])
                acc = add_product(lo, hi, x, sums[f * EACH + i])
                issued = issued + (acc,)  # type: ignore[assignment]
        ahead, ahead_phase = advance(stage, phase, STAGES)
        words, scales = next_words(ring, ahead, ahead_phase, team, step + 1 < steps)
        if FRAGMENTS * EACH > 1:
            sums = warpgroup_mma_wait(0, deps=issued)
        else:
            sums = (warpgroup_mma_wait(0, deps=issued),)
        mbarrier.arrive(ring.empty.index(stage), count=1)
        stage = ahead
        phase = ahead_phase
    return sums, stage, phase


@gluon.jit
def multiply_precise(
    ring, stage, phase, steps, team: gl.constexpr, WIDTHS: gl.constexpr, FRAGMENTS: gl.constexpr,
    WIDE: gl.constexpr,
):
    """`multiply` with every 128 of K added in float32.

    FP8 tensor cores keep about 14 bits of a running sum. Two products are in flight: one is added
    to its total while the tensor cores have the next.
    """
    STAGES: gl.constexpr = ring.rows.shape[0]
    EACH: gl.constexpr = len(WIDTHS)
    COUNT: gl.constexpr = EACH * FRAGMENTS
    totals = no_sums(WIDTHS, FRAGMENTS)
    words, scales = next_words(ring, stage, phase, team, steps > 0)
    for step in range(steps):
        lo, hi = decode(words[0], scales[0], WIDE)
        sums = ()
        part = product(lo, hi, ring, stage, 0, WIDTHS)
        ahead, ahead_phase = advance(stage, phase, STAGES)
        for i in gl.static_range(COUNT):
            if i + 1 < COUNT:
                if (i + 1) % EACH == 0:
                    lo, hi = decode(words[(i + 1) // EACH], scales[(i + 1) // EACH], WIDE)
                following = product(lo, hi, ring, stage, (i + 1) % EACH, WIDTHS)
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
    ring, stage, phase, steps, team: gl.constexpr, WIDTHS: gl.constexpr, WIDE: gl.constexpr
):
    """`multiply_precise` of one fragment, added every 256 of K.

    Half as many additions, but two stages are given back at once, so the ring is long: with four
    stages of 288 routes this is slower (docs/measured-prefill.md).
    """
    totals = no_sums(WIDTHS, 1)
    words, scales = next_words(ring, stage, phase, team, steps > 0)
    left = steps
    for _ in range(steps // 2):
        totals, words, scales, stage, phase = add_stages(
            ring, totals, words, scales, stage, phase, left, team, WIDTHS, 2, WIDE
        )
        left -= 2
    for _ in range(steps % 2):
        totals, words, scales, stage, phase = add_stages(
            ring, totals, words, scales, stage, phase, left, team, WIDTHS, 1, WIDE
        )
    return totals, stage, phase


@gluon.jit
def add_stages(
    ring, totals, words, scales, stage, phase, left, team: gl.constexpr, WIDTHS: gl.constexpr,
    SPAN: gl.constexpr, WIDE: gl.constexpr,
):
    """totals + the products of SPAN stages, of which the first one's words are there; then the
    words of the stage after them, if there are more `left`."""
    STAGES: gl.constexpr = ring.rows.shape[0]
    COUNT: gl.constexpr = len(totals)
    after, after_phase = advance(stage, phase, STAGES)
    lo, hi = decode(words[0], scales[0], WIDE)
    first = (lo, hi, stage)
    part = product(lo, hi, ring, stage, 0, WIDTHS)
    second = first
    ahead, ahead_phase = after, after_phase
    if SPAN == 2:
        words, scales = next_words(ring, after, after_phase, team, True)
        lo, hi = decode(words[0], scales[0], WIDE)
        second = (lo, hi, after)
        part = more_product(second, ring, 0, WIDTHS, part)
        ahead, ahead_phase = advance(after, after_phase, STAGES)
    sums = ()
    for i in gl.static_range(COUNT):
        if i + 1 < COUNT:
            following = product(first[0], first[1], ring, stage, i + 1, WIDTHS)
            if SPAN == 2:
                following = more_product(second, ring, i + 1, WIDTHS, following)
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
def more_product(weights, ring, i: gl.constexpr, WIDTHS: gl.constexpr, acc):
    """Issue acc + weights (lo, hi, stage) times the i-th rows of their stage."""
    lo, hi, stage = weights
    L: gl.constexpr = sums_layout(WIDTHS[i])
    return whole_product(
        lo, hi, rows_of(ring, stage, first_of(WIDTHS, i), WIDTHS[i]), acc, L, ADD=True
    )


@gluon.jit
def product(lo, hi, ring, stage, i: gl.constexpr, WIDTHS: gl.constexpr):
    """Issue a fragment times the i-th rows of a stage."""
    L: gl.constexpr = sums_layout(WIDTHS[i])
    nothing = zeros(WIDTHS[i])
    x = rows_of(ring, stage, first_of(WIDTHS, i), WIDTHS[i])
    if i == 0:
        return add_product(lo, hi, x, nothing, ADD=False)
    else:
        return whole_product(lo, hi, x, nothing, L)


@gluon.jit
def rows_of(ring, stage, first: gl.constexpr, N: gl.constexpr):
    """N rows of a stage from `first` on."""
    MAIN: gl.constexpr = ring.rows.shape[1]
    if first == MAIN:
        return ring.extra.index(stage)
    elif N == MAIN:
        return ring.rows.index(stage)
    else:
        return ring.rows.index(stage).slice(first, N, dim=0)


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
