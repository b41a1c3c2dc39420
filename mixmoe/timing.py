"""Times GPU work under CUDA-graph replay with the L2 cache flushed before every repetition.

A graph of `repeats` x (flush, call) is replayed beside a graph of `repeats` x (flush); the
difference over `repeats` is the time of one call with a cold L2, the launch gap inside a graph
included (0.9 us for an empty kernel on one H200, 2026-11-22) and the host left out. Two flushes,
because what the cache holds changes the result: DIRTY writes 256 MB, so the call also pays for
the write-back of up to 60 MB of dirty lines; CLEAN writes 256 MB and then reads 256 MB, so it does
not. All calls that are compared are replayed in turn, round after round, on one stream.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from statistics import median, quantiles

import torch

FLUSH_BYTES = 256 << 20  # more than four times the 60 MB L2 of an H200
REPEATS = (1, 2, 4, 8)


class Flush(Enum):
    """What the L2 holds when the timed call starts."""

    CLEAN = "clean"
    DIRTY = "dirty"


@dataclass(frozen=True, slots=True)
class Timing:
    """Median time of one call and its spread (distance between the quartiles), us."""

    us: float
    spread: float
    rounds: int


@dataclass(frozen=True, slots=True, eq=False)
class Captured:
    """A replayable graph of `repeats` x (flush, call)."""

    graph: torch.cuda.CUDAGraph
    repeats: int


def summarise(with_call: Sequence[float], flush_only: Sequence[float], repeats: int) -> Timing:
    """The time of one call from paired rounds of (flush, call) and of the flush alone.

    us = (median(with_call) - median(flush_only)) / repeats. The medians are taken apart, so that
    one slow flush does not move the call. spread = q3 - q1 of the paired differences / repeats.
    """
    if len(with_call) != len(flush_only) or not with_call:
        raise ValueError(f"rounds must pair: got {len(with_call)} and {len(flush_only)}")
    pairs = [(a - b) / repeats for a, b in zip(with_call, flush_only, strict=True)]
    spread = 0.0
    if len(pairs) > 1:
        low, _, high = quantiles(pairs, n=4, method="inclusive")
        spread = high - low
    return Timing((median(with_call) - median(flush_only)) / repeats, spread, len(pairs))


class GraphClock:
    """Captures calls and replays them in turn: `compare({name: clock.capture(call), ...})`."""

    def __init__(self, flush: Flush, device: torch.device | str = "cuda") -> None:
        self.flush_kind = flush
        words = FLUSH_BYTES // 4
        self.written = torch.empty(words, dtype=torch.int32, device=device)
        self.read = torch.ones(words, dtype=torch.int32, device=device)
        self.base: dict[int, torch.cuda.CUDAGraph] = {}
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def flush(self) -> None:
        """One cache flush on the current stream."""
        self.written.fill_(1)
        if self.flush_kind is Flush.CLEAN:
            self.read.sum()

    def capture(self, call: Callable[[], object], *, budget_us: float = 1000.0) -> Captured:
        """Records `call`, which must have run once (compiled) before, behind `repeats` flushes.

        `repeats` is the largest of REPEATS whose graph stays within `budget_us`.
        """
        estimate = self._estimate(call)
        fitting = [r for r in REPEATS if r * estimate <= budget_us]
        repeats = max(fitting, default=REPEATS[0])
        graph = self._record(repeats, call)
        if repeats not in self.base:
            self.base[repeats] = self._record(repeats, None)
        return Captured(graph, repeats)

    def compare(self, captured: Mapping[str, Captured], rounds: int = 7) -> dict[str, Timing]:
        """Replays every graph once per round, in an order that rotates, and the flush beside it."""
        names = list(captured)
        used = sorted({c.repeats for c in captured.values()})
        calls: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {n: [] for n in names}
        flushes: dict[int, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {r: [] for r in used}
        for turn in range(rounds + 1):  # turn 0 warms up
            for repeats in used:
                flushes[repeats].append(_replay(self.base[repeats]))
            shift = turn % max(len(names), 1)
            for name in names[shift:] + names[:shift]:
                calls[name].append(_replay(captured[name].graph))
        torch.cuda.synchronize()
        flushed = {r: [_us(pair) for pair in pairs[1:]] for r, pairs in flushes.items()}
        return {
            name: summarise([_us(pair) for pair in calls[name][1:]], flushed[c.repeats], c.repeats)
            for name, c in captured.items()
        }

    def _estimate(self, call: Callable[[], object]) -> float:
        start, end = _event(), _event()
        self.flush()
        start.record()
        self.flush()
        call()
        end.record()
        end.synchronize()
        return max(_us((start, end)), 1.0)

    def _record(self, repeats: int, call: Callable[[], object] | None) -> torch.cuda.CUDAGraph:
        # Not torch.cuda.graph(): that one empties the allocator's cache on every entry, which
        # costs more than the measurement. The graphs share one pool: none reads what another left.
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):
            graph.capture_begin(pool=self.pool)
            try:
                for _ in range(repeats):
                    self.flush()
                    if call is not None:
                        call()
            except BaseException:
                with suppress(RuntimeError):  # the capture is broken already; the cause goes up
                    graph.capture_end()
                raise
            graph.capture_end()
        graph.replay()
        torch.cuda.synchronize()
        return graph


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def _us(pair: tuple[torch.cuda.Event, torch.cuda.Event]) -> float:
    return float(pair[0].elapsed_time(pair[1])) * 1e3


def _replay(graph: torch.cuda.CUDAGraph) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, end = _event(), _event()
    start.record()
    graph.replay()
    end.record()
    return start, end
