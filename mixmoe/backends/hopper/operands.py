"""How a stored operand becomes a tile for the tensor cores: one record per number format.

An Operand is three device functions. ``tile`` reads ``(R, BK)`` values as the MMA's dtype, block
scales applied where that is exact; ``step`` gives the factor ``(R,)`` of one K step, for scales
that are not powers of two; ``final`` the factor ``(R,)`` of a whole row, applied after the sum. A
new weight format is one more record.
"""

from dataclasses import dataclass
from math import gcd

import triton
import triton.language as tl
from torch import Tensor

from mixmoe.errors import MixMoEError
from mixmoe.fold import Fold
from mixmoe.formats import Format, Quantised, ScaleKind
from mixmoe.preshuffle import HopperTile, Order, Packed, hopper_fp4


@triton.jit
def columns(ptr, row, ok, k, K, BK: tl.constexpr):
    """``(R, BK)`` elements from column ``k`` on, zero beyond K."""
    at = k + tl.arange(0, BK)
    mask = ok[:, None] & (at < K)[None, :]
    zero = 0.0 if ptr.dtype.element_ty.is_floating() else 0
    return tl.load(ptr + row[:, None] * K + at[None, :], mask=mask, other=zero)


@triton.jit
def e8m0_columns(ptr, row, ok, k, K, BK: tl.constexpr):
    """``(R, BK/32)`` float32 powers of two; byte 0 is 2^-127."""
    byte = columns(ptr, row, ok, k // 32, K // 32, BK // 32).to(tl.int32)
    return tl.where(byte == 0, 1 << 22, byte << 23).to(tl.float32, bitcast=True)


@triton.jit
def spread(values, scale, R: tl.constexpr, BK: tl.constexpr):
    """``(R, BK)`` times its ``(R, BK/32)`` block scales."""
    blocks = tl.reshape(values, (R, BK // 32, 32)) * scale[:, :, None]
    return tl.reshape(blocks, (R, BK))


@triton.jit
def tile_whole(ptr, scale_ptr, row, scale_row, ok, k, K,
               R: tl.constexpr, BK: tl.constexpr, DT: tl.constexpr):  # fmt: skip
    """bf16, fp16, e4m3, int8: one element a value."""
    return columns(ptr, row, ok, k, K, BK).to(DT)


@triton.jit
def tile_mxfp8(ptr, scale_ptr, row, scale_row, ok, k, K,
               R: tl.constexpr, BK: tl.constexpr, DT: tl.constexpr):  # fmt: skip
    values = columns(ptr, row, ok, k, K, BK).to(tl.float32)
    return spread(values, e8m0_columns(scale_ptr, scale_row, ok, k, K, BK), R, BK).to(DT)


@triton.jit
def tile_mxfp4(ptr, scale_ptr, row, scale_row, ok, k, K,
               R: tl.constexpr, BK: tl.constexpr, DT: tl.constexpr):  # fmt: skip
    """Eight codes of a word at a time: sign, exponent and mantissa moved to their bf16 places, two
    codes to a word (i and i + 4), which makes a value times 2^-126. Two multiplications, because
    2^126 times a block scale over 2 is no bf16 number. About 5 instructions a value; by way of
    float32 it was 12 (H200, 2026-11-24: a third of the time of a16w4).
    """
    words = ptr.to(tl.pointer_type(tl.int32))
    w = columns(words, row, ok, k // 8, K // 8, BK // 8)
    w = tl.join(tl.join(w, w >> 4), tl.join(w >> 8, w >> 12))  # [j % 2][j // 2] of code j, j + 4
    w = ((w & 0x00070007) << 6) | ((w & 0x00080008) << 12)
    bits = tl.join(w.to(tl.int16), (w >> 16).to(tl.int16))
    bits = tl.reshape(tl.permute(bits, (0, 1, 4, 3, 2)), (R, BK))
    values = bits.to(tl.bfloat16, bitcast=True) * 2.0**126
    byte = columns(scale_ptr, scale_row, ok, k // 32, K // 32, BK // 32).to(tl.int16)
    scale = tl.where(byte == 0, 1 << 6, byte << 7).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return spread(values, scale, R, BK).to(DT)


@triton.jit
def tile_int4(ptr, scale_ptr, row, scale_row, ok, k, K,
              R: tl.constexpr, BK: tl.constexpr, DT: tl.constexpr):  # fmt: skip
    byte = columns(ptr, row, ok, k // 2, K // 2, BK // 2).to(tl.int8, bitcast=True)
    low = (byte << 4).to(tl.int8) >> 4
    return tl.reshape(tl.join(low, byte >> 4), (R, BK)).to(DT)


@triton.jit
def tile_fragment(ptr, scale_ptr, row, k, K, STEP: tl.constexpr, LOWEST: tl.constexpr,
                  R: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """float32 ``(R, BK)`` of folded mxfp4 in fragment order (the layout is stated in mainloop.py).

    A unit of 16 rows x 128 columns is row-major: the four words of a block of 32 lie together. A
    word beyond K reads zero words of the padding or is masked.
    """
    block = k // 32 + tl.arange(0, BK // 32)
    units = (K + 127) // 128
    unit = (row // 16 * units)[:, None] + (block // 4)[None, :]
    place = unit * 64 + (row % 16 * 4)[:, None] + (block % 4)[None, :]
    known = (block < (K + 31) // 32)[None, :] & (row >= 0)[:, None]
    byte = tl.load(scale_ptr + place, mask=known, other=0)
    power = ((byte.to(tl.int32) // STEP + LOWEST + 127) << 23).to(tl.float32, bitcast=True)
    j = tl.arange(0, 4)[None, None, :]
    word = tl.load(ptr + place[:, :, None] * 4 + j, mask=known[:, :, None], other=0)
    word = word[:, :, :, None, None]
    high = tl.arange(0, 2)[None, None, None, :, None]
    by = tl.arange(0, 4)[None, None, None, None, :]
    bits = ((word >> (16 * high + 4 * by)) & 7) << 22
    bits |= ((word >> (8 * by + 7 - 4 * high)) & 1) << 31
    values = tl.reshape(bits.to(tl.float32, bitcast=True) * 2.0**126, (R, BK // 32, 32))
    return tl.reshape(values * power[:, :, None], (R, BK))


@triton.jit
def tile_narrow(ptr, scale_ptr, row, scale_row, ok, k, K,
                R: tl.constexpr, BK: tl.constexpr, DT: tl.constexpr):  # fmt: skip
    """Folded mxfp4, scale bytes 8 (k + 5)."""
    return tile_fragment(ptr, scale_ptr, tl.where(ok, row, -1), k, K, 8, -5, R, BK).to(DT)


@triton.jit
def tile_wide(ptr, scale_ptr, row, scale_row, ok, k, K,
              R: tl.constexpr, BK: tl.constexpr, DT: tl.constexpr):  # fmt: skip
    """Folded mxfp4, scale bytes k + 8."""
    return tile_fragment(ptr, scale_ptr, tl.where(ok, row, -1), k, K, 1, -8, R, BK).to(DT)


@triton.jit
def step_group(scale_ptr, scale_row, ok, k, K, COLS: tl.constexpr):
    """The scale of the group of COLS columns that holds column ``k``."""
    groups = (K + COLS - 1) // COLS
    return tl.load(scale_ptr + scale_row * groups + k // COLS, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def final_row(scale_ptr, scale_row, ok):
    """The scale of the row."""
    return tl.load(scale_ptr + scale_row, mask=ok, other=0.0)


@dataclass(frozen=True)
class Operand:
    """How one format is read; ``rows x cols`` is the block of a ``step`` scale.

    ``paired``: gate and up rows alternate by 8 in memory too (a packed gate/up order).
    """

    name: str
    tile: object
    step: object = None
    final: object = None
    rows: int = 1
    cols: int = 0
    paired: bool = False

    @property
    def cache_key(self) -> str:
        """Triton hashes compile-time arguments by this: the sources of the device functions."""
        used = (f for f in (self.tile, self.step, self.final) if f is not None)
        return "/".join([repr(self), *(f.cache_key for f in used)])  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        return f"{self.name}_{self.rows}x{self.cols}{'_paired' if self.paired else ''}"

    def step_of(self, k: int) -> int:
        """Largest K step up to ``k`` (a power of two) that stays inside one scale group."""
        return k if self.step is None else gcd(k, self.cols)


def operand(fmt: Format) -> Operand:
    """The Operand of a format. Raises MixMoEError for one that has no reader here."""
    if fmt.scale is ScaleKind.E8M0:
        return Operand(fmt.name, tile_mxfp4 if fmt.element.bits == 4 else tile_mxfp8)
    if fmt.element.name == "int4":
        return Operand(fmt.name, tile_int4, step=step_group, cols=fmt.cols)
    if fmt.element.name == "e4m3fnuz":
        raise MixMoEError("Hopper's FP8 is e4m3fn", fmt.name, fmt.name.removesuffix("_fnuz"))
    if fmt.scale is ScaleKind.NONE:
        return Operand(fmt.name, tile_whole)
    if fmt.cols == 0:
        return Operand(fmt.name, tile_whole, final=final_row)
    return Operand(fmt.name, tile_whole, step=step_group, rows=fmt.rows, cols=fmt.cols)


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """A weight matrix as the kernels take it: its reader, and pointers to codes and scales."""

    operand: Operand
    codes: Tensor
    scales: Tensor | None
    row_scale: Tensor | None


def order_of(fold: Fold, gate_up: bool) -> Order:
    """The fragment order of w13 (``gate_up``) or w2 that every kernel here reads."""
    return hopper_fp4(HopperTile(gate_up=gate_up, warps=1), fold)


PACKED: dict[str, Operand] = {
    order_of(fold, paired).name: Operand(f"mxfp4_{tag}", tile, final=final_row, paired=paired)
    for fold, tag, tile in ((Fold.NARROW, "narrow", tile_narrow), (Fold.WIDE, "wide", tile_wide))
    for paired in (True, False)
}


def stored(weights: Quantised | Packed, gate_up: bool) -> Stored:
    """Weights in plain rows or in one of the orders of ``PACKED``; refuses any other."""
    if not isinstance(weights, Packed):
        codes, scales = weights.codes.contiguous(), weights.scales
        return Stored(operand(weights.format), codes, scales, scales)
    reader = PACKED.get(weights.order.name)
    if reader is None or reader.paired != gate_up:
        legal = [name for name, o in PACKED.items() if o.paired == gate_up]
        which = "w13" if gate_up else "w2"
        raise MixMoEError(
            f"hopper reads {which} in plain rows or packed", weights.order.name, ", ".join(legal)
        )
    return Stored(reader, weights.codes, weights.scales, weights.row_scale)


@dataclass(frozen=True)
class Math:
    """What the tensor cores multiply: operand dtype, and whether every K step is added in float32.

    ``promote`` also serves scales that belong to a K step. FP8 tensor cores keep about 14 bits of
    a running sum (facts: docs/measured.md), so the precise recipes promote every 128 of K.
    """

    dtype: tl.dtype
    promote: bool

    @property
    def cache_key(self) -> str:
        """For Triton's cache."""
        return repr(self)

    def __repr__(self) -> str:
        return f"{self.dtype}_{'promote' if self.promote else 'carry'}"


def math_of(activation: Format, weight: Format, accumulate: str) -> Math:
    """The fastest tensor-core type that holds both operands exactly.

    Both e4m3 with scales outside the sum: FP8, added in float32 unless asked to be fast. Both
    integer: int8. Else bf16 holds e2m1, e4m3, int8 and int4 times any power of two; fp16 beside a
    power-of-two scale needs the range of float32 and the mantissa of tf32, which holds all of
    fp16's 11 bits.
    """
    a, w = activation.element.name, weight.element.name
    step = any(f.cols and f.scale is not ScaleKind.E8M0 for f in (activation, weight))
    block_scaled = any(f.scale is ScaleKind.E8M0 for f in (activation, weight))
    if a == w == "e4m3fn" and not block_scaled:
        return Math(tl.float8e4nv, step or accumulate != "fast")
    if a == "int8":
        return Math(tl.int8, True)
    if a == "fp16":
        return Math(tl.float32 if block_scaled else tl.float16, step)
    return Math(tl.bfloat16, step)


