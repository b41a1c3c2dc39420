"""The benchmark's own arithmetic, on the CPU: a wrong count or a wrong check would lie quietly."""

import inspect
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
import torch
from benchmark_toys import TINY, entry_of, plain_gate_up

from benchmarks import counts, operands, reference, routing
from benchmarks import worker as worker_module
from benchmarks.case import Case, Memo, Model, quantise_rows
from benchmarks.counts import Cost, Stage, cost, matrix_bytes
from benchmarks.operands import Operand
from benchmarks.plan import Plan
from benchmarks.registry import Run, Shows
from benchmarks.roofs import Roof, Roofs, highest, near
from benchmarks.routing import Skew
from benchmarks.shapes import SHAPES, TABLE_TOKENS, TOKENS, Shape
from mixmoe.spec import Recipe
from mixmoe.timing import Flush, summarise

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model():
    return Model.random(TINY, "cpu")


@pytest.fixture(scope="module")
def case(model):
    return Case.random(model, 9, Skew.UNIFORM)


ROOT = Path(__file__).parents[1]

# --- time


def test_a_call_costs_the_difference_of_the_medians():
    with_call = [108.0, 112.0, 110.0, 500.0, 109.0]
    flush_only = [70.0, 71.0, 70.0, 70.0, 90.0]
    timing = summarise(with_call, flush_only, repeats=4)
    assert timing.us == (110.0 - 70.0) / 4
    assert timing.rounds == 5
    # paired differences / 4: 9.5, 10.25, 10, 107.5, 4.75; quartiles 9.5 and 10.25
    assert timing.spread == pytest.approx(0.75)


def test_the_spread_sees_noise_and_the_median_does_not():
    quiet = summarise([110.0] * 8, [70.0] * 8, 1)
    noisy = summarise([110.0, 130.0] * 4, [70.0] * 8, 1)
    assert quiet.spread == 0 and noisy.spread == 20
    assert summarise([110.0] * 7 + [9e9], [70.0] * 8, 1).us == quiet.us


@pytest.mark.parametrize(("calls", "flushes"), [([], []), ([1.0], [1.0, 2.0])])
def test_rounds_must_pair(calls, flushes):
    with pytest.raises(ValueError, match="pair"):
        summarise(calls, flushes, 1)


# --- bytes and FLOPs


def check_counts():
    shape = SHAPES["dsv3_tp8"]
    w13, w2 = 512 * 7168 * 17 // 32, 7168 * 256 * 17 // 32  # 4.25 bits a weight
    assert matrix_bytes("mxfp4", 512, 7168) == w13
    one = cost(shape, 1, 8, Stage.STAGE1, "a8w4")
    assert one.nbytes == 8 * w13 + (7168 + 4) + 8 * (256 + 4)
    assert one.flops == 2 * 8 * 512 * 7168
    two = cost(shape, 1, 8, Stage.STAGE2, "a8w4")
    assert two.nbytes == 8 * w2 + 8 * (256 + 4) + 7168 * 2
    assert two.flops == 2 * 8 * 256 * 7168
    layer = cost(shape, 1, 8, Stage.LAYER, "a8w4")
    assert layer.nbytes == 8 * (w13 + w2) + 2 * 7168 * 2
    assert layer.flops == one.flops + two.flops


def test_counts_by_hand():
    check_counts()


@pytest.mark.parametrize("bits", [(4, 0, 1, 32), (8, 8, 1, 32), (4, 8, 1, 16), (4, 8, 0, 32)])
def test_a_wrong_format_size_is_seen(monkeypatch, bits):
    monkeypatch.setitem(counts.FORMAT_BITS, "mxfp4", bits)
    with pytest.raises(AssertionError):
        check_counts()


def test_block_scales_round_up():
    assert matrix_bytes("fp8_block", 192, 300) == 192 * 300 + 2 * 3 * 4
    assert matrix_bytes("fp8_1x128", 5, 192) == 5 * 192 + 5 * 2 * 4
    assert matrix_bytes("fp8_tensor", 5, 192) == 5 * 192 + 4


