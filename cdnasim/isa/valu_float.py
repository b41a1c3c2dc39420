"""Floating-point vector ALU in f32, f16 and f64 (CDNA3 ISA 12.8-12.12).

f32 and f16 fma go through f64 and round once more: a rare double rounding remains. Transcendentals
are the correctly rounded f64 result, so equality with the hardware's last bit is not claimed. f32
denormals are kept (the mode compilers set), except in the transcendental unit, which flushes them.
"""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Callable
from typing import Any

import numpy as np

from .. import numerics as nm
from ..numerics import f16, f32, f64, i16, i32, i64, u16, u32, u64
from .valu_int import max3, min3
from .vop import Fn, Table

TABLE = Table()
add, accumulate = TABLE.add, TABLE.accumulate
TINY = f32(2.0**-126)


def ftz(x: Any) -> Any:
    return np.where(np.abs(x) < TINY, np.copysign(f32(0), x), x)


def trans(fn: Fn) -> Fn:
    return lambda a: ftz(fn(ftz(a).astype(f64)).astype(f32))


def fma32(a: Any, b: Any, c: Any) -> Any:
    r = a.astype(f64) * b  # f64 * f32 promotes; the product of two f32 is exact in f64
    r = r + c
    return r.astype(f32)


def fma16(a: Any, b: Any, c: Any) -> Any:
    return (a.astype(f64) * b + c).astype(f16)


def to_int(lo: float, hi: float, ty: Any) -> Fn:
    """Truncate and saturate; NaN gives 0."""

    def fn(x: Any) -> Any:
        x = np.nan_to_num(np.trunc(x.astype(f64)), nan=0.0, posinf=hi, neginf=lo)
        return np.clip(x, lo, hi).astype(i64).astype(ty)

    return fn


f_to_i32, f_to_u32 = to_int(-(2.0**31), 2.0**31 - 1, i32), to_int(0.0, 2.0**32 - 1, u32)
f_to_i16, f_to_u16, f_to_u8 = (
    to_int(-(2.0**15), 2.0**15 - 1, i16),
    to_int(0.0, 65535.0, u16),
    to_int(0.0, 255.0, u32),
)


def fmed3(a: Any, b: Any, c: Any) -> Any:
    m = np.fmax(np.fmin(a, b), np.fmin(np.fmax(a, b), c))
    return np.where(np.isnan(a) | np.isnan(b) | np.isnan(c), np.fmin(np.fmin(a, b), c), m)


def fmin3(a: Any, b: Any, c: Any) -> Any:
    return np.fmin(np.fmin(a, b), c)


def fmax3(a: Any, b: Any, c: Any) -> Any:
    return np.fmax(np.fmax(a, b), c)


def f16_toward_zero(x: Any) -> Any:
    h = x.astype(f16)
    bits = h.view(u16)
    over = (np.abs(h.astype(f64)) > np.abs(x.astype(f64))) & ~np.isnan(x)
    return np.where(over, bits - u16(1), bits).astype(u32)


def norm16(scale: float, fmt: Any) -> Fn:
    """Float in [-1, 1] or [0, 1] -> normalised integer, nearest even."""
    lo = -1.0 if fmt is i16 else 0.0

    def fn(x: Any) -> Any:
        y = np.clip(np.nan_to_num(x.astype(f64), nan=0.0), lo, 1.0)
        return np.rint(y * scale).astype(i64).astype(fmt)

    return fn


snorm, unorm = norm16(32767.0, i16), norm16(65535.0, u16)


def two(fn: Fn) -> Fn:
    """Pack two 16-bit results."""
    return lambda a, b: fn(a).astype(u16).astype(u32) | (fn(b).astype(u16).astype(u32) << u32(16))


def h16(x: Any) -> Any:
    return x.astype(u16).view(f16).astype(f64)


def b16(x: Any) -> Any:
    return nm.bf16_to_f32(x).astype(f64)


def dot2(conv: Fn) -> Fn:
    low = u32(0xFFFF)
    return lambda a, b, c: (
        conv(a & low) * conv(b & low) + conv(a >> u32(16)) * conv(b >> u32(16)) + c.astype(f64)
    ).astype(f32)


def byte_of(k: int) -> Fn:
    return lambda a: ((a >> u32(8 * k)) & u32(255)).astype(f32)


