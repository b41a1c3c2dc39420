"""Race detection: two waves touch the same byte, one of them writes, and no barrier of their
workgroup lies between.

LDS: each byte remembers its last writer, one reader and one atomic access (two of them become
"somebody"), with the barrier epoch; atomics race with plain accesses only. Global memory: the same
per buffer; waves of different workgroups have no barrier at all, so any such pair counts. In hazard
mode an access counts from its issue to its landing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .batch import Batch
from .checks import Finding, Findings
from .numerics import Array, i32, i64, u8, u32

if TYPE_CHECKING:
    from .group import Group
    from .memory import Region

# Who touched a cell is (wave + 1) << 32 | (epoch + 1); 0 is nobody.
MANY = 0x7FFFFFFF << 32  # several readers
EPOCH = 0xFFFFFFFF
GRANULES = (16, 4, 1)  # bytes of a cell, by level
BLOCK = 256  # bytes whose cells have one size
MOST_DEFERRED = 48 << 20  # bytes of addresses


class Level:
    """Cells of one size: last writer, reader and atomic access, and their instruction."""

    def __init__(self, nbytes: int, granule: int, atomics: bool):
        cells = nbytes // granule
        self.writer, self.reader = np.zeros(cells, i64), np.zeros(cells, i64)
        self.wpc, self.rpc = np.zeros(cells, i32), np.zeros(cells, i32)
        cells = cells if atomics else 0  # most kernels have none
        self.atomic, self.apc = np.zeros(cells, i64), np.zeros(cells, i32)

    def allow_atomics(self) -> None:
        self.atomic, self.apc = np.zeros_like(self.writer), np.zeros_like(self.wpc)

    def arrays(self) -> tuple[Array, ...]:
        plain = self.writer, self.reader, self.wpc, self.rpc
        return (*plain, self.atomic, self.apc) if len(self.atomic) else plain


class Shadow:
    """What is remembered of the bytes of LDS or of a buffer.

    Cells are as large as the accesses to their block allow: 16 bytes, a dword or a byte. `unit` is
    what findings are counted in: dwords until something smaller or unaligned is accessed. Reads
    before the first write are kept as they came: many buffers are never written.
    """

    def __init__(self, nbytes: int, name: str, across: bool, waves: int):
        self.name, self.across, self.waves = name, across, waves
        self.size = (nbytes + BLOCK - 1) // BLOCK * BLOCK
        self.unit = 4
        self.level = np.zeros(self.size // BLOCK, u8)
        self.levels: list[Level | None] = [None] * len(GRANULES)
        self.written = self.atomics = False
        self.deferred: list[tuple[Array, Array, int, int]] = []
        self.deferred_bytes = 0

    def at_level(self, k: int) -> Level:
        level = self.levels[k]
        if level is None:
            level = self.levels[k] = Level(self.size, GRANULES[k], self.atomics)
        return level

    def allow_atomics(self) -> None:
        self.atomics = True
        for level in self.levels:
            if level is not None:
                level.allow_atomics()

    def cells(self, off: Array, n: int) -> tuple[int, Array]:
        """Byte offsets (k,) of accesses of n bytes -> level, cell numbers (k, cells of an access).

        Blocks with larger cells than the access needs are divided."""
        if n % 4 or (off & 3).any():
            self.unit, wanted = 1, 2
        else:
            wanted = int(n != 16 or bool((off & 15).any()))
        blocks = off // BLOCK
        if wanted and n > 1:
            blocks = np.concatenate([blocks, (off + (n - 1)) // BLOCK])
        have = self.level[blocks]
        k = max(wanted, int(have.max()))
        if int(have.min()) < k:
            self.divide(np.unique(blocks), k)
        return k, (off // GRANULES[k])[:, None] + np.arange(n // GRANULES[k])

    def divide(self, blocks: Array, k: int) -> None:
        for coarse in range(k):
            some = blocks[self.level[blocks] == coarse]
            old = self.levels[coarse]
            if not len(some) or old is None:
                continue
            for a, b in zip(old.arrays(), self.at_level(k).arrays(), strict=True):
                rows = a.reshape(-1, BLOCK // GRANULES[coarse])[some]
                b.reshape(-1, BLOCK // GRANULES[k])[some] = rows.repeat(
                    GRANULES[coarse] // GRANULES[k], 1
                )
        self.level[blocks] = np.maximum(self.level[blocks], u8(k))

    def meets(self, other: Array, me: Array) -> Array | None:
        """Cells whose last access `other` races with an access by `me` (k, 1), None for none."""
        if not self.across:
            same = other.view(u32)[..., ::2] == me.view(u32)[..., ::2]  # the low words: epochs
            if not same.any():
                return None
            bad = same & (other != me)
            return bad if bad.any() else None
        bad = (other != 0) & (other != me)
        if not bad.any():
            return None
        wave, mine = (other >> 32) - 1, (me >> 32) - 1
        same_group = (wave // self.waves == mine // self.waves) | (wave == (MANY >> 32) - 1)
        bad &= ~same_group | ((other & EPOCH) == (me & EPOCH))
        return bad if bad.any() else None


class Races:
    """Watches all groups of one launch."""

    def __init__(self, findings: Findings):
        self.findings = findings
        self.buffers: dict[int, Shadow] = {}

    def for_group(self, group: Group) -> GroupRaces:
        return GroupRaces(self, group)


class GroupRaces:
    def __init__(self, races: Races, group: Group):
        self.races, self.group = races, group
        self.shadow = Shadow(len(group.lds), 'LDS', False, group.waves)

    def who(self, w: Batch, ids: Array) -> Array:
        """Wave and barrier epoch per lane, as cells remember them."""
        wave = self.group.linear[w.wg].astype(i64) * self.group.waves + w.wave
        return (((wave + 1) << 32) | (self.group.epochs[w.wg] + 1))[ids >> 6]

    def lds(self, w: Batch, idx: Array, ids: Array, n: int, pc: int, write: bool | None) -> None:
        if len(idx):
            self.access(self.shadow, idx, self.who(w, ids), n, pc, write)

    def globally(
        self, w: Batch, addr: Array, ids: Array, n: int, pc: int, write: bool | None
    ) -> None:
        memory, who = self.group.memory, self.who(w, ids)
        region = memory.find(int(addr.min()), int(addr.max()) + n)
        if region is not None:
            self.buffer(region, addr - region.base, who, n, pc, write)
            return
        which = np.searchsorted(np.array(memory.bases, i64), addr, 'right') - 1
        for k in np.unique(which[which >= 0]):
            region = memory.regions[k]
            sel = (which == k) & (addr + n <= region.end)
            if sel.any():
                self.buffer(region, addr[sel] - region.base, who[sel], n, pc, write)

    def buffer(
        self, region: Region, off: Array, who: Array, n: int, pc: int, write: bool | None
    ) -> None:
        s = self.races.buffers.get(region.base)
        if s is None:
            name = region.name or 'global'
            s = self.races.buffers[region.base] = Shadow(
                len(region.data), name, True, self.group.waves
            )
        if not s.written and write is False and s.deferred_bytes < MOST_DEFERRED:
            s.deferred.append((off, who, n, pc))
            s.deferred_bytes += off.nbytes + who.nbytes
            return
        s.written = True
        for old, reader, size, at in s.deferred:
            self.access(s, old, reader, size, at, False)
        s.deferred.clear()
        self.access(s, off, who, n, pc, write)

    def access(
        self, s: Shadow, off: Array, who: Array, n: int, pc: int, write: bool | None
    ) -> None:
        """`write` None is an atomic: it races with plain accesses only."""
        if write is None and not s.atomics:
            s.allow_atomics()
        k, at = s.cells(off, n)
        level, me, times = s.at_level(k), who[:, None], GRANULES[k] // s.unit
        second = {None: 'atomic', False: 'read', True: 'write'}[write]
        bad = s.meets(level.writer[at], me)
        if bad is not None:
            self.note(level.wpc[at[bad]], times, pc, f'{s.name} write/{second}')
        if write is not False:
            bad = s.meets(level.reader[at], me)
            if bad is not None:
                self.note(level.rpc[at[bad]], times, pc, f'{s.name} read/{second}')
        if write is not None and s.atomics:
            bad = s.meets(level.atomic[at], me)
            if bad is not None:
                self.note(level.apc[at[bad]], times, pc, f'{s.name} atomic/{second}')
        if write:
            level.writer[at] = me
            twice = level.writer[at] != me  # another wave wrote the byte in this very instruction
            if twice.any():
                self.note(np.full(int(twice.sum()), pc), times, pc, f'{s.name} write/write')
            level.wpc[at] = pc
        elif write is False:
            self.share(level.reader, level.rpc, at, me, pc)
        else:
            self.share(level.atomic, level.apc, at, me, pc)

    def share(self, users: Array, pcs: Array, at: Array, me: Array, pc: int) -> None:
        """Remember the user of each cell, or that there are several since the barrier."""
        old = users[at]
        several = ((old & EPOCH) == (me & EPOCH)) & (old != me)
        new = np.where(several, MANY | (me & EPOCH), me) if several.any() else me
        users[at] = new
        differs = at[users[at] != new]
        if len(differs):
            users[differs] = MANY | (users[differs] & EPOCH)
        pcs[at] = pc

    def note(self, firsts: Array, times: int, pc: int, what: str) -> None:
        """Findings against the earlier accesses at `firsts`, one entry per cell."""
        for p, n in zip(*np.unique(firsts, return_counts=True), strict=True):
            self.races.findings.add(
                Finding('race', f'{what} by different waves', int(p), pc), int(n) * times
            )
