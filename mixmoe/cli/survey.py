"""Every kernel that a layer launches on a CDNA GPU, with what it takes and what it does.

The backend's own stages run in a session that records: its tile chooser sees the true sizes, and
weights are room that nobody fills, tokens zeros. Then one workgroup of each kernel is
simulated. So a new recipe, tile or kernel shows here with no change.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mixmoe.cli.compiled import Compiled, recorded
from mixmoe.cli.loops import MainLoop, main_loop
from mixmoe.cli.simulated import session
from mixmoe.preshuffle import Packed, order_named
from mixmoe.shapes import Shape
from mixmoe.spec import Problem, Recipe, Weights


@dataclass(frozen=True, slots=True, eq=False)
class Kernel:
    """A kernel as a stage launched it: ``launch`` is the simulator's record of the first launch,
    ``tokens`` every T whose layer launches it, ``figures`` what one workgroup did."""

    stage: str
    compiled: Compiled
    launch: Any
    tokens: tuple[int, ...]
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The kernel's own name: its variant."""
        return self.compiled.name


@dataclass(frozen=True, slots=True)
class Layer:
    """What is asked of the backend: a shape, a recipe, and what is left to it by default: biases as
    the model has them, the weights' memory orders, the block of sorted routes, fields of the
    GEMMs' records (``tiles[stage]``), what stage 2 leaves (``rows``: a value of ``RowsOut``).
    ``deterministic=False``: as a caller may ask, where the order of sums is free."""

    shape: Shape
    recipe: Recipe
    bias: bool | None = None
    orders: tuple[str, str] | None = None
    block: int | None = None
    tiles: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    rows: str | None = None
    deterministic: bool = True


def survey(
    target: str,
    layer: Layer,
    tokens: Sequence[int],
    simulate: bool = True,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Kernel]:
    """Kernels of a layer for these token counts, in order of stage.

    Raises MixMoEError where the backend has no kernels for it.
    """
    kernels: dict[str, Kernel] = {}
    with (
        recorded() as compiled,
        session(target, run=False) as simulated,
        ExitStack() as stack,
    ):
        weights = placeholders(layer)
        stack.enter_context(forced(layer.tiles))
        for count in tokens:
            progress(f"compiling for T = {count}")
            for stage, launch in launches(simulated, layer, weights, count):
                known = kernels.get(launch.name)
                if known is None:
                    known = Kernel(stage, compiled[launch.name], launch, ())
                    if simulate:
                        progress(f"simulating {launch.name}")
                        known = replace(known, figures=figures_of(simulated, known))
                if count not in known.tokens:
                    known = replace(known, tokens=(*known.tokens, count))
                kernels[launch.name] = known
    return sorted(kernels.values(), key=lambda k: STAGES.index(k.stage))


STAGES = ("quantise", "gemm1", "gemm2", "combine")


@contextmanager
def forced(tiles: Mapping[str, Mapping[str, Any]]) -> Iterator[None]:
    """Inside, the backend's GEMMs are cut as it chooses but for these fields."""
    from mixmoe.backends.cdna import grid, stages

    chosen = stages.plan

    def plan(*args: Any, **kwargs: Any) -> Any:
        made = chosen(*args, **kwargs)
        for stage, fields in tiles.items():
            changes = dict(fields)
            if "walk" in changes:
                changes["walk"] = grid.Walk(**changes["walk"])
            made = replace(made, **{stage: replace(getattr(made, stage), **changes)})
        return made

    stages.plan = plan
    try:
        yield
    finally:
        stages.plan = chosen


