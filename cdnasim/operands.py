"""Readers and writers of operands: each returns a closure, so that an instruction is decoded once
and run many times.

Types of vector operands: u i f 32 bits, U I D 64 bits, h H s b 16 bits (f16, u16, i16, bf16).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from .asm import Operand
from .batch import ALL, EXEC, M32, Batch, Row, Scalar, bool_to_mask, pair, spread
from .errors import UnsupportedError
from .numerics import f16, f32, f64, i16, i32, i64, u16, u32, u64

Read = Callable[[Batch], Any]
Write = Callable[[Batch, Any], None]


def const_bits(o: Operand, ty: str) -> int:
    """Bits of an immediate for an operand of type `ty` (CDNA3 ISA 5.4: inline constants and
    literals).
    """
    if o.kind == 'imm':
        if ty == 'U' or ty == 'I':
            return o.val & ALL
        if (
            ty == 'D'
        ):  # a 32-bit literal of an f64 operand is its high half; small ints are inline constants
            return o.val & ALL if -16 <= o.val <= 64 else (o.val & M32) << 32
        return o.val & M32
    if ty in 'hHs':
        return int(np.array(o.val, f16).view(u16))
    if ty == 'b':
        return struct.unpack('<I', struct.pack('<f', o.val))[0] >> 16
    if ty in 'DUI':
        return struct.unpack('<Q', struct.pack('<d', o.val))[0]
    return struct.unpack('<I', struct.pack('<f', o.val))[0]


def rs32(o: Operand, ty: str = 'u') -> Read:
    """Scalar source, 32 bits: int or uint64[waves]."""
    if o.kind == 's':
        i = o.idx
        return lambda w: w.s[i]
    if o.kind in ('imm', 'flt'):
        c = const_bits(o, ty)
        return lambda w: c
    if o.kind == 'scc':
        return lambda w: w.scc
    if o.kind == 'vccz':
        return lambda w: is_zero(w.vcc64())
    if o.kind == 'execz':
        return lambda w: is_zero(w.exec64())
    raise UnsupportedError(f'scalar operand {o.text!r}')


def is_zero(x: Scalar) -> Scalar:
    return int(x == 0) if type(x) is int else (x == 0).astype(u64)


def rs64(o: Operand, ty: str = 'U') -> Read:
    if o.kind == 's':
        i = o.idx
        return lambda w: pair(w.s[i], w.s[i + 1])
    if o.kind in ('imm', 'flt'):
        c = const_bits(o, ty)
        return lambda w: c
    return rs32(o)


def ws32(o: Operand) -> Write:
    if o.kind != 's':
        raise UnsupportedError(f'scalar destination {o.text!r}')
    i = o.idx

    def write(w: Batch, x: Scalar) -> None:
        w.s[i] = x & M32

    def write_exec(w: Batch, x: Scalar) -> None:
        w.s[i] = x & M32
        w.set_exec(w.exec64())

    return write_exec if i in (EXEC, EXEC + 1) else write


def ws64(o: Operand) -> Write:
    if o.kind != 's':
        raise UnsupportedError(f'scalar destination {o.text!r}')
    i = o.idx
    if i == EXEC:
        return lambda w, x: w.set_exec(x & ALL)

    def write(w: Batch, x: Scalar) -> None:
        w.s[i], w.s[i + 1] = x & M32, (x >> 32) & M32

    return write


def rv32(o: Operand, ty: str = 'u') -> Read:
    """Vector source, 32 bits: uint32 that broadcasts to (waves, 64)."""
    if o.kind == 'v':
        i = o.idx
        return lambda w: w.v[i]
    if o.kind in ('imm', 'flt'):
        c = u32(const_bits(o, ty))
        return lambda w: c
    r = rs32(o, ty)

    def read(w: Batch) -> Row:
        x = r(w)
        return u32(x) if type(x) is int else x.astype(u32)[:, None]

    return read


def rv64(o: Operand, ty: str = 'U') -> Read:
    """Vector source, 64 bits: uint64 that broadcasts to (waves, 64)."""
    if o.kind == 'v':
        i = o.idx
        return lambda w: w.v[i].astype(u64) | (w.v[i + 1].astype(u64) << u64(32))
    r = rs64(o, ty)

    def read(w: Batch) -> Row:
        x = r(w)
        return u64(x) if type(x) is int else x[:, None]

    return read


def wv32(o: Operand) -> Write:
    """EXEC-masked write of uint32."""
    if o.kind != 'v':
        raise UnsupportedError(f'vector destination {o.text!r}')
    i = o.idx
    return lambda w, x: w.put(i, x)


def wv64(o: Operand) -> Write:
    i = o.idx

    def write(w: Batch, x: Row) -> None:
        w.put(i, lo32(x))
        w.put(i + 1, (x >> u64(32)).astype(u32))

    return write


def lo32(x: Row) -> Row:
    return (x & u64(M32)).astype(u32)


def write_mask(o: Operand) -> Write:
    """Writer of a lane mask from bool (waves, 64); inactive lanes give 0 (CDNA3 ISA 6.6 for
    compares).
    """
    wr = ws64(o)

    def write(w: Batch, b: Any) -> None:
        b = spread(b, w.shape)
        wr(w, bool_to_mask(b if w.full else b & w.m))

    return write


TYPED: dict[str, Callable[[Any], Any]] = {  # raw bits -> typed value
    'u': lambda x: x,
    'U': lambda x: x,
    'i': lambda x: x.view(i32),
    'f': lambda x: x.view(f32),
    'I': lambda x: x.view(i64),
    'D': lambda x: x.view(f64),
    'h': lambda x: x.astype(u16).view(f16),
    'H': lambda x: x.astype(u16),
    's': lambda x: x.astype(u16).view(i16),
    'b': lambda x: (x << u32(16)).view(f32),
}
RAW: dict[str, Callable[[Any], Any]] = {  # typed value -> raw bits
    'u': lambda x: x,
    'U': lambda x: x,
    'i': lambda x: x.view(u32),
    'f': lambda x: x.view(u32),
    'I': lambda x: x.view(u64),
    'D': lambda x: x.view(u64),
    'h': lambda x: x.view(u16).astype(u32),
    'H': lambda x: x.astype(u32),
    's': lambda x: x.view(u16).astype(u32),
}
