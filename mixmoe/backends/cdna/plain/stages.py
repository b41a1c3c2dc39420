"""The stages without scaled MFMAs: choose a tile, allocate, launch. No maths here."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import flydsl.expr as fx
import torch
from torch import Tensor

from mixmoe.activations import Activation
from mixmoe.backends.cdna import choose
from mixmoe.backends.cdna.atoms import Atoms, Mma
from mixmoe.backends.cdna.config import THREADS
from mixmoe.backends.cdna.grid import Walk
from mixmoe.backends.cdna.plain import gemm1 as gemm1_kernels
from mixmoe.backends.cdna.plain import gemm2 as gemm2_kernels
from mixmoe.backends.cdna.plain import quantise as quantise_kernels
from mixmoe.backends.cdna.plain import requantise
from mixmoe.backends.cdna.plain.config import Gemm
from mixmoe.backends.cdna.plain.decode import token_decoder, weight_decoder
from mixmoe.backends.cdna.plain.epilogue import Extras
from mixmoe.errors import MixMoEError
from mixmoe.formats import (
    F32_TINY,
    SCALE_STORAGE,
    Element,
    Format,
    Quantised,
    ScaleKind,
    bfloat16,
    e4m3fn,
    e4m3fnuz,
    float16,
    int8,
)
from mixmoe.preshuffle import Packed, order_named, require
from mixmoe.spec import Problem, Recipe, Routed, Weights

NUMERIC = {
    torch.bfloat16: fx.BFloat16,
    torch.float16: fx.Float16,
    torch.float32: fx.Float32,
}
MIN_BLOCK, TILES = 16, (128, 64, 32, 16)
EXPERT_BYTES = (1 << 31) - 1  # offsets inside one expert's codes are 32 bits wide
INT8_SUM = 1 << 17  # K whose products of int8 fit an int32: 127^2 K < 2^31


@dataclass(frozen=True, slots=True)
class Plan:
    """Both GEMMs of a recipe on weights of one shape, for tiles of one number of tokens."""

    gemm1: Gemm
    gemm2: Gemm


def mma_for(atoms: Atoms, token: Element) -> Mma | None:
    """The MFMA that tokens of an element are multiplied by."""
    if token in (bfloat16, float16, int8):
        return atoms.mma_of(token)
    own = atoms.mma_of(e4m3fn) or atoms.mma_of(e4m3fnuz)
    return own if own is not None and token_decoder(token, own.element) else None


def operands(atoms: Atoms, recipe: Recipe) -> Mma:
    """The MFMA of a recipe. Raises MixMoEError for formats that do not reach one exactly."""
    mma = mma_for(atoms, recipe.activation.element)
    if mma is None:
        nearest = recipe.activation.name.removesuffix("_fnuz")
        rule = f"{recipe.activation.element.name} has values that no MFMA of {atoms.arch} takes"
        raise MixMoEError(rule, recipe.activation, nearest)
    if weight_decoder(recipe.weight.element, mma.element) is None:
        rule = f"{recipe.weight} weights do not become {mma.element.name} exactly on {atoms.arch}"
        raise MixMoEError(rule, recipe.weight, "another recipe")
    return mma


def orders(weight: Format, mma: Element | None = None) -> tuple[str, str]:
    """Weight orders of w13 and w2: runs where blocks of K have scales of their own; without -0,
    that nobody has to clear it, where the MFMA takes e4m3fnuz."""
    blocked = weight.scale is not ScaleKind.NONE and weight.cols and weight.rows == 1
    name = f"runs{weight.element.bits}" if blocked else "n16"
    cleared = weight.element is e4m3fn and mma is e4m3fnuz
    name = f"cdna_uz_{name}" if cleared else f"cdna_{name}"
    return f"{name}_gui", name


def loaded(weight: Format, mma: Mma) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Orders that a GEMM reads of w13 and of w2, the best first."""
    pairs = dict.fromkeys((orders(weight, mma.element), orders(weight)))
    return tuple(name for pair in pairs for name in pair), tuple(pair[1] for pair in pairs)


