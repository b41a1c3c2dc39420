"""combine: ``y[t] = sum_k w[t, k] * rows[t, k]`` in float32, slot by slot, rounded once."""

import triton
import triton.language as tl
from torch import Tensor

from mixmoe.backends.hopper.launch import options, pow2, start_dependents
from mixmoe.backends.hopper.route import Placed

WIDTH = 1024  # columns a CTA: 8 a thread with 4 warps, one 16 B load per row and thread


@triton.jit
def combine_kernel(
    rows_ptr, position_ptr, weights_ptr, out_ptr, H, out_stride,
    TOPK: tl.constexpr, WEIGHTED: tl.constexpr, BN: tl.constexpr, EARLY: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One token x BN columns. Skipped routes (position -1) add nothing and are not read.

    EARLY: positions and weights were complete when the kernel before started its dependents, so
    they are read before that kernel is waited for.
    """
    if not EARLY:
        start_dependents(PDL)
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    positions = ()
    weights = ()
    for slot in tl.static_range(TOPK):
        position = tl.load(position_ptr + token * TOPK + slot)
        weight = 1.0
        if WEIGHTED:
            weight = tl.load(weights_ptr + position, mask=position >= 0, other=0.0)
        positions = positions + (position,)  # type: ignore[assignment]
        weights = weights + (weight,)  # type: ignore[assignment]
    if EARLY:
        start_dependents(PDL)
    total = tl.zeros((BN,), tl.float32)
    for slot in tl.static_range(TOPK):
        live = (n < H) & (positions[slot] >= 0)
        row = tl.load(rows_ptr + (token * TOPK + slot) * H + n, mask=live, other=0.0)
        total += row.to(tl.float32) * weights[slot]
    value = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * out_stride + n, value, mask=n < H)


def combine(
    rows: Tensor, routed: Placed, weight_on: int, out: Tensor, early: bool = False
) -> Tensor:
    """``out (T, H)`` from ``rows (T * topk, H)``; the routing weight is applied if not yet.

    early: the kernel before this one starts its dependents only after it has waited for what ran
    before it, as decode stage 2 does; so the routing is complete.
    """
    p = routed.problem
    if p.tokens:
        width = min(WIDTH, pow2(p.hidden))
        combine_kernel[(p.tokens, -(-p.hidden // width))](
            rows, routed.position, routed.sorted_weights, out, p.hidden, out.stride(0),
            TOPK=p.topk, WEIGHTED=weight_on == 2, BN=width, EARLY=early,
            num_warps=max(1, width // 256), **options(out.device),
        )  # fmt: skip
    return out
