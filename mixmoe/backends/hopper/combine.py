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
    TOPK: tl.constexpr, WEIGHTED: tl.constexpr, BN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token x BN columns. Skipped routes (position -1) add nothing and are not read."""
    start_dependents(PDL)
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BN,), tl.float32)
    for slot in tl.static_range(TOPK):
        route = token * TOPK + slot
        position = tl.load(position_ptr + route)
        row = tl.load(rows_ptr + route * H + n, mask=(n < H) & (position >= 0), other=0.0)
        row = row.to(tl.float32)
        if WEIGHTED:
            row *= tl.load(weights_ptr + position, mask=position >= 0, other=0.0)
        total += row
    value = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * out_stride + n, value, mask=n < H)


def combine(rows: Tensor, routed: Placed, weight_on: int, out: Tensor) -> Tensor:
    """``out (T, H)`` from ``rows (T * topk, H)``; the routing weight is applied if not yet."""
    p = routed.problem
    if p.tokens:
        width = min(WIDTH, pow2(p.hidden))
        combine_kernel[(p.tokens, -(-p.hidden // width))](
            rows, routed.position, routed.sorted_weights, out, p.hidden, out.stride(0),
            TOPK=p.topk, WEIGHTED=weight_on == 2, BN=width,
            num_warps=max(1, width // 256), **options(out.device),
        )  # fmt: skip
    return out
