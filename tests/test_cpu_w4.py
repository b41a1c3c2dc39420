"""The C kernel of the cpu backend against float64, with and without a compiler."""

import pytest
import torch

import mixmoe
from mixmoe.backends import cpu_w4, load
from mixmoe.formats import FORMATS

NAMES = ["mxfp4", "int4_group32", "int4_group64_f32", "int4_group128"]


def error(y, x, q):
    ref = x.double() @ q.dequantise(torch.float64).T
    return ((y - ref).norm(dim=1) / ref.norm(dim=1)).max().item()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 11, 32])
def test_matmul(name, m):
    torch.manual_seed(m)
    q = FORMATS[name].quantise(torch.randn(37, 384))
    x = torch.randn(m, 384)
    assert cpu_w4.applies(q, m), "the test machine has a C compiler"
    assert error(cpu_w4.matmul(x, q), x, q) < 2e-6


def test_matmul_check_can_fail():
    q = FORMATS["mxfp4"].quantise(torch.randn(37, 384))
    x = torch.randn(3, 384)
    y = cpu_w4.matmul(x, q)
    q.scales[5, 7] += 1
    assert error(y, x, q) > 1e-3
    q.scales[5, 7] -= 1
    q.codes[5, 9] ^= 0x11
    assert error(y, x, q) > 1e-4


@pytest.mark.parametrize("columns", [192, 768])
def test_rows_of_another_width_are_refused(columns):
    """The kernel is told len(x) rows of K: half of K would be read beyond the end."""
    q = FORMATS["mxfp4"].quantise(torch.randn(37, 384))
    with pytest.raises(mixmoe.MixMoEError, match=r"got \(4, .*nearest legal: \(4, 384\)"):
        cpu_w4.matmul(torch.randn(4, columns), q)


def test_layer_agrees_without_a_compiler(monkeypatch):
    torch.manual_seed(0)
    weights = mixmoe.Weights.from_dense(torch.randn(4, 128, 96), torch.randn(4, 96, 64), "mxfp4")
    x, ids, w = torch.randn(9, 96), torch.randint(0, 4, (9, 2)), torch.rand(9, 2)
    recipe = mixmoe.Recipe.named("a16w4", out_dtype=torch.float32)
    fast = mixmoe.moe(x, weights, ids, w, recipe=recipe)
    calls = []
    monkeypatch.setattr(cpu_w4, "library", lambda: calls.append(1))
    plain = mixmoe.moe(x, weights, ids, w, recipe=recipe)
    assert calls
    torch.testing.assert_close(fast, plain, rtol=2**-8, atol=1e-3)


def test_library_is_none_without_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    cpu_w4.library.cache_clear()
    assert cpu_w4.library() is None
    cpu_w4.library.cache_clear()
    assert load("cpu").unavailable() is None
