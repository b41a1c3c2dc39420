"""Integer vector ALU: 32-bit, 24-bit, 64-bit and 16-bit arithmetic, shifts, bit fields, SAD (CDNA3
ISA 12.8-12.12).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from ..batch import LANES, M32
from ..numerics import i16, i32, i64, u8, u16, u32, u64
from ..operands import lo32
from .vop import Table

TABLE = Table()
add, accumulate = TABLE.add, TABLE.accumulate
WORD = u32(31)


def s24(x: Any) -> Any:
    return (x.astype(i64) << 40) >> 40


def u24(x: Any) -> Any:
    return x.astype(u64) & u64(0xFFFFFF)


def bfe_u(a: Any, b: Any, c: Any) -> Any:
    return (a >> (b & WORD)) & ((u32(1) << (c & WORD)) - u32(1))


def bfe_i(a: Any, b: Any, c: Any) -> Any:
    w = (c & WORD).astype(i64)
    x = (a.view(i32).astype(i64) >> (b & WORD).astype(i64)) & ((i64(1) << w) - 1)
    sign = np.where(w > 0, (x >> np.maximum(w - 1, 0)) & 1, 0)
    return (x - (sign << w)).astype(u64).astype(u32)


def clz32(x: Any) -> Any:
    _, e = np.frexp(x.astype(np.float64))
    return np.where(x == 0, M32, 32 - e).astype(u32)


def ctz32(x: Any) -> Any:
    _, e = np.frexp((x & (~x + u32(1))).astype(np.float64))
    return np.where(x == 0, M32, e - 1).astype(u32)


def cls32(x: Any) -> Any:
    """Distance from the top of the first bit unlike the sign; -1 when there is none."""
    return clz32(x ^ (x.view(i32) >> i32(31)).view(u32))


def bitrev32(x: Any) -> Any:
    for step, mask in (
        (1, 0x55555555),
        (2, 0x33333333),
        (4, 0x0F0F0F0F),
        (8, 0x00FF00FF),
        (16, 0x0000FFFF),
    ):
        x = ((x >> u32(step)) & u32(mask)) | ((x & u32(mask)) << u32(step))
    return x


def popc32(x: Any) -> Any:
    return np.bitwise_count(x).astype(u32)


def funnel(a: Any, b: Any, shift: Any) -> Any:
    return lo32(((a.astype(u64) << u64(32)) | b.astype(u64)) >> shift.astype(u64))


def v_perm(a: Any, b: Any, sel: Any) -> Any:
    """Byte select from {a, b}: 0-7 a byte, 8-11 the sign of a word, 12 zero, 13 and above 0xFF."""
    if is_same(sel):
        return perm_same(a, b, int(sel.flat[0]))
    if is_same(a) and is_same(b):
        table = perm_table(int(a.flat[0]), int(b.flat[0]))
        return table.take(np.ascontiguousarray(sel).view(u8)).view(u32)
    shape = np.broadcast_shapes(a.shape, b.shape, sel.shape)
    choices = np.empty((*shape, 4), u32)  # the bytes that selectors 0 to 15 name, per lane
    choices[..., 0], choices[..., 1] = b, a
    choices[..., 2] = word_signs(b) | (word_signs(a) << u32(16))
    choices[..., 3] = u32(0xFFFFFF00)
    chosen = np.minimum(np.ascontiguousarray(np.broadcast_to(sel, shape)).view(u8), u8(15))
    lanes = chosen.reshape(-1, 4) + 16 * np.arange(chosen.size // 4)[:, None]
    return choices.view(u8).reshape(-1).take(lanes).view(u32).reshape(shape)


def is_same(x: Any) -> bool:
    """Every lane of every wave holds one value, as far as the strides say."""
    return not any(x.strides)


def word_signs(x: Any) -> Any:
    """0xFF in byte k where bit 16 k + 15 is set."""
    return ((x >> u32(15)) & u32(1)) * u32(0xFF) | (x >> u32(31)) * u32(0xFF00)


@lru_cache(256)
def perm_table(a: int, b: int) -> Any:
    """Selector byte -> result byte, for v_perm of two constants."""
    out = [int(perm_same(u32(a), u32(b), s)) & 255 for s in range(13)]
    return np.array(out + [255] * (256 - len(out)), u8)


def perm_same(a: Any, b: Any, sel: int) -> Any:
    """v_perm where every lane has the same selector."""
    out: Any = u32(0)
    for k in range(4):
        s, byte = sel >> 8 * k & 255, u32(255)
        if s == 12:
            continue
        if s < 12:
            word, shift = (b, 8 * s) if s < 4 else (a, 8 * (s - 4))
            if s >= 8:
                word, shift = (b if s < 10 else a), 15 + 16 * (s & 1)
            byte = (word >> u32(shift)) & u32(255 if s < 8 else 1)
            byte = byte if s < 8 else byte * u32(255)
        out = out | (byte << u32(8 * k))
    return out


def parts(x: Any, width: int, is_signed: bool = False) -> list[Any]:
    """Fields of a 32-bit value as int64, low first."""
    fields = [((x >> u32(k)) & u32((1 << width) - 1)).astype(i64) for k in range(0, 32, width)]
    half = 1 << (width - 1)
    return [(f ^ half) - half for f in fields] if is_signed else fields


def sad(a: Any, b: Any, c: Any, width: int = 8, masked: bool = False) -> Any:
    """c + sum |a - b| over fields; `masked`: fields of b that are zero do not count."""
    total = c.astype(i64)
    for x, y in zip(parts(a, width), parts(b, width), strict=True):
        total = total + np.where(y == 0, 0, np.abs(x - y)) if masked else total + np.abs(x - y)
    return total


def wrap(x: Any) -> Any:
    return x.astype(u64).astype(u32)


def dot(a: Any, b: Any, c: Any, width: int, is_signed: bool) -> Any:
    total = c.astype(i64)
    for x, y in zip(parts(a, width, is_signed), parts(b, width, is_signed), strict=True):
        total = total + x * y
    return total


def dot_fn(width: int, is_signed: bool) -> Any:
    def fn(a: Any, b: Any, c: Any) -> Any:
        total = dot(a.astype(u32), b.astype(u32), c, width, is_signed)
        return wrap(total).view(i32 if is_signed else u32) if c.dtype != i64 else total

    return fn


def pack16(a: Any, b: Any) -> Any:
    return (a.astype(u32) & u32(0xFFFF)) | (b.astype(u32) << u32(16))


def sat(x: Any, lo: int, hi: int, ty: Any) -> Any:
    return np.clip(x.astype(i64), lo, hi).astype(ty)


def ashr_pk(lo: int, hi: int) -> Any:
    def fn(a: Any, b: Any, c: Any) -> Any:
        n = (c & WORD).view(i32)
        x, y = np.clip(a.view(i32) >> n, lo, hi), np.clip(b.view(i32) >> n, lo, hi)
        return ((x.astype(u32) & u32(255)) | ((y.astype(u32) & u32(255)) << u32(8))).astype(u16)

    return fn


def lerp(a: Any, b: Any, c: Any) -> Any:
    rows = zip(parts(a, 8), parts(b, 8), parts(c, 8), strict=True)
    return sum(
        (((x + y + (z & 1)) >> 1).astype(u32) << u32(8 * k) for k, (x, y, z) in enumerate(rows)),
        u32(0),
    )


def med3(a: Any, b: Any, c: Any) -> Any:
    return np.maximum(np.minimum(a, b), np.minimum(np.maximum(a, b), c))


def min3(a: Any, b: Any, c: Any) -> Any:
    return np.minimum(np.minimum(a, b), c)


def max3(a: Any, b: Any, c: Any) -> Any:
    return np.maximum(np.maximum(a, b), c)


MB_LO = np.array([(1 << min(k, 32)) - 1 for k in LANES.tolist()], u64).astype(u32)
MB_HI = np.array([(1 << max(k - 32, 0)) - 1 for k in LANES.tolist()], u64).astype(u32)

ACC_MOVES = [f'accvgpr_{x}{y}' for x in ('read', 'write', 'mov') for y in ('', '_b32')]
add(
    'u u',
    mov_b32=lambda a: a,
    not_b32=lambda a: ~a,
    bfrev_b32=bitrev32,
    ffbh_u32=clz32,
    ffbl_b32=ctz32,
    ffbh_i32=cls32,
    prng_b32=lambda a: (a << u32(1)) ^ np.where(a >> WORD, u32(197), u32(0)),
    **{k: (lambda a: a) for k in ACC_MOVES},
)
add('U U', mov_b64=lambda a: a)
add(
    'u u u',
    add_u32=lambda a, b: a + b,
    sub_u32=lambda a, b: a - b,
    subrev_u32=lambda a, b: b - a,
    and_b32=lambda a, b: a & b,
    or_b32=lambda a, b: a | b,
    xor_b32=lambda a, b: a ^ b,
    xnor_b32=lambda a, b: ~(a ^ b),
    min_u32=np.minimum,
    max_u32=np.maximum,
    lshlrev_b32=lambda a, b: b << (a & WORD),
    lshrrev_b32=lambda a, b: b >> (a & WORD),
    mul_lo_u32=lambda a, b: a * b,
    mul_hi_u32=lambda a, b: ((a.astype(u64) * b.astype(u64)) >> u64(32)).astype(u32),
    mul_u32_u24=lambda a, b: lo32(u24(a) * u24(b)),
    mul_hi_u32_u24=lambda a, b: (u24(a) * u24(b) >> u64(32)).astype(u32),
    bfm_b32=lambda a, b: ((u32(1) << (a & WORD)) - u32(1)) << (b & WORD),
    bcnt_u32_b32=lambda a, b: popc32(a) + b,
    mbcnt_lo_u32_b32=lambda a, b: popc32(a & MB_LO) + b,
    mbcnt_hi_u32_b32=lambda a, b: popc32(a & MB_HI) + b,
    pack_b32_f16=pack16,
    cvt_pk_u16_u32=lambda a, b: pack16(np.minimum(a, u32(65535)), np.minimum(b, u32(65535))),
)
add(
    'i i i',
    add_i32=lambda a, b: a + b,
    sub_i32=lambda a, b: a - b,
    min_i32=np.minimum,
    max_i32=np.maximum,
    mul_i32_i24=lambda a, b: (s24(a) * s24(b)).astype(i32),
    mul_hi_i32_i24=lambda a, b: ((s24(a) * s24(b)) >> 32).astype(i32),
    mul_hi_i32=lambda a, b: ((a.astype(i64) * b.astype(i64)) >> 32).astype(i32),
)
add('i u i', ashrrev_i32=lambda a, b: b >> (a & WORD).view(i32))
add(
    'u i i',
    cvt_pk_i16_i32=lambda a, b: pack16(
        sat(a, -32768, 32767, i16).view(u16), sat(b, -32768, 32767, i16).view(u16)
    ),
)
add(
    'U u U',
    lshlrev_b64=lambda a, b: b << (a & u32(63)).astype(u64),
    lshrrev_b64=lambda a, b: b >> (a & u32(63)).astype(u64),
)
add('I u I', ashrrev_i64=lambda a, b: b >> (a & u32(63)).astype(i64))
add(
    'u u u u',
    lshl_add_u32=lambda a, b, c: (a << (b & WORD)) + c,
    add_lshl_u32=lambda a, b, c: (a + b) << (c & WORD),
    add3_u32=lambda a, b, c: a + b + c,
    lshl_or_b32=lambda a, b, c: (a << (b & WORD)) | c,
    and_or_b32=lambda a, b, c: (a & b) | c,
    or3_b32=lambda a, b, c: a | b | c,
    xad_u32=lambda a, b, c: (a ^ b) + c,
    bfe_u32=bfe_u,
    bfe_i32=bfe_i,
    bfi_b32=lambda a, b, c: (a & b) | (~a & c),
    perm_b32=v_perm,
    alignbit_b32=lambda a, b, c: funnel(a, b, c & WORD),
    alignbyte_b32=lambda a, b, c: funnel(a, b, (c & u32(3)) * u32(8)),
    mad_u32_u24=lambda a, b, c: (u24(a) * u24(b)).astype(c.dtype) + c,
    min3_u32=min3,
    max3_u32=max3,
    med3_u32=med3,
    sad_u32=lambda a, b, c: np.where(a > b, a - b, b - a) + c,
    lerp_u8=lerp,
    sad_u8=lambda a, b, c: wrap(sad(a, b, c)),
    sad_hi_u8=lambda a, b, c: wrap(sad(a, b, c * c.dtype.type(0)) << 16) + c,
    sad_u16=lambda a, b, c: wrap(sad(a, b, c, 16)),
    msad_u8=lambda a, b, c: wrap(sad(a, b, c, masked=True)),
    dot2_u32_u16=dot_fn(16, False),
    dot4_u32_u8=dot_fn(8, False),
    dot8_u32_u4=dot_fn(4, False),
)
add(
    'i u u i',
    dot2_i32_i16=dot_fn(16, True),
    dot4_i32_i8=dot_fn(8, True),
    dot8_i32_i4=dot_fn(4, True),
)
accumulate(
    'i u u i',
    dot2c_i32_i16=dot_fn(16, True),
    dot4c_i32_i8=dot_fn(8, True),
    dot8c_i32_i4=dot_fn(4, True),
)
add('H u u u', ashr_pk_i8_i32=ashr_pk(-128, 127), ashr_pk_u8_i32=ashr_pk(0, 255))
add(
    'i i i i',
    mad_i32_i24=lambda a, b, c: (s24(a) * s24(b)).astype(c.dtype) + c,
    med3_i32=med3,
    min3_i32=min3,
    max3_i32=max3,
)
add('i s s i', mad_i32_i16=lambda a, b, c: a.astype(c.dtype) * b.astype(c.dtype) + c)
add('u H H u', mad_u32_u16=lambda a, b, c: a.astype(c.dtype) * b.astype(c.dtype) + c)
add('U U u U', lshl_add_u64=lambda a, b, c: (a << (b & u32(7)).astype(u64)) + c)

# 16 bits
add(
    'H H H',
    add_u16=lambda a, b: a + b,
    sub_u16=lambda a, b: a - b,
    subrev_u16=lambda a, b: b - a,
    mul_lo_u16=lambda a, b: a * b,
    min_u16=np.minimum,
    max_u16=np.maximum,
    lshlrev_b16=lambda a, b: b << (a & u16(15)),
    lshrrev_b16=lambda a, b: b >> (a & u16(15)),
)
add(
    's s s',
    min_i16=np.minimum,
    max_i16=np.maximum,
    add_i16=lambda a, b: a + b,
    sub_i16=lambda a, b: a - b,
    ashrrev_i16=lambda a, b: b >> (a & i16(15)),
)
add(
    'H H H H',
    mad_u16=lambda a, b, c: a * b + c,
    mad_legacy_u16=lambda a, b, c: a * b + c,
    min3_u16=min3,
    max3_u16=max3,
    med3_u16=med3,
)
add(
    's s s s',
    mad_i16=lambda a, b, c: a * b + c,
    mad_legacy_i16=lambda a, b, c: a * b + c,
    min3_i16=min3,
    max3_i16=max3,
    med3_i16=med3,
)
add(
    'u u',
    sat_pk_u8_i16=lambda a: sum(
        (np.clip(p, 0, 255).astype(u32) << u32(8 * k) for k, p in enumerate(parts(a, 16, True))),
        u32(0),
    ),
)


def quad_sad(masked: bool) -> Any:
    """Four SADs of a sliding window: bytes k..k+3 of S0 against S1, added to the 16-bit fields of
    S2.
    """

    def fn(a: Any, b: Any, c: Any) -> Any:
        out = u64(0)
        for k in range(4):
            acc = ((c >> u64(16 * k)) & u64(0xFFFF)).astype(u32)
            s = np.minimum(sad(lo32(a >> u64(8 * k)), b, acc, masked=masked), 0xFFFF)
            out = out | (s.astype(u64) << u64(16 * k))
        return out

    return fn


add('U U u U', qsad_pk_u16_u8=quad_sad(False), mqsad_pk_u16_u8=quad_sad(True))
