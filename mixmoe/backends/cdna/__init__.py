"""The CDNA backend: AMD MI300X (gfx942), MI350X and MI355X (gfx950), in FlyDSL.

``route`` is torch on the device; quantise, gemm1, gemm2 and combine are kernels. FlyDSL is imported
when a kernel is first needed, so that this module can say why it cannot run.
"""

from types import ModuleType

import torch
from torch import Tensor

from mixmoe.backends.cdna import prebuilt
from mixmoe.backends.cdna.absent import is_absent, stand_in
from mixmoe.errors import MixMoEError
from mixmoe.formats import Quantised
from mixmoe.spec import Problem, Recipe, Routed, Weights

ARCHITECTURES = ("gfx950", "gfx942")
CARDS = "an MI300X, MI350X or MI355X"


def architecture() -> str | None:
    """Name of the current AMD GPU's architecture, None where torch sees no AMD GPU."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    name = getattr(properties, "gcnArchName", None)
    return None if name is None else name.split(":")[0]


class CdnaBackend:
    """Grouped GEMMs for gfx942 and gfx950; ``mixmoe.backends`` states each stage's operands."""

    name = "cdna"

    def unavailable(self) -> str | None:
        """No AMD GPU, another architecture, or no FlyDSL."""
        arch = architecture()
        if arch is None:
            return f"torch sees no AMD GPU (needs a ROCm build of torch and {CARDS})"
        if arch not in ARCHITECTURES:
            return f"the GPU is {arch}, the kernels are for {', '.join(ARCHITECTURES)}"
        if is_absent() and not prebuilt.IN_USE:
            return "flydsl is not installed (pip install '.[cdna]') and no kernels are prebuilt"
        return None

    @property
    def kernels(self) -> ModuleType:
        """The module of stage functions; importing it imports FlyDSL, or its names alone where
        kernels built ahead of time are in use."""
        if prebuilt.IN_USE:
            stand_in()
        from mixmoe.backends.cdna import stages

        return stages

    @property
    def atoms(self):
        """The current GPU's record. Raises MixMoEError where there is none."""
        reason = self.unavailable()
        if reason is not None:
            raise MixMoEError(f"backend cdna cannot run here: {reason}", self.name, "backend='cpu'")
        return self.kernels.ARCHITECTURES[architecture()]

    def prepare(self, weights: Weights, recipe: Recipe) -> Weights:
        """w13 with gate and up interleaved every 16 rows, w2 in blocks of 16 rows, in the order of
        the current GPU's kernels (of gfx950's where there is no AMD GPU)."""
        known = self.kernels.ARCHITECTURES
        return self.kernels.prepare(known.get(architecture(), known["gfx950"]), weights, recipe)

    def check(self, recipe: Recipe, weights: Weights, problem: Problem) -> None:
        """Formats without a kernel, orders the kernels do not read, sizes past a limit."""
        self.kernels.check(self.atoms, recipe, weights, problem)

    def route(
        self,
        topk_ids: Tensor,
        topk_weights: Tensor,
        problem: Problem,
        expert_map: Tensor | None = None,
        block: int | None = None,
    ) -> Routed:
        """Sort without waiting for the device; ``block`` is a multiple of 16."""
        return self.kernels.route(topk_ids, topk_weights, problem, expert_map, block)

    def quantise(self, x: Tensor, weights: Weights, routed: Routed, recipe: Recipe) -> Quantised:
        """A row per token."""
        return self.kernels.quantise(self.atoms, x, weights, routed, recipe)

    def gemm1(self, x: Quantised, weights: Weights, routed: Routed, recipe: Recipe) -> Quantised:
        """Gate and up GEMM, activation, requantisation; rows of skipped routes are zero."""
        return self.kernels.gemm1(self.atoms, x, weights, routed, recipe)

    def gemm2(self, h: Quantised, weights: Weights, routed: Routed, recipe: Recipe) -> Tensor:
        """Down GEMM in ``recipe.out_dtype``; rows of skipped routes are zero."""
        return self.kernels.gemm2(self.atoms, h, weights, routed, recipe)

    def combine(
        self, rows: Tensor, routed: Routed, recipe: Recipe, out: Tensor, deterministic: bool = True
    ) -> Tensor:
        """Weighted sum in slot order, float32, rounded once."""
        return self.kernels.combine(rows, routed, recipe, out)

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
        """All five stages; ``deterministic=False`` may add rows atomically, in float32."""
        return self.kernels.layer(
            self.atoms, x, weights, topk_ids, topk_weights, recipe, out, expert_map, deterministic
        )


def cdna() -> CdnaBackend:
    """The registry's maker."""
    return CdnaBackend()
