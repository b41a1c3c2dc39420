"""mixmoe itself, through its public door, in every recipe that Hopper has.

Stage 1 is the gate and up GEMM with the activation, stage 2 the down GEMM with the routing weight
and the top-k reduction; h is requantised in one or the other, as the layer does it. The layer is
everything from topk_ids and bf16 x to bf16 y, routing included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
        routed = _routed(case, weights)
        x = _quantised(case.x_in(recipe.activation.name), recipe.activation.name)
        stage, shows = _open_stage1(recipe, weights, routed)
        out: list[Any] = []

        def call() -> None:
            out[:] = [stage(x)]

        return Run(call, lambda routes: _hidden_rows(out[0], routes), shows)

    return build


def _open_stage1(recipe: Any, weights: Any, routed: Any) -> tuple[Callable[[Any], Any], Shows]:
    """Stage 1 as the layer runs it: a schedule that requantises h in or before stage 2 has
    `stage1`, which gives floats; every other one is the public gemm1."""
    from mixmoe.backends.hopper.prefill_schedule import PREFILL, cut_tiles
    from mixmoe.backends.hopper.stages import placed, schedule_for

    schedule, where = schedule_for(recipe, weights, routed.problem, routed.block), placed(routed)
    if recipe.activation.name == "fp8_token" and schedule is PREFILL:
        work = cut_tiles(where, recipe)  # made beside the routing
        return (
            lambda x: Sorted(PREFILL.stage1(x, weights, where, recipe, *work), where.position),
            Shows.HIDDEN,
        )
    if recipe.activation.name == "fp8_token" and hasattr(schedule, "stage1"):
        return lambda x: schedule.stage1(x, weights, where, recipe), Shows.HIDDEN
    gemm1 = _library().gemm1
    return (
        lambda x: gemm1(x, weights, routed, recipe=recipe, backend=BACKEND),
        Shows.HIDDEN_REQUANTISED,
    )


@dataclass(frozen=True)
class Sorted:
    """Rows in sorted order, and the place of each route in it."""

    rows: torch.Tensor
    position: torch.Tensor


def _hidden_rows(h: Any, routes: torch.Tensor) -> torch.Tensor:
    """Rows of h, a tensor or codes with scales, as float64."""
    if isinstance(h, Sorted):
        return h.rows[h.position[routes].long()]
    if isinstance(h, torch.Tensor):
        return h[routes]
    if h.scales is None:
        return h.codes[routes]
    codes, scales = h.codes[routes], h.scales[routes]
    columns = codes.shape[-1] * (2 if codes.dtype == torch.uint8 else 1) // scales.shape[-1]
    return Operand(codes, scales, (1, columns)).dense(slice(None), torch.float64)


def _stage2(name: str, deterministic: bool, accumulate: str) -> Callable[[Case], Run]:
    def build(case: Case) -> Run:
        recipe = _recipe(case, name, accumulate)
        weights = _weights(case, name, recipe)
        routed = _routed(case, weights)
        stage = _open_stage2(case, recipe, weights, routed, deterministic)
        y = torch.empty_like(case.x)
        return Run(lambda: stage(y), lambda tokens: y[tokens], Shows.TOKEN)

    return build


def _open_stage2(
    case: Case, recipe: Any, weights: Any, routed: Any, deterministic: bool
) -> Callable[[torch.Tensor], object]:
    """Stage 2 as the layer runs it: from float32 h where the schedule requantises in its loads,
    else from quantised h; gemm2 and combine in one where the backend has that."""
    from mixmoe.backends.hopper.prefill_schedule import PREFILL, cut_tiles
    from mixmoe.backends.hopper.stages import placed, schedule_for

    schedule = schedule_for(recipe, weights, routed.problem, routed.block)
    fmt = recipe.activation.name
    if fmt == "fp8_token" and schedule is PREFILL:
        where = placed(routed)
        work = cut_tiles(where, recipe)
        rows = PREFILL.sorted_rows(_quantised(case.h_in(fmt), fmt), where)
        return lambda y: PREFILL.stage2(rows, weights, where, recipe, y, work)
    if fmt == "fp8_token" and hasattr(schedule, "finish"):
        h32, where = case.h.float(), placed(routed)
        return lambda y: schedule.finish(h32, weights, where, recipe, y)
    h, backend = _quantised(case.h_in(fmt), fmt), _library().backends.pick(case.x.device, BACKEND)
    if deterministic:
        return lambda y: backend.down(h, weights, routed, recipe, y)

    def two_steps(y: torch.Tensor) -> None:
        rows = backend.gemm2(h, weights, routed, recipe)
        backend.combine(rows, routed, recipe, y, False)

    return two_steps


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