def plan(
    atoms: Atoms, recipe: Recipe, weights: Weights, block: int, problem: Problem | None = None
) -> Plan:
    """The kernels' records; ``problem`` says how many tiles there will be, many if it is None.
    Raises MixMoEError for what they cannot do."""
    mma = operands(atoms, recipe)
    if mma.element is int8 and max(weights.H, weights.I) > INT8_SUM:
        raise MixMoEError("K of int8 products, at most", max(weights.H, weights.I), INT8_SUM)
    first_names, second_names = loaded(weights.format, mma)
    require(weights.w13, tuple(map(order_named, first_names)), "w13")
    require(weights.w2, tuple(map(order_named, first_names)), "w2")
    if weights.orders[1] not in second_names:
        rule = "w2 has no gate and up to interleave"
        raise MixMoEError(rule, weights.orders[1], second_names[0])
    shapes = ((2, weights.I, weights.H), (1, weights.H, weights.I))
    first, second = (
        cut(
            partial(Gemm, atoms, mma, stored.format, recipe.activation, order, *shape),
            block, problem,
        )
        for stored, order, shape in zip(
            (weights.w13, weights.w2), weights.orders, shapes, strict=True
        )
    )
    return Plan(first, second)


def cut(make: Callable[..., Gemm], block: int, problem: Problem | None) -> Gemm:
    """The most tokens a tile that divide the sorted block, fit, and leave registers enough.

    64 keep the matrix cores of gfx942 busy; those of gfx950 are twice as fast, so that 128 pay
    where weights are operands as they are stored. Sums of 128-blocks leave registers for 32. As in
    the scaled loop, what an XCD runs at a time shares an L2, and where tiles are fewer than CUs
    the waves of a workgroup share K instead of rows.
    """
    least = make(tokens=MIN_BLOCK)
    most = 128 if least.atoms.operands and (least.keeps or least.folds) else 64
    if least.weight.rows > 1:
        most = 32
    legal = [t for t in TILES if block % t == 0 and t <= most]
    tokens = next((t for t in legal[:-1] if choose.fits(make, t)), legal[-1])
    few = tokens <= 32
    out = make(
        tokens=tokens, sort_tiles=block // tokens, streaming=few and block == tokens,
        walk=Walk(together=not few),
    )
    if problem is not None and few:
        out = share_k(out, out.row_tiles * min(problem.routes, problem.experts))
    return out


def share_k(gemm: Gemm, tiles: int) -> Gemm:
    """With fewer tiles than CUs: four or two waves share K, where that leaves few of them idle."""
    for waves in (4, 2) if tiles < choose.CUS else ():
        if choose.fits(partial(replace, gemm, k_waves=waves), gemm.tokens):
            shared = replace(gemm, k_waves=waves)
            if 8 * gemm.k >= 7 * waves * shared.part_tiles * shared.tile_k:
                return shared
    return gemm


def check(atoms: Atoms, recipe: Recipe, weights: Weights, problem: Problem) -> None:
    """Formats no MFMA takes, orders the kernels do not read, sizes past a limit."""
    both = plan(atoms, recipe, weights, MIN_BLOCK)
    for name, gemm in (("w13", both.gemm1), ("w2", both.gemm2)):
        if 4 * gemm.code_words > EXPERT_BYTES:
            rule = f"bytes of one expert's {name}, at most"
            raise MixMoEError(rule, 4 * gemm.code_words, EXPERT_BYTES)


def prepare(atoms: Atoms, weights: Weights, recipe: Recipe) -> Weights:
    """The orders of :func:`orders`; what is in one that is read already stays."""
    mma = operands(atoms, recipe)
    names = orders(weights.format, mma.element)
    known = tuple(map(order_named, loaded(weights.format, mma)[0]))
    w13, w2 = (
        w if isinstance(w, Packed) and w.order in known
        else order_named(name).pack(weights.rows(stage))
        for w, stage, name in zip((weights.w13, weights.w2), ("w13", "w2"), names, strict=True)
    )
    extra = {name: getattr(weights, name) for name in Weights.TENSORS}
    return Weights(w13, w2, **extra)


