"""gemm1: ``h = act(x Wg^T + bg, x Wu^T + bu)`` per route, for every format an Operand reads.

Gate and up rows of one column alternate every 8 rows of the weight tile: rows g and g + 8 of a
wgmma fragment lie in one thread, so the activation needs no exchange between threads.
"""

import torch
import triton
import triton.language as tl

from mixmoe.activations import Activation, ActivationKind
from mixmoe.backends.hopper.grouped import block_of, products
from mixmoe.backends.hopper.launch import options, start_dependents
from mixmoe.backends.hopper.operands import math_of, operand, stored
from mixmoe.backends.hopper.quantise import quantise
from mixmoe.backends.hopper.route import Placed
from mixmoe.formats import Quantised, ScaleKind
from mixmoe.spec import Recipe, Tile, Weights


@triton.jit
def tanh(x):
    """Odd series below 1/4 (relative error 4e-7), above ``(1 - e) / (1 + e)``, e = exp(-2|x|)."""
    s = x * x
    near = x * (1.0 + s * (-1.0 / 3 + s * (2.0 / 15 + s * (-17.0 / 315 + s * (62.0 / 2835)))))
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))


@triton.jit
def silu(g, u, alpha, beta, beta2):
    return g * tl.sigmoid(g) * u


@triton.jit
def swiglu(g, u, alpha, beta, beta2):
    return g * tl.sigmoid(alpha * g) * (u + 1.0)


@triton.jit
def gelu_tanh(g, u, alpha, beta, beta2):
    # (1 + tanh z) / 2 is sigmoid(2 z), which loses nothing where tanh is near -1
    return g * tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g)) * u


@triton.jit
def situv2(g, u, alpha, beta, beta2):
    return beta * tanh(g / beta) * tl.sigmoid(g) * (beta2 * tanh(u / beta2))


ACTIVATIONS = {
    ActivationKind.SILU: silu,
    ActivationKind.SWIGLU: swiglu,
    ActivationKind.GELU_TANH: gelu_tanh,
    ActivationKind.SITUV2: situv2,
}


@triton.jit
def activate(g, u, limit, alpha, beta, beta2, ACT: tl.constexpr):
    """Clamp by ``limit`` (infinity: no clamp), then the activation's formula."""
    g = tl.minimum(g, limit)
    u = tl.minimum(tl.maximum(u, -limit), limit)
    return ACT(g, u, alpha, beta, beta2)


@triton.jit
def gate_up(acc, BN: tl.constexpr, BM: tl.constexpr):
    """Rows alternating by 8 -> gate and up, ``(BN/2, BM)`` each; registers only."""
    pairs = tl.permute(tl.reshape(acc, (BN // 16, 2, 8, BM)), (0, 2, 3, 1))
    gate, up = tl.split(pairs)
    return tl.reshape(gate, (BN // 2, BM)), tl.reshape(up, (BN // 2, BM))


@triton.jit(do_not_specialize=["T", "TOPK", "scale_rows"])
def gemm1_kernel(
    x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, w_final_ptr, bias_ptr, smooth_ptr, h_ptr,
    ids_ptr, weights_ptr, experts_ptr, offsets_ptr, T, TOPK, H, I, scale_rows,  # noqa: E741
    limit, alpha, beta, beta2,
    X: tl.constexpr, W: tl.constexpr, MATH: tl.constexpr, ACT: tl.constexpr,
    PER_TOKEN: tl.constexpr, WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One block of BM routes x BN/2 columns of h."""
    start_dependents(PDL)
    tiles = (I + BN // 2 - 1) // (BN // 2)
    block = tl.program_id(0) // tiles
    first = tl.program_id(0) % tiles * (BN // 2)
    expert, place, route, row, live = block_of(
        ids_ptr, experts_ptr, offsets_ptr, block, T, TOPK, PER_TOKEN, BLOCK, BM
    )
    if expert >= 0:
        at = tl.arange(0, BN)
        column = first + at // 16 * 8 + at % 8
        n = column + at // 8 % 2 * I
        ok = column < I
        e = expert.to(tl.int64)
        plain = e * 2 * I + n
        lies = e * 2 * I + 2 * first + at if W.paired else plain
        acc = products(
            x_ptr, x_scale_ptr, row, live, w_ptr, w_scale_ptr, w_final_ptr, lies,
            e * scale_rows + n // W.rows, plain, ok, H, 0, H, X, W, MATH, BM, BN, BK,
        )  # fmt: skip
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + plain, mask=ok, other=0.0)[:, None]
        gate, up = gate_up(acc, BN, BM)
        h = activate(gate, up, limit, alpha, beta, beta2, ACT)
        if WEIGHTED:
            h *= tl.load(weights_ptr + place, mask=live, other=0.0)[None, :]
        column = first + tl.arange(0, BN // 2)
        if smooth_ptr is not None:
            h *= tl.load(smooth_ptr + e * I + column, mask=column < I, other=0.0)[:, None]
        at = route[:, None] * I + column[None, :]
        mask = live[:, None] & (column < I)[None, :]
        tl.store(h_ptr + at, tl.trans(h).to(h_ptr.dtype.element_ty), mask=mask)


def scalars(act: Activation) -> tuple[float, float, float, float]:
    """limit, alpha, beta, beta2 as the kernels take them."""
    limit = float("inf") if act.limit is None else act.limit
    return limit, act.alpha, act.beta, act.beta2


def gemm1(
    x: Quantised, weights: Weights, routed: Placed, recipe: Recipe, tile: Tile
) -> Quantised:  # fmt: skip
    """Stage 1 of any recipe: h ``(T * topk, I)`` in the recipe's format.

    The sum is float32; h is rounded once, from float32, to the activation format. Rows of skipped
    routes are zero in a quantised h, and left as they were in a 16-bit one.
    """
    p, fmt, w13 = routed.problem, recipe.activation, stored(weights.w13, gate_up=True)
    W, X = w13.operand, operand(fmt)
    smooth = weights.w2_smooth if fmt.name == "int8_smooth" else None
    plain = fmt.scale is ScaleKind.NONE
    dtype = fmt.element.storage if plain else torch.float32
    h = torch.empty((p.routes, p.intermediate), dtype=dtype, device=x.codes.device)
    blocks = routed.sorted_expert_ids.shape[0]
    go = options(h.device)
    if blocks:
        grid = blocks * -(-p.intermediate // (tile.rows // 2))
        gemm1_kernel[(grid,)](
            x.codes.contiguous(), x.scales, w13.codes, w13.scales, w13.row_scale,
            weights.w13_bias, smooth, h,
            routed.sorted_token_ids, routed.sorted_weights, routed.sorted_expert_ids,
            routed.expert_offsets,
            p.tokens, p.topk, p.hidden, p.intermediate, -(-2 * p.intermediate // W.rows),
            *scalars(recipe.act), X=X, W=W,
            MATH=math_of(fmt, weights.w13.format, recipe.accumulate),
            ACT=ACTIVATIONS[recipe.act.kind], PER_TOKEN=fmt.name != "int8_smooth",
            WEIGHTED=recipe.weight_on == 1, BLOCK=routed.block, BM=tile.tokens, BN=tile.rows,
            BK=min(W.step_of(tile.k), X.step_of(tile.k)),
            num_warps=tile.warps, num_stages=tile.stages, **go,
        )  # fmt: skip
    if plain:
        return Quantised(h, None, fmt)
    return quantise(h, fmt, recipe.rounding, routed.position)
