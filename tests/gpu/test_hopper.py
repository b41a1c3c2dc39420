"""The Hopper backend on the GPU: recipes and edge cases against float64; graphs; determinism."""

from dataclasses import replace
from typing import Any

import hopper_cases as cases
import pytest
import torch

from mixmoe.activations import gelu, silu, situv2, swiglu
from mixmoe.backends.hopper import hopper, stages
from mixmoe.backends.hopper.operands import order_of
from mixmoe.backends.hopper.prefill_cut import is_precise
from mixmoe.backends.hopper.schedule import GENERAL
from mixmoe.fold import Fold
from mixmoe.formats import FORMATS, Quantised, Rounding, format_named
from mixmoe.spec import Problem, Recipe, Tile, Weights

ACTS = [silu(), swiglu(), gelu(), situv2(), silu(limit=1.0)]
DEVICE = "cuda"
BACKEND = hopper()


def sizes(recipe: Recipe, hidden: int, inter: int) -> dict[str, int]:
    """The sizes, or the nearest that hold the recipe's scale groups."""
    if cases.fits(recipe, hidden, inter):
        return {"hidden": hidden, "inter": inter}
    return {"hidden": -(-hidden // 128) * 128, "inter": -(-inter // 128) * 128}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", cases.RECIPES)
def test_recipe(name: str, bias: bool) -> None:
    at = list(cases.RECIPES).index(name) + bias
    recipe = cases.with_act(cases.RECIPES[name], ACTS[at % 5], 1 + at % 2)
    case = cases.make_case(
        recipe, tokens=33, experts=7, topk=3, bias=bias, skew="masked", **sizes(recipe, 320, 192)
    )
    result = cases.judge(case, BACKEND, DEVICE)
    assert cases.passed(result), str(result)


@pytest.mark.parametrize("act", range(5))
@pytest.mark.parametrize("name", ["a16w4", "a8w4", "a8w8"])
def test_activation(name: str, act: int) -> None:
    for weight_on in (1, 2):
        recipe = cases.with_act(cases.RECIPES[name], ACTS[act], weight_on)
        case = cases.make_case(recipe, 9, 256, 128, bias=True, seed=act)
        result = cases.judge(case, BACKEND, DEVICE)
        assert cases.passed(result), str(result)


EDGES: dict[str, dict[str, Any]] = {
    "T0": {"tokens": 0},
    "T1": {"tokens": 1, "experts": 384, "topk": 8},
    "T2": {"tokens": 2, "hidden": 4096, "experts": 64, "topk": 8, "bias": True},
    "T2 masked": {"tokens": 2, "experts": 16, "topk": 8, "skew": "masked"},
    "T3": {"tokens": 3, "experts": 384, "topk": 8},
    "E1": {"tokens": 70, "experts": 1, "topk": 1},
    "E7 twice": {"tokens": 40, "experts": 7, "topk": 4, "skew": "twice"},
    "one expert": {"tokens": 300, "experts": 16, "topk": 2, "skew": "one"},
    "empty experts": {"tokens": 64, "experts": 32, "topk": 4, "skew": "empty"},
    "masked": {"tokens": 64, "experts": 32, "topk": 4, "skew": "masked"},
    "gpt-oss": {"tokens": 20, "hidden": 2880, "inter": 2880, "experts": 4, "topk": 4, "bias": True},
    "gpt-oss prefill": {
        "tokens": 120, "hidden": 2880, "inter": 2880, "experts": 4, "topk": 4, "bias": True,
    },
    "192 prefill": {"tokens": 500, "hidden": 448, "inter": 192, "experts": 8, "skew": "masked"},
    "192": {"tokens": 50, "hidden": 512, "inter": 192, "experts": 8},
    "320": {"tokens": 50, "hidden": 352, "inter": 320, "experts": 8},
    "V3 rows": {"tokens": 40, "hidden": 7168, "inter": 256, "experts": 4, "topk": 2},
    "many": {"tokens": 1500, "hidden": 256, "inter": 128, "experts": 64, "topk": 8},
    "T8192": {"tokens": 8192, "hidden": 256, "inter": 64, "experts": 32, "topk": 4},
}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("name", ["a16w4", "a8w4", "a8w8", "a8w4_mx", "a4w4"])
def test_edge(name: str, edge: str) -> None:
    case = edge_of(cases.RECIPES[name], edge)
    error = 2.0**-8 if is_precise("auto", case.problem) else 2.0**-7
    result = cases.judge(case, BACKEND, DEVICE, error=error)
    assert cases.passed(result), str(result)


@pytest.mark.parametrize("edge", ["gpt-oss prefill", "one expert", "192 prefill", "many", "T8192"])
def test_edge_precise(edge: str) -> None:
    case = edge_of(replace(cases.RECIPES["a8w4"], accumulate="precise"), edge)
    result = cases.judge(case, BACKEND, DEVICE)
    assert cases.passed(result), str(result)


def edge_of(recipe: Recipe, edge: str) -> cases.Case:
    """The case, or the nearest that holds the recipe's scale groups."""
    wanted = {"hidden": 256, "inter": 128, **EDGES[edge]}
    wanted |= sizes(recipe, wanted["hidden"], wanted["inter"])
    return cases.make_case(recipe, **wanted)


@pytest.mark.parametrize(
    "how", ["zero row", "swap experts", "drop K tail", "swap gate and up", "shift scale"]
)
@pytest.mark.parametrize("name", ["a16w4", "a8w4", "a8w8"])
def test_judge_sees(name: str, how: str) -> None:
    case = cases.make_case(cases.RECIPES[name], tokens=20, hidden=256, inter=128)

    class Broken(type(BACKEND)):  # type: ignore[misc]
        def prepare(self, weights: Weights, recipe: Recipe) -> Weights:
            return super().prepare(cases.mutated(case, how).weights, recipe)

    assert not cases.passed(cases.judge(case, Broken(), DEVICE))


@pytest.mark.parametrize("block", [1, 2, 4, 8, 16, 32, 128])
@pytest.mark.parametrize("name", ["a16w4", "a8w4", "a4w4", "a8w8_block"])
def test_block(name: str, block: int) -> None:
    recipe = cases.RECIPES[name]
    case = cases.make_case(recipe, tokens=200, experts=5, topk=3, **sizes(recipe, 256, 128))
    result = cases.judge(case, BACKEND, DEVICE, block=block)
    assert cases.passed(result), str(result)


@pytest.mark.parametrize("fold", list(Fold))
@pytest.mark.parametrize("name", ["a16w4", "a8w4", "a4w4", "a8w4_mx"])
def test_packed_orders(name: str, fold: Fold, monkeypatch: pytest.MonkeyPatch) -> None:
    """The general path on packed weights, and the decode path, on both folds."""
    case = cases.make_case(cases.RECIPES[name], 40, 352, 192, bias=True, skew="masked")

    class Packs(type(BACKEND)):  # type: ignore[misc]
        def prepare(self, weights: Weights, recipe: Recipe) -> Weights:
            return weights.packed(order_of(fold, True), order_of(fold, False))

    result = cases.judge(case, Packs(), DEVICE)
    assert cases.passed(result), str(result)
    monkeypatch.setattr(stages, "schedule_for", lambda *ignored: GENERAL)
    result = cases.judge(case, Packs(), DEVICE)
    assert cases.passed(result), str(result)


def test_expert_map() -> None:
    ids = torch.randint(-1, 40, (300, 8), device=DEVICE)
    local = torch.full((40,), -1, dtype=torch.int32)
    local[5:21] = torch.arange(16, dtype=torch.int32)
    p, w = Problem(300, 64, 64, 16, 8), torch.rand(300, 8, device=DEVICE)
    for block, tokens in ((16, 300), (64, 300), (16, 40)):
        q = replace(p, tokens=tokens)
        got = BACKEND.route(ids[:tokens], w[:tokens], q, local.to(DEVICE), block)
        want = cases.REFERENCE.route(ids[:tokens].cpu(), w[:tokens].cpu(), q, local, block)
        for name in ("sorted_token_ids", "sorted_weights", "sorted_expert_ids", "num_valid_ids"):
            assert torch.equal(getattr(got, name).cpu(), getattr(want, name)), name


@pytest.mark.parametrize("rounding", list(Rounding))
@pytest.mark.parametrize("name", ["fp8_token", "int8_token", "fp8_1x128", "mxfp8", "mxfp4"])
def test_quantise_bits(name: str, rounding: Rounding) -> None:
    from mixmoe.backends.hopper.quantise import quantise

    g = torch.Generator().manual_seed(1)
    for rows, columns in ((300, 2944), (64, 7168), (5000, 128)):
        x = torch.randn(rows, columns, generator=g)
        x *= torch.exp2(torch.randint(-40, 40, x.shape, generator=g) / 4)
        x[1], x[2], x[3] = 0, x[2] * 1e-39, x[3] * 1e30
        for dtype in (torch.bfloat16, torch.float32):
            given = x.to(dtype)
            want = FORMATS[name].quantise(given, rounding)
            got = quantise(given.to(DEVICE), FORMATS[name], rounding).to("cpu")
            assert cases.differing(got, want) == 0


@pytest.mark.parametrize("name, bound", [("mxfp8", 2.0**-17.8), ("mxfp4", 2.0**-17.5)])
def test_folded_bound(name: str, bound: float) -> None:
    from mixmoe.backends.hopper.quantise import quantise_fp8

    g = torch.Generator().manual_seed(2)
    x = torch.randn(200, 2944, generator=g)
    x *= torch.exp2(torch.randint(-20, 1, (200, 92), generator=g)).repeat_interleave(32, 1)
    x[0, :] = torch.randn(2944, generator=g)  # a row whose blocks lie near each other folds exactly
    want = FORMATS[name].quantise(x).dequantise(torch.float64)
    got = quantise_fp8(x.to(DEVICE), FORMATS[name]).natural(2944).to("cpu")
    got = got.dequantise(torch.float64)
    error = (got - want).abs().amax(1) / want.abs().amax(1)
    assert error.max() <= bound, error.max()
    assert name == "mxfp8" or error[0] == 0
    assert error.max() > 0  # else the rows were too tame to test anything


@pytest.mark.parametrize("name", ["a8w4", "a16w4", "a8w8", "w8a8_smooth"])
@pytest.mark.parametrize("tokens", [4, 64, 600])
def test_graph_replay(name: str, tokens: int) -> None:
    recipe = cases.RECIPES[name]
    cases_ = [
        cases.make_case(recipe, tokens, 256, 128, experts=16, topk=4, seed=s, skew=k)
        for s, k in enumerate(("uniform", "one", "masked"))
    ]
    weights = BACKEND.prepare(cases_[0].weights, recipe).to(DEVICE)
    x, ids = cases_[0].x.to(DEVICE), cases_[0].ids.to(DEVICE)
    topk_weights = cases_[0].topk_weights.to(DEVICE)
    out = torch.empty(tokens, 256, dtype=torch.bfloat16, device=DEVICE)

    def run() -> None:
        BACKEND.layer(x, weights, ids, topk_weights, recipe, out=out)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for case in cases_:
        x.copy_(case.x)
        ids.copy_(case.ids)
        topk_weights.copy_(case.topk_weights)
        out.fill_(torch.nan)
        graph.replay()
        got = out.clone()
        run()
        assert torch.equal(got, out) and torch.isfinite(out).all()


@pytest.mark.parametrize("name", ["a8w4", "a16w4", "a8w8_block"])
def test_same_bits_every_run(name: str) -> None:
    recipe = cases.RECIPES[name]
    case = cases.make_case(recipe, 96, 512, 256, experts=16, topk=4)
    weights = BACKEND.prepare(case.weights, recipe).to(DEVICE)
    operands = case.x.to(DEVICE), weights, case.ids.to(DEVICE), case.topk_weights.to(DEVICE)
    outs = []
    for _ in range(100):
        out = torch.empty(96, 512, dtype=torch.bfloat16, device=DEVICE)
        outs.append(BACKEND.layer(*operands, recipe, out=out))
    assert all(torch.equal(outs[0], o) for o in outs[1:])


@pytest.mark.parametrize("name", ["a8w4", "a16w4", "a8w8", "w4a8"])
def test_row_is_its_own(name: str) -> None:
    """For one tile a token's rows do not depend on the batch it comes in."""
    from mixmoe.backends.hopper import gemm1, gemm2

    recipe = cases.RECIPES[name]
    case = cases.make_case(recipe, 200, 512, 256, experts=8, topk=2)
    weights = BACKEND.prepare(case.weights, recipe).to(DEVICE)
    k = 32 if name == "w4a8" else 64
    tile, results = Tile(64, 128, k, 3, 4), []
    for chosen in (slice(0, 200), slice(0, 7), slice(3, 150)):
        x, ids = case.x[chosen].to(DEVICE), case.ids[chosen].to(DEVICE)
        p = Problem(x.shape[0], 512, 256, 8, 2)
        routed = BACKEND.route(ids, case.topk_weights[chosen].to(DEVICE), p, None, 64)
        h = gemm1.gemm1(BACKEND.quantise(x, weights, routed, recipe), weights, routed, recipe, tile)
        rows = gemm2.gemm2(h, weights, routed, recipe, tile)
        first = 2 * (3 - (chosen.start or 0))
        results.append((h.codes[first : first + 8].view(torch.uint8), rows[first : first + 8]))
    for h_codes, rows in results[1:]:
        assert torch.equal(h_codes, results[0][0]) and torch.equal(rows, results[0][1])


@pytest.mark.parametrize("name", ["a8w4", "a16w4", "a4w4", "w8a8_smooth", "a8w8_block"])
@pytest.mark.parametrize("tokens", [3, 70, 700])
def test_canaries(name: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer the backend allocates lies between two canaries, which must survive."""
    recipe = cases.RECIPES[name]
    case = cases.make_case(recipe, tokens, 384, 128, experts=5, topk=3, skew="masked")
    weights = BACKEND.prepare(case.weights, recipe).to(DEVICE)
    operands = case.x.to(DEVICE), weights, case.ids.to(DEVICE), case.topk_weights.to(DEVICE)
    real, guarded = torch.empty, []

    def empty(*shape: Any, dtype: torch.dtype, device: Any) -> torch.Tensor:
        size = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        count = torch.Size(size).numel() * dtype.itemsize
        room = -(-count // 256) * 256
        block = real(room + 8192, dtype=torch.uint8, device=device).fill_(0xA5)
        guarded.append((block, count))
        return block[4096 : 4096 + count].view(dtype).view(size)

    monkeypatch.setattr(torch, "empty", empty)
    out = empty(tokens, 384, dtype=torch.bfloat16, device=DEVICE)
    BACKEND.layer(*operands, recipe, out=out)
    monkeypatch.undo()
    assert len(guarded) > 6
    for block, count in guarded:
        assert (block[:4096] == 0xA5).all() and (block[4096 + count :] == 0xA5).all()
    assert torch.isfinite(out).all()


def test_over_4_gib() -> None:
    """The last expert of 4.9 GB of weight codes is read where it lies."""
    recipe = Recipe.named("a16w4")
    experts, hidden, inter, fmt = 330, 7168, 2048, format_named("mxfp4")
    g = torch.Generator(DEVICE).manual_seed(0)

    def random(rows: int, k: int) -> Quantised:
        codes = torch.empty(experts, rows, k // 2, dtype=torch.uint8, device=DEVICE)
        scales = torch.empty(experts, rows, k // 32, dtype=torch.uint8, device=DEVICE)
        for e in range(experts):
            codes[e].random_(0, 256, generator=g)
            scales[e].random_(116, 122, generator=g)
        return Quantised(codes, scales, fmt)

    weights = Weights(random(2 * inter, hidden), random(hidden, inter))
    assert weights.w13.codes.nbytes > 4 << 30
    ids = torch.tensor([[experts - 1, 0], [experts - 2, experts - 1]])
    x, topk = torch.randn(2, hidden).to(torch.bfloat16), torch.rand(2, 2)
    used = [0, experts - 2, experts - 1]
    few = Weights(*(Quantised(q.codes[used].cpu(), q.scales[used].cpu(), fmt)
                    for q in (weights.w13, weights.w2)))  # fmt: skip
    small = torch.tensor([[2, 0], [1, 2]])
    case = cases.Case(recipe, x, few, small, topk)
    out = torch.empty(2, hidden, dtype=torch.bfloat16, device=DEVICE)
    BACKEND.layer(x.cuda(), weights, ids.cuda(), topk.cuda(), recipe, out=out)
    p = case.problem
    routed = cases.REFERENCE.route(small, topk, p, None, 16)
    h = cases.REFERENCE.gemm1(cases.REFERENCE.quantise(x, few, routed, recipe), few, routed, recipe)
    rows = cases.REFERENCE.gemm2(h, few, routed, recipe)
    want = cases.REFERENCE.combine(rows, routed, recipe, torch.empty(2, hidden).double())
    assert cases.worst_row(out.cpu(), want) < 2.0**-7