def placeholders(layer: Layer) -> Weights:
    """Weights in the backend's order: one expert is packed, room for E is made, not filled."""
    from mixmoe.backends.cdna import cdna

    shape, recipe = layer.shape, layer.recipe
    h, i, experts = shape.hidden, shape.intermediate, shape.experts
    one = Weights.from_dense(torch.zeros(1, 2 * i, h), torch.zeros(1, h, i), recipe.weight)
    extra: dict[str, Tensor] = {}
    if shape.biased if layer.bias is None else layer.bias:
        extra = {"w13_bias": torch.zeros(1, 2 * i), "w2_bias": torch.zeros(1, h)}
    if recipe.activation.name == "int8_smooth":
        extra |= {"w13_smooth": torch.ones(1, h), "w2_smooth": torch.ones(1, i)}
    one = replace(one, **extra)  # type: ignore[arg-type]
    if layer.orders is not None:
        one = one.packed(*map(order_named, layer.orders))
    packed = cdna().prepare(one, recipe)

    def room(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.new_empty((experts, *t.shape[1:]))

    def grown(stored: Any) -> Packed:
        e, n, k = stored.shape
        parts = {p: room(getattr(stored, p)) for p in ("codes", "scales", "row_scale")}
        return replace(stored, **parts, shape=(experts, n, k))

    held = {name: room(getattr(packed, name)) for name in Weights.TENSORS}
    return Weights(grown(packed.w13), grown(packed.w2), **held)


def launches(
    simulated: Any, layer: Layer, weights: Weights, tokens: int
) -> Iterator[tuple[str, Any]]:
    """(stage, launch) of one call of the layer, uniform routing. A stage's tensors live on while
    its launches are looked at."""
    from mixmoe.backends.cdna import cdna

    backend, shape, recipe = cdna(), layer.shape, layer.recipe
    topk = shape.topk
    problem = Problem(tokens, shape.hidden, shape.intermediate, shape.experts, topk)
    backend.check(recipe, weights, problem)
    g = torch.Generator().manual_seed(tokens)
    ids = torch.rand(tokens, shape.experts, generator=g).topk(topk, dim=1).indices
    routed = backend.route(ids, torch.rand(tokens, topk, generator=g), problem, None, layer.block)
    seen = len(simulated.launches)

    def fresh(stage: str) -> Iterator[tuple[str, Any]]:
        nonlocal seen
        simulated.check()
        added, seen = simulated.launches[seen:], len(simulated.launches)
        yield from ((stage, launch) for launch in added)

    x = torch.zeros(tokens, shape.hidden, dtype=torch.bfloat16)
    source = backend.quantise(x, weights, routed, recipe)
    yield from fresh("quantise")
    h = backend.gemm1(source, weights, routed, recipe)
    yield from fresh("gemm1")
    yield from below(layer, h, weights, routed, fresh)


def below(
    layer: Layer, h: Any, weights: Weights, routed: Any, fresh: Callable[[str], Any]
) -> Iterator[tuple[str, Any]]:
    """Launches of stage 2 and of the reduction."""
    from mixmoe.backends.cdna import cdna, choose, stages
    from mixmoe.backends.cdna.config import RowsOut

    backend, recipe, problem = cdna(), layer.recipe, routed.problem
    pair = (recipe.activation.name, recipe.weight.name)
    scaled = bool(backend.atoms.operands) and pair in stages.PAIRS
    out = torch.empty(problem.tokens, problem.hidden, dtype=recipe.out_dtype)
    kind = choose.rows_for(problem, routed.block, layer.deterministic)
    kind = kind if layer.rows is None else RowsOut(layer.rows)
    if kind is RowsOut.ROWS or not scaled:
        rows = backend.gemm2(h, weights, routed, recipe)
        yield from fresh("gemm2")
        backend.combine(rows, routed, recipe, out)
        yield from fresh("combine")
        return
    stages.down(backend.atoms, h, weights, routed, recipe, out, kind)
    for _, launch in fresh("gemm2"):
        yield next(stage for stage in STAGES if launch.name.startswith(stage)), launch


def figures_of(simulated: Any, kernel: Kernel) -> dict[str, Any]:
    """Resources, and what the first workgroup of the launch does. Cycles are simulated."""
    launch, compiled = kernel.launch, kernel.compiled
    report = launch.kernel.launch(
        launch.grid, launch.block, launch.kernarg, memory=simulated.memory,
        dynamic_lds=launch.dynamic_lds, workgroups=[0],
    )  # fmt: skip
    meta, taken, counters = launch.kernel.meta, report.occupancy, report.counters
    loop, timing = main_loop(report), report.timing
    spills = {f"{kind}_spills": meta.get(f"{kind}_spill_count", 0) for kind in ("vgpr", "sgpr")}
    return {
        "grid": list(launch.grid),
        "vgpr": taken.vgprs,
        "agpr": taken.agprs,
        "sgpr": taken.sgprs,
        **spills,
        "scratch_bytes": launch.kernel.private_bytes,
        "lds_bytes": taken.lds,
        "workgroups_per_cu": taken.workgroups_per_cu,
        "waves_per_simd": taken.waves_per_simd,
        "limit": taken.limit,
        "instructions": report.instructions,
        "mfma": report.by_class.get("mfma", 0),
        "global_load_bytes": counters.global_load_bytes,
        "global_store_bytes": counters.global_store_bytes + counters.global_atomic_bytes,
        "lds_cycles": counters.lds_cycles,
        "lds_conflict_cycles": counters.lds_conflict_cycles,
        "cycles": round(timing.cycles),
        "resident": timing.resident,
        "mfma_busy": round(timing.busy["mfma"], 3),
        "loop": loop_dict(loop),
        "compile_seconds": round(compiled.seconds, 2),
        "ir_lines": compiled.ir_lines,
        "code_instructions": len(launch.kernel.module.instrs),
        "code_bytes": len(compiled.code),
    }


def loop_dict(loop: MainLoop | None) -> dict[str, Any] | None:
    """A main loop for JSON."""
    return None if loop is None else loop.as_dict()
