"""The command line: what each command prints, its exit code, and one line for a broken rule."""

import json
import subprocess
import sys

import mxfp4_checkpoint
import pytest
import torch

pytest.importorskip("typer", reason="an extra: pip install '.[cli]'")

from mixmoe import backends, cli, verify  # noqa: E402
from mixmoe.backends.cpu import cpu  # noqa: E402
from mixmoe.cli import run as run_command  # noqa: E402
from mixmoe.hf.models import small_model  # noqa: E402
from mixmoe.preshuffle import ORDERS  # noqa: E402
from mixmoe.spec import CELLS  # noqa: E402

FEW = tuple(case for case in verify.CASES if case.name in ("plain", "T=0", "masked ids"))


@pytest.fixture
def few_cases(monkeypatch):
    whole = verify.verify
    monkeypatch.setattr(verify, "verify", lambda *a, **k: whole(*a, cases=FEW, **k))


def test_check_prints_json_and_nothing_else(mixmoe, few_cases):
    code, out, err = mixmoe("check", "--backend", "cpu", "--recipe", "a8w4, a16w16", "--json")
    report = json.loads(out)
    assert code == 0 and report["failed"] == 0 and report["backend"] == "cpu"
    assert set(report["cells"]) == {"a8w4", "a16w16"}
    for stages in report["cells"].values():
        assert set(stages) == set(verify.STAGES)
        assert all(c["ok"] and c["worst"] <= c["tolerance"] for c in stages.values())
    assert len(report["rows"]) == 2 * len(FEW) * len(verify.STAGES)


class Broken:
    """The cpu backend whose stage 2 loses a row, or that refuses, or that cannot run."""

    def __init__(self, how):
        self.original, self.how = cpu(), how

    def __getattr__(self, name):
        if name == "gemm2" and self.how == "wrong":
            return lambda *args: self.original.gemm2(*args).index_fill(0, torch.tensor(4), 0.0)
        if name == "check" and self.how == "refuses":
            return lambda *args: (_ for _ in ()).throw(cli.MixMoEError("no such format", "mxfp4"))
        return getattr(self.original, name)


@pytest.mark.parametrize("how", ["wrong", "refuses"])
def test_check_fails_with_exit_code_1(mixmoe, few_cases, monkeypatch, how):
    monkeypatch.setattr(backends, "pick", lambda device, name: Broken(how))
    code, out, _ = mixmoe("check", "--recipe", "a8w4")
    assert code == 1
    word = {"wrong": "failed a8w4, plain, gemm2", "refuses": "refused a8w4: no such format"}[how]
    assert word in out
    code, out, _ = mixmoe("check", "--recipe", "a8w4", "--json")
    assert code == 1
    report = json.loads(out)
    assert (report["failed"] > 0) == (how == "wrong")
    assert report["refused"] == (3 if how == "refuses" else 0)


def test_check_prints_a_table(mixmoe, few_cases):
    code, out, _ = mixmoe("check", "--recipe", "a4w4")
    assert code == 0 and "a4w4" in out and "gemm1" in out and "18 judged, 0 failed" in out


def test_info(mixmoe):
    code, out, _ = mixmoe("info", "--json")
    found = json.loads(out)
    assert code == 0 and found["versions"]["torch"] == torch.__version__
    assert set(found["backends"]) == set(backends.REGISTRY)
    assert found["backends"]["cpu"] == "available"
    assert found["recipes"]["a8w4"] == "fp8_token x mxfp4" and set(found["recipes"]) == set(CELLS)
    if not torch.cuda.is_available():
        assert "GPU" in found["backends"]["hopper"]
    code, out, _ = mixmoe("info")
    assert code == 0 and "available" in out and torch.__version__ in out and "w4a8_smooth" in out


def test_inspect(mixmoe):
    code, out, _ = mixmoe("inspect")
    assert code == 0 and "rows" in out
    name = next(n for n in ORDERS if n != "rows")
    code, out, _ = mixmoe("inspect", name)
    assert code == 0 and out.startswith(f"{name}:")
    code, _, err = mixmoe("inspect", name, "--element", "int9")
    assert code == 2 and "got int9" in err


