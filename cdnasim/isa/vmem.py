"""Vector memory: global, flat, scratch and buffer loads, stores and atomics, and loads straight
into LDS (CDNA3 ISA chapters 9, 10).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from operator import is_
from typing import Any

import numpy as np

from ..asm import PRIVATE_BASE, SHARED_BASE, Instr, Operand
from ..batch import M0, Batch, Pending
from ..errors import ExecError, MemFault, UnsupportedError
from ..numerics import Array, i64, u8
from ..operands import rs32, rv32, rv64
from .memop import (
    ATOMIC,
    LOAD,
    STORE,
    Masked,
    active_rows,
    every_row,
    from_rows,
    issue,
    pick,
    poison,
    put_loaded,
    to_rows,
)

Closure = Callable[[Batch], Any]
Address = Callable[
    [Batch], tuple[Array, Any]
]  # -> byte addresses (waves, 64), in range (waves, 64, parts) or None
NAME = re.compile(r'^(global|flat|buffer|scratch)_(load|store|atomic)_(.*)$')
CACHE_CONTROL = {
    'buffer_wbl2',
    'buffer_inv',
    'buffer_wbinvl1',
    'buffer_wbinvl1_vol',
    'buffer_gl0_inv',
}
APERTURE = 1 << 32


def column(x: Any) -> Any:
    """Scalar -> something that broadcasts against (waves, 64) int64."""
    return x if type(x) is int else x.astype(i64)[:, None]


def flat_address(ins: Instr, vaddr: Operand, saddr: Operand | None) -> Address:
    off = ins.mods.get('offset', 0)
    if saddr is not None and saddr.kind == 's':
        i = saddr.idx
        lo = rv32(vaddr) if vaddr.kind == 'v' else None

        def from_scalar(w: Batch) -> tuple[Array, Any]:
            base = column(w.s[i]) + (column(w.s[i + 1]) << 32) + off
            at = lo(w).astype(i64) + base if lo else base
            return at if np.shape(at) == w.shape else np.broadcast_to(at, w.shape), None

        return from_scalar
    rd = rv64(vaddr)
    return lambda w: (rd(w).view(i64) + off, None)


class Descriptor:
    """A buffer resource of four SGPRs (CDNA3 ISA 9.1.5). `stride` 0: raw buffer, num_records in
    bytes.
    """

    def __init__(self, words: list[Any]):
        w0, w1, w2, w3 = words
        self.words = words
        self.base = column(w0) + ((column(w1) & 0xFFFF) << 32)
        self.stride = column(w1) >> 16 & 0x3FFF
        self.num = column(w2)
        self.swizzle = bool(np.any(column(w1) >> 31 & 1))
        self.index_stride = 8 << (column(w3) >> 21 & 3)
        self.element = 2 << (column(w3) >> 19 & 3)
        self.add_tid = bool(np.any(column(w3) >> 23 & 1))
        self.records = bool(np.any(self.stride))

    @staticmethod
    def of(w: Batch, r: int) -> Descriptor:
        """The resource in s[r:r+3]; kept while the registers hold the same objects."""
        words, known = w.s[r : r + 4], w.descriptors.get(r)
        if known is None or not all(map(is_, words, known.words)):
            known = w.descriptors[r] = Descriptor(words)
        return known


def buffer_address(ins: Instr, vaddr: Operand, srsrc: Operand, soff: Operand, n: int) -> Address:
    """Address and range check of a buffer access (CDNA3 ISA 9.1.5.3 and 9.1.5.4); a part is a dword
    of a wide access.
    """
    r, so, imm = srsrc.idx, rs32(soff), ins.mods.get('offset', 0)
    offen, idxen = 'offen' in ins.flags, 'idxen' in ins.flags
    parts = 4 * np.arange(max(1, n // 4))
    size, vi = min(n, 4), vaddr.idx

    def f(w: Batch) -> tuple[Array, Any]:
        d = Descriptor.of(w, r)
        s = column(so(w))
        off: Any = imm
        if offen:
            off = w.v[vi + idxen].astype(i64)
            if imm:
                off += imm
        if not d.records:  # raw: the index counts for nothing
            ok = inside(d, off, s, w)
            at = off + (d.base + s)
        else:
            at, ok = record(d, off, s, w)
        at = at if np.shape(at) == w.shape else np.broadcast_to(at, w.shape)
        return at, None if ok is None or ok.all() else np.broadcast_to(ok, (*w.shape, len(parts)))

    def inside(d: Descriptor, off: Any, s: Any, w: Batch) -> Any:
        """Which parts are inside num_records bytes; None in the common case, all of them."""
        if type(d.num) is int:
            most = int(off.max()) if offen else off
            if most + (s if type(s) is int else int(s.max())) + n <= d.num:
                return None
        return (
            np.broadcast_to(off + s, w.shape)[..., None] + parts + size
            <= np.broadcast_to(d.num, (w.n, 1))[..., None]
        )

    def record(d: Descriptor, off: Any, s: Any, w: Batch) -> tuple[Any, Any]:
        """Address and check where the resource has a stride."""
        index: Any = w.v[vi].astype(i64) if idxen else 0
        if d.add_tid:
            index = index + np.arange(64)
        if not (idxen or d.add_tid):
            return off + index * d.stride + (d.base + s), inside(d, off, s, w)
        # structured: the record number and the place inside the record are checked
        ok = ((index < d.num) & (off + n <= d.stride)) if not d.swizzle else index < d.num
        off = swizzled(index, off, d) if d.swizzle else off + index * d.stride
        return off + (d.base + s), np.broadcast_to(ok, w.shape)[..., None]

    return f


def swizzled(index: Any, off: Any, d: Descriptor) -> Any:
    """Array-of-structures swizzle: index_stride records interleave element by element (CDNA3 ISA
    9.1.5.3).
    """
    group, lane = index // d.index_stride, index % d.index_stride
    element, inside = off // d.element, off % d.element
    return (group * d.stride + element * d.element) * d.index_stride + lane * d.element + inside


def fetch(w: Batch, addr: Array, ok: Any, rows: Array | None, n: int, pc: int) -> Array:
    """Load; dwords outside the descriptor read as zero."""
    flat, ids, mem = pick(addr, rows), every_row(w, rows), w.group.memory
    if ok is None:
        w.group.note_global(w, flat, ids, n, pc, False)
        return mem.load(flat, ids, n)
    good = ok.reshape(-1, ok.shape[-1])
    good = good if rows is None else good[rows]
    touched = good.any(1)
    w.group.note_global(w, flat[touched], ids[touched], n, pc, False)
    out = np.zeros((len(flat), n), u8)
    whole = good.all(1)
    out[whole] = mem.load(flat[whole], ids[whole], n)
    for p in range(good.shape[1]):
        part = good[:, p] & ~whole
        if part.any():
            out[part, 4 * p : 4 * p + 4] = mem.load(flat[part] + 4 * p, ids[part], min(n, 4))
    return out


def put(w: Batch, addr: Array, ok: Any, rows: Array | None, data: Array, pc: int) -> None:
    """Store; dwords outside the descriptor are dropped."""
    flat, ids, mem, n = pick(addr, rows), every_row(w, rows), w.group.memory, data.shape[1]
    if ok is None:
        w.group.note_global(w, flat, ids, n, pc, True)
        mem.store(flat, ids, data)
        return
    good = ok.reshape(-1, ok.shape[-1])
    good = good if rows is None else good[rows]
    touched = good.any(1)
    w.group.note_global(w, flat[touched], ids[touched], n, pc, True)
    for p in range(good.shape[1]):
        sel, size = good[:, p], min(n, 4)
        if sel.any():
            mem.store(flat[sel] + size * p, ids[sel], data[sel, size * p : size * p + size])


# ---- flat: the address says whether it is global, LDS or scratch


def in_aperture(addr: Array) -> Any:
    """Which lanes address LDS; None when none does."""
    shared = (addr >= SHARED_BASE) & (addr < SHARED_BASE + APERTURE)
    if ((addr >= PRIVATE_BASE) & (addr < PRIVATE_BASE + APERTURE)).any():
        raise ExecError('flat access to scratch through the private aperture is not implemented')
    return shared if shared.any() else None


def flat_load(w: Batch, addr: Array, rows: Array | None, n: int, ins: Instr) -> Array:
    flat, ids = pick(addr, rows), every_row(w, rows)
    shared = in_aperture(flat)
    if shared is None:
        return fetch(w, addr, None, rows, n, ins.pc)
    out = np.zeros((len(flat), n), u8)
    out[shared] = w.group.lds_load(w, flat[shared] - SHARED_BASE, ids[shared], n, ins)
    out[~shared] = w.group.memory.load(flat[~shared], ids[~shared], n)
    return out


def flat_store(w: Batch, addr: Array, rows: Array | None, data: Array, ins: Instr) -> None:
    flat, ids = pick(addr, rows), every_row(w, rows)
    shared = in_aperture(flat)
    if shared is None:
        put(w, addr, None, rows, data, ins.pc)
        return
    w.group.lds_store(w, flat[shared] - SHARED_BASE, ids[shared], data[shared], ins)
    w.group.memory.store(flat[~shared], ids[~shared], data[~shared])


# ---- instructions


def address_of(ins: Instr, space: str, ops: list[Operand], n: int) -> Address:
    """ops: the address operands, in text order (buffer: vaddr, resource, soffset; else vaddr [,
    saddr]).
    """
    if space == 'buffer':
        return buffer_address(ins, ops[0], ops[1], ops[2], n)
    return flat_address(ins, ops[0], ops[1] if len(ops) > 1 else None)


def load(ins: Instr, space: str, kind: str) -> Closure:
    n, how = LOAD[kind]
    where, d, count = address_of(ins, space, ins.ops[1:], n), ins.ops[0].idx, max(1, n // 4)
    flat, pc = space == 'flat', ins.pc

    def land(w: Batch, addr: Array, ok: Any, mask: Any) -> None:
        rows = Masked.rows(mask)
        if rows is None or len(rows):
            data = flat_load(w, addr, rows, n, ins) if flat else fetch(w, addr, ok, rows, n, pc)
            put_loaded(w, d, to_rows(data, w, rows, how, d))

    def f(w: Batch) -> None:
        addr, ok = where(w)
        w.group.count_global(w, pc, addr, n, 'global_load_bytes')
        op = Pending(land, (addr, ok, Masked.keep(w)), pc, (d, d + count))
        if w.hazard and how in 'uws':
            poison(w, d, count)
        issue(w, w.vm, op)
        if flat and w.hazard:
            w.lgkm.append(Pending(nothing, (), pc, (d, d + count)))

    return f


def nothing(w: Batch) -> None:
    """A flat access counts in lgkmcnt as well; its data lands with vmcnt."""


def load_to_lds(ins: Instr, space: str, kind: str) -> Closure:
    """LDS address = M0 + instruction offset + lane * max(4, n): contiguous by lane (LLVM
    AMDGPUUsage, buffer.load.lds).
    """
    n, pc = LOAD[kind][0], ins.pc
    where, step, imm = address_of(ins, space, ins.ops, n), max(4, n), ins.mods.get('offset', 0)

    def land(w: Batch, addr: Array, ok: Any, mask: Any, base: Any) -> None:
        rows = Masked.rows(mask)
        ids = every_row(w, rows)
        data = fetch(w, addr, ok, rows, n, pc)
        if n < 4:
            data = np.pad(data, ((0, 0), (0, 4 - n)))
        at = base if type(base) is int else base.astype(i64)[ids // 64]
        w.group.lds_store(w, at + ids % 64 * step, ids, data, ins)
        w.group.land_dma(w, at + ids % 64 * step, ids, step)

    def f(w: Batch) -> None:
        addr, ok = where(w)
        base = w.s[M0] + imm
        w.group.count_global(w, pc, addr, n, 'global_load_bytes')
        w.group.counters.lds_dma_bytes += step * (w.n * 64 if w.full else len(w.lanes()))
        w.group.note_dma(w, base, step, pc)
        issue(w, w.vm, Pending(land, (addr, ok, Masked.keep(w), base), pc, lds=([imm], step)))

    return f


def store(ins: Instr, space: str, kind: str) -> Closure:
    n, shift = STORE[kind]
    o, pc, flat = ins.ops, ins.pc, space == 'flat'
    where, src = (
        (address_of(ins, space, o[1:], n), o[0].idx)
        if space == 'buffer'
        else (address_of(ins, space, [o[0], *o[2:]], n), o[1].idx)
    )

    def land(w: Batch, addr: Array, ok: Any, mask: Any, data: Array) -> None:
        rows = Masked.rows(mask)
        flat_data = data.reshape(-1, data.shape[-1])
        flat_data = flat_data if rows is None else flat_data[rows]
        if len(flat_data):
            flat_store(w, addr, rows, flat_data, ins) if flat else put(
                w, addr, ok, rows, flat_data, pc
            )

    def f(w: Batch) -> None:
        addr, ok = where(w)
        w.group.count_global(w, pc, addr, n, 'global_store_bytes')
        if w.hazard:  # data is read at issue; kept per wave so that it follows a split
            data = from_rows(w, src, n, shift, None).reshape(w.n, 64, n)
            w.vm.append(Pending(land, (addr, ok, Masked.keep(w), data), pc))
            return
        rows = active_rows(w)
        if rows is None or len(rows):
            data = from_rows(w, src, n, shift, rows)
            flat_store(w, addr, rows, data, ins) if flat else put(w, addr, ok, rows, data, pc)

    return f


def atomic(ins: Instr, space: str, kind: str) -> Closure:
    n = ATOMIC[kind][0]
    o, pc, ret = ins.ops, ins.pc, 'sc0' in ins.flags or 'glc' in ins.flags
    wide = 2 * n if kind.startswith('cmpswap') else n
    if space == 'buffer':
        where, src, dst = address_of(ins, space, o[1:], n), o[0].idx, o[0].idx
    else:
        where, src, dst = (
            address_of(ins, space, [o[ret], *o[ret + 2 :]], n),
            o[ret + 1].idx,
            o[0].idx,
        )

    def land(w: Batch, addr: Array, ok: Any, mask: Any, data: Array) -> None:
        rows = Masked.rows(mask)
        if ok is not None:  # lanes outside the descriptor do nothing
            good = ok.all(-1) if mask is None else ok.all(-1) & mask
            rows = np.flatnonzero(good)
        ids = every_row(w, rows)
        new, flat = data.reshape(-1, wide)[ids], pick(addr, rows)
        mem = w.group.memory
        w.group.note_global(w, flat, ids, n, pc, None)
        shared = in_aperture(flat) if space == 'flat' else None
        if shared is not None:
            raise UnsupportedError(f'`{ins.text}`: flat atomic on LDS')
        old = mem.atomic(flat, ids, new, kind)
        if ret and len(ids):
            put_loaded(w, dst, to_rows(old, w, rows, 'w', dst))

    def f(w: Batch) -> None:
        addr, ok = where(w)
        w.group.count_global(w, pc, addr, n, 'global_atomic_bytes')
        w.group.counters.atomics += w.n * 64 if w.full else len(w.lanes())
        data = from_rows(w, src, wide, 0, None).reshape(w.n, 64, wide)
        op = Pending(
            land, (addr, ok, Masked.keep(w), data), pc, (dst, dst + n // 4) if ret else (0, 0)
        )
        if w.hazard and ret:
            poison(w, dst, n // 4)
        issue(w, w.vm, op)

    return f


def scratch(ins: Instr, what: str, kind: str) -> Closure:
    """Per-lane private memory (register spills): one row of bytes per lane in `Group.scratch`."""
    o, off, pc, is_load = ins.ops, ins.mods.get('offset', 0), ins.pc, what == 'load'
    va, sa = (o[1], o[2]) if is_load else (o[0], o[2])
    vr, sr = (rv32(va) if va.kind == 'v' else None), (rs32(sa) if sa.kind == 's' else None)
    n, how = LOAD[kind] if is_load else (STORE[kind][0], '')
    shift, reg = 0 if is_load else STORE[kind][1], o[0].idx if is_load else o[1].idx

    def offsets(w: Batch) -> Array:
        at: Any = off
        if vr:
            at = vr(w).astype(i64) + at
        if sr:
            at = at + column(sr(w))
        return np.broadcast_to(np.asarray(at, i64), w.shape)

    def land(w: Batch, at: Array, mask: Any, data: Any) -> None:
        rows = Masked.rows(mask)
        ids = every_row(w, rows)
        mem = w.group.scratch_of(w)
        idx = pick(at, rows)
        if len(idx) and (idx.min() < 0 or idx.max() + n > mem.shape[-1]):
            raise MemFault(
                (
                    f'scratch {what} of {n} bytes at {int(idx.max()):#x} is beyond {mem.shape[-1]} '
                    f'bytes'
                ),
                int(idx.max()),
            )
        where = w.group.wave_slot(w)[ids // 64], ids % 64
        cells = where[0][:, None], where[1][:, None], idx[:, None] + np.arange(n)
        if is_load:
            put_loaded(w, reg, to_rows(np.ascontiguousarray(mem[cells]), w, rows, how, reg))
        else:
            mem[cells] = data.reshape(-1, n)[ids]

    def f(w: Batch) -> None:
        w.group.counters.scratch_bytes += n * (w.n * 64 if w.full else len(w.lanes()))
        data = None if is_load else from_rows(w, reg, n, shift, None).reshape(w.n, 64, n)
        at = offsets(w)
        if is_load and w.hazard and how in 'uws':
            poison(w, reg, max(1, n // 4))
        issue(
            w,
            w.vm,
            Pending(
                land,
                (at, Masked.keep(w), data),
                pc,
                (reg, reg + max(1, n // 4)) if is_load else (0, 0),
            ),
        )

    return f


def decode(ins: Instr, kernel: Any) -> Closure | None:
    if ins.op in CACHE_CONTROL:
        return lambda w: None
    m = NAME.match(ins.op)
    if not m:
        return None
    space, what, kind = m.groups()
    to_lds = 'lds' in ins.flags or kind.startswith('lds_')
    kind = kind.removeprefix('lds_')
    table: Any = {'load': LOAD, 'store': STORE, 'atomic': ATOMIC}[what]
    if kind not in table or (space == 'scratch' and to_lds):
        return None
    if space == 'scratch':
        return scratch(ins, what, kind)
    if to_lds:
        return load_to_lds(ins, space, kind)
    return {'load': load, 'store': store, 'atomic': atomic}[what](ins, space, kind)
