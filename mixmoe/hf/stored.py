"""What an experts module of transformers holds, as Weights, Activation and Recipe.

Source of the conventions: transformers 5.17 to 5.24, ``integrations/moe.py`` (``is_transposed``,
``is_concatenated``, ``has_gate``, ``has_bias``, ``_apply_gate``), ``finegrained_fp8.py``
(``*_scale_inv``, ``block_size``) and ``mxfp4.py`` (blocks, scales, swizzled tensors).
"""

from collections.abc import Iterator
from dataclasses import replace
from enum import Enum
from math import gcd
from typing import Any

import torch
from torch import Tensor

from mixmoe.activations import Activation, gelu, silu, situv2, swiglu
from mixmoe.errors import MixMoEError
from mixmoe.formats import Format, Quantised, format_named, fp8_block
from mixmoe.module import require_unsmoothed
from mixmoe.spec import Recipe, Weights

ExpertsModule = Any  # an nn.Module; which attributes it has depends on its class


class Kind(Enum):
    """How the parameters store numbers."""

    DENSE = "dense"  # floats, perhaps transposed or interleaved
    FP8 = "fp8"  # FP8Experts: e4m3 with block or tensor scales
    FP4 = "fp4"  # FP8Experts of fp4 type: e2m1 pairs with E8M0 per 32
    BLOCKS = "blocks"  # gpt-oss MXFP4 as on disk: rows gate, up, gate, up
    SWIZZLED = "swizzled"  # Mxfp4GptOssExperts after transformers re-ordered it for Triton


def kind_of(module: ExpertsModule) -> Kind | None:
    """How this module stores its experts; None when it is not an experts module."""
    if getattr(module, "gate_up_proj_blocks", None) is not None:
        return Kind.BLOCKS
    if getattr(module, "gate_up_proj_precision_config", None) is not None:
        return Kind.SWIZZLED
    if getattr(module, "gate_up_proj_scale_inv", None) is not None:
        fp4 = module.gate_up_proj.dtype in (torch.int8, torch.uint8)
        return Kind.FP4 if fp4 else Kind.FP8
    decorated = hasattr(module, "is_transposed") and hasattr(module, "num_experts")
    return Kind.DENSE if decorated and hasattr(module, "down_proj") else None


def require_kind(module: ExpertsModule) -> Kind:
    """:func:`kind_of`, refusing what mixmoe cannot run, by name."""
    kind, name = kind_of(module), type(module).__name__
    if kind is None:
        raise MixMoEError("not an experts module of transformers", name)
    if not getattr(module, "has_gate", True):
        raise MixMoEError("mixmoe runs gated experts (gate_up_proj)", f"{name} with up_proj alone")
    if getattr(module, "has_post_expert_norm", False):
        raise MixMoEError("mixmoe has no norm after an expert", name)
    if getattr(module, "activation_scheme", "dynamic") != "dynamic":
        raise MixMoEError("mixmoe quantises activations as they come", "static scales", "dynamic")
    return kind


def parameters_of(module: ExpertsModule) -> Iterator[Tensor]:
    """The tensors the weights are made of, whichever way they are registered."""
    for name in ("gate_up_proj", "down_proj"):
        for suffix in ("", "_scale_inv", "_blocks", "_scales", "_bias"):
            found = getattr(module, name + suffix, None)
            if isinstance(found, Tensor):
                yield found


def default_recipe(module: ExpertsModule) -> Recipe:
    """The recipe that changes a model least.

    Dense: 16-bit. MXFP4: its own weights under 16-bit activations. FP8: what transformers does
    itself, e4m3 activations with a scale per 1x128 (block scales) or per token (tensor scales).
    """
    kind = require_kind(module)
    names = {Kind.DENSE: "a16w16", Kind.FP4: "a8w4"}
    if kind is Kind.FP8:
        return Recipe.named("a8w8_block" if module.block_size is not None else "a8w8")
    return Recipe.named(names.get(kind, "a16w4"))


