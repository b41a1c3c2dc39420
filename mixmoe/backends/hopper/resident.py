"""Rows of h (or x) that stay in shared memory as e4m3, while the weights stream past them.

h arrives as float32 and is quantised here, once for each block or token that a CTA works on (its
share of the tiles is contiguous). So only h ties stage 2 to the kernel before it: under
programmatic dependent launch its weight ring fills while stage 1 still runs.
"""

from typing import Any, NamedTuple

from torch import Tensor
from triton import constexpr_function
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from mixmoe.backends.hopper.mainloop import column_of, cp_async, cta_barrier
from mixmoe.backends.hopper.quantise import quotient
from mixmoe.backends.hopper.slots import SlotRows

TINY = gl.constexpr(2.0**-126)  # the least scale of a row, as in mixmoe.formats


class Hidden(NamedTuple):
    """h (T * topk, I): float32 and no scales, or e4m3 slots with a float32 scale per row."""

    rows: Any
    scales: Any


class Sizes(NamedTuple):
    """H, I, E, routes of a token; weight units of an expert, tiles of a block, stages of a tile."""

    hidden: Any
    intermediate: Any
    experts: Any
    topk: Any
    units: Any
    row_tiles: Any
    steps: Any


@constexpr_function
def resident_layout(rows, warps, quantised):
    """Registers of (rows, 128) values of h: 4 to 16 consecutive ones a thread, 16 if e4m3."""
    run = 16 if quantised else min(16, max(4, rows * 4 // warps))
    return gl.BlockedLayout([1, run], [run // 4, 128 // run], [warps, 1], [1, 0])


@constexpr_function
def vector_layout(layout, dims):
    """Layout of a vector along the dimension of `layout` that is left without `dims`."""
    for dim in dims:
        layout = gl.SliceLayout(dim, layout)
    return layout


@gluon.jit
def place_of(row, group, columns, at, SPAN: gl.constexpr, CHUNKS: gl.constexpr, L: gl.constexpr):
    """Group `group` of h as wgmma's B (N, 128): row n is chunk n mod SPAN of route n // SPAN.

    A stage holds SPAN * CHUNKS consecutive chunks of K, CHUNKS of them to a slice; slot s of a
    chunk is its column at[s]. Returns offsets into h (T * topk, columns) and whether they lie
    inside a row.
    """
    piece = gl.arange(0, row.shape[0], layout=gl.SliceLayout(1, L)) % SPAN
    chunk = group // CHUNKS * (SPAN * CHUNKS) + piece * CHUNKS + group % CHUNKS
    k = chunk[:, None] * 128 + at[None, :]
    return row[:, None] * columns + k, k < columns


@gluon.jit
def load_groups(h, row, live, first, columns, COUNT: gl.constexpr, SPAN: gl.constexpr,
                CHUNKS: gl.constexpr, L: gl.constexpr):
    """COUNT groups of h as float32, all loads under way at once; rows that are not live are 0.

    The loads do not wait for `live`: rows that are not hold anything, but must lie inside h.
    """
    column = column_of(gl.arange(0, 128, layout=gl.SliceLayout(0, L)))
    raw = ()
    for i in gl.static_range(COUNT):
        at, inside = place_of(row, first + i, columns, column, SPAN, CHUNKS, L)
        some = gl.load(h.rows + at, mask=inside, other=0.0).to(gl.float32)
        raw = raw + (some,)  # type: ignore[assignment]
    values = ()
    for i in gl.static_range(COUNT):
        values = values + (gl.where(live[:, None], raw[i], 0.0),)  # type: ignore[assignment]
    return values


@gluon.jit
def amax_of(values, SPAN: gl.constexpr, L: gl.constexpr):
    """(N,) largest |value| of each route's rows."""
    top = gl.abs(values[0])
    for i in gl.static_range(1, len(values)):
        top = gl.maximum(top, gl.abs(values[i]))
    N: gl.constexpr = top.shape[0]
    amax = gl.max(top, axis=1)
    if SPAN > 1:
        pieces = amax.reshape([N // SPAN, SPAN])
        whole, _ = gl.broadcast(gl.max(pieces, axis=1).expand_dims(1), pieces)
        amax = gl.convert_layout(whole.reshape([N]), gl.SliceLayout(1, L))
    return amax


@gluon.jit
def encode(value, scale):
    """e4m3 codes of value (N, K) over scale (N,): rne of the correctly rounded quotient, saturated.

    Not by IEEE division, whose slow path is a call for each value.
    """
    q = quotient(value, scale.expand_dims(1))
    return gl.minimum(gl.maximum(q, -448.0), 448.0).to(gl.float8e4nv)


@gluon.jit
def store_codes(resident, values, scale, first):
    """The codes of groups `first` .. to shared memory."""
    for i in gl.static_range(len(values)):
        resident.index(first + i).store(encode(values[i], scale))


@gluon.jit
def quantise_rows(resident, h, row, live, columns, SPAN: gl.constexpr, CHUNKS: gl.constexpr,
                  L: gl.constexpr):
    """float32 rows -> `resident`: scale = max(amax / 448, 2^-126), fp8_token bit for bit.

    Four groups and the last few stay in registers; the others are read twice, four at a time.
    """
    GROUPS: gl.constexpr = resident.shape[0]
    COUNT: gl.constexpr = min(GROUPS, 4)
    TAIL: gl.constexpr = GROUPS % COUNT
    values = load_groups(h, row, live, 0, columns, COUNT, SPAN, CHUNKS, L)
    amax = amax_of(values, SPAN, L)
    for first in range(COUNT, GROUPS - TAIL, COUNT):
        more = load_groups(h, row, live, first, columns, COUNT, SPAN, CHUNKS, L)
        amax = gl.maximum(amax, amax_of(more, SPAN, L))
    if TAIL:
        tail = load_groups(h, row, live, GROUPS - TAIL, columns, TAIL, SPAN, CHUNKS, L)
        amax = gl.maximum(amax, amax_of(tail, SPAN, L))
    N: gl.constexpr = resident.shape[1]
    largest = gl.full([N], 448.0, gl.float32, gl.SliceLayout(1, L))
    scale = gl.maximum(gl.div_rn(amax, largest), TINY)
    store_codes(resident, values, scale, 0)
    for first in range(COUNT, GROUPS - TAIL, COUNT):
        more = load_groups(h, row, live, first, columns, COUNT, SPAN, CHUNKS, L)
        store_codes(resident, more, scale, first)
    if TAIL:
        store_codes(resident, tail, scale, GROUPS - TAIL)
    return scale


@gluon.jit
def copy_rows(resident, h, row, live, columns, SPAN: gl.constexpr, CHUNKS: gl.constexpr,
              L: gl.constexpr):
    """Rows of e4m3 slots -> `resident`, asynchronously, all of them under way at once."""
    wide = (columns + 127) // 128 * 128
    slot = gl.arange(0, 128, layout=gl.SliceLayout(0, L))
    for group in range(resident.shape[0]):
        at, inside = place_of(row, group, wide, slot, SPAN, CHUNKS, L)
        cp_async(resident.index(group), h.rows + at, mask=inside & live[:, None])
    async_copy.commit_group()
    scale = gl.load(h.scales + row, mask=live, other=0.0)
    async_copy.wait_group(0)
    return scale


@gluon.jit
def make_resident(resident, h, row, live, columns, SPAN: gl.constexpr, CHUNKS: gl.constexpr,
                  L: gl.constexpr):
    """Rows of h as e4m3 in `resident` (GROUPS, N, 128); returns the scale of each of the N rows."""
    if h.scales is not None:
        scale = copy_rows(resident, h, row, live, columns, SPAN, CHUNKS, L)
    else:
        scale = quantise_rows(resident, h, row, live, columns, SPAN, CHUNKS, L)
    fence_async_shared()
    cta_barrier()  # every warp's fence before any warp's product
    return scale


@gluon.jit
def flat(own, sums):
    """(ROWS, SLICES, 2, 8, TOKENS) -> (TOKENS * SLICES, columns), as the epilogue reads it."""
    return own.permute((4, 1, 0, 2, 3)).reshape([sums.buffer.shape[1], sums.buffer.shape[2]])


def hidden_of(h: Tensor | SlotRows) -> Hidden:
    """float32 rows, to be quantised to fp8_token; or e4m3 slots with their scale per row."""
    return Hidden(h.codes, h.scales) if isinstance(h, SlotRows) else Hidden(h, None)
