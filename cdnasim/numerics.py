"""Number formats of CDNA3/CDNA4: small floats (fp8, bf8, fp6, bf6, fp4), bf16, E8M0.

Encoders round to nearest even unless they are given random bits. Sources: OCP 8-bit Floating Point
Specification 1.0, OCP Microscaling Formats 1.0, AMD CDNA3 ISA section 7 (FNUZ variants on gfx94x).
"""

from __future__ import annotations

from typing import Any

import numpy as np

u8, u16, u32, u64 = np.uint8, np.uint16, np.uint32, np.uint64
i8, i16, i32, i64 = np.int8, np.int16, np.int32, np.int64
f16, f32, f64 = np.float16, np.float32, np.float64
Array = np.ndarray[Any, Any]


class MiniFloat:
    """Sign, `ebits`, `mbits`. `maxcode` is the largest finite code; `nan` and `inf` are codes or
    None.
    """

    def __init__(
        self,
        name: str,
        ebits: int,
        mbits: int,
        bias: int,
        maxcode: int,
        nan: int | None = None,
        inf: int | None = None,
        fnuz: bool = False,
    ):
        self.name, self.ebits, self.mbits, self.bias = name, ebits, mbits, bias
        self.maxcode, self.nan, self.inf, self.fnuz = maxcode, nan, inf, fnuz
        self.bits = 1 + ebits + mbits
        self.sign = 1 << (self.bits - 1)
        self.table = np.array([self._decode(c) for c in range(1 << self.bits)], f32)
        self.table64 = self.table.astype(f64)

    def _decode(self, code: int) -> float:
        s, mag = -1.0 if code & self.sign else 1.0, code & (self.sign - 1)
        if self.fnuz:
            if code == self.sign:
                return float('nan')
        elif mag > self.maxcode:
            return s * float('inf') if mag == self.inf else float('nan')
        e, m = mag >> self.mbits, mag & ((1 << self.mbits) - 1)
        if e == 0:
            return s * m * 2.0 ** (1 - self.bias - self.mbits)
        return s * (1 + m / (1 << self.mbits)) * 2.0 ** (e - self.bias)

    def encode(self, x: Any, saturate: bool = False, noise: Any = None) -> Array:
        """Floats -> codes (uint32). Overflow gives inf or NaN where the format has one, else the
        largest value.

        `noise` in [0, 1): stochastic rounding, floor(x / ulp + noise) on the magnitude, instead of
        nearest even.
        """
        x = np.asarray(x, f64)
        a = np.abs(x)
        safe = np.where(np.isfinite(a), a, 0.0)
        _, e = np.frexp(safe)
        emin = 1 - self.bias
        e = np.where(safe == 0, emin, np.maximum(e - 1, emin))
        scaled = np.ldexp(safe, self.mbits - e)
        q = (np.rint(scaled) if noise is None else np.floor(scaled + noise)).astype(i64)
        code = ((e - emin).astype(i64) << self.mbits) + q
        over = (code > self.maxcode) | np.isinf(a)
        top = self.maxcode
        if not saturate:
            top = self.inf if self.inf is not None else self.nan if self.nan is not None else top
        nan = self.nan if self.nan is not None else self.maxcode
        code = np.where(np.isnan(x), nan, np.where(over, top, code))
        neg = np.signbit(x)
        if self.fnuz:  # one zero and one NaN: code 0x80 is the NaN
            neg = neg & (code != 0) & (code != self.nan)
        return (code | np.where(neg, self.sign, 0)).astype(u32)


FP8 = MiniFloat('fp8', 4, 3, 7, 0x7E, nan=0x7F)
BF8 = MiniFloat('bf8', 5, 2, 15, 0x7B, nan=0x7F, inf=0x7C)
FP8_FNUZ = MiniFloat('fp8', 4, 3, 8, 0x7F, nan=0x80, fnuz=True)
BF8_FNUZ = MiniFloat('bf8', 5, 2, 16, 0x7F, nan=0x80, fnuz=True)
FP6 = MiniFloat('fp6', 2, 3, 1, 0x1F)
BF6 = MiniFloat('bf6', 3, 2, 3, 0x1F)
FP4 = MiniFloat('fp4', 2, 1, 1, 0x07)
BY_NAME = {'fp8': FP8, 'bf8': BF8, 'fp6': FP6, 'bf6': BF6, 'fp4': FP4}
FORMAT_BY_CODE = [
    FP8,
    BF8,
    FP6,
    BF6,
    FP4,
]  # cbsz / blgp of v_mfma_*_f8f6f4 (CDNA4 ISA, MFMA with block exponent scaling)


def minifloat(name: str, arch: str) -> MiniFloat:
    """fp8 and bf8 are FNUZ on gfx942 and OCP on gfx950."""
    if arch == 'gfx942' and name in ('fp8', 'bf8'):
        return FP8_FNUZ if name == 'fp8' else BF8_FNUZ
    return BY_NAME[name]


E8M0 = np.array([np.ldexp(1.0, c - 127) for c in range(255)] + [np.nan], f64)


def e8m0(code: Any) -> Any:
    """E8M0 scale byte -> float64; 0xFF is NaN (OCP MX 1.0, section 5.4)."""
    return E8M0[code]


def bf16_to_f32(h: Any) -> Array:
    return (np.asarray(h).astype(u32) << u32(16)).view(f32)


def f32_to_bf16(x: Any) -> Array:
    """float32 -> bf16 code (uint32), nearest even, NaN kept quiet."""
    b = np.asarray(x, f32).view(u32)
    r = b >> u32(16)
    r = (b + (u32(0x7FFF) + (r & u32(1)))) >> u32(16)
    nan = (b & u32(0x7FFFFFFF)) > u32(0x7F800000)
    return np.where(nan, (b >> u32(16)) | u32(0x40), r) if nan.any() else r


def f16_bits(x: Any) -> Array:
    return np.asarray(x, f16).view(u16).astype(u32)


def unpack_bits(data: Array, width: int) -> Array:
    """uint8[..., bytes] -> unsigned fields [..., bytes * 8 // width], low bits first."""
    if width == 8:
        return data
    if width == 16:
        return np.ascontiguousarray(data).view(u16)
    if width == 4:
        return np.stack([data & u8(15), data >> u8(4)], -1).reshape(*data.shape[:-1], -1)
    bits = np.unpackbits(data, axis=-1, bitorder='little')
    n = bits.shape[-1] // width
    return bits[..., : n * width].reshape(*data.shape[:-1], n, width) @ (1 << np.arange(width))


def pack_bits(codes: Array, width: int) -> Array:
    """Fields [..., k] -> uint32[..., k * width // 32], the inverse of `unpack_bits`."""
    bits = (
        (codes[..., None] >> np.arange(width).astype(codes.dtype)) & codes.dtype.type(1)
    ).astype(u8)
    data = np.packbits(bits.reshape(*codes.shape[:-1], -1), axis=-1, bitorder='little')
    return np.ascontiguousarray(data).view(u32)
