"""The grouped GEMM body both stages share: one block of routes x one tile of weight rows.

Weights are the tensor core's M, tokens its N (swapped A and B): a block of 16 routes fills a wgmma
m64n16 where unswapped it would waste three quarters of m64. ``acc: (rows, tokens)``.
"""

import triton
import triton.language as tl
from torch import Tensor

from mixmoe.backends.hopper.launch import options, start_dependents


@triton.jit
def block_of(
    ids_ptr, experts_ptr, offsets_ptr, block, T, TOPK,
    PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Expert of a tile of BM sorted routes, and of each: place, route, row of the input, validity.

    A tile may be several sorted blocks of one expert: it starts at every (BM / BLOCK)th of them,
    and the expert is -1 at the others. A tile wider than BLOCK ends where its expert does.
    """
    expert = tl.load(experts_ptr + block)
    place = block * BLOCK + tl.arange(0, BM)
    inside = place >= 0
    if BM > BLOCK:
        first = tl.load(offsets_ptr + tl.maximum(expert, 0))
        last = tl.load(offsets_ptr + tl.maximum(expert, 0) + 1)
        inside = place < last
        expert = tl.where((block * BLOCK - first) % BM == 0, expert, -1)
    packed = tl.load(ids_ptr + place, mask=inside, other=T)
    token = packed & 0xFFFFFF
    live = token < T
    route = token.to(tl.int64) * TOPK + (packed >> 24)
    row = token.to(tl.int64) if PER_TOKEN else route
    return expert, place, route, tl.where(live, row, 0), live


@triton.jit
def products(
    x_ptr, x_scale_ptr, x_row, x_ok, w_ptr, w_scale_ptr, w_final_ptr, w_row, w_scale_row,
    w_final_row, w_ok, K, k_from, k_to, X: tl.constexpr, W: tl.constexpr, MATH: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``acc[n, m] = sum_k w[n, k] x[m, k]`` over columns k_from..k_to, all scales applied.

    Where a weight row's codes lie (``w_row``), its block scale and its final scale are three row
    numbers: they differ for packed orders and for scale blocks of several rows.
    """
    acc = tl.zeros((BN, BM), tl.float32)
    for k in range(k_from, k_to, BK):
        w = W.tile(w_ptr, w_scale_ptr, w_row, w_scale_row, w_ok, k, K, BN, BK, MATH.dtype)
        x = X.tile(x_ptr, x_scale_ptr, x_row, x_row, x_ok, k, K, BM, BK, MATH.dtype)
        if MATH.promote:
            part = tl.dot(w, tl.trans(x)).to(tl.float32)
            if W.step is not None:
                part *= W.step(w_scale_ptr, w_scale_row, w_ok, k, K, W.cols)[:, None]
            if X.step is not None:
                part *= X.step(x_scale_ptr, x_row, x_ok, k, K, X.cols)[None, :]
            acc += part
        else:
            acc = tl.dot(w, tl.trans(x), acc)
    if W.final is not None:
        acc *= W.final(w_final_ptr, w_final_row, w_ok)[:, None]
    if X.final is not None:
        acc *= X.final(x_scale_ptr, x_row, x_ok)[None, :]
    return acc


@triton.jit(do_not_specialize=["routes"])
def zero_skipped(
    rows_ptr, position_ptr, routes, N, ROWS: tl.constexpr, BN: tl.constexpr, PDL: tl.constexpr
):
    """Zero the rows of skipped routes, which the GEMMs never touch, among ROWS routes."""
    start_dependents(PDL)
    first = tl.program_id(0) * ROWS
    r = first + tl.arange(0, ROWS)
    if tl.min(tl.load(position_ptr + r, mask=r < routes, other=0)) < 0:
        for i in range(0, ROWS):
            route = first + i
            if tl.load(position_ptr + route, mask=route < routes, other=0) < 0:
                for n in range(0, N, BN):
                    at = n + tl.arange(0, BN)
                    to = rows_ptr + route.to(tl.int64) * N + at
                    tl.store(to, tl.zeros((BN,), rows_ptr.dtype.element_ty), mask=at < N)


def zeroed(rows: Tensor, position: Tensor) -> Tensor:
    """``rows (R, N)`` with those of skipped routes (position -1) set to zero."""
    count = rows.shape[0]
    if count:
        zero_skipped[(-(-count // 64),)](
            rows, position, count, rows.shape[1], ROWS=64, BN=1024, **options(rows.device)
        )
    return rows
