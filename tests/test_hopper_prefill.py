"""The prefill kernels: work lists under the interpreter, kernels compiled for sm_90a."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.experimental.gluon import language as gl  # noqa: E402
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor  # noqa: E402

from mixmoe.backends.hopper import (  # noqa: E402
    gemm2_prefill,
    gemm2_prefill_sum,
    gemm2_red,
    gemm2_red_sum,
)
from mixmoe.backends.hopper.decode import Columns  # noqa: E402
from mixmoe.backends.hopper.gemm1_decode import Act  # noqa: E402
from mixmoe.backends.hopper.gemm2_decode import row_box  # noqa: E402
from mixmoe.backends.hopper.gemm2_prefill_sum import Counters, Routes  # noqa: E402
from mixmoe.backends.hopper.mainloop import weight_descriptors  # noqa: E402
from mixmoe.backends.hopper.prefill import (  # noqa: E402
    Clear,
    Result,
    Rows,
    Sizes,
    Work,
    grouped_prefill,
)
from mixmoe.backends.hopper.prefill_cut import Cut, form_of  # noqa: E402
from mixmoe.backends.hopper.prefill_products import first_of, widths_of  # noqa: E402
from mixmoe.backends.hopper.prefill_schedule import pass_of, ring_of, sums_of  # noqa: E402
from mixmoe.backends.hopper.slots import SlotRows, padded  # noqa: E402
from mixmoe.backends.hopper.worklist import list_work  # noqa: E402
from mixmoe.errors import MixMoEError  # noqa: E402
from mixmoe.shapes import shape_named  # noqa: E402
from mixmoe.spec import Problem  # noqa: E402
from tests.hopper_compile import TUNED_FOR, Fake, Resources, compile_gluon  # noqa: E402

HERE = Path(__file__).parent
F32, I32, BF16 = Fake(torch.float32), Fake(torch.int32), Fake(torch.bfloat16)


def test_work_lists() -> None:
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{HERE.parent}:{HERE}"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", HERE / "hopper_worklists.py"],
        env=env, capture_output=True, text=True, cwd=HERE.parent,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and int(passed.group(1)) > 110, run.stdout[-400:]


@pytest.mark.parametrize("other, room", [(4, 0), (0, 9), (0, 20)])
def test_work_lists_compile(other: int, room: int) -> None:
    """Tiles of both stages; tiles and segments. The interpreter takes more than the compiler."""
    made = compile_gluon(
        list_work, I32, I32, I32, I32, I32, I32, 700, 256, 264, MAIN=8, EXTRA=1, OTHER=other,
        ROOM=room, EP=256, PDL=True, num_warps=1 if room else 8,
    )  # fmt: skip
    assert made.clean()


def cut_of(tokens: int, precise: bool, H: int = 7168, intermediate: int = 256, **_: Any) -> Cut:
    """How a layer of E 256, topk 8 is cut."""
    return Cut.of(Problem(tokens, H, intermediate, 256, 8), precise)


def grouped(
    tokens: int, precise: bool, kind: int | None, H: int = 7168, bias: bool = False,
    wide: bool = False, clear: bool = False, intermediate: int = 256,
) -> Resources:  # fmt: skip
    """`grouped_prefill` as a launch for E 256, topk 8 compiles it."""
    cut = cut_of(tokens, precise, H, intermediate)
    units = Fake(torch.int32, (8192, 56, 256)), Fake(torch.int32, (8192, 896))
    words = weight_descriptors(*units, cut.box, 1)
    gated = kind is not None
    x = Rows(Fake(torch.float8_e4m3fn), padded(H), F32, I32 if gated else None)
    act = Act(7.0 if kind == 1 else None, 1.702, 4.0, 25.0) if gated else None
    return compile_gluon(
        grouped_prefill, *words, x, F32 if bias and gated else None, Work(I32, I32),
        Sizes(32, 4, 0), Result(BF16, 256, 256), Columns(F32, F32 if bias else None), act,
        Clear(BF16, 8192 * H) if clear else None, H, KIND=kind, WIDE=wide, **cut.options(H),
    )  # fmt: skip


def size_of(loop: tuple[int, Any]) -> int:
    """Instructions of a loop."""
    return loop[0]


def uses(ops: dict[str, int], *names: str) -> int:
    """How many of a loop's instructions have such names."""
    return sum(n for op, n in ops.items() if op.startswith(names))


