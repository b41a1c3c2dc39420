"""Schedules: which kernels run a layer, and how the stages of one schedule fit together.

========  ===========================================================================
General   any recipe, weights in plain rows or packed; Triton kernels
Decode    FP8-like activations x packed mxfp4, few routes an expert: weight streams
Prefill   the same with many (:mod:`.prefill_schedule`): tensor-core tiles
========  ===========================================================================

FP8-like: fp8_token itself, mxfp8 and mxfp4 folded to one scale a row (:mod:`.quantise` states the
bound). Every schedule gives a row per route from the public stages, in the recipe's own format.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mixmoe.backends.hopper import (
    choose,
    gemm1,
    gemm1_decode,
    gemm1_token,
    gemm2,
    gemm2_decode,
    gemm2_long,
)
from mixmoe.backends.hopper import quantise as quantise_stage
from mixmoe.backends.hopper import route as route_stage
from mixmoe.backends.hopper.combine import combine
from mixmoe.backends.hopper.operands import PACKED
from mixmoe.backends.hopper.prefill_schedule import PREFILL, suits
from mixmoe.backends.hopper.quantise import slot_rows
from mixmoe.backends.hopper.route import Placed
from mixmoe.backends.hopper.slots import SlotRows
from mixmoe.backends.hopper.worklist import ROUTE_BLOCK
from mixmoe.formats import Format, Quantised, ScaleKind
from mixmoe.preshuffle import Packed
from mixmoe.spec import Problem, Recipe, Tile, Weights


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """The operands of one layer."""

    x: Tensor
    weights: Weights
    topk_ids: Tensor
    topk_weights: Tensor
    expert_map: Tensor | None
    recipe: Recipe
    problem: Problem
    deterministic: bool = True


class Schedule(Protocol):
    """One way to run the two GEMMs and what is around them."""

    def gemm1(self, x: Quantised, weights: Weights, routed: Placed, recipe: Recipe) -> Quantised:
        """h in the recipe's format, a row per route; skipped rows undefined where h is 16-bit."""

    def gemm2(self, h: Quantised, weights: Weights, routed: Placed, recipe: Recipe) -> Tensor:
        """The down GEMM, a row per route; skipped rows undefined."""

    def down(
        self, h: Quantised, weights: Weights, routed: Placed, recipe: Recipe, out: Tensor,
        deterministic: bool,
    ) -> Tensor:  # fmt: skip
        """gemm2 and combine; a schedule with no faster form ignores `deterministic` and is so."""

    def layer(self, call: Call, out: Tensor) -> Tensor:
        """Everything, from x and topk_ids to out."""


def is_fp8_like(fmt: Format) -> bool:
    """Whether rows of this activation format reach the tensor core as e4m3 with a row scale."""
    return fmt.name in quantise_stage.FP8_WRITERS


def route_with_codes(
    call: Call, block: int, codes: Tensor, scales: Tensor, pitch: int, writer: object
) -> Placed:
    """Route, and fill codes and scales of x in the same launch."""
    p, fmt = call.problem, call.recipe.activation
    up = quantise_stage.round_up_from(fmt, call.recipe.rounding)
    rows = route_stage.Rows(call.x, codes, scales, pitch, writer, up) if p.routes else None
    return route_stage.route(call.topk_ids, call.topk_weights, p, block, call.expert_map, rows)


