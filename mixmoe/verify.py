"""Every recipe x stage x edge case of a backend against float64 on the same quantised operands.

The engine of ``mixmoe check``. Each stage is fed what the reference or the backend itself made
before it, so that a failure names the stage that made it:

========  =======================================  ==========================================
route     every index, weight and count            bit for bit
quantise  codes and scales of x                    bit for bit
gemm1     codes and scales of h, from the twin's x :func:`mixmoe.accuracy.code_errors`
gemm2     rows, from the backend's own h           :func:`mixmoe.accuracy.row_errors`
combine   y, from the backend's own rows           row_errors; ``out`` held NaN before
layer     the whole pipeline, twice                row_errors; the same bits both times
========  =======================================  ==========================================
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import lru_cache
from zlib import crc32

import torch
from torch import Tensor

from mixmoe import accuracy
from mixmoe.activations import Activation, gelu, silu, situv2, swiglu
from mixmoe.backends import Backend
from mixmoe.backends.cpu import CPUBackend, reference
from mixmoe.checks import check
from mixmoe.errors import MixMoEError
from mixmoe.formats import Format, Quantised, Rounding, ScaleKind, format_named
from mixmoe.moe import run
from mixmoe.spec import CELLS, PAIRS, Problem, Recipe, Routed, Weights

STAGES = ("route", "quantise", "gemm1", "gemm2", "combine", "layer")
EXACT = reference()
Verdict = tuple[float, float, str]  # worst, tolerance, note


class Routing(Enum):
    """How a case's tokens choose experts."""

    RANDOM = "random"
    EMPTY = "empty"  # only the first topk experts are chosen
    SKEWED = "skewed"  # every token has the last expert in slot 0
    DUPLICATE = "duplicate"  # a token's slots all name one expert
    MASKED = "masked"  # ids of -1, one token wholly without experts
    MAPPED = "mapped"  # twice as many global experts, every second one on another rank


@dataclass(frozen=True, slots=True)
class Case:
    """One edge: what differs from the plain case."""

    name: str
    tokens: int = 13
    hidden: int = 256
    intermediate: int = 128
    experts: int = 5
    topk: int = 3
    routing: Routing = Routing.RANDOM
    act: Activation = field(default_factory=silu)
    bias: bool = False
    weight_on: int = 2
    out_dtype: torch.dtype = torch.bfloat16
    x_dtype: torch.dtype = torch.bfloat16
    rounding: Rounding = Rounding.CEIL
    strided: bool = False  # x and out are columns of wider tensors; ids are int32


CASES = (
    Case("plain"),
    Case("T=0", tokens=0),
    Case("T=1", tokens=1),
    Case("T=3", tokens=3),
    Case("E=1", experts=1, topk=1),
    Case("E=7", experts=7, topk=7),
    Case("empty experts", routing=Routing.EMPTY),
    Case("skewed", routing=Routing.SKEWED, tokens=40),
    Case("duplicate ids", routing=Routing.DUPLICATE),
    Case("masked ids", routing=Routing.MASKED, bias=True),
    Case("expert map", routing=Routing.MAPPED, bias=True),
    Case("tail 288 x 96", hidden=288, intermediate=96),
    Case("tail 320 x 32", hidden=320, intermediate=32, bias=True),
    Case("tail 96 x 288", hidden=96, intermediate=288),
    Case("tail 32 x 320", hidden=32, intermediate=320),
    Case("bias", bias=True),
    Case("silu limit 1", act=silu(limit=1.0)),
    Case("swiglu", act=swiglu(), bias=True),
    Case("swiglu alpha 1 limit 2", act=swiglu(limit=2.0, alpha=1.0)),
    Case("gelu", act=gelu()),
    Case("situv2", act=situv2()),
    Case("situv2 beta 2, 9", act=situv2(beta=2.0, beta2=9.0)),
    Case("weight on 1", weight_on=1, bias=True),
    Case("out f32, x f32", out_dtype=torch.float32, x_dtype=torch.float32),
    Case("out fp16, x fp16", out_dtype=torch.float16, x_dtype=torch.float16),
    Case("rounding FLOOR", rounding=Rounding.FLOOR),
    Case("rounding EVEN", rounding=Rounding.EVEN),
    Case("strided x and out, int32 ids", strided=True),
)

# Pairs beyond the named cells: other 16-bit and fp8 elements, other groups and blocks.
VARIANTS = (
    *((a, w) for a in ("fp16", "fp8_token_fnuz") for w in PAIRS[a]),
    ("bf16", "int4_group64_f32"),
    ("fp8_token", "int4_group128"),
    ("fp8_1x128", "fp8_block64x128"),
)


