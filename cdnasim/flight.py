"""LDS bytes that a load of the same wave is still filling (hazard mode).

A load into LDS (`buffer_load .. lds`) writes at some moment between its issue and the vmcnt wait
that covers it, and nothing orders it with the LDS instructions of its wave. Three faults follow:
its bytes are read, or written, before that wait, and it issues while an LDS instruction that reads
or writes them is in flight itself. What other waves do there is a race (races.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .batch import Batch, Pending
from .checks import Finding
from .numerics import Array, i64

if TYPE_CHECKING:
    from .group import Group


def dwords(idx: Array, n: int) -> Array:
    """Byte offsets (k,) of accesses of n bytes -> dwords they touch (k, dwords of an access)."""
    if n % 4 == 0 and not (idx & 3).any():
        return (idx >> 2)[:, None] + np.arange(n // 4)
    last = (idx + (n - 1)) >> 2
    return np.minimum((idx >> 2)[:, None] + np.arange((n + 3) // 4 + 1), last[:, None])


class Flight:
    """Per dword of LDS: loads in flight, the wave they belong to (number + 1) and the last one's
    program counter.
    """

    def __init__(self, group: Group):
        cells = len(group.lds) // 4 + 1
        self.group = group
        self.loads, self.owner = np.zeros(cells, np.uint8), np.zeros(cells, np.int32)
        self.pc = np.zeros(cells, np.int32)

    def issue(self, w: Batch, idx: Array, rows: Array, step: int, pc: int) -> None:
        """A load of `step` bytes per lane begins to fill LDS at `idx`."""
        self.pending(w, idx, rows, step, pc)
        at, me = dwords(idx, step), (w.wave[rows >> 6] + 1)[:, None]
        self.loads[at] = np.where(self.owner[at] == me, self.loads[at], 0) + 1
        self.owner[at], self.pc[at] = me, pc

    def land(self, idx: Array, step: int) -> None:
        at = dwords(idx, step)
        left = self.loads[at] - (self.loads[at] > 0)
        self.loads[at] = left
        self.owner[at] *= left > 0

    def check(self, w: Batch, idx: Array, rows: Array, n: int, pc: int, what: str) -> None:
        """An LDS instruction issues: are its bytes still being filled for its own wave?"""
        at = dwords(idx, n)
        bad = self.owner[at] == (w.wave[rows >> 6] + 1)[:, None]
        if bad.any():
            for first in np.unique(self.pc[at[bad]]).tolist():
                text = f'LDS bytes are {what} before the wait for the load that fills them'
                self.group.launch.findings.add(Finding('hazard', text, first, pc))

    def pending(self, w: Batch, idx: Array, rows: Array, step: int, pc: int) -> None:
        """A load into LDS issues: do LDS instructions of its wave that use its bytes still run?"""
        cells: Array | None = None
        lo, hi = reach(w, idx, rows, step)
        for op in w.lgkm:
            if op.lds is None:
                continue
            if op.span is None:
                op.span = self.span(w, op)
            if not ((op.span[0] < hi) & (lo < op.span[1])).any():
                continue
            cells = self.keyed(w, idx, rows, step) if cells is None else cells
            others = [self.keyed(w, at, ids, op.lds[1]) for at, ids in self.accesses(w, op)]
            if any(np.isin(x, cells).any() for x in others):
                text = 'LDS bytes are filled by a load before the wait for the access to them'
                self.group.launch.findings.add(Finding('hazard', text, op.pc, pc))

    def accesses(self, w: Batch, op: Pending) -> list[tuple[Array, Array]]:
        """(LDS byte, row) of each active lane, for each offset of a pending LDS instruction."""
        assert op.lds is not None
        mask = op.args[1] if len(op.args) > 1 else None
        rows = np.arange(w.n * 64) if mask is None else np.flatnonzero(mask)
        base = op.args[0].reshape(-1)[rows]
        return [(self.group.lds_index(w, base + off, rows), rows) for off in op.lds[0]]

    def span(self, w: Batch, op: Pending) -> tuple[Array, Array]:
        assert op.lds is not None
        ends = [reach(w, at, rows, op.lds[1]) for at, rows in self.accesses(w, op)]
        lows, highs = zip(*ends, strict=True)
        return np.min(lows, 0), np.max(highs, 0)

    def keyed(self, w: Batch, idx: Array, rows: Array, n: int) -> Array:
        """Dwords, a different number for each wave of the batch."""
        return dwords(idx, n) + (rows >> 6)[:, None] * len(self.loads)


def reach(w: Batch, idx: Array, rows: Array, n: int) -> tuple[Array, Array]:
    """The first byte and the end of what each wave accesses, (waves,) each."""
    if len(rows) == w.n * 64:
        at = idx.reshape(w.shape)
        return at.min(1), at.max(1) + n
    lo, hi = np.full(w.n, np.iinfo(i64).max), np.full(w.n, -1, i64)
    np.minimum.at(lo, rows >> 6, idx)
    np.maximum.at(hi, rows >> 6, idx + n)
    return lo, hi