def recipe_for(
    module: ExpertsModule, recipe: Recipe | str | None, dtype: torch.dtype = torch.bfloat16
) -> Recipe:
    """``recipe`` (None: :func:`default_recipe`) with the module's activation function and dtype.

    The result has ``dtype``; 16-bit formats become fp16 in an fp16 model, and stay bf16 in a
    float32 one, whose range fp16 lacks. Raises MixMoEError for a smooth recipe: no factors here.
    """
    base = require_unsmoothed(Recipe.named(default_recipe(module) if recipe is None else recipe))
    activation, weight = base.activation, base.weight
    if dtype == torch.float16:
        half = {"bf16": format_named("fp16")}
        activation = half.get(activation.name, activation)
        weight = half.get(weight.name, weight)
    return replace(
        base, activation=activation, weight=weight, act=activation_of(module), out_dtype=dtype
    )


def activation_of(module: ExpertsModule) -> Activation:
    """The module's gate as one of mixmoe's activations, found by evaluating both on a grid.

    Asking the function and not its name keeps clamps, alphas and soft caps that a config may or
    may not mention. Raises MixMoEError when none of them agrees to 1e-4.
    """
    if not hasattr(module, "_apply_gate"):  # MXFP4 modules: gpt-oss's function, scalars on them
        return swiglu(limit=float(module.limit), alpha=float(module.alpha))
    limits = [getattr(module, name, None) for name in ("limit", "swiglu_limit")]
    reach = 2 * max([6.0, *(float(x) for x in limits if x is not None)])
    grid = torch.linspace(-reach, reach, 41)
    gate, up = (t.flatten() for t in torch.meshgrid(grid, grid, indexing="ij"))
    interleaved = not getattr(module, "is_concatenated", True)
    both = torch.stack([gate, up], dim=1).flatten() if interleaved else torch.cat([gate, up])
    with torch.no_grad():
        want = module._apply_gate(both[None])[0].float()
    for act in _candidates(module, limits):
        if torch.allclose(act(gate, up), want, rtol=1e-4, atol=1e-4):
            return act
    name = getattr(getattr(module, "act_fn", None), "__class__", type(module)).__name__
    raise MixMoEError("unknown activation of experts", name, "silu, swiglu, gelu_tanh, situv2")


def _candidates(module: ExpertsModule, limits: list[Any]) -> Iterator[Activation]:
    alphas = [getattr(module, name, None) for name in ("alpha", "swiglu_alpha")]
    alpha = next((float(a) for a in alphas if a is not None), 1.702)
    for limit in dict.fromkeys([None, *limits]):
        bound = None if limit is None else float(limit)
        yield silu(bound)
        yield swiglu(bound, alpha)
        yield replace(gelu(), limit=bound)
    gate_cap, up_cap = getattr(module, "gate_softcap", None), getattr(module, "up_softcap", None)
    if gate_cap is not None and up_cap is not None:
        yield situv2(float(gate_cap), float(up_cap))


def weights_of(module: ExpertsModule, fmt: Format | None = None) -> Weights:
    """The module's experts; in ``fmt`` where its family is not that of the stored numbers.

    Numbers that are stored as ``fmt`` asks are kept bit for bit; others go through float32, one
    expert at a time. Dense 16-bit parameters in plain order are used as they lie, without a copy.
    """
    kind = require_kind(module)
    if kind is Kind.DENSE:
        return _dense(module, fmt or default_recipe(module).weight)
    found = READERS[kind](module)
    return found if fmt is None or found.format.family == fmt.family else restate(found, fmt)


def _dense(module: ExpertsModule, fmt: Format) -> Weights:
    w13, w2 = module.gate_up_proj.detach(), module.down_proj.detach()
    biases = _biases(module)
    if module.is_transposed:
        w13, w2 = w13.transpose(1, 2), w2.transpose(1, 2)
    plain = module.is_concatenated and w13.is_contiguous() and w2.is_contiguous()
    if plain and w13.dtype == w2.dtype == fmt.element.storage:
        return Weights(Quantised(w13, None, fmt), Quantised(w2, None, fmt), *biases)
    gate_up = "concatenated" if module.is_concatenated else "interleaved"
    return Weights.from_dense(w13, w2, fmt, *biases, gate_up=gate_up)


def _biases(module: ExpertsModule) -> tuple[Tensor | None, Tensor | None]:
    found = (getattr(module, f"{name}_bias", None) for name in ("gate_up_proj", "down_proj"))
    w13, w2 = (None if b is None else b.detach().float() for b in found)
    return w13, w2