@dataclass(frozen=True, slots=True)
class General:
    """Triton kernels for every recipe."""

    def gemm1(self, x: Quantised, weights: Weights, routed: Placed, recipe: Recipe) -> Quantised:
        """See :class:`Schedule`."""
        tile = choose.general(self.problem(routed.problem, 1, weights, recipe), routed.block)
        return gemm1.gemm1(x, weights, routed, recipe, tile)

    def gemm2(self, h: Quantised, weights: Weights, routed: Placed, recipe: Recipe) -> Tensor:
        """See :class:`Schedule`."""
        tile = choose.general(self.problem(routed.problem, 2, weights, recipe), routed.block)
        return gemm2.gemm2(h, weights, routed, recipe, tile)

    def problem(self, p: Problem, stage: int, weights: Weights, recipe: Recipe) -> choose.Gemm:
        """What the chooser is asked about."""
        fmt = (weights.w13 if stage == 1 else weights.w2).format
        return choose.stage(p, stage, recipe.activation, fmt, recipe.accumulate)

    def down(
        self, h: Quantised, weights: Weights, routed: Placed, recipe: Recipe, out: Tensor,
        deterministic: bool = True,
    ) -> Tensor:  # fmt: skip
        """See :class:`Schedule`."""
        return combine(self.gemm2(h, weights, routed, recipe), routed, recipe.weight_on, out)

    def layer(self, call: Call, out: Tensor) -> Tensor:
        """See :class:`Schedule`."""
        routed, x = self.start(call)
        h = self.gemm1(x, call.weights, routed, call.recipe)
        return self.down(h, call.weights, routed, call.recipe, out)

    def start(self, call: Call) -> tuple[Placed, Quantised]:
        """Routes and the quantised x."""
        p, fmt = call.problem, call.recipe.activation
        tiles = (choose.general(self.problem(p, s, call.weights, call.recipe)) for s in (1, 2))
        block = min(tile.tokens for tile in tiles)
        if fmt.scale is not ScaleKind.NONE and call.weights.w13_smooth is None:
            codes, scales = quantise_stage.empty_codes(fmt, p.tokens, p.hidden, call.x.device)
            writer = quantise_stage.writer_of(fmt)
            fmt.check_columns(p.hidden)
            routed = route_with_codes(call, block, codes, scales, p.hidden, writer)
            return routed, Quantised(codes, scales, fmt)
        routed = route_stage.route(call.topk_ids, call.topk_weights, p, block, call.expert_map)
        return routed, quantised(call.x, call.weights, routed, call.recipe)


@dataclass(frozen=True, slots=True)
class Decode:
    """Streams of packed mxfp4 weights; block sizes 1 to 32."""

    def gemm1(self, x: Quantised, weights: Weights, routed: Placed, recipe: Recipe) -> Quantised:
        """See :class:`Schedule`."""
        h = self.stage1(slot_rows(x), weights, routed, recipe)
        return quantise_stage.quantise(h, recipe.activation, recipe.rounding, routed.position)

    def stage1(self, x: SlotRows, weights: Weights, routed: Placed, recipe: Recipe) -> Tensor:
        """h in float32, a row per route; skipped rows undefined."""
        p = routed.problem
        h = torch.empty((p.routes, p.intermediate), dtype=torch.float32, device=x.codes.device)
        tile = choose.decode_stream(routed.block)
        return gemm1_decode.launch(x, weights, routed, recipe, tile, h)

    def gemm2(self, h: Quantised, weights: Weights, routed: Placed, recipe: Recipe) -> Tensor:
        """See :class:`Schedule`."""
        return self.rows(slot_rows(h), weights, routed, recipe)

    def rows(
        self, h: Tensor | SlotRows, weights: Weights, routed: Placed, recipe: Recipe,
        early: bool = False,
    ) -> Tensor:  # fmt: skip
        """Stage 2 of FP8 rows of h (float32 ones if short), a row per route; early: nothing but
        stage 1 and a quantisation stand between this and the routing."""
        p = routed.problem
        out = torch.empty((p.routes, p.hidden), dtype=recipe.out_dtype, device=weights.device)
        if isinstance(h, SlotRows) and p.intermediate > choose.RESIDENT_COLUMNS:
            tile = choose.decode_stream(routed.block)
            return gemm2_long.launch(h, weights, routed, recipe, tile, out, early)
        tile = choose.decode_rows(p, routed.block)
        return gemm2_decode.launch_rows(h, weights, routed, recipe, tile, out, early)

    def down(
        self, h: Quantised, weights: Weights, routed: Placed, recipe: Recipe, out: Tensor,
        deterministic: bool = True,
    ) -> Tensor:  # fmt: skip
        """See :class:`Schedule`."""
        return self.finish(slot_rows(h), weights, routed, recipe, out)

    def finish(
        self, h: Tensor | SlotRows, weights: Weights, routed: Placed, recipe: Recipe, out: Tensor,
        early: bool = False,
    ) -> Tensor:  # fmt: skip
        """Stage 2 and the sum over a token's routes, in one kernel where tokens are few."""
        p, sums = routed.problem, sums_of(routed, out)
        itself = (
            choose.quantises_rows(p, routed.block) if sums is None else choose.quantises_tokens(p)
        )
        if isinstance(h, Tensor) and not itself:
            fmt, position = recipe.activation, routed.position
            h = quantise_stage.quantise_fp8(h, fmt, recipe.rounding, position)
        if sums is None:
            rows = self.rows(h, weights, routed, recipe, early)
            return combine(rows, routed, recipe.weight_on, out, early=True)
        ids, topk_weights = routed.topk_ids, routed.topk_weights
        assert ids is not None and topk_weights is not None
        return gemm2_decode.launch_tokens(
            h, weights, ids, topk_weights.to(torch.float32), None, recipe, sums, out
        )

    def layer(self, call: Call, out: Tensor) -> Tensor:
        """See :class:`Schedule`."""
        p, fmt, recipe = call.problem, call.recipe.activation, call.recipe
        if is_few(call, out):
            return self.few(call, out)
        x = quantise_stage.empty_rows(p.tokens, p.hidden, call.x.device)
        routed = route_with_codes(
            call, choose.block_for(p), x.codes, x.scales, x.codes.shape[1],
            quantise_stage.FP8_WRITERS[fmt.name],
        )
        h: Tensor | SlotRows = self.stage1(x, call.weights, routed, recipe)
        if fmt.name != "fp8_token":  # fp8_token rows of h are quantised where stage 2 loads them
            assert isinstance(h, Tensor)
            h = quantise_stage.quantise_fp8(h, fmt, recipe.rounding, routed.position)
        return self.finish(h, call.weights, routed, recipe, out, early=True)

    def few(self, call: Call, out: Tensor) -> Tensor:
        """Very few tokens: no routing; stage 1 quantises x, stage 2 short h, and adds the experts
        up."""
        p, recipe = call.problem, call.recipe
        ids, shares = call.topk_ids.contiguous(), call.topk_weights.to(torch.float32).contiguous()
        rows = torch.empty((p.routes, p.intermediate), dtype=torch.float32, device=call.x.device)
        first, second = choose.few_tokens(p)
        gemm1_token.launch(call.x, call.weights, ids, shares, recipe, first, rows)
        h: Tensor | SlotRows = rows
        if not choose.quantises_tokens(p):
            h = quantise_stage.quantise_fp8(rows, recipe.activation, recipe.rounding)
        return gemm2_decode.launch_tokens(h, call.weights, ids, shares, None, recipe, second, out)


