"""What an architecture offers, in one record; the operands of its matrix instruction.

gfx950 multiplies 16 x 16 x 128 with one E8M0 scale per 32 values of either operand
(``v_mfma_scale_f32_16x16x128_f8f6f4``). Weights are the first operand, tokens the second: lane
``l`` of a wave then holds, of the 16 x 16 result, token ``l % 16`` and the four consecutive
weight rows ``4 (l / 16) ..``. So bias, activation, requantisation and stores work on consecutive
columns of one token, and no result passes through LDS.

Source of the lane maps: composable_kernel test/mx_mfma_op; AMD Instinct MI350 ISA, section 7.
"""

from dataclasses import dataclass, replace

import flydsl.expr as fx
from flydsl.expr.typing import MmaAtom

from mixmoe.errors import MixMoEError
from mixmoe.formats import (
    Element,
    Format,
    bfloat16,
    e4m3fn,
    e4m3fnuz,
    float16,
    int8,
)

WAVE = 64
MFMA_ROWS = 16
SCALE_BLOCK = 32
PIECE = 16  # bytes a lane moves at once
WORD = 4  # bytes of the i32 that codes travel in


@dataclass(frozen=True, slots=True)
class Operand:
    """Element of a scaled MFMA, and what takes its scales. ``pieces``: 16-byte loads that fill a
    lane's share of 128 K. ``block``: K of an E8M0 scale, which the MFMA applies; 0 where a float32
    scales the whole row, which the sums take at the end while the MFMA multiplies by 2^0; or,
    with ``period``, so many K, which each sum takes.

    A lane's e2m1 share is K ``32 g .. 32 g + 31`` (g = l / 16): one piece. Its e4m3 share is K
    ``16 g ..`` and ``64 + 16 g ..``: two pieces, 64 K apart.
    """

    name: str
    element: type[fx.Numeric]
    bits: int
    emax: int
    mantissa: int
    largest: float
    block: int = SCALE_BLOCK
    period: int = 0

    @property
    def pieces(self) -> int:
        """16-byte pieces of a lane's operand."""
        return self.bits // 4

    def row_bytes(self, k: int) -> int:
        """Bytes of K codes of one row."""
        return k * self.bits // 8


@dataclass(frozen=True, slots=True)
class Mma:
    """An MFMA without scales, ``16 x 16 x k`` for every k of ``ks``; both operands one element.

    A lane holds ``k / 4`` codes of either operand; which k they stand for is free as long as it is
    the same on both sides.
    """

    element: Element
    numeric: type[fx.Numeric]
    sum: type[fx.Numeric]
    ks: tuple[int, ...]

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.element.bits

    def cycles(self, k: int) -> int:
        """Cycles of a matrix core: 32 of the scaled one with e4m3 operands, else 16."""
        return 32 if k == 128 else 16

    def atom(self, k: int) -> MmaAtom:
        """``weight (16, k) x token (16, k)^T``; K = 128 is the scaled one, its scales left out."""
        if k == 128:
            op = fx.rocdl.cdna4.MFMA_Scale(MFMA_ROWS, MFMA_ROWS, k, self.numeric, self.numeric)
        else:
            op = fx.rocdl.MFMA(MFMA_ROWS, MFMA_ROWS, k, self.numeric, self.sum)
        return fx.make_mma_atom(op)


@dataclass(frozen=True, slots=True)
class Atoms:
    """An architecture: LDS of a workgroup, its banks of 4 bytes, K of its scaled MFMA and the
    formats that takes (0 and none where there is no such instruction), the MFMAs without scales,
    and whether it converts e2m1 under a scale."""

    arch: str
    lds_bytes: int
    mfma_k: int
    operands: tuple[tuple[str, Operand], ...]
    plain: tuple[Mma, ...]
    converts_e2m1: bool
    banks: int

    def mma_of(self, element: Element) -> Mma | None:
        """The MFMA without scales whose operands are of this element."""
        return next((mma for mma in self.plain if mma.element is element), None)

    def operand(self, fmt: Format) -> Operand:
        """The operand of a format's codes. Raises MixMoEError where the MFMA does not take it."""
        table = dict(self.operands)
        if fmt.name not in table:
            raise MixMoEError(f"the scaled MFMA of {self.arch} takes", fmt, list(table))
        return table[fmt.name]

    def mma(self, weight: Operand, token: Operand, bytes_of: tuple[int, int]) -> MmaAtom:
        """``weight (16, 128) x token (16, 128)^T``; ``bytes_of`` picks each one's scale byte."""
        op = fx.rocdl.cdna4.MFMA_Scale(
            MFMA_ROWS,
            MFMA_ROWS,
            self.mfma_k,
            weight.element,
            token.element,
            opsel_a=bytes_of[0],
            opsel_b=bytes_of[1],
        )
        return fx.make_mma_atom(op)


E2M1 = Operand("e2m1", fx.Float4E2M1FN, bits=4, emax=2, mantissa=1, largest=6.0)
E4M3 = Operand("e4m3", fx.Float8E4M3FN, bits=8, emax=8, mantissa=3, largest=448.0)
E4M3_ROW = replace(E4M3, name="e4m3r", block=0)
E4M3_BLOCK = replace(E4M3_ROW, name="e4m3b", period=128)
# 16x16x64 of int8 has no atom in FlyDSL 0.4.2, and its operation takes an attribute that only
# the IR below the DSL can make.
GFX950 = Atoms(
    "gfx950", 160 << 10, 128,
    (
        ("mxfp4", E2M1), ("mxfp8", E4M3), ("fp8_token", E4M3_ROW), ("fp8_channel", E4M3_ROW),
        ("fp8_1x128", E4M3_BLOCK), ("fp8_block", E4M3_BLOCK),
    ),
    (
        Mma(bfloat16, fx.BFloat16, fx.Float32, (32,)),
        Mma(float16, fx.Float16, fx.Float32, (32,)),
        Mma(int8, fx.Int8, fx.Int32, (32,)),
        Mma(e4m3fn, fx.Float8E4M3FN, fx.Float32, (32, 128)),
    ),
    converts_e2m1=True,
    banks=64,
)
GFX942 = Atoms(
    "gfx942", 64 << 10, 0, (),
    (
        Mma(bfloat16, fx.BFloat16, fx.Float32, (16,)),
        Mma(float16, fx.Float16, fx.Float32, (16,)),
        Mma(int8, fx.Int8, fx.Int32, (32,)),
        Mma(e4m3fnuz, fx.Float8E4M3FNUZ, fx.Float32, (32,)),
    ),
    converts_e2m1=False,
    banks=32,
)
