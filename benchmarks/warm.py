"""Compiling ahead of a run: many processes fill the caches that the measuring process reads.

A plan of all shapes and counts needs hundreds of kernels, ours of 1 to 4 s of CPU time each and the
rivals' of 2 to 4 s, and one process compiles one at a time. Here the plan is cut by shape, by
whose kernels they are and by token counts, and the parts go to as many processes as there are
cores. Ours are not launched, and each is compiled by the process that asks first (compile_only.py).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from pathlib import Path

from . import registry
from .plan import Plan
from .registry import OURS, Entry
from .shapes import TABLE_TOKENS

COUNTS = 3  # token counts of a part, the largest (of most kernels) first
CLAIMS = "claims"  # folder of what has been taken


def parts(plan: Plan, entries: Iterable[Entry]) -> list[Plan]:
    """The plan in pieces: the token counts with a goal first, in all shapes, as they are measured
    first; of one count ours first, which are the cheapest, then the rivals with most ways.

    On one H200 (2026-11-28) humming's kernels alone kept 16 cores busy for longer than 100 s.
    """
    ways: dict[str, int] = {}
    for entry in entries:
        owner = "none" if entry.provider == OURS else entry.plugin
        ways[owner] = ways.get(owner, 0) + 1
    # how a kernel is compiled depends on sizes, hardly on the routing and not on the flush
    small = replace(plan, warm=True, resume=False, skews=plan.skews[:1])
    cut = []
    goals = [t for t in plan.tokens if t in TABLE_TOKENS]
    for counts in (goals, [t for t in plan.tokens if t not in TABLE_TOKENS]):
        for owner in sorted(ways, key=lambda owner: (owner != "none", -ways[owner])):
            ours = owner == "none"
            tokens = [t for t in sorted(counts, reverse=True) if ours or plan.rivals_run(t)]
            for first in range(0, len(tokens), COUNTS):
                for shape in plan.shapes:
                    piece = tuple(tokens[first : first + COUNTS])
                    recipes = plan.recipes if ours else ()
                    cut.append(
                        replace(small, shapes=(shape,), tokens=piece, rivals=owner, recipes=recipes)
                    )
    return cut


def run(plan: Plan, jobs: int, gpus: Sequence[str], environment: dict[str, str]) -> None:
    """Compiles the plan's kernels in `jobs` processes; what one of them cannot is left to the
    measuring process. Their logs lie in <out>/warm."""
    folder, begin = plan.folder / "warm", time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    numbers = count()

    def compile_part(piece: Plan) -> None:
        number, start = next(numbers), time.monotonic()
        left = max(plan.seconds - (start - begin), 0.0)
        place = {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)], "OMP_NUM_THREADS": "1"}
        made = replace(piece, out=str(folder), part=str(number), seconds=left)
        status = _worker(made, environment | place, folder / f"{number}.log", left)
        now = time.monotonic()
        say(f"  {name_of(piece)}: {status} in {now - start:.1f} s, at {now - begin:.0f} s")

    cut = parts(plan, registry.choose(registry.load(), plan.rivals, plan.recipes))
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(compile_part, cut))
    kernels, spent = len(list((folder / CLAIMS).glob("*"))), time.monotonic() - begin
    say(f"warmed: {len(cut)} parts, {kernels} kernels of ours, {spent:.0f} s")


def name_of(piece: Plan) -> str:
    """ "humming dsv3_ep T 8192, 512, 64"."""
    owner = OURS if piece.rivals == "none" else piece.rivals
    return f"{owner} {piece.shapes[0]} T {', '.join(map(str, piece.tokens))}"


def say(line: str) -> None:
    print(line, flush=True)


def _worker(plan: Plan, environment: dict[str, str], log: Path, seconds: float) -> str:
    """How the process of a part ended."""
    command = [sys.executable, "-m", "benchmarks.worker"]
    with log.open("w") as file:
        try:
            done = subprocess.run(
                command, input=plan.dump(), text=True, env=environment, stdout=file,
                stderr=subprocess.STDOUT, timeout=seconds,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return "out of time"
    return "done" if done.returncode == 0 else f"status {done.returncode}"
