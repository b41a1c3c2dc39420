"""Small layers for tests on the CPU."""

import torch

from mixmoe import Recipe, Weights
from mixmoe.spec import CELLS

H, I, E, TOPK = 96, 64, 5, 3


def make(recipe="a16w16", bias=False, seed=0, tokens=11, **changes):
    torch.manual_seed(seed)
    fmt = CELLS[recipe][1]
    smooth = {}
    if "smooth" in recipe:
        smooth = {"w13_smooth": torch.rand(E, H) + 0.5, "w2_smooth": torch.rand(E, I) + 0.5}
    extra = {"w13_bias": torch.randn(E, 2 * I), "w2_bias": torch.randn(E, H)} if bias else {}
    w13, w2 = torch.randn(E, 2 * I, H) * 0.2, torch.randn(E, H, I) * 0.2
    weights = Weights.from_dense(w13, w2, fmt, **extra, **smooth)
    x = torch.randn(tokens, H)
    ids = torch.rand(tokens, E).argsort(1)[:, :TOPK]
    recipe = Recipe.named(recipe, out_dtype=torch.float32, **changes)
    return x, weights, ids, torch.rand(tokens, TOPK), recipe
