"""mixmoe: mixed-precision Mixture-of-Experts inference.

``moe`` runs a layer; ``Weights`` holds quantised experts; ``Recipe`` says which numbers meet.
The modules in ``LAZY`` are attributes too, imported when they are first asked for.
"""

from importlib import import_module
from types import ModuleType

from mixmoe.activations import Activation, gelu, silu, situv2, swiglu
from mixmoe.checks import check
from mixmoe.errors import MixMoEError
from mixmoe.formats import FORMATS, Format, Quantised, Rounding
from mixmoe.module import MoE
from mixmoe.moe import combine, gemm1, gemm2, moe, prepare, quantise, route
from mixmoe.spec import Problem, Recipe, Routed, Tile, Weights

__version__ = "0.1.0"  # pyproject.toml reads it here

LAZY = ("accuracy", "checkpoint", "gating", "hf", "shapes", "verify")

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


def __getattr__(name: str) -> ModuleType:
    if name in LAZY:
        try:
            return import_module(f"mixmoe.{name}")
        except ModuleNotFoundError as missing:  # hasattr(mixmoe, name) is then False
            raise AttributeError(f"mixmoe.{name} needs {missing.name}") from missing
    raise AttributeError(f"module 'mixmoe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *LAZY} - {"hf"})  # transformers is an extra, and slow to import