@dataclass(frozen=True, slots=True)
class Row:
    """One judgement. ``worst`` is relative where ``tolerance`` is not 0, else a count of values
    that differ; ``refused`` holds a backend's reason not to run the case.
    """

    recipe: str
    case: str
    stage: str
    worst: float
    tolerance: float
    note: str = ""
    refused: bool = False

    @property
    def ok(self) -> bool:
        """Within tolerance; a refusal is no pass and no failure."""
        return not self.refused and self.worst <= self.tolerance

    @property
    def failed(self) -> bool:
        """Computed and wrong."""
        return not self.refused and not self.worst <= self.tolerance

    @property
    def severity(self) -> float:
        """``worst / tolerance``: 1 is the limit; a bit-for-bit difference is past every limit."""
        if self.tolerance == 0:
            return torch.inf if self.worst else 0.0
        return self.worst / self.tolerance


def recipes(names: Sequence[str] | None = None) -> dict[str, Recipe]:
    """Every cell of the matrix and every variant by name, or those named."""
    known = {name: Recipe.named(name) for name in CELLS}
    for a, w in VARIANTS:
        recipe = Recipe(format_named(a), format_named(w))
        known.setdefault(recipe.name, recipe)
    if names is None:
        return known
    for name in names:
        if name not in known:
            raise MixMoEError("unknown recipe", name, ", ".join(known))
    return {name: known[name] for name in names}


def verify(
    backend: Backend,
    names: Sequence[str] | None = None,
    cases: Sequence[Case] = CASES,
    device: torch.device | str = "cpu",
    progress: Callable[[str], None] | None = None,
) -> Iterator[Row]:
    """Rows of every recipe, case and stage, in that order; ``progress`` hears each recipe."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small matrices: 25 s against 6 min on 2 busy cores, 2026-11-24
    try:
        for name, recipe in recipes(names).items():
            if progress is not None:
                progress(name)
            for case in cases:
                if fits(case, recipe):
                    yield from judge(backend, name, recipe, case, device)
    finally:
        torch.set_num_threads(threads)


def fits(case: Case, recipe: Recipe) -> bool:
    """Whether the recipe's formats take the case's sizes, and the case says anything of it."""
    e8m0 = recipe.activation.scale is ScaleKind.E8M0
    if case.rounding is not Rounding.CEIL and not e8m0:
        return False
    whole = [f for f in (recipe.activation, recipe.weight) if f.name.startswith(("int4", "mx"))]
    return all(size % f.cols == 0 for f in whole for size in (case.hidden, case.intermediate))


def judge(
    backend: Backend, name: str, recipe: Recipe, case: Case, device: torch.device | str = "cpu"
) -> Iterator[Row]:
    """A row per stage of one case; a refusal gives one row, an exception fails its stage."""
    recipe = replace(
        recipe, act=case.act, out_dtype=case.out_dtype, weight_on=case.weight_on,
        rounding=case.rounding,
    )
    try:
        trial = Trial(backend, recipe, make_operands(case, recipe), device)
    except MixMoEError as error:
        yield Row(name, case.name, "check", 0.0, 0.0, str(error), refused=True)
        return
    for stage in STAGES:
        try:
            worst, tolerance, note = getattr(trial, stage)()
        except Exception as error:  # a crash is a finding of this case, not the end of the run
            note = f"{type(error).__name__}: {error}".splitlines()[0]
            yield Row(name, case.name, stage, torch.inf, 0.0, note)
            return
        yield Row(name, case.name, stage, worst, tolerance, note)


@dataclass(frozen=True, slots=True, eq=False)
class Operands:
    """One case's tensors."""

    x: Tensor
    weights: Weights
    topk_ids: Tensor
    topk_weights: Tensor
    expert_map: Tensor | None
    out: Tensor

    def to(self, device: torch.device | str) -> "Operands":
        """The same on another device, wide rows and all."""
        tensors = (self.topk_ids, self.topk_weights, self.expert_map)
        ids, share, expert_map = (None if t is None else t.to(device) for t in tensors)
        assert ids is not None and share is not None, "only the map may be absent"
        x, out = (_wide_to(t, device) for t in (self.x, self.out))
        return Operands(x, self.weights.to(device), ids, share, expert_map, out)


def _wide_to(t: Tensor, device: torch.device | str) -> Tensor:
    """A row-strided tensor on another device with its strides; ``.to`` would close the gaps."""
    wide = t._base if t._base is not None else t
    return wide.to(device).as_strided(t.shape, t.stride(), t.storage_offset())


