"""Faults planted in the CDNA kernels: each must turn the checks of test_cdna.py red."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

pytest.importorskip("flydsl")

from cdna_cases import failures, findings, judge, simulate

from mixmoe.backends.cdna import (
    activate,
    blocks,
    combine,
    config,
    gemm1,
    gemm2,
    mainloop,
    quantise,
    results,
    tokens,
    weights,
    work,
)
from mixmoe.formats import Rounding

BLOCKS = {"tokens": 9, "hidden": 640, "intermediate": 288}  # five and three blocks along K
STAGE_MODULES = (gemm1, gemm2, quantise, combine)


@pytest.fixture
def fresh():
    """Kernels compiled anew, before and after: what is planted must not stay in a cache."""
    for module in STAGE_MODULES:
        module.build.cache_clear()
    yield
    for module in STAGE_MODULES:
        module.build.cache_clear()


def stages_that_fail(recipe="a4w4", case="bias", schedule="serial", **changes):
    """(stages of failing rows, simulator findings) of one case."""
    with simulate(schedule) as session:
        rows = judge(recipe, case, session, **changes)
    return {row.stage for row in failures(rows)}, findings(session)


def test_without_a_fault_nothing_fails(fresh):
    assert stages_that_fail() == (set(), [])


def test_swapped_gate_and_up(fresh, monkeypatch):
    real = gemm1.gate_up
    monkeypatch.setattr(gemm1, "gate_up", lambda *args: real(*args)[::-1])
    assert "gemm1" in stages_that_fail()[0]


def test_dropped_k_step(fresh, monkeypatch):
    monkeypatch.setattr(config.Gemm, "steps_of", lambda cfg, kt: 1)
    assert stages_that_fail()[0] >= {"gemm1"}


def test_dropped_k_tile(fresh, monkeypatch):
    real = config.Gemm.k_tiles.fget
    monkeypatch.setattr(config.Gemm, "k_tiles", property(lambda cfg: max(1, real(cfg) - 1)))
    assert "gemm1" in stages_that_fail(case="tail 288 x 96")[0]


@pytest.mark.parametrize("recipe", ["a4w4", "a8w8_mx"])
def test_wrong_scale_byte(fresh, monkeypatch, recipe):
    real = config.Gemm.scale_byte
    monkeypatch.setattr(config.Gemm, "scale_byte", lambda cfg, h, b, s: real(cfg, h, b, 0))
    assert stages_that_fail(recipe)[0] >= {"gemm1"}


def test_scale_of_another_token(fresh, monkeypatch):
    monkeypatch.setattr(tokens.RowScales, "factors", lambda fill: [fill.table[0]])
    assert stages_that_fail("a8w4")[0] >= {"gemm1", "gemm2"}


def test_scales_that_are_not_written(fresh, monkeypatch):
    """What LDS held before comes back."""
    monkeypatch.setattr(tokens.RowScales, "publish", lambda fill: None)
    assert stages_that_fail("a8w4")[0] >= {"gemm1", "gemm2"}


def test_products_that_are_scaled_as_well(fresh, monkeypatch):
    monkeypatch.setattr(tokens, "ONES", 0x80808080)
    assert stages_that_fail("a8w4")[0] >= {"gemm1", "gemm2"}


def test_scales_of_another_row(fresh, monkeypatch):
    """Of the wave's first rows of gate, for all its rows."""
    real = weights.ChannelScales.factors
    monkeypatch.setattr(
        weights.ChannelScales, "factors", lambda self: dict.fromkeys(real(self), self._of(0, 0))
    )
    assert stages_that_fail("a8w8")[0] >= {"gemm1", "gemm2"}


def test_scales_of_another_experts_rows(fresh, monkeypatch):
    real = weights.ChannelScales.start

    def start(self):
        place = self.place
        self.place = replace(place, expert=place.expert * 0)
        real(self)
        self.place = place

    monkeypatch.setattr(weights.ChannelScales, "start", start)
    assert stages_that_fail("a8w8")[0] >= {"gemm1", "gemm2"}


def test_scales_of_rows_that_are_not_written(fresh, monkeypatch):
    monkeypatch.setattr(weights.ChannelScales, "publish", lambda scales: None)
    assert stages_that_fail("a8w8")[0] >= {"gemm1", "gemm2"}


def replaced(name, change):
    """A method of the scales along K that does what it did with something changed."""
    real = getattr(blocks.BlockScales, name)
    return blocks.BlockScales, name, lambda self, *args: real(self, *change(self, *args))


def of_first_rows(self, ids, rows):
    """Weight scales of the first 128 rows for all."""
    self.row = self.row * 0
    return ids, rows