def words(codes: Tensor) -> Tensor:
    """The bytes of a tensor as one row of 32-bit words."""
    return codes.contiguous().view(torch.uint8).flatten().view(torch.int32)


def nothing(device: torch.device) -> Tensor:
    """What stands for a tensor that a kernel does not read."""
    return torch.zeros(4, device=device)


def stream():
    """The caller's stream."""
    return torch.cuda.current_stream()


def quantise(
    atoms: Atoms, x: Tensor, weights: Weights, routed: Routed, recipe: Recipe
) -> Quantised:
    """``x (T, H)`` in the recipe's activation format; a row per route where it is smoothed."""
    smooth = weights.w13_smooth if recipe.activation.name == "int8_smooth" else None
    return to_format(atoms, x, recipe, routed, smooth)


def to_format(
    atoms: Atoms, x: Tensor, recipe: Recipe, routed: Routed, smooth: Tensor | None = None
) -> Quantised:
    """Rows of floats in the recipe's activation format."""
    fmt, (count, columns) = recipe.activation, x.shape
    if fmt.scale is ScaleKind.NONE:
        return Quantised(x.to(fmt.element.storage).contiguous(), None, fmt)
    rows = count if smooth is None else routed.problem.routes
    out = empty_codes(fmt, rows, columns, x.device)
    if rows:
        # The kernels load 16 bytes at a time, from row starts that are multiples of that.
        aligned = x.stride(0) * x.itemsize % 16 == 0 and x.data_ptr() % 16 == 0
        x = x if aligned else x.contiguous()
        flat = x.as_strided((x.stride(0) * (count - 1) + columns,), (1,))
        cfg = quantise_kernels.Rows(
            atoms, fmt, NUMERIC[x.dtype], columns, recipe.rounding, smooth is not None
        )
        launch_quantise(cfg, out, flat, x.stride(0), count, routed, smooth)
    return out


