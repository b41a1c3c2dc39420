"""Operands A and B of matrix instructions: registers -> numbers, and their product.

Formats of few bits are decoded to f32 and multiplied in f32 where that is exact: every element is a
whole multiple of a unit, and when the largest possible sum of products stays within 2^24 units, no
partial sum is rounded, whatever the order. Everything else goes through f64.

Waves next to each other often hold the same operand (the waves of a workgroup share tokens): it is
decoded once for each run of them.
"""

from __future__ import annotations

from functools import reduce
from math import gcd, log2
from operator import is_
from typing import TYPE_CHECKING

import numpy as np

from .. import numerics as nm
from ..asm import Instr, Operand
from ..batch import Batch, Row
from ..errors import UnsupportedError
from ..numerics import Array, f16, f32, f64, i64, u8, u16, u32, u64
from ..operands import const_bits

if TYPE_CHECKING:
    from .mfma import Shape

# byte -> two fp4 values, moved as one item
FP4_BYTE = np.stack([nm.FP4.table[np.arange(256) & 15], nm.FP4.table[np.arange(256) >> 4]], -1)
FP4_PAIR = np.ascontiguousarray(FP4_BYTE).view(np.complex64)[:, 0]
F16_TABLE = np.arange(1 << 16, dtype=u16).view(f16).astype(f64)
CACHE_LIMIT = (
    96  # decoded operands kept per batch: a GEMM tile reuses each of its fragments 2 to 16 times
)
# log2 of the largest magnitude in units of the smallest, for formats decoded to f32
SPAN = {'fp4': log2(12), 'fp6': log2(60), 'bf6': log2(448), 'i8': 7.0}
EXACT_BITS = 24  # of an f32 significand
NEAR_ONE = (127 - 55, 127 + 55)  # E8M0 codes whose products neither overflow nor underflow in f32
E8M0_F32 = nm.E8M0.astype(f32)


def elements(raw: Array, ty: str, arch: str) -> Array:
    """Registers of one operand, uint32 (waves, 64, registers) -> numbers (waves, 64, elements)."""
    if ty == 'fp4':
        return FP4_PAIR.take(raw.view(u8)).view(f32)
    if ty in ('fp6', 'bf6'):
        return nm.BY_NAME[ty].table.take(nm.unpack_bits(raw.view(u8), 6))
    if ty in ('fp8', 'bf8'):
        return nm.minifloat(ty, arch).table64.take(raw.view(u8))
    if ty == 'f16':
        return F16_TABLE.take(raw.view(u16))
    if ty == 'bf16':
        return (raw.view(u16).astype(u32) << u32(16)).view(f32).astype(f64)
    if ty == 'i8':
        return raw.view(np.int8).astype(f32)
    if ty == 'f64':
        return raw.view(f64)
    if ty == 'xf32':  # 10 mantissa bits are kept
        raw = (raw + u32(0x1000)) & u32(0xFFFFE000)
    return raw.view(f32).astype(f64)


class Fragment:
    """A decoded operand: x (waves / share, blocks, rows, K), each entry for `share` waves in a row.

    `span`: log2 of the largest magnitude in units that every element is a multiple of.
    """

    __slots__ = ('x', 'share', 'span', 'double')

    def __init__(self, x: Array, share: int, span: float):
        self.x, self.share, self.span = x, share, span
        self.double: Array | None = x if x.dtype == f64 else None

    def wide(self) -> Array:
        """x in f64."""
        if self.double is None:
            self.double = self.x.astype(f64)
        return self.double

    def whole(self) -> Array:
        """f64, one entry per wave."""
        x = self.wide()
        return x if self.share == 1 else x.repeat(self.share, 0)


def product(a: Fragment, b: Fragment, waves: int) -> Array:
    """A B^T per wave and block: (waves, blocks, M, N); f32 where that is exact."""
    x, y, k = a.x, b.x, a.x.shape[-1]
    if not (x.dtype == y.dtype == f32 and a.span + b.span + log2(k) <= EXACT_BITS):
        x, y = a.wide(), b.wide()
    many, few = a.share, b.share
    if x.shape[1] > 1 or many % few and few % many:
        x, y, many, few = x.repeat(many, 0), y.repeat(few, 0), 1, 1
    if many == few == 1:
        return np.matmul(x, y.swapaxes(-1, -2))
    if few < many:  # A is what more waves share: the transposed product has the long rows
        return stacked(y, x, few, many, waves).swapaxes(-1, -2)
    return stacked(x, y, many, few, waves)


