"""triton_kernels `matmul_ogs`: MXFP4 weights with bf16 or per-tensor fp8 activations.

Configured as vLLM does on Hopper: swizzled values and scales for bf16 (num_warps 8, split_k 1),
plain layout for fp8, where the swizzle does not exist. Its stage 1 fuses the gpt-oss swiglu on
interleaved gate and up columns, the only activation it has, on every shape; its stage 2 includes
the weighted top-k sum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Case
from benchmarks.counts import Stage
from benchmarks.operands import Operand
from benchmarks.registry import Run, Shows, provider

NEEDS = ("triton_kernels.matmul_ogs",)


def _weights(case: Case, which: int, swizzled: bool) -> tuple[Any, Any]:
    """The weight and its scale as triton_kernels tensors (E, K, N)."""
    return case.model.memo.once(
        ("triton_kernels", which, swizzled), lambda: _convert(case, which, swizzled)
    )


def _convert(case: Case, which: int, swizzled: bool) -> tuple[Any, Any]:
    from triton_kernels.matmul_ogs_details import opt_flags
    from triton_kernels.tensor import FP4, convert_layout, wrap_torch_tensor
    from triton_kernels.tensor_details import layout

    opt_flags.update_opt_flags_constraints({"split_k": 1})
    operand = case.model.weights("mxfp4")[which]
    assert operand.scales is not None
    codes, scales = operand.codes, operand.scales
    if which == 0:  # gate above up -> gate and up row by row
        codes, scales = (
            t.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2).contiguous()
            for t in (codes, scales)
        )
    value: tuple[Any, dict[str, Any]] = (layout.StridedLayout, {})
    scale: tuple[Any, dict[str, Any]] = (layout.StridedLayout, {})
    if swizzled:
        value = layout.make_default_matmul_mxfp4_w_layout(mx_axis=1)
        scale = layout.make_default_matmul_mxfp4_w_scale_layout(mx_axis=1, num_warps=8)
    w = wrap_torch_tensor(codes.transpose(1, 2), dtype=FP4)
    s = wrap_torch_tensor(scales.transpose(1, 2))
    return convert_layout(w, value[0], **value[1]), convert_layout(s, scale[0], **scale[1])


def _routing(case: Case) -> tuple[Any, Any, Any]:
    """RoutingData, GatherIndx and ScatterIndx from the case's own ids."""
    from triton_kernels.routing import GatherIndx, RoutingData, ScatterIndx, compute_expt_data

    routing, shape = case.routing, case.shape
    order, inverse = routing.order.int(), routing.inverse.int()
    hist = routing.counts.int()
    data = compute_expt_data(hist, shape.experts, len(order))
    weights = routing.weights.flatten()[routing.order]
    return (
        RoutingData(weights, hist, shape.experts, shape.topk, data),
        GatherIndx(src_indx=order, dst_indx=inverse),
        ScatterIndx(src_indx=inverse, dst_indx=order),
    )


class _Matmuls:
    """Both GEMMs of a case, with bf16 or fp8 rows."""

    def __init__(self, case: Case, fp8: bool) -> None:
        from triton_kernels.matmul_ogs import FnSpecs, FusedActivation, matmul_ogs
        from triton_kernels.swiglu import swiglu_fn

        self.matmul = matmul_ogs
        self.case, self.fp8 = case, fp8
        self.data, self.gather, self.scatter = case.memo.once(
            "triton_kernels routing", lambda: _routing(case)
        )
        self.swiglu = FusedActivation(
            FnSpecs("swiglu", swiglu_fn, ("alpha", "limit")), (1.702, 7.0), 2
        )

    def _precision(self, which: int, scale: Tensor | None) -> Any:
        from triton_kernels.matmul_ogs import FlexCtx, PrecisionConfig
        from triton_kernels.numerics import InFlexData

        _, w_scale = _weights(self.case, which, not self.fp8)
        if scale is None:
            return PrecisionConfig(weight_scale=w_scale)
        flex = FlexCtx(lhs_data=InFlexData(dtype=torch.float8_e4m3fn, scale=scale))
        return PrecisionConfig(weight_scale=w_scale, flex_ctx=flex, out_dtype=torch.bfloat16)

    def first(self, x: Tensor, scale: Tensor | None) -> Any:
        """x (T, H) -> a function that gives h (R, I) in expert order."""
        w, precision = _weights(self.case, 0, not self.fp8)[0], self._precision(0, scale)
        return lambda: self.matmul(
            x,
            w,
            None,
            self.data,
            gather_indx=self.gather,
            precision_config=precision,
            fused_activation=self.swiglu,
        )

    def second(self, scale: Tensor | None) -> Any:
        """A function from h (R, I) in expert order to y (T, H)."""
        w, precision = _weights(self.case, 1, not self.fp8)[0], self._precision(1, scale)
        return lambda h: self.matmul(
            h,
            w,
            None,
            self.data,
            scatter_indx=self.scatter,
            precision_config=precision,
            gammas=self.data.gate_scal,
        )


def _one_scale(operand: Operand) -> Tensor | None:
    return None if operand.scales is None else operand.scales[0].contiguous()


def _stage1(case: Case, fp8: bool) -> Run:
    x = case.x_in("fp8_tensor" if fp8 else "bf16")
    gemm = _Matmuls(case, fp8).first(x.codes, _one_scale(x))
    out: list[Tensor] = []
    inverse = case.routing.inverse

    def call() -> None:
        out[:] = [gemm()]

    return Run(call, lambda routes: out[0][inverse[routes]], Shows.HIDDEN, activation="swiglu")


def _stage2(case: Case, fp8: bool) -> Run:
    h = case.h_in("fp8_tensor" if fp8 else "bf16")
    gemm = _Matmuls(case, fp8).second(_one_scale(h))
    order = case.routing.order
    rows = h.codes[order] if not fp8 else h.codes.view(torch.uint8)[order].view(h.codes.dtype)
    out: list[Tensor] = []

    def call() -> None:
        out[:] = [gemm(rows)]

    return Run(call, lambda tokens: out[0][tokens], Shows.TOKEN)


@provider(
    "triton_kernels_bf16",
    Stage.STAGE1,
    recipe="a16w4",
    needs=NEEDS,
    leaves_out="nothing (h stays bf16)",
)
def bf16_stage1(case: Case) -> Run:
    return _stage1(case, False)


@provider("triton_kernels_bf16", Stage.STAGE2, recipe="a16w4", needs=NEEDS, leaves_out="nothing")
def bf16_stage2(case: Case) -> Run:
    return _stage2(case, False)


@provider("triton_kernels_bf16", Stage.LAYER, recipe="a16w4", needs=NEEDS, leaves_out="routing")
def bf16_layer(case: Case) -> Run:
    matmuls = _Matmuls(case, False)
    first, second = matmuls.first(case.x, None), matmuls.second(None)
    out: list[Tensor] = []

    def call() -> None:
        out[:] = [second(first())]

    return Run(call, lambda tokens: out[0][tokens], Shows.TOKEN, activation="swiglu")


@provider(
    "triton_kernels_fp8",
    Stage.STAGE1,
    recipe="a8w4_tensor",
    needs=NEEDS,
    leaves_out="requantisation",
)
def fp8_stage1(case: Case) -> Run:
    return _stage1(case, True)


@provider(
    "triton_kernels_fp8", Stage.STAGE2, recipe="a8w4_tensor", needs=NEEDS, leaves_out="nothing"
)
def fp8_stage2(case: Case) -> Run:
    return _stage2(case, True)