def make_operands(case: Case, recipe: Recipe) -> Operands:
    """Gaussian data, rows of x scaled by 2^-4 to 2^2 and one of zeros; seeded by the case."""
    g = torch.Generator().manual_seed(crc32(case.name.encode()))
    t, h = case.tokens, case.hidden
    x = torch.randn(t, h, generator=g) * 2.0 ** torch.randint(-4, 3, (t, 1), generator=g)
    x[3:4] = 0
    x = x.to(case.x_dtype)
    out = torch.full((t, h), torch.nan, dtype=recipe.out_dtype)
    ids, expert_map = make_ids(case, g)
    if case.strided:
        x = torch.cat([x, torch.full_like(x, torch.nan)], dim=1)[:, :h]
        out = torch.cat([out, out], dim=1)[:, h:]
        ids = ids.to(torch.int32)
    share = torch.rand(ids.shape, generator=g)
    smooth = recipe.activation.name == "int8_smooth"
    sizes = (case.experts, case.hidden, case.intermediate)
    weights = make_weights(sizes, recipe.weight, case.bias, smooth)
    return Operands(x, weights, ids, share, expert_map, out)


def make_ids(case: Case, g: torch.Generator) -> tuple[Tensor, Tensor | None]:
    """topk_ids (T, topk) and, for MAPPED, the expert map."""
    experts = 2 * case.experts if case.routing is Routing.MAPPED else case.experts
    ids = torch.rand(case.tokens, experts, generator=g).argsort(dim=1)[:, : case.topk]
    last = case.experts - 1
    if case.routing is Routing.EMPTY:
        ids = torch.rand(case.tokens, case.topk, generator=g).argsort(dim=1)
    elif case.routing is Routing.SKEWED:
        ids = torch.where(ids == last, ids[:, :1], ids)
        ids[:, 0] = last
    elif case.routing is Routing.DUPLICATE:
        ids = ids[:, :1].expand(-1, case.topk).contiguous()
    elif case.routing is Routing.MASKED:
        ids[::3, 1] = -1
        ids[2] = -1
    elif case.routing is Routing.MAPPED:
        local = torch.full((experts,), -1, dtype=torch.int32)
        local[::2] = torch.arange(case.experts, dtype=torch.int32)
        return ids, local
    return ids, None


@lru_cache(maxsize=64)
def make_weights(sizes: tuple[int, int, int], fmt: Format, bias: bool, smooth: bool) -> Weights:
    """Gaussian experts (E, H, I) in this format; kept, as many cases share them."""
    e, h, i = sizes
    g = torch.Generator().manual_seed(7)
    w13 = torch.randn(e, 2 * i, h, generator=g) * h**-0.5
    w2 = torch.randn(e, h, i, generator=g) * i**-0.5
    extra: dict[str, Tensor] = {}
    if bias:
        extra |= {"w13_bias": torch.randn(e, 2 * i, generator=g)}
        extra |= {"w2_bias": torch.randn(e, h, generator=g)}
    if smooth:
        extra |= {"w13_smooth": torch.rand(e, h, generator=g) + 0.5}
        extra |= {"w2_smooth": torch.rand(e, i, generator=g) + 0.5}
    return Weights.from_dense(w13, w2, fmt, **extra)  # type: ignore[arg-type]


