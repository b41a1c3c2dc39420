"""Which blocks of 32 routes each CTA of `gemm2_ring` keeps, from expert counts, on the device.

The CTAs go through the columns in step, so the slowest sets the pace. In a slice of 64 columns one
takes time for every block of routes, and about as much as for one of them again for every expert
whose weights it loads and decodes (H200, 2026-11-28, DeepSeek-V3 TP8: 0.4 us each). So a segment
of n blocks counts n + 1 cells, and the CTAs are filled by cells:

1.  `cells` of a CTA: ceil((blocks + experts) / CTAs), which no cut undercuts; or else 1 more.
2.  Whole parts: an expert's first blocks, `part` of them a CTA, as many as fill one.
3.  Rests, fewer than `part` blocks an expert, are not cut again. A CTA takes the largest that is
    left, then the largest that fits beside it, and so on (first fit decreasing), until there are
    CTAs enough for one rest each. Only numbers of rests by size are needed to find out what every
    CTA takes, and CTAs that take the same sizes are found at once.
4.  Where that asks for more CTAs than there are, the line of all rests, each after a cell of its
    own, is cut equally. A piece may begin within a rest, whose weights are then loaded twice, which
    is the 1 more cell. Were that more blocks than a CTA has room for, rests count blocks alone.
"""

import triton
import triton.language as tl

REST_SIZES = tl.constexpr(32)  # sizes of a rest, from 0: more than any CTA has room for


@triton.jit
def cut_parts(blocks, part):
    """How many whole parts each expert has, its rest, and how many parts there are."""
    whole = blocks // part
    return whole, blocks - whole * part, tl.sum(whole, 0)


@triton.jit
def count_sizes(rest, ROOM: tl.constexpr):
    """How many rests of each size there are; of none, no number."""
    size = tl.arange(0, REST_SIZES)
    left = tl.zeros((REST_SIZES,), tl.int32)
    for n in tl.static_range(1, ROOM):
        left = tl.where(size == n, tl.sum((rest == n).to(tl.int32), 0), left)
    return left


@triton.jit
def largest(which):
    """The largest size of those marked, or 0."""
    return tl.max(tl.where(which, tl.arange(0, REST_SIZES), 0), 0)


