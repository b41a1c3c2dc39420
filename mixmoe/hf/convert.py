"""``convert``: a model's experts replaced by prepared layers, one by one."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mixmoe.errors import MixMoEError
from mixmoe.hf.experts import NAME, build, call, forget, interfaces, keep, register
from mixmoe.hf.stored import Kind, kind_of, parameters_of, recipe_for, require_kind
from mixmoe.module import MoE
from mixmoe.spec import Recipe


class Experts(nn.Module):
    """Stands where a model's experts stood: ``(hidden_states, top_k_index, top_k_weights)``."""

    def __init__(self, layer: MoE, num_experts: int) -> None:
        super().__init__()
        self.layer, self.num_experts = layer, num_experts

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """See :func:`mixmoe.hf.experts.experts_forward`."""
        return call(self.layer, hidden_states, top_k_index, top_k_weights, self.num_experts)


def experts_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every experts module of a model by name, converted ones left out."""
    for name, module in model.named_modules():
        if kind_of(module) is not None:
            yield name, module


def convert(
    model: nn.Module,
    recipe: Recipe | str | None = None,
    *,
    backend: str | None = None,
    free: bool = True,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Run every experts module of ``model`` through mixmoe; returns the model.

    ``recipe``: a name, a Recipe (its activation function and out_dtype are the module's), or None
    for the one that changes the model least. ``free=True`` replaces the modules one after the
    other, so that beside the model one layer is held twice; the dense parameters are gone then.
    ``free=False`` keeps them: the layers are prepared, the recipe is pinned on each module and
    the model switches to ``experts_implementation="mixmoe"``; ``set_experts_implementation(
    "eager")`` goes back. ``dtype`` of the hidden states, the model's own by default.

    Raises MixMoEError where the model has no experts mixmoe can run.
    """
    found = list(experts_of(model))
    if not found:
        _refuse_without_experts(model)
    dtype = dtype or getattr(model, "dtype", None) or torch.bfloat16
    for _, module in found:  # all of them, before the first is replaced
        require_kind(module)
        recipe_for(module, recipe, dtype)
    if not free:
        return _switch(model, found, recipe, backend, dtype)
    forget(model)
    for name, module in found:
        layer = build(module, dtype, recipe, backend)
        experts = Experts(layer, int(module.num_experts))  # type: ignore[arg-type]
        if kind_of(module) is Kind.SWIZZLED:
            name, replacement = _routed_mlp(model, name, experts)
        else:
            replacement = experts
        model.set_submodule(name, replacement)
    if hasattr(model, "save_pretrained"):
        model.save_pretrained = refuse_saving  # type: ignore[assignment]
    return model


def refuse_saving(*args: Any, **options: Any) -> None:
    """``save_pretrained`` of a converted model: no loader would find experts in what it writes."""
    raise MixMoEError(
        "a converted model is not saved as a checkpoint", "save_pretrained",
        "save it before convert, or convert(free=False)",
    )


def _refuse_without_experts(model: nn.Module) -> None:
    done = next((m for m in model.modules() if isinstance(m, Experts)), None)
    if done is None:
        raise MixMoEError("the model must hold experts", type(model).__name__)
    raise MixMoEError(
        "the model's experts are converted already", done.layer.recipe.name,
        "the model as it was loaded, or convert(free=False) from the first",
    )


def _switch(
    model: Any, found: list, recipe: Recipe | str | None, backend: str | None, dtype: torch.dtype
) -> nn.Module:
    for _, module in found:
        if kind_of(module) in (Kind.SWIZZLED, Kind.BLOCKS):
            raise MixMoEError("MXFP4 experts have no dense form to keep", "free=False", "free=True")
    if any(NAME not in interface._global_mapping for interface in interfaces()):
        register()
    for _, module in found:
        keep(module, dtype, recipe, backend, pinned=True)
    model.set_experts_implementation(NAME)
    return model


def _routed_mlp(model: nn.Module, name: str, experts: Experts) -> tuple[str, nn.Module]:
    """The MLP above swizzled experts hands them Triton's routing: give it its plain class back."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

    parent = name.rpartition(".")[0]
    mlp: Any = GptOssMLP.__new__(GptOssMLP)
    nn.Module.__init__(mlp)
    mlp.router, mlp.experts = model.get_submodule(parent).router, experts
    return parent, mlp


def dense_bytes(module: nn.Module) -> int:
    """Bytes of the parameters a module holds its experts in."""
    return sum(t.nbytes for t in parameters_of(module))
