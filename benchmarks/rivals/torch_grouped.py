"""torch's own grouped GEMMs: torch._grouped_mm (bf16) and torch._scaled_grouped_mm (fp8 rows)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.case import Case
from benchmarks.counts import Stage
from benchmarks.glue import activate_quantise, gather_quantise, weighted_sum
from benchmarks.operands import Operand
from benchmarks.registry import Run, Shows, provider

LEAVES_1 = "gather, activation, requantisation"
LEAVES_2 = "routing weight, reduction"


def _ends(case: Case) -> Tensor:
    """Where each expert's rows end in expert order, (E,) int32."""
    ends: Tensor = case.memo.once("ends", lambda: case.routing.counts.cumsum(0).int())
    return ends


def _grouped_bf16(a: Tensor, weights: Operand, ends: Tensor) -> Tensor:
    return torch._grouped_mm(a, weights.codes.transpose(1, 2), offs=ends)


def _grouped_fp8(a: Operand, weights: Operand, ends: Tensor) -> Tensor:
    assert a.scales is not None and weights.scales is not None
    return torch._scaled_grouped_mm(
        a.codes,
        weights.codes.transpose(1, 2),
        a.scales.squeeze(-1),
        weights.scales.squeeze(-1),
        offs=ends,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def _sorted(operand: Operand, order: Tensor) -> Operand:
    codes = operand.codes.view(torch.uint8)[order].view(operand.codes.dtype)
    scales = None if operand.scales is None else operand.scales[order].contiguous()
    if operand.scales is None:
        codes = operand.codes[order]
    return Operand(codes, scales, operand.block)


def _gemm(case: Case, operand: Operand, which: int, fp8: bool, shows: Shows) -> Run:
    weights = case.model.weights("fp8_channel" if fp8 else "bf16")[which]
    ends, routing = _ends(case), case.routing
    out: list[Tensor] = []

    def call() -> None:
        product = (
            _grouped_fp8(operand, weights, ends)
            if fp8
            else _grouped_bf16(operand.codes, weights, ends)
        )
        out[:] = [product]

    return Run(call, lambda routes: out[0][routing.inverse[routes]], shows)


def _layer(case: Case, fp8: bool) -> Run:
    shape, routing = case.shape, case.routing
    w13, w2 = case.model.weights("fp8_channel" if fp8 else "bf16")
    rows, device = len(routing.order), case.x.device
    kind = torch.float8_e4m3fn if fp8 else torch.bfloat16
    xs = Operand(
        torch.empty(rows, shape.hidden, dtype=kind, device=device),
        torch.empty(rows, 1, device=device) if fp8 else None,
        (1, shape.hidden),
    )
    h = Operand(
        torch.empty(rows, shape.intermediate, dtype=kind, device=device),
        torch.empty(rows, 1, device=device) if fp8 else None,
        (1, shape.intermediate),
    )
    token = (routing.order // routing.topk).int()
    place, ends = routing.inverse.int(), _ends(case)
    y = torch.empty_like(case.x)
    grouped: Callable[[Operand, Operand], Tensor] = (
        (lambda a, w: _grouped_fp8(a, w, ends))
        if fp8
        else (lambda a, w: _grouped_bf16(a.codes, w, ends))
    )

    def call() -> None:
        gather_quantise(case.x, token, xs.codes, xs.scales, shape.hidden)
        gate_up = grouped(xs, w13)
        activate_quantise(gate_up, h.codes, h.scales, shape.intermediate, shape.activation)
        weighted_sum(grouped(h, w2), place, routing.weights, y)

    return Run(call, lambda tokens: y[tokens], Shows.TOKEN)


@provider("torch_grouped_bf16", Stage.STAGE1, recipe="a16w16", leaves_out=LEAVES_1)
def bf16_stage1(case: Case) -> Run:
    token = case.routing.order // case.routing.topk
    return _gemm(case, _sorted(case.x_in("bf16"), token), 0, False, Shows.GATE_UP)


@provider("torch_grouped_bf16", Stage.STAGE2, recipe="a16w16", leaves_out=LEAVES_2, reduces=False)
def bf16_stage2(case: Case) -> Run:
    return _gemm(case, _sorted(case.h_in("bf16"), case.routing.order), 1, False, Shows.ROUTE)


@provider("torch_grouped_bf16", Stage.LAYER, recipe="a16w16", leaves_out="routing, sort")
def bf16_layer(case: Case) -> Run:
    return _layer(case, False)


@provider("torch_grouped_fp8", Stage.STAGE1, recipe="a8w8", leaves_out=LEAVES_1)
def fp8_stage1(case: Case) -> Run:
    token = case.routing.order // case.routing.topk
    return _gemm(case, _sorted(case.x_in("fp8_token"), token), 0, True, Shows.GATE_UP)


@provider("torch_grouped_fp8", Stage.STAGE2, recipe="a8w8", leaves_out=LEAVES_2, reduces=False)
def fp8_stage2(case: Case) -> Run:
    return _gemm(case, _sorted(case.h_in("fp8_token"), case.routing.order), 1, True, Shows.ROUTE)


@provider("torch_grouped_fp8", Stage.LAYER, recipe="a8w8", leaves_out="routing, sort")
def fp8_layer(case: Case) -> Run:
    return _layer(case, True)
