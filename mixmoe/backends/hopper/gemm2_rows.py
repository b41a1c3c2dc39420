"""Stage 2 for many rows per expert and a long K: rows of the result, then the sum over routes.

The launch of `prefill.grouped_prefill` on rows of h in sorted order, with the plain epilogue, and a
kernel that adds a token's topk rows in float32, in slot order. The columns of H are done in as many
groups as keep the rows within twice the activations, or within SCRATCH where that is more.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixmoe.backends.hopper.decode import Columns
from mixmoe.backends.hopper.launch import options, pow2, start_dependents
from mixmoe.backends.hopper.prefill import Result, Rows, Sizes, Work, grouped_prefill
from mixmoe.backends.hopper.prefill_cut import Cut
from mixmoe.backends.hopper.route import Placed
from mixmoe.backends.hopper.slots import SlotRows
from mixmoe.backends.hopper.worklist import Tiles, weight_boxes
from mixmoe.fold import Fold
from mixmoe.preshuffle import Packed
from mixmoe.spec import Recipe

SCRATCH = 64 << 20  # bf16 values of rows that are always allowed: a group more costs two launches


@triton.jit
def sum_routes(
    rows_ptr, position_ptr, weight_ptr, out_ptr, columns, pitch, out_stride,
    TOPK: tl.constexpr, N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token x N columns; routes that were skipped (position -1) are not read."""
    start_dependents(PDL)
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * N + tl.arange(0, N)
    total = tl.zeros((N,), tl.float32)
    for slot in tl.static_range(TOPK):
        p = tl.load(position_ptr + token * TOPK + slot).to(tl.int64)
        row = tl.load(rows_ptr + p * pitch + n, mask=(n < columns) & (p >= 0), other=0.0)
        row = row.to(tl.float32)
        if weight_ptr is not None:
            row *= tl.load(weight_ptr + p, mask=p >= 0, other=0.0)
        total += row
    value = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * out_stride + n, value, mask=n < columns)


def launch_group(
    h: SlotRows, weights: Packed, bias: Tensor | None, routed: Placed, tiles: Tiles, cut: Cut,
    base: int, count: int, rows: Tensor,
) -> None:
    """`count` row tiles from tile `base` on -> rows (P, at least the columns of these tiles)."""
    p, h = routed.problem, h.counted()
    words, scales = weight_boxes(weights, cut.box, 1)
    grouped_prefill[(cut.grid(rows.device, tiles.room * count),)](
        words, scales, Rows(h.codes, h.codes.stride(0), h.scales, None), None,
        Work(tiles.records, tiles.count), Sizes(-(-p.hidden // 16), count, base),
        Result(rows, rows.stride(0), p.hidden), Columns(weights.row_scale, bias), None, None,
        p.intermediate, KIND=None, WIDE=weights.order.fold is Fold.WIDE,
        **cut.options(p.intermediate),
    )


def product(
    h: SlotRows, weights: Packed, bias: Tensor | None, routed: Placed, tiles: Tiles, cut: Cut
) -> Tensor:
    """h W2^T + b, bf16 (P, H), a row per sorted position, without routing weights."""
    total = -(-routed.problem.hidden // cut.form.rows)
    shape = (h.codes.shape[0], total * cut.form.rows)
    rows = torch.empty(shape, dtype=torch.bfloat16, device=h.codes.device)
    launch_group(h, weights, bias, routed, tiles, cut, 0, total, rows)
    return rows[:, : routed.problem.hidden]


def launch(
    h: SlotRows, weights: Packed, bias: Tensor | None, routed: Placed, tiles: Tiles,
    recipe: Recipe, cut: Cut, out: Tensor,
) -> Tensor:
    """Run stage 2 and the sum: out (T, H). Tiles as stage 1's, the rest as `gemm2_prefill`'s."""
    p, width = routed.problem, cut.form.rows
    padded = h.codes.shape[0]
    total = -(-p.hidden // width)
    most = max(1, max(SCRATCH, 2 * p.tokens * p.hidden) // (padded * width))
    group = -(-total // -(-total // most))
    rows = torch.empty((padded, group * width), dtype=torch.bfloat16, device=out.device)
    weight = routed.sorted_weights if recipe.weight_on == 2 else None
    for base in range(0, total, group):
        count = min(group, total - base)
        columns = min(count * width, p.hidden - base * width)
        launch_group(h, weights, bias, routed, tiles, cut, base, count, rows)
        add_up(rows, weight, routed, columns, out[:, base * width :])
    return out


def add_up(
    rows: Tensor, weight: Tensor | None, routed: Placed, columns: int, out: Tensor
) -> None:
    """Sum over a token's rows (P, >= columns), times weight (P,) if given, into out (T, ..)."""
    p = routed.problem
    width = min(1024, pow2(columns))
    sum_routes[(p.tokens, -(-columns // width))](
        rows, routed.position, weight, out, columns, rows.stride(0), out.stride(0), TOPK=p.topk,
        N=width, num_warps=max(1, width // 256), **options(out.device),
    )  # fmt: skip