def fract(x: Any) -> Any:
    """x - floor(x), kept below 1."""
    return np.minimum(x - np.floor(x), np.nextafter(x.dtype.type(1), x.dtype.type(0)))


def exponent(x: Any) -> Any:
    return np.where(np.isfinite(x), np.frexp(x)[1], 0)


def mantissa(x: Any) -> Any:
    return np.frexp(x)[0].astype(x.dtype)


def insert_u8(a: Any, b: Any, c: Any) -> Any:
    """v_cvt_pk_u8_f32: byte b of c becomes the converted a."""
    bit = (b & u32(3)) << u32(3)
    return (c & ~(u32(255) << bit)) | (f_to_u8(a) << bit)


def stochastic_f16(a: Any, b: Any) -> Any:
    """v_cvt_sr_f16_f32: the 13 dropped bits plus 13 random bits decide (CDNA4 ISA,
    V_CVT_SR_F16_F32).
    """
    return stochastic(a, b, 13, lambda x: x.astype(f16).view(u16))


def stochastic_bf16(a: Any, b: Any) -> Any:
    bits = a.view(u32)
    r = (bits + (b >> u32(16))) >> u32(16)
    special = (bits & u32(0x7F800000)) == u32(0x7F800000)
    return np.where(special, nm.f32_to_bf16(a), r).astype(u16)


def stochastic(a: Any, b: Any, drop: int, encode: Fn) -> Any:
    bits = a.view(u32)
    noisy = ((bits + (b >> u32(32 - drop))) & u32((0xFFFFFFFF << drop) & 0xFFFFFFFF)).view(f32)
    return encode(np.where(np.isfinite(a), noisy, a))


def div_fixup(q: Any, den: Any, num: Any) -> Any:
    """Special cases of a division whose quotient is q (CDNA3 ISA, V_DIV_FIXUP_F32).

    A NaN quotient of ordinary operands means that the steps before overflowed; it becomes infinity,
    which the manual's text does not say but LLVM's fdiv needs to be correct for results beyond the
    range.
    """
    ty = q.dtype.type
    sign = np.where(np.signbit(den) ^ np.signbit(num), ty(-1), ty(1))
    a, b = np.abs(den), np.abs(num)
    r = np.where(np.isnan(q), ty(np.inf) * sign, np.copysign(np.abs(q), sign))
    r = np.where(np.isinf(a) | (b == 0), ty(0) * sign, r)
    r = np.where((a == 0) | np.isinf(b), ty(np.inf) * sign, r)
    bad = ((a == 0) & (b == 0)) | (np.isinf(a) & np.isinf(b)) | np.isnan(den) | np.isnan(num)
    return np.where(bad, ty(np.nan), r).astype(q.dtype)


def cube(pick: Fn) -> Fn:
    """Cube-map helpers: pick(x, y, z, major is z, major is y)."""

    def fn(x: Any, y: Any, z: Any) -> Any:
        ax, ay, az = np.abs(x), np.abs(y), np.abs(z)
        is_z = (az >= ax) & (az >= ay)
        return pick(x, y, z, is_z, ~is_z & (ay >= ax)).astype(f32)

    return fn


