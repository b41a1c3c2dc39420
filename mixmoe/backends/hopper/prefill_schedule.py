"""The schedule for many rows per expert: packed mxfp4 weights, FP8-like activations.

    route -> x to fp8 rows -> tiles -> stage 1 (h bf16, sorted order) -> h to fp8 rows
          -> stage 2 and the sum: `gemm2_prefill` (short K) or `gemm2_rows`

Inside the layer h stays in sorted order, the order in which stage 2 loads it. Tokens beyond `CHUNK`
go through in several passes: what stage 2 keeps on the chip grows with the tokens, while a pass
costs little, because its weights are read behind the tensor cores' time.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mixmoe.backends.hopper import gemm1_prefill, gemm2_prefill, gemm2_rows
from mixmoe.backends.hopper import quantise as quantise_stage
from mixmoe.backends.hopper import route as route_stage
from mixmoe.backends.hopper.quantise import slot_rows
from mixmoe.backends.hopper.route import Placed
from mixmoe.backends.hopper.slots import SlotRows
from mixmoe.backends.hopper.worklist import EXTRA, ROUTE_BLOCK, Cut, Tiles, tiles
from mixmoe.formats import Quantised
from mixmoe.spec import Problem, Recipe, Weights

if TYPE_CHECKING:
    from mixmoe.backends.hopper.schedule import Call

CHUNK = 8192  # tokens of a pass
MEAN = 24  # routes per expert from which tiles beat the decode streams


def suits(problem: Problem) -> bool:
    """Whether experts have rows enough for tensor-core tiles."""
    return problem.routes >= MEAN * problem.experts


def cut_tiles(routed: Placed, recipe: Recipe) -> tuple[Cut, Tiles]:
    """How stage 1 is cut, and its work list."""
    cut = Cut.of(routed.problem, recipe.accumulate == "precise")
    return cut, tiles(routed, cut.main, EXTRA)


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
        self, x: SlotRows, weights: Weights, routed: Placed, recipe: Recipe, cut: Cut, work: Tiles
    ) -> Tensor:
        """h in bf16, a row per sorted position; padding rows are not written."""
        shape = (routed.sorted_token_ids.shape[0], routed.problem.intermediate)
        h = torch.empty(shape, dtype=torch.bfloat16, device=x.codes.device)
        return gemm1_prefill.launch(
            x, weights.w13, weights.w13_bias, routed, work, recipe, cut, h  # type: ignore[arg-type]
        )

    def gemm2(self, h: Quantised, weights: Weights, routed: Placed, recipe: Recipe) -> Tensor:
        """The down GEMM, a row per route, unweighted."""
        cut, work = cut_tiles(routed, recipe)
        rows = gemm2_rows.product(
            self.sorted_rows(h, routed), weights.w2, weights.w2_bias, routed, work, cut  # type: ignore[arg-type]
        )
        return rows[routed.position.clamp_min(0).long()].to(recipe.out_dtype)

    def down(
        self, h: Quantised, weights: Weights, routed: Placed, recipe: Recipe, out: Tensor
    ) -> Tensor:
        """gemm2 and combine of rows in route order."""
        return self.stage2(self.sorted_rows(h, routed), weights, routed, recipe, out)

    def sorted_rows(self, h: Quantised, routed: Placed) -> SlotRows:
        """FP8 rows of h in sorted order; padding repeats a row."""
        rows, p = slot_rows(h), routed.problem
        ids = routed.sorted_token_ids
        route = ((ids & 0xFFFFFF) * p.topk + (ids >> 24)).clamp_max(p.routes - 1).long()
        codes = rows.codes.view(torch.uint8)[route].view(torch.float8_e4m3fn)
        return SlotRows(codes, rows.scales[route])

    def stage2(
        self, h: SlotRows, weights: Weights, routed: Placed, recipe: Recipe, out: Tensor,
        work: tuple[Cut, Tiles] | None = None,
    ) -> Tensor:  # fmt: skip
        """Stage 2 and the sum, h in sorted order."""
        ring = gemm2_prefill.Ring.of(routed.problem, out.device)
        if ring is not None:
            return gemm2_prefill.launch(
                h, weights.w2, weights.w2_bias, routed, recipe, ring, out  # type: ignore[arg-type]
            )
        cut, tiled = cut_tiles(routed, recipe) if work is None else work
        return gemm2_rows.launch(
            h, weights.w2, weights.w2_bias, routed, tiled, recipe, cut, out  # type: ignore[arg-type]
        )

    def layer(self, call: "Call", out: Tensor) -> Tensor:
        """Everything, from x and topk_ids to out, CHUNK tokens at a time."""
        for first in range(0, call.problem.tokens, CHUNK):
            self.chunk(call, slice(first, first + CHUNK), out)
        return out

    def chunk(self, call: "Call", part: slice, out: Tensor) -> None:
        """The layer for some of the tokens."""
        recipe, weights, x = call.recipe, call.weights, call.x[part]
        p = call.problem
        p = Problem(x.shape[0], p.hidden, p.intermediate, p.experts, p.topk)
        routed = route_stage.route(
            call.topk_ids[part], call.topk_weights[part], p, ROUTE_BLOCK, call.expert_map
        )
        rows = quantise_stage.quantise_fp8(x, recipe.activation, recipe.rounding)
        cut, work = cut_tiles(routed, recipe)
        h = self.stage1(rows, weights, routed, recipe, cut, work)
        codes = quantise_stage.quantise_fp8(h, recipe.activation, recipe.rounding)
        self.stage2(codes, weights, routed, recipe, out[part], (cut, work))


PREFILL = Prefill()
