"""The experts function transformers calls, and the weights it keeps on the module."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface

from mixmoe.hf.mxfp4 import take_over_mxfp4
from mixmoe.hf.stored import parameters_of, recipe_for, weights_of
from mixmoe.module import MoE, require_unsmoothed
from mixmoe.spec import CELLS, Recipe

NAME = "mixmoe"
KEPT = "mixmoe_kept"
FP8_MODULES = ("finegrained_fp8", "finegrained.core", "finegrained")


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """A module's prepared layer and what it was made from."""

    layer: MoE
    stamp: tuple
    pinned: bool = False


def interfaces() -> Iterator[type[ExpertsInterface]]:
    """transformers' expert registries: the dense one and, where there is one, that of fp8."""
    yield ExpertsInterface
    for name in FP8_MODULES:
        try:
            module = import_module(f"transformers.integrations.{name}")
        except ModuleNotFoundError:
            continue
        found = getattr(module, "FP8ExpertsInterface", None)
        if found is not None:
            yield found
            return


def register(recipe: Recipe | str | None = None, *, backend: str | None = None) -> None:
    """Make ``experts_implementation="mixmoe"`` known to transformers, and ``"mixmoe-<recipe>"``.

    ``recipe`` is what the plain name means (None: the least change, see
    :func:`mixmoe.hf.default_recipe`); ``backend`` fixes one by name for all of them. Names go to
    ``from_pretrained``, ``from_config`` and ``model.set_experts_implementation``. MXFP4
    checkpoints of gpt-oss load unpacked from then on where the model asks for one of these names.
    Calling it again replaces the choice.
    """
    if recipe is not None:  # refuse it now, not at the first forward
        require_unsmoothed(Recipe.named(recipe))
    names = {f"{NAME}-{cell}": cell for cell in CELLS if "smooth" not in cell}
    for name, chosen in ({NAME: recipe} | names).items():
        run = partial(experts_forward, recipe=chosen, backend=backend)
        for interface in interfaces():
            interface.register(name, run)
    take_over_mxfp4()


def experts_forward(
    module: nn.Module,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    recipe: Recipe | str | None = None,
    backend: str | None = None,
) -> Tensor:
    """hidden_states (T, H), top_k_index and top_k_weights (T, topk) -> (T, H) in x's dtype.

    An id of ``num_experts`` or more (expert parallelism: another rank's) is skipped.
    """
    layer = layer_of(module, hidden_states.dtype, recipe, backend)
    return call(layer, hidden_states, top_k_index, top_k_weights, int(module.num_experts))  # type: ignore[arg-type]


def call(layer: MoE, x: Tensor, ids: Tensor, weights: Tensor, experts: int) -> Tensor:
    """Run a prepared layer on what transformers hands over."""
    y = layer(x, ids.masked_fill(ids >= experts, -1), weights)
    return y.to(x.dtype)


def layer_of(
    module: nn.Module,
    dtype: torch.dtype,
    recipe: Recipe | str | None = None,
    backend: str | None = None,
) -> MoE:
    """The module's prepared layer: made at the first call, again when its parameters change.

    A change is seen by address, device and version counter of each parameter, which
    ``load_state_dict``, optimisers and ``.to()`` move; a write through ``.data`` moves none of
    them: call :func:`forget` after one.
    """
    kept: Kept | None = module.__dict__.get(KEPT)
    if torch.compiler.is_compiling():  # stamps cannot be traced: what is prepared is taken as it is
        return prepare_outside(module, dtype, recipe, backend) if kept is None else kept.layer
    asked = (dtype,) if kept is not None and kept.pinned else (dtype, recipe, backend)
    stamp = (*asked, *map(_stamp, parameters_of(module)))
    if kept is not None and kept.stamp == stamp:
        return kept.layer
    if kept is not None and kept.pinned:
        recipe, backend = kept.layer.recipe, kept.layer.backend
    return keep(module, dtype, recipe, backend, pinned=kept is not None and kept.pinned)


@torch.compiler.disable(
    reason="mixmoe's experts are not prepared: convert(model) or call it once before torch.compile"
)
def prepare_outside(
    module: nn.Module, dtype: torch.dtype, recipe: Recipe | str | None, backend: str | None
) -> MoE:
    """Quantising is no part of a graph: a graph break, or with ``fullgraph=True`` an error."""
    return keep(module, dtype, recipe, backend)


def keep(
    module: nn.Module,
    dtype: torch.dtype,
    recipe: Recipe | str | None,
    backend: str | None,
    pinned: bool = False,
) -> MoE:
    """Make the layer now; ``pinned`` holds its recipe against the implementation's name."""
    asked = (dtype,) if pinned else (dtype, recipe, backend)
    stamp = (*asked, *map(_stamp, parameters_of(module)))
    layer = build(module, dtype, recipe, backend)
    module.__dict__[KEPT] = Kept(layer, stamp, pinned)  # no submodule: state dicts stay the same
    return layer


def build(
    module: nn.Module, dtype: torch.dtype, recipe: Recipe | str | None, backend: str | None
) -> MoE:
    """Quantise or take over the module's experts for a recipe."""
    chosen = recipe_for(module, recipe, dtype)
    weights = weights_of(module, chosen.weight)
    return MoE(weights, chosen, backend=backend)


def forget(model: nn.Module) -> None:
    """Drop every prepared layer below ``model``, pinned recipes included."""
    for module in model.modules():
        module.__dict__.pop(KEPT, None)


def _stamp(t: Tensor) -> tuple[Any, ...]:
    version = 0 if t.is_inference() else t._version
    return t.data_ptr(), version, t.device, t.dtype, tuple(t.shape)
