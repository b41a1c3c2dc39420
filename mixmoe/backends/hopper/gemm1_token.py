"""Stage 1 for one token or two: nothing before it, neither routing nor quantisation of x.

A token's experts are its topk_ids, so there is nothing to sort; a row of x is short, so every CTA
quantises it for itself into shared memory while its first weights are on their way. The roles are
those of `decode_gemm` but for the gathering one; a skipped route streams expert 0, and stage 2 does
not read its h; an expert that two tokens share is streamed twice. Stage 2 is `gemm2_tokens`, which
reads topk_ids as well: such a layer is two launches, three where rows of h are long.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mixmoe.backends.hopper.decode import (
    Blocks,
    Columns,
    Stream,
    fragments,
    hand_over,
    own_slice,
)
from mixmoe.backends.hopper.decode_gemm import (
    make_ring,
    make_rows,
    make_sums,
    multiply,
    read_ahead,
    stream_weights,
    tile_total,
)
from mixmoe.backends.hopper.decode_tiles import Sizes, share
from mixmoe.backends.hopper.gemm1_decode import Act, Activated, activate_tiles
from mixmoe.backends.hopper.mainloop import KINDS, activation_scalars
from mixmoe.backends.hopper.resident import Hidden, make_resident, resident_layout
from mixmoe.spec import Recipe, Tile, Weights

SLICES = gl.constexpr(8)  # of K, one to a matrix warp


@gluon.jit
def multiply_token(ring, x_memory, sums, x, blocks, sizes, STAGES: gl.constexpr,
                   WIDE: gl.constexpr):
    """Role of the matrix warps: quantise x, its scale to `x_memory`; then `multiply`."""
    L: gl.constexpr = resident_layout(SLICES, gl.num_warps(), False)
    gdc_wait()
    gdc_launch_dependents()
    row = gl.zeros([SLICES], gl.int64, gl.SliceLayout(1, L))
    scale = make_resident(ring.rows, x, row, row == 0, sizes.slots, SLICES, 1, L)
    x_memory.store(scale)  # all slices are of one row
    multiply(0, ring, sums, blocks, sizes, 1, 1, SLICES, 1, 1, STAGES, WIDE, True, True)


@gluon.jit
def multiply_tokens(ring, sums, x, sizes, STAGES: gl.constexpr, WIDE: gl.constexpr):
    """The same for several tokens: a row of x, then the totals of its tiles, with its scale."""
    L: gl.constexpr = resident_layout(SLICES, gl.num_warps(), False)
    gdc_wait()
    gdc_launch_dependents()
    first, last = share(sizes.tiles)
    each = sizes.topk * sizes.row_tiles  # tiles of a token
    stage = first * 0
    phase = first * 0
    done = first * 0
    for token in range(first // each, (last - 1) // each + 1):
        row = gl.zeros([SLICES], gl.int64, gl.SliceLayout(1, L)) + token
        scale = make_resident(ring.rows, x, row, row >= 0, sizes.slots, SLICES, 1, L)
        factor = gl.max(scale, 0)  # all slices are of one row
        until = gl.minimum(last, (token + 1) * each)
        ahead = read_ahead(0, ring, stage, phase, True, 1, 1)
        for tile in range(gl.maximum(first, token * each), until):
            total, ahead = tile_total(
                0, ring, ahead, sizes, tile + 1 == until, SLICES, SLICES, 1, 1, 1, STAGES, WIDE,
                True,
            )
            hand_over(own_slice(total * factor, 1, SLICES), sums, done)
            done += 1
        stage = ahead.stage
        phase = ahead.phase


@gluon.jit
def gemm1_token(
    w_desc, s_desc, x, h_ptr, w, weight_ptr, blocks, sizes, act, limit,
    GROUPS: gl.constexpr, STAGES: gl.constexpr, KIND: gl.constexpr, WIDE: gl.constexpr,
    REGISTERS: gl.constexpr, ONE: gl.constexpr,
):
    """ONE token: its tiles are swept. Several: a CTA takes a contiguous part, which meets few."""
    ring = make_ring(w_desc, s_desc, make_rows(GROUPS, SLICES), STAGES, 1, 1)
    sums = make_sums(1, w_desc.block_type.shape[0], SLICES, 1)
    if ONE:
        x_memory = gl.allocate_shared_memory(
            gl.float32, [SLICES], gl.SwizzledSharedLayout(1, 1, 1, [0])
        )
        fence_async_shared()
        gl.warp_specialize(
            [
                (multiply_token, (ring, x_memory, sums, x, blocks, sizes, STAGES, WIDE)),
                (stream_weights, (w_desc, s_desc, ring, blocks, sizes, limit, 1, 1, 1, STAGES,
                                  False)),
                (activate_tiles, (sums, Activated(h_ptr, None, x_memory, w, weight_ptr, act, KIND),
                                  blocks, sizes, 1, 1, 1, 1, False)),
            ],
            [1, 1],
            [REGISTERS, REGISTERS],
        )
    else:
        fence_async_shared()
        gl.warp_specialize(
            [
                (multiply_tokens, (ring, sums, x, sizes, STAGES, WIDE)),
                (stream_weights, (w_desc, s_desc, ring, blocks, sizes, limit, 1, 1, 1, STAGES,
                                  False, True)),
                (activate_tiles, (sums, Activated(h_ptr, None, None, w, weight_ptr, act, KIND),
                                  blocks, sizes, 1, 1, 1, 1, False, True)),
            ],
            [1, 1],
            [REGISTERS, REGISTERS],
        )


def launch(
    x: Tensor, weights: Weights, topk_ids: Tensor, topk_weights: Tensor, recipe: Recipe,
    tile: Tile, out: Tensor,
) -> Tensor:
    """Run stage 1: out (T * topk, I) float32, a row per route, undefined where skipped.

    x (T, H) of a float type, contiguous and 16-byte aligned, T from 1 to 128 / topk: quantised as
    fp8_token is; topk_ids (T, topk) int32 or int64, topk_weights (T, topk) float32, contiguous;
    weights.w13 as for `gemm1_decode`. tile: 8 slices of K, one 16-row unit, `choose.few_tokens`.
    """
    w13, (tokens, topk) = fragments(weights.w13), topk_ids.shape
    cut = Stream.of(tile, w13)
    experts, double, hidden = w13.shape
    row_tiles = -(-double // (16 * cut.rows))
    tiles = tokens * topk * row_tiles
    steps = cut.steps(hidden)
    gemm1_token[(cut.grid(tiles),)](
        *cut.boxes(w13, cut.rows, tile.split_k), Hidden(x, None), out,
        Columns(w13.row_scale, weights.w13_bias), topk_weights if recipe.weight_on == 1 else None,
        Blocks(None, topk_ids, None),
        Sizes(hidden, double // 2, experts, topk, -(-double // 16), row_tiles, steps, tiles),
        Act(*activation_scalars(recipe.act)), tokens * topk, steps, tile.stages,
        KINDS[recipe.act.kind], cut.wide, cut.helpers, tokens == 1, **cut.options,
    )
    return out
