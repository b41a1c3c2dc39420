"""The stages: choose a tile, allocate, launch. No maths here."""

from dataclasses import dataclass
from functools import cache, partial

import flydsl.expr as fx
import torch
from torch import Tensor

from mixmoe.activations import Activation
from mixmoe.backends.cdna import choose, cost
from mixmoe.backends.cdna import combine as combine_kernels
from mixmoe.backends.cdna import finish as finish_kernels
from mixmoe.backends.cdna import gemm1 as gemm1_kernels
from mixmoe.backends.cdna import gemm2 as gemm2_kernels
from mixmoe.backends.cdna import quantise as quantise_kernels
from mixmoe.backends.cdna import route as routing
from mixmoe.backends.cdna.atoms import GFX942, GFX950, MFMA_ROWS, SCALE_BLOCK, Atoms
from mixmoe.backends.cdna.choose import TILES
from mixmoe.backends.cdna.config import THREADS, WAVES, Gemm, RowsOut
from mixmoe.backends.cdna.plain import stages as plain
from mixmoe.errors import MixMoEError, nearest_multiple
from mixmoe.formats import Quantised
from mixmoe.preshuffle import CDNA_ORDERS, Packed, order_named, require
from mixmoe.spec import Problem, Recipe, Routed, Weights

ARCHITECTURES = {atoms.arch: atoms for atoms in (GFX950, GFX942)}
PAIRS = (
    ("mxfp4", "mxfp4"), ("mxfp8", "mxfp4"), ("mxfp8", "mxfp8"),
    ("fp8_token", "mxfp4"), ("fp8_token", "mxfp8"), ("fp8_token", "fp8_channel"),
    ("fp8_1x128", "fp8_block"),
)  # fmt: skip
NUMERIC = {
    torch.bfloat16: fx.BFloat16,
    torch.float16: fx.Float16,
    torch.float32: fx.Float32,
}
SCALE_VIEWS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 16: torch.int32}
MIN_BLOCK = 16
EXPERT_BYTES = (1 << 31) - 1  # offsets inside one expert's codes are 32 bits wide
LOADED_ORDERS = tuple(o for o in CDNA_ORDERS if "int4" not in o.name)


@dataclass(frozen=True, slots=True)
class Plan:
    """Both GEMMs of a recipe on weights of one shape, for tiles of one number of tokens."""

    gemm1: Gemm
    gemm2: Gemm


def plan(
    atoms: Atoms, recipe: Recipe, weights: Weights, block: int, problem: Problem | None = None
) -> Plan:
    """The kernels' records; ``problem`` says how many tiles there will be, many if it is None.
    Raises MixMoEError for what the kernels cannot do."""
    orders = [require(w, LOADED_ORDERS, n).order.name
              for w, n in ((weights.w13, "w13"), (weights.w2, "w2"))]
    if order_named(orders[1]).codes.halves == 2:
        raise MixMoEError("w2 has no gate and up to interleave", orders[1], "cdna_n16")
    weight, token = atoms.operand(recipe.weight), atoms.operand(recipe.activation)
    shapes = ((orders[0], 2, weights.I, weights.H), (orders[1], 1, weights.H, weights.I))
    bits = (token.bits if token.block else 32, 8 * recipe.out_dtype.itemsize)
    first, second = (
        choose.cut(partial(Gemm, atoms, weight, token, *shape), block, problem, width)
        for shape, width in zip(shapes, bits, strict=True)
    )
    return Plan(first, second)


def scaled(atoms: Atoms, recipe: Recipe) -> bool:
    """Whether the scaled MFMA takes both formats; every other recipe is :mod:`plain`'s."""
    pair = (recipe.activation.name, recipe.weight.name)
    return bool(atoms.operands) and pair in PAIRS


def check(atoms: Atoms, recipe: Recipe, weights: Weights, problem: Problem) -> None:
    """Formats without a kernel, orders the kernels do not read, sizes past a limit."""
    if not scaled(atoms, recipe):
        plain.check(atoms, recipe, weights, problem)
        return
    both = plan(atoms, recipe, weights, MIN_BLOCK)
    for name, gemm in (("w13", both.gemm1), ("w2", both.gemm2)):
        if 4 * gemm.code_words > EXPERT_BYTES:
            rule = f"bytes of one expert's {name}, at most"
            raise MixMoEError(rule, 4 * gemm.code_words, EXPERT_BYTES)


