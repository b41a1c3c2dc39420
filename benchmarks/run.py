"""A run from start to end: worker processes until the plan is done, then results, table, plots."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from . import markdown as tables
from . import plots, report, results
from .plan import Plan

MOST_STARTS = 25
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def execute(plan: Plan) -> Path:
    """Measures and writes <out>/<device>.json; gives its path. Raises RuntimeError with no GPU."""
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("the benchmark needs a CUDA device, and torch sees none")
    device = torch.cuda.get_device_name(0)
    end = time.monotonic() + plan.seconds
    attempt, status, journal = plan, 0, plan.folder / "journal.jsonl"
    for _ in range(MOST_STARTS):
        size = journal.stat().st_size if journal.exists() and attempt.resume else 0
        command = [sys.executable, "-m", "benchmarks.worker"]
        status = subprocess.run(
            command, input=attempt.dump(), text=True, env=environment()
        ).returncode
        left = end - time.monotonic()
        stuck = not journal.exists() or journal.stat().st_size == size
        if status == 0 or stuck or left <= 0:
            break
        print(f"the worker ended with status {status}; starting the next", flush=True)
        attempt = dataclasses.replace(attempt, resume=True, seconds=left)
    return collect(plan, device, status)


def environment() -> dict[str, str]:
    """The caller's, with this source tree importable."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def collect(plan: Plan, device: str, status: int = 0) -> Path:
    """The results file from the journal."""
    journal = results.Journal(plan.folder / "journal.jsonl", resume=True)
    path = plan.folder / f"{file_name(device)}.json"
    left_out = [dataclasses.asdict(item) for item in journal.left_out]
    about = results.meta(device, plan.commit or None)
    more = {"left_out": left_out, "roofs": journal.roofs, "worker_status": status}
    results.save(path, about, journal.rows, not_reached=not_reached(plan, journal.rows), **more)
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


def show(path: Path, *, detail: bool = False, markdown: Path | None = None) -> None:
    """Prints the tables of a results file and draws its plots beside it; `markdown` is a document
    whose tables are replaced."""
    about, rows = results.load(path)
    report.print_all(about, rows, detail=detail)
    if markdown is not None:
        tables.update(markdown, about, rows)
    for drawn in plots.draw_all(about, rows, path.parent):
        print(f"drew {drawn}")
