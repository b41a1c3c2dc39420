"""Stage 2 and the sum over a token's routes, against float64 on the backend's own h."""

import hopper_cases as cases
import torch

from mixmoe.backends.hopper import hopper

DEVICE, BACKEND = "cuda", hopper()


def runs(case: cases.Case, count: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """float64 stage 2 and sum of the backend's own h, and so many results of `down`."""
    recipe, p = case.recipe, case.problem
    weights = BACKEND.prepare(case.weights, recipe).to(DEVICE)
    ids, topk = case.ids.to(DEVICE), case.topk_weights.to(DEVICE)
    routed = BACKEND.route(ids, topk, p, None, None)
    x = BACKEND.quantise(case.x.to(DEVICE), weights, routed, recipe)
    h = BACKEND.gemm1(x, weights, routed, recipe)
    placed = cases.REFERENCE.route(case.ids, case.topk_weights, p, None, 32)
    rows = cases.REFERENCE.gemm2(cases.to_cpu(h), case.weights, placed, recipe)
    want = torch.empty(p.tokens, p.hidden, dtype=torch.float64)
    cases.REFERENCE.combine(rows, placed, recipe, want)
    results = []
    for _ in range(count):
        out = torch.full((p.tokens, p.hidden), torch.nan, dtype=torch.bfloat16, device=DEVICE)
        BACKEND.down(h, weights, routed, recipe, out)
        results.append(out.cpu())
    return want, results
