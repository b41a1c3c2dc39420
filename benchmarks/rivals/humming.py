"""humming: MXFP4 weights with fp8 rows (the scales folded before the MMA) or bf16 rows.

Set up as vLLM sets it up: the library's own tuning heuristics for the number of routes, weights
padded to N 256 and K 128, indexed rows; the grouped layout, which needs rows in expert order,
stands beside it as a provider of its own because it wins at some prefill shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Case
from benchmarks.counts import Stage
from benchmarks.glue import weighted_sum
from benchmarks.operands import Operand
from benchmarks.registry import Run, Shows, Unsupported, provider

NEEDS = ("humming", "humming.layer")
LEAVES_1 = "activation, requantisation, block alignment of the routes"
LEAVES_2 = "routing weight, reduction"
GROUPED_FROM = 1024  # tokens
SILU = "a / (1.f + __expf(-a)) * b"
SWIGLU = (
    "fminf(a, 7.f) / (1.f + __expf(-1.702f * fminf(a, 7.f))) * (fminf(fmaxf(b, -7.f), 7.f) + 1.f)"
)


def _linear(case: Case, which: int, fp8: bool) -> Any:
    """The humming layer that holds w13 or w2, repacked."""
    return case.model.memo.once(("humming", which, fp8), lambda: _load(case, which, fp8))


def _load(case: Case, which: int, fp8: bool) -> Any:
    from humming.layer import HummingLayer

    operand = case.model.weights("mxfp4")[which]
    experts, rows, half = operand.codes.shape
    with torch.device(case.x.device):
        linear = HummingLayer(
            shape_n=rows,
            shape_k=half * 2,
            num_experts=experts,
            pad_n_to_multiple=256,
            pad_k_to_multiple=128,
            torch_dtype=torch.bfloat16,
            weight_config={"quant_method": "mxfp4"},
            input_config={"dtype": "float8e4m3" if fp8 else "bfloat16"},
        )
    linear.load_from_tensors({"weight": operand.codes, "weight_scale": operand.scales})
    linear = linear.to(case.x.device)
    linear.transform()
    return linear


@dataclass(frozen=True, slots=True, eq=False)
class Launch:
    """One GEMM: the tile that the library chose and the routing in the form that it wants."""

    linear: Any
    tuning: dict[str, Any]
    compute: dict[str, Any]
    routing: dict[str, Tensor]
    topk: int
    routes: int

    def __call__(self, inputs: Tensor, scale: Tensor | None, out: Tensor) -> None:
        self.linear(
            inputs,
            outputs=out,
            input_scale=scale,
            top_k=self.topk,
            valid_shape_m=self.routes,
            compute_config=self.compute,
            tuning_config=self.tuning,
            **self.routing,
        )


def _tile(linear: Any, routes: int, kind: str) -> dict[str, Any]:
    from humming.tune import get_heuristics_config

    tuning: dict[str, Any] = get_heuristics_config(
        linear.humming_config, shape_m=routes, gemm_type=kind
    )
    return tuning


def _aligned(case: Case, block: int) -> dict[str, Tensor]:
    """Routes sorted by expert and padded to blocks, as moe_align_block_size gives them."""
    counts, order = case.routing.counts, case.routing.order
    padded = (counts + block - 1) // block * block
    starts, first = padded.cumsum(0) - padded, counts.cumsum(0) - counts
    expert = case.routing.ids.flatten().long()[order]
    at = starts[expert] + torch.arange(len(order), device=order.device) - first[expert]
    ids = torch.full((int(padded.sum()),), len(order), dtype=torch.int32, device=order.device)
    ids[at] = order.int()
    experts = torch.arange(len(counts), device=order.device).repeat_interleave(padded // block)
    return {
        "sorted_ids": ids,
        "expert_ids": experts.int(),
        "num_tokens_padded": padded.sum().int().reshape(1),
    }


def _launch(case: Case, which: int, fp8: bool, grouped: bool) -> Launch:
    kind = "grouped_contiguous" if grouped else "indexed"
    linear, routes = _linear(case, which, fp8), case.shape.routes(case.tokens)
    tuning = _tile(linear, routes, kind)
    if grouped:
        ends = torch.nn.functional.pad(case.routing.counts.cumsum(0), (1, 0))
        return Launch(linear, tuning, {"gemm_type": kind}, {"expert_layout": ends}, 1, routes)
    routing = _aligned(case, tuning["block_shape"][0])
    topk = 1 if which else case.shape.topk
    return Launch(linear, tuning, {"gemm_type": kind}, routing, topk, routes)


def _gemm(case: Case, rows: Operand, which: int, fp8: bool, grouped: bool) -> Run:
    if grouped and case.tokens < GROUPED_FROM:
        raise Unsupported(f"the grouped layout is for prefill, from {GROUPED_FROM} tokens")
    launch, routing = _launch(case, which, fp8, grouped), case.routing
    codes, scale = rows.codes, rows.scales
    if grouped:
        index = routing.order if which else routing.order // routing.topk
        raw = codes.view(torch.uint8) if fp8 else codes
        codes = raw[index].view(codes.dtype)
        scale = None if scale is None else scale[index].contiguous()
    width = case.model.w13.codes.shape[1] if which == 0 else case.shape.hidden
    out = torch.empty(launch.routes, width, dtype=torch.bfloat16, device=case.x.device)
    place = routing.inverse if grouped else torch.arange(launch.routes, device=case.x.device)
    shows = Shows.ROUTE if which else Shows.GATE_UP
    return Run(lambda: launch(codes, scale, out), lambda routes: out[place[routes]], shows)


def _layer(case: Case, fp8: bool) -> Run:
    shape = case.shape
    first, second = _launch(case, 0, fp8, False), _launch(case, 1, fp8, False)
    routes, device = first.routes, case.x.device
    gate_up = torch.empty(routes, 2 * shape.intermediate, dtype=torch.bfloat16, device=device)
    down = torch.empty(routes, shape.hidden, dtype=torch.bfloat16, device=device)
    place = torch.arange(routes, dtype=torch.int32, device=device)
    y = torch.empty_like(case.x)
    quantise, activate = _inputs(first.linear, fp8), _activation(second.linear, shape.activation)

    def call() -> None:
        codes, scale = quantise(case.x)
        first(codes, scale, gate_up)
        codes, scale = activate(gate_up)
        second(codes, scale, down)
        weighted_sum(down, place, case.routing.weights, y)

    return Run(call, lambda tokens: y[tokens], Shows.TOKEN)


def _inputs(linear: Any, fp8: bool) -> Any:
    from humming.forward import may_quant_input

    if not fp8:
        return lambda x: (x, None)
    return lambda x: may_quant_input(linear.humming_config, x)


def _activation(linear: Any, name: str) -> Any:
    """act(gate) * up and the requantisation, in the library's own fused input kernel."""
    from humming.forward import may_process_input

    impl = SWIGLU if name == "swiglu" else SILU

    def activate(gate_up: Tensor) -> tuple[Tensor, Tensor | None]:
        h, groups, tokens = may_process_input(
            linear.humming_config, gate_up, activation_type="binary_split", activation_impl=impl
        )
        return h, groups if groups is not None else tokens

    return activate


