"""The epilogues of `prefill.grouped_prefill`: scales, bias, activation, rows of bf16.

No product hides them: the teams share the ring of x, so they end a tile within a step or two of
each other, and until 2026-11-28 a tile of 56 steps waited 7900 clocks of 77000 for them (H200,
traced). So they read shared memory only: `Factors`, put there by the gathering warps.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mixmoe.backends.hopper.mainloop import activate, smem_cast


class Factors(NamedTuple):
    """What a tile needs beside its products, in shared memory, of two tiles or of one: its record
    (first position, routes, row tile), scales of its rows of x and their routing weights, scales
    and biases of its weights' rows, in the order of the accumulators."""

    record: Any
    scales: Any
    weights: Any
    columns: Any
    bias: Any


class End(NamedTuple):
    """What the epilogue makes of a tile, and where it transposes it; weights, bias None:
    there are none; base: the launch's first block of weight rows."""

    staging: Any
    out: Any
    weights: Any
    bias: Any
    act: Any
    base: Any


class Tile(NamedTuple):
    """A work item: its first sorted position and routes; a fragment's block of rows."""

    start: Any
    routes: Any
    block: Any


@gluon.jit
def store_rows(value, staging, ptr, pitch, columns, column, first, tile, COLUMNS: gl.constexpr):
    """value (COLUMNS, N) -> bf16 rows first .. of a tile, columns from `column`, through smem."""
    N: gl.constexpr = value.shape[1]
    memory = staging.slice(0, N, dim=0)
    memory.permute((1, 0)).store(value.to(gl.bfloat16))
    L: gl.constexpr = gl.BlockedLayout(
        [1, 8], [256 // COLUMNS, COLUMNS // 8], [gl.num_warps(), 1], [1, 0]
    )
    n = first + gl.arange(0, N, layout=gl.SliceLayout(1, L))
    m = column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, L))
    gl.store(
        ptr + (tile.start + n).to(gl.int64)[:, None] * pitch + m[None, :], memory.load(L),
        mask=(n < tile.routes)[:, None] & (m < columns)[None, :],
    )


@gluon.jit
def scaled(acc, factors, first: gl.constexpr, end):
    """The accumulator of rows first .. of a tile times both scales, plus the bias."""
    L: gl.constexpr = acc.type.layout
    N: gl.constexpr = acc.shape[1]
    acc = acc * factors.scales.slice(first, N).load(gl.SliceLayout(0, L))[None, :]
    acc = acc * factors.columns.load(gl.SliceLayout(1, L))[:, None]
    if end.bias is not None:
        acc += factors.bias.load(gl.SliceLayout(1, L))[:, None]
    return acc


@gluon.jit
def finish_gated(acc, factors, first: gl.constexpr, tile, end, KIND: gl.constexpr):
    """Stage 1: scales, bias, activation, routing weight. A block is 8 row pairs times warps."""
    WARPS: gl.constexpr = gl.num_warps()
    N: gl.constexpr = acc.shape[1]
    acc = scaled(acc, factors, first, end)
    gate, up = acc.reshape([WARPS, 2, 8, N]).permute((0, 2, 3, 1)).split()
    gate = gate.reshape([WARPS * 8, N])
    up = up.reshape([WARPS * 8, N])
    act = end.act
    h = activate(gate, up, act.limit, act.alpha, act.beta, act.beta2, KIND)
    if end.weights is not None:
        L: gl.constexpr = gate.type.layout
        h *= factors.weights.slice(first, N).load(gl.SliceLayout(0, L))[None, :]
    columns = end.out.columns
    store_rows(
        h, end.staging, end.out.rows, columns, columns, tile.block * (WARPS * 8), first, tile,
        WARPS * 8,
    )  # fmt: skip


@gluon.jit
def finish_plain(acc, factors, first: gl.constexpr, tile, end):
    """Stage 2: scales and bias. A block is 16 rows times warps, from block `base` on. Long tiles go
    through the staging buffer in two halves."""
    N: gl.constexpr = acc.shape[1]
    M: gl.constexpr = acc.shape[0]
    ROOM: gl.constexpr = end.staging.shape[0] * end.staging.shape[1]
    if M * N > ROOM:
        low, high = acc.reshape([M, 2, N // 2]).permute((0, 2, 1)).split()
        finish_plain(low, factors, first, tile, end)
        finish_plain(high, factors, first + N // 2, tile, end)
    else:
        whole = smem_cast(
            end.staging, gl.bfloat16, [ROOM // M, M], gl.NVMMASharedLayout(128, 16, 2)
        )
        store_rows(
            scaled(acc, factors, first, end), whole, end.out.rows, end.out.pitch,
            end.out.columns - end.base * M, tile.block * M, first, tile, M,
        )  # fmt: skip


@gluon.jit
def finish(acc, factors, first: gl.constexpr, tile, end, KIND: gl.constexpr):
    """The epilogue of rows first .. of a tile."""
    if KIND is None:
        finish_plain(acc, factors, first, tile, end)
    else:
        finish_gated(acc, factors, first, tile, end, KIND)
