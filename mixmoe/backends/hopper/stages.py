"""The five stages as the protocol names them: which kernel, which tile, which buffers."""

from torch import Tensor

from mixmoe.backends.hopper import choose
from mixmoe.backends.hopper import combine as combine_stage
from mixmoe.backends.hopper import gemm1 as gemm1_stage
from mixmoe.backends.hopper import gemm2 as gemm2_stage
from mixmoe.backends.hopper import quantise as quantise_stage
from mixmoe.backends.hopper import route as route_stage
from mixmoe.backends.hopper.grouped import zeroed
from mixmoe.backends.hopper.operands import operand
from mixmoe.backends.hopper.route import Placed, placed
from mixmoe.errors import MixMoEError
from mixmoe.formats import Format, Quantised, ScaleKind
from mixmoe.spec import Problem, Recipe, Routed, Tile, Weights


def check_formats(recipe: Recipe, weights: Weights) -> None:
    """Refuse formats that no kernel reads or writes, and scale groups no K step fits."""
    if recipe.activation.scale is not ScaleKind.NONE:
        quantise_stage.writer_of(recipe.activation)
    for fmt in (recipe.activation, weights.w13.format, weights.w2.format):
        step = operand(fmt).step_of(128)
        if step < 32:
            raise MixMoEError("a scale group holds a multiple of 32 columns", fmt.cols, 32)


def tile_for(problem: Problem, number: int, recipe: Recipe, weight: Format, block: int) -> Tile:
    """The general path's tile of one stage."""
    gemm = choose.stage(problem, number, recipe.activation, weight, recipe.accumulate)
    return choose.choose(gemm, block)


def route(
    topk_ids: Tensor, topk_weights: Tensor, problem: Problem, expert_map: Tensor | None,
    block: int | None,
) -> Routed:  # fmt: skip
    """Blocks of ``block`` routes, the chooser's if None."""
    block = choose.block_for(problem) if block is None else block
    if block & (block - 1):
        raise MixMoEError("hopper's sort block is a power of two", block, 1 << block.bit_length())
    return route_stage.route(topk_ids, topk_weights, problem, block, expert_map)


def quantise(x: Tensor, weights: Weights, routed: Routed, recipe: Recipe) -> Quantised:
    """x in the activation format."""
    if recipe.activation.name == "int8_smooth":
        assert weights.w13_smooth is not None
        p = placed(routed)
        return quantise_stage.quantise_routes(
            x, recipe.activation, weights.w13_smooth, p.sorted_expert_ids, p.position, p.block
        )
    return quantise_stage.quantise(x, recipe.activation, recipe.rounding)


def gemm1(x: Quantised, weights: Weights, routed: Routed, recipe: Recipe) -> Quantised:
    """Stage 1; a row per route, zeros for skipped ones."""
    h = stage1(x, weights, placed(routed), recipe)
    if h.scales is None:
        zeroed(h.codes, placed(routed).position)
    return h


def gemm2(h: Quantised, weights: Weights, routed: Routed, recipe: Recipe) -> Tensor:
    """Stage 2; a row per route, zeros for skipped ones."""
    return zeroed(stage2(h, weights, placed(routed), recipe), placed(routed).position)


def stage1(x: Quantised, weights: Weights, routed: Placed, recipe: Recipe) -> Quantised:
    """Stage 1, skipped rows undefined where h is 16-bit."""
    tile = tile_for(routed.problem, 1, recipe, weights.w13.format, routed.block)
    return gemm1_stage.gemm1(x, weights, routed, recipe, tile)


def stage2(h: Quantised, weights: Weights, routed: Placed, recipe: Recipe) -> Tensor:
    """Stage 2, skipped rows undefined."""
    tile = tile_for(routed.problem, 2, recipe, weights.w2.format, routed.block)
    return gemm2_stage.gemm2(h, weights, routed, recipe, tile)


def combine(rows: Tensor, routed: Routed, recipe: Recipe, out: Tensor) -> Tensor:
    """Weighted sum of a token's rows."""
    return combine_stage.combine(rows, placed(routed), recipe.weight_on, out)


def route_and_quantise(
    x: Tensor, topk_ids: Tensor, topk_weights: Tensor, problem: Problem, block: int,
    weights: Weights, recipe: Recipe, expert_map: Tensor | None,
) -> tuple[Placed, Quantised]:  # fmt: skip
    """Both in one launch where the routes are few and the codes need no routing."""
    fmt = recipe.activation
    fuses = fmt.scale is not ScaleKind.NONE and fmt.name != "int8_smooth"
    if not fuses or problem.routes > route_stage.SMALL or not problem.tokens:
        routed = route_stage.route(topk_ids, topk_weights, problem, block, expert_map)
        return routed, quantise(x, weights, routed, recipe)
    fmt.check_columns(problem.hidden)
    codes, scales = quantise_stage.empty_codes(fmt, problem.tokens, problem.hidden, x.device)
    up = quantise_stage.round_up_from(fmt, recipe.rounding)
    rows = route_stage.Rows(x, codes, scales, quantise_stage.writer_of(fmt), up)
    routed = route_stage.route(topk_ids, topk_weights, problem, block, expert_map, rows)
    return routed, Quantised(codes, scales, fmt)


def layer(
    x: Tensor, weights: Weights, topk_ids: Tensor, topk_weights: Tensor, recipe: Recipe,
    out: Tensor, expert_map: Tensor | None, deterministic: bool,
) -> Tensor:  # fmt: skip
    """The pipeline with routing and quantisation in one launch and no row zeroed for nothing."""
    problem = Problem(x.shape[0], weights.H, weights.I, weights.E, topk_ids.shape[1])
    block = choose.block_for(problem)
    routed, xq = route_and_quantise(
        x, topk_ids, topk_weights, problem, block, weights, recipe, expert_map
    )
    h = stage1(xq, weights, routed, recipe)
    rows = stage2(h, weights, routed, recipe)
    return combine_stage.combine(rows, routed, recipe.weight_on, out)
