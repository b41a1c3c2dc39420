"""The main loop of a simulated kernel: found in the recorded path, counted, timed.

A loop is a jump back that the first wave took; the main loop is the innermost one that holds matrix
instructions, and of several the one that executed most of them. Its cycles per iteration are the
difference between the model's time of the recorded path and of the same path with half of the
iterations left out, so prologue and epilogue cancel. *Simulated.*
"""

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Any

Path = list[int]  # instructions by number, as a wave executed them
FEWEST = 3  # iterations that a difference can be taken of
UNITS = {"mfma": "mfma", "valu": "valu", "salu": "salu", "branch": "salu", "wait": "salu",
         "barrier": "salu", "smem": "salu", "lds": "lds", "vmem": "global"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class MainLoop:
    """Per iteration of one wave: instructions by unit; simulated cycles (with the resident
    workgroups, for one of them) and the share of them in which the matrix cores are busy."""

    iterations: int
    mix: dict[str, int]
    cycles: float | None
    mfma_busy: float | None

    @property
    def per_mfma(self) -> dict[str, float]:
        """Instructions for each matrix instruction."""
        return {unit: n / self.mix["mfma"] for unit, n in self.mix.items() if unit != "mfma"}

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "iterations": self.iterations,
            "mix": self.mix,
            "per_mfma": {unit: round(n, 3) for unit, n in self.per_mfma.items()},
            "cycles": None if self.cycles is None else round(self.cycles),
            "mfma_busy": None if self.mfma_busy is None else round(self.mfma_busy, 3),
        }


def mix_of(instructions: list[Any], path: Path) -> dict[str, int]:
    """Instructions of a path by unit; waits, branches and barriers issue with the scalar ones."""
    from cdnasim.counters import klass

    counts = Counter(UNITS[klass(instructions[pc].op)] for pc in path)
    return {unit: counts[unit] for unit in ("mfma", "valu", "salu", "lds", "global")}


def heads(path: Path, matrix: set[int]) -> tuple[int, int] | None:
    """(first, last) instruction of the main loop; None where no loop holds a matrix instruction."""
    loops = {(b, a) for a, b in zip(path, path[1:], strict=False) if b <= a}
    holding = [(lo, hi) for lo, hi in loops if any(lo <= pc <= hi for pc in matrix)]
    inner = [
        (lo, hi)
        for lo, hi in holding
        if not any((x, y) != (lo, hi) and lo <= x and y <= hi for x, y in holding)
    ]
    executed = Counter(pc for pc in path if pc in matrix)

    def work(loop: tuple[int, int]) -> int:
        return sum(n for pc, n in executed.items() if loop[0] <= pc <= loop[1])

    return max(inner, key=work, default=None)


def iterations_of(path: Path, loop: tuple[int, int]) -> list[tuple[int, int]]:
    """[start, end) of each iteration of the loop's longest run in the path."""
    first, last = loop
    runs: list[list[tuple[int, int]]] = []
    at = 0
    while at < len(path):
        if path[at] != first:
            at += 1
            continue
        start = at
        while at < len(path) and path[at] != last:
            at += 1
        at += 1
        joined = bool(runs) and runs[-1][-1][1] == start
        (runs[-1].append if joined else lambda span: runs.append([span]))((start, at))
    return max(runs, key=len, default=[])


def main_loop(report: Any) -> MainLoop | None:
    """The main loop of a launch that recorded its path."""
    from cdnasim.timing import Model

    instructions = report.kernel.module.instrs
    matrix = {i.pc for i in instructions if i.op.startswith(("v_mfma", "v_smfmac"))}
    paths = {wave: [pc for part in parts for pc in part] for wave, parts in report.paths.items()}
    first = paths[min(paths)]
    loop = heads(first, matrix)
    if loop is None:
        return None
    spans = {wave: iterations_of(path, loop) for wave, path in paths.items()}
    mine = spans[min(paths)]
    # A round of a walk over tiles may find its tile unused.
    working = [span for span in mine if matrix & set(first[slice(*span)])]
    if not working:
        return None
    count, middle = len(mine), working[len(working) // 2]
    mix = mix_of(instructions, first[slice(*middle)])
    alike = len({tuple(first[slice(*span)]) for span in mine}) == 1
    if count < FEWEST or not alike or any(len(found) != count for found in spans.values()):
        return MainLoop(count, mix, None, None)
    left_out = count // 2
    shorter = copy.copy(report)
    shorter.paths = {
        wave: [path[: spans[wave][0][1]] + path[spans[wave][left_out][1] :]]
        for wave, path in paths.items()
    }
    resident = report.timing.resident
    less = Model(shorter, resident, keep_spans=False).run().cycles
    cycles = (report.timing.cycles - less) / left_out / resident
    busy = sum(instructions[pc].cycles for pc in first[slice(*middle)] if pc in matrix)
    waves_a_simd = max(1, len(paths) // 4)
    return MainLoop(count, mix, cycles, busy * waves_a_simd / cycles if cycles > 0 else None)
