"""Faults planted in the CDNA kernels without scaled MFMAs: each must turn the checks red."""

from dataclasses import replace

import pytest

pytest.importorskip("flydsl")

from cdna_cases import CASES, failures, findings, simulate

from mixmoe import verify
from mixmoe.backends.cdna import cdna
from mixmoe.backends.cdna import mainloop as scaled
from mixmoe.backends.cdna.plain import (
    codes,
    config,
    decode,
    epilogue,
    factors,
    gemm1,
    mainloop,
    quantise,
    requantise,
    weights,
)
from mixmoe.cli.compiled import forget


@pytest.fixture
def fresh():
    """Kernels compiled anew, before and after: what is planted must not stay in a cache."""
    forget()
    yield
    forget()


def fail(recipe, case="tail 288 x 96", arch="gfx950", **changes):
    """(stages of failing rows, simulator findings) of one case, with fields of it changed."""
    case = replace(CASES[case], **changes)
    with simulate(arch=arch) as session:
        rows = list(verify.judge(cdna(), recipe, verify.recipes([recipe])[recipe], case))
    return {row.stage for row in failures(rows)}, findings(session)


def test_swapped_gate_and_up(fresh, monkeypatch):
    real = gemm1.gate_up
    monkeypatch.setattr(gemm1, "gate_up", lambda *args: real(*args)[::-1])
    assert "gemm1" in fail("a16w16")[0]


def test_dropped_k_step(fresh, monkeypatch):
    real = config.Gemm.k_steps.fget
    monkeypatch.setattr(config.Gemm, "k_steps", property(lambda cfg: max(1, real(cfg) - 1)))
    assert "gemm2" in fail("w8a8")[0]


def test_scale_of_another_group(fresh, monkeypatch):
    real = factors.WeightFactors.of_unit
    monkeypatch.setattr(
        factors.WeightFactors, "of_unit", lambda self, key, unit: real(self, key, 0)
    )
    assert fail("w4a8")[0] >= {"gemm1", "gemm2"}


def test_folded_scale_of_another_block(fresh, monkeypatch):
    real = factors.WeightFactors.of_row
    monkeypatch.setattr(
        factors.WeightFactors, "of_row", lambda self, slot, key, step: real(self, slot, key, 0)
    )
    assert fail("a16w4")[0] >= {"gemm1", "gemm2"}


def test_token_scale_of_another_block(fresh, monkeypatch):
    real = factors.TokenFactors.read
    monkeypatch.setattr(
        factors.TokenFactors, "read",
        lambda self, kt, unit, group, slot: real(self, kt, 0, group, slot),
    )
    assert "gemm1" in fail("a8w8_block", "bias", arch="gfx942")[0]


def test_codes_of_a_word_out_of_order(fresh, monkeypatch):
    real = decode.from_table
    monkeypatch.setattr(decode, "from_table", lambda *args: real(*args)[::-1])
    assert fail("a8w4", arch="gfx942")[0] >= {"gemm1", "gemm2"}


def test_negative_zero_left_as_it_is(fresh, monkeypatch):
    """0x80 is NaN in e4m3fnuz; h has some, weights are packed without."""
    monkeypatch.setattr(decode, "clear_negative_zero", decode.keep)
    assert "gemm2" in fail("a8w8", arch="gfx942")[0]


def test_row_scales_of_the_first_expert(fresh, monkeypatch):
    real = epilogue.row_bias
    monkeypatch.setattr(epilogue, "row_bias", lambda bias, at: real(bias, at * 0))
    assert fail("a8w8", arch="gfx942")[0] >= {"gemm1", "gemm2"}


def test_smooth_factors_of_the_first_expert(fresh, monkeypatch):
    real = quantise.smooth_eight
    monkeypatch.setattr(
        quantise, "smooth_eight", lambda cfg, smooth, expert, part: real(cfg, smooth, 0, part)
    )
    assert fail("w8a8_smooth", "plain")[0] >= {"quantise"}


def test_rows_scaled_wave_by_wave(fresh, monkeypatch):
    """The maximum of a row that four waves hold, without the exchange."""
    monkeypatch.setattr(quantise.Rows, "lanes", property(lambda cfg: 256))
    sizes = {"tokens": 4, "hidden": 1056, "intermediate": 64, "experts": 1, "topk": 1}
    assert fail("w8a8", "plain", **sizes) == (set(), [])
    forget()
    monkeypatch.setattr(quantise, "across_waves", lambda lds, tid, top: top)
    assert "quantise" in fail("w8a8", "plain", **sizes)[0]


def test_codes_that_saturate_too_soon(fresh, monkeypatch):
    real = codes.clamp
    monkeypatch.setattr(codes, "clamp", lambda values, limit: real(values, limit / 2))
    assert "quantise" in fail("w8a8", "tail 32 x 320", arch="gfx942")[0]


def test_missing_barrier(fresh, monkeypatch):
    """The stage that a slower wave still reads is overwritten: a race, whatever the numbers."""
    monkeypatch.setattr(mainloop, "meet", lambda: None)
    _, found = fail("a16w4", "plain", tokens=4, hidden=544)
    assert any("race" in line for line in found)


def test_sums_that_begin_elsewhere(fresh, monkeypatch):
    """An int32 sum becomes a float32 by where it begins."""
    monkeypatch.setattr(mainloop, "MAGIC", mainloop.MAGIC + (1 << 14))
    assert fail("w4a8")[0] >= {"gemm1", "gemm2"}


def test_sums_of_the_first_wave_alone(fresh, monkeypatch):
    """Where waves share K."""
    sizes = {"tokens": 4, "hidden": 1024, "intermediate": 32, "experts": 1, "topk": 1}
    assert fail("a16w16", "plain", **sizes) == (set(), [])
    forget()
    monkeypatch.setattr(scaled, "add_sums", lambda cfg, place, lds, acc: None)
    assert "gemm1" in fail("a16w16", "plain", **sizes)[0]


def test_weights_of_the_place_before(fresh, monkeypatch):
    """A load that overwrites what is not multiplied yet."""
    real = weights.Weights.operand
    monkeypatch.setattr(
        weights.Weights, "operand", lambda self, slot, key, step, mma: real(self, slot, key, 0, mma)
    )
    assert fail("a16w16")[0] >= {"gemm1", "gemm2"}


def test_scale_of_one_waves_columns(fresh, monkeypatch):
    """A block of 128 columns of h whose waves do not meet."""
    monkeypatch.setattr(
        requantise, "top_of_waves", lambda cfg, place, lds, group, top: top
    )
    assert "gemm1" in fail("a8w8_block", "tail 96 x 288", arch="gfx942")[0]
