"""Does a result depend on who runs first? Run one launch under several schedules and compare every
byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .machine import Kernel, Size
from .memory import Memory, Region
from .report import Report

DEFAULT: tuple[dict[str, Any], ...] = (
    {'schedule': 'lockstep'},
    {'schedule': 'serial'},
    {'schedule': 'reverse'},
    *({'schedule': 'random', 'seed': k} for k in range(4)),
)


@dataclass(frozen=True, slots=True)
class Difference:
    """`schedule` leaves other bytes in `buffer` than the first schedule does."""

    schedule: dict[str, Any]
    buffer: str
    offset: int
    bytes: int


def compare_schedules(
    kernel: Kernel,
    grid: Size,
    block: Size,
    args: Sequence[Any] | bytes,
    *,
    memory: Memory | None = None,
    schedules: Sequence[dict[str, Any]] = DEFAULT,
    **options: Any,
) -> tuple[list[Difference], Report]:
    """Run `kernel` from the same memory under each of `schedules` (fields of Options).

    -> (differences from the first schedule, report of the first). Memory is left as the first
    schedule leaves it. Float atomics may differ for a good reason: their order is the schedule's.
    """
    mem = memory or Memory()
    first: Report | None = None
    before: dict[int, Any] = {}
    after: dict[int, Any] = {}
    found: list[Difference] = []
    for changes in schedules:
        for r in mem.regions:
            if r.base in before:
                r.data[:] = before[r.base]
        if first is None:
            packed, before = kernel.pack(args, grid, block, mem), snapshot(mem.regions)
        report = kernel.launch(grid, block, packed, memory=mem, **{**options, **changes})
        if first is None:
            first, after = report, {r.base: r.data.copy() for r in mem.regions if r.base in before}
            continue
        for r in mem.regions:
            if r.base in after and (differs := np.flatnonzero(r.data != after[r.base])).size:
                found.append(Difference(changes, r.name, int(differs[0]), len(differs)))
    for r in mem.regions:
        if r.base in after:
            r.data[:] = after[r.base]
    assert first is not None
    return found, first


def snapshot(regions: list[Region]) -> dict[int, Any]:
    return {r.base: r.data.copy() for r in regions}