BROKEN_RULES = {
    "recipe": (("run", "--recipe", "a3w4"), "unknown recipe: got a3w4, nearest legal: a16w16"),
    "smooth": (("run", "--recipe", "w4a8_smooth"), "got w4a8_smooth, nearest legal: w4a8"),
    "model": (("run", "--model", "/nowhere"), "got /nowhere, nearest legal: qwen3-moe"),
    "backend": (("check", "--backend", "tpu"), "unknown backend: got tpu, nearest legal: cpu"),
    "cell": (("check", "--recipe", "a9w9"), "unknown recipe: got a9w9"),
    "order": (("inspect", "spiral"), "got spiral"),
    "inspected": (("inspect", "--backend", "hopper"), "got hopper, nearest legal: cdna"),
    "shape": (("build", "--shape", "gpt5", "-o", "/nowhere"), "unknown shape: got gpt5"),
    "tokens": (("inspect", "--backend", "cdna", "--tokens", "1;2"), "got 1;2, nearest legal: 1,8"),
    "T = 0": (("inspect", "--backend", "cdna", "--tokens", "8,0"), "got 0, nearest legal: 1"),
    "T = 0, build": (("build", "--tokens", "0", "-o", "/nowhere"), "got 0, nearest legal: 1"),
    "no T": (("build", "--tokens", ",", "-o", "/nowhere"), "got ,, nearest legal: 1,8"),
    "no recipe": (("build", "--recipe", ",", "-o", "/nowhere"), "got ',', nearest legal: a4w4"),
    "build for": (("build", "--target", "gfx9", "-o", "/nowhere"), "target: got gfx9, nearest"),
    "no folder": (("build", "-o", "/proc/x"), "got /proc/x (No such file or directory), nearest"),
    "a file": (("build", "-o", __file__), f"got {__file__} (File exists), nearest legal: a new"),
    "order and kernels": (("inspect", "cdna_runs4", "--backend", "cdna"), "shown: got cdna_runs4"),
    "element and kernels": (
        ("inspect", "--backend", "cdna", "--element", "e2m1"), "shown: got --element e2m1"),
    "element of none": (("inspect", "--element", "e2m1"), "got --element e2m1, nearest legal: an"),
    "kernels' target": (("inspect", "--target", "gfx950"), "option: got --target gfx950"),
    "kernels' JSON": (("inspect", "cdna_runs4", "--json"), "option: got --json, nearest legal"),
    "simulated device": (
        ("check", "--backend", "cdna", "--simulate", "--device", "cuda"), "got --device cuda"),
    "simulated cases": (("check", "--cases", "few"), "got --cases few, nearest legal: --simulate"),
}


@pytest.mark.parametrize("case", BROKEN_RULES)
def test_broken_rules_are_one_line(mixmoe, case):
    words, message = BROKEN_RULES[case]
    code, out, err = mixmoe(*words)
    assert code == 2 and message in err and out == ""
    assert err.startswith("mixmoe: ") and err.count("\n") == 1


def test_a_folder_transformers_cannot_read_is_one_line(mixmoe, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe"')
    code, _, err = mixmoe("run", "--model", str(tmp_path))
    assert code == 2 and "transformers cannot load this model" in err and "Traceback" not in err


@pytest.fixture
def smaller(monkeypatch):
    """The built-in models at half their size."""
    from mixmoe.hf import models

    monkeypatch.setattr(
        models, "small_model", lambda name, **k: small_model(name, hidden=128, layers=2, **k)
    )


@pytest.mark.parametrize("model", ["qwen3-moe", "mixtral", "deepseek-v3", "gpt-oss"])
def test_run_small_models(mixmoe, smaller, model):
    code, out, _ = mixmoe("run", "--model", model, "--recipe", "a8w8", "--tokens", "4")
    assert code == 0
    layers = 1 if model == "deepseek-v3" else 2  # its first layer is dense
    assert f"{model}: {layers} MoE layers in a8w8, mean error " in " ".join(out.split())
    words = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.strip()}
    assert len(words["transformers"]) == len(words["mixmoe"]) == 4
    assert "allowed" in out and "a8w8" in out


def test_run_shows_the_error_of_a_fault(smaller, monkeypatch):
    """The table's error is measured: weights that are off show in it."""
    import mixmoe.hf.experts as experts

    lines = []
    monkeypatch.setattr(run_command, "table", lambda made: lines.append(made) or "")
    options = {"recipe": "a16w16", "tokens": 2, "backend": None, "prompt": "", "device": "cpu"}
    run_command.run(model="qwen3-moe", **options)
    honest = experts.weights_of
    monkeypatch.setattr(experts, "weights_of", lambda module, fmt: swapped(honest(module, fmt)))
    run_command.run(model="qwen3-moe", **options)
    good, bad = ([line.worst for line in made] for made in lines)
    assert max(good) < 0.02 < 0.5 < min(bad)


def swapped(weights):
    from dataclasses import replace

    codes = torch.cat(weights.w13.codes.chunk(2, dim=1)[::-1], dim=1)
    return replace(weights, w13=replace(weights.w13, codes=codes))


def test_run_local_checkpoints(mixmoe, tmp_path):
    dense, mxfp4 = tmp_path / "dense", tmp_path / "mxfp4"
    small_model("mixtral", hidden=128, layers=2).save_pretrained(dense)
    code, out, _ = mixmoe("run", "--model", str(dense), "--recipe", "w8a8", "--tokens", "3")
    assert code == 0 and "2 MoE layers in w8a8" in " ".join(out.split())
    mxfp4.mkdir()
    mxfp4_checkpoint.write(mxfp4)
    code, out, _ = mixmoe("run", "--model", str(mxfp4), "--recipe", "a16w4", "--tokens", "3")
    summary = " ".join(out.split())
    assert code == 0 and "2 MoE layers in a16w4" in summary
    # The checkpoint's values are MXFP4 already: the error is that of bf16 alone.
    assert float(summary.split(", mean error ")[1].split("%")[0]) / 100 < 2**-6


def test_module_entry_and_bench_mount():
    done = subprocess.run(
        [sys.executable, "-m", "mixmoe.cli", "--help"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0
    for command in ("run", "check", "info", "inspect", "build", "bench"):
        assert command in done.stdout
