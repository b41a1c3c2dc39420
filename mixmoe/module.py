"""``MoE``: the layer as an nn.Module that owns its quantised weights as buffers."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mixmoe.errors import MixMoEError
from mixmoe.formats import int8_smooth
from mixmoe.moe import call_key, flatten, prepare
from mixmoe.spec import Recipe, Weights

SLOTS = (
    "w13_codes", "w13_scales", "w13_row_scale", "w2_codes", "w2_scales", "w2_row_scale",
    *Weights.TENSORS,
)


class MoE(nn.Module):
    """Routed experts: ``MoE(weights, recipe)(x, topk_ids, topk_weights) -> y``.

    The weights become buffers (they move with ``.to(device)`` and are saved in the state dict) in
    the order the backend of their device wants; ``backend`` fixes one by name. x: (T, H) or
    (..., H); ids and weights (T, topk). y has x's leading shape, dtype ``recipe.out_dtype``.
    For inference: there is no backward. ``.half()``, ``.to(dtype)`` and their like leave every
    buffer as it is: codes, scales and biases keep the dtypes that their format asks for.
    """

    def __init__(
        self,
        weights: Weights,
        recipe: Recipe | str,
        *,
        backend: str | None = None,
        deterministic: bool = True,
    ) -> None:
        super().__init__()
        self.recipe = Recipe.named(recipe)
        weights = prepare(weights, self.recipe, backend)
        self.backend, self.deterministic = backend, deterministic
        self.key = call_key(weights, self.recipe, backend, deterministic)
        for name, tensor in zip(SLOTS, flatten(weights), strict=True):
            self.register_buffer(name, tensor)

    def forward(
        self,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        expert_map: Tensor | None = None,
    ) -> Tensor:
        """See :func:`mixmoe.moe`."""
        tensors = [getattr(self, name) for name in SLOTS]
        flat = x.reshape(-1, x.shape[-1])
        y = torch.ops.mixmoe.moe(flat, tensors, topk_ids, topk_weights, expert_map, self.key)
        return y.reshape(x.shape)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MoE":
        """What moves buffers moves them; what would cast them does not."""

        def moved(tensor: Tensor) -> Tensor:
            to = fn(tensor.new_empty(0))
            return fn(tensor) if to.dtype == tensor.dtype else tensor.to(to.device)

        return super()._apply(moved, recurse)

    def extra_repr(self) -> str:
        """Recipe and sizes, for print(model)."""
        return f"recipe={self.recipe.name}, act={self.recipe.act.kind.value}"


def require_unsmoothed(recipe: Recipe) -> Recipe:
    """The recipe, refusing one whose smooth factors no model as others store it holds."""
    if recipe.activation == int8_smooth:
        raise MixMoEError(
            "a model holds no smooth factors (Weights.from_dense(w13_smooth=...) takes them)",
            recipe.name, recipe.unsmoothed.name,
        )
    return recipe
