"""FlyDSL sessions and planted bugs, on our own a4w4 GEMM. Needs flydsl, ld.lld and a C compiler:
without them these tests fail.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cdnasim import mutants
from cdnasim.errors import ToolError
from cdnasim.flydsl import Launched, compile_only, session
from cdnasim.machine import Kernel
from cdnasim.report import Report

ROWS, COLS, DEPTH = 64, 64, 768


def operands(rows: int = ROWS, cols: int = COLS, depth: int = DEPTH) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    codes = [
        torch.randint(0, 256, (r, depth // 2), dtype=torch.uint8, generator=g) for r in (rows, cols)
    ]
    return codes + [
        torch.randint(120, 134, (r, depth // 32), dtype=torch.uint8, generator=g)
        for r in (rows, cols)
    ]


def launch(s: session, c: torch.Tensor, ops: list[torch.Tensor]) -> None:
    from cdnasim.examples import a4w4_gemm as ex

    rows, cols = c.shape
    ex.a4w4_gemm(
        c,
        *(t.view(torch.int32) for t in ops),
        rows // ex.BLOCK_M,
        cols // ex.BLOCK_N,
        2 * ops[0].shape[1],
    )


def reference(ops: list[torch.Tensor]) -> torch.Tensor:
    from cdnasim.examples.a4w4_gemm import dequantise

    return dequantise(ops[0], ops[2]) @ dequantise(ops[1], ops[3]).T


@pytest.mark.parametrize('schedule', ('lockstep', 'serial', 'random'))
def test_gemm_matches_float64(schedule: str) -> None:
    ops, c = operands(), torch.zeros(ROWS, COLS)
    with session(
        'gfx950', hazard=True, races=True, uninitialised=True, schedule=schedule, seed=5
    ) as s:
        launch(s, c, ops)
    want = reference(ops)
    error = (c.double() - want).norm(dim=1) / want.norm(dim=1)
    assert error.max() < 1e-6
    assert (
        s.launches[0].verdict == 'pass'
        and s.launches[0].report.mfma_flops == 2 * ROWS * COLS * DEPTH
    )  # type: ignore[union-attr]
    ops[2][5, 3] += 1  # one scale off by one is seen
    want = reference(ops)
    assert ((c.double() - want).norm(dim=1) / want.norm(dim=1)).max() > 1e-3


def test_errors_reach_the_caller() -> None:
    """A fault inside a launch surfaces when the session ends, with the place."""
    from cdnasim import BudgetError

    ops, c = operands(), torch.zeros(ROWS, COLS)
    with pytest.raises(BudgetError, match='kernel_0'), session(budget=50) as s:
        launch(s, c, ops)
    with session(budget=50, keep_going=True) as s:
        launch(s, c, ops)
    assert s.launches[0].verdict == 'stall'


def test_unknown_arch_is_refused() -> None:
    """LLVM would end the process."""
    from cdnasim import UnsupportedError

    with pytest.raises(UnsupportedError, match="'gfx999': sessions are for gfx942 or gfx950"):
        session('gfx999')


def test_missing_lld_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from cdnasim import toolchain

    monkeypatch.setattr(toolchain, 'candidates', lambda name: [])
    toolchain.find_tool.cache_clear()
    with pytest.raises(ToolError, match='apt-get install lld-22'):
        toolchain.find_tool('ld.lld')
    monkeypatch.undo()
    toolchain.find_tool.cache_clear()


@pytest.fixture(scope='module')
def recorded() -> tuple[session, Launched, torch.Tensor]:
    ops, c = operands(64, 64, 512), torch.zeros(64, 64)
    with session(run=False) as s:
        launch(s, c, ops)
    s.memory.map_tensor(c)
    return s, s.launches[0], c


def test_planted_bugs(recorded: tuple[session, Launched, torch.Tensor]) -> None:
    """Every removed or weakened wait, removed barrier, lost swizzle, short descriptor and lost K
    step is caught.
    """
    s, r, c = recorded

    def run(kernel: Kernel, mode: dict[str, object]) -> tuple[Report, bytes]:
        c.zero_()
        report = kernel.launch(
            r.grid,
            r.block,
            r.kernarg,
            memory=s.memory,
            dynamic_lds=r.dynamic_lds,
            budget=100_000,
            **mode,
        )
        return report, c.numpy().tobytes()

    report, want = run(r.kernel, dict(mutants.MODES[0]))
    assert report.ok  # the unchanged kernel is clean
    judged = [mutants.judge(m, r.kernel.name, run, want) for m in mutants.mutants(r.kernel)]
    rates = mutants.table(judged)
    print(rates)
    assert set(rates) == set(mutants.KINDS)
    assert all(caught == planted for caught, planted, _ in rates.values()), [
        m for m in judged if not m.caught
    ]


def test_compile_only() -> None:
    from cdnasim.examples import a4w4_gemm as ex

    ops, c = operands(), torch.zeros(ROWS, COLS)
    record = compile_only(ex.a4w4_gemm, c, *(t.view(torch.int32) for t in ops), 2, 1, DEPTH)
    assert record.block == (256, 1, 1) and record.report is None and not c.any()
    assert any('mfma_scale' in i.op for i in record.kernel.module.instrs)


def test_gfx942() -> None:
    """The same host path for the older target, with a plain bf16 matrix instruction."""
    import flydsl.compiler as flyc
    import flydsl.expr as fx

    default_stream = fx.Stream(None)

    @flyc.jit
    def add_one(X: fx.Tensor, Y: fx.Tensor, stream: fx.Stream = default_stream):  # noqa: N803
        @flyc.kernel
        def kernel(X: fx.Tensor, Y: fx.Tensor):  # noqa: N803
            i = fx.block_idx.x * 64 + fx.thread_idx.x
            fx.memref_store(fx.memref_load(X, i) + fx.Float32(1.0), Y, i)

        kernel(X, Y).launch(grid=(4, 1, 1), block=(64, 1, 1), stream=stream)

    x, y = torch.arange(256, dtype=torch.float32), torch.zeros(256)
    with session('gfx942', hazard=True) as s:
        add_one(x, y)
    assert s.launches[0].kernel.arch == 'gfx942' and np.array_equal(y.numpy(), x.numpy() + 1)
