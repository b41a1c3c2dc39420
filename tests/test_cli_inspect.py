"""``inspect --backend cdna``: its counts, of compiled kernels and of paths made by hand."""

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("flydsl")
pytest.importorskip("typer", reason="an extra: pip install '.[cli]'")

from mixmoe.cli import inspect, loops  # noqa: E402
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


FIGURES = {
    "vgpr": 512, "agpr": 256, "sgpr": 102, "vgpr_spills": 0, "sgpr_spills": 7, "scratch_bytes": 64,
    "lds_bytes": 163840, "workgroups_per_cu": 16, "waves_per_simd": 8, "limit": "wave slots",
    "ir_lines": 123456, "code_instructions": 12345, "code_bytes": 1234567, "compile_seconds": 98.76,
    "mfma": 71680, "cycles": 7259200, "global_load_bytes": 147300000, "lds_cycles": 100,
    "global_store_bytes": 9216000, "lds_conflict_cycles": 99,
    "loop": {"cycles": 21020, "mfma_busy": 0.974,
             "per_mfma": {"valu": 10.06, "salu": 10.68, "lds": 10.3, "global": 10.22}},
}  # fmt: skip


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_no_figure_is_cut(monkeypatch, capsys, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    kernel = SimpleNamespace(name="gemm1", tokens=(1, 8), figures=FIGURES)
    inspect.show([kernel, kernel], "toy, simulated")
    out = capsys.readouterr().out
    assert "…" not in out
    cells = [str(cell(FIGURES)) for cell in (*inspect.TAKES.values(), *inspect.DOES.values())]
    for words in (*inspect.TAKES, *inspect.DOES, *cells):
        assert all(word.removeprefix("[red]") in out for word in words.split()), words
    tables = sum(line.strip(" ─") == "" and "─" in line for line in out.splitlines())
    assert tables == {40: 7, 80: 4, 200: 2}[columns]


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