class Trial:
    """One case on one backend: a method per stage, in order, each (worst, tolerance, note).

    The twin runs on the CPU wherever the backend runs: torch on a GPU multiplies by a reciprocal
    where the CPU divides, so its scales are an ulp off the bits that formats.py defines.
    """

    def __init__(
        self, backend: Backend, recipe: Recipe, exact: Operands, device: torch.device | str
    ) -> None:
        self.backend, self.recipe, self.exact = backend, recipe, exact
        self.device, self.operands = device, exact.to(device)
        o = self.operands
        self.weights = backend.prepare(o.weights, recipe)
        self.problem: Problem = check(
            recipe, self.weights, o.x, o.topk_ids, o.topk_weights,
            out=o.out, expert_map=o.expert_map,
        )
        backend.check(recipe, self.weights, self.problem)

    def route(self) -> Verdict:
        """Sorted ids, weights, blocks and counts of the twin with the same block."""

        def routed(backend: Backend | CPUBackend, o: Operands, block: int | None) -> Routed:
            return backend.route(o.topk_ids, o.topk_weights, self.problem, o.expert_map, block)

        self.routed = routed(self.backend, self.operands, None)
        self.exact_routed = routed(EXACT, self.exact, self.routed.block)
        wrong = routed_differences(self.routed, self.exact_routed)
        return float(sum(wrong.values())), 0.0, ", ".join(n for n, count in wrong.items() if count)

    def quantise(self) -> Verdict:
        """Codes and scales, or values where the backend keeps x in a form of its own."""
        o = self.exact
        got = self.backend.quantise(self.operands.x, self.weights, self.routed, self.recipe)
        got = got.to("cpu")
        self.x = EXACT.quantise(o.x, o.weights, self.exact_routed, self.recipe)
        if isinstance(got, Quantised) and got.format == self.x.format:
            return float(accuracy.differing(got, self.x)), 0.0, ""
        values, want = got.dequantise(torch.float64), self.x.dequantise(torch.float64)
        return float((values != want).sum()), 0.0, "as values"

    def gemm1(self) -> Verdict:
        """h code by code, from the twin's x."""
        x = self.x.to(self.device)
        self.h = self.backend.gemm1(x, self.weights, self.routed, self.recipe)
        self.exact_h = self.h.to("cpu")
        exact = EXACT.hidden(self.x, self.exact.weights, self.exact_routed, self.recipe)
        errors = accuracy.code_errors(self.exact_h, exact, self.recipe.rounding)
        note = f"{errors.flips} of {exact.numel()} codes flipped" if errors.flips else ""
        return errors.worst, self.recipe.activation.tolerance, note

    def gemm2(self) -> Verdict:
        """Rows from the backend's own h; those of skipped routes must be zero."""
        self.rows = self.backend.gemm2(self.h, self.weights, self.routed, self.recipe)
        self.exact_rows = EXACT.gemm2(
            self.exact_h, self.exact.weights, self.exact_routed, self.recipe
        )
        errors = accuracy.row_errors(self.rows.cpu(), self.exact_rows)
        return accuracy.worst(errors), accuracy.RESULT_TOLERANCE[self.rows.dtype], ""

    def combine(self) -> Verdict:
        """y from the backend's own rows, written over NaN."""
        out = self.operands.out.clone()
        y = self.backend.combine(self.rows, self.routed, self.recipe, out, True)
        return self._judge(y, self.rows.cpu().double())

    def layer(self) -> Verdict:
        """The pipeline as ``moe`` runs it, twice, against float64 on the backend's own h."""
        o = self.operands
        first, second = (
            run(
                self.backend, o.x, self.weights, o.topk_ids, o.topk_weights, self.recipe,
                out=o.out.fill_(torch.nan), expert_map=o.expert_map,
            ).clone()
            for _ in range(2)
        )
        worst, tolerance, note = self._judge(first, self.exact_rows)
        if worst <= tolerance and not torch.equal(first, second):
            return torch.inf, 0.0, "two runs differ"
        return worst, tolerance, note

    def _judge(self, y: Tensor, rows: Tensor) -> Verdict:
        exact = rows.new_empty(y.shape)
        EXACT.combine(rows, self.exact_routed, self.recipe, exact)
        errors = accuracy.row_errors(y.cpu(), exact)
        note = "" if bool(torch.isfinite(y).all()) else "holds NaN or infinity"
        return accuracy.worst(errors), accuracy.RESULT_TOLERANCE[y.dtype], note


def routed_differences(a: Routed, b: Routed) -> dict[str, int]:
    """Values that differ by field, up to the last valid route; blocks beyond it must be unused."""
    valid = int(b.num_valid_ids[0])
    cut = {"sorted_token_ids": valid, "sorted_weights": valid}
    cut["sorted_expert_ids"] = valid // b.block
    found = {}
    names = ("expert_offsets", "expert_counts", "num_valid_ids", *cut)
    for name in names:
        got, want = (getattr(r, name)[: cut.get(name)].cpu() for r in (a, b))
        same = got.shape == want.shape
        found[name] = int((got != want).sum()) if same else max(len(want), 1)
    found["unused blocks"] = int((a.sorted_expert_ids[valid // b.block :] != -1).sum())
    return found


def summary(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """For each recipe and stage the row nearest to (or furthest past) its tolerance."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        stages = found.setdefault(row.recipe, {})
        kept = stages.get(row.stage)
        if kept is None or row.severity > kept.severity:
            stages[row.stage] = row
    return found


def report(rows: Sequence[Row], backend: str, device: str) -> dict[str, object]:
    """What ``check --json`` prints: counts, cells (recipe x stage, worst case), and every row."""

    def entry(row: Row) -> dict[str, object]:
        worst = row.worst if row.worst < torch.inf else None  # JSON has no infinity
        kept: dict[str, object] = {"worst": worst, "tolerance": row.tolerance, "ok": row.ok}
        kept["case"] = row.case
        if row.note:
            kept["note"] = row.note
        if row.refused:
            kept["refused"] = True
        return kept

    cells = {
        recipe: {stage: entry(row) for stage, row in stages.items()}
        for recipe, stages in summary(rows).items()
    }
    return {
        "backend": backend,
        "device": device,
        "torch": torch.__version__,
        "judged": sum(not row.refused for row in rows),
        "failed": sum(row.failed for row in rows),
        "refused": sum(row.refused for row in rows),
        "cells": cells,
        "rows": [{"recipe": r.recipe, "stage": r.stage} | entry(r) for r in rows],
    }
