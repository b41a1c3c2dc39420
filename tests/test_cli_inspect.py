"""``inspect --backend cdna``: its counts, of compiled kernels and of paths made by hand."""

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("flydsl")
pytest.importorskip("typer", reason="an extra: pip install mixmoe[cli]")

from mixmoe.cli import loops  # noqa: E402
from mixmoe.shapes import SHAPES, Shape  # noqa: E402

TOY = Shape("toy", 24576, 64, 2, 1)  # K long enough to loop where four waves share it
K_STEPS = TOY.hidden // 128


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(SHAPES, "toy", TOY)
    return ("inspect", "--backend", "cdna", "--shape", "toy")


def test_inspect_counts_what_a_kernel_does(mixmoe, toy):
    code, out, _ = mixmoe(*toy, "--tokens", "1,3", "--json")
    kernels = {kernel["stage"]: kernel for kernel in json.loads(out)["a4w4"]}
    assert code == 0 and list(kernels) == ["quantise", "gemm1", "gemm2", "combine"]
    gemm = kernels["gemm1"]
    assert gemm["tokens"] == [1, 3] and "gfx950_e2m1_e2m1" in gemm["kernel"]
    assert gemm["mfma"] > 0 and gemm["mfma"] % K_STEPS == 0 and kernels["combine"]["mfma"] == 0
    assert gemm["vgpr_spills"] == gemm["sgpr_spills"] == gemm["scratch_bytes"] == 0
    assert 0 < gemm["vgpr"] <= 512 and 0 < gemm["lds_bytes"] <= 160 << 10
    # A workgroup whose waves share K reads at least the codes of 32 rows, gate and up.
    assert gemm["global_load_bytes"] >= 2 * 32 * TOY.hidden // 2
    loop = gemm["loop"]
    assert loop["iterations"] * loop["mix"]["mfma"] <= gemm["mfma"] // 4
    assert loop["iterations"] >= 3 and 0 < loop["mfma_busy"] <= 1
    assert 0 < loop["cycles"] * loop["iterations"] < gemm["cycles"]
    assert 0 < gemm["compile_seconds"] < 60 and gemm["code_bytes"] > 1000


def test_inspect_prints_tables(mixmoe, toy):
    code, out, _ = mixmoe(*toy, "--tokens", "2")
    assert code == 0
    for word in ("simulated", "VGPR", "spills", "groups", "busy", "gemm2_", "combine_"):
        assert word in out


def test_main_loop_of_a_path():
    """Of two loops with matrix instructions the inner one, of all its iterations."""
    inner = [4, 5, 6, 7]
    body = [2, 3, *inner * 5, 8]
    path = [0, 1, *body * 2, 9]
    assert loops.heads(path, matrix={5}) == (4, 7)
    assert loops.heads(path, matrix={3}) == (2, 8)
    assert loops.heads(path, matrix={9}) is None
    spans = loops.iterations_of(path, (4, 7))
    assert len(spans) == 5 and all(path[a:b] == inner for a, b in spans)
    assert spans[0][0] == 4


def test_mix_of_a_path():
    ops = ["v_mfma_f32_16x16x32_bf16", "v_add_u32", "s_waitcnt", "ds_read_b128", "s_cbranch_scc0",
           "buffer_load_dwordx4", "s_add_u32"]
    instructions = [SimpleNamespace(op=op) for op in ops]
    mix = loops.mix_of(instructions, [0, 0, *range(7)])
    assert mix == {"mfma": 3, "valu": 1, "salu": 3, "lds": 1, "global": 1}
    loop = loops.MainLoop(4, mix, 100.0, 0.5)
    assert loop.per_mfma["salu"] == 1.0