@triton.jit
def fill(left, cells, ROOM: tl.constexpr):
    """Rests of a CTA by size, the largest that fits first; how many CTAs can take the same."""
    size = tl.arange(0, REST_SIZES)
    load = tl.zeros((REST_SIZES,), tl.int32)
    room = cells * 0 + ROOM
    rest = largest(left > 0)
    while rest > 0:
        load += (size == rest).to(tl.int32)
        cells -= rest + 1
        room -= rest
        rest = largest((left > load) & (size < cells) & (size <= room))
    times = tl.where(load > 0, left // tl.maximum(load, 1), 1 << 20)
    return load, tl.min(times, 0)


@triton.jit
def pack(left, cells, cta, ctas, ROOM: tl.constexpr):
    """First fit decreasing of `left` rests by size into so many CTAs: how many it takes (or more
    than there are), what CTA number `cta` takes, and how many of each size those before it take.

    As soon as there are CTAs enough, each rest has its own: two segments cost a CTA more than the
    cells say (H200, 2026-11-28, Qwen3 TP4, T 2048: 131 us, 116 with one a CTA and as many cells).
    """
    used = cells * 0
    taken = tl.zeros((REST_SIZES,), tl.int32)
    mine = tl.zeros((REST_SIZES,), tl.int32)
    first = tl.zeros((REST_SIZES,), tl.int32)
    rests = tl.sum(left, 0)
    while (rests > 0) & (used <= ctas):
        load, times = fill(left, tl.where(rests > ctas - used, cells, 0), ROOM)
        own = (used <= cta) & (cta < used + times)
        mine = tl.where(own, load, mine)
        first = tl.where(own, taken + (cta - used) * load, first)
        left -= times * load
        taken += times * load
        used += times
        rests = tl.sum(left, 0)
    return used, mine, first


@triton.jit
def put(at, hit, e, begin, last, offset, blocks):
    """A segment of so many blocks from block `offset` on of the expert that `hit` marks; where the
    next one goes."""
    low = tl.sum(hit * begin, 0) + offset
    tl.store(at, tl.sum(hit * e, 0))
    tl.store(at + 1, low)
    tl.store(at + 2, blocks)
    tl.store(at + 3, tl.minimum(tl.sum(hit * last, 0), (low + blocks) * 32) - low * 32)
    return at + 4


@triton.jit
def put_part(at, e, begin, last, whole, part, number):
    """The whole part of that number."""
    end = tl.cumsum(whole, 0)
    hit = ((end - whole <= number) & (number < end)).to(tl.int32)
    return put(at, hit, e, begin, last, (number - tl.sum(hit * (end - whole), 0)) * part, part)


@triton.jit
def put_rests(at, e, begin, last, rest, mine, first):
    """Rests by size: `mine` of them, after the `first` of that size."""
    size = tl.arange(0, REST_SIZES)
    n = largest(mine > 0)
    while n > 0:
        alike = (rest == n).to(tl.int32)
        rank = tl.sum(tl.where(size == n, first, 0), 0)
        hit = tl.where(tl.cumsum(alike, 0) == rank + 1, alike, 0)
        at = put(at, hit, e, begin, last, 0, n)
        first += (size == n).to(tl.int32)
        mine -= (size == n).to(tl.int32)
        n = largest(mine > 0)
    return at


@triton.jit
def put_line(at, e, begin, last, rest, cta, ctas, ROOM: tl.constexpr):
    """The piece of CTA number `cta` of the line of all rests, cut equally."""
    live = (rest > 0).to(tl.int32)
    longest = (tl.sum(rest + live, 0) + ctas - 1) // ctas
    head = tl.where(longest <= ROOM + 1, 1, 0)
    end = tl.cumsum(rest + head * live, 0)
    from_cell = end - rest - head * live
    total = tl.max(end, 0)
    low = cta * total // ctas
    high = (cta + 1) * total // ctas
    while low < high:
        hit = ((from_cell <= low) & (low < end)).to(tl.int32)
        zero = tl.sum(hit * from_cell, 0) + head  # the rest's first block
        stop = tl.minimum(tl.sum(hit * end, 0), high)
        offset = tl.maximum(low - zero, 0)
        if stop - zero > offset:
            at = put(at, hit, e, begin, last, offset, stop - zero - offset)
        low = stop
    return at


@triton.jit
def write_segments(routes, start, e, cta, ctas, segments_ptr, ROOM: tl.constexpr):
    """The list of CTA number `cta`: the first ones take rests, the last ones whole parts.

    One warp makes it, so that the sums over experts stay within a warp: 16 lists a program of eight
    warps took 23 us (H200, 2026-11-28).
    """
    tl.static_assert(ROOM < REST_SIZES)
    blocks = (routes + 31) // 32
    total = tl.sum(blocks, 0)
    ideal = (total + tl.sum((blocks > 0).to(tl.int32), 0) + ctas - 1) // ctas
    cells = ideal - 1
    part, free, used = ideal * 0 + 1, ideal * 0, ideal * 0 + 1
    whole, rest = blocks, blocks * 0
    mine = tl.zeros((REST_SIZES,), tl.int32)
    first = tl.zeros((REST_SIZES,), tl.int32)
    while (cells <= ideal) & (used > free):
        cells += 1
        part = tl.maximum(tl.minimum(cells - 1, ROOM), 1)
        whole, rest, parts = cut_parts(blocks, part)
        free = ctas - parts
        used = free + 1
        if total + parts + tl.sum((rest > 0).to(tl.int32), 0) <= ctas * cells:  # else: hopeless
            used, mine, first = pack(count_sizes(rest, ROOM), cells, cta, free, ROOM)
    at = segments_ptr + cta * (4 * (ROOM + 1))
    begin = start // 32
    last = start + routes
    if cta >= free:
        at = put_part(at, e, begin, last, whole, part, cta - free)
    elif used <= free:
        at = put_rests(at, e, begin + whole * part, last, rest, mine, first)
    else:
        at = put_line(at, e, begin + whole * part, last, rest, cta, free, ROOM)
    tl.store(at, -1)
