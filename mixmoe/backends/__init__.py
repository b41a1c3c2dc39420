"""The protocol of a backend: five stages with the same names everywhere; registry and choice.

A backend is a class with these methods; ``moe.py`` calls them in this order and does nothing else.
Intermediate results (the quantised x, h, the stage-2 rows) are the backend's own as long as its
stages understand each other; ``route``, ``gemm1`` and ``gemm2`` state what is public about them.
"""

from functools import cache
from importlib import import_module
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from mixmoe.errors import MixMoEError
from mixmoe.formats import Quantised
from mixmoe.spec import Problem, Recipe, Routed, Weights


class Backend(Protocol):
    """Five stages, plus what a caller must know before it calls them."""

    name: str

    def unavailable(self) -> str | None:
        """Why it cannot run here, in one line; None where it can."""

    def prepare(self, weights: Weights, recipe: Recipe) -> Weights:
        """The weights in the memory order this backend's kernels want for this recipe."""

    def check(self, recipe: Recipe, weights: Weights, problem: Problem) -> None:
        """Refuse (MixMoEError) what this backend cannot do, before anything is launched."""

    def route(
        self,
        topk_ids: Tensor,
        topk_weights: Tensor,
        problem: Problem,
        expert_map: Tensor | None,
        block: int | None,
    ) -> Routed:
        """Sort the routes by expert into blocks."""

    def quantise(self, x: Tensor, weights: Weights, routed: Routed, recipe: Recipe) -> Quantised:
        """x in the recipe's activation format, one row per token (per route where smoothed)."""

    def gemm1(self, x: Quantised, weights: Weights, routed: Routed, recipe: Recipe) -> Quantised:
        """``h = act(x Wg^T + bg, x Wu^T + bu)``, requantised; a row per route."""

    def gemm2(self, h: Quantised, weights: Weights, routed: Routed, recipe: Recipe) -> Tensor:
        """``h Wd^T + bd``; a row per route."""

    def combine(
        self, rows: Tensor, routed: Routed, recipe: Recipe, out: Tensor, deterministic: bool
    ) -> Tensor:
        """``out[t] = sum_k weight[t, k] * rows[t, k]``; writes every element of out."""


@runtime_checkable
class FusedBackend(Protocol):
    """A backend that can also run the whole layer with stages fused into each other."""

    def layer(
        self,
        x: Tensor,
        weights: Weights,
        topk_ids: Tensor,
        topk_weights: Tensor,
        recipe: Recipe,
        *,
        out: Tensor,
        expert_map: Tensor | None,
        deterministic: bool,
    ) -> Tensor:
        """route, quantise, gemm1, gemm2, combine: what the five stages compute, in out."""


# Name -> "module:attribute" of an instance maker; imported only when asked for.
REGISTRY: dict[str, str] = {
    "cpu": "mixmoe.backends.cpu:cpu",
    "reference": "mixmoe.backends.cpu:reference",
    "hopper": "mixmoe.backends.hopper:hopper",
    "cdna": "mixmoe.backends.cdna:cdna",
}
# A ROCm build of torch calls its devices cuda too.
DEFAULT_FOR_DEVICE = {"cpu": "cpu", "cuda": "cdna" if torch.version.hip else "hopper"}


@cache
def load(name: str) -> Backend:
    """The backend of that name, whether or not it can run here."""
    if name not in REGISTRY:
        raise MixMoEError("unknown backend", name, ", ".join(REGISTRY))
    module, attribute = REGISTRY[name].split(":")
    return getattr(import_module(module), attribute)()


def pick(device: torch.device | str, name: str | None = None) -> Backend:
    """The backend asked for, or the device's own; refuses one that cannot run here, saying why."""
    kind = torch.device(device).type
    chosen = name or DEFAULT_FOR_DEVICE.get(kind)
    if chosen is None:
        raise MixMoEError("no backend for this device", kind, ", ".join(DEFAULT_FOR_DEVICE))
    backend = load(chosen)
    reason = backend.unavailable()
    if reason is not None:
        raise MixMoEError(f"backend {chosen} cannot run here: {reason}", chosen, "backend='cpu'")
    return backend
