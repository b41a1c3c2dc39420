"""How records and tensors may meet: the one statement of it; what a record may be stands in it.

Everything here reads sizes, dtypes and devices; ids are read only where they lie in host memory
(elsewhere an id outside 0..E-1 is skipped like -1, because looking would stall the device).
Backends add only what their hardware or their packing asks for, in their own ``check``.
"""

import torch
from torch import Tensor

from mixmoe.errors import MixMoEError
from mixmoe.formats import FORMATS, Quantised, int8_smooth
from mixmoe.spec import CELLS, WIDE_FLOATS, Problem, Recipe, Routed, Weights


def check(
    recipe: Recipe,
    weights: Weights,
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    *,
    out: Tensor | None = None,
    expert_map: Tensor | None = None,
) -> Problem:
    """Refuse what breaks a rule of the whole layer; returns the problem's sizes."""
    experts, both, hidden = weights.w13.shape  # once: this is on the way of every decode
    _check_x(x, hidden)
    if topk_ids.dim() != 2 or topk_ids.shape[0] != x.shape[0]:
        raise MixMoEError("topk_ids is (T, topk)", tuple(topk_ids.shape), f"({x.shape[0]}, topk)")
    check_devices(
        "x", x, topk_ids=topk_ids, weights=weights.w13.codes, w2=weights.w2.codes, out=out
    )
    check_weights(recipe, weights)
    problem = Problem(x.shape[0], hidden, both // 2, experts, topk_ids.shape[1])
    if out is not None:
        _check_out(out, problem, recipe)
    check_routing(topk_ids, topk_weights, experts, expert_map)
    return problem


def check_weights(recipe: Recipe, weights: Weights) -> None:
    """Refuse weights of another format family than the recipe's, without its smooth factors, or
    with factors that it would not multiply x by."""
    family = weights.format.family
    if family != recipe.weight.family:
        known = (name for name, (_, w) in CELLS.items() if FORMATS[w].family == family)
        raise MixMoEError(
            f"the recipe {recipe.name} takes {recipe.weight.family} weights",
            weights.format,
            " or ".join(known) or None,
        )
    if recipe.activation == int8_smooth and weights.w13_smooth is None:
        raise MixMoEError(
            f"the recipe {recipe.name} needs w13_smooth on the weights, as "
            "Weights.from_dense(w13_smooth=...) puts there",
            None,
            recipe.unsmoothed.name,
        )
    smoothed = [n for n in ("w13_smooth", "w2_smooth") if getattr(weights, n) is not None]
    if smoothed and recipe.activation != int8_smooth:
        pairs = ((n, FORMATS[w].family) for n, (a, w) in CELLS.items() if a == int8_smooth.name)
        raise MixMoEError(
            f"the recipe {recipe.name} does not multiply by smooth factors",
            " and ".join(smoothed),
            " or ".join(n for n, w in pairs if w == family) or "weights without them",
        )


def check_gemm1(recipe: Recipe, weights: Weights, routed: Routed, x: Tensor | Quantised) -> None:
    """Refuse operands of stage 1 that do not meet: x is (T, H), in the recipe's format if it is
    quantised; then ``int8_smooth`` rows are one per route, smoothed already."""
    _check_stage(recipe, weights, routed)
    p = routed.problem
    if isinstance(x, Tensor):
        _check_x(x, p.hidden, p.tokens)
    else:
        per_route = recipe.activation == int8_smooth
        _check_rows("x", x, recipe, (p.routes if per_route else p.tokens, p.hidden))
    held = x if isinstance(x, Tensor) else x.codes
    check_devices("x", held, weights=weights.w13.codes, routed=routed.sorted_token_ids)


def check_gemm2(recipe: Recipe, weights: Weights, routed: Routed, h: Quantised) -> None:
    """Refuse operands of stage 2 that do not meet: h is (T * topk, I) in the recipe's format."""
    _check_stage(recipe, weights, routed)
    _check_rows("h", h, recipe, (routed.problem.routes, routed.problem.intermediate))
    check_devices("h", h.codes, weights=weights.w2.codes, routed=routed.sorted_token_ids)


def check_combine(recipe: Recipe, routed: Routed, rows: Tensor, out: Tensor | None) -> None:
    """Refuse rows that are not (T * topk, H) floats, and an out that is not the recipe's."""
    shape = (routed.problem.routes, routed.problem.hidden)
    if tuple(rows.shape) != shape or rows.dtype not in (*WIDE_FLOATS, torch.float64):
        raise MixMoEError(
            f"rows is bf16, fp16, f32 or f64 of shape {shape}", f"{rows.dtype} of {_shape(rows)}"
        )
    check_devices("rows", rows, routed=routed.sorted_token_ids, out=out)
    if out is not None:
        _check_out(out, routed.problem, recipe)


def check_routing(
    topk_ids: Tensor, topk_weights: Tensor, experts: int, expert_map: Tensor | None
) -> None:
    """Refuse routes of a wrong form, and, where the host can read them, ids no expert or map entry
    answers to; -1 is skipped."""
    if topk_ids.dim() != 2:
        raise MixMoEError("topk_ids is (T, topk)", _shape(topk_ids))
    if topk_ids.dtype not in (torch.int32, torch.int64):
        raise MixMoEError("topk_ids is int32 or int64", topk_ids.dtype, "torch.int32")
    if topk_weights.shape != topk_ids.shape or topk_weights.dtype not in WIDE_FLOATS:
        raise MixMoEError(
            f"topk_weights is bf16, fp16 or f32 of shape {_shape(topk_ids)}",
            f"{topk_weights.dtype} of {_shape(topk_weights)}",
            f"torch.float32 of {_shape(topk_ids)}",
        )
    if expert_map is not None and (
        expert_map.dim() != 1 or expert_map.dtype not in (torch.int32, torch.int64)
    ):
        raise MixMoEError(
            "expert_map is a 1-D int32 of local ids, -1 where foreign",
            f"{expert_map.dtype} of {_shape(expert_map)}",
        )
    check_devices("topk_ids", topk_ids, topk_weights=topk_weights, expert_map=expert_map)
    if topk_ids.device.type != "cpu" or torch.compiler.is_compiling():
        return
    known, what = experts, "E (no expert_map was given)"
    if expert_map is not None:
        known, what = expert_map.shape[0], "the expert_map's length"
        _check_range(expert_map, experts, f"expert_map must be -1 or point below E = {experts}")
    _check_range(topk_ids, known, f"expert ids must be -1 (skipped) or below {what} = {known}")


def check_devices(name: str, first: Tensor, **others: Tensor | None) -> None:
    """Refuse a tensor that is not where the first is, by name."""
    for other, tensor in others.items():
        if tensor is not None and tensor.device != first.device:
            raise MixMoEError(f"{other} must be on {name}'s device", tensor.device, first.device)


def _check_stage(recipe: Recipe, weights: Weights, routed: Routed) -> None:
    check_weights(recipe, weights)
    p = routed.problem
    made_for, sizes = (p.experts, p.hidden, p.intermediate), (weights.E, weights.H, weights.I)
    if sizes != made_for:
        raise MixMoEError("weights have the (E, H, I) that routed was made for", sizes, made_for)


def _check_x(x: Tensor, hidden: int, tokens: int | None = None) -> None:
    """Refuse an x that is not (T, H) of the layer's H, and of the routing's T where it is given."""
    if x.dim() != 2 or x.dtype not in WIDE_FLOATS:
        raise MixMoEError(
            "x is (T, H) in bf16, fp16 or f32", f"{x.dtype} of {_shape(x)}", "(T, H) bf16"
        )
    if x.shape[1] != hidden:
        raise MixMoEError("x must have the weights' H columns", x.shape[1], hidden)
    if tokens is not None and x.shape[0] != tokens:
        raise MixMoEError("x must have the T rows that routed was made for", x.shape[0], tokens)
    if x.stride(1) != 1 and x.numel():
        raise MixMoEError("x must be contiguous along H", f"strides {x.stride()}", "stride 1")


def _check_rows(name: str, q: Quantised, recipe: Recipe, shape: tuple[int, int]) -> None:
    """Refuse rows that are not of the recipe's activation format and of this shape."""
    fmt = recipe.activation
    if not isinstance(q, Quantised) or q.format != fmt:
        got = q.format if isinstance(q, Quantised) else type(q).__name__
        raise MixMoEError(f"{name} is Quantised in the recipe's format", got, fmt)
    if q.shape != shape:
        raise MixMoEError(f"{name} has the shape that routed was made for", q.shape, shape)
    q.check(name)
    if q.codes.stride(1) != 1 and q.codes.numel():
        rule = f"{name}: codes must be contiguous along K"
        raise MixMoEError(rule, f"strides {q.codes.stride()}", "stride 1")
    if q.scales is not None and not q.scales.is_contiguous():
        raise MixMoEError(f"{name}: scales must be contiguous", f"strides {q.scales.stride()}")


def _check_out(out: Tensor, problem: Problem, recipe: Recipe) -> None:
    shape = (problem.tokens, problem.hidden)
    if tuple(out.shape) != shape or out.dtype != recipe.out_dtype:
        raise MixMoEError(
            f"out is {recipe.out_dtype} of shape {shape}", f"{out.dtype} of {_shape(out)}"
        )
    if out.stride(1) != 1 and out.numel():
        raise MixMoEError("out must be contiguous along H", f"strides {out.stride()}", "stride 1")
    if out.stride(0) < problem.hidden and problem.tokens > 1:
        raise MixMoEError(
            "rows of out must not overlap",
            f"strides {out.stride()}",
            f"strides ({problem.hidden}, 1)",
        )


def _check_range(ids: Tensor, end: int, rule: str) -> None:
    """Refuse ids below -1 or from ``end`` on."""
    if not ids.numel():
        return
    low, high = (int(bound) for bound in ids.aminmax())
    if low < -1 or high >= end:
        raise MixMoEError(rule, *((low, -1) if low < -1 else (high, end - 1)))


def _shape(t: Tensor) -> tuple[int, ...]:
    return tuple(t.shape)
