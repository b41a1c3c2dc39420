"""The small kernels between the rivals' GEMMs, which their libraries leave to the caller.

One fused pass each, so that a rival's layer is not slowed by our glue: quantise and gather,
activation and requantisation, weighted top-k sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

FP8_MAX = tl.constexpr(448.0)


@triton.jit
def gather_quantise_kernel(
    x,
    source,
    codes,
    scales,
    stride_row,
    stride_group,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    FP8: tl.constexpr,
):
    """codes[p] = quantised x[source[p]]; one program per row; rows with source < 0 are skipped."""
    p = tl.program_id(0).to(tl.int64)
    row = tl.load(source + p).to(tl.int64)
    if row >= 0:
        if FP8:
            if GROUP == K:
                largest = tl.zeros((BLOCK,), tl.float32)
                for k in range(0, K, BLOCK):
                    at = k + tl.arange(0, BLOCK)
                    v = tl.load(x + row * K + at, mask=at < K, other=0).to(tl.float32)
                    largest = tl.maximum(largest, tl.abs(v))
                scale = tl.maximum(tl.max(largest), 1e-10) / FP8_MAX
                tl.store(scales + p * stride_row, scale)
                for k in range(0, K, BLOCK):
                    at = k + tl.arange(0, BLOCK)
                    v = tl.load(x + row * K + at, mask=at < K, other=0).to(tl.float32)
                    tl.store(codes + p * K + at, (v / scale).to(tl.float8e4nv), mask=at < K)
            else:
                for k in range(0, K, BLOCK):
                    at = k + tl.arange(0, BLOCK)
                    v = tl.load(x + row * K + at, mask=at < K, other=0).to(tl.float32)
                    v = tl.reshape(v, (BLOCK // GROUP, GROUP))
                    scale = tl.maximum(tl.max(tl.abs(v), 1), 1e-10) / FP8_MAX
                    q = tl.reshape((v / scale[:, None]).to(tl.float8e4nv), (BLOCK,))
                    tl.store(codes + p * K + at, q, mask=at < K)
                    group = k // GROUP + tl.arange(0, BLOCK // GROUP)
                    place = scales + p * stride_row + group * stride_group
                    tl.store(place, scale, mask=group < tl.cdiv(K, GROUP))
        else:
            for k in range(0, K, BLOCK):
                at = k + tl.arange(0, BLOCK)
                tl.store(codes + p * K + at, tl.load(x + row * K + at, mask=at < K), mask=at < K)


@triton.jit
def activate_quantise_kernel(
    gate_up,
    h,
    scales,
    stride_row,
    stride_group,
    keep,
    INTER: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    FP8: tl.constexpr,
    SWIGLU: tl.constexpr,
    MASKED: tl.constexpr,
):
    """h[p] = act(gate, up) of gate_up[p] (2 I), quantised; rows with keep[p] < 0 are skipped."""
    p = tl.program_id(0).to(tl.int64)
    live = True
    if MASKED:
        live = tl.load(keep + p) >= 0
    if live:
        at = tl.arange(0, BLOCK)
        g = tl.load(gate_up + p * 2 * INTER + at, mask=at < INTER, other=0).to(tl.float32)
        u = tl.load(gate_up + p * 2 * INTER + INTER + at, mask=at < INTER, other=0).to(tl.float32)
        if SWIGLU:
            g = tl.minimum(g, 7.0)
            u = tl.minimum(tl.maximum(u, -7.0), 7.0) + 1.0
            v = g * tl.sigmoid(1.702 * g) * u
        else:
            v = g * tl.sigmoid(g) * u
        if FP8:
            if GROUP == INTER:
                scale = tl.maximum(tl.max(tl.abs(v)), 1e-10) / FP8_MAX
                tl.store(scales + p * stride_row, scale)
                tl.store(h + p * INTER + at, (v / scale).to(tl.float8e4nv), mask=at < INTER)
            else:
                v = tl.reshape(v, (BLOCK // GROUP, GROUP))
                scale = tl.maximum(tl.max(tl.abs(v), 1), 1e-10) / FP8_MAX
                q = tl.reshape((v / scale[:, None]).to(tl.float8e4nv), (BLOCK,))
                tl.store(h + p * INTER + at, q, mask=at < INTER)
                group = tl.arange(0, BLOCK // GROUP)
                place = scales + p * stride_row + group * stride_group
                tl.store(place, scale, mask=group < tl.cdiv(INTER, GROUP))
        else:
            tl.store(h + p * INTER + at, v.to(tl.bfloat16), mask=at < INTER)


@triton.jit
def weighted_sum_kernel(
    rows, place, weights, y, H: tl.constexpr, TOPK: tl.constexpr, BLOCK: tl.constexpr
):
    """y[t] = sum_k weights[t, k] * rows[place[t, k]]."""
    t = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOPK):
        row = tl.load(place + t * TOPK + k).to(tl.int64)
        w = tl.load(weights + t * TOPK + k)
        total += w * tl.load(rows + row * H + c, mask=c < H, other=0).to(tl.float32)
    tl.store(y + t * H + c, total.to(tl.bfloat16), mask=c < H)


def gather_quantise(
    x: Tensor, source: Tensor, codes: Tensor, scales: Tensor | None, group: int
) -> None:
    """codes (P, K) and scales (P, K / group), any strides, from rows x[source] (P,) int32.

    bf16 codes are copied; scales may then be None.
    """
    fp8 = codes.dtype == torch.float8_e4m3fn
    strides = (0, 0) if scales is None else scales.stride()
    gather_quantise_kernel[(len(source),)](
        x,
        source,
        codes,
        scales if scales is not None else codes,
        *strides,
        K=x.shape[1],
        GROUP=group,
        BLOCK=1024,
        FP8=fp8,
        num_warps=4,
    )


def activate_quantise(
    gate_up: Tensor,
    h: Tensor,
    scales: Tensor | None,
    group: int,
    activation: str,
    keep: Tensor | None = None,
) -> None:
    """h (P, I) fp8 or bf16 and its scales from gate_up (P, 2I) bf16; keep (P,) < 0 skips a row."""
    fp8 = h.dtype == torch.float8_e4m3fn
    strides = (0, 0) if scales is None else scales.stride()
    inter = h.shape[1]
    activate_quantise_kernel[(h.shape[0],)](
        gate_up,
        h,
        scales if scales is not None else h,
        *strides,
        keep if keep is not None else h,
        INTER=inter,
        GROUP=group,
        BLOCK=max(triton.next_power_of_2(inter), group if group < inter else 1),
        FP8=fp8,
        SWIGLU=activation == "swiglu",
        MASKED=keep is not None,
        num_warps=4,
    )


def weighted_sum(rows: Tensor, place: Tensor, weights: Tensor, y: Tensor) -> None:
    """y (T, H) bf16 from rows (P, H) bf16, place (T, topk) int and weights (T, topk) f32."""
    tokens, topk = weights.shape
    hidden = y.shape[1]
    block = min(1024, triton.next_power_of_2(hidden))
    weighted_sum_kernel[(tokens, triton.cdiv(hidden, block))](
        rows, place, weights, y, H=hidden, TOPK=topk, BLOCK=block, num_warps=4
    )