# ---- f32
add(
    'f f f',
    add_f32=lambda a, b: a + b,
    sub_f32=lambda a, b: a - b,
    subrev_f32=lambda a, b: b - a,
    mul_f32=lambda a, b: a * b,
    min_f32=np.fmin,
    max_f32=np.fmax,
    mul_legacy_f32=lambda a, b: np.where((a == 0) | (b == 0), f32(0), a * b),
)
add(
    'f f f f',
    fma_f32=fma32,
    med3_f32=fmed3,
    min3_f32=fmin3,
    max3_f32=fmax3,
    minimum3_f32=min3,
    maximum3_f32=max3,
    div_fixup_f32=div_fixup,
    cubeid_f32=cube(
        lambda x, y, z, kz, ky: np.where(
            kz, np.where(z < 0, 5, 4), np.where(ky, np.where(y < 0, 3, 2), np.where(x < 0, 1, 0))
        )
    ),
    cubema_f32=cube(lambda x, y, z, kz, ky: 2 * np.where(kz, z, np.where(ky, y, x))),
    cubesc_f32=cube(
        lambda x, y, z, kz, ky: np.where(
            kz, np.where(z < 0, -x, x), np.where(ky, x, np.where(x < 0, z, -z))
        )
    ),
    cubetc_f32=cube(
        lambda x, y, z, kz, ky: np.where(kz, -y, np.where(ky, np.where(y < 0, -z, z), -y))
    ),
)
accumulate('f f f f', fmac_f32=fma32, mac_f32=fma32)
add(
    'f f',
    exp_f32=trans(np.exp2),
    exp_legacy_f32=trans(np.exp2),
    log_f32=trans(np.log2),
    log_legacy_f32=trans(np.log2),
    rcp_f32=trans(lambda a: 1 / a),
    rcp_iflag_f32=trans(lambda a: 1 / a),
    rsq_f32=trans(lambda a: 1 / np.sqrt(a)),
    sqrt_f32=lambda a: np.sqrt(a.astype(f64)).astype(f32),
    floor_f32=np.floor,
    ceil_f32=np.ceil,
    trunc_f32=np.trunc,
    rndne_f32=np.rint,
    fract_f32=fract,
    sin_f32=trans(lambda a: np.sin(2 * np.pi * a)),
    cos_f32=trans(lambda a: np.cos(2 * np.pi * a)),
    frexp_mant_f32=mantissa,
)
add('f f i', ldexp_f32=lambda a, b: np.ldexp(a.astype(f64), b).astype(f32))
add(
    'i f',
    frexp_exp_i32_f32=lambda a: exponent(a).astype(i32),
    cvt_i32_f32=f_to_i32,
    cvt_rpi_i32_f32=lambda a: f_to_i32(np.floor(a.astype(f64) + 0.5)),
    cvt_flr_i32_f32=lambda a: f_to_i32(np.floor(a)),
)
add('u f', cvt_u32_f32=f_to_u32)
add('f i', cvt_f32_i32=lambda a: a.astype(f32))
add(
    'f u',
    cvt_f32_u32=lambda a: a.astype(f32),
    **{f'cvt_f32_ubyte{k}': byte_of(k) for k in range(4)},
    cvt_off_f32_i4=lambda a: ((((a & u32(15)) ^ u32(8)).astype(i32) - 8) / 16).astype(f32),
)
add('u f u u', cvt_pk_u8_f32=insert_u8)
accumulate('u f u u', cvt_pkaccum_u8_f32=insert_u8)
add(
    'u f f',
    cvt_pkrtz_f16_f32=lambda a, b: f16_toward_zero(a) | (f16_toward_zero(b) << u32(16)),
    cvt_pk_bf16_f32=lambda a, b: nm.f32_to_bf16(a) | (nm.f32_to_bf16(b) << u32(16)),
    cvt_pk_f16_f32=lambda a, b: nm.f16_bits(a) | (nm.f16_bits(b) << u32(16)),
    cvt_pknorm_i16_f32=two(snorm),
    cvt_pknorm_u16_f32=two(unorm),
)
add('f u u f', dot2_f32_f16=dot2(h16), dot2_f32_bf16=dot2(b16))
accumulate('f u u f', dot2c_f32_f16=dot2(h16), dot2c_f32_bf16=dot2(b16))

# ---- f16 and bf16
UNARY16: dict[str, Fn] = {
    'exp': np.exp2,
    'log': np.log2,
    'rcp': lambda a: 1 / a,
    'rsq': lambda a: 1 / np.sqrt(a),
    'sqrt': np.sqrt,
    'floor': np.floor,
    'ceil': np.ceil,
    'trunc': np.trunc,
    'rndne': np.rint,
    'sin': lambda a: np.sin(2 * np.pi * a),
    'cos': lambda a: np.cos(2 * np.pi * a),
}
add(
    'h h',
    **{f'{n}_f16': (lambda a, fn=fn: fn(a.astype(f64)).astype(f16)) for n, fn in UNARY16.items()},
    fract_f16=fract,
    frexp_mant_f16=mantissa,
)
add('h f', cvt_f16_f32=lambda a: a.astype(f16))
add('f h', cvt_f32_f16=lambda a: a.astype(f32))
add('f b', cvt_f32_bf16=lambda a: a)
add(
    'h h h',
    add_f16=lambda a, b: a + b,
    sub_f16=lambda a, b: a - b,
    subrev_f16=lambda a, b: b - a,
    mul_f16=lambda a, b: a * b,
    min_f16=np.fmin,
    max_f16=np.fmax,
)
add('h h s', ldexp_f16=lambda a, b: np.ldexp(a.astype(f64), b.astype(i32)).astype(f16))
add(
    'h h h h',
    med3_f16=fmed3,
    min3_f16=fmin3,
    max3_f16=fmax3,
    **{k: fma16 for k in ('fma_f16', 'mad_f16', 'fma_legacy_f16', 'mad_legacy_f16')},
    **{k: div_fixup for k in ('div_fixup_f16', 'div_fixup_legacy_f16')},
)
accumulate('h h h h', fmac_f16=fma16, mac_f16=fma16)
add(
    's h',
    frexp_exp_i16_f16=lambda a: exponent(a).astype(i16),
    cvt_i16_f16=f_to_i16,
    cvt_norm_i16_f16=snorm,
)
add('H h', cvt_u16_f16=f_to_u16, cvt_norm_u16_f16=unorm)
add('h H', cvt_f16_u16=lambda a: a.astype(f16))
add('h s', cvt_f16_i16=lambda a: a.astype(f16))
add('u h h', cvt_pknorm_i16_f16=two(snorm), cvt_pknorm_u16_f16=two(unorm))
add('H f u', cvt_sr_f16_f32=stochastic_f16, cvt_sr_bf16_f32=stochastic_bf16)

