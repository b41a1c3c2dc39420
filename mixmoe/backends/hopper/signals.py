"""Counters between the CTAs of one kernel.

Each counter has a line of the L2 to itself, so that polls of one do not queue behind the additions
to another.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

LINE = 32  # ints from a counter to the next
PITCH = gl.constexpr(LINE)


@gluon.jit
def observe(ptr):
    """The counter at `ptr`, with everything that happened before its last increment.

    An acquiring load invalidates the L1 of its SM (CCTL.IVALL).
    """
    return gl.inline_asm_elementwise(
        "ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [ptr.to(gl.uint64)],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def glance(ptr):
    """The counter at `ptr` alone."""
    return gl.inline_asm_elementwise(
        "ld.relaxed.gpu.global.b32 $0, [$1];", "=r,l", [ptr.to(gl.uint64)],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip
