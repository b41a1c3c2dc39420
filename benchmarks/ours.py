"""mixmoe itself, through its public door, in every recipe that Hopper has.

Stage 1 is gemm1 with activation and requantisation; stage 2 is gemm2 with the routing weight and
the top-k reduction; the layer is everything from topk_ids and bf16 x to bf16 y, routing included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .case import Case
from .counts import RECIPES, Stage
from .operands import Operand
from .registry import OURS, Run, Shows, provider

RECIPE_NAMES = ("a8w4", "a8w4_mx", "a4w4", "a16w4", "a8w8", "a16w16")
NEEDS = ("mixmoe.moe",)
BACKEND = "hopper"


def _library() -> Any:
    import mixmoe

    return mixmoe


def _quantised(operand: Operand, name: str) -> Any:
    from mixmoe.formats import format_named

    return _library().Quantised(operand.codes, operand.scales, format_named(name))


def _recipe(case: Case, name: str, accumulate: str) -> Any:
    return _library().Recipe.named(name, act=case.shape.activation, accumulate=accumulate)


def _weights(case: Case, name: str, recipe: Any) -> Any:
    """The weights in the backend's order, packed once per shape and weight format."""

    def pack() -> Any:
        w13, w2 = (_quantised(w, RECIPES[name].weight) for w in case.model.weights(weight))
        return _library().prepare(_library().Weights(w13, w2), recipe, BACKEND)

    weight = RECIPES[name].weight
    return case.model.memo.once((OURS, name), pack)


def _routed(case: Case, weights: Any) -> Any:
    routing = case.routing
    return case.memo.once(
        (OURS, "routed"),
        lambda: _library().route(routing.ids, routing.weights, weights, backend=BACKEND),
    )


def _stage1(name: str, accumulate: str) -> Callable[[Case], Run]:
    def build(case: Case) -> Run:
        recipe = _recipe(case, name, accumulate)
        weights = _weights(case, name, recipe)
        routed, x = (
            _routed(case, weights),
            _quantised(case.x_in(recipe.activation.name), recipe.activation.name),
        )
        out: list[Any] = []

        def call() -> None:
            out[:] = [_library().gemm1(x, weights, routed, recipe=recipe, backend=BACKEND)]

        def rows(routes: torch.Tensor) -> torch.Tensor:
            h = out[0]
            scales = None if h.scales is None else h.scales[routes]
            columns = 1 if h.scales is None else case.shape.intermediate // h.scales.shape[-1]
            part = Operand(h.codes[routes], scales, (1, columns))
            return part.dense(slice(None), torch.float64)

        return Run(call, rows, Shows.HIDDEN_REQUANTISED)

    return build


def _stage2(name: str, deterministic: bool, accumulate: str) -> Callable[[Case], Run]:
    def build(case: Case) -> Run:
        library, recipe = _library(), _recipe(case, name, accumulate)
        weights = _weights(case, name, recipe)
        routed, h = (
            _routed(case, weights),
            _quantised(case.h_in(recipe.activation.name), recipe.activation.name),
        )
        y = torch.empty_like(case.x)

        def call() -> None:
            rows = library.gemm2(h, weights, routed, recipe=recipe, backend=BACKEND)
            library.combine(
                rows, routed, recipe=recipe, out=y, deterministic=deterministic, backend=BACKEND
            )

        return Run(call, lambda tokens: y[tokens], Shows.TOKEN)

    return build


def _layer(name: str, deterministic: bool, accumulate: str) -> Callable[[Case], Run]:
    def build(case: Case) -> Run:
        library, recipe = _library(), _recipe(case, name, accumulate)
        weights, routing = _weights(case, name, recipe), case.routing
        y = torch.empty_like(case.x)

        def call() -> None:
            library.moe(
                case.x,
                weights,
                routing.ids,
                routing.weights,
                recipe=recipe,
                out=y,
                deterministic=deterministic,
                backend=BACKEND,
            )

        return Run(call, lambda tokens: y[tokens], Shows.TOKEN)

    return build


def _register() -> None:
    for name in RECIPE_NAMES:
        for accumulate in ("precise", "fast"):
            provider(OURS, Stage.STAGE1, recipe=name, needs=NEEDS, accumulate=accumulate)(
                _stage1(name, accumulate)
            )
        for deterministic, accumulate in ((True, "precise"), (True, "fast"), (False, "fast")):
            for stage, make in ((Stage.STAGE2, _stage2), (Stage.LAYER, _layer)):
                provider(
                    OURS,
                    stage,
                    recipe=name,
                    needs=NEEDS,
                    deterministic=deterministic,
                    accumulate=accumulate,
                )(make(name, deterministic, accumulate))


_register()
