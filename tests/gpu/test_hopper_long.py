"""Decode stage 2 of long rows of h on the GPU: every tile, edges of H, I and routing, same bits."""

from dataclasses import replace
from functools import cache
from typing import Any

import hopper_cases as cases
import pytest
import torch

from mixmoe.activations import swiglu
from mixmoe.backends.hopper import choose, gemm2_long, hopper
from mixmoe.backends.hopper.quantise import slot_rows
from mixmoe.backends.hopper.schedule import DECODE, schedule_for
from mixmoe.spec import Tile, Weights

DEVICE, BACKEND = "cuda", hopper()
TILES = [(block, slices) for block in (1, 2, 4, 8, 16, 32) for slices in (2, 4, 8)
         if block * slices <= 64]  # fmt: skip


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Tile]:
    """The tiles of the launches that there were."""
    seen, launch = [], gemm2_long.launch

    def record(*operands: Any) -> torch.Tensor:
        seen.append(operands[4])
        return launch(*operands)

    monkeypatch.setattr(gemm2_long, "launch", record)
    return seen


def tile_of(block: int, slices: int) -> Tile:
    return replace(choose.ring(block, 128, slices, None), warps=4)


def rows_of(case: cases.Case, tile: Tile, given: Weights | None = None) -> dict[str, Any]:
    """The kernel's rows of random h, those it must give, and which routes are not skipped."""
    recipe, p = case.recipe, case.problem
    weights = BACKEND.prepare(given or case.weights, recipe).to(DEVICE)
    routed = BACKEND.route(case.ids.to(DEVICE), case.topk_weights.to(DEVICE), p, None, tile.tokens)
    g = torch.Generator().manual_seed(1)
    values = torch.randn(p.routes, p.intermediate, generator=g)
    values *= torch.exp2(torch.randint(-6, 7, (p.routes, 1), generator=g))
    h = recipe.activation.quantise(values, recipe.rounding)
    out = torch.full((p.routes, p.hidden), torch.nan, dtype=recipe.out_dtype, device=DEVICE)
    gemm2_long.launch(slot_rows(h.to(DEVICE)), weights, routed, recipe, tile, out)
    live = (routed.position >= 0).cpu()  # type: ignore[attr-defined]
    want = cases.REFERENCE.gemm2(h, case.weights, cases.to_cpu(routed), recipe)
    return {"got": out.cpu(), "want": want, "live": live}


def error(got: torch.Tensor, want: torch.Tensor, live: torch.Tensor) -> float:
    """The worst live row; infinite if a skipped row was written."""
    if not torch.isnan(got[~live]).all():
        return torch.inf
    return cases.worst_row(got[live], want[live])


@cache
def masked(hidden: int, inter: int) -> cases.Case:
    recipe = cases.RECIPES["a8w4"]
    return cases.make_case(recipe, 40, hidden, inter, 5, 3, bias=True, skew="masked")


@pytest.mark.parametrize(("hidden", "inter"), [(352, 2880), (512, 416)])
@pytest.mark.parametrize(("block", "slices"), TILES)
def test_tile(block: int, slices: int, hidden: int, inter: int) -> None:
    case = masked(hidden, inter)
    assert error(**rows_of(case, tile_of(block, slices))) < 2.0**-8


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_results(dtype: torch.dtype) -> None:
    recipe = replace(cases.RECIPES["a8w4"], out_dtype=dtype)
    case = cases.make_case(recipe, 9, 704, 768, experts=4, topk=2)
    assert error(**rows_of(case, tile_of(8, 2))) < 2.0**-9


@pytest.mark.parametrize("how", ["zero row", "swap experts", "shift scale", "no bias"])
def test_rows_are_judged(how: str) -> None:
    case = cases.make_case(cases.RECIPES["a8w4"], 40, 352, 768, experts=5, topk=3, bias=True)
    if how == "no bias":
        broken = replace(case.weights, w2_bias=None)
    elif how == "swap experts":
        w2 = case.weights.w2
        order = torch.tensor([1, 0, 2, 3, 4])
        assert w2.scales is not None
        broken = replace(
            case.weights, w2=replace(w2, codes=w2.codes[order], scales=w2.scales[order])
        )
    else:
        broken = cases.mutated(case, how).weights
    assert error(**rows_of(case, tile_of(8, 2), broken)) > 2.0**-8


EDGES: dict[str, dict[str, Any]] = {
    "gpt-oss": {"hidden": 704, "inter": 2880, "experts": 8, "topk": 4, "bias": True},
    "V3 EP": {"hidden": 512, "inter": 2048, "experts": 8, "topk": 8},
    "768": {"hidden": 352, "inter": 768, "experts": 16, "topk": 2, "skew": "masked"},
    "416": {"hidden": 448, "inter": 416, "experts": 16, "topk": 3, "bias": True},
    "mixtral": {"hidden": 256, "inter": 14336, "experts": 3, "topk": 2},
}


CELLS = [("a8w4", edge) for edge in EDGES]
CELLS += [(name, edge) for name in ("a8w4_mx", "a4w4") for edge in ("V3 EP", "768")]


