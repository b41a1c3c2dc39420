"""Stage 2 that sums column groups beside its product, on the GPU: against float64, the same bits
every run and in every cut."""

from dataclasses import replace
from typing import Any

import hopper_cases as cases
import pytest
import torch
from hopper_stage2 import SIZES, judge, judge_sees_stale_columns, runs

from mixmoe.backends.hopper import gemm2_red_sum, prefill_schedule
from mixmoe.spec import Problem


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Any number of tokens goes through this kernel; the cuts it was launched with."""
    seen, launch = [], gemm2_red_sum.launch

    def record(*operands: Any, **more: Any) -> torch.Tensor:
        seen.append(operands[6])
        return launch(*operands, **more)

    monkeypatch.setattr(prefill_schedule, "ring_of", lambda problem, device: None)
    monkeypatch.setattr(gemm2_red_sum, "launch", record)
    return seen


def cut_as(patch: pytest.MonkeyPatch, group: int, parts: int, slots: int) -> None:
    """Items of `parts` groups of so many column tiles, of which so many are kept."""

    def cut(problem: Problem, device: torch.device) -> gemm2_red_sum.Sums:
        made = gemm2_red_sum.Sums.of(problem, device)
        assert made is not None
        red = replace(made.red, span=group * parts)
        return replace(made, red=red, group=group, slots=slots)

    patch.setattr(prefill_schedule, "sums_of", cut)


@pytest.mark.parametrize("slots", [2, 3, 99])
@pytest.mark.parametrize("inter, hidden, tokens, bias, weight_on", SIZES)
def test_sums(
    inter: int, hidden: int, tokens: int, bias: bool, weight_on: int, slots: int,
    launches: list[Any], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    cut_as(monkeypatch, 4, 2, slots)
    judge(inter, hidden, tokens, bias, weight_on, 6)
    assert len(launches) == 6


def test_cuts_change_no_bit(launches: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a scratch as small as may be."""
    case = cases.make_case(cases.RECIPES["a8w4"], 700, 4096, 256, 32, 8)
    found = []
    for group, parts, slots in [(4, 2, 2), (4, 2, 5), (2, 4, 4), (3, 1, 1), (5, 3, 99)]:
        cut_as(monkeypatch, group, parts, slots)
        found.append(runs(case, 1)[1][0])
    assert all(torch.equal(found[0], other) for other in found)


def test_judge_sees_a_stale_row(launches: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """One row of one group from another slot."""
    judge_sees_stale_columns(gemm2_red_sum, 1024, 512, monkeypatch)
