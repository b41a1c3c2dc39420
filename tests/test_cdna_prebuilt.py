"""Kernels built ahead of time: manifest -> HIP's calls -> the simulator -> right numbers."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("flydsl")
pytest.importorskip("typer", reason="an extra: pip install '.[cli]'")

from cdna_cases import CASES, failures  # noqa: E402
from hip_standin import Simulator  # noqa: E402

from mixmoe import verify  # noqa: E402
from mixmoe.backends.cdna import cdna, prebuilt  # noqa: E402
from mixmoe.cli import simulated  # noqa: E402
from mixmoe.errors import MixMoEError  # noqa: E402
from mixmoe.shapes import SHAPES, Shape  # noqa: E402
from mixmoe.spec import Recipe  # noqa: E402

HERE = Path(__file__).parent
CASE = CASES["tail 288 x 96"]
TOY = Shape("toy", CASE.hidden, CASE.intermediate, CASE.experts, CASE.topk)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder of the toy's kernels, by the command line."""
    from mixmoe import cli

    folder = tmp_path_factory.mktemp("kernels")
    words = ["mixmoe", "build", "--shape", "toy", "--tokens", str(CASE.tokens), "-o", str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPES, "toy", TOY)
        patch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as stop:
            cli.main()
    assert not stop.value.code
    return folder


@pytest.fixture(autouse=True)
def unused():
    """No test leaves a folder in use."""
    yield
    prebuilt.use(None)


def run(folder, tmp_path):
    """(rows of the case, simulator) with the folder in use; FlyDSL must not be asked."""
    with simulated.session("gfx950", run=False) as session, pytest.MonkeyPatch.context() as patch:
        patch.setattr("flydsl.compiler.jit_function.JitFunction.__call__", refuse)
        simulator = Simulator(tmp_path, session.memory)
        prebuilt.use(folder, simulator.hip)
        rows = list(verify.judge(cdna(), "a4w4", Recipe.named("a4w4"), CASE))
    return rows, simulator


def refuse(*args, **kwargs):
    raise AssertionError("FlyDSL was asked to launch")


def test_manifest(built):
    held = json.loads((built / prebuilt.MANIFEST).read_text())
    assert held["target"] == "gfx950" and held["sources"] == prebuilt.source_hash()
    assert held["versions"]["flydsl"].startswith("0.4")
    # Every stage, and another form of stage 2 for calls that need not be deterministic.
    stages = [kernel["stage"] for kernel in held["kernels"]]
    assert sorted(stages) == sorted([*verify.STAGES[1:5], "gemm2"])
    for kernel in held["kernels"]:
        assert (built / kernel["file"]).read_bytes()[:4] == b"\x7fELF"
        assert kernel["block"] == [256, 1, 1]
        (variant,) = kernel["variants"]
        assert variant["shape"]["hidden"] == CASE.hidden and variant["tokens"] == [CASE.tokens]
        assert Recipe.named(variant["recipe"]) == Recipe.named("a4w4")
        assert kernel["resources"]["vgpr_spill_count"] == 0


def test_prebuilt_kernels_give_the_right_numbers(built, tmp_path):
    rows, simulator = run(built, tmp_path)
    assert len(rows) == len(verify.STAGES) and failures(rows) == []
    assert len(simulator.reports) == 12 and all(report.ok for report in simulator.reports)


def changed(built, folder, stage, change):
    """A copy of the folder with one kernel's entry changed."""
    held = json.loads((built / prebuilt.MANIFEST).read_text())
    for kernel in held["kernels"]:
        (folder / kernel["file"]).write_bytes((built / kernel["file"]).read_bytes())
        if kernel["stage"] == stage:
            change(kernel)
    (folder / prebuilt.MANIFEST).write_text(json.dumps(held))
    return folder


def swap_sources(kernel):
    names = [name for name, _ in kernel["parameters"]]
    a, b = names.index("tokens"), names.index("topk")
    for argument in kernel["arguments"]:
        argument[0] = {a: b, b: a}.get(argument[0], argument[0])


@pytest.mark.parametrize(("stage", "change"), [
    ("gemm2", swap_sources),
    ("gemm2", lambda kernel: kernel.update(grid=[["div", kernel["grid"][0], 2], 1, 1])),
    ("combine", lambda kernel: kernel["arguments"].reverse()
     or [a.__setitem__(2, b) for a, b in zip(kernel["arguments"], (0, 8, 16), strict=False)]),
])
def test_a_wrong_manifest_gives_wrong_numbers(built, tmp_path, stage, change):
    (tmp_path / "kernels").mkdir()
    rows, _ = run(changed(built, tmp_path / "kernels", stage, change), tmp_path)
    assert stage in {row.stage for row in failures(rows)}


def test_what_does_not_fit_is_refused(built, tmp_path):
    with pytest.raises(MixMoEError, match="these are for: got gfx950, nearest legal: gfx942"):
        prebuilt.read(built, "gfx942")
    with pytest.raises(MixMoEError, match="holds manifest.json"):
        prebuilt.read(tmp_path)
    path = built / prebuilt.MANIFEST
    text = path.read_text()
    for name, value, rule in (("sources", "0" * 64, "sources are"), ("format", 0, "format is")):
        (tmp_path / prebuilt.MANIFEST).write_text(json.dumps(json.loads(text) | {name: value}))
        with pytest.raises(MixMoEError, match=rule):
            prebuilt.read(tmp_path)
    with simulated.session("gfx942", run=False), pytest.raises(MixMoEError, match="gfx942"):
        prebuilt.use(built)


