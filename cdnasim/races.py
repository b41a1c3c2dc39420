"""Race detection: two waves touch the same byte, one of them writes, and no barrier of their
workgroup lies between.

LDS: each byte remembers its last writer and one reader (two readers become "somebody"), with the
barrier epoch. Global memory: the same per buffer; waves of different workgroups have no barrier at
all, so any such pair counts, except atomic against atomic. In hazard mode an access counts from its
issue to its landing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .batch import Batch
from .checks import Finding, Findings
from .numerics import Array, i32, i64

if TYPE_CHECKING:
    from .group import Group

MANY = -2  # several readers
NOBODY = -1


class Shadow:
    """Per cell: last writer and reader (global wave number), their epoch and instruction.

    A cell is a dword until something smaller or unaligned is accessed, then every byte is one.
    """

    NAMES = ('writer', 'reader', 'wepoch', 'repoch', 'wpc', 'rpc')

    def __init__(self, nbytes: int):
        cells = (nbytes + 3) // 4
        self.granule = 4
        self.writer, self.reader = np.full(cells, NOBODY, i32), np.full(cells, NOBODY, i32)
        self.wepoch, self.repoch = np.zeros(cells, i32), np.zeros(cells, i32)
        self.wpc, self.rpc = np.zeros(cells, i32), np.zeros(cells, i32)

    def cells(self, start: Array, n: int) -> Array:
        """start: byte offsets (k,), n: bytes of each access -> cell numbers (k, cells of an
        access).
        """
        if self.granule == 4 and (n % 4 or (start & 3).any()):
            self.granule = 1
            for name in self.NAMES:
                setattr(self, name, getattr(self, name).repeat(4))
        return (start // self.granule)[:, None] + np.arange(n // self.granule)


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
        self.shadow = Shadow(len(group.lds))

    def who(self, w: Batch, ids: Array) -> tuple[Array, Array]:
        """Global wave number and barrier epoch per lane."""
        wave = (self.group.linear[w.wg].astype(i64) * self.group.waves + w.wave).astype(i32)
        return wave[ids >> 6], self.group.epochs[w.wg][ids >> 6].astype(i32)

    def lds(self, w: Batch, idx: Array, ids: Array, n: int, pc: int, write: bool | None) -> None:
        if not len(idx):
            return
        who, epoch = self.who(w, ids)
        cells = self.shadow.cells(idx, n)
        n = cells.shape[1]
        where = cells.reshape(-1)
        self.access(self.shadow, where, who.repeat(n), epoch.repeat(n), pc, write, 'LDS', False)

    def globally(
        self, w: Batch, addr: Array, ids: Array, n: int, pc: int, write: bool | None
    ) -> None:
        memory = self.group.memory
        who, epoch = self.who(w, ids)
        which = np.searchsorted(np.array(memory.bases, i64), addr, 'right') - 1
        for k in np.unique(which[which >= 0]):
            region = memory.regions[k]
            sel = (which == k) & (addr + n <= region.end)
            shadow = self.races.buffers.setdefault(region.base, Shadow(len(region.data)))
            cells = shadow.cells(addr[sel] - region.base, n)
            each, where = cells.shape[1], cells.reshape(-1)
            self.access(
                shadow,
                where,
                who[sel].repeat(each),
                epoch[sel].repeat(each),
                pc,
                write,
                region.name or 'global',
                True,
            )

    def access(
        self,
        s: Shadow,
        at: Array,
        who: Array,
        epoch: Array,
        pc: int,
        write: bool | None,
        place: str,
        across: bool,
    ) -> None:
        """`write` None is an atomic: it races with plain accesses only, and leaves no trace."""

        def meets(other: Array, other_epoch: Array) -> Array:
            bad = (other[at] != NOBODY) & (other[at] != who)
            same_wg = (other[at] // self.group.waves == who // self.group.waves) | (
                other[at] == MANY
            )
            return (
                bad & (~same_wg | (other_epoch[at] == epoch))
                if across
                else bad & (other_epoch[at] == epoch)
            )

        self.note(
            at[meets(s.writer, s.wepoch)],
            s.wpc,
            pc,
            ('write', 'read' if write is False else 'write'),
            place,
        )
        if write is not False:
            self.note(at[meets(s.reader, s.repoch)], s.rpc, pc, ('read', 'write'), place)
        if write:
            s.writer[at] = who
            twice = s.writer[at] != who  # another wave wrote the byte in this very instruction
            self.note(at[twice], None, pc, ('write', 'write'), place)
            s.wepoch[at], s.wpc[at] = epoch, pc
        elif write is False:
            several = (s.repoch[at] == epoch) & (s.reader[at] != who) & (s.reader[at] != NOBODY)
            s.reader[at] = np.where(several, MANY, who)
            s.reader[at[s.reader[at] != np.where(several, MANY, who)]] = MANY
            s.repoch[at], s.rpc[at] = epoch, pc

    def note(self, bad: Array, first: Any, pc: int, kinds: tuple[str, str], place: str) -> None:
        if not len(bad):
            return
        firsts, counts = (
            np.unique(first[bad], return_counts=True)
            if first is not None
            else (np.array([pc]), [len(bad)])
        )
        for p, n in zip(firsts, counts, strict=True):
            self.races.findings.add(
                Finding('race', f'{place} {kinds[0]}/{kinds[1]} by different waves', int(p), pc),
                int(n),
            )
