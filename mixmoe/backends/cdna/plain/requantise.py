"""Codes of h in stage 1's epilogue, where a scale's block lies in a workgroup's tile.

Bit for bit what :mod:`quantise` makes of float32 rows. A wave owns 32 columns, which a token's four
lanes share: the block of an E8M0 scale. Four waves side by side own 128, the block of a float32
scale, whose maxima meet in LDS.
"""

from dataclasses import dataclass

import flydsl.compiler as flyc
import flydsl.expr as fx

from mixmoe.backends.cdna.atoms import MFMA_ROWS, SCALE_BLOCK, WAVE, Operand
from mixmoe.backends.cdna.config import WAVES
from mixmoe.backends.cdna.plain.codes import encoder
from mixmoe.backends.cdna.plain.config import Gemm
from mixmoe.backends.cdna.plain.quantise import float_scale
from mixmoe.backends.cdna.quantise import MANTISSA, scale_byte
from mixmoe.formats import Format, Rounding, ScaleKind


@dataclass(frozen=True, slots=True)
class Target:
    """What h becomes."""

    fmt: Format
    rounding: Rounding

    @property
    def name(self) -> str:
        """As part of a kernel's name."""
        return f"{self.fmt}_{self.rounding.value}"

    @property
    def meets(self) -> bool:
        """Whether four waves share a block."""
        return self.fmt.scale is ScaleKind.F32


def fits(cfg: Gemm, fmt: Format) -> bool:
    """Whether every block of a format's scales lies in one tile of the GEMM that makes h."""
    if fmt.scale is ScaleKind.E8M0:
        return fmt.cols == cfg.blocks * MFMA_ROWS == SCALE_BLOCK
    return fmt.scale is ScaleKind.F32 and fmt.cols == cfg.tile_rows and cfg.team == WAVES


def top_of_wave(both: list[fx.Vector]) -> fx.Float32:
    """Largest magnitude of a token's 32 columns: a lane's eight, then the lanes 16 and 32 on."""
    top = fx.Float32(0.0)
    for values in both:
        top = fx.max(top, abs(values).reduce(fx.ReductionOp.MAX))
    for distance in (16, 32):
        top = fx.max(top, fx.gpu.shuffle_xor(top, distance, WAVE))
    return top


def top_of_waves(cfg: Gemm, place, lds, group: int, top) -> fx.Float32:
    """The largest of the four waves' maxima of a token, through LDS where the codes were: a place
    for each token of the tile, so that the waves meet once."""
    shared = fx.recast_iter(fx.Float32, lds.codes.ptr)
    shared = shared.view(fx.make_layout((cfg.tokens, WAVES), (1, cfg.tokens)))
    token = group * MFMA_ROWS + place.r
    shared[token, place.wave] = top  # the four lanes of a token write the same
    fx.gpu.barrier()
    waves = [fx.Float32(shared[token, wave]) for wave in range(WAVES)]
    return fx.max(fx.max(waves[0], waves[1]), fx.max(waves[2], waves[3]))


def scaled(target: Target, top, both: list[fx.Vector]) -> tuple:
    """(scale as stored, values under it) of a block whose largest magnitude is ``top``."""
    fmt = target.fmt
    if fmt.scale is ScaleKind.E8M0:
        e = fmt.element
        operand = Operand("", fx.Float32, e.bits, e.emax, e.mantissa, e.max)
        byte = scale_byte(operand, top, target.rounding)
        factor = ((254 - byte) << MANTISSA).bitcast(fx.Float32)
        return byte.to(fx.Uint8), [values * factor for values in both]
    scale = float_scale(fmt, top)
    return scale, [values / scale for values in both]


@flyc.jit
def store_codes(target: Target, cfg: Gemm, place, lds, out, at, group: int, both) -> None:
    """Codes and a scale of 16 tokens. ``out``: h, its scales; ``at``: route, whether it is one, the
    wave's first block; ``both``: two vectors of four columns, zeros beyond the last row."""
    (h, h_scales), (route, used, first), fmt = out, at, target.fmt
    code = fx.Int16 if fx.const_expr(fmt.element.bits == 4) else fx.Int32  # four codes
    top, owner = top_of_wave(both), place.g == 0
    if fx.const_expr(target.meets):
        top = top_of_waves(cfg, place, lds, group, top)
        owner = owner & (place.wave == 0)
    scale, both = scaled(target, top, both)
    encode = encoder(cfg.atoms, fmt.element)
    column = first * MFMA_ROWS
    if used & (column < cfg.rows):
        for b in fx.range_constexpr(2):
            if column + b * MFMA_ROWS < cfg.rows:
                four = (column + b * MFMA_ROWS) // 4 + place.g
                word = encode([both[b][i] for i in range(4)]).to(code)
                (fx.get_iter(h) + (route * (cfg.rows // 4) + four)).store(word)
        if owner:
            per_row = -(-cfg.rows // fmt.cols)
            (fx.get_iter(h_scales) + (route * per_row + column // fmt.cols)).store(scale)
