"""The stages as the protocol names them: choose the schedule, run its part."""

from torch import Tensor

from mixmoe.backends.hopper import choose
from mixmoe.backends.hopper import combine as combine_stage
from mixmoe.backends.hopper import quantise as quantise_stage
from mixmoe.backends.hopper import route as route_stage
from mixmoe.backends.hopper.grouped import zeroed
from mixmoe.backends.hopper.operands import operand, order_of, stored
from mixmoe.backends.hopper.route import placed
from mixmoe.backends.hopper.schedule import Call, is_fp8_like, quantised, schedule_for
from mixmoe.errors import MixMoEError
from mixmoe.fold import narrowest_fold
from mixmoe.formats import Quantised, ScaleKind
from mixmoe.preshuffle import Packed
from mixmoe.spec import Problem, Recipe, Routed, Weights


def prepare(weights: Weights, recipe: Recipe) -> Weights:
    """Packed for the FP8 tensor rate where recipe and weights allow it exactly, else plain rows.

    mxfp4 weights whose rows fold (E8M0 exponents of a row within 14) are packed once, in 4.25 bits,
    for every count of tokens. A 16-bit recipe, and a row that does not fold, keeps plain rows.
    """
    if isinstance(weights.w13, Packed) or isinstance(weights.w2, Packed):
        check_orders(weights)
        return weights
    if not is_fp8_like(recipe.activation) or weights.format.name != "mxfp4":
        return weights
    gate_up, down = narrowest_fold(weights.w13), narrowest_fold(weights.w2)
    if gate_up is None or down is None:
        return weights
    return weights.packed(order_of(gate_up, True), order_of(down, False))


def check_orders(weights: Weights) -> None:
    """Refuse weights in an order no kernel here reads."""
    stored(weights.w13, gate_up=True)
    stored(weights.w2, gate_up=False)


def check_formats(recipe: Recipe, weights: Weights) -> None:
    """Refuse formats that no kernel reads or writes, and scale groups no K step fits."""
    if recipe.activation.scale is not ScaleKind.NONE:
        quantise_stage.writer_of(recipe.activation)
    for fmt in (recipe.activation, weights.w13.format, weights.w2.format):
        step = operand(fmt).step_of(128)
        if step < 32:
            raise MixMoEError("a scale group holds a multiple of 32 columns", fmt.cols, 32)


def route(
    topk_ids: Tensor, topk_weights: Tensor, problem: Problem, expert_map: Tensor | None,
    block: int | None,
) -> Routed:  # fmt: skip
    """Blocks of ``block`` routes, the chooser's if None."""
    block = choose.check_block(choose.block_for(problem) if block is None else block)
    return route_stage.route(topk_ids, topk_weights, problem, block, expert_map)


def quantise(x: Tensor, weights: Weights, routed: Routed, recipe: Recipe) -> Quantised:
    """x in the activation format."""
    return quantised(x, weights, placed(routed), recipe)


def gemm1(x: Quantised, weights: Weights, routed: Routed, recipe: Recipe) -> Quantised:
    """Stage 1; a row per route, zeros for skipped ones."""
    schedule = schedule_for(recipe, weights, routed.problem, routed.block)
    h = schedule.gemm1(x, weights, placed(routed), recipe)
    if h.scales is None:
        zeroed(h.codes, placed(routed).position)
    return h


def gemm2(h: Quantised, weights: Weights, routed: Routed, recipe: Recipe) -> Tensor:
    """Stage 2; a row per route, zeros for skipped ones."""
    schedule = schedule_for(recipe, weights, routed.problem, routed.block)
    rows = schedule.gemm2(h, weights, placed(routed), recipe)
    return zeroed(rows, placed(routed).position)


def down(
    h: Quantised, weights: Weights, routed: Routed, recipe: Recipe, out: Tensor,
    deterministic: bool,
) -> Tensor:  # fmt: skip
    """Stage 2 and the sum over a token's routes."""
    schedule = schedule_for(recipe, weights, routed.problem, routed.block)
    return schedule.down(h, weights, placed(routed), recipe, out, deterministic)


def combine(rows: Tensor, routed: Routed, recipe: Recipe, out: Tensor) -> Tensor:
    """Weighted sum of a token's rows."""
    return combine_stage.combine(rows, placed(routed), recipe.weight_on, out)


def layer(
    x: Tensor, weights: Weights, topk_ids: Tensor, topk_weights: Tensor, recipe: Recipe,
    out: Tensor, expert_map: Tensor | None, deterministic: bool,
) -> Tensor:  # fmt: skip
    """The pipeline, fused as its schedule can."""
    problem = Problem(x.shape[0], weights.H, weights.I, weights.E, topk_ids.shape[1])
    call = Call(x, weights, topk_ids, topk_weights, expert_map, recipe, problem, deterministic)
    schedule = schedule_for(recipe, weights, problem, choose.block_for(problem))
    return schedule.layer(call, out)