def sums_of(routed: Placed, out: Tensor) -> Tile | None:
    """The tile of the stage 2 that adds up a token's routes, if that one serves here.

    It takes the caller's ids and contiguous rows, and trusts an expert map's length.
    """
    if routed.topk_ids is None or routed.topk_weights is None or routed.expert_map is not None:
        return None
    return choose.decode_sums(routed.problem) if out.is_contiguous() else None


def is_few(call: Call, out: Tensor) -> bool:
    """Whether `Decode.few` serves this layer."""
    return (
        choose.is_few(call.problem)
        and call.recipe.activation.name == "fp8_token"
        and call.expert_map is None
        and choose.decode_sums(call.problem) is not None
        and call.x.is_contiguous()
        and out.is_contiguous()
    )


def quantised(x: Tensor, weights: Weights, routed: Placed, recipe: Recipe) -> Quantised:
    """x in the recipe's format: a row per token, per route where a smooth factor applies."""
    fmt = recipe.activation
    if fmt.name == "int8_smooth" and weights.w13_smooth is not None:
        return quantise_stage.quantise_routes(
            x, fmt, weights.w13_smooth, routed.sorted_expert_ids, routed.position, routed.block
        )
    return quantise_stage.quantise(x, fmt, recipe.rounding)


GENERAL, DECODE = General(), Decode()


def is_streamed(weights: Weights) -> bool:
    """Whether both matrices lie in the fragment orders of the FP8 kernels."""
    return all(isinstance(w, Packed) and w.order.name in PACKED for w in (weights.w13, weights.w2))


def schedule_for(recipe: Recipe, weights: Weights, problem: Problem, block: int) -> Schedule:
    """The schedule that serves these operands; ``block`` is how the routes are sorted."""
    choose.check_block(block)
    if not is_streamed(weights) or not is_fp8_like(recipe.activation) or block > ROUTE_BLOCK:
        return GENERAL
    if block == ROUTE_BLOCK and suits(problem):
        return PREFILL
    return DECODE
