"""Few tokens against packed 4-bit weights on the CPU: a C kernel, built once where a compiler is.

Optional: without a C compiler the cpu backend multiplies by dequantised weights, with the same
float32 accumulation. DeepSeek-V3 TP8, T = 64, 2 cores: see docs/measured.md.
"""

import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from mixmoe.errors import MixMoEError
from mixmoe.formats import Quantised, e2m1, int4

SOURCE = Path(__file__).with_name("cpu_w4.c")
FLAGS = ["-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC"]
FEW = 32  # above it a dequantised copy is reused often enough to win (2 cores EPYC, 2026-11-24)


def applies(weights: Quantised, tokens: int) -> bool:
    """Whether :func:`matmul` can multiply by these weights and is the faster way."""
    fmt = weights.format
    grouped = fmt.rows == 1 and fmt.cols in (32, 64, 128)
    small = tokens <= FEW and weights.codes.device.type == "cpu"
    return fmt.element in (e2m1, int4) and grouped and small and library() is not None


def matmul(x: Tensor, weights: Quantised) -> Tensor:
    """``x @ dequantised.T`` in float32: x (m, K) f32, weights (N, K) -> (m, N) f32."""
    rows, k = weights.shape
    assert weights.scales is not None, "4-bit formats have scales"
    if x.shape[1:] != (k,):  # the kernel is told len(x) rows of k
        raise MixMoEError("x is (m, K) of the weights' K", tuple(x.shape), (len(x), k))
    scales = weights.format.scale_value(weights.scales)
    halves = x.view(len(x), k // 2, 2).transpose(1, 2).contiguous()
    codes, y = weights.codes.contiguous(), torch.empty(len(x), rows)
    tensors = (halves, codes, scales.contiguous(), table(weights.format.element), y)
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in tensors)
    sizes = (ctypes.c_long(size) for size in (len(x), rows, k, weights.format.cols))
    kernel = library()
    assert kernel is not None, "applies() was asked first"
    kernel.mixmoe_w4_matmul(*pointers, *sizes, torch.get_num_threads())
    return y


@cache
def table(element: object) -> Tensor:
    """The 16 values of a 4-bit element."""
    codes = torch.arange(16, dtype=torch.uint8)
    decode = e2m1.decode if element is e2m1 else int4.decode
    return decode(codes, torch.float32)[0::2].contiguous()


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel, from the user's cache or built now; None where that is impossible."""
    try:
        return ctypes.CDLL(str(_build()))
    except (OSError, subprocess.SubprocessError):
        return None


def _build() -> Path:
    """Compile for exactly this processor; the file name holds source, flags and processor."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = [line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")][:1]
    what = "".join([SOURCE.read_text(), *FLAGS, platform.machine(), *flags])
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mixmoe"
    target = home / f"cpu_w4-{hashlib.sha256(what.encode()).hexdigest()[:16]}.so"
    if not target.exists():
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home) as folder:
            built = Path(folder) / "kernel.so"
            command = ["cc", *FLAGS, str(SOURCE), "-o", str(built)]
            subprocess.run(command, check=True, capture_output=True, timeout=60)
            built.replace(target)  # atomic: another process may build the same file
    return target
