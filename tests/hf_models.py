"""Small transformers models and their experts, for the tests of `mixmoe.hf`."""

import torch

from mixmoe import accuracy, hf
from mixmoe.hf import stored
from mixmoe.hf.models import small_model

HIDDEN, LAYERS = 128, 2
IDS = torch.randint(2, 512, (2, 10), generator=torch.Generator().manual_seed(1))


def small(name, dtype=torch.float32, implementation="eager", **options):
    options = {"hidden": HIDDEN, "layers": LAYERS} | options
    return small_model(name, dtype=dtype, experts_implementation=implementation, **options)


def first_experts(model):
    return next(module for _, module in hf.experts_of(model))


def experts_input(module, tokens=9, seed=3):
    g = torch.Generator().manual_seed(seed)
    weight = next(stored.parameters_of(module))
    dtype = weight.dtype if weight.dtype in (torch.bfloat16, torch.float16) else torch.float32
    x = torch.randn(tokens, HIDDEN, generator=g).to(dtype)
    ids = torch.rand(tokens, int(module.num_experts), generator=g).argsort(1)[:, :3]
    return x, ids, torch.rand(tokens, 3, generator=g).to(dtype)


def worst(y, ref):
    return accuracy.worst(accuracy.row_errors(y.flatten(0, -2), ref.flatten(0, -2)))


def eager_and(module, implementation, *args):
    """The module's own output and mixmoe's on the same input."""
    module.config._experts_implementation = "eager"
    ref = module(*args)
    module.config._experts_implementation = implementation
    return ref, module(*args)
