"""Layers of every recipe, and a judge of each stage against float64 on the same operands.

Used under Triton's interpreter (CPU) and on the GPU; the reference always runs on the CPU.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mixmoe.activations import Activation
from mixmoe.backends import cpu
from mixmoe.formats import Format, Quantised, ScaleKind, format_named
from mixmoe.spec import CELLS, Problem, Recipe, Routed, Weights

RECIPES = {name: Recipe.named(name) for name in CELLS}
RECIPES |= {
    "fp16_w16": Recipe(format_named("fp16"), format_named("fp16")),
    "fp16_w4": Recipe(format_named("fp16"), format_named("mxfp4")),
    "fp16_i4": Recipe(format_named("fp16"), format_named("int4_group64_f32")),
    "w4a8_g128": Recipe(format_named("int8_token"), format_named("int4_group128")),
    "a8w8_block64": Recipe(format_named("fp8_1x128"), format_named("fp8_block64x128")),
}
REFERENCE = cpu.reference()


@dataclass(frozen=True)
class Case:
    """A layer's operands on the CPU."""

    recipe: Recipe
    x: Tensor
    weights: Weights
    ids: Tensor
    topk_weights: Tensor

    @property
    def problem(self) -> Problem:
        """Sizes."""
        w = self.weights
        return Problem(self.x.shape[0], w.H, w.I, w.E, self.ids.shape[1])


def make_case(
    recipe: Recipe, tokens: int = 5, hidden: int = 160, inter: int = 96, experts: int = 3,
    topk: int = 2, bias: bool = False, skew: str = "uniform", seed: int = 0,
) -> Case:  # fmt: skip
    """Random experts and tokens. ``skew``: uniform, one (all on expert 0), empty, twice, masked."""
    g = torch.Generator().manual_seed(seed)
    smooth = {}
    if recipe.activation.name == "int8_smooth":
        smooth["w13_smooth"] = torch.rand(experts, hidden, generator=g) + 0.5
        smooth["w2_smooth"] = torch.rand(experts, inter, generator=g) + 0.5
    weights = Weights.from_dense(
        torch.randn(experts, 2 * inter, hidden, generator=g) * hidden**-0.5,
        torch.randn(experts, hidden, inter, generator=g) * inter**-0.5,
        format=recipe.weight,
        w13_bias=torch.randn(experts, 2 * inter, generator=g) if bias else None,
        w2_bias=torch.randn(experts, hidden, generator=g) if bias else None,
        **smooth,
    )
    ids = torch.randint(0, experts, (tokens, topk), generator=g)
    if skew == "one":
        ids.zero_()
    elif skew == "empty":
        ids = ids // 2 * 2
    elif skew == "twice":
        ids[:, 1:] = ids[:, :1]
    elif skew == "masked":
        ids = torch.where(torch.rand(ids.shape, generator=g) < 0.3, -1, ids)
    x = torch.randn(tokens, hidden, generator=g).to(torch.bfloat16)
    return Case(recipe, x, weights, ids, torch.rand(tokens, topk, generator=g))


def fits(recipe: Recipe, hidden: int, inter: int) -> bool:
    """Whether the formats' scale groups divide H and I."""
    groups = [f.cols for f in (recipe.activation, recipe.weight) if f.rows == 1 and f.cols]
    return all(hidden % g == 0 and inter % g == 0 for g in groups)


def to_cpu(stored: Any) -> Any:
    """Quantised, Routed or tensor on the CPU."""
    if isinstance(stored, Quantised):
        return stored.to("cpu")
    if isinstance(stored, Routed):
        names = [n for n in Routed.__dataclass_fields__ if n not in ("block", "problem")]
        return Routed(*(getattr(stored, n).cpu() for n in names), stored.block, stored.problem)
    return stored.cpu()


def exact_h(x: Quantised, weights: Weights, routed: Routed, recipe: Recipe) -> Tensor:
    """The float64 h before it is quantised."""
    return REFERENCE.hidden(x, weights, routed, recipe)