@provider("humming_fp8", Stage.STAGE1, recipe="a8w4", needs=NEEDS, leaves_out=LEAVES_1)
def fp8_stage1(case: Case) -> Run:
    return _gemm(case, case.x_in("fp8_token"), 0, True, False)


@provider(
    "humming_fp8", Stage.STAGE2, recipe="a8w4", needs=NEEDS, leaves_out=LEAVES_2, reduces=False
)
def fp8_stage2(case: Case) -> Run:
    return _gemm(case, case.h_in("fp8_token"), 1, True, False)


@provider("humming_fp8", Stage.LAYER, recipe="a8w4", needs=NEEDS, leaves_out="routing, sort")
def fp8_layer(case: Case) -> Run:
    return _layer(case, True)


@provider(
    "humming_fp8_grouped",
    Stage.STAGE1,
    recipe="a8w4",
    needs=NEEDS,
    leaves_out=f"gather, {LEAVES_1}",
)
def fp8_grouped_stage1(case: Case) -> Run:
    return _gemm(case, case.x_in("fp8_token"), 0, True, True)


@provider(
    "humming_fp8_grouped",
    Stage.STAGE2,
    recipe="a8w4",
    needs=NEEDS,
    leaves_out=LEAVES_2,
    reduces=False,
)
def fp8_grouped_stage2(case: Case) -> Run:
    return _gemm(case, case.h_in("fp8_token"), 1, True, True)


@provider("humming_bf16", Stage.STAGE1, recipe="a16w4", needs=NEEDS, leaves_out=LEAVES_1)
def bf16_stage1(case: Case) -> Run:
    return _gemm(case, case.x_in("bf16"), 0, False, False)


@provider(
    "humming_bf16", Stage.STAGE2, recipe="a16w4", needs=NEEDS, leaves_out=LEAVES_2, reduces=False
)
def bf16_stage2(case: Case) -> Run:
    return _gemm(case, case.h_in("bf16"), 1, False, False)


@provider("humming_bf16", Stage.LAYER, recipe="a16w4", needs=NEEDS, leaves_out="routing, sort")
def bf16_layer(case: Case) -> Run:
    return _layer(case, False)