def prepare(atoms: Atoms, weights: Weights, recipe: Recipe) -> Weights:
    """Gate and up interleaved every 16 rows, w2 plain; what is in an order already stays."""
    if not scaled(atoms, recipe):
        return plain.prepare(atoms, weights, recipe)
    w13, w2 = (
        w if isinstance(w, Packed) and w.order in LOADED_ORDERS
        else order_named(name).pack(weights.rows(stage))
        for w, stage, name in (
            (weights.w13, "w13", "cdna_n16_gui"),
            (weights.w2, "w2", "cdna_n16"),
        )
    )
    extra = {name: getattr(weights, name) for name in Weights.TENSORS}
    return Weights(w13, w2, **extra)


@cache
def fastest_block(problem: Problem) -> int:
    """The tile of tokens whose GEMMs the cost model expects to take least together."""
    works = cost.works_of(problem)
    cuts = {t: tuple(cost.Cut(t, 4 * WAVES * MFMA_ROWS // w.halves) for w in works) for t in TILES}
    return cost.choose(cost.OURS, works, cuts)


def sort_block(problem: Problem, block: int | None) -> int:
    """Routes of a sorted block: the fastest of 16 to 128, or a multiple of 16."""
    if block is None:
        return fastest_block(problem) if problem.tokens else MIN_BLOCK
    if block < MIN_BLOCK or block % MIN_BLOCK:
        rule = f"cdna sorts into blocks of a multiple of {MIN_BLOCK} routes"
        raise MixMoEError(rule, block, nearest_multiple(block, MIN_BLOCK))
    return block


def route(
    topk_ids: Tensor,
    topk_weights: Tensor,
    problem: Problem,
    expert_map: Tensor | None,
    block: int | None,
) -> Routed:
    """Sorted routes, by torch on the device."""
    args = (topk_ids, topk_weights, problem, expert_map)
    return routing.route(*args, sort_block(problem, block))


def words(codes: Tensor) -> Tensor:
    """The bytes of a tensor as one row of 32-bit words."""
    return codes.contiguous().view(torch.uint8).flatten().view(torch.int32)


def stream():
    """The caller's stream."""
    return torch.cuda.current_stream()


def quantise(
    atoms: Atoms, x: Tensor, weights: Weights, routed: Routed, recipe: Recipe
) -> Quantised:
    """``x (T, H)`` in the recipe's activation format."""
    if not scaled(atoms, recipe) or not atoms.operand(recipe.activation).block:
        return plain.quantise(atoms, x, weights, routed, recipe)
    fmt, (tokens, hidden) = recipe.activation, x.shape
    columns = hidden // fmt.element.per_byte
    codes = torch.empty((tokens, columns), dtype=fmt.element.storage, device=x.device)
    scales = torch.empty(fmt.scale_shape(tokens, hidden), dtype=torch.uint8, device=x.device)
    if tokens:
        # The kernel loads 16 bytes at a time, from row starts that are multiples of that.
        aligned = x.stride(0) * x.itemsize % 16 == 0 and x.data_ptr() % 16 == 0
        x = x if aligned else x.contiguous()
        launch = quantise_kernels.build(
            atoms.operand(fmt), NUMERIC[x.dtype], recipe.rounding
        )
        grid = -(-tokens * hidden // (quantise_kernels.VALUES * THREADS))
        flat = x.as_strided((x.stride(0) * (tokens - 1) + hidden,), (1,))
        launch(
            words(codes), scales.flatten(), flat, tokens, hidden, x.stride(0), grid,
            stream=stream(),
        )
    return Quantised(codes, scales, fmt)


def operands(
    cfg: Gemm, source: Quantised, stored: Packed | Quantised, bias: Tensor | None
) -> tuple[Tensor, ...]:
    """Tensors both GEMMs take: tokens' codes and scales, weights', bias (or anything f32)."""
    assert source.scales is not None and isinstance(stored, Packed), "checked by plan"
    scales = source.scales.contiguous().view(-1)
    if cfg.token.block:
        scales = scales.view(SCALE_VIEWS[cfg.scale_unit])
    held = nothing(source.device) if bias is None else bias.flatten()
    if stored.scales is None:
        assert stored.row_scale is not None
        of_weights = stored.row_scale.view(-1)
    else:
        of_weights = words(stored.scales)
    return words(source.codes), scales, words(stored.codes), of_weights, held


def grid_of(cfg: Gemm, routed: Routed) -> tuple[int, int]:
    """Token tiles and workgroups of a launch."""
    tiles = routed.sorted_token_ids.numel() // cfg.tokens
    return tiles, cfg.walk.workgroups(tiles * cfg.row_tiles * cfg.split_k)


def scalars(act: Activation) -> tuple[float, float, float, float]:
    """limit, alpha, beta, beta2; no limit is an infinite one."""
    limit = float("inf") if act.limit is None else act.limit
    return limit, act.alpha, act.beta, act.beta2


def gemm1(
    atoms: Atoms, x: Quantised, weights: Weights, routed: Routed, recipe: Recipe
) -> Quantised:
    """h with its scales, a row per route; rows of skipped routes are zero."""
    if not scaled(atoms, recipe):
        return plain.gemm1(atoms, x, weights, routed, recipe)
    problem, fmt = routed.problem, recipe.activation
    cfg = plan(atoms, recipe, weights, routed.block, problem).gemm1
    if not cfg.token.block:
        h = torch.zeros((problem.routes, problem.intermediate), device=x.device)
        if problem.routes:
            multiply_up(cfg, x, weights, routed, recipe, h, nothing(x.device, torch.uint8))
        return plain.to_format(atoms, h, recipe, routed)
    columns = problem.intermediate // fmt.element.per_byte
    codes = torch.zeros((problem.routes, columns), dtype=torch.uint8, device=x.device)
    scales = torch.zeros(
        fmt.scale_shape(problem.routes, problem.intermediate), dtype=torch.uint8, device=x.device
    )
    if problem.routes:
        target = codes.view(-1).view(torch.int16 if cfg.token.bits == 4 else torch.int32)
        if cfg.split_k > 1:
            size = cfg.split_k * routed.sorted_token_ids.numel() * 2 * problem.intermediate
            target = torch.empty(size, dtype=torch.float32, device=x.device)
        multiply_up(cfg, x, weights, routed, recipe, target, scales)
        if cfg.split_k > 1:
            finish(cfg, weights, routed, recipe, target, codes, scales)
    return Quantised(codes.view(fmt.element.storage), scales, fmt)


def variant_of(weights: Weights, recipe: Recipe) -> tuple:
    """What stage 1 is compiled for beside its GEMM."""
    act = recipe.act
    return (act.kind, recipe.rounding, weights.w13_bias is not None, recipe.weight_on == 1,
            act.limit is not None)


def multiply_up(
    cfg: Gemm, x: Quantised, weights: Weights, routed: Routed, recipe: Recipe, target: Tensor,
    scales: Tensor,
) -> None:
    """Launch stage 1 into ``target``: codes, floats, or sums of parts of K."""
    problem = routed.problem
    gemm1_kernels.build(cfg, *variant_of(weights, recipe))(
        target.view(-1), scales.view(-1), *operands(cfg, x, weights.w13, weights.w13_bias),
        routed.sorted_token_ids, routed.sorted_weights, routed.sorted_expert_ids, problem.tokens,
        problem.topk, *scalars(recipe.act), *grid_of(cfg, routed), stream=stream(),
    )


def finish(
    cfg: Gemm, weights: Weights, routed: Routed, recipe: Recipe, sums: Tensor, codes: Tensor,
    scales: Tensor,
) -> None:
    """Launch what adds the parts of K up and quantises."""
    problem, count = routed.problem, routed.sorted_token_ids.numel()
    bias = weights.w13_bias
    held = nothing(sums.device) if bias is None else bias.flatten()
    eights = count * problem.intermediate // quantise_kernels.VALUES
    finish_kernels.build(cfg, *variant_of(weights, recipe))(
        words(codes), scales.view(-1), sums, held, routed.sorted_token_ids, routed.sorted_weights,
        routed.sorted_expert_ids, count, problem.tokens, problem.topk, *scalars(recipe.act),
        -(-eights // THREADS), stream=stream(),
    )


def gemm2(
    atoms: Atoms, h: Quantised, weights: Weights, routed: Routed, recipe: Recipe
) -> Tensor:
    """A row per route in ``recipe.out_dtype``; rows of skipped routes are zero."""
    if not scaled(atoms, recipe):
        return plain.gemm2(atoms, h, weights, routed, recipe)
    problem = routed.problem
    rows = torch.zeros(
        (problem.routes, problem.hidden), dtype=recipe.out_dtype, device=h.device
    )
    multiply_down(atoms, h, weights, routed, recipe, RowsOut.ROWS, rows)
    return rows


def multiply_down(
    atoms: Atoms, h: Quantised, weights: Weights, routed: Routed, recipe: Recipe,
    kind: RowsOut, target: Tensor, row_scales: Tensor | None = None,
) -> None:
    """Launch stage 2 into ``target``, of that kind."""
    problem = routed.problem
    if problem.routes:
        cfg = plan(atoms, recipe, weights, routed.block, problem).gemm2
        out = NUMERIC[recipe.out_dtype if kind is RowsOut.ROWS else torch.float32]
        bias, weighted = weights.w2_bias, kind is RowsOut.SUMS and recipe.weight_on == 2
        scales = nothing(h.device, torch.uint8) if row_scales is None else row_scales.view(-1)
        gemm2_kernels.build(cfg, out, bias is not None, kind, weighted)(
            target.view(-1), scales, *operands(cfg, h, weights.w2, bias),
            routed.sorted_token_ids, routed.sorted_weights, routed.sorted_expert_ids,
            problem.tokens, problem.topk, *grid_of(cfg, routed), stream=stream(),
        )


def nothing(device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Stands for a tensor that a kernel does not read."""
    return torch.zeros(1, dtype=dtype, device=device)


def down(
    atoms: Atoms, h: Quantised, weights: Weights, routed: Routed, recipe: Recipe,
    out: Tensor, kind: RowsOut,
) -> Tensor:
    """gemm2 and combine with what lies between them of a kind."""
    problem = routed.problem
    if kind is RowsOut.SUMS:
        sums = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
        multiply_down(atoms, h, weights, routed, recipe, kind, sums)
        return out.copy_(sums)
    if kind is RowsOut.CODES:
        shape = problem.routes, problem.hidden
        # Codes of skipped routes are zero, their scales anything finite.
        codes = torch.zeros((shape[0], shape[1] // 4), dtype=torch.int32, device=out.device)
        scales = torch.ones(
            (shape[0], shape[1] // SCALE_BLOCK), dtype=torch.uint8, device=out.device
        )
        multiply_down(atoms, h, weights, routed, recipe, kind, codes, scales)
        return reduce(codes, scales, routed, recipe, out)
    return combine(gemm2(atoms, h, weights, routed, recipe), routed, recipe, out)


def layer(
    atoms: Atoms, x: Tensor, weights: Weights, topk_ids: Tensor, topk_weights: Tensor,
    recipe: Recipe, out: Tensor, expert_map: Tensor | None, deterministic: bool,
) -> Tensor:
    """All stages; stage 2 may leave something else than rows."""
    problem = Problem(x.shape[0], weights.H, weights.I, weights.E, topk_ids.shape[1])
    routed = route(topk_ids, topk_weights, problem, expert_map, None)
    h = gemm1(atoms, quantise(atoms, x, weights, routed, recipe), weights, routed, recipe)
    kind = RowsOut.ROWS
    if scaled(atoms, recipe):
        kind = choose.rows_for(problem, routed.block, deterministic)
    return down(atoms, h, weights, routed, recipe, out, kind)


def combine(rows: Tensor, routed: Routed, recipe: Recipe, out: Tensor) -> Tensor:
    """Weighted sum of each token's rows."""
    return reduce(rows, None, routed, recipe, out)


def reduce(
    rows: Tensor, row_scales: Tensor | None, routed: Routed, recipe: Recipe, out: Tensor
) -> Tensor:
    """Weighted sum of each token's rows, or of their codes under scales."""
    problem = routed.problem
    if problem.tokens:
        coded = row_scales is not None
        weights = routing.route_weights(routed)
        launch = combine_kernels.build(
            fx.Int32 if coded else NUMERIC[rows.dtype], NUMERIC[out.dtype], problem.topk,
            recipe.weight_on == 2, coded,
        )
        per_group = combine_kernels.COLUMNS * THREADS
        flat = out.as_strided((out.stride(0) * (problem.tokens - 1) + problem.hidden,), (1,))
        scales = nothing(out.device, torch.uint8) if row_scales is None else row_scales.view(-1)
        launch(
            flat, rows.view(-1), scales, weights, problem.tokens, problem.hidden, out.stride(0),
            -(-problem.tokens * problem.hidden // per_group), stream=stream(),
        )
    return out