def worst_row(got: Tensor, want: Tensor) -> float:
    """max over rows of |got - want| / |want|; a zero row must be zero."""
    if not want.numel():
        return 0.0
    error = (got.to(torch.float64) - want).norm(dim=-1)
    size = want.norm(dim=-1)
    worst = torch.where(size > 0, error / size.clamp_min(1e-300), error.sign() * torch.inf)
    return float(torch.nan_to_num(torch.where(error == 0, 0, worst), nan=torch.inf).max())


def misrounded(got: Quantised, exact: Tensor, recipe: Recipe, error: float) -> int:
    """Codes or scales that no value within ``error * (|h| + rms(row))`` of the exact h rounds to.

    The scale must be one that amax - error or amax + error gives (or lies between, for float32);
    with that scale the code must lie between those of h - error and h + error.
    """
    fmt = recipe.activation
    if not exact.numel():
        return 0
    slack = error * (exact.abs() + exact.square().mean(dim=-1, keepdim=True).sqrt())
    assert got.scales is not None
    cols = fmt.cols or exact.shape[1]
    pad = -exact.shape[1] % cols
    blocks = torch.nn.functional.pad(exact.abs(), (0, pad)).unflatten(-1, (-1, cols))
    room = torch.nn.functional.pad(slack, (0, pad)).unflatten(-1, (-1, cols)).amax(-1)
    amax = blocks.amax(-1)
    low = fmt._scale_of((amax - room).clamp_min(0).float(), recipe.rounding)
    high = fmt._scale_of((amax + room).float(), recipe.rounding)
    wrong = int(((got.scales < low) | (got.scales > high)).sum())
    scale = fmt._spread(got.scales, exact.shape)
    values = fmt.element.decode(got.codes, torch.float32)
    ends = [
        fmt.element.decode(fmt.element.encode(h.float() / scale), torch.float32)
        for h in (exact - slack, exact + slack)
    ]
    return wrong + int(((values < ends[0]) | (values > ends[1])).sum())


def judge(
    case: Case, backend: Any, device: str, block: int | None = None, error: float = 2.0**-8
) -> dict[str, float]:
    """Run every stage of the backend; its own operands go to the float64 twin of the next stage.

    Returns ``route`` and ``quantise`` (lists and codes that differ), ``gemm1`` (misrounded codes,
    or the worst row of a 16-bit h over its tolerance), ``gemm2`` (worst row over 2^-8), ``layer``,
    ``down`` and ``fused`` (over 2^-7): pass is <= 1 for the ratios and 0 for the counts. error: of
    the values that codes of h are rounded from.
    """
    recipe, p = case.recipe, case.problem
    weights = backend.prepare(case.weights, recipe).to(device)
    backend.check(recipe, weights, p)
    x, ids, topk = case.x.to(device), case.ids.to(device), case.topk_weights.to(device)
    routed = backend.route(ids, topk, p, None, block)
    want = REFERENCE.route(case.ids, case.topk_weights, p, None, routed.block)
    host = to_cpu(routed)
    names = [n for n in Routed.__dataclass_fields__ if n not in ("block", "problem")]
    differ = [n for n in names if not torch.equal(getattr(host, n), getattr(want, n))]
    result = {"route": float(len(differ))}
    xq = backend.quantise(x, weights, routed, recipe)
    xq_host = to_cpu(xq)
    xq_want = REFERENCE.quantise(case.x, case.weights, want, recipe)
    result["quantise"] = float(differing(xq_host, xq_want))
    h = backend.gemm1(xq, weights, routed, recipe)
    exact = exact_h(xq_host, case.weights, want, recipe)
    result["gemm1"] = judge_h(to_cpu(h), exact, recipe, error)
    rows = backend.gemm2(h, weights, routed, recipe)
    exact_rows = REFERENCE.gemm2(to_cpu(h), case.weights, want, recipe)
    result["gemm2"] = worst_row(to_cpu(rows), exact_rows) / 2.0**-8
    out = torch.full((p.tokens, p.hidden), torch.nan, dtype=recipe.out_dtype, device=device)
    backend.combine(rows, routed, recipe, out)
    empty = torch.empty(p.tokens, p.hidden, dtype=torch.float64)
    exact_out = REFERENCE.combine(exact_rows, want, recipe, empty)
    result["layer"] = worst_row(out.cpu(), exact_out) / 2.0**-7  # two roundings: rows, then out
    fused = torch.full_like(out, torch.nan)
    backend.layer(x, weights, ids, topk, recipe, out=fused)
    # With a block of the caller's the layer may run another schedule, whose h, rounded elsewhere
    # first, gets other codes near boundaries and other scales: two quantisations of one value.
    apart = 2.0**-7 if block is None else 2.0**-7 + 2 * recipe.activation.noise
    result["fused"] = worst_row(fused.cpu(), exact_out) / apart
    down = torch.full_like(out, torch.nan)
    backend.down(h, weights, routed, recipe, down)
    result["down"] = worst_row(down.cpu(), exact_out) / 2.0**-7
    return result


