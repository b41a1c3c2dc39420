"""transformers models through mixmoe: ``register()``, then ``experts_implementation="mixmoe"``.

``register`` adds the names ``mixmoe`` (16-bit numbers, or those of a quantised checkpoint) and
``mixmoe-<recipe>`` to transformers' expert registries, fp8 included, and lets gpt-oss's MXFP4
checkpoints load without being unpacked. ``convert`` replaces the experts of a loaded model and
releases their dense parameters. docs/transformers.md shows both.
"""

from mixmoe.hf.convert import Experts, convert, experts_of
from mixmoe.hf.experts import register
from mixmoe.hf.stored import activation_of, default_recipe, recipe_for, weights_of

__all__ = [
    "Experts",
    "activation_of",
    "convert",
    "default_recipe",
    "experts_of",
    "recipe_for",
    "register",
    "weights_of",
]
