"""From router logits to ``topk_ids`` and ``topk_weights``: a convenience in plain torch."""

import torch
from torch import Tensor

from mixmoe.errors import MixMoEError


def softmax_topk(logits: Tensor, topk: int, renormalise: bool = True) -> tuple[Tensor, Tensor]:
    """Softmax over experts, then the ``topk`` largest (Mixtral, Qwen3-MoE).

    logits: (T, E) -> ids int32 (T, topk), weights float32 (T, topk), largest first; with
    ``renormalise`` a token's weights sum to 1.
    """
    _check(logits, topk)
    weights, ids = torch.softmax(logits.float(), dim=-1).topk(topk, dim=-1)
    if renormalise:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return ids.to(torch.int32), weights


def topk_softmax(logits: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """The ``topk`` largest logits, then softmax over those alone (gpt-oss)."""
    _check(logits, topk)
    top, ids = logits.float().topk(topk, dim=-1)
    return ids.to(torch.int32), torch.softmax(top, dim=-1)


def sigmoid_topk(
    logits: Tensor,
    topk: int,
    bias: Tensor | None = None,
    groups: int = 1,
    topk_groups: int = 1,
    renormalise: bool = True,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """DeepSeek-V3's grouped gating.

    Scores are ``sigmoid(logits)``; ``bias (E,)`` is added for the choice only. Experts form
    ``groups``; a group's rank is the sum of its two best biased scores, and only the best
    ``topk_groups`` groups compete. Weights are the unbiased scores of the chosen, renormalised to
    sum 1, times ``scale``. logits: (T, E) -> ids int32, weights float32, both (T, topk).
    Source: DeepSeek-V3 technical report, section 2.1.2.
    """
    _check(logits, topk)
    tokens, experts = logits.shape
    if bias is not None and bias.shape != (experts,):
        raise MixMoEError("bias is (E,)", tuple(bias.shape), (experts,))
    if groups < 1 or experts % groups or not 1 <= topk_groups <= groups:
        raise MixMoEError(
            "groups must divide E and topk_groups lie in 1..groups", (experts, groups, topk_groups)
        )
    if topk > experts // groups * topk_groups:
        raise MixMoEError(
            "topk experts must fit in the chosen groups", topk, experts // groups * topk_groups
        )
    scores = torch.sigmoid(logits.float())
    choice = scores if bias is None else scores + bias.float()
    if groups > 1:
        best = choice.view(tokens, groups, -1).topk(min(2, experts // groups), dim=-1).values
        winners = best.sum(-1).topk(topk_groups, dim=-1).indices
        open_group = torch.zeros(tokens, groups, dtype=torch.bool, device=logits.device)
        open_group.scatter_(1, winners, True)
        choice = choice.masked_fill(
            ~open_group.repeat_interleave(experts // groups, dim=1), -torch.inf
        )
    ids = choice.topk(topk, dim=-1).indices
    weights = scores.gather(1, ids)
    if renormalise:
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-20)
    return ids.to(torch.int32), weights * scale


def with_shared_expert(
    topk_ids: Tensor, topk_weights: Tensor, expert: int, weight: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Append a shared expert, stored as expert number ``expert``, to every token's routes."""
    ids = torch.full_like(topk_ids[:, :1], expert)
    weights = torch.full_like(topk_weights[:, :1], weight)
    return torch.cat([topk_ids, ids], dim=1), torch.cat([topk_weights, weights], dim=1)


def _check(logits: Tensor, topk: int) -> None:
    if logits.dim() != 2:
        raise MixMoEError("logits is (T, E)", tuple(logits.shape))
    if not 1 <= topk <= logits.shape[1]:
        raise MixMoEError("topk must be in 1..E", topk, min(max(topk, 1), logits.shape[1]))
