"""Our stages one by one, as the Hopper layer runs them.

Inside the layer a stage may hand on what its public form does not: decode leaves h in float32 and
requantises it in the loads of stage 2; prefill keeps h in sorted order and takes as many tokens at
a time as `pass_of` says. Timed alone through the public door, a stage would pay for a form that the
layer never makes. A schedule without such a form is timed through the public door.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .case import Case
from .operands import Operand
from .registry import Run, Shows, Unsupported

BACKEND = "hopper"


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """A case with the records that our library takes; fp8_token activations only."""

    case: Case
    weights: Any
    recipe: Any

    def quantised(self, rows: Operand) -> Any:
        import mixmoe

        return mixmoe.Quantised(rows.codes, rows.scales, self.recipe.activation)

    def routed(self, part: slice = slice(None)) -> Any:
        import mixmoe

        ids, shares = self.case.routing.ids[part], self.case.routing.weights[part]
        return mixmoe.route(ids, shares, self.weights, backend=BACKEND)


def problem_of(case: Case) -> Any:
    """The sizes of the whole call."""
    from mixmoe.spec import Problem

    shape = case.shape
    return Problem(case.tokens, shape.hidden, shape.intermediate, shape.experts, shape.topk)


def stage1(call: Call) -> Run:
    """x quantised and routes sorted, then the gate and up GEMM and the activation."""
    from mixmoe.backends.hopper import prefill_schedule, schedule
    from mixmoe.backends.hopper.stages import schedule_for

    routed = call.routed()
    chosen = schedule_for(call.recipe, call.weights, routed.problem, routed.block)
    if call.recipe.activation.name == "fp8_token":
        if isinstance(chosen, schedule.Decode):
            return _decode_stage1(call, chosen, routed)
        if isinstance(chosen, prefill_schedule.Prefill):
            return _prefill_stage1(call, chosen)
    return public_stage1(call)


def stage2(call: Call) -> Run:
    """h, then the down GEMM, the routing weight and the sum over a token's routes."""
    from mixmoe.backends.hopper import prefill_schedule, schedule
    from mixmoe.backends.hopper.stages import schedule_for

    routed = call.routed()
    chosen = schedule_for(call.recipe, call.weights, routed.problem, routed.block)
    if call.recipe.activation.name == "fp8_token":
        if isinstance(chosen, schedule.Decode):
            return _decode_stage2(call, chosen, routed)
        if isinstance(chosen, prefill_schedule.Prefill):
            return _prefill_stage2(call, chosen)
    return public_stage2(call)


def public_stage1(call: Call) -> Run:
    """mixmoe.gemm1: h requantised, a row per route."""
    import mixmoe

    routed = call.routed()
    x = call.quantised(call.case.x_in(call.recipe.activation.name))
    out: list[Any] = []

    def launch() -> None:
        out[:] = [
            mixmoe.gemm1(x, call.weights, routed, recipe=call.recipe, backend=BACKEND),
        ]

    return Run(launch, lambda routes: rows_of(out[0], routes), Shows.HIDDEN_REQUANTISED)


def public_stage2(call: Call) -> Run:
    """mixmoe.gemm2 and mixmoe.combine."""
    import mixmoe

    routed, y = call.routed(), torch.empty_like(call.case.x)
    h = call.quantised(call.case.h_in(call.recipe.activation.name))

    def launch() -> None:
        rows = mixmoe.gemm2(h, call.weights, routed, recipe=call.recipe, backend=BACKEND)
        mixmoe.combine(rows, routed, recipe=call.recipe, out=y, backend=BACKEND)

    return Run(launch, lambda tokens: y[tokens], Shows.TOKEN)


def _decode_stage1(call: Call, chosen: Any, routed: Any) -> Run:
    from mixmoe.backends.hopper.quantise import slot_rows

    x, out = slot_rows(call.quantised(call.case.x_in("fp8_token"))), list[Tensor]()

    def launch() -> None:
        out[:] = [chosen.stage1(x, call.weights, routed, call.recipe)]

    return Run(launch, lambda routes: out[0][routes], Shows.HIDDEN)


def _decode_stage2(call: Call, chosen: Any, routed: Any) -> Run:
    h, y = call.case.h.float(), torch.empty_like(call.case.x)
    return Run(
        lambda: chosen.finish(h, call.weights, routed, call.recipe, y),
        lambda tokens: y[tokens],
        Shows.TOKEN,
    )