CASES: dict[str, dict[str, Any]] = {
    "fast": {"tokens": 8192, "precise": False, "kind": 0},
    "fast swiglu bias": {"tokens": 8192, "precise": False, "kind": 1, "bias": True, "H": 2880},
    "fast tall 128": {"tokens": 4096, "precise": False, "kind": 0, "clear": True},
    "fast tall 64": {"tokens": 2048, "precise": False, "kind": 1, "bias": True},
    "fast tall few": {"tokens": 1024, "precise": False, "kind": 0, "wide": True},
    "fast 128": {"tokens": 4096, "precise": False, "kind": 0, "intermediate": 192},
    "fast 64": {"tokens": 2048, "precise": False, "kind": 0, "intermediate": 192},
    "fast paired wide": {
        "tokens": 1024, "precise": False, "kind": 0, "wide": True, "intermediate": 192,
    },
    "precise": {"tokens": 8192, "precise": True, "kind": 0},
    "precise clearing": {"tokens": 8192, "precise": True, "kind": 0, "clear": True},
    "precise 128": {"tokens": 4096, "precise": True, "kind": 0},
    "precise joined": {"tokens": 5440, "precise": True, "kind": 0},
    "precise paired": {
        "tokens": 1024, "precise": True, "kind": 1, "bias": True, "clear": True,
        "intermediate": 192,
    },
    "precise tall": {"tokens": 2048, "precise": True, "kind": 1, "bias": True, "clear": True},
    "precise tall few": {"tokens": 1024, "precise": True, "kind": 0, "wide": True},
    "rows": {"tokens": 8192, "precise": False, "kind": None, "H": 2880, "bias": True},
    "two steps": {"tokens": 1024, "precise": True, "kind": 0, "H": 192},
    "rows tall": {"tokens": 4096, "precise": False, "kind": None, "H": 2048, "bias": True},
    "rows tall precise": {"tokens": 2048, "precise": True, "kind": None, "H": 2880},
    "rows precise": {"tokens": 8192, "precise": True, "kind": None, "H": 2880},
    # With a ring of one stage ptxas crashes on sums of 256 columns.
    "rows of one step": {"tokens": 4096, "precise": True, "kind": None, "H": 96},
    "rows of four steps": {"tokens": 4096, "precise": True, "kind": None, "H": 416},
}


@pytest.mark.parametrize("name", CASES)
def test_grouped_compiles(name: str) -> None:
    made = grouped(**CASES[name])
    assert not made.messages and made.qgmma, made.messages
    ctas = 2 if made.registers == 80 else 1
    assert made.registers == (80 if ctas == 2 else 168) and made.warps == 12
    assert ctas * (made.shared + 1024) <= 228 * 1024
    # The matrix warps load nothing from global memory: no product hides it.
    assert not any(op.startswith("LDG") for _, ops in made.loops() for op in ops)
    # The gated precise form keeps a few values of a tile in local memory. No loop over K does, but
    # for one value of one team where K has four steps; other Tritons only spare the narrowest tile.
    loops = [ops for _, ops in sorted(made.loops(), key=size_of)]
    products = [ops for ops in loops if uses(ops, "QGMMA") and not uses(ops, "STG")]
    assert len(products) >= 2 * len(cut_of(**CASES[name]).sizes), "of both teams"
    assert uses(loops[0], "STL", "LDL") <= 1 and uses(products[0], "STL", "LDL") <= 1
    if TUNED_FOR:
        assert max(uses(ops, "STL", "LDL") for ops in products) <= (
            2 if name == "rows of four steps" else 0
        )
    assert made.spills <= (64 if TUNED_FOR else 6000), made.spills