def _fp8(module: ExpertsModule) -> Weights:
    def matrix(name: str, halves: int) -> Quantised:
        codes = getattr(module, name).detach()
        scales = getattr(module, f"{name}_scale_inv").detach().to(torch.float32)
        if module.block_size is None:
            rows = codes.shape[1] // scales.shape[1]
            fmt = format_named("fp8_channel")
            return Quantised(codes, scales.repeat_interleave(rows, dim=1), fmt)
        rows, cols = (int(b) for b in module.block_size)
        part = codes.shape[1] // halves
        if halves == 2 and part % rows and scales.shape[1] == 2 * -(-part // rows):
            # Gate and up were quantised apart: a block ends where the gate rows end.
            step = gcd(part, rows)
            fine = [half.repeat_interleave(rows // step, dim=1) for half in scales.chunk(2, dim=1)]
            scales = torch.cat([half[:, : part // step] for half in fine], dim=1)
            return Quantised(codes, scales, fp8_block(step, cols))
        return Quantised(codes, scales, fp8_block(rows, cols))

    return Weights(matrix("gate_up_proj", 2), matrix("down_proj", 1), *_biases(module))


def _fp4(module: ExpertsModule) -> Weights:
    def matrix(name: str) -> Quantised:
        scales = getattr(module, f"{name}_scale_inv").detach()
        if scales.element_size() != 1:
            raise MixMoEError("fp4 experts need E8M0 scales", scales.dtype, "scale_fmt='ue8m0'")
        codes = getattr(module, name).detach().view(torch.uint8)
        return Quantised(codes, scales.view(torch.uint8), format_named("mxfp4"))

    return Weights(matrix("gate_up_proj"), matrix("down_proj"), *_biases(module))


def _blocks(module: ExpertsModule) -> Weights:
    def matrix(name: str) -> Quantised:
        codes = getattr(module, f"{name}_blocks").detach().flatten(-2)
        return Quantised(codes, getattr(module, f"{name}_scales").detach(), format_named("mxfp4"))

    return _apart(matrix("gate_up_proj"), matrix("down_proj"), module)


def _swizzled(module: ExpertsModule) -> Weights:
    def plain(wrapped: Any) -> Tensor:
        return wrapped.storage.layout.unswizzle_data(wrapped.storage.data).transpose(-1, -2)

    def matrix(name: str, rows: int, k: int) -> Quantised:
        scales = plain(getattr(module, f"{name}_precision_config").weight_scale)
        codes = plain(getattr(module, name))
        codes = codes[:, :rows, : k // 2].contiguous().view(torch.uint8)
        scales = scales[:, :rows, : k // 32].contiguous().view(torch.uint8)
        return Quantised(codes, scales, format_named("mxfp4"))

    hidden, inner = int(module.hidden_size), int(module.intermediate_size)
    w13 = matrix("gate_up_proj", 2 * inner, hidden)
    return _apart(w13, matrix("down_proj", hidden, inner), module)


def _apart(w13: Quantised, w2: Quantised, module: ExpertsModule) -> Weights:
    """Interleaved gate and up rows -> gate above up, codes and scales untouched."""

    def halves(t: Tensor) -> Tensor:
        return torch.cat([t[:, 0::2], t[:, 1::2]], dim=1)

    assert w13.scales is not None, "mxfp4 has scales"
    bias13, bias2 = _biases(module)
    w13.check_scales("gate_up_proj")
    w2.check_scales("down_proj")
    w13 = replace(w13, codes=halves(w13.codes), scales=halves(w13.scales))
    return Weights(w13, w2, None if bias13 is None else halves(bias13), bias2)


READERS = {
    Kind.FP8: _fp8,
    Kind.FP4: _fp4,
    Kind.BLOCKS: _blocks,
    Kind.SWIZZLED: _swizzled,
}


def restate(weights: Weights, fmt: Format) -> Weights:
    """The same experts in another format, through float32, one expert at a time."""

    def matrix(q: Quantised) -> Quantised:
        first = fmt.quantise(q[0].dequantise())
        codes = first.codes.new_empty((q.shape[0], *first.codes.shape))
        scales = None
        if first.scales is not None:
            scales = first.scales.new_empty((q.shape[0], *first.scales.shape))
        for e in range(q.shape[0]):
            one = first if e == 0 else fmt.quantise(q[e].dequantise())
            codes[e] = one.codes
            if scales is not None and one.scales is not None:
                scales[e] = one.scales
        return Quantised(codes, scales, fmt)

    return replace(weights, w13=matrix(weights.rows("w13")), w2=matrix(weights.rows("w2")))
