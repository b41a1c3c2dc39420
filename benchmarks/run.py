"""A run from start to end: worker processes until the plan is done, then results, table, plots."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mixmoe.errors import MixMoEError

from . import markdown as tables
from . import merged, report, results, warm
from .plan import Plan
from .plots import draw_all

MOST_STARTS = 25
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def execute(plan: Plan, jobs: int = 0) -> Path:
    """Measures and writes <out>/<device>.json; gives its path. A warm plan compiles in `jobs`
    processes (0: one a core) instead, and gives the folder. Raises MixMoEError with no GPU."""
    import torch

    if not torch.cuda.is_available():
        raise MixMoEError("the benchmark needs a CUDA device", "none that torch sees")
    if plan.warm:
        warm.run(plan, jobs or os.cpu_count() or 1, gpus(torch.cuda.device_count()), environment())
        return plan.folder
    device = torch.cuda.get_device_name(0)
    begin = time.monotonic()
    attempt, status, journal = plan, 0, plan.journal
    for _ in range(MOST_STARTS):
        size = journal.stat().st_size if journal.exists() and attempt.resume else 0
        command = [sys.executable, "-m", "benchmarks.worker"]
        status = subprocess.run(
            command, input=attempt.dump(), text=True, env=environment()
        ).returncode
        spent = time.monotonic() - begin
        stuck = not journal.exists() or journal.stat().st_size == size
        if status == 0 or stuck or spent >= plan.seconds:
            break
        print(f"the worker ended with status {status}; starting the next", flush=True)
        attempt = dataclasses.replace(attempt, resume=True, seconds=plan.seconds - spent)
    print(f"measured for {time.monotonic() - begin:.0f} s, starts included", flush=True)
    return collect(plan, device, status)


def gpus(count: int) -> list[str]:
    """The names of the devices that torch counts, for CUDA_VISIBLE_DEVICES."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return named.split(",") if named else [str(number) for number in range(count)]


def environment() -> dict[str, str]:
    """The caller's, with this source tree importable."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def collect(plan: Plan, device: str, status: int = 0) -> Path:
    """The results file from the journal."""
    journal = results.Journal(plan.journal, resume=True)
    path = plan.folder / f"{file_name(device)}{plan.suffix}.json"
    left_out = [dataclasses.asdict(item) for item in journal.left_out]
    about = results.meta(device, plan.commit or None)
    more = {"left_out": left_out, "roofs": journal.roofs, "worker_status": status}
    more |= {"spent": {name: round(took, 1) for name, took in journal.spent.items()}}
    results.save(path, about, journal.rows, not_reached=not_reached(plan, journal.rows), **more)
    return path


def merge(paths: Sequence[Path], folder: Path) -> Path:
    """One results file of several runs' (`merged.merged`), <folder>/<device>.json."""
    about, rows = merged.merged([(path.name, *results.load(path)) for path in paths])
    path = folder / f"{file_name(about['device'])}.json"
    if path.resolve() in [source.resolve() for source in paths]:
        raise ValueError(f"{path} would be written over: give another --out")
    results.save(path, about, rows)
    return path


def not_reached(plan: Plan, rows: Sequence[results.Row]) -> list[str]:
    """The planned cases that the time did not suffice for, a line per shape and routing."""
    reached = {(row.shape, row.routing, row.tokens) for row in rows}
    lines = []
    for shape in plan.shapes:
        for skew in plan.skews:
            counts = [t for t in plan.tokens if (shape, skew, t) not in reached]
            if counts:
                lines.append(f"{shape}, {skew} routing: T {', '.join(map(str, counts))}")
    return lines


def file_name(device: str) -> str:
    """ "NVIDIA H200" -> "h200"."""
    return "-".join(device.lower().replace("nvidia", "").split()) or "gpu"


def show(
    path: Path, *, detail: bool = False, markdown: Path | None = None, plots: Path | None = None
) -> None:
    """Prints the tables of a results file; `markdown` is a document whose tables are replaced,
    `plots` a folder that its plots are drawn into (of any device, under the same names)."""
    about, rows = results.load(path)
    if markdown is not None:
        tables.update(markdown, about, rows)
    report.print_all(about, rows, detail=detail)
    if plots is not None:
        for drawn in draw_all(about, rows, plots):
            print(f"drew {drawn}")
