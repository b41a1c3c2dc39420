"""Stage 2 of two layers at once on the GPU: grids whose CTAs wait for one another end, with the
bits that each gives alone, and are refused where the device has no room for one."""

import subprocess
import sys
from pathlib import Path

from two_streams import HUNG

LAYERS = Path(__file__).with_name("two_streams.py")
RING, SUMS = 1300, 200  # tokens that `gemm2_ring` and `gemm2_red_sum` serve


def run(*arguments: str) -> int:
    """Exit status of two_streams.py."""
    return subprocess.run([sys.executable, str(LAYERS), *arguments], timeout=120).returncode


def test_both_end_and_what_does_not_fit_is_refused() -> None:
    assert run(f"{RING},{RING}", f"{SUMS},{SUMS}", f"{RING},{SUMS}") == 0


def test_grids_that_start_in_part_hang() -> None:
    assert run(f"{RING},{SUMS}", "--apart") == HUNG