DEVICE = torch.device("cpu")  # a device with the SMs of an H200, where the ring is cut
LIMIT = 228 * 1024  # shared memory of an SM; each CTA takes 1 KB more than it asks for
LISTED = [(name, tokens) for name in ("dsv3_tp8", "kimik2_tp8", "qwen3_tp4", "qwen3_tp8")
          for tokens in (2048, 4096, 8192)]  # fmt: skip


def problem_of(name: str, tokens: int) -> Problem:
    """A layer of `mixmoe.shapes`."""
    s = shape_named(name)
    return Problem(tokens, s.hidden, s.intermediate, s.experts, s.topk)


@cache
def ring(cut: gemm2_prefill.Ring, turns: int, bias: bool = False, wide: bool = False) -> Resources:
    """`gemm2_ring` for topk 8; E, H and the tokens change nothing but numbers it is given."""
    tokens, K = turns * cut.span * cut.ctas, 128 * cut.steps
    words = weight_descriptors(
        Fake(torch.int32, (114688, cut.steps, 256)),
        Fake(torch.int32, (114688, 16 * cut.steps)), 4, 1,
    )  # fmt: skip
    h = TensorDescriptor.from_tensor(
        Fake(torch.float8_e4m3fn, (40704, K)), [32, 128], gl.NVMMASharedLayout(128, 8, 2)
    )
    vectors = row_box(Fake(torch.float32, (256, 7168)))
    return compile_gluon(
        gemm2_prefill.gemm2_ring, *words, vectors, vectors if bias else None, h, BF16, I32,
        Routes(I32, F32, F32), Counters(I32, I32),
        gemm2_prefill_sum.Result(BF16, 7168, tokens, 7168), gemm2_prefill.Sizes(448, 112, 40704),
        TOPK=8, WIDE=wide, **cut.options(tokens),
    )  # fmt: skip


@pytest.mark.parametrize(
    "name, tokens, bias",
    [(*case, False) for case in LISTED] + [("kimik2_tp8", 8192, True), ("qwen3_tp8", 4096, True)],
)
def test_ring_compiles(name: str, tokens: int, bias: bool) -> None:
    """Two CTAs share an SM, with at most as much of it as `Ring.shared` says."""
    p = problem_of(name, tokens)
    cut = gemm2_prefill.Ring.of(p, DEVICE)
    if cut is None:
        assert (name, tokens) == ("qwen3_tp4", 8192), "more routes than room"
        return
    made = ring(cut, cut.turns(tokens), bias, wide=bias)
    assert made.clean() and made.qgmma, (made.spills, made.messages)
    assert made.registers == 128 and made.warps == 8, "two CTAs share an SM"
    assert 2 * (made.shared + 1024) <= LIMIT, "two CTAs share an SM"
    unbiased = 0 if bias else cut.stages * 256
    assert 0 <= cut.shared(p) - unbiased - made.shared <= 128


def test_ring_of_one_step_compiles() -> None:
    p = Problem(8192, 7168, 128, 256, 8)
    cut = gemm2_prefill.Ring.of(p, DEVICE)
    assert cut is not None and cut.steps == 1
    made = ring(cut, cut.turns(p.tokens), wide=True)
    assert made.clean() and made.registers == 128
    assert made.shared <= cut.shared(p) and 2 * (made.shared + 1024) <= LIMIT


def test_ring_stores_whole_lines() -> None:
    """16 bytes a lane, eight lanes a row, every store under the mask of the rows that exist: two
    stores for 32 rows, four for 64; and y."""
    cut = gemm2_prefill.Ring.of(problem_of("dsv3_tp8", 4096), DEVICE)
    assert cut is not None
    made = ring(cut, 1)
    stores = re.findall(r"(@!?P\d )?STG\.E(\.EF)?\.(\w+)", made.sass)  # y: evict first
    assert all(width == "128" for _, _, width in stores), stores
    to_ring = [mask for mask, to_y, _ in stores if not to_y]
    assert len(to_ring) == 6 and all(to_ring), stores


