"""Stage 1 for many rows per expert: h = act(x Wg^T + bg, x Wu^T + bu), rows in sorted order.

The launch of `prefill.grouped_prefill` with gathered rows and the gated epilogue. h comes out as
bf16, a row per sorted position: the row scale of `fp8_token` needs all of I, which several CTAs
share, so a pass of its own quantises h (33 MB at T 8192, topk 8, I 256; it stays in the L2).
"""

from torch import Tensor

from mixmoe.backends.hopper.decode import Columns
from mixmoe.backends.hopper.gemm1_decode import Act
from mixmoe.backends.hopper.mainloop import KINDS, activation_scalars
from mixmoe.backends.hopper.prefill import Clear, Result, Rows, Sizes, Work, grouped_prefill
from mixmoe.backends.hopper.prefill_cut import Cut
from mixmoe.backends.hopper.route import Placed
from mixmoe.backends.hopper.slots import SlotRows
from mixmoe.backends.hopper.worklist import Tiles, weight_boxes
from mixmoe.fold import Fold
from mixmoe.preshuffle import Packed
from mixmoe.spec import Recipe


def launch(
    x: SlotRows, weights: Packed, bias: Tensor | None, routed: Placed, tiles: Tiles,
    recipe: Recipe, cut: Cut, out: Tensor, clear: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Run stage 1: out (P, I) bf16, a row per sorted position; padding rows are not written.

    x: rows (T, H); weights: w13 in the order hopper_fp4q_gu_w1 (or _wide); bias (E, 2I) float32;
    tiles: `worklist.tiles(routed, cut.main, cut.extra)`; routed.block == 32. clear: a contiguous
    bf16 tensor to zero on the way.
    """
    p, x = routed.problem, x.counted()
    words, scales = weight_boxes(weights, cut.box, 1)
    row_tiles = -(-2 * p.intermediate // cut.form.rows)
    weight = routed.sorted_weights if recipe.weight_on == 1 else None
    grouped_prefill[(cut.grid(out.device, tiles.room * row_tiles),)](
        words, scales, Rows(x.codes, x.codes.stride(0), x.scales, routed.sorted_token_ids), weight,
        Work(tiles.records, tiles.count), Sizes(-(-p.intermediate // 8), row_tiles, 0),
        Result(out, out.stride(0), p.intermediate), Columns(weights.row_scale, bias),
        Act(*activation_scalars(recipe.act)),
        None if clear is None else Clear(clear, clear.numel()), p.hidden,
        KIND=KINDS[recipe.act.kind], WIDE=weights.order.fold is Fold.WIDE, **cut.options(p.hidden),
    )
    return out
