"""Sorting the routes by expert: torch operations on the device, none of which waits for it."""

import torch
from torch import Tensor

from mixmoe.backends.cpu import local_experts
from mixmoe.spec import Problem, Routed


def route(
    topk_ids: Tensor,
    topk_weights: Tensor,
    problem: Problem,
    expert_map: Tensor | None,
    block: int,
) -> Routed:
    """Stable sort by expert, every expert padded to ``block`` routes; sizes alone fix shapes."""
    experts, routes, device = problem.experts, problem.routes, topk_ids.device
    expert, order = local_experts(topk_ids, experts, expert_map).flatten().sort(stable=True)
    # Skipped routes count as expert E, which no block belongs to.
    counts = torch.zeros(experts + 1, dtype=torch.int64, device=device)
    counts.index_add_(0, expert, torch.ones_like(expert))
    padded = (counts[:experts] + block - 1) // block * block
    offsets = torch.zeros(experts + 1, dtype=torch.int64, device=device)
    offsets[1:] = padded.cumsum(0)
    rank = torch.arange(routes, device=device) - (counts.cumsum(0) - counts)[expert]
    room = problem.padded_routes(block)
    position = torch.where(expert < experts, offsets[expert] + rank, room)
    sentinel = problem.tokens | problem.topk << 24
    ids = torch.full((room + 1,), sentinel, dtype=torch.int32, device=device)
    weights = torch.zeros(room + 1, dtype=torch.float32, device=device)
    packed = order // problem.topk | order % problem.topk << 24
    ids.scatter_(0, position, packed.to(torch.int32))
    weights.scatter_(0, position, topk_weights.flatten()[order].to(torch.float32))
    starts = torch.arange(room // block, device=device) * block
    owner = torch.searchsorted(offsets[1:], starts, right=True)
    owner = torch.where(owner == experts, -1, owner)
    valid = torch.stack([offsets[-1], torch.full_like(offsets[-1], problem.tokens)])
    owner, valid, offsets = (t.to(torch.int32) for t in (owner, valid, offsets))
    held = counts[:experts].to(torch.int32)
    return Routed(ids[:room], weights[:room], owner, valid, offsets, held, block, problem)


def route_weights(routed: Routed) -> Tensor:
    """float32 ``(T topk)``: the weight of each route, 0 of a skipped one."""
    problem = routed.problem
    ids = routed.sorted_token_ids.to(torch.int64)
    token, slot = ids & 0xFFFFFF, ids >> 24
    route = torch.where(token < problem.tokens, token * problem.topk + slot, problem.routes)
    weights = torch.zeros(problem.routes + 1, dtype=torch.float32, device=ids.device)
    return weights.scatter_(0, route, routed.sorted_weights)[: problem.routes]
