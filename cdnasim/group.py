"""What the workgroups that run together share: LDS, scratch, memory, counters, and the checks that
watch them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from . import banks
from .asm import Instr
from .batch import Batch, Scalar, norm
from .counters import Counters
from .errors import MemFault
from .flight import Flight
from .gather import gather, scatter
from .numerics import Array, i64, u8, u32, u64

if TYPE_CHECKING:
    from .machine import Kernel, Launch

LDS_FILL = 0xA5  # the hardware does not zero LDS
LINE = 128  # bytes of a cache line (CDNA3 ISA 9.1.10)
LINE_SAMPLES = 4  # accesses per instruction whose cache lines are counted


class Group:
    """Workgroups `linear` (linear ids) of one launch. LDS of slot k begins at k * lds_stride."""

    def __init__(self, kernel: Kernel, launch: Launch, linear: Array):
        self.kernel, self.launch, self.memory = kernel, launch, launch.memory
        self.linear = linear.astype(u64)
        self.hazard = launch.options.hazard
        self.lds_bytes = launch.lds_bytes
        self.lds_stride = (launch.lds_bytes + 255) // 256 * 256
        self.lds = np.full(len(linear) * self.lds_stride, LDS_FILL, u8)
        self.waves = launch.waves
        self.scratch: Array | None = None
        self.counters = Counters()
        # waves that begin a run of instructions here, less those whose run ended just before
        self.entered = [0] * (len(kernel.module.instrs) + 1)
        self.line_samples: dict[int, int] = {}
        self.races = launch.races.for_group(self) if launch.races else None
        self.flight = Flight(self) if self.hazard else None
        self.uninitialised = launch.uninitialised
        self.lds_written = np.zeros(len(self.lds), bool) if self.uninitialised else None
        self.epochs = np.zeros(len(linear), i64)

    # ---- waves
    def all_waves(self, block: tuple[int, int, int], wave: int | None = None) -> Batch:
        """The waves of every workgroup, or only number `wave` of each, ready to run."""
        ids = np.arange(self.waves) if wave is None else np.array([wave])
        wg, waves = (
            x.ravel() for x in np.meshgrid(np.arange(len(self.linear)), ids, indexing='ij')
        )
        b = Batch(self, wg, waves, self.kernel.registers)
        threads = block[0] * block[1] * block[2]
        t = waves[:, None] * 64 + np.arange(64)
        tid = (t % block[0]) | (t // block[0] % block[1]) << 10 | (t // (block[0] * block[1])) << 20
        b.v[0] = tid.astype(u32)
        if threads % 64:
            live = np.minimum(64, threads - 64 * waves)
            b.set_exec(norm(np.array([(1 << int(k)) - 1 for k in live], u64)))
        self.launch.init_sgprs(b)
        b.pc = self.kernel.entry
        return b

    def scalar(self, w: Batch, per_slot: Array) -> Scalar:
        return norm(per_slot[w.wg])

    def wave_slot(self, w: Batch) -> Array:
        return w.wg * self.waves + w.wave

    def scratch_of(self, w: Batch) -> Array:
        if self.scratch is None:
            self.scratch = np.zeros(
                (len(self.linear) * self.waves, 64, self.kernel.private_bytes), u8
            )
        return self.scratch

    # ---- LDS
    def lds_fault(self, off: Array, ids: Array, n: int, what: str) -> MemFault | None:
        """The first access outside the workgroup's LDS, if there is one."""
        if not len(off) or (int(off.min()) >= 0 and int(off.max()) + n <= self.lds_bytes):
            return None
        bad = np.flatnonzero((off < 0) | (off + n > self.lds_bytes))[0]
        row = int(ids[bad])
        return MemFault(
            f'LDS {what} of {n} bytes at {int(off[bad]):#x} by lane {row % 64} is beyond the '
            f'{self.lds_bytes} bytes of the workgroup',
            int(off[bad]),
            row % 64,
            row,
        )

    def inside(self, off: Array, ids: Array, n: int, what: str) -> Array | None:
        """Lanes inside LDS when memory is lenient and some are not (the hardware drops the others:
        CDNA3 ISA 11.3.1).
        """
        fault = self.lds_fault(off, ids, n, what)
        if fault is None:
            return None
        if not self.memory.lenient:
            raise fault
        self.memory.violations.append(str(fault))
        return np.flatnonzero((off >= 0) & (off + n <= self.lds_bytes))

    def lds_index(self, w: Batch, off: Array, ids: Array) -> Array:
        base = w.wg.astype(i64) * self.lds_stride
        if len(ids) == w.n * 64:
            return (off.reshape(w.shape) + base[:, None]).reshape(-1)
        return off + base[ids >> 6]

    def lds_load(
        self, w: Batch, off: Array, ids: Array, n: int, ins: Instr, atomic: bool = False
    ) -> Array:
        keep = self.inside(off, ids, n, 'read')
        if keep is not None:
            out = np.zeros((len(off), n), u8)
            out[keep] = self.lds_load(w, off[keep], ids[keep], n, ins, atomic)
            return out
        idx = self.lds_index(w, off, ids)
        if self.lds_written is not None and len(idx):
            missing = ~self.lds_written[idx[:, None] + np.arange(n)].all(1)
            if missing.any():
                self.uninitialised.lds(w, ids[missing], off[missing], n, ins)
        if self.races:
            self.races.lds(w, idx, ids, n, ins.pc, None if atomic else False)
        return gather(self.lds, idx, n)

    def lds_store(
        self, w: Batch, off: Array, ids: Array, data: Array, ins: Instr, atomic: bool = False
    ) -> None:
        n = data.shape[1]
        keep = self.inside(off, ids, n, 'write')
        if keep is not None:
            off, ids, data = off[keep], ids[keep], data[keep]
        idx = self.lds_index(w, off, ids)
        if self.lds_written is not None:
            self.lds_written[idx[:, None] + np.arange(n)] = True
        if self.races:
            self.races.lds(w, idx, ids, n, ins.pc, None if atomic else True)
        scatter(self.lds, idx, data)

    def count_lds(
        self,
        w: Batch,
        pc: int,
        base: Array,
        offset: int,
        n: int,
        read: bool,
        atomic: bool = False,
    ) -> None:
        """Bytes and bank cycles of an LDS access; the conflict model is banks.py."""
        c = self.counters
        lanes = w.n * 64 if w.full else len(w.lanes())
        if read:
            c.lds_read_bytes += lanes * n
        else:
            c.lds_write_bytes += lanes * n
        cycles, extra = self.kernel.banks.cost(w, pc, base, n, read)
        c.lds_cycles += cycles
        c.lds_conflict_cycles += extra
        c.add_pc_cycles(pc, cycles, w.n)
        filling = w.hazard and any(op.lds for op in w.vm)
        if w.hazard and (self.races or filling):  # in flight from now until it lands
            rows = np.arange(w.n * 64) if w.full else w.lanes()
            off = base.reshape(-1)[rows] + offset
            if not len(off) or off.min() < 0 or off.max() + n > self.lds_bytes:
                return
            idx = self.lds_index(w, off, rows)
            if self.races:
                self.races.lds(w, idx, rows, n, pc, None if atomic else not read)
            if filling and self.flight:
                self.flight.check(w, idx, rows, n, pc, 'read' if read else 'written')

    def note_dma(self, w: Batch, base: Any, step: int, pc: int) -> None:
        """A load into LDS may write from the moment it issues."""
        if not w.hazard:
            return
        rows = np.arange(w.n * 64) if w.full else w.lanes()
        at = np.broadcast_to(np.asarray(base, i64), w.n)[rows >> 6] + rows % 64 * step
        if len(at) and at.min() >= 0 and at.max() + step <= self.lds_bytes:
            idx = self.lds_index(w, at, rows)
            if self.races:
                self.races.lds(w, idx, rows, step, pc, True)
            if self.flight:
                self.flight.issue(w, idx, rows, step, pc)

    def land_dma(self, w: Batch, off: Array, ids: Array, step: int) -> None:
        """A load into LDS has written."""
        if self.flight and len(off) and off.min() >= 0 and off.max() + step <= self.lds_bytes:
            self.flight.land(self.lds_index(w, off, ids), step)

    # ---- global memory
    def count_global(self, w: Batch, pc: int, addr: Array, n: int, what: str) -> None:
        c = self.counters
        lanes = w.n * 64 if w.full else len(w.lanes())
        setattr(c, what, getattr(c, what) + lanes * n)
        seen = self.line_samples.get(pc, 0)
        if seen < LINE_SAMPLES and lanes:
            self.line_samples[pc] = seen + 1
            row = addr[0][w.m[0]] if not w.full else addr[0]
            if len(row) and self.memory.regions:
                # From the buffer's start: a GPU's allocator begins at a line, a host's may not.
                row = row - self.memory.region_at(int(row.min())).base
                lines = {*(row // LINE).tolist(), *((row + n - 1) // LINE).tolist()}
                c.line_sample(pc, len(lines))

    def note_global(
        self, w: Batch, addr: Array, ids: Array, n: int, pc: int, write: bool | None
    ) -> None:
        """`write` None: atomic."""
        if self.races and len(addr):
            self.races.globally(w, addr, ids, n, pc, write)


def make_banks(arch: str) -> banks.Banks:
    return banks.Banks(32 if arch == 'gfx942' else 64)
