"""The Triton kernels compile for sm_90a with no GPU: no spill, tensor cores used, few registers."""

from typing import Any

import pytest
import torch
from hopper_compile import Fake, Resources, compile_gluon

from mixmoe.backends.hopper import choose, combine, gemm1, gemm2, quantise, route
from mixmoe.backends.hopper.launch import pow2
from mixmoe.backends.hopper.operands import math_of, operand
from mixmoe.formats import SCALE_STORAGE, Format, ScaleKind
from mixmoe.spec import Problem, Recipe, Tile

SHAPES = {
    "dsv3_tp8": (7168, 256, 256, 8),
    "dsv3_ep": (7168, 2048, 32, 8),
    "gptoss": (2880, 2880, 128, 4),
    "kimi_tp8": (7168, 256, 384, 8),
    "qwen3_tp4": (4096, 384, 128, 8),
    "qwen3_tp8": (4096, 192, 128, 8),
}
I32, F32, BF16 = Fake(torch.int32), Fake(torch.float32), Fake(torch.bfloat16)
PDL = {"PDL": True, "launch_pdl": True}
LISTS = (I32, F32, I32, I32, I32, I32, I32)
TENSOR_CORE = {"bf16": "HGMMA", "fp16": "HGMMA", "fp8e4nv": "QGMMA", "int8": "IGMMA"}


def scales(fmt: Format) -> Fake | None:
    return None if fmt.scale is ScaleKind.NONE else Fake(SCALE_STORAGE[fmt.scale])


def picked(name: str) -> dict[tuple[int, Tile], int]:
    """Tiles the chooser picks over all shapes and token counts, and how often."""
    recipe, count = Recipe.named(name), dict[tuple[int, Tile], int]()
    for hidden, inter, experts, topk in SHAPES.values():
        for power in range(15):
            p = Problem(1 << power, hidden, inter, experts, topk)
            for number in (1, 2):
                gemm = choose.stage(p, number, recipe.activation, recipe.weight, "precise")
                at = (number, choose.general(gemm))
                count[at] = count.get(at, 0) + 1
    return count


def compile_tile(recipe: Recipe, number: int, tile: Tile) -> Resources:
    a, w = recipe.activation, recipe.weight
    x, reader = operand(a), operand(w)
    meta: dict[str, Any] = {
        "X": x, "W": reader, "MATH": math_of(a, w, "precise"), "BLOCK": min(32, tile.tokens),
        "BM": tile.tokens, "BN": tile.rows, "BK": min(x.step_of(tile.k), reader.step_of(tile.k)),
        "num_warps": tile.warps, "num_stages": tile.stages, **PDL,
    }  # fmt: skip
    operands = Fake(a.element.storage), scales(a), Fake(w.element.storage), scales(w), scales(w)
    sizes = 64, 8, 7168, 256, 512
    if number == 2:
        lists = I32, I32, I32
        return compile_gluon(gemm2.gemm2_kernel, *operands, None, BF16, *lists, *sizes, **meta)
    h = BF16 if a.scale is ScaleKind.NONE else F32
    lists = I32, F32, I32, I32
    return compile_gluon(
        gemm1.gemm1_kernel, *operands, None, None, h, *lists, *sizes, 7.0, 1.7, 4.0, 25.0,
        ACT=gemm1.silu, PER_TOKEN=True, WEIGHTED=False, **meta,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["a16w16", "a16w4", "a8w8", "a8w8_block"])
def test_picked_tiles(name: str) -> None:
    recipe = Recipe.named(name)
    core = TENSOR_CORE[str(math_of(recipe.activation, recipe.weight, "precise").dtype)]
    for number, tile in picked(name):
        resources = compile_tile(recipe, number, tile)
        assert resources.spills <= 16, (number, tile, resources.spills)
        assert resources.count(core), (number, tile)
        assert resources.shared <= choose.SMEM, (number, tile, resources.shared)


@pytest.mark.parametrize("name", ["a16i4", "w8a8", "w4a8", "a8w4_mx", "a4w4", "a8w8_mxw"])
def test_common_tile(name: str) -> None:
    recipe = Recipe.named(name)
    for number in (1, 2):
        resources = compile_tile(recipe, number, Tile(16, 64, 128, 3, 4))
        assert resources.spills == 0


def test_spills_are_seen() -> None:
    recipe = Recipe.named("a8w8")  # 256 rows of promoted sums do not fit a thread's registers
    assert compile_tile(recipe, 1, Tile(128, 256, 64, 3, 8)).spills > 256