def differing(got: Quantised, want: Quantised) -> int:
    """Codes and scales that are not the same bits."""
    count = int((got.codes.view(torch.uint8) != want.codes.view(torch.uint8)).sum())
    if want.scales is not None and got.scales is not None:
        count += int((got.scales != want.scales).sum())
    return count


def judge_h(h: Quantised, exact: Tensor, recipe: Recipe, error: float = 2.0**-8) -> float:
    """<= 1 passes: the worst row over the format's tolerance, or codes no near value rounds to.

    ``error`` is that of a bf16 value: the prefill schedule quantises h from bf16.
    """
    if recipe.activation.scale is ScaleKind.NONE:
        return worst_row(h.codes, exact) / recipe.activation.tolerance
    return float(2 * misrounded(h, exact, recipe, error))


def passed(result: dict[str, float]) -> bool:
    """Every count zero and every ratio at most 1."""
    return all(value <= 1 for value in result.values()) and not any(
        result[name] for name in ("route", "quantise")
    )


def mutated(case: Case, how: str) -> Case:
    """The case with one thing broken in the weights, to see a judge fail."""
    w = case.weights
    scales = [None if q.scales is None else q.scales.clone() for q in (w.w13, w.w2)]
    w13 = Quantised(w.w13.codes.clone(), scales[0], w.w13.format)
    w2 = Quantised(w.w2.codes.clone(), scales[1], w.w2.format)
    e = int(case.ids[case.ids >= 0][0])
    raw13, raw2 = (q.codes.view(torch.uint8) for q in (w13, w2))
    inter = case.weights.I
    if how == "zero row":
        raw2[e, 3] = 0
    elif how == "swap experts":
        other = (e + 1) % case.weights.E
        raw13[[e, other]] = raw13[[other, e]]
    elif how == "drop K tail":
        raw13[e, :, -raw13.shape[2] // 8 :] = 0
    elif how == "swap gate and up":
        raw13[e] = torch.cat([raw13[e, inter:], raw13[e, :inter]])
    elif how == "shift scale" and w2.scales is not None:
        w2.scales[e] = w2.scales[e] + 1 if w2.scales.dtype == torch.uint8 else w2.scales[e] * 2
    else:
        raise ValueError(how)
    return replace(case, weights=replace(w, w13=w13, w2=w2))


def with_act(recipe: Recipe, act: Activation, weight_on: int = 2) -> Recipe:
    """The recipe with another activation function and weight stage."""
    return replace(recipe, act=act, weight_on=weight_on)


__all__ = [
    "Case", "Format", "RECIPES", "REFERENCE", "differing", "exact_h", "fits", "judge", "judge_h",
    "make_case", "misrounded", "mutated", "passed", "to_cpu", "with_act", "worst_row",
]  # fmt: skip
