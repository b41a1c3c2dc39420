"""``check --simulate``: the compiled CDNA kernels judged from the command line, and found out."""

import json

import pytest

pytest.importorskip("flydsl")
pytest.importorskip("typer", reason="an extra: pip install '.[cli]'")

from mixmoe import verify  # noqa: E402
from mixmoe.backends.cdna import gemm1, mainloop  # noqa: E402
from mixmoe.cli import simulated  # noqa: E402
from mixmoe.cli.compiled import forget  # noqa: E402

CHECK = ("check", "--backend", "cdna", "--simulate", "--jobs", "1")
STAGES = len(verify.STAGES) + 1  # and what the simulator found


@pytest.fixture
def fresh():
    """Kernels compiled anew, before and after a fault is planted."""
    forget()
    yield
    forget()


def test_check_simulates(mixmoe):
    code, out, _ = mixmoe(*CHECK, "--recipe", "a4w4", "--cases", "plain; T=0", "--json")
    report = json.loads(out)
    assert code == 0 and report["failed"] == 0 and report["device"] == "gfx950, simulated"
    stages = report["cells"]["a4w4"]
    assert report["judged"] == 2 * STAGES and set(stages) == {*verify.STAGES, simulated.SIMULATOR}
    assert 0 < stages["gemm2"]["worst"] <= stages["gemm2"]["tolerance"] < 0.01


def test_check_prints_errors_and_tolerances(mixmoe):
    code, out, _ = mixmoe(*CHECK, "--recipe", "a4w4", "--cases", "64 routes an expert")
    assert code == 0 and "3.9e-3" in out and "simulator" in out and f"{STAGES} judged" in out


def test_few_and_all_cases():
    few, every = map(simulated.chosen_cases, ("few", "all"))
    assert set(few) < set(every) == set(simulated.CASES) and len(few) == len(simulated.FEW)
    assert set(verify.CASES) < set(every)


def failing(mixmoe):
    """Notes of the failing rows by stage, of a run whose exit code is 1."""
    words = (*CHECK, "--recipe", "a4w4", "--cases", "tail 288 x 96", "--json")
    code, out, _ = mixmoe(*words)
    assert code == 1
    return {row["stage"]: row.get("note", "") for row in json.loads(out)["rows"] if not row["ok"]}


def test_wrong_numbers_are_exit_code_1(mixmoe, fresh, monkeypatch):
    real = gemm1.gate_up
    monkeypatch.setattr(gemm1, "gate_up", lambda *args: real(*args)[::-1])
    assert "gemm1" in failing(mixmoe)


def test_a_race_is_exit_code_1_whatever_the_numbers(mixmoe, fresh, monkeypatch):
    for home, name in ((mainloop.fx.gpu, "barrier"), (mainloop.fx.rocdl, "s_barrier")):
        monkeypatch.setattr(home, name, lambda *args, **kwargs: None, raising=False)
    assert "race" in failing(mixmoe)["simulator"]


def test_refused_requests(mixmoe):
    """What an architecture has no kernels for is listed; where nothing is left, exit code 1."""
    code, out, _ = mixmoe(*CHECK, "--recipe", "w8a8_smooth", "--cases", "plain", "--json")
    report = json.loads(out)
    if report["refused"]:
        assert code == 1 and report["judged"] == 0
    for words, message in (
        ((*CHECK, "--target", "gfx90a"), "unknown simulated target: got gfx90a"),
        ((*CHECK, "--cases", "plane"), "unknown case: got plane, nearest legal: plain; T=0"),
        (("check", "--simulate"), "--simulate runs the kernels of: got cpu"),
    ):
        code, out, err = mixmoe(*words)
        assert code == 2 and message in err and out == ""
