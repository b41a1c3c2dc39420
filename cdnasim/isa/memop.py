"""What all vector memory instructions share: widths, registers <-> bytes, atomics, issue and
landing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .. import numerics as nm
from ..batch import POISON, Batch, Pending, spread
from ..numerics import Array, f16, f32, f64, i32, i64, u8, u16, u32, u64

# kind -> (bytes in memory, how it lands: w whole dwords, u/s extended, lo/hi one half of the
# register, sign if 's' first)
LOAD = {
    'ubyte': (1, 'u'),
    'sbyte': (1, 's'),
    'ushort': (2, 'u'),
    'sshort': (2, 's'),
    'dword': (4, 'w'),
    'dwordx2': (8, 'w'),
    'dwordx3': (12, 'w'),
    'dwordx4': (16, 'w'),
    'ubyte_d16': (1, 'lo'),
    'ubyte_d16_hi': (1, 'hi'),
    'sbyte_d16': (1, 'slo'),
    'sbyte_d16_hi': (1, 'shi'),
    'short_d16': (2, 'lo'),
    'short_d16_hi': (2, 'hi'),
}
STORE = {
    'byte': (1, 0),
    'short': (2, 0),
    'byte_d16_hi': (1, 16),
    'short_d16_hi': (2, 16),
    'dword': (4, 0),
    'dwordx2': (8, 0),
    'dwordx3': (12, 0),
    'dwordx4': (16, 0),
}
MIXED_HALVES = ('lo', 'hi', 'slo', 'shi')


def to_rows(data: Array, w: Batch, rows: Array | None, how: str, first: int) -> list[Array]:
    """uint8[k, n] of the active lanes -> register values (waves, 64); `rows` None: every lane of
    every wave.
    """
    n = data.shape[1]
    if how == 'w':
        words = data.view(u32)
        if rows is None:
            return list(np.ascontiguousarray(words.reshape(*w.shape, n // 4).transpose(2, 0, 1)))
        return [replaced(words[:, k], w, rows, w.v[first + k]) for k in range(n // 4)]
    x = data[:, 0].astype(u32) if n == 1 else data.view(u16)[:, 0].astype(u32)
    if how[0] == 's':
        x = (x ^ u32(1 << (8 * n - 1))) - u32(1 << (8 * n - 1))
    old = w.v[first]
    if how in MIXED_HALVES:
        kept = (
            np.ascontiguousarray(old).reshape(-1)
            if rows is None
            else np.ascontiguousarray(old).reshape(-1)[rows]
        )
        x = (
            (kept & u32(0xFFFF0000)) | (x & u32(0xFFFF))
            if how[-2:] == 'lo'
            else (kept & u32(0xFFFF)) | (x << u32(16))
        )
    return [x.reshape(w.shape) if rows is None else replaced(x, w, rows, old)]


def replaced(x: Array, w: Batch, rows: Array, old: Array) -> Array:
    out = np.array(old, order='C')
    out.reshape(-1)[rows] = x
    return out


def from_rows(w: Batch, first: int, n: int, shift: int, rows: Array | None) -> Array:
    """Registers -> uint8[k, n] to store, k active lanes."""
    if n >= 4:
        words: Array = np.empty((*w.shape, n // 4), u32)
        for k, row in enumerate(w.v[first : first + n // 4]):
            words[..., k] = row
        words = words.reshape(-1, n // 4)
        return (words if rows is None else words[rows]).view(u8)
    x = np.ascontiguousarray(w.v[first]).reshape(-1)
    x = x if rows is None else x[rows]
    x = x >> u32(shift) if shift else x
    return x.view(u8).reshape(-1, 4)[:, :n]


def active_rows(w: Batch) -> Array | None:
    return None if w.full else w.lanes()


def pick(a: Array, rows: Array | None) -> Array:
    """(waves, 64) -> active lanes, flat."""
    flat = a.reshape(-1)
    return flat if rows is None else flat[rows]


def every_row(w: Batch, rows: Array | None) -> Array:
    return np.arange(w.n * 64) if rows is None else rows


def put_loaded(w: Batch, first: int, rows: list[Array]) -> None:
    w.v[first : first + len(rows)] = rows


class Masked:
    """EXEC of the moment an operation issued, in a form that follows a split of the batch."""

    @staticmethod
    def keep(w: Batch) -> Array | None:
        return None if w.full else w.m

    @staticmethod
    def rows(mask: Array | None) -> Array | None:
        return None if mask is None else np.flatnonzero(mask)


def issue(w: Batch, queue: list[Pending], op: Pending) -> None:
    """Hazard mode keeps the operation until a wait; otherwise it lands now."""
    if w.hazard:
        queue.append(op)
    else:
        op.land(w, *op.args)


def poison(w: Batch, first: int, n: int) -> None:
    """In flight: the active lanes of the destination hold a NaN nobody should read."""
    if w.full:
        w.v[first : first + n] = [spread(POISON, w.shape)] * n
        return
    for k in range(first, first + n):
        w.v[k] = np.where(w.m, POISON, w.v[k])


# ---- atomics: fn(old uint8[k, n], new uint8[k, m]) -> uint8[k, n]
AtomicFn = Callable[[Array, Array], Array]


def typed(ty: Any, fn: Callable[[Any, Any], Any]) -> AtomicFn:
    def apply(a: Array, b: Array) -> Array:
        x, y = np.ascontiguousarray(a).view(ty), np.ascontiguousarray(b).view(ty)
        return np.ascontiguousarray(fn(x, y).astype(ty)).view(u8)

    return apply


def bf16_add(a: Array, b: Array) -> Array:
    x = nm.bf16_to_f32(np.ascontiguousarray(a).view(u16)) + nm.bf16_to_f32(
        np.ascontiguousarray(b).view(u16)
    )
    return np.ascontiguousarray(nm.f32_to_bf16(x).astype(u16)).view(u8)


def compare_swap(n: int) -> AtomicFn:
    """`new` carries [value | compare]."""
    return lambda old, new: np.where((old == new[:, n:]).all(-1, keepdims=True), new[:, :n], old)


ATOMIC: dict[str, tuple[int, AtomicFn]] = {
    'add_f32': (4, typed(f32, np.add)),
    'add_f64': (8, typed(f64, np.add)),
    'pk_add_f16': (4, typed(f16, np.add)),
    'pk_add_bf16': (4, bf16_add),
    'max_f64': (8, typed(f64, np.fmax)),
    'min_f64': (8, typed(f64, np.fmin)),
    'max_f32': (4, typed(f32, np.fmax)),
    'min_f32': (4, typed(f32, np.fmin)),
    'cmpswap': (4, compare_swap(4)),
    'cmpswap_x2': (8, compare_swap(8)),
}
for suffix, signed_ty, unsigned_ty in (('', i32, u32), ('_x2', i64, u64)):
    size = 8 if suffix else 4
    one = unsigned_ty(1)
    ATOMIC.update(
        {
            name + suffix: (size, typed(ty, fn))
            for name, ty, fn in (
                ('add', unsigned_ty, np.add),
                ('sub', unsigned_ty, np.subtract),
                ('rsub', unsigned_ty, lambda a, b: b - a),
                ('and', unsigned_ty, np.bitwise_and),
                ('or', unsigned_ty, np.bitwise_or),
                ('xor', unsigned_ty, np.bitwise_xor),
                ('smax', signed_ty, np.maximum),
                ('smin', signed_ty, np.minimum),
                ('umax', unsigned_ty, np.maximum),
                ('umin', unsigned_ty, np.minimum),
                ('swap', unsigned_ty, lambda a, b: b),
                ('inc', unsigned_ty, lambda a, b, one=one: np.where(a >= b, 0, a + one)),
                (
                    'dec',
                    unsigned_ty,
                    lambda a, b, one=one: np.where((a == 0) | (a > b), b, a - one),
                ),
            )
        }
    )


def in_order(addr: Array) -> tuple[Array, Array]:
    """(stable order, its addresses less the least): one sort of address and index in a word, in
    half the time of a stable argsort.
    """
    if not len(addr):
        return addr, addr
    bits = len(addr).bit_length()
    least = addr.min()
    if int(addr.max()) - int(least) >> (62 - bits):
        order = np.argsort(addr, kind='stable')
        return order, addr[order]
    keys = np.sort((addr - least) << bits | np.arange(len(addr)))
    return keys & ((1 << bits) - 1), keys >> bits


def do_atomic(
    load: Callable[[Array, Array], Array],
    store: Callable[[Array, Array, Array], None],
    addr: Array,
    rows: Array,
    data: Array,
    n: int,
    fn: AtomicFn,
) -> Array:
    """Perform in order of wave and lane. Lanes that share an address go one round after another ->
    old values.
    """
    order, ranked = in_order(addr)
    if (ranked[1:] != ranked[:-1]).all():
        old = load(addr, rows)
        store(addr, rows, fn(old, data))
        return old
    old = np.empty((len(addr), n), u8)
    starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
    rank = np.arange(len(addr)) - np.repeat(starts, np.diff(np.r_[starts, len(addr)]))
    for k in range(int(rank.max()) + 1):
        sel = order[rank == k]
        old[sel] = load(addr[sel], rows[sel])
        store(addr[sel], rows[sel], fn(old[sel], data[sel]))
    return old
