"""Roofs measured in the same run: a plain read, dense GEMMs, and the top-k reduction.

No stage can beat the read of its bytes, nor its FLOPs at the rate of a dense GEMM of the same
element type. Stage 2 of a prefill meets a third roof first: T * topk rows of H must become T rows,
and the faster of the two known ways (`red` into rows that stay in the L2, or store and gather)
bounds it: 305 us at T 8192, topk 8, H 7168 on one H200 (2026-11-22), where the GEMM needs 162.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixmoe.timing import Flush, GraphClock

from .counts import Cost
from .routing import Routing

READ_TILES = ((2048, 1), (4096, 2), (8192, 2))  # int32 words per pass, passes per program
DENSE = 8192
REDUCTION_FROM = 1024  # tokens; below it the read roof is the higher one


@triton.jit
def read_words(source, sums, words, BLOCK: tl.constexpr, PASSES: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * (BLOCK * PASSES)
    total = tl.zeros((BLOCK,), tl.int32)
    for i in tl.static_range(PASSES):
        at = first + i * BLOCK + tl.arange(0, BLOCK)
        total += tl.load(source + at, mask=at < words, other=0)
    tl.store(sums + tl.program_id(0), tl.sum(total))


@triton.jit
def reduce_by_red(y, token, rows, H: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    blocks = tl.cdiv(rows, BM)  # column block first: the live slice of y stays in the L2
    r = tl.program_id(0) % blocks * BM + tl.arange(0, BM)
    c = tl.program_id(0) // blocks * BN + tl.arange(0, BN)
    mask = (r < rows)[:, None] & (c < H)[None, :]
    t = tl.load(token + r, mask=r < rows, other=0).to(tl.int64)
    value = ((r[:, None] + c[None, :]).to(tl.float32) * 1e-3).to(tl.bfloat16)
    tl.atomic_add(y + t[:, None] * H + c[None, :], value, mask=mask, sem="relaxed")


@triton.jit
def store_rows(out, rows, H: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    columns = tl.cdiv(H, BN)
    r = tl.program_id(0) // columns * BM + tl.arange(0, BM)
    c = tl.program_id(0) % columns * BN + tl.arange(0, BN)
    mask = (r < rows)[:, None] & (c < H)[None, :]
    value = ((r[:, None] + c[None, :]).to(tl.float32) * 1e-3).to(tl.bfloat16)
    tl.store(out + r[:, None].to(tl.int64) * H + c[None, :], value, mask=mask)


@triton.jit
def gather_sum(rows, place, y, H: tl.constexpr, TOPK: tl.constexpr, BN: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BN,), tl.float32)
    for k in tl.static_range(TOPK):
        row = tl.load(place + t * TOPK + k)
        total += tl.load(rows + row * H + c, mask=c < H, other=0).to(tl.float32)
    tl.store(y + t * H + c, total.to(tl.bfloat16), mask=c < H)


@dataclass(frozen=True, slots=True)
class Roof:
    """The highest of the roofs of one measurement, us, and which one it is."""

    us: float
    by: str


def highest(read_us: float, cost: Cost, tflops: float, reduction_us: float = 0.0) -> Roof:
    """max(read of the bytes, FLOPs / dense rate, reduction)."""
    gemm = cost.flops / tflops * 1e-6
    return max(
        Roof(read_us, "read"),
        Roof(gemm, "dense GEMM"),
        Roof(reduction_us, "reduction"),
        key=lambda roof: roof.us,
    )


@dataclass(slots=True, eq=False)
class Roofs:
    """Measures what is asked for, once per run."""

    device: str
    clocks: dict[Flush, GraphClock]
    reads: dict[tuple[Flush, int], float] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    reductions: dict[tuple[Flush, int, int, int], float] = field(default_factory=dict)
    tiles: dict[tuple[Flush, int], str] = field(default_factory=dict)
    buffer: Tensor | None = None

    def read_us(self, flush: Flush, nbytes: int) -> float:
        """A plain read of `nbytes` (to half a per cent) with the best of READ_TILES, which is
        looked for once per power of two."""
        size = near(nbytes)
        if (flush, size) not in self.reads:
            readers, octave = self._readers(size), (flush, size.bit_length())
            if octave in self.tiles:
                readers = {self.tiles[octave]: readers[self.tiles[octave]]}
            times = self._times(flush, readers)
            self.tiles[octave] = min(times, key=lambda name: times[name])
            self.reads[flush, size] = times[self.tiles[octave]]
        # what reads more in less time is a better roof for this size too
        return min(us for (kind, n), us in self.reads.items() if kind is flush and n >= size)

    def tflops(self, kind: str) -> float:
        """Dense 8192^3 rate: "fp8" (row-wise scales, fast accumulation) or "bf16"."""
        if kind not in self.rates:
            self.rates[kind] = 2 * DENSE**3 / _loop_us(dense_gemm(kind, self.device)) * 1e-6
        return self.rates[kind]

    def reduction_us(self, flush: Flush, routing: Routing, hidden: int) -> float:
        """Top-k reduction of R rows made in registers; 0 where the read roof is surely higher."""
        tokens, topk = routing.ids.shape
        if tokens < REDUCTION_FROM:
            return 0.0
        key = (flush, tokens, topk, hidden)
        if key not in self.reductions:
            self.reductions[key] = min(self._times(flush, reducers(routing, hidden)).values())
        return self.reductions[key]

    def _readers(self, size: int) -> dict[str, Callable[[], object]]:
        words = size // 4
        if self.buffer is None or self.buffer.numel() < words:
            self.buffer = None
            self.buffer = torch.randint(-9, 9, (words,), dtype=torch.int32, device=self.device)
        source = self.buffer
        sums = torch.empty(-(-words // READ_TILES[0][0]), dtype=torch.int32, device=self.device)

        def reader(block: int, passes: int) -> Callable[[], object]:
            grid = (-(-words // (block * passes)),)
            return lambda: read_words[grid](source, sums, words, block, passes, num_warps=4)

        return {f"{block}x{passes}": reader(block, passes) for block, passes in READ_TILES}

    def _times(self, flush: Flush, calls: dict[str, Callable[[], object]]) -> dict[str, float]:
        clock = self.clocks[flush]
        for call in calls.values():
            call()
        captured = {name: clock.capture(call, budget_us=600) for name, call in calls.items()}
        return {name: timing.us for name, timing in clock.compare(captured, rounds=9).items()}

    def as_json(self) -> dict[str, Any]:
        """Everything measured, for the results file."""
        return {
            "dense_tflops": {kind: round(rate, 1) for kind, rate in self.rates.items()},
            "read_us": [
                {"flush": f.value, "bytes": size, "us": round(us, 2)}
                for (f, size), us in sorted(
                    self.reads.items(), key=lambda i: (i[0][0].value, i[0][1])
                )
            ],
            "reduction_us": [
                {"flush": f.value, "tokens": t, "topk": k, "hidden": h, "us": round(us, 1)}
                for (f, t, k, h), us in self.reductions.items()
            ],
        }


def near(nbytes: int, steps: int = 64) -> int:
    """The nearest of `steps` sizes per octave, a multiple of 16: cases of about the same size
    share one measurement."""
    size = 2.0 ** (round(math.log2(max(nbytes, 1)) * steps) / steps)
    return max(16, round(size / 16) * 16)


def dense_gemm(kind: str, device: str) -> Callable[[], object]:
    """An 8192^3 product of normal data."""
    a, b = (torch.randn(DENSE, DENSE, device=device) for _ in range(2))
    if kind == "bf16":
        a16, b16 = a.bfloat16(), b.bfloat16()
        return lambda: torch.mm(a16, b16.T)
    a8, b8 = (v.to(torch.float8_e4m3fn) for v in (a, b))
    one = torch.ones(DENSE, 1, device=device)
    return lambda: torch._scaled_mm(
        a8, b8.T, one, one.T, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def reducers(routing: Routing, hidden: int) -> dict[str, Callable[[], object]]:
    """The two ways to reduce R rows to T, with the same routes."""
    tokens, topk = routing.ids.shape
    rows, device = tokens * topk, routing.ids.device
    token = (routing.order // topk).int()
    y = torch.zeros(tokens, hidden, dtype=torch.bfloat16, device=device)
    out = torch.empty(rows, hidden, dtype=torch.bfloat16, device=device)
    grid = (triton.cdiv(rows, 64) * triton.cdiv(hidden, 128),)
    sums = (tokens, triton.cdiv(hidden, 1024))

    def store_and_sum() -> None:
        store_rows[grid](out, rows, hidden, 64, 128)
        gather_sum[sums](out, routing.inverse, y, hidden, topk, 1024)

    return {
        "red": lambda: reduce_by_red[grid](y, token, rows, hidden, 64, 128),
        "store, then gather": store_and_sum,
    }


def _loop_us(call: Callable[[], object], rounds: int = 20) -> float:
    """Median time of back-to-back calls; a dense GEMM of 0.7 ms needs no flush."""
    for _ in range(5):
        call()
    times = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return sorted(times)[rounds // 2]
