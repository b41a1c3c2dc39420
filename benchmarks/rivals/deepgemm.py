"""DeepGEMM FP8: 1x128 activations x 128x128 weights, contiguous layout and (decode) masked.

The scales are brought into the transposed, TMA-aligned layout outside the timing, so that no
transform kernel runs inside it. The contiguous layout pads every active expert to the library's
M alignment (128 on SM90); padding rows carry expert -1 and are skipped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Case
from benchmarks.counts import Stage
from benchmarks.glue import activate_quantise, gather_quantise, weighted_sum
from benchmarks.operands import Operand
from benchmarks.registry import Run, Shows, Unsupported, provider

NEEDS = ("deep_gemm",)
LEAVES_1 = "gather, activation, requantisation"
LEAVES_2 = "routing weight, reduction"
MASKED_UP_TO = 512  # tokens; the masked layout holds experts x tokens rows
GROUP = 128


def _library() -> Any:
    import deep_gemm

    return deep_gemm


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The contiguous layout: `source` (P,) route of each padded row or -1, `expert` (P,) its
    expert or -1, `place` (R,) the padded row of each route, and the alignment."""

    source: Tensor
    expert: Tensor
    place: Tensor
    align: int


def _refuse(case: Case) -> None:
    if case.shape.intermediate % GROUP or case.shape.hidden % GROUP:
        raise Unsupported(
            f"K and N must be multiples of 128: I {case.shape.intermediate}, H {case.shape.hidden}"
        )


def _contiguous_rows(case: Case) -> Rows:
    align = int(_library().get_mk_alignment_for_contiguous_layout())
    counts, order = case.routing.counts, case.routing.order
    padded = (counts + align - 1) // align * align
    starts, first = padded.cumsum(0) - padded, counts.cumsum(0) - counts
    expert = case.routing.ids.flatten().long()[order]
    at = starts[expert] + torch.arange(len(order), device=order.device) - first[expert]
    size = int(padded.sum())
    source = torch.full((size,), -1, dtype=torch.int32, device=order.device)
    source[at] = order.int()
    owner = torch.full((size,), -1, dtype=torch.int32, device=order.device)
    owner[at] = expert.int()
    place = torch.empty_like(order)
    place[order] = at
    return Rows(source, owner, place.int(), align)


def _rows(case: Case) -> Rows:
    return case.memo.once("deepgemm rows", lambda: _contiguous_rows(case))


def _mn_major(scales: Tensor) -> Tensor:
    aligned: Tensor = _library().get_mn_major_tma_aligned_tensor(scales)
    return aligned


def _padded(operand: Operand, index: Tensor) -> Operand:
    """Rows `index` of an activation; -1 gives row 0, which nothing reads."""
    assert operand.scales is not None
    rows = index.clamp_min(0).long()
    codes = operand.codes.view(torch.uint8)[rows].view(torch.float8_e4m3fn)
    return Operand(codes, _mn_major(operand.scales[rows].contiguous()), operand.block)


def _gemm(case: Case, activation: Operand, index: Tensor, which: int, shows: Shows) -> Run:
    weights = case.model.weights("fp8_block")[which]
    rows, a = _rows(case), _padded(activation, index)
    out = torch.empty(len(index), weights.codes.shape[1], dtype=torch.bfloat16, device=index.device)
    gemm, w = _library().m_grouped_fp8_gemm_nt_contiguous, (weights.codes, weights.scales)
    return Run(
        lambda: gemm((a.codes, a.scales), w, out, rows.expert),
        lambda routes: out[rows.place[routes].long()],
        shows,
    )


