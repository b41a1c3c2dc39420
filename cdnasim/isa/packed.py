"""VOP3P: packed 16-bit and packed f32 arithmetic, and the mixed-precision fma (CDNA3 ISA 12.13)."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import numerics as nm
from ..asm import Instr, Operand
from ..batch import Batch
from ..errors import UnsupportedError
from ..numerics import f16, f32, i16, i64, u16, u32
from ..operands import RAW, TYPED, Read, rv32, wv32
from .valu_float import fma16, fma32
from .valu_int import max3, min3
from .vop import RANGE, Closure, Fn

PK16: dict[str, tuple[str, Fn]] = {
    'add_f16': ('h', lambda a, b: a + b),
    'mul_f16': ('h', lambda a, b: a * b),
    'min_f16': ('h', np.fmin),
    'max_f16': ('h', np.fmax),
    'fma_f16': ('h', fma16),
    'fmac_f16': ('h', fma16),
    'minimum3_f16': ('h', min3),
    'maximum3_f16': ('h', max3),
    'add_u16': ('H', lambda a, b: a + b),
    'sub_u16': ('H', lambda a, b: a - b),
    'mul_lo_u16': ('H', lambda a, b: a * b),
    'mad_u16': ('H', lambda a, b, c: a * b + c),
    'mad_i16': ('s', lambda a, b, c: a * b + c),
    'add_i16': ('s', lambda a, b: a + b),
    'sub_i16': ('s', lambda a, b: a - b),
    'min_u16': ('H', np.minimum),
    'max_u16': ('H', np.maximum),
    'min_i16': ('s', np.minimum),
    'max_i16': ('s', np.maximum),
    'lshlrev_b16': ('H', lambda a, b: b << (a & u16(15))),
    'lshrrev_b16': ('H', lambda a, b: b >> (a & u16(15))),
    'ashrrev_i16': ('s', lambda a, b: b >> (a & i16(15))),
}
PK32: dict[str, Fn] = {
    'add_f32': lambda a, b: a + b,
    'mul_f32': lambda a, b: a * b,
    'fma_f32': fma32,
}
MIX = {
    'v_fma_mix_f32': 'f32',
    'v_fma_mixlo_f16': 'lo',
    'v_fma_mixhi_f16': 'hi',
    'v_mad_mix_f32': 'f32',
    'v_mad_mixlo_f16': 'lo',
    'v_mad_mixhi_f16': 'hi',
}


def dwords(o: Operand) -> list[Read]:
    """Readers of the low and the high dword of a 64-bit operand; a constant serves both."""
    if o.kind == 'v':
        return [lambda w, i=o.idx + k: w.v[i] for k in (0, 1)]  # type: ignore[misc]
    if o.kind == 's':
        return [rv32(Operand('s', o.idx + k)) for k in (0, 1)]
    return [rv32(o, 'f')] * 2


class Selection:
    """op_sel, op_sel_hi, neg_lo and neg_hi with their defaults."""

    def __init__(self, ins: Instr, n: int, hi_default: int):
        self.lo, self.hi = (
            ins.mods.get('op_sel', [0] * n),
            ins.mods.get('op_sel_hi', [hi_default] * n),
        )
        self.neg_lo, self.neg_hi = ins.mods.get('neg_lo', [0] * n), ins.mods.get('neg_hi', [0] * n)


def packed_f32(ins: Instr, name: str, n: int) -> Closure:
    sel, rd, i = Selection(ins, n, 1), [dwords(o) for o in ins.ops[1:]], ins.ops[0].idx
    clamp = 'clamp' in ins.flags
    if name == 'mov_b32':

        def move(w: Batch) -> None:
            lo, hi = rd[0][sel.lo[0]](w), rd[1][sel.lo[1]](w)
            w.put(i, lo)
            w.put(i + 1, hi)

        return move
    fn = PK32[name]

    def half(w: Batch, which: list[int], neg: list[int]) -> Any:
        xs = [rd[k][which[k]](w).view(f32) for k in range(n)]
        r = fn(*[-x if neg[k] else x for k, x in enumerate(xs)])
        return (np.clip(r, f32(0), f32(1)) if clamp else r).view(u32)

    def f(w: Batch) -> None:
        lo, hi = half(w, sel.lo, sel.neg_lo), half(w, sel.hi, sel.neg_hi)
        w.put(i, lo)
        w.put(i + 1, hi)

    return f


def packed_16(ins: Instr, name: str) -> Closure:
    ty, fn = PK16[name]
    ops = [*ins.ops[1:], ins.ops[0]] if name == 'fmac_f16' else ins.ops[1:]
    n = len(ops)
    sel, clamp = Selection(ins, n, 1), 'clamp' in ins.flags
    rd = [rv32(o, 'h') if o.kind == 'flt' else rv32(o) for o in ops]
    conv, raw, wr = TYPED[ty], RAW[ty], wv32(ins.ops[0])
    sel.lo, sel.hi = [*sel.lo, 0][:n], [*sel.hi, 1][:n]

    def half(w: Batch, which: list[int], neg: list[int]) -> Any:
        xs = [conv(r(w) >> u32(16) if which[k] else r(w) & u32(0xFFFF)) for k, r in enumerate(rd)]
        if not clamp:
            return fn(*[-x if k < len(neg) and neg[k] else x for k, x in enumerate(xs)])
        if ty == 'h':
            r = fn(*[-x if k < len(neg) and neg[k] else x for k, x in enumerate(xs)])
            return np.clip(r, f16(0), f16(1))
        lo, hi, dtype = RANGE[ty]
        return np.clip(fn(*[np.asarray(x).astype(i64) for x in xs]), lo, hi).astype(dtype)

    def f(w: Batch) -> None:
        lo, hi = np.asarray(half(w, sel.lo, sel.neg_lo)), np.asarray(half(w, sel.hi, sel.neg_hi))
        wr(w, raw(lo) | (raw(hi) << u32(16)))

    return f


def mixed(ins: Instr) -> Closure:
    """v_fma_mix: each source is f32, or the f16 half that op_sel names when op_sel_hi is set."""
    sel, into, i, clamp = Selection(ins, 3, 0), MIX[ins.base], ins.ops[0].idx, 'clamp' in ins.flags

    def operand(k: int) -> Read:
        o, is_half = ins.ops[k + 1], sel.hi[k]
        rd, high = rv32(o, 'h' if is_half else 'f'), sel.lo[k]
        neg, ab = o.neg or (sel.neg_lo[k] and not o.neg), o.abs or sel.neg_hi[k]

        def get(w: Batch) -> Any:
            x = rd(w)
            x = (
                (x >> u32(16) if high else x & u32(0xFFFF)).astype(u16).view(f16).astype(f32)
                if is_half
                else x.view(f32)
            )
            x = np.abs(x) if ab else x
            return -x if neg else x

        return get

    get = [operand(k) for k in range(3)]

    def f(w: Batch) -> None:
        r = fma32(*[np.asarray(g(w)) for g in get])
        r = np.clip(r, f32(0), f32(1)) if clamp else r
        if into == 'f32':
            w.put(i, r.view(u32))
        elif into == 'lo':
            w.put(i, (w.v[i] & u32(0xFFFF0000)) | nm.f16_bits(r))
        else:
            w.put(i, (w.v[i] & u32(0xFFFF)) | (nm.f16_bits(r) << u32(16)))

    return f


def decode(ins: Instr) -> Closure | None:
    if ins.base in MIX:
        return mixed(ins)
    if not ins.base.startswith('v_pk_'):
        return None
    name = ins.base[5:]
    if name in PK32 or name == 'mov_b32':
        return packed_f32(ins, name, len(ins.ops) - 1)
    if name in PK16:
        return packed_16(ins, name)
    raise UnsupportedError(f'`{ins.text}`')