def launch_quantise(
    cfg: quantise_kernels.Rows, target: Quantised, x: Tensor, row_stride: int, rows: int,
    routed: Routed, smooth: Tensor | None,
) -> None:
    """The kernel for a scale a row, or for a scale a block."""
    assert target.scales is not None
    out = (words(target.codes), target.scales.view(-1), x)
    if cfg.fmt.cols:
        threads = rows * cfg.blocks * cfg.per_block
        launch = quantise_kernels.build_blocks(cfg)
        launch(*out, rows, row_stride, -(-threads // THREADS), stream=stream())
        return
    problem = routed.problem
    rows = rows if smooth is None else routed.sorted_token_ids.numel()
    factors = nothing(x.device) if smooth is None else smooth.view(-1)
    quantise_kernels.build_rows(cfg)(
        *out, factors, routed.sorted_token_ids, routed.sorted_expert_ids, rows, problem.tokens,
        problem.topk, routed.block, row_stride, -(-rows * cfg.lanes // THREADS), stream=stream(),
    )


def tensors(
    source: Quantised, stored: Packed | Quantised, bias: Tensor | None
) -> tuple[Tensor, ...]:
    """Tensors both GEMMs take: tokens' codes and scales, weights' codes, block scales and row
    scales, bias; anything where there is none."""
    held, device = nothing(source.device), source.device
    assert isinstance(stored, Packed), "checked by plan"
    scales = held if source.scales is None else source.scales.contiguous().view(-1)
    blocks = held.view(torch.int32) if stored.scales is None else words(stored.scales)
    rows = nothing(device) if stored.row_scale is None else stored.row_scale.view(-1)
    bias = nothing(device) if bias is None else bias.flatten()
    return words(source.codes), scales, words(stored.codes), blocks, rows, bias


def grid_of(cfg: Gemm, routed: Routed) -> tuple[int, int]:
    """Token tiles and workgroups of a launch."""
    tiles = routed.sorted_token_ids.numel() // cfg.tokens
    return tiles, cfg.walk.workgroups(tiles * cfg.row_tiles)


def scalars(act: Activation) -> tuple[float, float, float, float]:
    """limit, alpha, beta, beta2; no limit is an infinite one."""
    limit = float("inf") if act.limit is None else act.limit
    return limit, act.alpha, act.beta, act.beta2


def gemm1(
    atoms: Atoms, x: Quantised, weights: Weights, routed: Routed, recipe: Recipe
) -> Quantised:
    """h in the activation format, a row per route; rows of skipped routes are zero."""
    problem, fmt = routed.problem, recipe.activation
    cfg = plan(atoms, recipe, weights, routed.block, problem).gemm1
    extras = extras_of(weights, recipe)
    smooth = weights.w2_smooth if extras.smooth else None
    held = nothing(x.device)
    codes = empty_codes(fmt, problem.routes, problem.intermediate, x.device)
    out: Any  # type or codes of h
    if fmt.scale is not ScaleKind.NONE and requantise.fits(cfg, fmt):
        out = requantise.Target(fmt, recipe.rounding)
        h, h_scales = codes.codes.view(torch.uint8).view(-1), codes.scales
        h = h.view(torch.int16 if fmt.element.bits == 4 else torch.int32)
    else:
        exact = fmt.scale is ScaleKind.NONE
        kind = fmt.element.storage if exact else torch.float32
        h = torch.zeros((problem.routes, problem.intermediate), dtype=kind, device=x.device)
        out, h_scales = NUMERIC[kind], None
    if problem.routes:
        gemm1_kernels.build(cfg, recipe.act.kind, out, extras)(
            h.view(-1), held if h_scales is None else h_scales.view(-1),
            *tensors(x, weights.w13, weights.w13_bias),
            held if smooth is None else smooth.view(-1),
            routed.sorted_token_ids, routed.sorted_weights, routed.sorted_expert_ids,
            problem.tokens, problem.topk, *scalars(recipe.act),
            *grid_of(cfg, routed), stream=stream(),
        )
    if h_scales is not None:
        return codes
    if fmt.scale is ScaleKind.NONE:
        return Quantised(h, None, fmt)
    return to_format(atoms, h, recipe, routed)


def extras_of(weights: Weights, recipe: Recipe) -> Extras:
    """What stage 1 adds on its way."""
    smoothed = recipe.activation.name == "int8_smooth"
    smooth = smoothed and weights.w2_smooth is not None
    return Extras(weights.w13_bias is not None, recipe.weight_on == 1, smooth, smoothed)


def empty_codes(fmt: Format, rows: int, columns: int, device: torch.device) -> Quantised:
    """Room for codes and scales; rows that nobody writes are zeros, with the scales of zeros."""
    codes = torch.zeros((rows, columns // fmt.element.per_byte), dtype=torch.uint8, device=device)
    scales = None
    if fmt.scale is not ScaleKind.NONE:
        least = 0 if fmt.scale is ScaleKind.E8M0 else F32_TINY
        shape, kind = fmt.scale_shape(rows, columns), SCALE_STORAGE[fmt.scale]
        scales = torch.full(shape, least, dtype=kind, device=device)
    return Quantised(codes.view(fmt.element.storage), scales, fmt)


def gemm2(
    atoms: Atoms, h: Quantised, weights: Weights, routed: Routed, recipe: Recipe
) -> Tensor:
    """A row per route in ``recipe.out_dtype``; rows of skipped routes are zero."""
    problem = routed.problem
    cfg = plan(atoms, recipe, weights, routed.block, problem).gemm2
    shape = (problem.routes, problem.hidden)
    rows = torch.zeros(shape, dtype=recipe.out_dtype, device=h.device)
    if problem.routes:
        launch = gemm2_kernels.build(cfg, NUMERIC[rows.dtype], weights.w2_bias is not None)
        launch(
            rows.view(-1), *tensors(h, weights.w2, weights.w2_bias),
            routed.sorted_token_ids, routed.sorted_expert_ids, problem.tokens, problem.topk,
            *grid_of(cfg, routed), stream=stream(),
        )
    return rows