def without(key):
    """A manifest whose kernels lack a field."""
    return lambda held: [kernel.pop(key) for kernel in held["kernels"]]


@pytest.mark.parametrize("change", [
    b"{", b"[]", b"\xff", b"{}",
    lambda held: held.pop("sources"), lambda held: held.pop("target"),
    lambda held: held.update(kernels=[{}]), lambda held: held.update(kernels=[[]]),
    lambda held: held.update(kernels=3), without("grid"), without("sha256"),
    lambda held: held["kernels"][0].update(file=3), lambda held: held["kernels"][0].update(more=3),
])  # fmt: skip
def test_a_damaged_manifest_is_refused(built, tmp_path, change):
    held = json.loads((built / prebuilt.MANIFEST).read_text())
    if callable(change):
        change(held)
    text = json.dumps(held).encode() if callable(change) else change
    (tmp_path / prebuilt.MANIFEST).write_bytes(text)
    with pytest.raises(MixMoEError, match=r"as `mixmoe build` writes it|format is: got None"):
        prebuilt.read(tmp_path)


def test_a_code_object_that_is_gone_or_changed_is_refused_at_once(built, tmp_path):
    """``use`` says so, not the first launch; what was in use stays."""
    folder = changed(built, tmp_path, None, None)
    code = next(folder.glob("gemm1*.hsaco"))
    with simulated.session("gfx950", run=False):
        before = prebuilt.use(folder)
        code.write_bytes(code.read_bytes()[:-1] + b"?")
        with pytest.raises(MixMoEError, match=f"{code.name} is the code object .* another file"):
            prebuilt.use(folder)
        code.unlink()
        with pytest.raises(MixMoEError, match=f"got {code.name}: No such file"):
            prebuilt.use(folder)
        assert list(prebuilt.IN_USE) == [before]


def test_every_source_counts():
    """A changed byte of any kernel source is another hash."""
    here, before = prebuilt.HERE / "combine.py", prebuilt.source_hash()
    with pytest.MonkeyPatch.context() as patch:
        real = type(here).read_bytes
        patch.setattr(type(here), "read_bytes", lambda p: real(p) + b"#" * (p == here))
        assert prebuilt.source_hash.__wrapped__() != before
    assert prebuilt.source_hash.__wrapped__() == before


def test_a_kernel_that_was_not_built_is_named(built, tmp_path):
    with simulated.session("gfx950", run=False) as session:
        simulator = Simulator(tmp_path, session.memory)
        held = prebuilt.read(built, "gfx950", simulator.hip)
        with pytest.raises(MixMoEError, match="none called gemm3"):
            held.launch("gemm3", (), None)
        entry = next(iter(held.entries.values()))
        with pytest.raises(MixMoEError, match="takes codes, scales, x"):
            entry.kernarg(())
        with pytest.raises(MixMoEError, match="hipModuleGetFunction.*error 500: named symbol"):
            held.hip.function(held.code(entry), "gemm3")
        with pytest.raises(MixMoEError, match="hipModuleLoadData.*image is invalid"):
            held.hip.function(b"MZ" + bytes(64), "gemm3")
        with pytest.raises(MixMoEError, match="stay below"):
            held.hip.launch(None, (1 << 24, 1, 1), (256, 1, 1), 0, 0, b"")
        (tmp_path / entry.file).write_bytes(b"\x7fELF")
        with pytest.raises(MixMoEError, match="that the manifest names"):
            replace(held, folder=tmp_path).code(entry)


def test_kernarg_layout():
    """Addresses, sizes and values at their offsets, little-endian."""
    entry = prebuilt.Entry(
        "k", "gemm1", "k.hsaco", "", (("x", "tensor"), ("n", "i32"), ("s", "f32")),
        ((0, "address", 0), (0, "size", 8), (2, "value", 12), (1, "value", 16)), 24,
        (["mul", ["arg", 1], 3], ["add", ["sub", 9, ["arg", 1]], 1], 1), (64, 1, 1), 0, 0, [], {},
    )  # fmt: skip
    x = torch.zeros(5)
    packed = entry.kernarg((x, 7, 1.0))
    assert packed[:8] == x.data_ptr().to_bytes(8, "little") and len(packed) == 24
    assert packed[8:] == bytes([5, 0, 0, 0, 0, 0, 0x80, 0x3F, 7, 0, 0, 0, 0, 0, 0, 0])
    assert entry.sizes((x, 7, 1.0)) == ((21, 3, 1), (64, 1, 1), 0)
    with pytest.raises(MixMoEError, match="n is of kind: got Tensor, nearest legal: i32"):
        entry.kernarg((x, x, 1.0))


def test_without_flydsl(built, tmp_path):
    """The same on a machine that has no FlyDSL: only its names are imported, nothing compiles."""
    words = [sys.executable, str(HERE / "without_flydsl.py"), str(built), CASE.name, str(tmp_path)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
    done = subprocess.run(words, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert "flydsl is not installed" in found["without"] and found["error"] == "None"
    assert [row[0] for row in found["rows"]] == list(verify.STAGES)
    assert all(worst <= tolerance for _, worst, tolerance, _ in found["rows"])
    assert "launch, and flydsl is not installed" in found["refused"]
