"""The schedule for many rows per expert: packed mxfp4 weights, FP8-like activations.

    route, x to fp8 rows -> work lists of both stages -> stage 1 (h bf16, sorted order)
          -> h to fp8 rows -> stage 2 and the sum: `gemm2_red_sum` or, for many tokens,
             `gemm2_prefill` (short K), or `gemm2_rows`; `gemm2_red` (short K) where the sum need
             not be deterministic

Inside the layer h stays in sorted order, the order in which stage 2 loads it. Tokens beyond `CHUNK`
go through in several passes: what stage 2 keeps on the chip grows with the tokens, while a pass
costs little, because its weights are read behind the tensor cores' time. Where rows of h are too
long to be kept, a pass is longer.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mixmoe.backends.hopper import (
    gemm1_prefill,
    gemm2_prefill,
    gemm2_red,
    gemm2_red_sum,
    gemm2_rows,
)
from mixmoe.backends.hopper import quantise as quantise_stage
from mixmoe.backends.hopper import route as route_stage
from mixmoe.backends.hopper.decode import multiprocessors
from mixmoe.backends.hopper.gemm2_prefill import COMPILES, Ring
from mixmoe.backends.hopper.gemm2_red import Red
from mixmoe.backends.hopper.gemm2_red_sum import Sums
from mixmoe.backends.hopper.prefill_cut import Cut, is_precise
from mixmoe.backends.hopper.quantise import slot_rows
from mixmoe.backends.hopper.route import Placed
from mixmoe.backends.hopper.slots import SlotRows
from mixmoe.backends.hopper.worklist import (
    ROUTE_BLOCK,
    Segments,
    Tiles,
    tiles,
    tiles_by_expert,
    work_lists,
)
from mixmoe.formats import Quantised
from mixmoe.spec import Problem, Recipe, Weights

if TYPE_CHECKING:
    from mixmoe.backends.hopper.schedule import Call

CHUNK = 8192  # tokens of a pass, at most
# The same for rows of h that are too long for the chip: more tokens fill tiles better (H200,
# 2026-11-28, gpt-oss T 16384, layer, one pass / two: 3858 / 4070 us; skewed routing 4075 / 5158).
LONG_CHUNK = 4 * CHUNK
# Routes per expert from which tensor-core tiles beat the decode streams. At 16 they are even, and h
# in float32 decides (H100, 2026-11-28, layer, us: gpt-oss 657 / 658, DeepSeek-V3 EP 289 / 292).
MEAN = 17
# Tokens from which stage 2 goes through the ring of `gemm2_prefill`; twice as many where there are
# more experts than CTAs (H200, 2026-11-28, us, ring / `gemm2_red_sum`: DeepSeek-V3 TP8 T 1024 139 /
# 123, 1280 142 / 142, 1536 150 / 166; Kimi-K2 TP8 T 2048 252 / 240, 3072 305 / 332).
RING_FROM = 1281


def suits(problem: Problem) -> bool:
    """Whether experts have rows enough for tensor-core tiles."""
    return problem.routes >= MEAN * problem.experts


def ring_of(problem: Problem, device: torch.device) -> Ring | None:
    """How the ring is cut; None where it does not fit or compile, and where `gemm2_red_sum` is
    faster."""
    crowded = problem.experts > 2 * multiprocessors(device)
    if not COMPILES or problem.tokens < RING_FROM * (2 if crowded else 1):
        return None
    return Ring.of(problem, device)


def pass_of(problem: Problem, device: torch.device, deterministic: bool = True) -> int:
    """Tokens of a pass: LONG_CHUNK where stage 2 keeps nothing on the chip, as far as 32 bits count
    the values of h; half of CHUNK where the ring holds that and not more (Qwen3 TP4, T 8192, layer,
    H200, 2026-11-28: 871 us in two passes, 912 in one with stored rows)."""
    if Red.of(problem) is None:
        return max(1, min(LONG_CHUNK, (1 << 30) // (problem.topk * problem.intermediate)))
    half = CHUNK // 2
    if deterministic and problem.tokens > half:
        whole = replace(problem, tokens=min(CHUNK, problem.tokens))
        if not ring_of(whole, device) and ring_of(replace(problem, tokens=half), device):
            return half
    return CHUNK


def sums_of(problem: Problem, device: torch.device) -> Sums | None:
    """How `gemm2_red_sum` is cut; None where `gemm2_rows` makes rows and a kernel adds them."""
    return Sums.of(problem, device)


def cut_tiles(
    routed: Placed, recipe: Recipe, whole: Problem | None = None
) -> tuple[Cut, Tiles]:
    """How stage 1 is cut, and its work list. whole: the call that this is a pass of."""
    cut = Cut.of(routed.problem, is_precise(recipe.accumulate, whole or routed.problem))
    return cut, tiles(routed, cut.main, cut.extra)


@dataclass(frozen=True, slots=True)
class Prefill:
    """Tensor-core tiles over experts; routes sorted in blocks of 32."""

    def gemm1(self, x: Quantised, weights: Weights, routed: Placed, recipe: Recipe) -> Quantised:
        """h in the recipe's format, a row per route."""
        h = self.stage1(slot_rows(x), weights, routed, recipe, *cut_tiles(routed, recipe))
        return quantise_stage.quantise(
            h, recipe.activation, recipe.rounding, routed.position, gather=True
        )

    def stage1(
        self, x: SlotRows, weights: Weights, routed: Placed, recipe: Recipe, cut: Cut, work: Tiles,
        clear: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """h in bf16, a row per sorted position; padding rows are not written. Zeroes `clear`."""
        shape = (routed.sorted_token_ids.shape[0], routed.problem.intermediate)
        h = torch.empty(shape, dtype=torch.bfloat16, device=x.codes.device)
        return gemm1_prefill.launch(
            x, weights.w13, weights.w13_bias, routed, work, recipe, cut, h, clear  # type: ignore[arg-type]
        )

    def gemm2(self, h: Quantised, weights: Weights, routed: Placed, recipe: Recipe) -> Tensor:
        """The down GEMM, a row per route, unweighted."""
        cut, work = cut_tiles(routed, recipe)
        rows = gemm2_rows.product(
            self.sorted_rows(h, routed), weights.w2, weights.w2_bias, routed, work, cut  # type: ignore[arg-type]
        )
        return rows[routed.position.clamp_min(0).long()].to(recipe.out_dtype)

    def down(
        self, h: Quantised, weights: Weights, routed: Placed, recipe: Recipe, out: Tensor,
        deterministic: bool = True,
    ) -> Tensor:  # fmt: skip
        """gemm2 and combine of rows in route order."""
        rows = self.sorted_rows(h, routed)
        red = None if deterministic else red_of(routed.problem, out)
        if red is None:
            return self.stage2(rows, weights, routed, recipe, out)
        return self.add(rows, weights, routed, recipe, red, out.zero_())

    def sorted_rows(self, h: Quantised, routed: Placed) -> SlotRows:
        """FP8 rows of h in sorted order; padding repeats a row."""
        rows, p = slot_rows(h), routed.problem
        ids = routed.sorted_token_ids
        route = ((ids & 0xFFFFFF) * p.topk + (ids >> 24)).clamp_max(p.routes - 1).long()
        codes = rows.codes.view(torch.uint8)[route].view(torch.float8_e4m3fn)
        return SlotRows(codes, rows.scales[route])

    def stage2(
        self, h: SlotRows, weights: Weights, routed: Placed, recipe: Recipe, out: Tensor,
        work: tuple[Cut, Tiles] | None = None, segments: Segments | None = None,
        others: Tiles | None = None,
    ) -> Tensor:  # fmt: skip
        """Stage 2 and the sum, h in sorted order; the lists, where they are there already."""
        p = routed.problem
        ring = ring_of(p, out.device)
        if ring is not None:
            return gemm2_prefill.launch(
                h, weights.w2, weights.w2_bias, routed, recipe, ring, out, segments  # type: ignore[arg-type]
            )
        sums = sums_of(p, out.device)
        if sums is not None:
            if others is None:
                others = tiles_by_expert(routed, sums.red.main, sums.counters(p))
            return gemm2_red_sum.launch(
                h, weights.w2, weights.w2_bias, routed, others, recipe, sums, out  # type: ignore[arg-type]
            )
        cut, tiled = cut_tiles(routed, recipe) if work is None else work
        return gemm2_rows.launch(
            h, weights.w2, weights.w2_bias, routed, tiled, recipe, cut, out  # type: ignore[arg-type]
        )

    def add(
        self, h: SlotRows, weights: Weights, routed: Placed, recipe: Recipe, red: Red, out: Tensor,
        work: Tiles | None = None,
    ) -> Tensor:  # fmt: skip
        """Stage 2 and the sum by atomics, into zeros."""
        work = tiles_by_expert(routed, red.main) if work is None else work
        return gemm2_red.launch(
            h, weights.w2, weights.w2_bias, routed, work, recipe, red, out  # type: ignore[arg-type]
        )

    def layer(self, call: "Call", out: Tensor) -> Tensor:
        """Everything, from x and topk_ids to out, a pass after the other."""
        tokens = pass_of(call.problem, call.x.device, call.deterministic)
        for first in range(0, call.problem.tokens, tokens):
            self.chunk(call, slice(first, first + tokens), out)
        return out

    def chunk(self, call: "Call", part: slice, out: Tensor) -> None:
        """The layer for some of the tokens."""
        recipe, weights, x, y = call.recipe, call.weights, call.x[part], out[part]
        p = call.problem
        p = Problem(x.shape[0], p.hidden, p.intermediate, p.experts, p.topk)
        rows = quantise_stage.empty_rows(p.tokens, p.hidden, x.device)
        writer = quantise_stage.FP8_WRITERS[recipe.activation.name]
        up = quantise_stage.round_up_from(recipe.activation, recipe.rounding)
        riders = route_stage.Rows(x, rows.codes, rows.scales, rows.codes.shape[1], writer, up)
        beside = p.routes > route_stage.FEW  # x is quantised beside routing and the lists
        routed = route_stage.route(
            call.topk_ids[part], call.topk_weights[part], p, ROUTE_BLOCK, call.expert_map,
            None if beside else riders,
        )  # fmt: skip
        cut = Cut.of(p, is_precise(recipe.accumulate, call.problem))
        red = None if call.deterministic else red_of(p, y)
        ring = ring_of(p, x.device) if red is None else None
        sums = sums_of(p, x.device) if red is None and ring is None else None
        other = red or (sums.red if sums else None)
        lists = work_lists(
            routed, cut.main, cut.extra, other.main if other else 0,
            ring.split(p) if ring else None, sums.counters(p) if sums else 0,
        )  # fmt: skip
        assert lists.tiles is not None
        if beside:
            riders.write()
        h = self.stage1(rows, weights, routed, recipe, cut, lists.tiles, y if red else None)
        rows = quantise_stage.quantise_fp8(h, recipe.activation, recipe.rounding)
        if red is not None:
            self.add(rows, weights, routed, recipe, red, y, lists.others)
        else:
            tiled = cut, lists.tiles
            self.stage2(rows, weights, routed, recipe, y, tiled, lists.segments, lists.others)


def red_of(problem: Problem, out: Tensor) -> Red | None:
    """How stage 2 adds by atomics; None where its kernel cannot, or is not the faster one."""
    plain = out.is_contiguous() and out.dtype == torch.bfloat16
    return Red.of(problem) if plain else None


PREFILL = Prefill()
