"""LDS: ds_* loads, stores and atomics, transposed reads, and the lane permutes that use its
crossbar (CDNA3 ISA chapter 11).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from ..asm import Instr
from ..batch import LANES, M0, Batch, Pending, spread
from ..errors import ExecError
from ..numerics import Array, i32, i64, u8, u32, unpack_bits
from ..operands import rv32
from .memop import (
    ATOMIC,
    AtomicFn,
    Masked,
    active_rows,
    do_atomic,
    every_row,
    from_rows,
    issue,
    pick,
    poison,
    put_loaded,
    to_rows,
)

Closure = Callable[[Batch], Any]
READ = {
    'u8': (1, 'u'),
    'i8': (1, 's'),
    'u16': (2, 'u'),
    'i16': (2, 's'),
    'b32': (4, 'w'),
    'b64': (8, 'w'),
    'b96': (12, 'w'),
    'b128': (16, 'w'),
    'u8_d16': (1, 'lo'),
    'u8_d16_hi': (1, 'hi'),
    'i8_d16': (1, 'slo'),
    'i8_d16_hi': (1, 'shi'),
    'u16_d16': (2, 'lo'),
    'u16_d16_hi': (2, 'hi'),
}
WRITE = {
    'b8': (1, 0),
    'b16': (2, 0),
    'b8_d16_hi': (1, 16),
    'b16_d16_hi': (2, 16),
    'b32': (4, 0),
    'b64': (8, 0),
    'b96': (12, 0),
    'b128': (16, 0),
}
INTEGER_ATOMIC = {
    'add': 'add',
    'sub': 'sub',
    'rsub': 'rsub',
    'inc': 'inc',
    'dec': 'dec',
    'and': 'and',
    'or': 'or',
    'xor': 'xor',
    'wrxchg': 'swap',
}
FLOAT_ATOMIC = (
    'add_f32',
    'add_f64',
    'max_f32',
    'min_f32',
    'max_f64',
    'min_f64',
    'pk_add_f16',
    'pk_add_bf16',
)


def mask_or(n: int) -> AtomicFn:
    """ds_mskor: (old & ~mask) | value, `new` carries [mask | value]."""
    return lambda old, new: (old & ~new[:, :n]) | new[:, n:]


def wrap32(old: Array, new: Array) -> Array:
    """ds_wrap_rtn_b32: old >= data ? old - data : old + data2."""
    x, d = np.ascontiguousarray(old).view(u32), np.ascontiguousarray(new).view(u32)
    return np.where(x >= d[:, :1], x - d[:, :1], x + d[:, 1:]).view(u8)


def conditional_exchange(old: Array, new: Array) -> Array:
    """ds_condxchg32_rtn_b64: a dword is replaced where bit 31 of the new one is set."""
    x, d = np.ascontiguousarray(old).view(u32), np.ascontiguousarray(new).view(u32)
    return np.where(d >> u32(31) != 0, d & u32(0x7FFFFFFF), x).view(u8)


def swapped_compare(n: int, float_ty: Any = None) -> AtomicFn:
    """ds_cmpst: `new` carries [compare | value] (the opposite order of global cmpswap)."""

    def fn(old: Array, new: Array) -> Array:
        same = (old == new[:, :n]).all(-1, keepdims=True)
        if float_ty is not None:
            same = np.ascontiguousarray(old).view(float_ty) == np.ascontiguousarray(
                new[:, :n]
            ).view(float_ty)
        return np.where(same, new[:, n:], old)

    return fn


def atomic_table() -> dict[str, tuple[int, int, AtomicFn]]:
    """name after ds_ and without _rtn -> (bytes, data operands, function)."""
    table: dict[str, tuple[int, int, AtomicFn]] = {}
    for bits, suffix in ((32, ''), (64, '_x2')):
        n = bits // 8
        for name, key in INTEGER_ATOMIC.items():
            kind = 'b' if name in ('and', 'or', 'xor', 'wrxchg') else 'u'
            table[f'{name}_{kind}{bits}'] = (n, 1, ATOMIC[key + suffix][1])
        for name in ('min', 'max'):
            table[f'{name}_i{bits}'] = (n, 1, ATOMIC['s' + name + suffix][1])
            table[f'{name}_u{bits}'] = (n, 1, ATOMIC['u' + name + suffix][1])
        table[f'mskor_b{bits}'] = (n, 2, mask_or(n))
        table[f'cmpst_b{bits}'] = (n, 2, swapped_compare(n))
        table[f'cmpst_f{bits}'] = (n, 2, swapped_compare(n, {32: np.float32, 64: np.float64}[bits]))
    table.update({name: (*ATOMIC[name][:1], 1, ATOMIC[name][1]) for name in FLOAT_ATOMIC})
    table['wrap_b32'] = (4, 2, wrap32)
    table['condxchg32_b64'] = (8, 1, conditional_exchange)
    return table


TABLE = atomic_table()


def addresses(ins: Instr, k: int) -> Callable[[Batch], Array]:
    if 'addtid' in ins.op:  # M0 + 4 * lane, no address operand

        def by_lane(w: Batch) -> Array:
            m0 = w.s[M0]
            return np.broadcast_to(
                (m0 if type(m0) is int else m0.astype(i64)[:, None]) + 4 * LANES, w.shape
            )

        return by_lane
    a = rv32(ins.ops[k])
    # The sum of address and offset has 32 bits: compilers fold an offset into a negative address
    # (LLVM, hasUsableDSOffset).
    return lambda w: a(w).astype(i32).astype(i64)


def offsets_of(ins: Instr, mode: str | None, n: int) -> list[int]:
    if not mode:
        return [ins.mods.get('offset', 0)]
    unit = n * (64 if mode == '2st64' else 1)
    return [ins.mods.get('offset0', 0) * unit, ins.mods.get('offset1', 0) * unit]


def read(ins: Instr, mode: str | None, kind: str) -> Closure:
    n, how = READ[kind]
    offs, d, pc = offsets_of(ins, mode, n), ins.ops[0].idx, ins.pc
    where, each = addresses(ins, 1), max(1, n // 4)

    def land(w: Batch, base: Array, mask: Any) -> None:
        rows = Masked.rows(mask)
        flat, ids = pick(base, rows), every_row(w, rows)
        for k, x in enumerate(offs if rows is None or len(rows) else []):
            data = w.group.lds_load(w, flat + x, ids, n, ins)
            put_loaded(w, d + k * each, to_rows(data, w, rows, how, d + k * each))

    def f(w: Batch) -> None:
        base = where(w)
        for x in offs:
            w.group.count_lds(w, pc, base, x, n, True)
        lds = (offs, n)
        op = Pending(land, (base, Masked.keep(w)), pc, (d, d + each * len(offs)), lds=lds)
        if w.hazard and how in 'uws':
            poison(w, d, each * len(offs))
        issue(w, w.lgkm, op)

    return f


def write(ins: Instr, mode: str | None, kind: str) -> Closure:
    n, shift = WRITE[kind]
    offs, pc = offsets_of(ins, mode, n), ins.pc
    first = 0 if 'addtid' in ins.op else 1
    where, src = addresses(ins, 0), [ins.ops[first + k].idx for k in range(len(offs))]

    def land(w: Batch, base: Array, mask: Any, data: list[Array]) -> None:
        rows = Masked.rows(mask)
        flat, ids = pick(base, rows), every_row(w, rows)
        for x, rows_of in zip(offs if len(ids) else [], data, strict=False):
            w.group.lds_store(w, flat + x, ids, rows_of.reshape(-1, n)[ids], ins)

    def f(w: Batch) -> None:
        base = where(w)
        for x in offs:
            w.group.count_lds(w, pc, base, x, n, False)
        if w.hazard:
            data = [from_rows(w, s, n, shift, None).reshape(w.n, 64, n) for s in src]
            w.lgkm.append(Pending(land, (base, Masked.keep(w), data), pc, lds=(offs, n)))
            return
        rows = active_rows(w)
        if rows is None or len(rows):
            flat, ids = pick(base, rows), every_row(w, rows)
            for x, s in zip(offs, src, strict=True):
                w.group.lds_store(w, flat + x, ids, from_rows(w, s, n, shift, rows), ins)

    return f


def atomic(ins: Instr, n: int, sources: int, fn: AtomicFn, ret: bool) -> Closure:
    off, pc, d = ins.mods.get('offset', 0), ins.pc, ins.ops[0].idx
    where, src = addresses(ins, int(ret)), [ins.ops[int(ret) + 1 + k].idx for k in range(sources)]

    def land(w: Batch, base: Array, mask: Any, data: Array) -> None:
        rows = Masked.rows(mask)
        ids = every_row(w, rows)
        new = data.reshape(-1, n * sources)[ids]
        old = do_atomic(
            lambda a, r: w.group.lds_load(w, a, r, n, ins, True),
            lambda a, r, x: w.group.lds_store(w, a, r, x, ins, True),
            pick(base, rows) + off,
            ids,
            new,
            n,
            fn,
        )
        if ret and len(ids):
            put_loaded(w, d, to_rows(old, w, rows, 'w', d))

    def f(w: Batch) -> None:
        base = where(w)
        w.group.count_lds(w, pc, base, off, n, False, atomic=True)
        data = np.concatenate([from_rows(w, s, n, 0, None).reshape(w.n, 64, n) for s in src], -1)
        result = (d, d + n // 4) if ret else (0, 0)
        op = Pending(land, (base, Masked.keep(w), data), pc, result, lds=([off], n))
        if w.hazard and ret:
            poison(w, d, n // 4)
        issue(w, w.lgkm, op)

    return f


def exchange2(ins: Instr, mode: str, n: int) -> Closure:
    """ds_wrxchg2[st64]_rtn: two exchanges, two results."""
    offs, pc, d, each = offsets_of(ins, mode, n), ins.pc, ins.ops[0].idx, n // 4
    where, src = addresses(ins, 1), [ins.ops[2 + k].idx for k in (0, 1)]

    def land(w: Batch, base: Array, mask: Any, data: list[Array]) -> None:
        rows = Masked.rows(mask)
        flat, ids = pick(base, rows), every_row(w, rows)
        for k, x in enumerate(offs):
            old = w.group.lds_load(w, flat + x, ids, n, ins, True)
            w.group.lds_store(w, flat + x, ids, data[k].reshape(-1, n)[ids], ins, True)
            put_loaded(w, d + k * each, to_rows(old, w, rows, 'w', d + k * each))

    def f(w: Batch) -> None:
        data = [from_rows(w, s, n, 0, None).reshape(w.n, 64, n) for s in src]
        op = Pending(land, (where(w), Masked.keep(w), data), pc, (d, d + 2 * each))
        if w.hazard:
            poison(w, d, 2 * each)
        issue(w, w.lgkm, op)

    return f


def transpose_read(ins: Instr, n: int, width: int) -> Closure:
    """ds_read_b*_tr_b<width> (gfx950): each 16 lanes read a tile of 16 columns, row-major over the
    lanes in order; lane i of the group gets column i, one element per tile row."""
    off, d, pc, per = ins.mods.get('offset', 0), ins.ops[0].idx, ins.pc, 8 * n // width
    where = addresses(ins, 1)

    def land(w: Batch, base: Array) -> None:
        data = w.group.lds_load(w, base.reshape(-1) + off, np.arange(w.n * 64), n, ins).reshape(
            w.n, 64, n
        )
        el = unpack_bits(data, width)  # (waves, 64, per)
        col = el.reshape(w.n, 4, per, 16).transpose(0, 1, 3, 2).reshape(w.n, 64, per)
        if width >= 8:
            words = np.ascontiguousarray(col).view(u32)
        else:
            bits = ((col[..., None] >> np.arange(width)) & 1).astype(u8).reshape(w.n, 64, 8 * n)
            words = np.packbits(bits, axis=-1, bitorder='little').view(u32)
        put_loaded(w, d, list(np.ascontiguousarray(words.transpose(2, 0, 1))))

    def f(w: Batch) -> None:
        if not w.full:
            raise ExecError(f'`{ins.text}` with inactive lanes: the result is not defined')
        base = where(w)
        w.group.count_lds(w, pc, base, off, n, True)
        if w.hazard:
            poison(w, d, n // 4)
        issue(w, w.lgkm, Pending(land, (base,), pc, (d, d + n // 4), lds=([off], n)))

    return f


# ---- lane permutes


def deferred(w: Batch, d: int, value: Array, pc: int) -> None:
    """A permute result arrives with lgkmcnt like any LDS read."""

    def land(w: Batch, value: Array, mask: Any) -> None:
        w.v[d] = value if mask is None else np.where(mask, value, w.v[d])

    mask = Masked.keep(w)
    if w.hazard:
        poison(w, d, 1)
    issue(w, w.lgkm, Pending(land, (value, mask), pc, (d, d + 1)))


def permute(ins: Instr) -> Closure:
    """ds_bpermute: lane reads from lane address/4; ds_permute: lane sends there, the highest sender
    wins.
    """
    pull, off, d, pc = (
        ins.op == 'ds_bpermute_b32',
        u32(ins.mods.get('offset', 0)),
        ins.ops[0].idx,
        ins.pc,
    )
    a, data = rv32(ins.ops[1]), rv32(ins.ops[2])

    def f(w: Batch) -> None:
        lane = ((spread(a(w), w.shape) + off) >> u32(2)) & u32(63)
        x, lane = spread(data(w), w.shape), lane.astype(i64)
        if pull:
            v = np.take_along_axis(x, lane, 1)
            if not w.full:
                v = np.where(np.take_along_axis(w.m, lane, 1), v, u32(0))
        else:
            v = np.zeros(w.shape, u32)
            wave, src = np.nonzero(w.m)
            v[wave, lane[wave, src]] = x[wave, src]
        w.group.counters.lds_cycles += 2 * w.n
        deferred(w, d, v, pc)

    return f


def swizzle_pattern(v: Any) -> int:
    """Offset field of ds_swizzle, from a number or LLVM's swizzle(...) macro."""
    if isinstance(v, int):
        return v
    m = re.match(r'swizzle\((\w+)\s*,\s*(.*)\)', v)
    assert m
    mode, arg = m.group(1), m.group(2)
    if mode == 'QUAD_PERM':
        return 0x8000 | sum(int(x) << 2 * k for k, x in enumerate(arg.split(',')))
    if mode == 'BITMASK_PERM':
        a = o = x = 0
        for ch in arg.strip().strip('"'):
            a, o, x = a << 1 | (ch in 'pi'), o << 1 | (ch == '1'), x << 1 | (ch == 'i')
        return a | o << 5 | x << 10
    if mode in ('SWAP', 'REVERSE'):
        return 0x1F | (int(arg) - (mode == 'REVERSE')) << 10
    size, lane = (int(t) for t in arg.split(','))  # BROADCAST
    return (32 - size) | lane << 5


