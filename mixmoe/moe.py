"""The layer: route -> quantise -> gemm1 (+ activation, requantisation) -> gemm2 -> combine.

``moe`` is the public door. It is a torch.library operator, so that ``torch.compile`` and
``torch.export`` see one opaque node; the stages are here for those who want them one by one.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from mixmoe import backends
from mixmoe.checks import (
    check,
    check_combine,
    check_devices,
    check_gemm1,
    check_gemm2,
    check_routing,
    check_weights,
)
from mixmoe.errors import MixMoEError
from mixmoe.formats import Format, Quantised, Rounding, format_named
from mixmoe.preshuffle import Packed, order_named
from mixmoe.spec import Problem, Recipe, Routed, Weights


def run(
    backend: backends.Backend,
    x: Tensor,
    weights: Weights,
    topk_ids: Tensor,
    topk_weights: Tensor,
    recipe: Recipe,
    *,
    out: Tensor,
    expert_map: Tensor | None = None,
    deterministic: bool = True,
) -> Tensor:
    """The pipeline, on operands that ``check`` has passed.

    A backend that fuses across a stage boundary offers the whole as ``layer``: the same numbers,
    fewer launches.
    """
    if isinstance(backend, backends.FusedBackend):
        return backend.layer(
            x, weights, topk_ids, topk_weights, recipe,
            out=out, expert_map=expert_map, deterministic=deterministic,
        )
    problem = Problem(x.shape[0], weights.H, weights.I, weights.E, topk_ids.shape[1])
    routed = backend.route(topk_ids, topk_weights, problem, expert_map, None)
    xq = backend.quantise(x, weights, routed, recipe)
    h = backend.gemm1(xq, weights, routed, recipe)
    rows = backend.gemm2(h, weights, routed, recipe)
    return backend.combine(rows, routed, recipe, out, deterministic)


def moe(
    x: Tensor,
    weights: Weights,
    topk_ids: Tensor,
    topk_weights: Tensor,
    *,
    recipe: Recipe | str,
    out: Tensor | None = None,
    deterministic: bool = True,
    backend: str | None = None,
    expert_map: Tensor | None = None,
) -> Tensor:
    """Run one MoE layer: ``y[t] = sum_k w[t,k] * (act(x Wg^T + bg, x Wu^T + bu) Wd^T + bd)``.

    x: (T, H) bf16, fp16 or f32; topk_ids: (T, topk) int32 or int64, -1 skips a route;
    topk_weights: (T, topk) bf16, fp16 or f32; weights: see :class:`Weights`; expert_map:
    (global experts,) int32 of local ids, -1 where another rank holds the expert. Returns y: (T, H)
    in ``recipe.out_dtype``, written to ``out`` where given (it need not be zeroed).
    ``deterministic=False`` lets a backend add with atomics (hopper's prefill does, within the same
    bounds, in an order that changes from run to run). On hopper its kernel for bf16 results waits
    for nobody; deterministic prefill of I at most 384 needs room on every SM at once, and CUDA
    refuses it in a stream that has only some of them (docs/hopper.md, "Grids that start as a
    whole"). ``backend`` is a name of ``mixmoe.backends.REGISTRY``; None is the device's own.

    Raises MixMoEError for anything that breaks a rule, before any launch.
    """
    key = call_key(weights, recipe, backend, deterministic)
    tensors = flatten(weights)
    if out is None:
        return torch.ops.mixmoe.moe(x, tensors, topk_ids, topk_weights, expert_map, key)
    torch.ops.mixmoe.moe_out(x, tensors, topk_ids, topk_weights, expert_map, key, out)
    return out


def route(
    topk_ids: Tensor,
    topk_weights: Tensor,
    weights: Weights,
    *,
    block: int | None = None,
    expert_map: Tensor | None = None,
    backend: str | None = None,
) -> Routed:
    """Sort the T*topk routes by expert into blocks of ``block`` (the backend's own if None)."""
    if block is not None and (not isinstance(block, int) or block < 1):
        raise MixMoEError("a sort block is a whole number of routes, at least one", block, 1)
    check_routing(topk_ids, topk_weights, weights.E, expert_map)
    problem = Problem(topk_ids.shape[0], weights.H, weights.I, weights.E, topk_ids.shape[1])
    chosen = backends.pick(topk_ids.device, backend)
    return chosen.route(topk_ids, topk_weights, problem, expert_map, block)


def quantise(x: Tensor, format: Format | str, rounding: Rounding | str = "CEIL") -> Quantised:
    """Quantise ``x: (..., R, K)``; the result holds ``codes``, ``scales`` and ``dequantise()``."""
    return format_named(format).quantise(x, Rounding.named(rounding))


def gemm1(
    x: Tensor | Quantised,
    weights: Weights,
    routed: Routed,
    *,
    recipe: Recipe | str,
    backend: str | None = None,
) -> Quantised:
    """Stage 1: ``h = act(x Wg^T + bg, x Wu^T + bu)`` requantised, a row per route (T*topk, I).

    ``x`` is (T, H) in bf16, fp16 or f32, or what :func:`quantise` made of it in the recipe's
    format (for ``int8_smooth`` a row per route, after the factors of its expert).
    """
    recipe = Recipe.named(recipe)
    check_gemm1(recipe, weights, routed, x)
    chosen = _backend_for(weights, routed, recipe, backend)
    if isinstance(x, Tensor):
        x = chosen.quantise(x, weights, routed, recipe)
    return chosen.gemm1(x, weights, routed, recipe)


def gemm2(
    h: Quantised,
    weights: Weights,
    routed: Routed,
    *,
    recipe: Recipe | str,
    backend: str | None = None,
) -> Tensor:
    """Stage 2: ``h Wd^T + bd``, a row per route (T*topk, H); the routing weight comes after.

    ``h`` is (T*topk, I) in the recipe's format.
    """
    recipe = Recipe.named(recipe)
    check_gemm2(recipe, weights, routed, h)
    chosen = _backend_for(weights, routed, recipe, backend)
    return chosen.gemm2(h, weights, routed, recipe)


def combine(
    rows: Tensor,
    routed: Routed,
    *,
    recipe: Recipe | str,
    out: Tensor | None = None,
    deterministic: bool = True,
    backend: str | None = None,
) -> Tensor:
    """``y[t] = sum_k weight[t,k] * rows[t*topk + k]``: (T, H) in the recipe's out_dtype."""
    recipe = Recipe.named(recipe)
    check_combine(recipe, routed, rows, out)
    if out is None:
        shape = (routed.problem.tokens, routed.problem.hidden)
        out = rows.new_empty(shape, dtype=recipe.out_dtype)
    chosen = backends.pick(rows.device, backend)
    return chosen.combine(rows.contiguous(), routed, recipe, out, deterministic)


def prepare(weights: Weights, recipe: Recipe | str, backend: str | None = None) -> Weights:
    """The weights in the order the backend's kernels want: do it once, after loading."""
    recipe = Recipe.named(recipe)
    check_weights(recipe, weights)
    return backends.pick(weights.device, backend).prepare(weights, recipe)


def _backend_for(
    weights: Weights, routed: Routed, recipe: Recipe, name: str | None
) -> backends.Backend:
    chosen = backends.pick(weights.device, name)
    chosen.check(recipe, weights, routed.problem)
    return chosen


# The operator: a record travels as its tensors plus one string that says what they are.


def call_key(
    weights: Weights, recipe: Recipe | str, backend: str | None, deterministic: bool
) -> str:
    """Everything about a call that is not a tensor, as one line that compilers can trace; the
    recipe's name goes through as it is, for :func:`_parse_key` to look up."""
    if backend is not None and backend not in backends.REGISTRY:
        raise MixMoEError("unknown backend", backend, ", ".join(backends.REGISTRY))
    name = recipe if isinstance(recipe, str) else Recipe.named(recipe).key
    return "|".join([backend or "", str(int(deterministic)), weights.key, name])


def flatten(weights: Weights) -> list[Tensor | None]:
    """The tensors of the weights in the order :func:`unflatten` reads.

    fp8 codes travel as bytes: torch's schema checks compare tensors, which fp8 cannot do.
    """
    stages: list[Tensor | None] = []
    for stored in (weights.w13, weights.w2):
        row_scale = stored.row_scale if isinstance(stored, Packed) else None
        fp8 = stored.codes.dtype in (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
        codes = stored.codes.view(torch.uint8) if fp8 else stored.codes
        stages += [codes, stored.scales, row_scale]
    return stages + [getattr(weights, name) for name in Weights.TENSORS]


@lru_cache(maxsize=4096)
def _parse_key(key: str) -> tuple[Recipe, str | None, bool, tuple, tuple]:
    backend, deterministic, *rest, recipe = key.split("|", 12)
    stages = [
        (format_named(fmt), order or None, tuple(int(size) for size in shape))
        for fmt, order, *shape in (rest[:5], rest[5:])
    ]
    return Recipe.named(recipe), backend or None, deterministic == "1", stages[0], stages[1]


def unflatten(tensors: list[Tensor | None], stages: tuple) -> Weights:
    """The record again."""
    stored: list[Quantised | Packed] = []
    for (fmt, order, shape), at in zip(stages, (0, 3), strict=True):
        codes, scales, row_scale = tensors[at : at + 3]
        assert codes is not None, "codes always travel"
        if codes.dtype == torch.uint8 and fmt.element.per_byte == 1:
            codes = codes.view(fmt.element.storage)
        if order is None:
            stored.append(Quantised(codes, scales, fmt))
        else:
            stored.append(Packed(codes, scales, row_scale, order_named(order), fmt, shape))
    return Weights(stored[0], stored[1], *tensors[6:])


def _call(
    x: Tensor,
    tensors: list[Tensor | None],
    topk_ids: Tensor,
    topk_weights: Tensor,
    expert_map: Tensor | None,
    key: str,
    out: Tensor | None,
) -> Tensor:
    recipe, name, deterministic, *stages = _parse_key(key)
    weights = unflatten(tensors, tuple(stages))
    problem = check(
        recipe, weights, x, topk_ids, topk_weights, out=out, expert_map=expert_map
    )
    backend = backends.pick(x.device, name)
    backend.check(recipe, weights, problem)
    if out is None:
        out = x.new_empty((problem.tokens, problem.hidden), dtype=recipe.out_dtype)
    return run(
        backend, x, weights, topk_ids, topk_weights, recipe,
        out=out, expert_map=expert_map, deterministic=deterministic,
    )


def _moe_op(
    x: Tensor,
    weights: list[Tensor | None],
    topk_ids: Tensor,
    topk_weights: Tensor,
    expert_map: Tensor | None,
    key: str,
) -> Tensor:
    return _call(x, weights, topk_ids, topk_weights, expert_map, key, None)


def _moe_fake(x, weights, topk_ids, topk_weights, expert_map, key):  # type: ignore[no-untyped-def]
    check_devices("x", x, topk_ids=topk_ids, topk_weights=topk_weights, weights=weights[0])
    recipe = _parse_key(key)[0]
    return x.new_empty(x.shape, dtype=recipe.out_dtype)


def _moe_out_op(
    x: Tensor,
    weights: list[Tensor | None],
    topk_ids: Tensor,
    topk_weights: Tensor,
    expert_map: Tensor | None,
    key: str,
    out: Tensor,
) -> None:
    with torch.no_grad():  # what writes has no backward to refuse in, so nothing is recorded
        _call(x, weights, topk_ids, topk_weights, expert_map, key, out)


def _moe_out_fake(  # type: ignore[no-untyped-def]
    x, weights, topk_ids, topk_weights, expert_map, key, out
):
    return None


def _no_backward(ctx: object, *grads: Tensor) -> None:
    raise MixMoEError("mixmoe computes no gradients", "backward()", "torch.no_grad()")


# Not `torch.library.custom_op`: its first call imports torch._dynamo, two to four seconds.
_OPS = torch.library.Library("mixmoe", "FRAGMENT")


def _define(name: str, op: Callable, fake: Callable, writes: tuple[str, ...]) -> None:
    _OPS.define(name + torch.library.infer_schema(op, mutates_args=writes),
                tags=(torch.Tag.pt2_compliant_tag,))  # fmt: skip
    _OPS.impl(name, op, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mixmoe::{name}", fake, lib=_OPS)


_define("moe", _moe_op, _moe_fake, ())
_define("moe_out", _moe_out_op, _moe_out_fake, ("out",))
torch.library.register_autograd("mixmoe::moe", _no_backward, lib=_OPS)
