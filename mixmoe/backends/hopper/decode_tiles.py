"""Which tiles of a decode GEMM a CTA takes, and which routes a block has.

Tiles run block by block: tile // row_tiles is the block, tile % row_tiles the rows. A CTA sweeps
them, every num_programs-th, or takes a contiguous part.
"""

from typing import Any, NamedTuple

from triton import constexpr_function
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mixmoe.backends.hopper.decode import SENTINEL_MASK


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


@gluon.jit
def tiles_of(blocks, sizes, BLOCK: gl.constexpr):
    """Tiles of this call."""
    if sizes.tiles is None:
        return gl.load(blocks.total) // BLOCK * sizes.row_tiles
    else:
        return sizes.tiles


@gluon.jit
def share(total):
    """The contiguous part [first, last) of `total` tiles that this CTA takes. The first CTAs take
    one more: those are spread over all SMs before any SM has two of them."""
    each = total // gl.num_programs(0)
    more = total - each * gl.num_programs(0)
    first = gl.program_id(0) * each + gl.minimum(gl.program_id(0), more)
    return first, first + each + (gl.program_id(0) < more).to(gl.int32)


@gluon.jit
def turns_of(tiles, SHARED: gl.constexpr):
    """This CTA's tiles: first, end, step. SHARED: a contiguous part, else a sweep."""
    if SHARED:
        first, last = share(tiles)
        return first, last, 1
    else:
        return gl.program_id(0), tiles, gl.num_programs(0)


@gluon.jit
def routes_of(blocks, block, n, limit, BLOCK: gl.constexpr):
    """Routes n of a block, token | slot << 24; no token where the block or the list is shorter."""
    if blocks.ids is None:  # a block each, whose number stands for the slot
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