def test_ring_of_more_than_half_an_sm_is_refused() -> None:
    """What would leave CTAs waiting for ever: ten blocks of h with three stages of weights do not
    fit twice on an SM, and neither `shared` nor the compiler says otherwise."""
    p = problem_of("kimik2_tp8", 8192)
    cut = gemm2_prefill.Ring.of(p, DEVICE)
    assert cut is not None and (cut.room, cut.stages) == (10, 2)
    wrong = replace(cut, stages=3)
    assert not wrong.fits(p) and 2 * (ring(wrong, 2).shared + 1024) > LIMIT


def test_ring_is_none_where_no_cut_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then `gemm2_red_sum` serves, as for other versions of Triton."""
    p = problem_of("kimik2_tp8", 8192)
    monkeypatch.setattr(gemm2_prefill, "CUTS", {2: ((9, 3, 120), (10, 3, 120))})
    assert gemm2_prefill.Ring.of(p, DEVICE) is None and ring_of(p, DEVICE) is None
    assert gemm2_prefill.Ring.of(problem_of("dsv3_tp8", 8192), DEVICE) is not None
    assert sums_of(p, DEVICE) is not None


def test_ring_cuts() -> None:
    """Nine blocks of h a CTA where they hold the routes, and never more than half an SM."""
    few = Problem(8192, 7168, 256, 256, 8)
    small, large = (
        gemm2_prefill.Ring.of(replace(few, experts=experts), DEVICE) for experts in (256, 384)
    )
    assert small is not None and (small.room, small.stages, small.slots) == (9, 3, 3)
    assert large is not None and (large.room, large.stages) == (10, 2)
    assert not small.holds(replace(few, experts=384).padded_routes(32))
    assert small.fits(few) and not replace(small, room=10).fits(few)
    assert not small.fits(replace(few, topk=32))
    assert gemm2_prefill.Ring.of(replace(few, tokens=16384), DEVICE) is None


def red_operands(problem: Problem, cut: gemm2_red.Red, ids: Any) -> tuple[Any, ...]:
    """What `gemm2_red` and `gemm2_red_sum` take first: weights, h, work and routes."""
    words = weight_descriptors(
        Fake(torch.int32, (114688, cut.steps, 256)),
        Fake(torch.int32, (114688, 16 * cut.steps)), 4, 1,
    )  # fmt: skip
    h = TensorDescriptor.from_tensor(
        Fake(torch.float8_e4m3fn, (40704, padded(problem.intermediate))), [32, 128],
        gl.NVMMASharedLayout(128, 8, 2),
    )
    return *words, h, Work(I32, I32), gemm2_red.Routes(ids, F32, F32)


@pytest.mark.parametrize("I, tokens", [(128, 8192), (256, 8192), (384, 2048)])
def test_red_compiles(I: int, tokens: int) -> None:
    p = Problem(tokens, 7168, I, 256, 8)
    cut = gemm2_red.Red.of(p)
    assert cut is not None
    made = compile_gluon(
        gemm2_red.gemm2_red, *red_operands(p, cut, I32), Columns(F32, F32 if I == 384 else None),
        gemm2_red.Result(BF16, 7168, 7168), gemm2_red.Sizes(448, cut.span, 112), WIDE=I == 128,
        **cut.options(),
    )  # fmt: skip
    assert made.clean() and made.qgmma, (made.spills, made.messages)
    assert made.registers == 128 and made.warps == 8
    assert 2 * (made.shared + 1024) <= LIMIT, "two CTAs share an SM"
    added = len(re.findall(r"REDG\.E\.ADD\.BF16x8", made.sass))
    assert added == made.count("REDG") and added


SUMMED = [
    ("dsv3_tp8", 640), ("dsv3_tp8", 1536), ("dsv3_tp8", 8192), ("kimik2_tp8", 1536),
    ("kimik2_tp8", 8192), ("qwen3_tp4", 512), ("qwen3_tp4", 8192), ("qwen3_tp8", 1536),
]  # fmt: skip


@cache
def summing(cut: gemm2_red_sum.Sums, problem: Problem, bias: bool = False) -> Resources:
    """`gemm2_red_sum`, with biases also with the wide fold."""
    columns = -(-problem.hidden // 64)
    return compile_gluon(
        gemm2_red_sum.gemm2_red_sum, *red_operands(problem, cut.red, None), I32,
        Columns(F32, F32 if bias else None), gemm2_red_sum.Scratch(BF16, 40704, cut.slots),
        Counters(I32, I32),
        gemm2_prefill_sum.Result(BF16, problem.hidden, problem.tokens, problem.hidden),
        gemm2_red.Sizes(columns * 4, cut.red.span, columns), WIDE=bias,
        **cut.options(problem),
    )  # fmt: skip


@pytest.mark.parametrize("name, tokens", SUMMED)
def test_red_sum_compiles(name: str, tokens: int) -> None:
    """Two CTAs share an SM, with at most as much of it as `Sums.shared` says."""
    p = problem_of(name, tokens)
    cut = sums_of(p, DEVICE)
    assert cut is not None
    made = summing(cut, p, tokens == 1536)
    assert made.clean() and made.qgmma, (made.spills, made.messages)
    assert made.registers == 128 and made.warps == 8
    assert 0 <= cut.shared(p) - made.shared <= 128 and 2 * (made.shared + 1024) <= LIMIT


def test_red_sum_reads_past_the_l1_and_counts_once() -> None:
    """Rows come by copies that pass the L1 and write zeros for routes that are skipped; whole lines
    are stored; one release an item, and one count of a group."""
    p = problem_of("dsv3_tp8", 1024)
    cut = sums_of(p, DEVICE)
    assert cut is not None
    made = summing(cut, p)
    zeroing = r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10, %r\d+;"
    assert len(re.findall(zeroing, made.ptx)) == 8 == made.ptx.count("cp.async.cg")
    assert made.count("STG.E.128") == 8 and made.count("STG.E.EF.128") == 1
    assert made.count("MEMBAR.ALL.GPU") == 1 and made.count("REDG") == 2


def test_red_sum_of_more_than_half_an_sm_is_refused() -> None:
    p = problem_of("dsv3_tp8", 8192)
    cut = gemm2_red_sum.Sums.of(p, DEVICE)
    assert cut is not None and cut.red.main == 128
    wrong = replace(cut, depth=cut.depth + 1)
    assert wrong.shared(p) > gemm2_red_sum.SHARED and 2 * (summing(wrong, p).shared + 1024) > LIMIT
    assert gemm2_red_sum.Sums.of(replace(p, topk=64), DEVICE) is None


def test_red_spans_the_columns() -> None:
    """No short last group where a span between 5 and 9 divides the column tiles."""
    for columns in range(1, 200):
        span = gemm2_red.span_of(columns)
        assert 5 <= span <= 9
        assert columns % span == 0 or all(columns % other for other in range(5, 10))
    assert gemm2_red.span_of(112) == 7 and gemm2_red.span_of(64) == 8


TALL = [(64, 0, 256), (64, 0, 256), (64, 32, 256), (128, 32, 256), (128, 64, 128), (256, 32, 128)]
SHORT = [(64, 0, 128), (64, 0, 128), (64, 32, 128), (128, 32, 128), (128, 64, 128), (256, 32, 128)]


@pytest.mark.parametrize("intermediate, want, ctas", [(256, TALL, 1), (192, SHORT, 2)])
def test_form_follows_the_routes(
    intermediate: int, want: list[tuple[int, int, int]], ctas: int
) -> None:
    """Routes by the mean share; tall tiles where weight rows fill them; precise ones need room."""
    tokens = (512, 1664, 2048, 4096, 5472, 8192)
    problems = [Problem(t, 7168, intermediate, 256, 8) for t in tokens]
    fast = [form_of(p, False) for p in problems]
    assert [(f.main, f.extra, f.rows) for f in fast] == want
    assert [f.ctas for f in fast] == [ctas, ctas, 1, 1, 1, 1]
    precise = [form_of(p, True) for p in problems]
    assert precise[3] == form_of(Problem(4096, 7168, 192, 256, 8), True)
    assert [f for i, f in enumerate(precise) if i != 3] == [f for i, f in enumerate(fast) if i != 3]


@pytest.mark.parametrize("tokens", [512, 2048, 4096, 5472, 8192])
@pytest.mark.parametrize("intermediate", [256, 192])
def test_products_of_a_tile(intermediate: int, tokens: int) -> None:
    """Together they are its routes, those beyond main in the last; wgmma and memory want powers of
    two."""
    for precise in (True, False):
        cut = Cut.of(Problem(tokens, 7168, intermediate, 256, 8), precise)
        assert list(cut.sizes) == sorted(cut.sizes) and cut.sizes[-1] == cut.main + cut.extra
        for size in cut.sizes:
            widths = widths_of(size, cut.main, cut.form.rows // 128, cut.added(7168))
            assert sum(widths) == size and all(w in (32, 64, 128, 256) for w in widths)
            assert size <= cut.main or (widths[-1], first_of(widths, len(widths) - 1)) == (
                cut.extra, cut.main
            )  # fmt: skip


def test_more_rows_than_32_bits_count_are_refused() -> None:
    """And not read at wrong places; the layer's passes stay below."""
    def rows(count: int) -> SlotRows:
        codes = torch.empty((count, 2048), dtype=torch.float8_e4m3fn, device="meta")
        return SlotRows(codes, torch.empty((count, 1), device="meta"))

    assert rows(1 << 20).counted().codes.shape[0] == 1 << 20
    with pytest.raises(MixMoEError, match="split the tokens"):
        rows((1 << 20) + 1).counted()
    large = Problem(1 << 20, 7168, 2048, 32, 8)
    most = replace(large, tokens=pass_of(large, DEVICE))
    rows(most.padded_routes(32)).counted()


