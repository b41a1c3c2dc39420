"""mixmoe: mixed-precision Mixture-of-Experts inference.

``moe`` runs a layer; ``Weights`` holds quantised experts; ``Recipe`` says which numbers meet.
"""

from mixmoe.activations import Activation, gelu, silu, situv2, swiglu
from mixmoe.errors import MixMoEError
from mixmoe.formats import FORMATS, Format, Quantised, Rounding
from mixmoe.module import MoE
from mixmoe.moe import combine, gemm1, gemm2, moe, prepare, quantise, route
from mixmoe.spec import Problem, Recipe, Routed, Tile, Weights, check

__all__ = [
    "Activation",
    "FORMATS",
    "Format",
    "MixMoEError",
    "MoE",
    "Problem",
    "Quantised",
    "Recipe",
    "Rounding",
    "Routed",
    "Tile",
    "Weights",
    "check",
    "combine",
    "gelu",
    "gemm1",
    "gemm2",
    "moe",
    "prepare",
    "quantise",
    "route",
    "silu",
    "situv2",
    "swiglu",
]
