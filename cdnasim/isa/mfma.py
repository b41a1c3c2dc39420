"""Matrix instructions v_mfma_*, v_mfma_scale_* and v_smfmac_*: parsing, register <-> matrix maps,
execution.

Maps (CDNA3 ISA 7.1.4 and 7.4; l = lane, e = element in register order low bits first, B = blocks, M
= rows of A):
  A, B   row (column) i = l % M, block = l // M % B, k = kper * (l // (M * B)) + e
         fp8/bf8 operand of *_f8f6f4: k = (e // 16) * (K / 2) + 16 * (l // M) + e % 16, two 16-byte
         chunks per lane
  C, D   column l % N; 32x32: row 8 * (r // 4) + 4 * (l // 32) + r % 4; 16x16: row 4 * (l // 16) +
  r;
         4x4: row r, block l // 4; f64 16x16: row 4 * r + l // 16; f64 4x4: row l // 16, block l //
         4 % 4
  scales lane l holds the E8M0 byte of row l % M, K-block l // M (32 logical k each); the byte of
  the register is
         op_sel + 2 * op_sel_hi of that operand.
  sparse A holds K/2 values; two of every four k are kept, their positions are 2-bit fields of the
  index register.
The sum is taken in f64 and rounded once; the hardware's order of additions is not published. EXEC
is ignored.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from operator import is_
from typing import Any

import numpy as np

from .. import numerics as nm
from ..asm import Instr, Operand
from ..batch import Batch
from ..errors import UnsupportedError
from ..numerics import Array, f32, f64, i32, i64, u32, u64
from ..operands import const_bits
from .convert import stack_rows
from .fragment import Side, elements, product

Closure = Callable[[Batch], Any]
NAME = re.compile(
    r'^v_(s?)mf(?:ma|mac)_(scale_)?(f32|i32|f64)_(\d+)x(\d+)x(\d+)_?(?:(\d+)b_)?(\w+?)(_1k)?$'
)
# FLOP per cycle and CU, whole chip peak / (CUs * clock): AMD CDNA3 and CDNA4 white papers
RATE = {
    'gfx942': {
        'f32': 64,
        'xf32': 256,
        'f64': 64,
        'f16': 512,
        'bf16': 512,
        'i8': 1024,
        'fp8': 1024,
        'bf8': 1024,
    },
    'gfx950': {
        'f32': 64,
        'f64': 32,
        'f16': 1024,
        'bf16': 1024,
        'i8': 2048,
        'fp8': 2048,
        'bf8': 2048,
        'fp6': 4096,
        'bf6': 4096,
        'fp4': 4096,
    },
}


class Shape:
    """What the name and the modifiers of one instruction say."""

    def __init__(self, ins: Instr, arch: str):
        m = NAME.match(ins.op)
        assert m
        self.sparse, self.scaled, self.out = bool(m.group(1)), bool(m.group(2)), m.group(3)
        self.M, self.N, self.K = (int(m.group(k)) for k in (4, 5, 6))
        self.blocks, kind, mods = int(m.group(7) or 1), m.group(8), ins.mods
        self.f8f6f4 = kind == 'f8f6f4'
        if self.f8f6f4:
            if arch == 'gfx942':
                raise UnsupportedError(f'`{ins.text}` exists on gfx950 only')
            self.types = tuple(nm.FORMAT_BY_CODE[mods.get(k, 0)].name for k in ('cbsz', 'blgp'))
        else:
            parts = kind.split('_')
            self.types = (parts[0], parts[-1])
        self.cbsz: int = 0 if self.f8f6f4 else mods.get('cbsz', 0)
        self.abid: int = 0 if self.f8f6f4 else mods.get('abid', 0)
        self.blgp = 0 if self.f8f6f4 or self.out == 'f64' else mods.get('blgp', 0)
        self.neg = mods.get('neg', [0, 0, 0])
        self.groups = 64 // (self.M * self.blocks)

    @property
    def flops(self) -> int:
        return 2 * self.M * self.N * self.K * self.blocks

    def cycles(self, arch: str) -> int:
        """Duration from peak rates, 4 cycles a pass. gfx950 keeps the CDNA3 duration of the CDNA3
        shapes.
        """
        rate = dict(RATE[arch])
        small = {(16, 16), (32, 8)} if self.types[0] in ('f16', 'bf16') else {(16, 32), (32, 16)}
        if arch == 'gfx950' and not self.sparse and (self.M, self.K) in small and not self.f8f6f4:
            rate.update({k: RATE['gfx942'][k] for k in ('f16', 'bf16', 'i8', 'fp8', 'bf8')})
        work = self.flops // (2 if self.sparse else 1)
        return max(work // min(rate[t] for t in self.types), 8 if self.M == 4 else 16)


# ---- accumulators: register order <-> matrix order, as views


def as_registers(x: Array, s: Shape) -> Array:
    """(waves, blocks, M, N) -> view (registers..., waves, lane parts...) in the order of the map of
    D.
    """
    n, b = x.shape[0], s.blocks
    if s.M == 32:
        return x.reshape(n, b, 4, 2, 4, 32).transpose(1, 2, 4, 0, 3, 5)
    if s.out == 'f64':
        return (
            x.reshape(n, 4, 4, 16).transpose(1, 0, 2, 3)
            if s.M == 16
            else x.transpose(0, 2, 1, 3)[None]
        )
    if s.M == 16:
        return x.reshape(n, b, 4, 4, 16).transpose(1, 3, 0, 2, 4)
    return x.transpose(2, 0, 1, 3)


class Accumulator:
    """Reader and writer of C and D. A block written by one instruction is read back whole by the
    next.
    """

    def __init__(self, ins: Instr, s: Shape, c: Operand):
        self.d, self.n = ins.ops[0].idx, ins.ops[0].n
        self.c, self.s = c, s
        self.dtype = {'f32': f32, 'i32': i32, 'f64': f64}[s.out]
        self.const: Any = None
        if c.kind != 'v':
            bits = const_bits(c, {'f32': 'f', 'i32': 'u', 'f64': 'D'}[s.out])
            self.const = np.array(bits, u64 if s.out == 'f64' else u32).view(self.dtype)[()]

    def read(self, w: Batch, shape: tuple[int, ...]) -> Any:
        """C in register order, viewed with the same axes as `as_registers` gives."""
        if self.const is not None:
            return self.const
        rows = w.v[self.c.idx : self.c.idx + self.n]
        hit = w.decoded.get(('acc', self.c.idx, self.n))
        block = hit[1] if hit is not None and all(map(is_, hit[0], rows)) else np.array(rows)
        if self.s.out == 'f64':
            pairs = block.reshape(self.n // 2, 2, w.n, 64).transpose(0, 2, 3, 1)
            return np.ascontiguousarray(pairs).view(f64)[..., 0].reshape(shape)
        return block.view(self.dtype).reshape(shape)

    def write(self, w: Batch, x: Array) -> None:
        block = x.reshape(-1, w.n, 64)
        if self.s.out == 'f64':
            words = np.ascontiguousarray(block).view(u32).reshape(-1, w.n, 64, 2)
            block = np.ascontiguousarray(words.transpose(0, 3, 1, 2)).reshape(self.n, w.n, 64)
        block = block.view(u32)
        rows = list(block)
        w.v[self.d : self.d + self.n] = rows
        w.decoded['acc', self.d, self.n] = (rows, block)


def dense(ins: Instr, s: Shape, arch: str) -> Closure:
    a, b, acc = Side(ins, s, 0, arch), Side(ins, s, 1, arch), Accumulator(ins, s, ins.ops[3])
    neg_c = s.neg[2] if len(s.neg) > 2 else 0

    def f(w: Batch) -> None:
        prod = as_registers(product(a.read(w), b.read(w), w.n), s)
        c = acc.read(w, prod.shape)
        acc.write(w, accumulate(prod, -c if neg_c else c, s))

    return f


def accumulate(prod: Array, c: Any, s: Shape) -> Array:
    """prod + c, rounded once: a sum of two f32 is the same rounded from f64 (53 >= 2 * 24 + 2)."""
    if s.out == 'i32':
        return np.add(prod.astype(i32), c)  # |prod| < 2^31; the sum wraps
    out = np.empty(prod.shape, f32 if s.out == 'f32' else f64)
    return np.add(prod, c, out=out, dtype=prod.dtype, casting='same_kind')


def sparse(ins: Instr, s: Shape, arch: str) -> Closure:
    """v_smfmac: D += A * B with A 4:2 sparse. 16-bit data takes 2 bits x 4 (gfx950 double-K: 8)
    from the index register, 8-bit data twice as many; ABID picks the set when CBSZ is 0 (CDNA3 ISA
    7.4)."""
    kept = s.K // 2 // s.groups  # A elements per lane
    s_a = Shape(ins, arch)
    a, b = Side(ins, s_a, 0, arch), Side(ins, s_a, 1, arch)
    acc, index = Accumulator(ins, s, ins.ops[0]), ins.ops[3].idx
    sets = 32 // (2 * kept)
    shift = 2 * kept * (s.abid % sets if s.cbsz == 0 else 0)
    base = 4 * (np.arange(kept) // 2)

    def f(w: Batch) -> None:
        field = (w.v[index][..., None] >> (shift + 2 * np.arange(kept)).astype(u32)) & u32(3)
        k = base + field.astype(i64)  # (waves, lane, kept), inside the lane's 2 * kept
        wide = np.zeros((w.n, 64, 2 * kept))
        packed = elements(stack_rows(w, a.first, a.nregs), a.ty, arch)
        np.put_along_axis(wide, k, packed, -1)
        x = (
            wide.reshape(w.n, s.groups, s.M, 2 * kept)
            .transpose(0, 2, 1, 3)
            .reshape(w.n, 1, s.M, s.K)
        )
        prod = as_registers(np.matmul(x, b.read(w).whole().swapaxes(-1, -2)), s)
        acc.write(w, accumulate(prod, acc.read(w, prod.shape), s))

    return f


def decode(ins: Instr, kernel: Any) -> Closure | None:
    if not NAME.match(ins.op):
        return None
    s = Shape(ins, kernel.arch)
    ins.flops, ins.cycles = s.flops, s.cycles(kernel.arch)
    return sparse(ins, s, kernel.arch) if s.sparse else dense(ins, s, kernel.arch)
