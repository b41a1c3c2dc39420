"""Counters between the CTAs of one kernel: how they are polled, how TMA stores are made visible."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def observe(ptr):
    """The counter at `ptr`, with everything that happened before its last increment."""
    return gl.inline_asm_elementwise(
        "ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [ptr.to(gl.uint64)],
        dtype=gl.int32, is_pure=False, pack=1,
    )


@gluon.jit
def glance(ptr, RELAXED: gl.constexpr):
    """The counter at `ptr`, if RELAXED without what happened before.

    An acquiring load invalidates the L1 of its SM (CCTL.IVALL), so it is a poor thing to poll with.
    """
    if RELAXED:
        return gl.inline_asm_elementwise(
            "ld.relaxed.gpu.global.b32 $0, [$1];", "=r,l", [ptr.to(gl.uint64)],
            dtype=gl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        return observe(ptr)


@gluon.jit
def await_count(ptr, count, seen, RELAXED: gl.constexpr):
    """Poll until `count`, beginning from the value `seen` glanced at before; then acquire."""
    while seen < count:
        seen = glance(ptr, RELAXED)
    if RELAXED:
        seen = observe(ptr)
    return seen


@gluon.jit
def bulk_stores_done(zero, LEAN: gl.constexpr):
    """All TMA stores of this warp are visible to it (`tma.store_wait`: only read).

    LEAN leaves out a fence: the completion of a bulk copy is followed by an implicit one between
    the proxies (PTX ISA, cp.async.bulk), so whoever has waited for it sees what was written.
    """
    if LEAN:
        return gl.inline_asm_elementwise(
            "cp.async.bulk.wait_group 0; mov.b32 $0, $1;", "=r,r", [zero], dtype=gl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip
    else:
        return gl.inline_asm_elementwise(
            "cp.async.bulk.wait_group 0; fence.proxy.async; mov.b32 $0, $1;", "=r,r", [zero],
            dtype=gl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@gluon.jit
def proxy_fence(zero):
    """Orders what this thread observed before TMA stores that follow from it."""
    return gl.inline_asm_elementwise(
        "fence.proxy.async; mov.b32 $0, $1;", "=r,r", [zero],
        dtype=gl.int32, is_pure=False, pack=1,
    )


@gluon.jit
def announce(written_ptr, s, LEAN: gl.constexpr):
    """Make the stores of slice s visible, then count this CTA."""
    bulk_stores_done(s, LEAN)
    gl.atomic_add(written_ptr + s, 1, sem="release")