def test_a_provider_that_does_not_reduce_writes_a_row_per_route():
    shape = SHAPES["dsv3_tp8"]
    whole = cost(shape, 64, 222, Stage.STAGE2, "a8w4")
    rows = cost(shape, 64, 222, Stage.STAGE2, "a8w4", reduces=False)
    assert rows.nbytes - whole.nbytes == (64 * 8 - 64) * 7168 * 2


def test_only_active_experts_count():
    shape = SHAPES["kimik2_tp8"]
    few, many = (cost(shape, 64, n, Stage.STAGE1, "a8w4") for n in (10, 300))
    assert many.nbytes - few.nbytes == 290 * matrix_bytes("mxfp4", 512, 7168)
    assert few.flops == many.flops


def test_the_roof_is_the_highest_one():
    work = Cost(nbytes=1, flops=int(1486e12 * 100e-6))  # 100 us at 1486 TFLOP/s
    assert highest(50.0, work, 1486.0).by == "dense GEMM"
    assert highest(50.0, work, 1486.0).us == pytest.approx(100.0)
    assert highest(150.0, work, 1486.0) == Roof(150.0, "read")
    assert highest(50.0, work, 1486.0, 305.0) == Roof(305.0, "reduction")


# --- shapes and plans


def test_the_shapes_and_token_counts_of_the_issue():
    sizes = {name: (s.hidden, s.intermediate, s.experts) for name, s in SHAPES.items()}
    assert sizes["dsv3_ep"] == (7168, 2048, 32)
    assert sizes["gptoss120b"] == (2880, 2880, 128) and SHAPES["gptoss120b"].topk == 4
    assert sizes["qwen3_tp4"][1] == 384 and sizes["qwen3_tp8"][1] == 192
    assert TOKENS == (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
    assert set(TABLE_TOKENS) < set(TOKENS)


def test_a_plan_travels_and_refuses_what_does_not_exist():
    plan = Plan(shapes=("dsv3_tp8",), tokens=(1, 8), seconds=9.5, resume=True)
    assert Plan.read(plan.dump()) == plan
    for bad in ({"shapes": ("nope",)}, {"tokens": (0,)}, {"skews": ("x",)}, {"flushes": ("wet",)}):
        with pytest.raises(ValueError):
            Plan(**bad)


# --- routing


@pytest.mark.parametrize("skew", list(Skew))
def test_no_token_takes_an_expert_twice_and_draws_repeat(skew):
    shape = SHAPES["dsv3_tp8"]
    ids = routing.draw_ids(shape, 500, skew)
    assert ids.shape == (500, 8) and int(ids.min()) >= 0 and int(ids.max()) < 256
    assert all(len(set(row)) == 8 for row in ids.tolist())
    assert torch.equal(ids, routing.draw_ids(shape, 500, skew))
    assert not torch.equal(ids, routing.draw_ids(shape, 500, skew, seed=1))


def test_zipf_is_skewed_as_one_over_rank_and_uniform_is_not():
    shape = Shape("s", 32, 32, 64, 1)
    tokens = 40_000
    for skew, share in ((Skew.ZIPF, 1 / sum(1 / r for r in range(1, 65))), (Skew.UNIFORM, 1 / 64)):
        drawn = torch.bincount(routing.draw_ids(shape, tokens, skew).flatten(), minlength=64)
        top = drawn.sort(descending=True).values
        assert top[0].item() == pytest.approx(share * tokens, rel=0.15)
        if skew is Skew.ZIPF:
            assert top[0] / top[7] == pytest.approx(8, rel=0.3)


def test_what_follows_from_the_ids():
    ids = torch.tensor([[3, 1], [1, 0], [3, 0]])
    made = routing.routing_of(ids, torch.full((3, 2), 0.5), 5)
    assert made.order.tolist() == [3, 5, 1, 2, 0, 4]
    assert made.inverse.tolist() == [4, 2, 3, 0, 5, 1]
    assert made.counts.tolist() == [2, 2, 0, 2, 0] and made.active == 3


# --- operands


def check_e2m1():
    every = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    codes = torch.tensor(
        [[low | high << 4 for low, high in zip(range(16), range(16), strict=True)]]
    )
    values = operands.unpack_e2m1(codes.to(torch.uint8), torch.float32)
    assert values.tolist() == [[v for v in every.tolist() for _ in range(2)]]
    ordered = operands.unpack_e2m1(torch.tensor([[0x21]], dtype=torch.uint8), torch.float32)
    assert ordered.tolist() == [[0.5, 1.0]]  # the low nibble is the even k


def test_e2m1_is_ml_dtypes_e2m1():
    check_e2m1()


def test_a_wrong_e2m1_table_is_seen(monkeypatch):
    monkeypatch.setattr(operands, "E2M1_VALUES", (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0))
    with pytest.raises(AssertionError):
        check_e2m1()


def test_mxfp4_rounds_to_nearest_and_does_not_saturate():
    values = torch.randn(7, 96, generator=torch.Generator().manual_seed(1)) * 3
    codes, scales = operands.quantise_mxfp4(values)
    back = operands.dequantise(codes, scales, (1, 32), torch.float32)
    step = torch.exp2(scales.float() - 127).repeat_interleave(32, -1)
    scaled = (values / step).numpy()
    assert np.abs(scaled).max() <= 6
    want = scaled.astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert np.array_equal((back / step).numpy(), want)
    halved = (values / (step / 2)).unflatten(-1, (-1, 32)).abs().amax(-1)
    assert bool((halved > 6).all()), "a smaller scale would have done"


@pytest.mark.parametrize("block", [(1, 0), (1, 128), (128, 128), (0, 0)])
def test_fp8_scales_are_amax_over_448(block):
    values = torch.randn(3, 130, 192, generator=torch.Generator().manual_seed(2))
    made = operands.quantise_fp8(values, block)
    high, wide = block[0] or 130, block[1] or 192
    for e, r, c in itertools.product(range(3), range(0, 130, high), range(0, 192, wide)):
        tile = values[e, r : r + high, c : c + wide]
        assert made.scales[e, r // high, c // wide] == tile.abs().max() / 448
    back = made.dense(slice(None))
    assert float((back - values).abs().max()) < 0.04 * float(values.abs().max())


def test_activations_by_hand():
    gate_up = torch.tensor([[2.0, 9.0, 3.0, -9.0]])
    silu = operands.activate("silu", gate_up)
    assert silu[0, 0].item() == pytest.approx(2 / (1 + math.exp(-2)) * 3)
    swiglu = operands.activate("swiglu", gate_up)
    assert swiglu[0, 0].item() == pytest.approx(2 / (1 + math.exp(-1.702 * 2)) * 4)
    assert swiglu[0, 1].item() == pytest.approx(7 / (1 + math.exp(-1.702 * 7)) * -6)


# --- the check against float64


BREAKS = {
    "two experts swapped": lambda w: w[[1, 0, *range(2, 8)]],
    "a K tail dropped": lambda w: torch.cat([w[..., :224], w[..., 224:] * 0], -1),
    "gate and up swapped": lambda w: w.roll(TINY.intermediate, 1),
    "one scale shifted": lambda w: torch.cat([w[..., :32] * 2, w[..., 32:]], -1),
}


def stage1_error(case, change):
    w13 = case.model.weights("bf16")[0].codes
    out = plain_gate_up(case, change(w13.clone()))
    run = Run(lambda: None, lambda routes: out[routes], Shows.GATE_UP)
    index = torch.arange(len(out))
    return reference.worst_row_error(case, entry_of(Stage.STAGE1), run, index)


def test_a_right_result_has_no_error(case):
    assert stage1_error(case, lambda w: w) < 1e-12


@pytest.mark.parametrize("what", list(BREAKS))
def test_every_break_is_seen(case, what):
    assert stage1_error(case, BREAKS[what]) > worker_module.WRONG


def test_one_row_of_zeros_is_seen(case):
    out = plain_gate_up(case, case.model.weights("bf16")[0].codes)
    out[7] = 0
    run = Run(lambda: None, lambda routes: out[routes], Shows.GATE_UP)
    error = reference.worst_row_error(case, entry_of(Stage.STAGE1), run, torch.arange(18))
    assert error == 1.0


def test_a_result_that_is_not_finite_is_wrong(case):
    out = torch.full((18, 128), float("nan"))
    run = Run(lambda: None, lambda routes: out[routes], Shows.GATE_UP)
    error = reference.worst_row_error(case, entry_of(Stage.STAGE1), run, torch.arange(18))
    assert error == float("inf")


def test_the_layer_is_the_stages_one_after_the_other(case):
    w13, w2 = (w.codes.double() for w in case.model.weights("bf16"))
    h = operands.activate("silu", plain_gate_up(case, w13)).bfloat16().double()
    routes = case.routing.ids.flatten().tolist()
    rows = torch.stack([w2[e] @ h[r] for r, e in enumerate(routes)])
    y = (rows.unflatten(0, (-1, 2)) * case.routing.weights.double().unsqueeze(-1)).sum(1)
    layer = entry_of(Stage.LAYER)
    for change, low, high in ((1.0, 0.0, 1e-12), (1.01, 5e-3, 2e-2)):
        run = Run(lambda: None, lambda t, c=change: y[t] * c, Shows.TOKEN)
        error = reference.worst_row_error(case, layer, run, torch.arange(9))
        assert low <= error < high


def test_samples_hold_the_fullest_and_the_emptiest_expert():
    made = Case.random(Model.random(TINY, "cpu"), 40, Skew.ZIPF)
    routes = reference.sample_routes(made)
    experts = set(made.routing.ids.flatten()[routes].tolist())
    counts_of = made.routing.counts
    active = counts_of[counts_of > 0]
    assert int(counts_of.argmax()) in experts
    assert any(counts_of[e] == active.min() for e in experts)
    assert 0 in routes and 79 in routes


@pytest.mark.parametrize("name", ["fp8_token", "fp8_1x128", "fp8_tensor", "mxfp4", "mxfp8", "bf16"])
def test_every_activation_format_comes_back(name):
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(3))
    back = quantise_rows(x, name).dense(slice(None))
    worst = {"mxfp4": 0.3, "bf16": 0.005}.get(name, 0.07)
    assert float(((back - x).norm(dim=-1) / x.norm(dim=-1)).max()) < worst
    one = quantise_rows(x, name).dense(torch.tensor([4]))
    assert torch.equal(one[0], back[4])


def test_weights_of_another_format_are_the_same_weights(model):
    dense = model.w13.dense(slice(None))
    assert torch.equal(model.weights("bf16")[0].dense(slice(None)), dense)
    for name in ("fp8_channel", "fp8_block"):
        back = model.weights(name)[0].dense(slice(None))
        assert float((back - dense).norm() / dense.norm()) < 0.04
    assert model.weights("bf16") is model.weights("bf16"), "converted once"


def test_memo_builds_once():
    memo, built = Memo(), []
    assert memo.once("a", lambda: built.append(1) or 7) == memo.once("a", lambda: 8) == 7
    assert built == [1]


def test_an_operand_of_bf16_has_no_scale():
    values = torch.randn(2, 64).bfloat16()
    assert torch.equal(Operand(values, None, (1, 64)).dense(slice(None)), values.float())


# --- glue

GLUE = """
import torch
from benchmarks.glue import activate_quantise, gather_quantise, weighted_sum
from benchmarks.operands import activate, quantise_fp8

def same(got, want):
    # Triton 3.6.0's interpreter rounds to fp8 with ties away and loses the carry into the
    # exponent (126.1 -> 64): a few codes may differ, by one step or by that factor of two
    carry, step = got * 2 == want, (got - want).abs() <= want.abs() / 8 + 2**-9
    assert (carry | step).all() and (got != want).float().mean() < 0.06

torch.manual_seed(0)
x = torch.randn(5, 384).bfloat16()
source = torch.tensor([3, -1, 0, 4], dtype=torch.int32)
for group in (384, 128):
    want = quantise_fp8(x, (1, group))
    codes = torch.zeros(4, 384, dtype=torch.float8_e4m3fn)
    scales = torch.zeros(384 // group, 4).T  # as DeepGEMM wants them: rows innermost
    gather_quantise(x, source, codes, scales, group)
    rows, kept = source[[0, 2, 3]].long(), torch.tensor([0, 2, 3])
    torch.testing.assert_close(scales[kept], want.scales[rows])
    same(codes.float()[kept], want.codes.float()[rows])
    assert not codes.float()[1].any() and not scales[1].any(), "a skipped row is not written"
for group, name in ((192, "silu"), (128, "swiglu")):
    gate_up = torch.randn(4, 384).bfloat16() * 3
    want = quantise_fp8(activate(name, gate_up.float()), (1, group))
    h = torch.zeros(4, 192, dtype=torch.float8_e4m3fn)
    scales = torch.zeros(4, -(-192 // group))
    activate_quantise(gate_up, h, scales, group, name, keep=source)
    torch.testing.assert_close(scales[kept], want.scales[kept], rtol=1e-5, atol=0)
    same(h.float()[kept], want.codes.float()[kept])
    assert not h.float()[1].any()
rows, place = torch.randn(6, 96).bfloat16(), torch.tensor([[5, 0], [2, 2]], dtype=torch.int32)
weights, y = torch.tensor([[0.25, 0.5], [1.0, 2.0]]), torch.zeros(2, 96).bfloat16()
weighted_sum(rows, place, weights, y)
want = (rows.float()[place.long()] * weights.unsqueeze(-1)).sum(1)
torch.testing.assert_close(y, want.bfloat16())
"""


def test_the_glue_between_the_rivals_gemms():
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", GLUE], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


# --- ours


def test_our_stages_are_opened_by_names_that_exist():
    schedule = pytest.importorskip("mixmoe.backends.hopper.schedule")
    from mixmoe.backends.hopper import prefill_schedule, quantise, stages

    def words(function):
        return list(inspect.signature(function).parameters)

    decode, prefill = schedule.Decode, prefill_schedule.Prefill
    assert words(decode.stage1) == ["self", "x", "weights", "routed", "recipe"]
    assert words(decode.finish)[:6] == ["self", "h", "weights", "routed", "recipe", "out"]
    common = ["self", "x", "weights", "routed", "recipe"]
    assert words(prefill.stage1)[:7] == [*common, "cut", "work"]
    assert words(prefill.stage2)[1:7] == ["h", *common[2:], "out", "work"]
    assert words(prefill.add)[1:7] == ["h", *common[2:], "red", "out"]
    assert words(prefill_schedule.red_of) == ["problem", "out"]
    assert words(prefill.sorted_rows) == ["self", "h", "routed"]
    assert words(prefill_schedule.cut_tiles) == ["routed", "recipe", "whole"]
    assert words(quantise.quantise_fp8)[:3] == ["x", "fmt", "rounding"]
    assert words(stages.schedule_for) == ["recipe", "weights", "problem", "block"]
    assert prefill_schedule.CHUNK == 8192


def test_a_smaller_read_is_no_slower_than_a_larger_one():
    roofs = Roofs("cpu", {})
    sizes = [near(n) for n in (8 << 20, 9 << 20)]
    roofs.reads = {(Flush.CLEAN, sizes[0]): 4.5, (Flush.CLEAN, sizes[1]): 2.7}
    assert roofs.read_us(Flush.CLEAN, 8 << 20) == 2.7 == roofs.read_us(Flush.CLEAN, 9 << 20)
    roofs.reads[Flush.DIRTY, sizes[0]] = 5.0
    assert roofs.read_us(Flush.DIRTY, 8 << 20) == 5.0


def test_ours_is_measured_as_it_comes_and_once_in_the_other_way():
    ours = pytest.importorskip("benchmarks.ours")
    pytest.importorskip("triton")

    def ways(shape, tokens, recipe="a8w4"):
        case = SimpleNamespace(tokens=tokens, shape=SHAPES[shape])
        return ours.ways_of(case, Recipe.named(recipe))

    assert ways("dsv3_tp8", 64) == ways("dsv3_tp8", 512) == ("auto",)
    assert ways("dsv3_tp8", 2048) == ("auto", "fast")
    assert ways("dsv3_tp8", 4096) == ways("dsv3_ep", 512) == ("auto", "precise")
    assert ways("dsv3_tp8", 8192, "a8w8") == ("auto", "fast")
