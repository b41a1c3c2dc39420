"""Scalar memory: s_load, s_buffer_load, s_store, scalar atomics (CDNA3 ISA chapter 7)."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from ..asm import Instr
from ..batch import Batch, Pending, Scalar, each, norm, pair
from ..errors import UnsupportedError
from ..numerics import i64, u32, u64
from ..operands import rs32
from .control import POISON_SGPR

Closure = Callable[[Batch], Any]
NAME = re.compile(r'^s_(buffer_|scratch_)?(load|store)_dword(?:x(\d+))?$')


def address(ins: Instr, buffer: bool) -> Callable[[Batch], tuple[Scalar, Scalar, Scalar]]:
    """-> (byte address, offset inside the buffer, size limit or None)."""
    o, base = ins.ops, ins.ops[1].idx
    imm = ins.mods.get('offset', 0)
    off = rs32(o[2]) if len(o) > 2 else None
    signed_imm = len(o) > 2 and o[2].kind == 'imm' and not buffer
    const = (
        int(o[2].val) if signed_imm else 0
    )  # immediate offsets are signed 21 bits, registers unsigned

    def f(w: Batch) -> tuple[Scalar, Scalar, Scalar]:
        k = const if signed_imm else off(w) if off else 0
        hi = w.s[base + 1] & 0xFFFF if buffer else w.s[base + 1]
        start = pair(w.s[base], hi)
        k = k + imm
        if type(start) is int and type(k) is int:
            return (start + k) & ~3, k, w.s[base + 2] if buffer else None
        at = np.asarray(start).astype(i64) + np.asarray(k).astype(i64)
        return np.broadcast_to(at & ~3, w.n), k, w.s[base + 2] if buffer else None

    return f


def note(w: Batch, at: Any, k: Any, limit: Any, n: int, pc: int) -> None:
    """Tell the race check what a scalar load of n dwords reads: each wave once, as its lane 0."""
    ids = np.arange(w.n) * 64
    ats = np.broadcast_to(np.asarray(at, i64), w.n)
    if limit is None:
        w.group.note_global(w, ats, ids, 4 * n, pc, False)
        return
    offset, most = (np.broadcast_to(np.asarray(x).astype(i64), w.n) for x in (k, limit))
    for j in range(n):  # a dword past the descriptor's end reads as zero
        inside = offset + 4 * j + 4 <= most
        w.group.note_global(w, ats[inside] + 4 * j, ids[inside], 4, pc, False)


def decode(ins: Instr, kernel: Any) -> Closure | None:
    m = NAME.match(ins.op)
    if not m:
        return None
    if m.group(1) == 'scratch_':
        raise UnsupportedError(
            f'`{ins.text}`: scalar scratch access does not exist on gfx940 and later'
        )
    n, buffer, store = int(m.group(3) or 1), m.group(1) == 'buffer_', m.group(2) == 'store'
    where, d, pc = address(ins, buffer), ins.ops[0].idx, ins.pc

    def land_load(w: Batch, at: Any, k: Any, limit: Any) -> None:
        mem = w.group.memory
        if w.group.races:
            note(w, at, k, limit, n, pc)
        if type(at) is int:
            words = (
                mem.read_bytes(at, 4 * n, w).view(u32).tolist()
                if limit is None
                else [
                    int(mem.read_bytes(at + 4 * j, 4, w).view(u32)[0])
                    if k + 4 * j + 4 <= limit
                    else 0
                    for j in range(n)
                ]
            )
            w.s[d : d + n] = words
            return
        rows = np.arange(w.n)
        for j in range(n):
            if limit is None:
                w.s[d + j] = norm(mem.load(at + 4 * j, rows * 64, 4).view(u32)[:, 0].astype(u64))
            else:
                w.s[d + j] = each(
                    lambda a, o, lim: (
                        int(mem.read_bytes(a, 4, w).view(u32)[0]) if o + 4 <= lim else 0
                    ),
                    (at + 4 * j).astype(u64),
                    k + 4 * j,
                    limit,
                )

    def land_store(w: Batch, at: Any, data: Any) -> None:
        ats = np.broadcast_to(np.asarray(at, i64), w.n)
        w.group.note_global(w, ats, np.arange(w.n) * 64, 4 * n, pc, True)
        for j in range(n):
            words = np.broadcast_to(np.asarray(data[j], u64), w.n).astype(u32)
            w.group.memory.store(
                ats + 4 * j, np.arange(w.n) * 64, words.view(np.uint8).reshape(w.n, 4)
            )

    def f(w: Batch) -> None:
        at, k, limit = where(w)
        w.group.counters.smem_bytes += 4 * n * w.n
        if store:
            op = Pending(land_store, (at, list(w.s[d : d + n])), pc, smem=True)
        else:
            op = Pending(land_load, (at, k, limit), pc, sgprs=(d, d + n), smem=True)
        if w.hazard:
            if not store:
                w.s[d : d + n] = [POISON_SGPR] * n
            w.lgkm.append(op)
        else:
            op.land(w, *op.args)

    return f
