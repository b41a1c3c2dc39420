"""mixmoe itself, in every recipe that Hopper has.

Stage 1 is the gate and up GEMM with the activation, stage 2 the down GEMM with the routing weight
and the top-k reduction; h is requantised in one or the other, as the layer does it (opened.py).
The layer is the public door: from topk_ids and bf16 x to bf16 y, routing included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import opened
from .case import Case
from .counts import RECIPES, Stage
from .opened import BACKEND, Call
from .registry import OURS, Run, Shows, Unsupported, provider

RECIPE_NAMES = ("a8w4", "a8w4_mx", "a4w4", "a16w4", "a8w8", "a16w16")
NEEDS = ("mixmoe.backends.hopper.stages",)
FAST_FROM = 512  # tokens; below it adding precisely is free and there is one way
WAYS = ("auto", "precise", "fast")  # of `Recipe.accumulate`


def ways_of(case: Case, recipe: Any) -> tuple[str, ...]:
    """The ways of adding that differ: "auto", and what it is not."""
    from mixmoe.backends.hopper import prefill_cut, prefill_schedule, schedule

    problem = opened.problem_of(case)
    if case.tokens < FAST_FROM:
        return ("auto",)
    if not schedule.is_fp8_like(recipe.activation) or recipe.weight.name != "mxfp4":
        return "auto", "fast"
    if not prefill_schedule.suits(problem):
        return ("auto",)
    return "auto", "fast" if prefill_cut.is_precise("auto", problem) else "precise"


def _call(case: Case, name: str, accumulate: str) -> Call:
    """The case in our records, its weights packed once per shape and recipe."""
    import mixmoe
    from mixmoe.formats import format_named

    numbers = RECIPES[name]
    recipe = mixmoe.Recipe.named(name, act=case.shape.activation, accumulate=accumulate)
    if accumulate not in ways_of(case, recipe):
        raise Unsupported(f"{accumulate!r} is what 'auto' does here")
    fmt = format_named(numbers.weight)

    def pack() -> Any:
        w13, w2 = (
            mixmoe.Quantised(w.codes, w.scales, fmt) for w in case.model.weights(numbers.weight)
        )
        return mixmoe.prepare(mixmoe.Weights(w13, w2), recipe, BACKEND)

    return Call(case, case.model.memo.once((OURS, name), pack), recipe)


def _layer(call: Call, deterministic: bool = True) -> Run:
    import mixmoe

    case, y = call.case, torch.empty_like(call.case.x)
    ids, shares = case.routing.ids, case.routing.weights

    def launch() -> None:
        mixmoe.moe(
            case.x, call.weights, ids, shares, recipe=call.recipe, out=y, backend=BACKEND,
            deterministic=deterministic,
        )  # fmt: skip

    return Run(launch, lambda tokens: y[tokens], Shows.TOKEN)


def _by_atomics(call: Call) -> Run:
    opened.atomics_of(call)
    return _layer(call, deterministic=False)


STAGES: dict[Stage, Callable[[Call], Run]] = {
    Stage.STAGE1: opened.stage1,
    Stage.STAGE2: opened.stage2,
    Stage.LAYER: _layer,
}


def _build(stage: Stage, name: str, accumulate: str) -> Callable[[Case], Run]:
    def build(case: Case) -> Run:
        return STAGES[stage](_call(case, name, accumulate))

    return build


for name in RECIPE_NAMES:
    for accumulate in WAYS:
        for stage in STAGES:
            provider(OURS, stage, recipe=name, needs=NEEDS, accumulate=accumulate)(
                _build(stage, name, accumulate)
            )

ATOMICS = {Stage.STAGE2: opened.stage2_by_atomics, Stage.LAYER: _by_atomics}
for accumulate in WAYS:
    for stage, run in ATOMICS.items():
        provider(
            OURS, stage, recipe="a8w4", needs=NEEDS, accumulate=accumulate, deterministic=False
        )(lambda case, run=run, how=accumulate: run(_call(case, "a8w4", how)))
