"""What the launches of all GEMMs take, of either stage, with scaled MFMAs or without."""

from dataclasses import dataclass
from typing import Any

import flydsl.expr as fx


@dataclass(frozen=True, slots=True)
class Sources:
    """Tensors that are multiplied: codes and scales of the weights and of the tokens, codes as
    words. Scales of rows are float32, others as the kernel reads them."""

    codes: fx.Tensor
    scales: fx.Tensor
    tokens: fx.Tensor
    token_scales: fx.Tensor


@dataclass(frozen=True, slots=True)
class Routes:
    """The sorted routes: packed ids, the expert of each block, tokens of the call, slots of a
    token, tiles of the routes; routing weights where the stage multiplies by them."""

    ids: fx.Tensor
    experts: fx.Tensor
    tokens: fx.Int32
    topk: fx.Int32
    tiles: fx.Int32
    weights: Any = None


@dataclass(frozen=True, slots=True)
class Arguments:
    """A launch's tensors and scalars: ``out`` is where results go. A stage's own follow."""

    out: fx.Tensor
    sources: Sources
    bias: fx.Tensor
    routes: Routes