def swizzle_lanes(pattern: int) -> Array:
    if pattern & 0x8000:
        return (LANES & ~3) + np.array([(pattern >> 2 * k) & 3 for k in range(4)])[LANES & 3]
    a, o, x = pattern & 31, pattern >> 5 & 31, pattern >> 10 & 31
    return (LANES & 32) + ((((LANES & 31) & a) | o) ^ x)


def swizzle(ins: Instr) -> Closure:
    lane, src, d, pc = (
        swizzle_lanes(swizzle_pattern(ins.mods.get('offset', 0))),
        ins.ops[1].idx,
        ins.ops[0].idx,
        ins.pc,
    )

    def f(w: Batch) -> None:
        x = w.v[src][:, lane]
        deferred(w, d, x if w.full else np.where(w.m[:, lane], x, u32(0)), pc)

    return f


def decode(ins: Instr, kernel: Any) -> Closure | None:
    if not ins.op.startswith('ds_'):
        return None
    name = ins.op[3:].replace('_addtid', '')
    if name == 'nop':
        return lambda w: None
    if name in ('bpermute_b32', 'permute_b32'):
        return permute(ins)
    if name == 'swizzle_b32':
        return swizzle(ins)
    if m := re.match(r'^read_b(64|96)_tr_b(16|8|6|4)$', name):
        return transpose_read(ins, int(m.group(1)) // 8, int(m.group(2)))
    m = re.match(r'^(read|write)(2st64|2)?_(\w+)$', name)
    if m and m.group(3) in (READ if m.group(1) == 'read' else WRITE):
        return (read if m.group(1) == 'read' else write)(ins, m.group(2), m.group(3))
    if m := re.match(r'^wrxchg2(st64)?_rtn_b(32|64)$', name):
        return exchange2(ins, '2' + (m.group(1) or ''), int(m.group(2)) // 8)
    plain = name.replace('_rtn', '')
    if plain in TABLE:
        n, sources, fn = TABLE[plain]
        return atomic(ins, n, sources, fn, '_rtn' in name)
    return None