@pytest.mark.parametrize("sums", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 8])
@pytest.mark.parametrize("name, edge", CELLS)
def test_few_tokens(
    name: str, edge: str, tokens: int, sums: bool, launches: list[Tile],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Every stage and the layer; with the sum in stage 2 and with rows for `combine`."""
    if sums:  # more tokens than the chooser gives to that kernel
        chosen = choose.decode_sums
        monkeypatch.setattr(choose, "decode_sums", lambda p: chosen(replace(p, tokens=1)))
    else:
        monkeypatch.setattr(choose, "decode_sums", lambda problem: None)
    case = cases.make_case(cases.with_act(cases.RECIPES[name], swiglu()), tokens, **EDGES[edge])
    result = cases.judge(case, BACKEND, DEVICE)
    assert cases.passed(result), str(result)
    assert len(launches) == (1 if sums and case.problem.topk != 3 else 3), "rows, layer, down"


@pytest.mark.parametrize("block", [None, 32])
@pytest.mark.parametrize(
    "tokens, experts, hidden, inter",
    [(40, 8, 2880, 2880), (64, 32, 320, 2880), (200, 40, 352, 2048), (200, 48, 480, 768)],
)
@pytest.mark.parametrize("name", ["a8w4", "a4w4"])
def test_more_tokens(
    name: str, tokens: int, experts: int, hidden: int, inter: int, block: int | None,
    launches: list[Tile],
) -> None:  # fmt: skip
    case = cases.make_case(
        cases.RECIPES[name], tokens, hidden, inter, experts=experts, topk=2, bias=True,
        skew="masked",
    )
    result = cases.judge(case, BACKEND, DEVICE, block=block)
    assert cases.passed(result), str(result)
    assert len(launches) == 3 and launches[0].tokens == (block or launches[1].tokens)


@pytest.mark.parametrize("tokens", [2, 8, 64, 200])
@pytest.mark.parametrize("name", ["a8w4", "a8w4_mx", "a4w4"])
def test_same_bits_every_run(
    name: str, tokens: int, launches: list[Tile], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "decode_sums", lambda problem: None)
    recipe = cases.RECIPES[name]
    case = cases.make_case(recipe, tokens, 704, 2880, experts=48, topk=2, bias=True)
    weights = BACKEND.prepare(case.weights, recipe).to(DEVICE)
    block = choose.block_for(case.problem)
    assert schedule_for(recipe, weights, case.problem, block) is DECODE
    operands = case.x.to(DEVICE), weights, case.ids.to(DEVICE), case.topk_weights.to(DEVICE)
    outs = []
    for _ in range(20):
        out = torch.full((tokens, 704), torch.nan, dtype=torch.bfloat16, device=DEVICE)
        outs.append(BACKEND.layer(*operands, recipe, out=out))
    assert torch.isfinite(outs[0]).all() and all(torch.equal(outs[0], o) for o in outs[1:])
    assert len(launches) == 20


def test_the_rows_of_many_tiles_repeat() -> None:
    """More tiles than CTAs, so that the ring wraps between blocks: 20 runs over poisoned rows."""
    case = cases.make_case(cases.RECIPES["a8w4"], 300, 1408, 1024, experts=40, topk=3)
    for block, slices in ((1, 8), (8, 2), (32, 2)):
        first = rows_of(case, tile_of(block, slices))
        assert error(**first) < 2.0**-8
        for _ in range(19):
            assert torch.equal(rows_of(case, tile_of(block, slices))["got"], first["got"])


def by_stages(case: cases.Case, weights: Weights, block: int) -> torch.Tensor:
    """The layer by the public stages: nothing is read before the kernel in front has ended."""
    recipe, p = case.recipe, case.problem
    ids, topk = case.ids.to(DEVICE), case.topk_weights.to(DEVICE)
    routed = BACKEND.route(ids, topk, p, None, block)
    x = BACKEND.quantise(case.x.to(DEVICE), weights, routed, recipe)
    rows = BACKEND.gemm2(BACKEND.gemm1(x, weights, routed, recipe), weights, routed, recipe)
    out = torch.empty(p.tokens, p.hidden, dtype=recipe.out_dtype, device=DEVICE)
    return BACKEND.combine(rows, routed, recipe, out)


@pytest.mark.parametrize("tokens", [4, 64])
@pytest.mark.parametrize("name", ["a8w4", "a4w4"])
def test_lists_read_early(name: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of several routings in one graph, lists and rows in the same memory: the bits of the
    stages one by one, on every replay."""
    monkeypatch.setattr(choose, "decode_sums", lambda problem: None)
    recipe = cases.RECIPES[name]
    layers = [
        cases.make_case(recipe, tokens, 512, 2048, experts=16, topk=2, seed=s, skew=k)
        for s, k in enumerate(("uniform", "one", "masked", "uniform"))
    ]
    weights = BACKEND.prepare(layers[0].weights, recipe).to(DEVICE)
    block = choose.block_for(layers[0].problem)
    want = [by_stages(case, weights, block) for case in layers]
    given = [[t.to(DEVICE) for t in (c.x, c.ids, c.topk_weights)] for c in layers]
    outs = [torch.empty_like(w) for w in want]

    def run() -> None:
        for (x, ids, topk), out in zip(given, outs, strict=True):
            BACKEND.layer(x, weights, ids, topk, recipe, out=out)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for _ in range(20):
        for out in outs:
            out.fill_(torch.nan)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(outs, want, strict=True))