ALONG_K = {
    "one step of a tile": replaced(
        "read", lambda self, kt, phase, slot: (kt, phase % self.cfg.groups, slot)
    ),
    "other tokens": replaced(
        "start", lambda self, ids, rows: (SimpleNamespace(shared=ids.own), rows)
    ),
    "the first rows": replaced("start", of_first_rows),
    "not written": (blocks.BlockScales, "publish", lambda self: None),
    "the last phase not closed": (mainloop, "close_last", lambda *args: None),
    "sums that go on": (
        blocks.BlockScales, "begin", lambda self, phase, key: self.sums[phase % 2][key]
    ),
}


def test_scales_along_k(fresh):
    assert stages_that_fail("a8w8_block", "plain", **BLOCKS) == (set(), [])


@pytest.mark.parametrize("fault", ALONG_K)
def test_wrong_scales_along_k(fresh, monkeypatch, fault):
    monkeypatch.setattr(*ALONG_K[fault])
    assert "gemm1" in stages_that_fail("a8w8_block", "plain", **BLOCKS)[0]


def test_places_that_are_not_written(fresh, monkeypatch):
    """Results go where LDS says, which is what it held before."""
    monkeypatch.setattr(tokens.Places, "publish", lambda places, ids, rows: None)
    failed, found = stages_that_fail(case="plain")
    assert failed or found


def test_columns_beyond_the_last_that_are_stored(fresh, monkeypatch):
    monkeypatch.setattr(results.Target, "within", lambda target, column, lane: lane)
    failed, found = stages_that_fail(case="tail 288 x 96")
    assert failed or found


def test_codes_stored_without_their_swizzle(fresh, monkeypatch):
    """Written to LDS by one order, stored by another."""
    real, calls = results.swizzled, iter(range(1000))
    monkeypatch.setattr(
        results, "swizzled", lambda row, piece, n: real(row * (next(calls) % 2), piece, n)
    )
    sizes = {"tokens": 40, "hidden": 128, "intermediate": 128, "experts": 1, "topk": 1}
    assert "gemm1" in stages_that_fail("a4w4", "plain", **sizes)[0]


def test_wrong_expert_of_the_bias(fresh, monkeypatch):
    real = mainloop.row_bias
    monkeypatch.setattr(mainloop, "row_bias", lambda bias, at: real(bias, at * 0))
    assert stages_that_fail()[0] >= {"gemm1", "gemm2"}


def test_scale_of_another_rounding(fresh, monkeypatch):
    real = quantise.round_up_from
    monkeypatch.setattr(quantise, "round_up_from", lambda op, r: real(op, Rounding.FLOOR))
    failed, _ = stages_that_fail()
    assert failed >= {"quantise", "gemm1"}


def test_wrong_activation(fresh, monkeypatch):
    monkeypatch.setitem(activate.FORMULAS, gemm1.ActivationKind.SILU, activate.gelu)
    assert stages_that_fail()[0] >= {"gemm1"}


def test_missing_barrier(fresh, monkeypatch):
    """The stage that a slower wave still reads is overwritten: a race, whatever the numbers."""
    def hand_over(tile):
        mainloop.fx.rocdl.wait_asyncmark(tile.younger())

    monkeypatch.setattr(mainloop.Tile, "hand_over", hand_over)
    _, found = stages_that_fail(case="plain", hidden=640)
    assert any("race" in line for line in found)


def test_missing_wait(fresh, monkeypatch):
    """A tile is read before its copies have landed: what the stage held comes back."""
    monkeypatch.setattr(mainloop.Tile, "hand_over", lambda tile: mainloop.fx.gpu.barrier())
    failed, found = stages_that_fail(case="plain", hidden=1280)
    assert failed or found


def test_lost_swizzle(fresh, monkeypatch):
    """Copies that are not swizzled where reads are."""
    real, calls = config.Gemm.swizzled, iter(range(1000))
    monkeypatch.setattr(
        config.Gemm, "swizzled",
        lambda cfg, token, chunk: real(cfg, token * (next(calls) % 2), chunk),
    )
    assert stages_that_fail()[0] >= {"gemm1"}


def test_padding_that_is_stored(fresh, monkeypatch):
    """Without the token's mask padding takes the sentinel for a route."""
    monkeypatch.setattr(tokens, "TOKEN_MASK", 0xFF)
    monkeypatch.setattr(work, "TOKEN_MASK", 0xFF)
    failed, found = stages_that_fail(case="plain", tokens=300, experts=2, topk=1)
    assert failed or found
