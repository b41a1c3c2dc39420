"""LDS bank conflicts: how many cycles an access takes, and how many of them conflicts cost.

gfx942 has 32 banks of 4 bytes, gfx950 has 64. A wave is served in phases of a few lanes; in a
phase, each distinct dword takes one cycle of its bank. Phases of 16-byte reads on gfx942 pair up
lane quads of the two 16-lane halves (AMD's CK-Tile text); every other phase is contiguous lanes,
which on gfx950 is an assumption. Counts are simulated, not measured.
"""

from __future__ import annotations

import numpy as np

from .batch import Batch
from .numerics import Array, i64

HALF128 = [
    [0, 1, 2, 3, 20, 21, 22, 23],
    [4, 5, 6, 7, 16, 17, 18, 19],
    [8, 9, 10, 11, 28, 29, 30, 31],
    [12, 13, 14, 15, 24, 25, 26, 27],
]
READ128_32BANKS = HALF128 + [[lane + 32 for lane in p] for p in HALF128]
ABSENT = -1 << 40  # relative address of an inactive lane


def phases(n: int, read: bool, banks: int) -> list[list[int]]:
    """Groups of lanes served together for an access of n bytes per lane."""
    if n == 16 and read and banks == 32:
        return READ128_32BANKS
    per = max(1, min(64, banks * 4 // max(n, 4)))
    return [list(range(k, min(k + per, 64))) for k in range(0, 64, per)]


class Banks:
    """Cost of access patterns. A pattern is the lanes' addresses relative to the first: a shift by
    whole dwords only rotates the banks, so patterns repeat and are looked up instead of
    computed."""

    def __init__(self, banks: int):
        self.banks = banks
        self.last: dict[tuple[int, int], tuple[Array, int, int]] = {}
        self.known: dict[tuple[bytes, int, bool], tuple[int, int]] = {}

    def pattern(self, rel: Array, n: int, read: bool) -> tuple[int, int]:
        """(cycles, cycles beyond the conflict-free cost) of relative byte addresses (64,)."""
        key = (rel.tobytes(), n, read)
        if key not in self.known:
            if len(self.known) > 100_000:
                self.known.clear()
            cycles = extra = 0
            words = np.arange(max(1, n // 4))
            for group in phases(n, read, self.banks):
                here = rel[group]
                dwords = np.unique((here[here != ABSENT] >> 2)[:, None] + words)
                if len(dwords):
                    cost = int(np.bincount(dwords % self.banks).max())
                    cycles += cost
                    extra += cost - 1
            self.known[key] = cycles, extra
        return self.known[key]

    def cost(self, w: Batch, pc: int, base: Array, n: int, read: bool) -> tuple[int, int]:
        """Sum over the waves of the batch. base: int64 (waves, 64)."""
        if w.full:
            rel = base - (base[:, :1] & ~3)
        else:
            first = base[np.arange(w.n), np.argmax(w.m, 1)][:, None]
            rel = np.where(w.m, base - (first & ~3), ABSENT)
        last = self.last.get((pc, n))
        if last is not None and (rel == last[0]).all():
            return last[1] * w.n, last[2] * w.n
        rel = np.ascontiguousarray(rel, i64)
        costs = [self.pattern(row, n, read) for row in rel]
        self.last[pc, n] = (rel[0], *costs[0])
        return sum(c for c, _ in costs), sum(x for _, x in costs)
