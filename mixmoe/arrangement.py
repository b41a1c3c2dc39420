"""The order of one matrix in memory, and of the bits in a word.

An :class:`Arrangement` is a pattern of :func:`mixmoe.layout.arrange`: a permutation of the padded
matrix. Packing is the view and permute that the layout's strides spell out, one expert at a time.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mixmoe.errors import MixMoEError
from mixmoe.layout import Layout, arrange, coarsen, right_inverse

WIDE_ITEM = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
MOVE_CHUNK = 1 << 20  # words whose bits are moved at a time: 12 MB of temporaries stay in cache


@dataclass(frozen=True, slots=True)
class Arrangement:
    """A pattern with its sizes: the order of a matrix of any size, padded to whole tiles.

    One part of each axis has no size and takes what the matrix needs. A row axis that begins with
    ``gu`` holds gate rows above up rows and pads each half by itself. ``pad`` asks for multiples
    of (rows of a half, columns) beyond the tile; ``fill`` is the value of padding.
    """

    pattern: str
    sizes: tuple[tuple[str, int], ...] = ()
    pad: tuple[int, int] = (1, 1)
    fill: int = 0

    @property
    def axes(self) -> tuple[list[str], list[str]]:
        """Names of the row parts and of the column parts, slowest first."""
        rows, cols = self.pattern.partition("->")[0].replace("(", " ").split(")")[:2]
        return rows.split(), cols.split()

    @property
    def halves(self) -> int:
        """2 where the row axis is gate above up, else 1."""
        return 2 if self.axes[0][0] == "gu" else 1

    @property
    def plain(self) -> bool:
        """Whether storage order is the order of the matrix."""
        return self.axes[0] + self.axes[1] == self.pattern.partition("->")[2].split()

    @property
    def tile(self) -> tuple[int, int]:
        """(rows of a half, columns) to whose multiples a matrix is padded."""
        known = dict(self.sizes)
        rows, cols = (math.prod(known.get(n, 1) for n in names) for names in self.axes)
        return math.lcm(rows // self.halves, self.pad[0]), math.lcm(cols, self.pad[1])

    @property
    def tile_items(self) -> int:
        """Items of a tile, both halves together."""
        rows, cols = self.tile
        return rows * self.halves * cols

    def padded(self, rows: int, cols: int) -> tuple[int, int]:
        """Rows and columns after padding. Raises MixMoEError for an odd count of gate/up rows."""
        if rows % self.halves:
            raise MixMoEError("gate and up rows come in pairs, N must be even", rows, rows + 1)
        high, wide = self.tile
        return -(-rows // self.halves // high) * high * self.halves, -(-cols // wide) * wide

    def row_of(self, row: int, rows: int) -> int:
        """Where row ``row`` of ``rows`` is after padding."""
        half = rows // self.halves
        return row // half * (self.padded(rows, 1)[0] // self.halves) + row % half

    def layout(self, rows: int, cols: int) -> Layout:
        """``((row parts), (column parts)):strides`` of the padded matrix, a permutation."""
        sizes = dict(self.sizes)
        for names, length in zip(self.axes, self.padded(rows, cols), strict=True):
            free = [n for n in names if n not in sizes]
            known = math.prod(sizes.get(n, 1) for n in names)
            sizes.update({n: length // known for n in free})
        return arrange(self.pattern, sizes)

    def coordinate(self, place: int, rows: int, cols: int) -> tuple[int, int]:
        """(padded row, column) of the item at ``place`` of storage: the inverse of the layout."""
        column, row = divmod(right_inverse(self.layout(rows, cols))(place), self.padded(rows, 1)[0])
        return row, column

    def steps(self, rows: int, cols: int) -> list[tuple[str, int, int]]:
        """(part, size, stride) of every part of storage, fastest first."""
        layout = self.layout(rows, cols)
        names = [n for axis in self.axes for n in reversed(axis)]
        steps = [(n, *flat) for n, flat in zip(names, layout.flat, strict=True)]
        order = self.pattern.partition("->")[2].split()
        return sorted(steps, key=lambda step: -order.index(step[0]))

    def without(self, *names: str) -> "Arrangement":
        """The same order of a coarser matrix, one without these parts."""
        sides = self.pattern.replace("(", "( ").replace(")", " )").split()
        kept = " ".join(part for part in sides if part not in names)
        kept = kept.replace("( ", "(").replace(" )", ")")
        return Arrangement(kept, tuple(s for s in self.sizes if s[0] not in names))

    def store(self, x: Tensor, out: Tensor, per_item: int = 1) -> None:
        """Reorder the matrix ``x: (R, C)`` into its padded storage ``out: (R', C')``.

        ``per_item`` columns of the pattern share one element of ``x``: 2 for 4-bit codes in bytes.
        """
        rows, items = out.shape
        source = x if x.shape == out.shape else x.new_full((rows, items), self.fill)
        if source is not x:
            self._used(source, x.shape).copy_(x.view(self.halves, -1, x.shape[1]))
        to, come = _views(out, source, coarsen(self.layout(rows, items * per_item), per_item))
        to.copy_(come)

    def load(self, stored: Tensor, out: Tensor, per_item: int = 1) -> None:
        """The inverse of :meth:`store`: fill the matrix ``out: (R, C)`` from its storage."""
        rows, items = stored.shape
        whole = out if out.shape == stored.shape else torch.empty_like(stored)
        come, to = _views(stored, whole, coarsen(self.layout(rows, items * per_item), per_item))
        to.copy_(come)
        if whole is not out:
            out.view(self.halves, -1, out.shape[1]).copy_(self._used(whole, out.shape))

    def _used(self, padded: Tensor, shape: torch.Size) -> Tensor:
        view = padded.view(self.halves, -1, padded.shape[1])
        return view[:, : shape[0] // self.halves, : shape[1]]

    def pack(self, x: Tensor) -> Tensor:
        """Reorder each matrix of ``x: (E, R, C)`` into ``(E, R', C')``, its padded storage."""
        out = x.new_empty((x.shape[0], *self.padded(*x.shape[1:])))
        for matrix, storage in zip(x, out, strict=True):
            self.store(contiguous(matrix), storage)
        return out

    def unpack(self, stored: Tensor, rows: int, cols: int) -> Tensor:
        """The ``(E, rows, cols)`` matrices of a storage that :meth:`pack` made."""
        out = stored.new_empty((stored.shape[0], rows, cols))
        for storage, matrix in zip(stored, out, strict=True):
            self.load(storage, matrix)
        return out


def contiguous(x: Tensor) -> Tensor:
    """``x`` itself where its bytes can be viewed as 64-bit words, else a copy."""
    x = x.contiguous()
    return x if x.storage_offset() * x.itemsize % 8 == 0 else x.clone()


def _views(stored: Tensor, matrix: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Both tensors as views of one shape: copying one to the other reorders by ``layout``."""
    run = next((size for size, stride in layout[1].flat if stride == 1 and size > 1), 1)
    unit = math.gcd(run, 8 // matrix.itemsize)
    wide = WIDE_ITEM[unit * matrix.itemsize]
    rows, cols = coarsen(layout, unit).modes
    modes = [*reversed(rows.flat), *reversed(cols.flat)]
    order = sorted(range(len(modes)), key=lambda i: -modes[i][1])
    logical = matrix.view(wide).view([size for size, _ in modes]).permute(order)
    return stored.view(wide).view(logical.shape), logical


@dataclass(frozen=True, slots=True)
class Word:
    """Where the eight 4-bit codes of a 32-bit word put their bits.

    The low three bits of code ``i`` go to nibble ``value(i)``; its high bit (the sign) goes to the
    high bit of nibble ``sign(i) ^ flip``.
    """

    value: Layout
    sign: Layout
    flip: int = 0

    def nibble(self, i: int, bit: int) -> int:
        """The nibble that bit ``bit`` of code ``i`` goes to."""
        return self.value(i) if bit < 3 else self.sign(i) ^ self.flip

    def moves(self, back: bool = False) -> tuple[tuple[int, int], ...]:
        """(left shift in bits, mask of the bits after it), together a permutation of 32 bits."""
        masks: dict[int, int] = {}
        for i in range(8):
            for bit in range(4):
                come, to = 4 * i + bit, 4 * self.nibble(i, bit) + bit
                come, to = (to, come) if back else (come, to)
                masks[to - come] = masks.get(to - come, 0) | 1 << to
        return tuple(sorted(masks.items()))

    def apply(self, words: Tensor, back: bool = False) -> None:
        """Move the bits of contiguous int32 ``words`` in place."""
        flat = words.view(-1)
        for start in range(0, flat.numel(), MOVE_CHUNK):
            part = flat[start : start + MOVE_CHUNK]
            total = torch.zeros_like(part)
            for shift, mask in self.moves(back):
                signed = mask - (1 << 32) if mask >> 31 else mask
                moved = part << shift if shift >= 0 else part >> -shift
                total |= moved.bitwise_and_(signed)
            part.copy_(total)
