"""One token on the GPU: CTAs of both stages share an SM (`choose.beside`)."""

from dataclasses import replace
from functools import cache
from typing import Any

import hopper_cases as cases
import pytest
import torch
from torch import Tensor

from mixmoe.activations import swiglu
from mixmoe.backends.hopper import choose, gemm2_decode, hopper
from mixmoe.spec import Tile, Weights

DEVICE, BACKEND = "cuda", hopper()
SIZES: dict[str, dict[str, Any]] = {
    "gpt-oss": {"hidden": 2880, "inter": 2880, "experts": 4, "topk": 4},
    "two tiles a CTA": {"hidden": 4192, "inter": 416, "experts": 3, "topk": 4},
    "eight experts": {"hidden": 2144, "inter": 1504, "experts": 9, "topk": 8},
    "short rows": {"hidden": 4000, "inter": 352, "experts": 9, "topk": 8},
    "fewer tiles than SMs": {"hidden": 96, "inter": 3008, "experts": 3, "topk": 2},
}


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> list[Tile]:
    """The tiles of the launches of stage 2."""
    seen, launch = [], gemm2_decode.launch_tokens

    def record(*operands: Any) -> Tensor:
        seen.append(operands[6])
        return launch(*operands)

    monkeypatch.setattr(gemm2_decode, "launch_tokens", record)
    return seen


@cache
def made(sizes: str) -> cases.Case:
    recipe = cases.with_act(cases.RECIPES["a8w4"], swiglu())
    return cases.make_case(recipe, 1, **SIZES[sizes], bias=True)


def other(sizes: str, seed: int) -> cases.Case:
    """The same weights and another token: 1 with one expert only, 2 with skipped routes."""
    case, g = made(sizes), torch.Generator().manual_seed(seed)
    ids = torch.randint(0, case.problem.experts, case.ids.shape, generator=g)
    ids = torch.full_like(ids, 2) if seed == 1 else ids
    ids[:, 1:] = -1 if seed == 2 else ids[:, 1:]
    x = torch.randn(case.x.shape, generator=g).to(case.x.dtype)
    return replace(case, x=x, ids=ids, topk_weights=torch.rand(ids.shape, generator=g))


@cache
def prepared(sizes: str) -> Weights:
    case = made(sizes)
    return BACKEND.prepare(case.weights, case.recipe).to(DEVICE)


def layers(sizes: str) -> list[tuple[Tensor, ...]]:
    """Operands of four layers: x, ids, routing weights, result."""
    given = [(c.x, c.ids, c.topk_weights) for c in (other(sizes, seed) for seed in range(4))]
    return [tuple(t.to(DEVICE) for t in (*g, torch.empty_like(g[0]))) for g in given]


def run(sizes: str, operands: list[tuple[Tensor, ...]]) -> None:
    for x, ids, topk_weights, out in operands:
        BACKEND.layer(x, prepared(sizes), ids, topk_weights, made(sizes).recipe, out=out)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("seed", range(3))
def test_layer(sizes: str, seed: int, tiles: list[Tile]) -> None:
    """Against float64; biases, SwiGLU, skipped routes, routing weights on either stage."""
    case = other(sizes, seed)
    case = replace(case, recipe=replace(case.recipe, weight_on=2 - seed % 2))
    result = cases.judge(case, BACKEND, DEVICE)
    assert cases.passed(result), str(result)
    assert tiles[0].ctas_per_sm == 1, "the layer; `down` does not know what runs before"


@pytest.mark.parametrize("how", ["zero row", "swap experts", "shift scale", "swap gate and up"])
def test_layer_is_judged(how: str) -> None:
    case = made("fewer tiles than SMs")

    class Broken(type(BACKEND)):  # type: ignore[misc]
        def layer(self, x: Tensor, weights: Weights, *operands: Any, **options: Any) -> Tensor:
            broken = BACKEND.prepare(cases.mutated(case, how).weights, case.recipe).to(DEVICE)
            return super().layer(x, broken, *operands, **options)

    result = cases.judge(case, Broken(), DEVICE)
    assert result["fused"] > 1 and result["down"] <= 1, str(result)


@pytest.mark.parametrize("sizes", SIZES)
def test_layers_behind_each_other(sizes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In graphs, whose kernels overlap, in one stream and in two: the bits of layers that have
    the SMs to themselves and run one by one."""
    operands = layers(sizes)
    with monkeypatch.context() as patch:
        patch.setattr(choose, "beside", lambda problem: False)
        for one in operands:
            run(sizes, [one])
            torch.cuda.synchronize()
    want = [one[3].clone() for one in operands]
    run(sizes, operands)
    torch.cuda.synchronize()
    both = operands, layers(sizes)
    graphs, streams = [torch.cuda.CUDAGraph() for _ in both], [torch.cuda.Stream() for _ in both]
    for graph, mine in zip(graphs, both, strict=True):
        with torch.cuda.graph(graph):
            run(sizes, mine)
    for used in [1] * 20 + [2] * 20:
        for mine in both[:used]:
            for one in mine:
                one[3].fill_(torch.nan)
        torch.cuda.synchronize()
        for graph, stream in list(zip(graphs, streams, strict=True))[:used]:
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for mine in both[:used]:
            assert all(torch.equal(o[3], w) for o, w in zip(mine, want, strict=True))
