"""gemm2: ``h Wd^T + bd`` per route, for every format an Operand reads."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixmoe.backends.hopper.grouped import block_of, products
from mixmoe.backends.hopper.launch import options, start_dependents
from mixmoe.backends.hopper.operands import math_of, operand, stored
from mixmoe.backends.hopper.route import Placed
from mixmoe.formats import Quantised
from mixmoe.spec import Recipe, Tile, Weights


@triton.jit(do_not_specialize=["T", "TOPK", "scale_rows"])
def gemm2_kernel(
    h_ptr, h_scale_ptr, w_ptr, w_scale_ptr, w_final_ptr, bias_ptr, out_ptr,
    ids_ptr, experts_ptr, offsets_ptr, T, TOPK, H, I, scale_rows,  # noqa: E741
    X: tl.constexpr, W: tl.constexpr, MATH: tl.constexpr,
    BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One block of BM routes x BN columns of the output."""
    start_dependents(PDL)
    tiles = (H + BN - 1) // BN
    block = tl.program_id(0) // tiles
    n = tl.program_id(0) % tiles * BN + tl.arange(0, BN)
    expert, place, route, row, live = block_of(
        ids_ptr, experts_ptr, offsets_ptr, block, T, TOPK, False, BLOCK, BM
    )
    if expert >= 0:
        ok = n < H
        e = expert.to(tl.int64)
        acc = products(
            h_ptr, h_scale_ptr, row, live, w_ptr, w_scale_ptr, w_final_ptr, e * H + n,
            e * scale_rows + n // W.rows, e * H + n, ok, I, 0, I, X, W, MATH, BM, BN, BK,
        )  # fmt: skip
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + e * H + n, mask=ok, other=0.0)[:, None]
        at = route[:, None] * H + n[None, :]
        value = tl.trans(acc).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + at, value, mask=live[:, None] & ok[None, :])


def gemm2(
    h: Quantised, weights: Weights, routed: Placed, recipe: Recipe, tile: Tile
) -> Tensor:  # fmt: skip
    """Stage 2 of any recipe: ``(T * topk, H)`` in ``recipe.out_dtype``.

    Rows of skipped routes are left as they were: ``combine`` does not read them.
    """
    p, w2 = routed.problem, stored(weights.w2, gate_up=False)
    W, X = w2.operand, operand(recipe.activation)
    out = torch.empty((p.routes, p.hidden), dtype=recipe.out_dtype, device=h.codes.device)
    blocks = routed.sorted_expert_ids.shape[0]
    if blocks:
        gemm2_kernel[(blocks * -(-p.hidden // tile.rows),)](
            h.codes.contiguous(), h.scales, w2.codes, w2.scales, w2.row_scale, weights.w2_bias, out,
            routed.sorted_token_ids, routed.sorted_expert_ids, routed.expert_offsets,
            p.tokens, p.topk, p.hidden, p.intermediate, -(-p.hidden // W.rows),
            X=X, W=W, MATH=math_of(recipe.activation, weights.w2.format, recipe.accumulate),
            BLOCK=routed.block, BM=tile.tokens, BN=tile.rows,
            BK=min(W.step_of(tile.k), X.step_of(tile.k)),
            num_warps=tile.warps, num_stages=tile.stages, **options(out.device),
        )  # fmt: skip
    return out