def stacked(x: Array, y: Array, less: int, more: int, waves: int) -> Array:
    """x y^T where runs of `more` waves share an entry of y: their x are the rows of one matrix."""
    (_, _, m, k), n = x.shape, y.shape[2]
    groups = waves // more
    rows = x.reshape(groups, more // less * m, k)
    out = np.matmul(rows, y.reshape(groups, n, k).swapaxes(-1, -2)).reshape(-1, 1, m, n)
    return out if less == 1 else out.repeat(less, 0)


def run_length(raw: Array, more: list[Row]) -> int:
    """The largest r such that waves r k .. r k + r - 1 hold the same values in raw (waves, 64, n)
    and in the rows `more`.
    """
    n, first = len(raw), raw[:, 0, 0]
    if n > 1 and (first[1:] != first[:-1]).all():
        return 1
    words = raw.reshape(n, -1).view(u64)
    change = (words[1:] != words[:-1]).any(1)
    for row in more:
        change |= (row[1:] != row[:-1]).any(1)
    return gcd(n, *(np.flatnonzero(change) + 1).tolist())


def stack(rows: list[Row]) -> Array:
    """Registers -> uint32 (waves, 64, n)."""
    out = np.empty((*rows[0].shape, len(rows)), u32)
    for k, row in enumerate(rows):
        out[..., k] = row
    return out


class Side:
    """Operand A or B: decodes registers, and remembers the result while the rows stay."""

    def __init__(self, ins: Instr, shape: Shape, which: int, arch: str):
        o = ins.ops[1 + which]
        if o.kind != 'v':
            raise UnsupportedError(f'`{ins.text}`: matrix operand {o.text!r} is no vector register')
        self.first, self.nregs, self.ty, self.arch, self.shape, self.which = (
            o.idx,
            o.n,
            shape.types[which],
            arch,
            shape,
            which,
        )
        self.rows = shape.M if which == 0 else shape.N
        self.split = shape.f8f6f4 and self.ty in ('fp8', 'bf8')
        if shape.f8f6f4:
            self.nregs = {'fp8': 8, 'bf8': 8, 'fp6': 6, 'bf6': 6, 'fp4': 4}[self.ty]
        self.scale: Operand | None = None
        self.bit = 0
        if shape.scaled:
            sel, sel_hi = ins.mods.get('op_sel', [0, 0, 0]), ins.mods.get('op_sel_hi', [0, 0, 0])
            self.scale, self.bit = ins.ops[4 + which], 8 * (sel[which] + 2 * sel_hi[which])
        self.key = (
            which,
            self.first,
            self.nregs,
            self.ty,
            self.rows,
            shape.blocks,
            shape.cbsz,
            shape.abid,
            shape.blgp,
            self.scale and self.scale.text,
            self.bit,
        )

    def read(self, w: Batch) -> Fragment:
        rows = w.v[self.first : self.first + self.nregs]
        if self.scale is not None and self.scale.kind == 'v':
            rows.append(w.v[self.scale.idx])
        hit = w.decoded.get(self.key)
        if hit is not None and all(map(is_, hit[0], rows)):
            return hit[1]
        if len(w.decoded) >= CACHE_LIMIT:
            w.decoded.clear()
        x = self.decode(w, rows)
        if self.scale is None or self.scale.kind != 's':
            w.decoded[self.key] = (rows, x)
        return x

    def decode(self, w: Batch, rows: list[Row]) -> Fragment:
        share, raw = 1, stack(rows[: self.nregs])
        if self.shape.blocks == 1 and (self.scale is None or self.scale.kind == 'v'):
            share = run_length(raw, rows[self.nregs :])
            raw, rows = raw[::share], [row[::share] for row in rows[self.nregs :]]
        span = SPAN.get(self.ty, 0.0)
        if self.scale is None:
            return Fragment(self.arrange(elements(raw, self.ty, self.arch)), share, span)
        codes, more = self.scale_codes(w, rows), None
        if self.ty in SPAN:
            codes, more = near_codes(codes, raw)
        n, groups = len(raw), self.shape.groups
        if self.split:
            x = self.arrange(elements(raw, self.ty, self.arch))
        else:  # a lane holds one block of 32: move registers instead of numbers
            lanes = raw.reshape(n, groups, self.rows, -1).swapaxes(1, 2)
            x = elements(np.ascontiguousarray(lanes), self.ty, self.arch)
        x = x.reshape(n, self.rows, groups, 32)
        if more is None:
            x, more = x.astype(f64, copy=False), 0.0
        scale = (nm.E8M0 if x.dtype == f64 else E8M0_F32).take(codes.swapaxes(1, 2))
        x *= scale[..., None]
        return Fragment(x.reshape(n, 1, self.rows, -1), share, span + more)

    def arrange(self, el: Array) -> Array:
        """(waves, 64, elements) -> (waves, blocks, rows, K)."""
        s, n, per = self.shape, el.shape[0], el.shape[2]
        if self.which and s.blgp:
            el = el[:, blgp_lanes(s.blgp)]
        if self.split:
            x = el.reshape(n, s.groups, self.rows, 2, 16).transpose(0, 2, 3, 1, 4)
        else:
            x = el.reshape(n, s.groups, s.blocks, self.rows, per).transpose(0, 2, 3, 1, 4)
        x = x.reshape(n, s.blocks, self.rows, s.groups * per)
        if self.which == 0 and s.cbsz and not s.sparse:
            b = np.arange(s.blocks)
            x = x[:, (b & ~((1 << s.cbsz) - 1)) + s.abid]
        return -x if s.neg[self.which] else x

    def scale_codes(self, w: Batch, rows: list[Row]) -> Array:
        """E8M0 codes (waves, groups, rows)."""
        o = self.scale
        assert o is not None
        if o.kind == 'v':
            x = np.ascontiguousarray(rows[-1]).view(u8)[:, self.bit // 8 :: 4]
            return np.ascontiguousarray(x).reshape(-1, self.shape.groups, self.rows)
        bits = w.s[o.idx] if o.kind == 's' else const_bits(o, 'f')
        one = ((np.asarray(bits, u64) >> u64(self.bit)).astype(i64) & 255).astype(u8)
        return np.broadcast_to(np.reshape(one, (-1, 1, 1)), (w.n, self.shape.groups, self.rows))


def near_codes(codes: Array, raw: Array) -> tuple[Array, float | None]:
    """Scale codes fit for f32, and how many bits they add to the span; None when they are not fit.

    A block of zeros may have any scale: it takes its row's, so that it widens nothing.
    """
    most, least = extremes(codes)
    if not (near(least) and near(most)):
        blank = ((raw & u32(0x77777777)) == 0).all(-1).reshape(codes.shape) & (codes != 255)
        if raw.shape[-1] != 4 or not blank.any():
            return codes, None
        top = np.where(blank, u8(0), codes).max(1, keepdims=True)
        codes = np.where(blank, np.where(top == 0, u8(127), top), codes)
        most, least = extremes(codes)
        if not (near(least) and near(most)):
            return codes, None
    return codes, float((most - least).max())


def extremes(codes: Array) -> tuple[Array, Array]:
    """Largest and smallest code of each row."""
    groups = list(codes.swapaxes(0, 1))
    return reduce(np.maximum, groups), reduce(np.minimum, groups)


def near(codes: Array) -> bool:
    return bool(codes.min() >= NEAR_ONE[0] and codes.max() <= NEAR_ONE[1])


def blgp_lanes(blgp: int) -> Array:
    """Lane group pattern of B (CDNA3 ISA 7.1.3): 1, 2 broadcast a half, 3 rotates by 16 lanes, 4-7
    broadcast a quarter.
    """
    lane = np.arange(64)
    if blgp in (1, 2):
        return lane % 32 + 32 * (blgp - 1)
    return (lane + 16) % 64 if blgp == 3 else lane % 16 + 16 * (blgp - 4)
