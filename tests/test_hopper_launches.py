"""Layers of odd sizes from the door to the last launch, on a machine with no GPU: every kernel that
the Hopper backend would launch is compiled for sm_90a instead, and nothing runs.

What this sees and the compile tests of single kernels do not: the host code of every launch, its
operands, and forms that only odd sizes ask for (a K of one step, one expert, topk 33).
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import hopper_cases as cases  # noqa: E402
from hopper_compile import TUNED_FOR, Resources, compile_gluon  # noqa: E402
from triton.runtime.errors import PTXASError  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from mixmoe.activations import swiglu  # noqa: E402
from mixmoe.backends.hopper import (  # noqa: E402
    gemm2_prefill,
    gemm2_red_sum,
    hopper,
    prefill_cut,
    prefill_schedule,
)
from mixmoe.backends.hopper.decode import multiprocessors  # noqa: E402
from mixmoe.backends.hopper.prefill_cut import Cut  # noqa: E402


@dataclass(frozen=True, slots=True)
class Launched:
    """A launch that was compiled. together: its grid starts as a whole or not at all; added: of a
    prefill GEMM, columns of K after which it adds in float32."""

    kernel: str
    grid: tuple[int, ...]
    together: bool
    added: int | None
    made: Resources

    @property
    def waits(self) -> bool:
        """Whether its CTAs wait for one another: they poll counters in global memory."""
        return re.search(r"\bld\.(acquire|relaxed)\.gpu", self.made.ptx) is not None


PREFILL = {"route_once", "list_work", "quantise_rows", "grouped_prefill"}
# H, I, E, topk, T, and kernels that such a layer launches; deterministic, but for "atomics".
LAYERS: dict[str, tuple[tuple[int, ...], set[str]]] = {
    "one token": ((96, 160, 3, 2, 1), {"gemm1_token", "gemm2_tokens"}),
    "one token, long": ((352, 416, 3, 4, 1), {"gemm1_token", "quantise_rows", "gemm2_tokens"}),
    "two tokens": ((64, 32, 4, 2, 2), {"gemm1_token", "gemm2_tokens"}),
    "few": ((160, 288, 8, 3, 9), {"route_once", "gemm1_decode", "gemm2_rows", "combine_kernel"}),
    "few, long": ((288, 704, 4, 4, 9), {"route_once", "gemm1_decode", "gemm2_long"}),
    "many slots": ((96, 96, 40, 33, 8), {"gemm1_decode", "gemm2_rows"}),
    "tall": ((416, 384, 2, 1, 50), PREFILL | {"gemm2_red_sum"}),
    "one step": ((32, 96, 1, 1, 130), PREFILL | {"gemm2_red_sum"}),
    "one step, long": ((32, 416, 2, 2, 130), PREFILL | {"sum_routes"}),
    "pairs": ((512, 160, 3, 2, 210), PREFILL | {"gemm2_red_sum"}),
    "atomics": ((352, 320, 2, 2, 700), PREFILL | {"gemm2_red"}),
    "ring": ((64, 96, 2, 2, 1300), PREFILL | {"gemm2_ring"}),
}


@contextmanager
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launched]]:
    """Every launch is compiled, written down and left out."""
    launched: list[Launched] = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **meta: Any) -> None:
        grid = grid(meta) if callable(grid) else grid
        made = compile_gluon(kernel, *args, **meta)
        together = bool(meta.get("launch_cooperative_grid"))
        launched.append(Launched(kernel.fn.__name__, grid, together, meta.get("ADDED"), made))

    with monkeypatch.context() as patch:
        patch.setattr(JITFunction, "run", run)
        yield launched


def layer(sizes: tuple[int, ...], atomics: bool, accumulate: str) -> None:
    """A layer of random operands on the CPU."""
    hidden, inter, experts, topk, tokens = sizes
    recipe = cases.with_act(cases.RECIPES["a8w4"], swiglu())
    recipe = replace(recipe, accumulate=accumulate)
    case = cases.make_case(recipe, tokens, hidden, inter, experts, topk, bias=True)
    backend = hopper()
    backend.layer(
        case.x, backend.prepare(case.weights, recipe), case.ids, case.topk_weights, recipe,
        out=torch.empty_like(case.x), deterministic=not atomics,
    )  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_every_launch_compiles(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, kernels = LAYERS[name]
    for accumulate in ("precise", "auto") if name.startswith("one step") else ("precise",):
        with compiled(monkeypatch) as launched:
            layer(sizes, name == "atomics", accumulate)
        assert kernels <= {one.kernel for one in launched}, {one.kernel for one in launched}
        for one in launched:
            assert all(n > 0 for n in one.grid), (one.kernel, one.grid)
            assert one.made.shared <= 227 * 1024, one.kernel
            assert not (TUNED_FOR and one.made.messages), (one.kernel, one.made.messages)
            assert one.together == one.waits, one.kernel
            assert not one.waits or one.grid == (2 * multiprocessors(torch.device("cpu")),)


def adds(tokens: int, accumulate: str, monkeypatch: pytest.MonkeyPatch) -> set[bool]:
    """Whether the prefill GEMMs of a layer of two experts, topk 2, add in float32: `tokens` routes
    an expert."""
    with compiled(monkeypatch) as launched:
        layer((32, 416, 2, 2, tokens), False, accumulate)
    return {bool(one.added) for one in launched if one.kernel == "grouped_prefill"}


def test_auto_adds_precisely_where_experts_have_few_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    few = prefill_cut.PRECISE_TO
    assert adds(few, "auto", monkeypatch) == {True}
    assert adds(few + 1, "auto", monkeypatch) == {False}
    assert adds(few + 1, "precise", monkeypatch) == {True}
    assert adds(few, "fast", monkeypatch) == {False}
    monkeypatch.setattr(prefill_cut, "PRECISE_TO", few - 1)  # the rule is what decides
    assert adds(few, "auto", monkeypatch) == {False}


def test_long_rows_go_in_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token in one of them; the last one is short."""
    monkeypatch.setattr(prefill_schedule, "LONG_CHUNK", 50)
    with compiled(monkeypatch) as launched:
        layer((32, 416, 2, 2, 80), False, "precise")
    assert [one.grid[0] for one in launched if one.kernel == "sum_routes"] == [50, 30]


@pytest.mark.parametrize("name, module", [("ring", gemm2_prefill), ("tall", gemm2_red_sum)])
def test_a_kernel_whose_ctas_wait_and_may_start_in_part_is_seen(
    name: str, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TOGETHER", {})
    with compiled(monkeypatch) as launched:
        layer(LAYERS[name][0], False, "precise")
    assert sum(one.waits and not one.together for one in launched) == 1


@pytest.mark.skipif(not TUNED_FOR, reason="the crash is of this ptxas")
def test_a_form_that_ptxas_cannot_assemble_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cut, "added", lambda cut, k: 256 if cut.precise else 0)
    with compiled(monkeypatch), pytest.raises(PTXASError):
        layer((32, 64, 2, 2, 100), False, "precise")
