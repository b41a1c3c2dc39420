"""The torch twin of every stage: the executable specification, readable before any kernel.

``cpu`` accumulates in float32, ``reference`` in float64 on the same quantised operands: what every
other backend is judged against. Both dequantise one expert at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mixmoe.backends import cpu_w4
from mixmoe.errors import MixMoEError
from mixmoe.formats import Quantised
from mixmoe.preshuffle import Packed
from mixmoe.spec import Problem, Recipe, Routed, Weights

SORT_BLOCK = 32


@dataclass(frozen=True, slots=True)
class CPUBackend:
    """Torch on any device; ``work`` is the dtype of every product and sum."""

    name: str
    work: torch.dtype

    def unavailable(self) -> str | None:
        """None: it needs torch alone."""
        return None

    def prepare(self, weights: Weights, recipe: Recipe) -> Weights:
        """Plain rows."""
        extra = {name: getattr(weights, name) for name in Weights.TENSORS}
        return Weights(weights.rows("w13"), weights.rows("w2"), **extra)

    def check(self, recipe: Recipe, weights: Weights, problem: Problem) -> None:
        """Every recipe of the matrix runs; the weights must be in plain rows."""
        for stage, stored in (("w13", weights.w13), ("w2", weights.w2)):
            if isinstance(stored, Packed):
                raise MixMoEError(
                    f"backend {self.name} reads {stage} in order 'rows'", stored.order.name, "rows"
                )

    def route(
        self,
        topk_ids: Tensor,
        topk_weights: Tensor,
        problem: Problem,
        expert_map: Tensor | None = None,
        block: int | None = None,
    ) -> Routed:
        """Stable sort by expert; every expert padded to ``block`` routes."""
        block = SORT_BLOCK if block is None else block
        experts, device = problem.experts, topk_ids.device
        ids = local_experts(topk_ids, experts, expert_map).flatten()
        order = torch.argsort(ids, stable=True)
        counts = torch.bincount(ids, minlength=experts + 1)[:experts]
        padded = (counts + block - 1) // block * block
        offsets = torch.zeros(experts + 1, dtype=torch.int64, device=device)
        offsets[1:] = padded.cumsum(0)
        order = order[: int(counts.sum())]
        expert = ids[order]
        rank = torch.arange(len(order), device=device) - (counts.cumsum(0) - counts)[expert]
        position = offsets[expert] + rank
        room = problem.padded_routes(block)
        sentinel = problem.tokens | problem.topk << 24
        packed = order // problem.topk | order % problem.topk << 24
        token_ids = torch.full((room,), sentinel, dtype=torch.int32, device=device)
        weights = torch.zeros(room, dtype=torch.float32, device=device)
        token_ids[position] = packed.to(torch.int32)
        weights[position] = topk_weights.flatten()[order].to(torch.float32)
        blocks = torch.arange(room // block, device=device)
        owner = torch.searchsorted(offsets[1:], blocks * block, right=True)
        owner[owner == experts] = -1
        valid = torch.stack([offsets[-1], offsets.new_tensor(problem.tokens)])
        owner, valid, offsets, counts = (t.to(torch.int32) for t in (owner, valid, offsets, counts))
        return Routed(token_ids, weights, owner, valid, offsets, counts, block, problem)

    def quantise(self, x: Tensor, weights: Weights, routed: Routed, recipe: Recipe) -> Quantised:
        """A row per token; a row per route where a smooth factor depends on the expert."""
        if recipe.activation.name != "int8_smooth" or weights.w13_smooth is None:
            return recipe.activation.quantise(x, recipe.rounding)
        rows = x.new_zeros((routed.problem.routes, x.shape[1]), dtype=torch.float32)
        for e, routes, _ in expert_routes(routed):
            rows[routes] = x[routes // routed.problem.topk].float() * weights.w13_smooth[e]
        return recipe.activation.quantise(rows, recipe.rounding)

    def _matmul(self, rows: Tensor, weights: Quantised) -> Tensor:
        if self.work == torch.float32 and cpu_w4.applies(weights, len(rows)):
            return cpu_w4.matmul(rows, weights)
        return rows @ weights.dequantise(self.work).T

    def gemm1(self, x: Quantised, weights: Weights, routed: Routed, recipe: Recipe) -> Quantised:
        """Gate and up GEMM, activation, routing weight if on stage 1, requantisation."""
        h = self.hidden(x, weights, routed, recipe)
        return recipe.activation.quantise(h, recipe.rounding, "h")

    def hidden(self, x: Quantised, weights: Weights, routed: Routed, recipe: Recipe) -> Tensor:
        """What stage 1 requantises: what the codes of any backend's h are judged by."""
        problem = routed.problem
        h = torch.zeros(
            (problem.routes, problem.intermediate), dtype=self.work, device=x.codes.device
        )
        values, w13 = x.dequantise(self.work), weights.rows("w13")
        per_route = values.shape[0] != problem.tokens or recipe.activation.name == "int8_smooth"
        for e, routes, weight in expert_routes(routed):
            rows = values[routes if per_route else routes // problem.topk]
            both = self._matmul(rows, w13[e])
            if weights.w13_bias is not None:
                both += weights.w13_bias[e].to(self.work)
            gate, up = both.split(problem.intermediate, dim=1)
            result = recipe.act(gate, up)
            if recipe.weight_on == 1:
                result *= weight[:, None].to(self.work)
            if recipe.activation.name == "int8_smooth" and weights.w2_smooth is not None:
                result *= weights.w2_smooth[e].to(self.work)
            h[routes] = result
        return h

    def gemm2(self, h: Quantised, weights: Weights, routed: Routed, recipe: Recipe) -> Tensor:
        """Down GEMM with bias; rows of skipped routes are zero."""
        problem = routed.problem
        values, w2 = h.dequantise(self.work), weights.rows("w2")
        rows = torch.zeros(
            (problem.routes, problem.hidden), dtype=self.work, device=h.codes.device
        )
        for e, routes, _ in expert_routes(routed):
            result = self._matmul(values[routes], w2[e])
            if weights.w2_bias is not None:
                result += weights.w2_bias[e].to(self.work)
            rows[routes] = result
        return rows

    def combine(
        self, rows: Tensor, routed: Routed, recipe: Recipe, out: Tensor, deterministic: bool = True
    ) -> Tensor:
        """Weighted sum over a token's routes, in slot order."""
        problem = routed.problem
        if recipe.weight_on == 2:
            weight = torch.zeros(problem.routes, dtype=torch.float32, device=rows.device)
            routes, position = live_routes(routed)
            weight[routes] = routed.sorted_weights[position]
            rows = rows * weight[:, None].to(self.work)
        total = rows.view(problem.tokens, problem.topk, problem.hidden).sum(dim=1)
        return out.copy_(total)


def local_experts(topk_ids: Tensor, experts: int, expert_map: Tensor | None) -> Tensor:
    """int64 local expert of every route; ``experts`` itself stands for a skipped one."""
    ids = topk_ids.to(torch.int64)
    if expert_map is not None:
        known = (ids >= 0) & (ids < len(expert_map))
        ids = torch.where(known, expert_map.to(torch.int64)[ids.clamp(0, len(expert_map) - 1)], -1)
    return torch.where((ids >= 0) & (ids < experts), ids, experts)


def live_routes(routed: Routed) -> tuple[Tensor, Tensor]:
    """Route ``token * topk + slot`` of every sorted position that holds one, and the position."""
    problem = routed.problem
    ids = routed.sorted_token_ids[: int(routed.num_valid_ids[0])].to(torch.int64)
    token, slot = ids & 0xFFFFFF, ids >> 24
    position = (token < problem.tokens).nonzero()[:, 0]
    return (token * problem.topk + slot)[position], position


def expert_routes(routed: Routed) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(expert, its routes, their weights) of every expert that got any."""
    routes, position = live_routes(routed)
    weight = routed.sorted_weights[position]
    counts = routed.expert_counts.tolist()
    start = 0
    for e, count in enumerate(counts):
        if count:
            yield e, routes[start : start + count], weight[start : start + count]
        start += count


def cpu() -> CPUBackend:
    """float32 accumulation."""
    return CPUBackend("cpu", torch.float32)


def reference() -> CPUBackend:
    """float64 accumulation: the reference of every accuracy check."""
    return CPUBackend("reference", torch.float64)