@pytest.mark.parametrize(
    "routes, experts, chunk", [(64, 256, 32), (4096, 256, 64), (8192, 384, 128)]
)
def test_route_once(routes: int, experts: int, chunk: int) -> None:
    resources = compile_gluon(
        route.route_once, Fake(torch.int64), BF16, None, *LISTS, routes, 64, 4352, experts, 0, 8, 8,
        BF16, Fake(torch.float8_e4m3fn), F32, 7168, 7168, 7168,
        BLOCK=8, PIECE=min(1024, pow2(routes)), EP=pow2(experts), ROUTES=chunk,
        WRITE=quantise.write_fp8_row, UP=0, QB=1, KP=8192,
        num_warps=8, **PDL,
    )  # fmt: skip
    assert resources.spills == 0 and resources.registers <= 128


def test_route_many() -> None:
    sizes = 65536, 8192, 98304, 256, 0, 8
    ids, go = Fake(torch.int64), {"EP": 256, **PDL}
    count = compile_gluon(
        route.count, ids, None, I32, I32, 65536, 256, 0, CHUNK=256, num_warps=16, **go
    )
    scan = compile_gluon(route.scan, I32, I32, 256, 256, ROWS=256, COLUMNS=8, num_warps=8, **PDL)
    scatter = compile_gluon(
        route.scatter, ids, F32, None, I32, I32, *LISTS, *sizes,
        256, BLOCK=32, CHUNK=256, num_warps=8, **go,
    )  # fmt: skip
    assert not any(kernel.spills for kernel in (count, scan, scatter))
    assert waits_first(count), "x is read beside the kernels that start after this one"
    assert not waits_first(scan) and not waits_first(scatter)


def waits_first(kernel: Resources) -> bool:
    """Whether it waits for the kernel before (ACQBULK) and then starts the next (PREEXIT)."""
    return kernel.sass.index("ACQBULK") < kernel.sass.index("PREEXIT")


@pytest.mark.parametrize("columns, rows", [(7168, 8192), (2880, 32768), (256, 65536)])
@pytest.mark.parametrize("writer", [*quantise.WRITERS.values(), *quantise.FP8_WRITERS.values()])
def test_quantise(writer: Any, columns: int, rows: int) -> None:
    name = writer.fn.__name__
    codes = torch.int8 if "int8" in name else torch.float8_e4m3fn
    codes = torch.uint8 if name == "write_mxfp4" else codes
    e8m0 = name in ("write_mxfp4", "write_mxfp8")
    resources = compile_gluon(
        quantise.quantise_rows, BF16, Fake(codes), Fake(torch.uint8 if e8m0 else torch.float32),
        rows, columns, columns, columns, None, GATHER=False, BESIDE=False, WRITE=writer,
        UP=0x400001,
        **quantise.plan(columns, rows), **PDL,
    )  # fmt: skip
    assert resources.spills == 0 and resources.registers <= 128


@pytest.mark.parametrize("beside", [True, False])
def test_quantise_beside(beside: bool) -> None:
    """Beside other kernels: waits once, by one CTA, behind its stores; else before its loads."""
    sass = compile_gluon(
        quantise.quantise_rows, BF16, Fake(torch.float8_e4m3fn), F32, 8192, 7168, 7168, 7168, None,
        GATHER=False, BESIDE=beside, WRITE=quantise.write_fp8_slots, UP=0,
        **quantise.plan(7168, 8192), **PDL,
    ).sass  # fmt: skip
    before, after = sass.split("ACQBULK")
    first, second = ("LDG.E", "STG.E") if beside else ("never", "LDG.E")
    assert (first in before) == beside and ("STG.E" in after) == (not beside)
    assert (second in before) == beside


@pytest.mark.parametrize("early", [True, False])
def test_combine(early: bool) -> None:
    resources = compile_gluon(
        combine.combine_kernel, BF16, I32, F32, BF16, 7168, 7168,
        TOPK=8, WEIGHTED=True, BN=1024, EARLY=early, num_warps=4, **PDL,
    )  # fmt: skip
    assert resources.spills == 0 and resources.count("LDG.E.128") >= 8  # a row a 16-byte load
    before = resources.sass.split("ACQBULK")[0]  # the wait for the kernel before
    assert before.count("LDG.E") == (16 if early else 0), "positions and weights, no rows"