# ---- f64
add(
    'D D D',
    add_f64=lambda a, b: a + b,
    mul_f64=lambda a, b: a * b,
    min_f64=np.fmin,
    max_f64=np.fmax,
)
add(
    'D D',
    rcp_f64=lambda a: 1 / a,
    rsq_f64=lambda a: 1 / np.sqrt(a),
    sqrt_f64=np.sqrt,
    floor_f64=np.floor,
    ceil_f64=np.ceil,
    trunc_f64=np.trunc,
    rndne_f64=np.rint,
    fract_f64=fract,
    frexp_mant_f64=mantissa,
)
add('D D i', ldexp_f64=np.ldexp)
add('i D', cvt_i32_f64=f_to_i32, frexp_exp_i32_f64=lambda a: exponent(a).astype(i32))
add('u D', cvt_u32_f64=f_to_u32)
add('D f', cvt_f64_f32=lambda a: a.astype(f64))
add('f D', cvt_f32_f64=lambda a: a.astype(f32))
add('D i', cvt_f64_i32=lambda a: a.astype(f64))
add('D u', cvt_f64_u32=lambda a: a.astype(f64))
add('D D D D', div_fixup_f64=div_fixup)


def exact_fma() -> Callable[[float, float, float], float]:
    """fma of the C library: correctly rounded. NumPy has none."""
    fn = ctypes.CDLL(ctypes.util.find_library('m') or 'libm.so.6').fma
    fn.restype, fn.argtypes = ctypes.c_double, [ctypes.c_double] * 3
    return fn


FMA64 = np.frompyfunc(exact_fma(), 3, 1)


def fma64(a: Any, b: Any, c: Any) -> Any:
    return np.asarray(FMA64(a, b, c)).astype(f64)


add('D D D D', fma_f64=fma64)
accumulate('D D D D', fmac_f64=fma64)

# bits of 2/pi after the binary point, for v_trig_preop_f64 (Payne-Hanek range reduction)
TWO_OVER_PI_BITS = 1201


def two_over_pi() -> int:
    """floor(2**1201 * 2 / pi), by Machin's formula in integers."""
    guard = TWO_OVER_PI_BITS + 64

    def arctan_inverse(x: int) -> int:
        term = total = (1 << guard) // x
        k = 1
        while term:
            term //= -x * x
            k += 2
            total += term // k
        return total

    pi = 4 * (4 * arctan_inverse(5) - arctan_inverse(239))
    return (2 << (guard + TWO_OVER_PI_BITS)) // pi


def trig_preop(x: Any, segment: Any) -> Any:
    bits = two_over_pi()
    shift = (segment & u32(31)).astype(i64) * 53
    exp = ((x.view(u64) >> u64(52)) & u64(0x7FF)).astype(i64)
    shift = shift + np.where(exp > 1077, exp - 1077, 0)
    shift, exp = np.broadcast_arrays(shift, exp)
    top = [(bits << int(s) >> (TWO_OVER_PI_BITS - 53)) & ((1 << 53) - 1) for s in shift.ravel()]
    scale = -53 - shift + np.where(exp >= 1968, 128, 0)
    return np.ldexp(np.array(top, f64).reshape(shift.shape), scale)


add('D D u', trig_preop_f64=trig_preop)
