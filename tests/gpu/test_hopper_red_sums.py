"""Stage 2 that sums column groups beside its product, on the GPU: against float64, the same bits
every run and for every number of slots, and what it keeps."""

from typing import Any

import hopper_cases as cases
import pytest
import torch
from hopper_stage2 import runs

from mixmoe.activations import silu
from mixmoe.backends.hopper import gemm2_red_sum, prefill_schedule


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Any number of tokens goes through this kernel; the cuts it was launched with."""
    seen, launch = [], gemm2_red_sum.launch

    def record(*operands: Any, **more: Any) -> torch.Tensor:
        seen.append(operands[6])
        return launch(*operands, **more)

    monkeypatch.setattr(prefill_schedule, "RING_FROM", 1 << 30)
    monkeypatch.setattr(gemm2_red_sum, "launch", record)
    return seen


@pytest.mark.parametrize("slots", [1, 2, 3, 0])
@pytest.mark.parametrize(
    "inter, hidden, tokens, bias, weight_on",
    [(128, 320, 300, False, 2), (192, 448, 900, True, 2), (256, 7168, 700, False, 1),
     (384, 352, 700, True, 1), (256, 2880, 2500, True, 2), (256, 1024, 5000, False, 2)],
)  # fmt: skip
def test_sums(
    inter: int, hidden: int, tokens: int, bias: bool, weight_on: int, slots: int,
    launches: list[Any], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(gemm2_red_sum, "SLOTS", slots)
    recipe = cases.with_act(cases.RECIPES["a8w4"], silu(), weight_on)
    case = cases.make_case(recipe, tokens, hidden, inter, 7, 3, bias=bias, skew="masked")
    want, results = runs(case, 6)
    assert cases.worst_row(results[0], want) < 2.0**-8 * 1.5
    assert all(torch.equal(results[0], other) for other in results)
    assert len(launches) == 6 and launches[0].slots == min(slots or 99, launches[0].groups)


def test_slots_change_no_bit(launches: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases.make_case(cases.RECIPES["a8w4"], 700, 4096, 256, 32, 8)
    found = []
    for slots in (0, 1, 2, 5):
        monkeypatch.setattr(gemm2_red_sum, "SLOTS", slots)
        found.append(runs(case, 1)[1][0])
    assert all(torch.equal(found[0], other) for other in found)
    assert [cut.slots for cut in launches] == [launches[0].groups, 1, 2, 5]


def test_judge_sees_a_stale_row(launches: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """One row of one group from another slot."""
    case = cases.make_case(cases.RECIPES["a8w4"], 300, 1024, 128, 7, 3)
    launch = gemm2_red_sum.launch

    def stale(*operands: Any, **more: Any) -> torch.Tensor:
        out = launch(*operands, **more)
        out[17, 512:576] = out[17, :64]
        return out

    monkeypatch.setattr(gemm2_red_sum, "launch", stale)
    want, results = runs(case, 1)
    assert cases.worst_row(results[0], want) > 2.0**-6
