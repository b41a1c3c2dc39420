"""Which tiles a workgroup computes: the walk over row tiles and token tiles of a launch.

The hardware deals workgroups to the XCDs (chiplets with an L2 each) in turn: workgroup w runs on
XCD ``w % 8``. A :class:`Walk` says which tiles workgroup w then takes. The maths works on ints and
on the DSL's integers alike, so that tests hold on the host what kernels do.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import flydsl.compiler as flyc
import flydsl.expr as fx
from flydsl.expr import const_expr

from mixmoe.errors import MixMoEError

XCDS = 8  # of a MI300X and a MI355X


@dataclass(frozen=True, slots=True)
class Walk:
    """``each`` consecutive tiles a workgroup; or, with ``groups``, as many workgroups as that on
    the whole card, each a consecutive share. ``together`` gives the workgroups of one XCD
    consecutive tiles; ``band`` token tiles pass over a row tile before the next row tile."""

    each: int = 1
    groups: int = 0
    together: bool = False
    band: int = 1

    def __post_init__(self) -> None:
        if self.each < 1 or self.band < 1 or self.groups < 0:
            raise MixMoEError("a walk takes at least one tile at a time", self, Walk())
        if self.groups and self.each != 1:
            raise MixMoEError("a persistent grid shares tiles out evenly", self.each, 1)

    @property
    def name(self) -> str:
        """As part of a kernel's name."""
        return f"e{self.each}g{self.groups}x{self.together:d}m{self.band}"

    @property
    def loops(self) -> bool:
        """Whether a workgroup takes more than one tile."""
        return self.each > 1 or self.groups > 0

    def workgroups(self, tiles: Any) -> Any:
        """Size of the grid."""
        return self.groups if self.groups else (tiles + self.each - 1) // self.each

    def share(self, workgroup: Any, tiles: Any, least: Callable = min) -> tuple[Any, Any]:
        """[first, end) of the tiles of a workgroup."""
        count = self.workgroups(tiles)
        each = (tiles + count - 1) // count if self.groups else self.each
        place = neighbours(workgroup, count, least) if self.together else workgroup
        first = least(place * each, tiles)
        return first, least(first + each, tiles)

    def tile(self, index: Any, rows: int, blocks: Any, least: Callable = min) -> tuple[Any, Any]:
        """(row tile, token tile) of a tile's number."""
        if self.band == 1:
            return index % rows, index // rows
        start = index // (self.band * rows) * self.band
        size = least(blocks - start, self.band)
        inside = index - start * rows
        return inside // size, start + inside % size


class Cut(Protocol):
    """What both main loops' records say of who computes what: ``team`` waves of a workgroup
    multiply the same one of ``parts`` parts of K, of ``part_tiles`` tiles."""

    @property
    def walk(self) -> Walk: ...
    @property
    def tokens(self) -> int: ...
    @property
    def blocks(self) -> int: ...
    @property
    def sort_tiles(self) -> int: ...
    @property
    def k_waves(self) -> int: ...
    @property
    def split_k(self) -> int: ...
    @property
    def groups(self) -> int: ...
    @property
    def team(self) -> int: ...
    @property
    def parts(self) -> int: ...
    @property
    def part_tiles(self) -> int: ...
    @property
    def row_tiles(self) -> int: ...


def neighbours(workgroup: Any, count: Any, least: Callable = min) -> Any:
    """A permutation of ``0 .. count - 1`` for any count that puts what one XCD runs side by side:
    with ``count = 8 q + r`` the first r XCDs run q + 1 workgroups, the others q."""
    xcd, turn = workgroup % XCDS, workgroup // XCDS
    return xcd * (count // XCDS) + least(xcd, count % XCDS) + turn


@flyc.jit
def over(walk: Walk, tiles, each) -> None:
    """Call ``each(number)`` for the tiles of the calling workgroup. Arguments of the launch are
    loaded together, at once; unsigned numbers divide in a third of the instructions."""
    fx.rocdl.sched_barrier(0)
    first, end = walk.share(fx.Uint32(fx.block_idx.x), fx.Uint32(tiles), fx.min)
    if const_expr(walk.loops):
        first, end = fx.Int32(first), fx.Int32(end)
        for number in range(first, end, 1, unroll=1):  # type: ignore[call-overload]
            fx.gpu.barrier()  # the tile before is done with LDS
            each(fx.Uint32(number))
    else:
        each(first)
