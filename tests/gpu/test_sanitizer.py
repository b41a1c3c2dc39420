"""compute-sanitizer's memcheck over small layers of every schedule: no access out of bounds.

Its racecheck is not run here: it reports hazards in these kernels, of which one was looked at and
is none (a warp writes, is synchronised, one lane arrives at the mbarrier); docs/measured.md.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

LAYERS = Path(__file__).with_name("small_layers.py")
FOUND = 9  # exit status where the tool has found something


def sanitized(*arguments: str) -> subprocess.CompletedProcess[str]:
    """small_layers.py under memcheck; its kernels are compiled before that."""
    program = [sys.executable, str(LAYERS), *arguments]
    subprocess.run(program, check=True, capture_output=True)
    assert shutil.which("compute-sanitizer"), "this test needs CUDA's compute-sanitizer"
    return subprocess.run(
        ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", str(FOUND), *program],
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, capture_output=True, text=True,
    )  # fmt: skip


def test_small_layers() -> None:
    run = sanitized()
    assert run.returncode == 0, run.stdout[-4000:]


def test_memcheck_sees_a_planted_store() -> None:
    assert sanitized("--plant").returncode == FOUND
