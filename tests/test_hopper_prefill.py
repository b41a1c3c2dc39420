"""The prefill kernels: work lists under the interpreter, kernels compiled for sm_90a."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.experimental.gluon import language as gl  # noqa: E402
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor  # noqa: E402

from mixmoe.backends.hopper import gemm2_prefill  # noqa: E402
from mixmoe.backends.hopper.mainloop import weight_descriptors  # noqa: E402
from mixmoe.backends.hopper.prefill import grouped_prefill  # noqa: E402
from mixmoe.backends.hopper.slots import padded  # noqa: E402
from mixmoe.backends.hopper.worklist import Cut  # noqa: E402
from mixmoe.spec import Problem  # noqa: E402
from tests.hopper_compile import TUNED_FOR, Fake, Resources, compile_gluon  # noqa: E402

HERE = Path(__file__).parent
F32, I32, BF16 = Fake(torch.float32), Fake(torch.int32), Fake(torch.bfloat16)


def test_work_lists() -> None:
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{HERE.parent}:{HERE}"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", HERE / "hopper_worklists.py"],
        env=env, capture_output=True, text=True, cwd=HERE.parent,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and int(passed.group(1)) > 90, run.stdout[-400:]


def grouped(tokens: int, precise: bool, kind: int | None, H: int = 7168, bias: bool = False,
            wide: bool = False) -> Resources:  # fmt: skip
    """`grouped_prefill` as a launch for E 256, topk 8, I 256 compiles it."""
    cut = Cut.of(Problem(tokens, H, 256, 256, 8), precise)
    units = Fake(torch.int32, (8192, 56, 256)), Fake(torch.int32, (8192, 896))
    words = weight_descriptors(*units, 4, 1)
    scalars = (float("inf"), 1.702, 4.0, 25.0)
    return compile_gluon(
        grouped_prefill, *words, Fake(torch.float8_e4m3fn), I32, F32, I32, I32, BF16, 256, F32,
        F32 if bias else None, F32 if bias and kind is not None else None, 256, 0, *scalars, 32, 4,
        H, padded(H), KIND=kind, WIDE=wide, **cut.options(H),
    )  # fmt: skip


CASES: dict[str, dict[str, Any]] = {
    "fast": {"tokens": 8192, "precise": False, "kind": 0},
    "fast swiglu bias": {"tokens": 8192, "precise": False, "kind": 1, "bias": True, "H": 2880},
    "fast 128": {"tokens": 4096, "precise": False, "kind": 0},
    "fast 64 wide": {"tokens": 1024, "precise": False, "kind": 0, "wide": True},
    "precise": {"tokens": 8192, "precise": True, "kind": 0},
    "precise 128": {"tokens": 4096, "precise": True, "kind": 0},
    "rows": {"tokens": 8192, "precise": False, "kind": None, "H": 2880, "bias": True},
    "two steps": {"tokens": 1024, "precise": True, "kind": 0, "H": 192},
    "rows precise": {"tokens": 8192, "precise": True, "kind": None, "H": 2880},
}


@pytest.mark.parametrize("name", CASES)
def test_grouped_compiles(name: str) -> None:
    made = grouped(**CASES[name])
    assert not made.messages and made.qgmma, made.messages
    assert made.registers == 168 and made.warps == 12 and made.shared <= 227 * 1024
    # The gated precise form is some registers short (a few values stay in local memory, measured
    # free); every other form keeps its inner loops clear of it.
    inner = min(made.loops(), key=lambda loop: loop[0])[1]
    assert sum(n for op, n in inner.items() if op.startswith(("STL", "LDL"))) <= 1
    precise = 400 if TUNED_FOR else 1200  # Triton 3.9 spills 988 and 1164 bytes, 3.6 344
    assert made.spills <= (precise if CASES[name]["precise"] else 48), made.spills


def ring(I: int, bias: bool = False, wide: bool = False) -> Resources:
    """`gemm2_ring` for E 256, topk 8, H 7168, T 4096."""
    cut = gemm2_prefill.Ring.of(Problem(4096, 7168, I, 256, 8), torch.device("cpu"))
    assert cut is not None
    words = weight_descriptors(
        Fake(torch.int32, (114688, cut.steps, 256)),
        Fake(torch.int32, (114688, 16 * cut.steps)), 4, 1,
    )  # fmt: skip
    h = TensorDescriptor.from_tensor(
        Fake(torch.float8_e4m3fn, (40704, padded(I))), [32, 128], gl.NVMMASharedLayout(128, 8, 2)
    )
    slots = TensorDescriptor.from_tensor(
        Fake(torch.bfloat16, (4 * 40704, 64)), [32, 64], gl.NVMMASharedLayout(128, 16, 2)
    )
    return compile_gluon(
        gemm2_prefill.gemm2_ring, *words, h, slots, BF16, BF16, I32, F32, F32, F32,
        F32 if bias else None, I32, I32, I32, 4096, 7168, 7168, 448, 112, 40704, 8, cut.steps,
        cut.stages, cut.room, cut.slots, 1, 16, wide, cut.registers, True,
        num_warps=4, maxnreg=128, launch_pdl=True,
    )  # fmt: skip


@pytest.mark.parametrize("I", [128, 192, 256, 384])
def test_ring_compiles(I: int) -> None:
    made = ring(I, bias=I == 192, wide=I == 256)
    assert made.clean() and made.qgmma, (made.spills, made.messages)
    assert made.registers == 128 and made.warps == 8
    assert 2 * (made.shared + 1024) <= 228 * 1024, "two CTAs share an SM"