@provider("deepgemm", Stage.STAGE1, recipe="a8w8_block", needs=NEEDS, leaves_out=LEAVES_1)
def stage1(case: Case) -> Run:
    _refuse(case)
    source = _rows(case).source
    token = torch.where(source < 0, source, source // case.routing.topk)
    return _gemm(case, case.x_in("fp8_1x128"), token, 0, Shows.GATE_UP)


@provider(
    "deepgemm", Stage.STAGE2, recipe="a8w8_block", needs=NEEDS, leaves_out=LEAVES_2, reduces=False
)
def stage2(case: Case) -> Run:
    _refuse(case)
    return _gemm(case, case.h_in("fp8_1x128"), _rows(case).source, 1, Shows.ROUTE)


@provider("deepgemm", Stage.LAYER, recipe="a8w8_block", needs=NEEDS, leaves_out="routing, sort")
def layer(case: Case) -> Run:
    _refuse(case)
    shape, rows, device = case.shape, _rows(case), case.x.device
    size = len(rows.source)
    (w13, w2), gemm = case.model.weights("fp8_block"), _library().m_grouped_fp8_gemm_nt_contiguous
    token = torch.where(rows.source < 0, rows.source, rows.source // case.routing.topk).int()

    def empty(columns: int, kind: torch.dtype) -> Tensor:
        return torch.empty(size, columns, dtype=kind, device=device)

    def scales_of(columns: int) -> Tensor:
        return _mn_major(torch.zeros(size, columns // GROUP, device=device))

    x, h = empty(shape.hidden, torch.float8_e4m3fn), empty(shape.intermediate, torch.float8_e4m3fn)
    x_scales, h_scales = scales_of(shape.hidden), scales_of(shape.intermediate)
    gate_up, down = (
        empty(2 * shape.intermediate, torch.bfloat16),
        empty(shape.hidden, torch.bfloat16),
    )
    y = torch.empty_like(case.x)

    def call() -> None:
        gather_quantise(case.x, token, x, x_scales, GROUP)
        gemm((x, x_scales), (w13.codes, w13.scales), gate_up, rows.expert)
        activate_quantise(gate_up, h, h_scales, GROUP, shape.activation, keep=rows.source)
        gemm((h, h_scales), (w2.codes, w2.scales), down, rows.expert)
        weighted_sum(down, rows.place, case.routing.weights, y)

    return Run(call, lambda tokens: y[tokens], Shows.TOKEN)


def _masked(case: Case, activation: Operand, routes_to_rows: int, which: int, shows: Shows) -> Run:
    """The masked layout: (E, M, K) with M = T rounded up to 64, counts on the device."""
    if case.tokens > MASKED_UP_TO:
        raise Unsupported(f"the masked layout is for decode, at most {MASKED_UP_TO} tokens")
    _refuse(case)
    routing, weights = case.routing, case.model.weights("fp8_block")[which]
    experts, depth = case.shape.experts, -(-case.tokens // 64) * 64
    expert = routing.ids.flatten().long()
    first = routing.counts.cumsum(0) - routing.counts
    at = expert * depth + routing.inverse - first[expert]
    source = torch.full((experts * depth,), -1, device=expert.device)
    source[at] = torch.arange(len(expert), device=expert.device) // routes_to_rows
    rows = source.clamp_min(0)
    assert activation.scales is not None
    columns = activation.codes.shape[1]
    codes = activation.codes.view(torch.uint8)[rows].view(torch.float8_e4m3fn)
    scales = _mn_major(activation.scales[rows].unflatten(0, (experts, depth)).contiguous())
    a = (codes.view(experts, depth, columns), scales)
    out = torch.empty(
        experts, depth, weights.codes.shape[1], dtype=torch.bfloat16, device=expert.device
    )
    gemm, counts = _library().m_grouped_fp8_gemm_nt_masked, routing.counts.int()
    mean = max(1, -(-len(expert) // experts))
    w = (weights.codes, weights.scales)
    return Run(
        lambda: gemm(a, w, out, counts, mean), lambda routes: out.flatten(0, 1)[at[routes]], shows
    )


@provider("deepgemm_masked", Stage.STAGE1, recipe="a8w8_block", needs=NEEDS, leaves_out=LEAVES_1)
def masked_stage1(case: Case) -> Run:
    return _masked(case, case.x_in("fp8_1x128"), case.routing.topk, 0, Shows.GATE_UP)


@provider(
    "deepgemm_masked",
    Stage.STAGE2,
    recipe="a8w8_block",
    needs=NEEDS,
    leaves_out=LEAVES_2,
    reduces=False,
)
def masked_stage2(case: Case) -> Run:
    return _masked(case, case.h_in("fp8_1x128"), 1, 1, Shows.ROUTE)
