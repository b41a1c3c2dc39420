"""What the public door refuses: the layer, its stages one by one, the records."""

from types import SimpleNamespace

import pytest
import torch
from cpu_layers import E, H, I, make

import mixmoe
from mixmoe import MixMoEError, MoE, Quantised, Recipe, Weights
from mixmoe.spec import CELLS

REFUSALS = {
    "x (T, H)": (lambda a: a | {"x": a["x"][None]}, r"x is \(T, H\)"),
    "x dtype": (lambda a: a | {"x": a["x"].double()}, "bf16, fp16 or f32"),
    "x columns": (lambda a: a | {"x": a["x"][:, :64]}, "got 64, nearest legal: 96"),
    "x strides": (lambda a: a | {"x": a["x"].T.contiguous().T}, "contiguous along H"),
    "ids rows": (lambda a: a | {"topk_ids": a["topk_ids"][:4]}, r"topk_ids is \(T, topk\)"),
    "ids dtype": (lambda a: a | {"topk_ids": a["topk_ids"].float()}, "int32 or int64"),
    "weights shape": (lambda a: a | {"topk_weights": a["topk_weights"][:, :1]}, "topk_weights"),
    "id too large": (lambda a: a | {"topk_ids": a["topk_ids"] + 1}, "below E.*nearest legal: 4"),
    "device": (lambda a: a | {"topk_ids": a["topk_ids"].to("meta")}, "on x's device"),
    "recipe": (lambda a: a | {"recipe": "a8w8"}, "takes fp8_channel weights: got mxfp4"),
    "recipe name": (lambda a: a | {"recipe": "a3w4"}, "unknown recipe: got a3w4"),
    "out shape": (lambda a: a | {"out": torch.empty(3, H)}, "out is torch.float32 of shape"),
    "out dtype": (lambda a: a | {"out": torch.empty(11, H).half()}, "got torch.float16"),
    "out strides": (lambda a: a | {"out": torch.empty(H, 11).T}, "out must be contiguous"),
    "backend": (lambda a: a | {"backend": "tpu"}, "unknown backend: got tpu, nearest legal: cpu"),
    "map dtype": (lambda a: a | {"expert_map": torch.rand(5)}, "expert_map is a 1-D int32"),
    "map values": (lambda a: a | {"expert_map": torch.arange(9)}, "point below E = 5"),
    "map short": (lambda a: a | {"expert_map": torch.arange(2)}, "expert_map's length = 2"),
    "id below -1": (
        lambda a: a | {"topk_ids": a["topk_ids"] - 2}, "-1 .*got -2, nearest legal: -1"
    ),
    "map below -1": (lambda a: a | {"expert_map": torch.full((5,), -9)}, "map must.*got -9"),
    "weights dtype": (
        lambda a: a | {"topk_weights": a["topk_weights"].double()},
        "is bf16, fp16 or f32 .*got torch.float64 .*nearest legal: torch.float32",
    ),
    "out overlaps": (
        lambda a: a | {"out": torch.empty(1, H).expand(11, H)},
        r"rows of out must not overlap: got strides \(0, 1\), nearest legal: strides \(96, 1\)",
    ),
    "recipe's type": (lambda a: a | {"recipe": None}, "a recipe is a Recipe or its name: got None"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case):
    x, weights, ids, w, recipe = make("a8w4")
    change, message = REFUSALS[case]
    args = change({"x": x, "topk_ids": ids, "topk_weights": w, "recipe": recipe})
    with pytest.raises(MixMoEError, match=message):
        mixmoe.moe(
            args.pop("x"), weights, args.pop("topk_ids"), args.pop("topk_weights"), **args
        )


def others(recipe="a8w4", hidden=H, inter=I, experts=E):
    """Weights of other sizes."""
    shapes = (experts, 2 * inter, hidden), (experts, hidden, inter)
    return Weights.from_dense(*map(torch.randn, shapes), CELLS[recipe][1])


# What stage 1 is given in place of a's own operands, and what it says.
GEMM1_REFUSALS = {
    "wide": (lambda a: {"x": torch.randn(11, 2 * H)}, "H columns: got 192, nearest legal: 96"),
    "half": (lambda a: {"x": a.x[:, : H // 2]}, "H columns: got 48, nearest legal: 96"),
    "few": (lambda a: {"x": a.x[:4]}, "T rows .*got 4, nearest legal: 11"),
    "many": (lambda a: {"x": torch.cat([a.x, a.x])}, "T rows .*got 22, nearest legal: 11"),
    "3-D": (lambda a: {"x": a.x[None]}, r"x is \(T, H\)"),
    "f64": (lambda a: {"x": a.x.double()}, "bf16, fp16 or f32"),
    "format": (lambda a: {"x": mixmoe.quantise(a.x, "mxfp4")}, "got mxfp4.*legal: fp8_token"),
    "few codes": (lambda a: {"x": mixmoe.quantise(a.x[:4], "fp8_token")}, r"shape .*got \(4, 96\)"),
    "scales": (
        lambda a: {"x": Quantised(a.xq.codes, a.xq.scales[:, 0], a.xq.format)}, "x: scales of"
    ),
    "strided codes": (
        lambda a: {"x": Quantised(a.xq.codes.repeat(1, 2)[:, ::2], a.xq.scales, a.xq.format)},
        "contiguous along K",
    ),
    "strides": (
        lambda a: {"x": Quantised(a.xq.codes, a.xq.scales.repeat(1, 2)[:, :1], a.xq.format)},
        "x: scales must be contiguous",
    ),
    "recipe": (lambda a: {"recipe": "a8w8"}, "takes fp8_channel weights: got mxfp4.* a8w4 "),
    "int8": (lambda a: {"weights": others("w8a8")}, "takes mxfp4 weights: got int8_channel"),
    "smooth": (
        lambda a: {"weights": others("w8a8"), "recipe": "w8a8_smooth"},
        "needs w13_smooth .*nearest legal: w8a8$",
    ),
    "other E": (lambda a: {"weights": others(experts=E + 1)}, r"got \(6, 96, 64\)"),
    "other H": (lambda a: {"weights": others(hidden=2 * H)}, r"legal: \(5, 96, 64\)"),
    "other I": (lambda a: {"weights": others(inter=2 * I)}, r"got \(5, 96, 128\)"),
    "device": (lambda a: {"x": a.x.to("meta")}, "must be on x's device"),
}
GEMM2_REFUSALS = {
    "wide": (lambda a: {"h": quantised_rows(33, 2 * I)}, r"got \(33, 128\), .*legal: \(33, 64\)"),
    "few": (lambda a: {"h": quantised_rows(5, I)}, r"h has the shape .*got \(5, 64\)"),
    "many": (lambda a: {"h": quantised_rows(5000, I)}, r"h has the shape .*got \(5000, 64\)"),
    "format": (lambda a: {"h": quantised_rows(33, I, "mxfp4")}, "got mxfp4.*legal: fp8_token"),
    "floats": (lambda a: {"h": torch.randn(33, I)}, "h is Quantised .*got Tensor"),
    "other E": (lambda a: {"weights": others(experts=E - 1)}, r"got \(4, 96, 64\)"),
}
COMBINE_REFUSALS = {
    "few": (lambda a: {"rows": a.rows[:5]}, r"rows is .* shape \(33, 96\): .*\(5, 96\)"),
    "narrow": (lambda a: {"rows": a.rows[:, :32]}, r"rows is .*of \(33, 32\)"),
    "3-D": (lambda a: {"rows": a.rows[None]}, r"rows is .*of \(1, 33, 96\)"),
    "whole": (lambda a: {"rows": a.rows.int()}, "rows is .*torch.int32"),
    "out 3-D": (lambda a: {"out": torch.empty(5, 11, H)}, r"out is .*of \(5, 11, 96\)"),
    "out whole": (lambda a: {"out": torch.empty(11, H).int()}, "out is .*torch.int32"),
    "out overlaps": (lambda a: {"out": torch.empty(1, H).expand(11, H)}, "must not overlap"),
    "out device": (lambda a: {"out": torch.empty(11, H, device="meta")}, "out must be on rows'"),
}
STAGE_REFUSALS = [
    *((mixmoe.gemm1, name) for name in GEMM1_REFUSALS),
    *((mixmoe.gemm2, name) for name in GEMM2_REFUSALS),
    *((mixmoe.combine, name) for name in COMBINE_REFUSALS),
]


def quantised_rows(rows, columns, name="fp8_token"):
    return mixmoe.quantise(torch.randn(rows, columns), name)


@pytest.mark.parametrize("stage, name", STAGE_REFUSALS, ids=lambda v: getattr(v, "__name__", v))
def test_stage_refusals(stage, name):
    """No stage runs on operands that do not meet."""
    x, weights, ids, w, recipe = make("a8w4")
    routed, xq = mixmoe.route(ids, w, weights), mixmoe.quantise(x, "fp8_token")
    h = mixmoe.gemm1(x, weights, routed, recipe=recipe)
    rows = mixmoe.gemm2(h, weights, routed, recipe=recipe)
    cases, first = {
        mixmoe.gemm1: (GEMM1_REFUSALS, {"x": x, "weights": weights}),
        mixmoe.gemm2: (GEMM2_REFUSALS, {"h": h, "weights": weights}),
        mixmoe.combine: (COMBINE_REFUSALS, {"rows": rows}),
    }[stage]
    change, message = cases[name]
    given = first | {"recipe": recipe} | change(SimpleNamespace(x=x, xq=xq, h=h, rows=rows))
    with pytest.raises(MixMoEError, match=message):
        stage(routed=routed, **given)


def test_weights_that_the_recipe_does_not_take_are_refused_before_the_call():
    weights, int8 = make("a8w4")[1], make("w8a8")[1]
    for door in (mixmoe.prepare, MoE):
        with pytest.raises(MixMoEError, match="takes fp8_channel weights: got mxfp4.*a8w4"):
            door(weights, "a8w8")
        with pytest.raises(MixMoEError, match=r"from_dense\(w13_smooth=.*nearest legal: w8a8$"):
            door(int8, "w8a8_smooth")
        door(weights, "a8w4")
        door(make("w4a8_smooth")[1], "w4a8_smooth")
        with pytest.raises(MixMoEError, match="smooth factors: got w13_smooth.*legal: w8a8_smooth"):
            door(make("w8a8_smooth")[1], "w8a8")


def test_record_refusals():
    w13, w2 = torch.randn(E, 2 * I, H), torch.randn(E, H, I)
    with pytest.raises(MixMoEError, match=r"w2 must be \(E, H, I\).*nearest legal: \(5, 96, 64\)"):
        Weights.from_dense(w13, w2[:, :64], "bf16")
    with pytest.raises(MixMoEError, match="I must be a positive multiple of 32: got 48.*32 or 64"):
        Weights.from_dense(w13[:, :96], w2[..., :48], "bf16")
    with pytest.raises(MixMoEError, match="w13_bias must be float32 of shape"):
        Weights.from_dense(w13, w2, "bf16", w13_bias=torch.randn(E, I))
    with pytest.raises(MixMoEError, match="w13 is Quantised or Packed .*got Tensor"):
        Weights(w13, w2)
    with pytest.raises(MixMoEError, match="gate_up"):
        Weights.from_dense(w13, w2, "bf16", gate_up="swapped")
    with pytest.raises(MixMoEError, match="fp8_token activations do not meet bf16 weights"):
        Recipe("fp8_token", "bf16")
    with pytest.raises(MixMoEError, match="not a format for activations"):
        Recipe("fp8_block", "fp8_block")
    with pytest.raises(MixMoEError, match="topk must be in 1..64: got 65, nearest legal: 64"):
        mixmoe.Problem(1, 64, 64, 2, 65)
    with pytest.raises(MixMoEError, match="weight_on"):
        Recipe.named("a8w4", weight_on=3)
    for act in (torch.nn.SiLU(), mixmoe.silu, 7):
        with pytest.raises(MixMoEError, match="act is an Activation or its key"):
            Recipe.named("a8w4", act=act)
    for act in ("swiglu/7", "swiglu/x/y/z/t", "silu/none/none/4/25"):
        with pytest.raises(MixMoEError, match="not an activation's key.*nearest legal: s"):
            Recipe.named("a8w4", act=act)
    with pytest.raises(MixMoEError, match="not a recipe's key"):
        Recipe.named("fp8_token:mxfp4:silu:bf16:CEIL:x:precise")
    with pytest.raises(MixMoEError, match="limit is a number: got '7'"):
        mixmoe.silu(limit="7")
    with pytest.raises(MixMoEError, match="alpha is finite"):
        mixmoe.swiglu(alpha=float("nan"))
    assert mixmoe.silu(limit=7) == mixmoe.silu(limit=torch.tensor(7.0).numpy()[()])
    x, weights, ids, w, _ = make("w8a8")
    with pytest.raises(MixMoEError, match="needs w13_smooth"):
        mixmoe.moe(x, weights, ids, w, recipe="w8a8_smooth")


W13, W2 = torch.ones(E, 2 * I, H), torch.ones(E, H, I)
NAN3 = torch.ones(E, 2 * I, H).index_fill(0, torch.tensor(3), torch.nan)
FROM_DENSE_REFUSALS = {
    "H": ((torch.ones(E, 2 * I, 48), torch.ones(E, 48, I)), {}, "H must .*got 48"),
    "I": ((W13[:, :96], W2[..., :48]), {}, "I must .*got 48"),
    "group": ((W13, W2), {"format": "int4_group128"}, "w13: K must .* of 128 .*got 96"),
    "w13": ((NAN3, W2), {}, r"w13: mxfp4 takes finite values: row \(3, 0\)"),
    "w2": ((W13, W2 / 0), {}, r"w2: mxfp4 takes finite values: row \(0, 0\)"),
    "whole": ((W13, W2.int()), {}, "w2: quantise takes a float tensor"),
    "interleaved": ((NAN3, W2), {"gate_up": "interleaved"}, r"w13\[3\] with gate rows above up"),
    "smoothed": ((NAN3, W2), {"w13_smooth": W13[:, 0]}, r"w13\[3\] by w13_smooth: .*row \(0\)"),
    "1-D bias": ((W13, W2), {"gate_up": "interleaved", "w13_bias": W13[0, :, 0]}, "w13_bias must"),
    "smooth shape": ((W13, W2), {"w13_smooth": torch.ones(E, H + 1)}, "w13_smooth must be .*97"),
    "zero": ((W13, W2), {"w2_smooth": W2[:, 0] * 0}, r"w2_smooth is finite and not 0: got 0.0 at"),
    "format": ((W13, W2), {"format": None}, "a number format is a Format or its name: got None"),
}


@pytest.mark.parametrize("case", FROM_DENSE_REFUSALS)
def test_from_dense_names_the_operand(case):
    matrices, changes, message = FROM_DENSE_REFUSALS[case]
    with pytest.raises(MixMoEError, match=message):
        Weights.from_dense(*matrices, **changes)
