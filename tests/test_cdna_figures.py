"""The CDNA kernels' simulated figures beside the stored ones: what got worse is a failure.

After a change that is meant: ``python -m benchmarks.cdna`` (``--only`` for some options).
"""

import copy
import os
from contextlib import contextmanager

import pytest

pytest.importorskip("flydsl")
pytest.importorskip("typer", reason="an extra: pip install '.[cli]'")

from benchmarks import cdna  # noqa: E402
from mixmoe.backends.cdna import config  # noqa: E402
from mixmoe.cli import compiled  # noqa: E402
from mixmoe.cli.survey import survey  # noqa: E402

CHEAP = [option for option in cdna.OPTIONS if option.cheap]
OTHERS = [option for option in cdna.OPTIONS if not option.cheap]


def stored(option):
    """The stored kernels of an option."""
    options = cdna.read()["options"]
    assert option.name in options, f"python -m benchmarks.cdna --only '{option.name}'"
    return options[option.name]["kernels"]


@pytest.mark.parametrize("option", CHEAP, ids=lambda option: option.name)
def test_figures(option):
    assert cdna.worse(stored(option), cdna.figures(option)) == []


@pytest.mark.sim_long
@pytest.mark.parametrize("option", OTHERS, ids=lambda option: option.name)
def test_every_figure(option):
    assert cdna.worse(stored(option), cdna.figures(option)) == []


@pytest.mark.sim_long
def test_figures_of_every_recipe():
    lines = {o.name: cdna.worse(stored(o), cdna.figures(o)) for o in cdna.recipes()}
    assert {name: found for name, found in lines.items() if found} == {}


def test_every_option_is_stored():
    held = cdna.read()
    assert held["label"] == "simulated, not measured"
    assert {option.name for option in cdna.OPTIONS} <= set(held["options"])
    for option in held["options"].values():
        for kernel in option["kernels"]:
            assert kernel["vgpr_spills"] == kernel["sgpr_spills"] == kernel["scratch_bytes"] == 0


def test_the_document_shows_what_is_stored():
    assert cdna.DOCUMENT.read_text() == cdna.markdown(cdna.read())


def change(kernels, stage, name, value):
    """A copy with one figure of the kernel of a stage changed."""
    changed = copy.deepcopy(kernels)
    kernel = next(k for k in changed if k["stage"] == stage)
    for part in name[:-1]:
        kernel = kernel[part]
    kernel[name[-1]] = value(kernel[name[-1]])
    return changed


@pytest.mark.parametrize(("name", "value", "word"), [
    (("cycles",), lambda v: v * 1.1, "cycles"),
    (("global_load_bytes",), lambda v: v * 1.1, "global_load_bytes"),
    (("lds_conflict_cycles",), lambda v: v + 100, "lds_conflict_cycles"),
    (("ir_lines",), lambda v: v * 1.2, "ir_lines"),
    (("code_bytes",), lambda v: v * 1.2, "code_bytes"),
    (("vgpr",), lambda v: v + 16, "vgpr"),
    (("vgpr_spills",), lambda v: 1, "vgpr_spills"),
    (("scratch_bytes",), lambda v: 4, "scratch_bytes"),
    (("loop", "per_mfma", "valu"), lambda v: v + 0.1, "VALU per MFMA"),
    (("loop", "mfma_busy"), lambda v: v - 0.05, "busy share"),
    (("loop",), lambda v: None, "main loop None"),
    (("stage",), lambda v: "gemm3", "other kernels than stored"),
])
def test_what_got_worse_is_said(name, value, word):
    kernels = stored(CHEAP[1])
    assert cdna.worse(kernels, kernels) == []
    (line,) = cdna.worse(kernels, change(kernels, "gemm1", name, value))
    assert word in line


def test_what_got_better_is_no_failure():
    kernels = stored(CHEAP[1])
    for name in ("cycles", "vgpr", "lds_conflict_cycles"):
        assert cdna.worse(kernels, change(kernels, "gemm1", (name,), lambda v: v // 2)) == []


def test_call_sites_are_asked_once_for_many(monkeypatch):
    """More than half of the time to compile was FlyDSL's walk over the callers of each operation,
    7,590 of these kernels. They are compiled twice here."""
    from flydsl.expr import meta

    real, asked = meta.capture_user_location, []
    monkeypatch.setattr(meta, "capture_user_location", lambda: asked.append(1) or real())
    survey(CHEAP[1].target, CHEAP[1].layer, (CHEAP[1].tokens,), simulate=False)
    assert 500 < len(asked) < 4000


def test_seconds_are_those_without_the_dump(monkeypatch):
    """What the simulator asks of the compiler costs as much again, and is no user's."""
    seen = []
    real = compiled.as_a_user_compiles

    @contextmanager
    def inside():
        with real():
            seen.append([name in os.environ for name in (compiled.DUMP, compiled.DEPTH)])
            yield
        seen.append([name in os.environ for name in (compiled.DUMP, compiled.DEPTH)])

    monkeypatch.setattr(compiled, "as_a_user_compiles", inside)
    survey(CHEAP[0].target, CHEAP[0].layer, (CHEAP[0].tokens,), simulate=False)
    assert len(seen) == 8 and seen == [[False, False], [True, True]] * 4


def test_a_worse_kernel_shows(monkeypatch):
    """Without the swizzle, 16 lanes that read one column of 16 rows meet in a few banks."""
    monkeypatch.setattr(config.Gemm, "swizzled", lambda cfg, token, chunk: chunk)
    found = cdna.worse(stored(CHEAP[0]), cdna.figures(CHEAP[0]))
    assert any("lds_conflict_cycles" in line for line in found)
