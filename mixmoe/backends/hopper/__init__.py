"""The Hopper backend: checks, chooses tiles, allocates, launches. No maths here.

Kernels are imported when they are first needed, so that this module can be asked why it cannot run
on a machine without Triton or without a GPU.
"""

from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mixmoe.errors import MixMoEError
from mixmoe.formats import Quantised
from mixmoe.spec import Problem, Recipe, Routed, Weights

ROW_LIMIT = 32768  # columns of a row that one CTA quantises in registers
GRID_LIMIT = (1 << 31) - 1


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Launch on the operands' GPU, whichever is current."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class HopperBackend:
    """Grouped GEMMs for sm_90a; ``mixmoe.backends`` states what each stage takes and gives."""

    name = "hopper"

    def unavailable(self) -> str | None:
        """No GPU, a GPU that is not sm_90, or no Triton."""
        if not torch.cuda.is_available():
            return "torch sees no NVIDIA GPU"
        major, minor = torch.cuda.get_device_capability()
        if (major, minor) != (9, 0):
            return f"the GPU is sm_{major}{minor}, the kernels are for sm_90a (H100, H200)"
        if find_spec("triton") is None:
            return "triton is not installed (pip install '.[hopper]')"
        return None

    @property
    def kernels(self) -> ModuleType:
        """The module of stage functions; importing it imports Triton."""
        from mixmoe.backends.hopper import stages

        return stages

    def prepare(self, weights: Weights, recipe: Recipe) -> Weights:
        """mxfp4 for FP8-like activations in fragment order, everything else in plain rows."""
        return self.kernels.prepare(weights, recipe)

    def check(self, recipe: Recipe, weights: Weights, problem: Problem) -> None:
        """Formats the tensor cores lack, orders the kernels do not read, sizes past a limit."""
        self.kernels.check_formats(recipe, weights)
        self.kernels.check_orders(weights)
        for name, size in (("H", problem.hidden), ("I", problem.intermediate)):
            if size > ROW_LIMIT:
                rule = f"hopper quantises rows of up to {ROW_LIMIT} columns: {name}"
                raise MixMoEError(rule, size, ROW_LIMIT)
        most = problem.routes * max(-(-problem.hidden // 64), -(-problem.intermediate // 32))
        if most > GRID_LIMIT:
            raise MixMoEError("more tiles than a grid holds: split the tokens", most, GRID_LIMIT)

    def route(
        self,
        topk_ids: Tensor,
        topk_weights: Tensor,
        problem: Problem,
        expert_map: Tensor | None = None,
        block: int | None = None,
    ) -> Routed:
        """Sort on the device; ``block`` is a power of two, by default about an expert's routes."""
        with on(topk_ids.device):
            return self.kernels.route(topk_ids, topk_weights, problem, expert_map, block)

    def quantise(self, x: Tensor, weights: Weights, routed: Routed, recipe: Recipe) -> Quantised:
        """A row per token; a row per route for int8_smooth."""
        with on(x.device):
            return self.kernels.quantise(x, weights, routed, recipe)

    def gemm1(self, x: Quantised, weights: Weights, routed: Routed, recipe: Recipe) -> Quantised:
        """Gate and up GEMM, activation, requantisation; rows of skipped routes are zero."""
        with on(x.device):
            return self.kernels.gemm1(x, weights, routed, recipe)

    def gemm2(self, h: Quantised, weights: Weights, routed: Routed, recipe: Recipe) -> Tensor:
        """Down GEMM in ``recipe.out_dtype``; rows of skipped routes are zero."""
        with on(h.device):
            return self.kernels.gemm2(h, weights, routed, recipe)

    def combine(
        self, rows: Tensor, routed: Routed, recipe: Recipe, out: Tensor, deterministic: bool = True
    ) -> Tensor:
        """Weighted sum in slot order, float32, rounded once."""
        with on(rows.device):
            return self.kernels.combine(rows, routed, recipe, out)

    def down(
        self,
        h: Quantised,
        weights: Weights,
        routed: Routed,
        recipe: Recipe,
        out: Tensor,
        deterministic: bool = True,
    ) -> Tensor:
        """gemm2 and combine, fused where the schedule can: ``out (T, H)``.

        ``deterministic=False``: long prefills add a token's rows by atomics, in any order.
        """
        with on(h.device):
            return self.kernels.down(h, weights, routed, recipe, out, deterministic)

    def layer(
        self,
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
        """All five stages with the fusions that a stage boundary forbids; see :meth:`down`."""
        with on(x.device):
            return self.kernels.layer(
                x, weights, topk_ids, topk_weights, recipe, out, expert_map, deterministic
            )


def hopper() -> HopperBackend:
    """The registry's maker."""
    return HopperBackend()
