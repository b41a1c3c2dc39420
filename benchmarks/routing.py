"""Which experts the tokens of a case go to: uniform or Zipf-skewed, no expert twice per token."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from .shapes import Shape


class Skew(Enum):
    """How popular the experts are."""

    UNIFORM = "uniform"
    ZIPF = "zipf"  # the expert of rank r (from 1) is drawn with a weight of 1 / r


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """topk_ids (T, topk) int32, topk_weights (T, topk) f32 and what follows from them.

    Route r = token * topk + slot. `order` (R,) lists the routes sorted by expert, stable;
    `inverse` (R,) is the place of each route in it; `counts` (E,) the routes of each expert.
    """

    ids: Tensor
    weights: Tensor
    order: Tensor
    inverse: Tensor
    counts: Tensor
    active: int

    @property
    def topk(self) -> int:
        return self.ids.shape[1]


def draw_ids(shape: Shape, tokens: int, skew: Skew, seed: int = 0) -> Tensor:
    """topk_ids (T, topk) int64 on the CPU: topk draws without replacement (Gumbel top-k).

    The same for every provider, run and device.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + tokens * 31 + shape.experts)
    log_weight = torch.zeros(shape.experts)
    if skew is Skew.ZIPF:
        rank = torch.randperm(shape.experts, generator=generator) + 1
        log_weight = -rank.float().log()
    noise = torch.rand(tokens, shape.experts, generator=generator).clamp_(1e-12, 1 - 1e-7)
    return (log_weight - (-noise.log()).log()).topk(shape.topk, dim=1).indices


def route(
    shape: Shape, tokens: int, skew: Skew, device: torch.device | str, seed: int = 0
) -> Routing:
    """Draws the ids, weights of sum 1 per token, and the sorted order."""
    ids = draw_ids(shape, tokens, skew, seed).to(device)
    generator = torch.Generator().manual_seed(seed + tokens)
    weights = torch.rand(tokens, shape.topk, generator=generator).softmax(1).to(device)
    return routing_of(ids, weights, shape.experts)


def routing_of(ids: Tensor, weights: Tensor, experts: int) -> Routing:
    """Everything that follows from given ids (T, topk) and weights (T, topk)."""
    flat = ids.flatten().long()
    order = flat.argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    counts = torch.bincount(flat, minlength=experts)
    active = int((counts > 0).sum())
    return Routing(ids.int().contiguous(), weights.float(), order, inverse, counts, active)
