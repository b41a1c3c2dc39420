"""The order of one matrix in memory, and of the bits in a word.

An :class:`Arrangement` is a pattern of :func:`mixmoe.layout.arrange`: a permutation of the padded
matrix. Packing is the view and permute that the layout's strides spell out, matrix by matrix.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from mixmoe.errors import MixMoEError
from mixmoe.layout import Layout, arrange, coarsen, right_inverse

WIDE_ITEM = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# A gather by a ready index is 10 times as fast as a strided copy of 2-byte pieces (0.5 against 5.2
# ms for 512 x 7168 codes, one CPU thread, 2026-11-24); the index is int32, at most 128 MB.
INDEX_LIMIT = 1 << 25
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

    def pack(self, matrices: Iterable[Tensor], out: Tensor, per_item: int = 1) -> None:
        """Reorder each of the ``matrices: (R, C)`` into its padded storage in ``out: (E, R', C')``.

        ``per_item`` columns of the pattern share one element of a matrix: 2 for 4-bit codes in
        bytes. Padding is ``fill``.
        """
        move = self._mover(out[0], per_item, back=False)
        for x, storage in zip(matrices, out, strict=True):
            source = contiguous(x)
            if x.shape != storage.shape:
                source = x.new_full(storage.shape, self.fill)
                self._used(source, x.shape).copy_(x.reshape(self.halves, -1, x.shape[1]))
            move(source, storage)

    def unpack(self, storages: Iterable[Tensor], out: Tensor, per_item: int = 1) -> None:
        """The inverse of :meth:`pack`: fill ``out: (E, R, C)`` from storages ``(R', C')``."""
        move = None
        for storage, x in zip(storages, out, strict=True):
            move = move or self._mover(storage, per_item, back=True)
            whole = x if x.shape == storage.shape else torch.empty_like(storage)
            move(contiguous(storage), whole)
            if whole is not x:
                x.view(self.halves, -1, x.shape[1]).copy_(self._used(whole, x.shape))

    def _used(self, padded: Tensor, shape: torch.Size) -> Tensor:
        view = padded.view(self.halves, -1, padded.shape[1])
        return view[:, : shape[0] // self.halves, : shape[1]]

    def _mover(
        self, like: Tensor, per_item: int, back: bool
    ) -> Callable[[Tensor, Tensor], object]:
        """A function (source, out) that reorders a padded matrix into storage, or ``back``."""
        rows, items = like.shape
        layout = coarsen(self.layout(rows, items * per_item), per_item)
        run = next((size for size, stride in layout[1].flat if stride == 1 and size > 1), 1)
        unit = math.gcd(run, 8 // like.itemsize)
        wide = WIDE_ITEM[unit * like.itemsize]
        row_mode, col_mode = coarsen(layout, unit).modes
        modes = [*reversed(row_mode.flat), *reversed(col_mode.flat)]
        order = sorted(range(len(modes)), key=lambda i: -modes[i][1])
        shape = [size for size, _ in modes]
        if back:
            shape = [shape[i] for i in order]
            order = sorted(range(len(order)), key=lambda i: order[i])

        def view(x: Tensor) -> Tensor:
            return x.view(shape).permute(order)

        count = math.prod(shape)
        if count > INDEX_LIMIT:

            def copy(x: Tensor, out: Tensor) -> Tensor:
                source = view(x.view(wide))
                return out.view(wide).view(source.shape).copy_(source)

            return copy
        index = view(torch.arange(count, dtype=torch.int32, device=like.device)).reshape(-1)
        return lambda x, out: torch.index_select(
            x.view(wide).view(-1), 0, index, out=out.view(wide).view(-1)
        )


def contiguous(x: Tensor) -> Tensor:
    """``x`` itself where its bytes can be viewed as 64-bit words, else a copy."""
    x = x.contiguous()
    return x if x.storage_offset() * x.itemsize % 8 == 0 else x.clone()


def picture_lines(
    a: Arrangement, shape: tuple[int, int], unit: int, bits: int, group: int
) -> list[str]:
    """One line for the first ``group`` items and one for each part that steps beyond them."""
    half = a.padded(*shape)[0] // a.halves
    names = ("row",) if a.halves == 1 else ("gate", "up")

    def items(place: int) -> str:
        runs: list[list[int]] = []
        for i in range(place, place + group):
            row, column = a.coordinate(i, *shape)
            first, last = column * unit // bits, ((column + 1) * unit - 1) // bits
            if runs and runs[-1][0] == row and first <= runs[-1][2] + 1:
                runs[-1][2] = last
            else:
                runs.append([row, first, last])
        texts = []
        for i, (row, first, last) in enumerate(runs):
            same = i > 0 and runs[i - 1][0] == row
            texts.append(", " if same else "; " if i else "")
            texts.append("" if same else f"{names[row // half]} {row % half} k ")
            texts.append(f"{first}-{last}" if last > first else f"{first}")
        return "".join(texts)

    lines = [f"  {0:>8}  {'':9} {items(0)}"]
    fixed = dict(a.sizes)
    for name, size, stride in a.steps(*shape):
        if stride >= group and size > 1:
            count = f"x {size}" if name in fixed else "..."
            lines.append(f"  {stride:>8}  {name:<4} {count:<4} {items(stride)}")
    return lines


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
