"""Global memory: byte buffers at 64-bit addresses with guard space between them, bounds checks, and
a record of what was written.
"""

from __future__ import annotations

import bisect
import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .errors import MemFault
from .gather import gather, scatter
from .isa.memop import ATOMIC, do_atomic
from .numerics import Array, i64, u8

Entry = tuple[
    int, Array, Array, str
]  # region base, offsets (addresses for atomics), rows, atomic or ''


@dataclass(slots=True)
class Region:
    """One buffer. `written` marks bytes that hold a value, or is None when all of them do; `keep`
    keeps the owner alive.
    """

    base: int
    data: Array
    name: str = ''
    keep: Any = None
    written: Array | None = None
    shadow: dict[str, Array] = field(default_factory=dict)

    @property
    def end(self) -> int:
        return self.base + len(self.data)


class Memory:
    """Address space of one device. `lenient`: stray vector loads read zero and are recorded in
    `violations`.
    """

    BASE = 0x7A00_0000_0000
    GUARD = 1 << 20

    def __init__(self, lenient: bool = False):
        self.lenient = lenient
        self.violations: list[str] = []
        self.bases: list[int] = []
        self.regions: list[Region] = []
        self.next = self.BASE
        self.journal: list[Entry] | None = (
            None  # stores and atomics, when another process must repeat them
        )
        self.watch: Any = (
            None  # uninitialised reads are reported to watch.unwritten(region, offsets)
        )

    def map(self, base: int, data: Array, name: str = '', keep: Any = None) -> int:
        """Map bytes at a given address; an older buffer that begins there or overlaps is
        replaced.
        """
        data = data.reshape(-1).view(u8)
        i = bisect.bisect_left(self.bases, base)
        if i < len(self.bases) and self.bases[i] == base and len(self.regions[i].data) == len(data):
            self.regions[i].data, self.regions[i].keep = data, keep
            return base
        lo, hi = i, i
        while lo > 0 and self.regions[lo - 1].end > base:
            lo -= 1
        while hi < len(self.regions) and self.regions[hi].base < base + len(data):
            hi += 1
        self.bases[lo:hi], self.regions[lo:hi] = [base], [Region(base, data, name, keep)]
        return base

    def alloc(self, data: Array | int, name: str = '') -> int:
        """Map an array (shared, not copied) at a fresh guarded address. An int asks for that many
        bytes that nothing wrote yet.
        """
        fresh = isinstance(data, int)
        array = np.zeros(data, u8) if isinstance(data, int) else data
        if not array.flags['C_CONTIGUOUS']:
            raise MemFault(f'buffer {name!r} is not contiguous: pass np.ascontiguousarray(x)')
        base = self.next
        self.next += (array.nbytes + 2 * self.GUARD - 1) // self.GUARD * self.GUARD
        self.map(base, array, name)
        if fresh:
            self.region_at(base).written = np.zeros(array.nbytes, bool)
        return base

    def map_tensor(self, t: Any, name: str = '') -> int:
        """Map a torch CPU tensor's storage at its own host address, so that host code may pass
        data_ptr() along.
        """
        st = t.untyped_storage()
        ptr, n = st.data_ptr(), st.nbytes()
        if n:
            i = bisect.bisect_left(self.bases, ptr)
            if i < len(self.bases) and self.bases[i] == ptr and len(self.regions[i].data) == n:
                self.regions[i].keep = st
            else:
                self.map(ptr, np.frombuffer((ctypes.c_uint8 * n).from_address(ptr), u8), name, st)
        return ptr + t.storage_offset() * t.element_size()

    def region_at(self, address: int) -> Region:
        return self.regions[bisect.bisect_right(self.bases, address) - 1]

    def find(self, lo: int, hi: int) -> Region | None:
        """The region that holds bytes [lo, hi)."""
        i = bisect.bisect_right(self.bases, lo) - 1
        return self.regions[i] if i >= 0 and hi <= self.regions[i].end else None

    def fault(self, addr: Array, rows: Array, n: int, what: str) -> MemFault:
        for a, row in zip(addr.tolist(), rows.tolist(), strict=True):
            if self.find(a, a + n) is not None:
                continue
            i = bisect.bisect_right(self.bases, a) - 1
            near = ''
            if i >= 0:
                r = self.regions[i]
                near = (
                    f'; nearest below: {r.name or "?"} [{r.base:#x}, +{len(r.data):#x}), '
                    f'offset {a - r.base:#x}'
                )
            lane = row % 64
            return MemFault(
                f'{what} of {n} bytes at {a:#x} by lane {lane} is outside every buffer{near}',
                a,
                lane,
                row,
            )
        raise AssertionError('no address is out of range')

    def groups(
        self, addr: Array, rows: Array, n: int, what: str
    ) -> Iterator[tuple[Region, Array, Any]]:
        """(region, offsets, selector) per region touched; one in the common case."""
        if not len(addr):
            return
        region = self.find(int(addr.min()), int(addr.max()) + n)
        if region is not None:
            yield region, addr - region.base, slice(None)
            return
        which = np.searchsorted(np.array(self.bases, i64), addr, 'right') - 1
        ends = np.array([r.end for r in self.regions] or [0], i64)
        ok = (which >= 0) & (addr + n <= ends[which])
        if not ok.all():
            fault = self.fault(addr, rows, n, what)
            if not self.lenient or what != 'load':
                raise fault
            self.violations.append(str(fault))
        for k in np.unique(which[ok]):
            sel = np.flatnonzero(ok & (which == k))
            yield self.regions[k], addr[sel] - self.regions[k].base, sel

    def load(self, addr: Array, rows: Array, n: int) -> Array:
        """addr: int64[k]; rows: wave * 64 + lane, for messages -> uint8[k, n]."""
        out = None
        for region, off, sel in self.groups(addr, rows, n, 'load'):
            if region.written is not None and self.watch is not None:
                self.watch.unwritten(region, off, n)
            if isinstance(sel, slice):
                return gather(region.data, off, n)
            if out is None:
                out = np.zeros((len(addr), n), u8)
            out[sel] = gather(region.data, off, n)
        return np.zeros((len(addr), n), u8) if out is None else out

    def store(self, addr: Array, rows: Array, data: Array) -> None:
        n = data.shape[1]
        for region, off, sel in self.groups(addr, rows, n, 'store'):
            scatter(region.data, off, data[sel])
            if self.journal is not None:
                self.journal.append((region.base, off, np.ascontiguousarray(data[sel]), ''))
            if region.written is not None:
                region.written[off[:, None] + np.arange(n)] = True

    def atomic(self, addr: Array, rows: Array, data: Array, kind: str) -> Array:
        """Perform the atomic `kind` (a key of isa.memop.ATOMIC) in order of wave and lane -> old
        values.
        """
        n, fn = ATOMIC[kind]
        journal, self.journal = self.journal, None
        old = do_atomic(lambda a, r: self.load(a, r, n), self.store, addr, rows, data, n, fn)
        self.journal = journal
        if journal is not None:
            journal.append((0, addr, data, kind))
        return old

    def replay(self, journal: list[Entry]) -> None:
        """Repeat the stores and atomics of another process."""
        for base, off, data, kind in journal:
            if kind:
                self.atomic(off, np.zeros(len(off), i64), data, kind)
                continue
            region = self.region_at(base)
            scatter(region.data, off, data)
            if region.written is not None:
                region.written[off[:, None] + np.arange(data.shape[1])] = True

    def read_bytes(self, address: int, n: int, batch: Any = None) -> Array:
        """Scalar load."""
        region = self.find(address, address + n)
        if region is None:
            raise self.fault(np.array([address]), np.array([0]), n, 'scalar load')
        off = address - region.base
        if region.written is not None and self.watch is not None:
            self.watch.unwritten(region, np.array([off]), n)
        return region.data[off : off + n]
