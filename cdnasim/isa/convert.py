"""Conversions with small floats: v_cvt_[pk_|sr_]{f32,fp8,bf8} and v_cvt_scalef32_* (CDNA4 ISA
12.9-12.12).

Scales are the exponent field of an f32 operand (E8M0 in place). Packing divides by the scale,
unpacking multiplies. Stochastic rounding adds the random word, as a fraction of the last kept bit,
to the magnitude and truncates. (The manual's text for V_CVT_SR_FP8_F32 then rounds to nearest and
lets the mantissa wrap, which would be biased by half a unit; public hardware tests find it
unbiased.) Each further element of a packed form uses the next v_prng_b32 of the word.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .. import numerics as nm
from ..asm import Instr
from ..batch import Batch, Row
from ..numerics import Array, f32, f64, u8, u16, u32
from ..operands import TYPED, Read, rv32
from .vop import Closure, sdwa_read, source

WIDTH = {'fp8': 8, 'bf8': 8, 'fp6': 6, 'bf6': 6, 'fp4': 4}


def place(old: Row, val: Any, bit: int, width: int) -> Row:
    m = u32(((1 << width) - 1) << bit)
    return (old & ~m) | (val << u32(bit))


def scale_of(x: Any) -> Any:
    """f32 register -> the power of two of its exponent field."""
    return nm.e8m0((x >> u32(23)) & u32(255))


def fp16_overflow_saturates(w: Batch) -> bool:
    """MODE.FP16_OVFL (bit 23): fp8 results saturate instead of becoming NaN or infinity."""
    return bool((w.mode if type(w.mode) is int else int(w.mode[0])) >> 23 & 1)


def fraction(word: Any, bits: int = 32) -> Any:
    """Random word -> [0, 1), from its top bits."""
    return (word >> u32(32 - bits)).astype(f64) / 2.0**bits


def random_words(rand: Read | None, w: Batch, n: int) -> list[Any]:
    """One random word per element; None rounds to nearest even."""
    if rand is None:
        return [None] * n
    words = [rand(w)]
    while len(words) < n:
        words.append(prng(words[-1]))
    return words


def prng(x: Any) -> Any:
    """v_prng_b32: one step of the linear feedback shift register with taps 197."""
    return (x << u32(1)) ^ np.where(x >> u32(31), u32(197), u32(0))


def op_sel(ins: Instr) -> list[int]:
    return [*ins.mods.get('op_sel', []), 0, 0, 0, 0]


WIDEN: dict[str, Callable[[Any], Any]] = {
    'f32': lambda x: x.astype(f32).view(u32),
    'f16': nm.f16_bits,
    'bf16': lambda x: nm.f32_to_bf16(x.astype(f32)),
}


def pack_pair(ins: Instr, arch: str, m: re.Match[str]) -> Closure:
    """v_cvt_pk_fp8_f32: two floats -> 16 bits; op_sel[2] names the half."""
    fmt, a, b = nm.minifloat(m.group(1), arch), source(ins, 1, 'f', 0), source(ins, 2, 'f', 1)
    bit, i = 16 if op_sel(ins)[2] else 0, ins.ops[0].idx

    def f(w: Batch) -> None:
        s = fp16_overflow_saturates(w)
        w.put(i, place(w.v[i], fmt.encode(a(w), s) | (fmt.encode(b(w), s) << u32(8)), bit, 16))

    return f


def pack_stochastic(ins: Instr, arch: str, m: re.Match[str]) -> Closure:
    """v_cvt_sr_fp8_f32: one float and random bits -> one byte, named by op_sel[3:2]."""
    fmt, a, rand = nm.minifloat(m.group(1), arch), source(ins, 1, 'f', 0), rv32(ins.ops[2])
    sel, i, dropped = op_sel(ins), ins.ops[0].idx, 23 - fmt_bits(m.group(1))
    bit = 8 * (sel[2] + 2 * sel[3])

    def f(w: Batch) -> None:
        code = fmt.encode(a(w), fp16_overflow_saturates(w), fraction(rand(w), dropped))
        w.put(i, place(w.v[i], code, bit, 8))

    return f


def fmt_bits(name: str) -> int:
    return nm.BY_NAME[name].mbits


def unpack(ins: Instr, arch: str, m: re.Match[str]) -> Closure:
    """v_cvt_[pk_]f32_fp8: op_sel[0] names the half of a pair, op_sel (or SDWA) the byte of a single
    value.
    """
    fmt, rd, sel, i = nm.minifloat(m.group(2), arch), rv32(ins.ops[1]), op_sel(ins), ins.ops[0].idx
    if ins.sdwa:
        rd = sdwa_read(rd, ins.mods.get('src0_sel', 'DWORD'), False)
    if ins.dpp:
        rd = ins.dpp.read(rd)
    bit = u32(16 * sel[0] if m.group(1) else 8 * (sel[0] + 2 * sel[1]))
    byte = u32(255)

    def one(w: Batch) -> None:
        w.put(i, np.asarray(fmt.table[(rd(w) >> bit) & byte]).view(u32))

    def two(w: Batch) -> None:
        x = rd(w) >> bit
        lo, hi = fmt.table[x & byte], fmt.table[(x >> u32(8)) & byte]
        w.put(i, np.asarray(lo).view(u32))
        w.put(i + 1, np.asarray(hi).view(u32))

    return two if m.group(1) else one


def scaled_pack(ins: Instr, arch: str, m: re.Match[str]) -> Closure:
    """v_cvt_scalef32_[sr_]{pk_,}{fp8,bf8,fp4}_{f32,f16,bf16}: operands src[, src1][, random],
    scale.
    """
    stochastic, paired, name, src = m.group(1), m.group(2), m.group(3), m.group(4)
    fmt, o, i, sel = nm.minifloat(name, arch), ins.ops, ins.ops[0].idx, op_sel(ins)
    scale, rand = rv32(o[-1]), rv32(o[-2]) if stochastic else None
    values = elements(ins, src, bool(paired), bool(stochastic))
    width = WIDTH[name]
    given = ins.mods.get('op_sel', [])
    if name == 'fp4' or not paired:
        bit = 8 * (sel[2] + 2 * sel[3])
    else:
        bit = 16 * (
            given[-1] if given else 0
        )  # the half of the destination is the last op_sel entry

    def f(w: Batch) -> None:
        s, sat = scale_of(scale(w)), fp16_overflow_saturates(w)
        code: Any = u32(0)
        for k, (get, word) in enumerate(
            zip(values, random_words(rand, w, len(values)), strict=True)
        ):
            noise = None if word is None else fraction(word)
            code = code | (fmt.encode(get(w).astype(f64) / s, sat, noise) << u32(width * k))
        w.put(i, place(w.v[i], code, bit, width * len(values)))

    return f


def elements(ins: Instr, src: str, paired: bool, stochastic: bool) -> list[Read]:
    """Readers of the one or two values of a scaled pack."""
    o = ins.ops
    if src == 'f32':
        first = source(ins, 1, 'f', 0)
        if not paired:
            return [first]
        if stochastic:  # one 64-bit operand holds both floats
            i = o[1].idx
            return [lambda w: w.v[i].view(f32), lambda w: w.v[i + 1].view(f32)]
        return [first, source(ins, 2, 'f', 1)]
    rd, conv = rv32(o[1]), TYPED['h' if src == 'f16' else 'b']
    low = lambda w: conv(rd(w) & u32(0xFFFF))  # noqa: E731
    if paired:
        return [low, lambda w: conv(rd(w) >> u32(16))]
    return [(lambda w: conv(rd(w) >> u32(16)))] if op_sel(ins)[0] else [low]


def scaled_unpack(ins: Instr, arch: str, m: re.Match[str]) -> Closure:
    """v_cvt_scalef32_[pk_]{f32,f16,bf16}_{fp8,bf8,fp4}."""
    paired, dst, name = m.group(1), m.group(2), m.group(3)
    fmt, i, sel, width = nm.minifloat(name, arch), ins.ops[0].idx, op_sel(ins), WIDTH[name]
    rd, scale, bits = rv32(ins.ops[1]), rv32(ins.ops[2]), WIDEN[dst]
    bit = u32(16 * sel[0] if paired and name != 'fp4' else 8 * (sel[0] + 2 * sel[1]))
    vm = u32((1 << width) - 1)

    def f(w: Batch) -> None:
        x, s = rd(w) >> bit, scale_of(scale(w))
        lo = bits(np.asarray(fmt.table64[x & vm] * s))
        if not paired:
            w.put(i, lo if dst == 'f32' else place(w.v[i], lo, 16 * sel[3], 16))
            return
        hi = bits(np.asarray(fmt.table64[(x >> u32(width)) & vm] * s))
        if dst == 'f32':
            w.put(i, lo)
            w.put(i + 1, hi)
        else:
            w.put(i, lo | (hi << u32(16)))

    return f


def stack_rows(w: Batch, first: int, n: int) -> Array:
    """n registers -> uint32 (waves, 64, n)."""
    out = np.empty((*w.shape, n), u32)
    for k, row in enumerate(w.v[first : first + n]):
        out[..., k] = row
    return out


def put_rows(w: Batch, first: int, rows: Array) -> None:
    for k in range(rows.shape[-1]):
        w.put(first + k, np.ascontiguousarray(rows[..., k]))


def unpack32(ins: Instr, arch: str, m: re.Match[str]) -> Closure:
    """v_cvt_scalef32_pk32_{f32,f16,bf16}_{fp6,bf6}: 6 registers -> 32 wide values."""
    dst, fmt, scale, i, first = (
        m.group(1),
        nm.BY_NAME[m.group(2)],
        rv32(ins.ops[2]),
        ins.ops[0].idx,
        ins.ops[1].idx,
    )

    def f(w: Batch) -> None:
        s = np.broadcast_to(scale_of(scale(w)), w.shape)[..., None]
        x = WIDEN[dst](fmt.table64[nm.unpack_bits(stack_rows(w, first, 6).view(u8), 6)] * s)
        put_rows(w, i, x if dst == 'f32' else x[..., 0::2] | (x[..., 1::2] << u32(16)))

    return f


def pack32(ins: Instr, arch: str, m: re.Match[str]) -> Closure:
    """v_cvt_scalef32_[sr_]pk32_{fp6,bf6}_{f32,f16,bf16} and 2xpk16 (two operands, interleaved): 32
    values -> 6 registers.
    """
    stochastic, two, name, src = m.group(1), m.group(2) == '2xpk16', m.group(3), m.group(4)
    o, fmt = ins.ops, nm.BY_NAME[name]
    scale, rand, i, first = rv32(o[-1]), rv32(o[-2]) if stochastic else None, o[0].idx, o[1].idx

    def values(w: Batch) -> Array:
        if two:
            both = [stack_rows(w, first, 16), stack_rows(w, o[2].idx, 16)]
            return np.stack(both, -1).view(f32).reshape(*w.shape, 32)
        if src == 'f32':
            return stack_rows(w, first, 32).view(f32)
        return TYPED['h' if src == 'f16' else 'b'](stack_rows(w, first, 16).view(u16).astype(u32))

    def f(w: Batch) -> None:
        s, noise = np.broadcast_to(scale_of(scale(w)), w.shape)[..., None], None
        if rand:
            noise = np.stack(
                [fraction(np.broadcast_to(x, w.shape)) for x in random_words(rand, w, 32)], -1
            )
        put_rows(w, i, nm.pack_bits(fmt.encode(values(w).astype(f64) / s, noise=noise), 6))

    return f


FORMS: list[tuple[re.Pattern[str], Callable[[Instr, str, re.Match[str]], Closure]]] = [
    (re.compile(r'^v_cvt_pk_(fp8|bf8)_f32$'), pack_pair),
    (re.compile(r'^v_cvt_sr_(fp8|bf8)_f32$'), pack_stochastic),
    (re.compile(r'^v_cvt_(pk_)?f32_(fp8|bf8)$'), unpack),
    (re.compile(r'^v_cvt_scalef32_(sr_)?(pk_)?(fp8|bf8|fp4)_(f32|f16|bf16)$'), scaled_pack),
    (re.compile(r'^v_cvt_scalef32_(pk_)?(f32|f16|bf16)_(fp8|bf8|fp4)$'), scaled_unpack),
    (re.compile(r'^v_cvt_scalef32_pk32_(f32|f16|bf16)_(fp6|bf6)$'), unpack32),
    (re.compile(r'^v_cvt_scalef32_(sr_)?(pk32|2xpk16)_(fp6|bf6)_(f32|f16|bf16)$'), pack32),
]


def decode(ins: Instr, arch: str) -> Closure | None:
    for pattern, build in FORMS:
        if m := pattern.match(ins.base):
            return build(ins, arch, m)
    return None
