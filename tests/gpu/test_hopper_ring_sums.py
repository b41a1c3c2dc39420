"""The ring of prefill stage 2 on the GPU: against float64, and the same bits every run."""

from typing import Any

import hopper_cases as cases
import pytest
import torch
from hopper_stage2 import DEVICE, SIZES, judge, judge_sees_stale_columns, runs

from mixmoe.backends.hopper import gemm2_prefill, prefill_schedule


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Any number of tokens goes through the ring; the cuts it was launched with."""
    seen, launch = [], gemm2_prefill.launch

    def record(*operands: Any, **more: Any) -> torch.Tensor:
        seen.append(operands[5])
        return launch(*operands, **more)

    monkeypatch.setattr(prefill_schedule, "RING_FROM", 1)
    monkeypatch.setattr(gemm2_prefill, "launch", record)
    return seen


@pytest.mark.parametrize("inter, hidden, tokens, bias, weight_on", SIZES)
def test_sums(inter: int, hidden: int, tokens: int, bias: bool, weight_on: int,
              launches: list[Any]) -> None:  # fmt: skip
    judge(inter, hidden, tokens, bias, weight_on, 6)
    assert len(launches) == 6


def test_judge_sees_a_stale_row(launches: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """One row of one slice from another slot."""
    judge_sees_stale_columns(gemm2_prefill, 512, 256, monkeypatch)


def unstored(monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows of the ring hold NaN still (slices in it, rows), and which a route has (rows)."""
    case = cases.make_case(cases.RECIPES["a8w4"], 300, 1024, 128, 7, 3)
    launch, empty = gemm2_prefill.launch, torch.empty
    rings: list[torch.Tensor] = []
    positions: list[torch.Tensor] = []

    def poisoned(*size: Any, **how: Any) -> torch.Tensor:
        made = empty(*size, **how)
        if made.dtype == torch.bfloat16 and made.shape[-1] == gemm2_prefill.COLUMNS:
            rings.append(made.fill_(torch.nan))
        return made

    def record(*operands: Any, **more: Any) -> torch.Tensor:
        positions.append(operands[3].position)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", poisoned)
            return launch(*operands, **more)

    with monkeypatch.context() as patch:
        patch.setattr(gemm2_prefill, "launch", record)
        patch.setattr(prefill_schedule, "RING_FROM", 1)
        runs(case, 1)
    (ring,), (position,) = rings, positions
    # 16 slices through four slots of two: each was written.
    rows = ring.view(8, -1, gemm2_prefill.COLUMNS).isnan()
    assert bool((rows.all(2) == rows.any(2)).all()), "whole rows"
    live = torch.zeros(rows.shape[1], dtype=torch.bool, device=DEVICE)
    live[position[position >= 0].long()] = True
    return rows.all(2), live


def test_rows_of_padding_are_not_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    holes, live = unstored(monkeypatch)
    assert bool((holes == ~live).all()) and not bool(live.all())


def test_that_sees_rows_of_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list whose segments count their padding."""
    segments = gemm2_prefill.segments

    def padded(*args: Any) -> Any:
        made = segments(*args)
        made.records[..., 3] = made.records[..., 2] * 32
        return made

    monkeypatch.setattr(gemm2_prefill, "segments", padded)
    holes, live = unstored(monkeypatch)
    assert bool((holes != ~live).any())
