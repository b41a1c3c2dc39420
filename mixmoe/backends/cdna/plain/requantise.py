"""Codes of h in stage 1's epilogue, where a scale's block lies in a workgroup's tile.

Bit for bit what :mod:`quantise` makes of float32 rows. A wave owns 32 columns, which a token's four
lanes share: the block of an E8M0 scale. Four waves side by side own 128, the block of a float32
scale, whose maxima meet in LDS.
"""

from dataclasses import dataclass

import flydsl.compiler as flyc
import flydsl.expr as fx

from mixmoe.backends.cdna.atoms import MFMA_ROWS, SCALE_BLOCK, Operand
from mixmoe.backends.cdna.config import WAVES
from mixmoe.backends.cdna.plain.codes import encoder
from mixmoe.backends.cdna.plain.config import Gemm
from mixmoe.backends.cdna.plain.quantise import float_scale
from mixmoe.backends.cdna.quantise import MANTISSA, block_max, scale_byte
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


def fits(cfg: Gemm, fmt: Format) -> bool:
    """Whether every block of a format's scales lies in one tile of the GEMM that makes h."""
    if fmt.scale is ScaleKind.E8M0:
        return fmt.cols == cfg.blocks * MFMA_ROWS == SCALE_BLOCK
    return fmt.scale is ScaleKind.F32 and fmt.cols == cfg.tile_rows and cfg.team == WAVES


def tops_of_tile(cfg: Gemm, place, lds, tops: list) -> list:
    """The largest of the four waves' maxima of each token, through LDS where the codes were."""
    shared = fx.recast_iter(fx.Float32, lds.codes.ptr)
    shared = shared.view(fx.make_layout((cfg.tokens, WAVES), (1, cfg.tokens)))
    fx.gpu.barrier()  # the last tokens are read
    for group, top in enumerate(tops):
        # The four lanes of a token write the same.
        shared[group * MFMA_ROWS + place.r, place.wave] = top
    fx.gpu.barrier()
    out = []
    for group in range(cfg.groups):
        token = group * MFMA_ROWS + place.r
        waves = [fx.Float32(shared[token, wave]) for wave in range(WAVES)]
        out.append(fx.max(fx.max(waves[0], waves[1]), fx.max(waves[2], waves[3])))
    return out


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
def store_codes(target: Target, cfg: Gemm, place, lds, out, routes, blocks, first) -> None:
    """Codes and scales of a tile. ``out``: h, its scales; ``routes``: (route, used) of each group;
    ``blocks``: two vectors of four columns each, zeros beyond the last row."""
    (h, h_scales), fmt = out, target.fmt
    encode = encoder(cfg.atoms, fmt.element)
    code = fx.Int16 if fx.const_expr(fmt.element.bits == 4) else fx.Int32  # four codes
    tops = [block_max(both) for both in blocks]
    if fx.const_expr(fmt.scale is ScaleKind.F32):
        tops = tops_of_tile(cfg, place, lds, tops)
    per_row = -(-cfg.rows // fmt.cols)
    column = first * MFMA_ROWS
    owner = place.g == 0
    if fx.const_expr(fmt.scale is ScaleKind.F32):
        owner = owner & (place.wave == 0)
    for group in fx.range_constexpr(cfg.groups):
        scale, both = scaled(target, tops[group], blocks[group])
        route, used = routes[group]
        if used & (column < cfg.rows):
            for b in fx.range_constexpr(2):
                if column + b * MFMA_ROWS < cfg.rows:
                    four = (column + b * MFMA_ROWS) // 4 + place.g
                    word = encode([both[b][i] for i in range(4)]).to(code)
                    (fx.get_iter(h) + (route * (cfg.rows // 4) + four)).store(word)
            if owner:
                (fx.get_iter(h_scales) + (route * per_row + column // fmt.cols)).store(scale)
