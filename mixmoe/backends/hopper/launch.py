"""Launching: programmatic dependent launch between the kernels of a layer, and block arithmetic."""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def start_dependents(PDL: tl.constexpr):
    """Let the next kernel's CTAs be set up beside this one, then wait for the previous one.

    Every kernel of the layer calls this first (or waits later, but in time), so a kernel that has
    passed its wait knows that all earlier kernels have ended, not only the last.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def wait_for_all(PDL: tl.constexpr):
    """`start_dependents` the other way round: when the next kernel starts, all before this one has
    ended."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


def options(device: torch.device) -> dict[str, bool]:
    """Launch keywords of a kernel that takes ``PDL``: on for a GPU, off in the interpreter."""
    gpu = device.type == "cuda"
    return {"PDL": gpu, "launch_pdl": gpu}


# Launch keyword of a kernel whose CTAs wait for one another: the device gives its grid room as a
# whole or refuses it, so two of them never hold a part of the device each and wait for the rest.
TOGETHER = {"launch_cooperative_grid": True}


def pow2(n: int) -> int:
    """Smallest power of two that is at least ``n`` (and at least 1)."""
    return 1 << max(0, n - 1).bit_length()