@pytest.mark.skipif(not TUNED_FOR, reason="the ring does not compile")
def test_a_pass_holds_the_ring() -> None:
    """Half the tokens where all are more than the ring holds; all where half would not help; many
    where stage 2 keeps nothing, as far as 32 bits count the values of h."""
    for name, tokens, want in [
        ("dsv3_tp8", 16384, 8192), ("qwen3_tp4", 8192, 4096), ("qwen3_tp4", 16384, 4096),
        ("qwen3_tp4", 5000, 8192), ("gptoss120b", 8192, 32768), ("dsv3_tp8", 64, 8192),
    ]:  # fmt: skip
        assert pass_of(problem_of(name, tokens), DEVICE) == want
    assert pass_of(problem_of("qwen3_tp4", 8192), DEVICE, deterministic=False) == 8192
    large = Problem(65536, 8192, 16384, 16, 8)
    assert pass_of(large, DEVICE) * large.topk * large.intermediate == 1 << 30


def test_few_tokens_are_summed_by_groups() -> None:
    """Up to twice as many where experts share CTAs."""
    few, many = (problem_of("dsv3_tp8", tokens) for tokens in (1280, 1281))
    assert (ring_of(many, DEVICE) is not None) == TUNED_FOR and ring_of(few, DEVICE) is None
    few, many = (problem_of("kimik2_tp8", tokens) for tokens in (2561, 2562))
    assert (ring_of(many, DEVICE) is not None) == TUNED_FOR and ring_of(few, DEVICE) is None
    assert sums_of(few, DEVICE) is not None
    assert sums_of(problem_of("gptoss120b", 2048), DEVICE) is None, "rows, then their sum"


@pytest.mark.parametrize("name", ["dsv3_tp8", "kimik2_tp8", "qwen3_tp4", "qwen3_tp8"])
def test_slots_hold_the_groups_of_an_item(name: str) -> None:
    """And one more, so that the next item need not wait; the scratch stays small: 22 MB at T 1024,
    where half the rows are padding and never touched."""
    p = problem_of(name, 1024)
    cut = sums_of(p, DEVICE)
    assert cut is not None and cut.slots * cut.group > cut.red.span
    assert cut.red.span % cut.group == 0, "a group is not parted by items"
    assert cut.slots * cut.group * 64 * 2 * p.padded_routes(32) < 64 << 20