def _passes(call: Call, deterministic: bool = True) -> list[tuple[slice, slice]]:
    """Tokens and routes of the passes that prefill makes."""
    from mixmoe.backends.hopper.prefill_schedule import pass_of

    topk, tokens = call.case.routing.topk, call.case.tokens
    x = call.case.x
    most = pass_of(call.routed().problem, x.device, deterministic)
    starts = range(0, tokens, most)
    ends = [min(start + most, tokens) for start in starts]
    return [(slice(a, b), slice(a * topk, b * topk)) for a, b in zip(starts, ends, strict=True)]


def _part(rows: Operand, part: slice) -> Operand:
    return Operand(rows.codes[part], None if rows.scales is None else rows.scales[part], rows.block)


def _prefill_stage1(call: Call, chosen: Any) -> Run:
    from mixmoe.backends.hopper.prefill_schedule import cut_tiles
    from mixmoe.backends.hopper.quantise import quantise_fp8, slot_rows

    recipe, x, whole = call.recipe, call.case.x_in("fp8_token"), problem_of(call.case)
    passes = []
    for tokens, routes in _passes(call):
        routed = call.routed(tokens)
        work = cut_tiles(routed, recipe, whole)
        passes.append((slot_rows(call.quantised(_part(x, tokens))), routed, work, routes))
    out: list[Tensor] = []

    def launch() -> None:
        out.clear()
        for rows, routed, work, _ in passes:
            h = chosen.stage1(rows, call.weights, routed, recipe, *work)
            quantise_fp8(h, recipe.activation, recipe.rounding)
            out.append(h)

    def rows(routes: Tensor) -> Tensor:
        shape = (len(routes), call.case.shape.intermediate)
        picked = torch.zeros(shape, dtype=torch.float64, device=routes.device)
        for h, (_, routed, _, span) in zip(out, passes, strict=True):
            here = (routes >= span.start) & (routes < span.stop)
            picked[here] = h[routed.position[routes[here] - span.start].long()].double()
        return picked

    return Run(launch, rows, Shows.HIDDEN)


def _prefill_stage2(call: Call, chosen: Any) -> Run:
    from mixmoe.backends.hopper.prefill_schedule import cut_tiles

    recipe, h, y = call.recipe, call.case.h_in("fp8_token"), torch.empty_like(call.case.x)
    passes, whole = [], problem_of(call.case)
    for tokens, routes in _passes(call):
        routed = call.routed(tokens)
        rows = chosen.sorted_rows(call.quantised(_part(h, routes)), routed)
        passes.append((rows, routed, cut_tiles(routed, recipe, whole), y[tokens]))

    def launch() -> None:
        for rows, routed, work, out in passes:
            chosen.stage2(rows, call.weights, routed, recipe, out, work)

    return Run(launch, lambda tokens: y[tokens], Shows.TOKEN)


def atomics_of(call: Call) -> list[tuple[Any, Any]]:
    """How stage 2 adds by atomics, with the routing, in each pass; refuses where it does not."""
    from mixmoe.backends.hopper.prefill_schedule import PREFILL, red_of
    from mixmoe.backends.hopper.stages import schedule_for

    found = []
    for tokens, _ in _passes(call, deterministic=False):
        routed = call.routed(tokens)
        p = routed.problem
        red = red_of(p, call.case.x)
        chosen = schedule_for(call.recipe, call.weights, p, routed.block)
        if chosen is not PREFILL or red is None:
            raise Unsupported("no schedule adds by atomics here")
        found.append((red, routed))
    return found


def stage2_by_atomics(call: Call) -> Run:
    """Stage 2 by atomics, the zeroing of its result included."""
    from mixmoe.backends.hopper.prefill_schedule import PREFILL

    h, y = call.case.h_in("fp8_token"), torch.empty_like(call.case.x)
    passes = []
    spans = _passes(call, deterministic=False)
    for (tokens, routes), (red, routed) in zip(spans, atomics_of(call), strict=True):
        rows = PREFILL.sorted_rows(call.quantised(_part(h, routes)), routed)
        passes.append((rows, routed, red, y[tokens]))

    def launch() -> None:
        for rows, routed, red, out in passes:
            PREFILL.add(rows, call.weights, routed, call.recipe, red, out.zero_())

    return Run(launch, lambda tokens: y[tokens], Shows.TOKEN)


def rows_of(h: Any, routes: Tensor | slice) -> Tensor:
    """Rows of a quantised matrix as float64."""
    if h.scales is None:
        return h.codes[routes]
    codes, scales = h.codes[routes], h.scales[routes]
    columns = codes.shape[-1] * (2 if codes.dtype == torch.uint8 else 1) // scales.shape[-1]
    return Operand(codes, scales, (1, columns)).dense(slice(None), torch.float64)
