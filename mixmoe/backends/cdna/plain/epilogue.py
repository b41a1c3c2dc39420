"""What the epilogues of both stages share: scales of rows and tokens, stores of four columns."""

from dataclasses import dataclass

import flydsl.expr as fx

from mixmoe.backends.cdna.mainloop import row_bias
from mixmoe.backends.cdna.plain.config import Gemm


@dataclass(frozen=True, slots=True)
class Extras:
    """What stage 1 applies on its way: a bias; the routing weight; the smooth factor of stage 2's
    input. ``per_route``: x has a row per route, not per token."""

    bias: bool = False
    weighted: bool = False
    smooth: bool = False
    per_route: bool = False

    @property
    def name(self) -> str:
        """A digit each."""
        return f"{self.bias:d}{self.weighted:d}{self.smooth:d}{self.per_route:d}"


def row_scales(cfg: Gemm, of_rows: fx.Tensor, at) -> fx.Vector | None:
    """Scales of four weight rows; None where rows have none."""
    return row_bias(of_rows, at) if cfg.row_scaled[0] else None


def token_scale(cfg: Gemm, scales: fx.Tensor, row) -> fx.Float32 | None:
    """Scale of a token's row; None where it has none."""
    return fx.Float32(fx.get_iter(scales)[fx.Int64(row)]) if cfg.row_scaled[1] else None


def store_four(target: fx.Tensor, at, values: fx.Vector, kind: type[fx.Numeric]) -> None:
    """Four consecutive values, at once."""
    quad = fx.make_copy_atom(fx.UniversalCopy(4 * kind.width), kind)
    frag = fx.make_rmem_tensor(4, kind)
    frag.store(values)
    fx.copy(quad, frag, (fx.get_iter(target) + at).view(fx.make_layout(4, 1)))
