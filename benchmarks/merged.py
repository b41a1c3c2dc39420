"""One results file of several: a plan's shares, measured each on a GPU of its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .results import Row

SAME = ("device", "torch", "triton", "rivals", "commit")
Loaded = tuple[str, dict[str, Any], list[Row]]  # name, meta, rows


def merged(files: Sequence[Loaded]) -> tuple[dict[str, Any], list[Row]]:
    """(meta, rows) of all. `parts` keeps what each run said of itself. ValueError where they are
    of different devices, versions or commits, or measured the same thing."""
    first = files[0][1]
    for name in SAME:
        seen = {file: about.get(name) for file, about, _ in files}
        if any(value != first.get(name) for value in seen.values()):
            raise ValueError(f"results of different {name} do not mix: {seen}")
    if first["commit"] == "unknown":
        raise ValueError("results of unknown commits may be of different ones: name it, --commit")
    rows = [row for _, _, found in files for row in found]
    refuse_twice(rows)
    abouts = [about for _, about, _ in files]
    about = {name: first[name] for name in SAME} | {
        "date": max(about["date"] for about in abouts),
        "left_out": joined(abouts, "left_out"),
        "not_reached": joined(abouts, "not_reached"),
        "roofs": roofs([about.get("roofs", {}) for about in abouts]),
        "parts": [part(*file) for file in files],
    }
    return about, rows


def refuse_twice(rows: Iterable[Row]) -> None:
    """ValueError when two rows are of the same thing: which one would hold?"""
    seen = set()
    for row in rows:
        way = (row.provider, row.recipe, row.accumulate, row.deterministic)
        at = (*way, row.shape, row.tokens, row.stage, row.routing, row.flush)
        if at in seen:
            raise ValueError(f"measured twice: {', '.join(map(str, at))}")
        seen.add(at)


def joined(abouts: Iterable[dict[str, Any]], name: str) -> list[Any]:
    """The lists of that name, each item once."""
    found: list[Any] = []
    for about in abouts:
        found += [item for item in about.get(name, []) if item not in found]
    return found


def roofs(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All reads and reductions, and of dense rates the highest: what no GPU of the run exceeded.
    The rows hold the roofs of their own GPU."""
    dense: dict[str, float] = {}
    for one in found:
        for kind, rate in one.get("dense_tflops", {}).items():
            dense[kind] = max(rate, dense.get(kind, 0.0))
    reads = [read for one in found for read in one.get("read_us", [])]
    reads.sort(key=lambda read: (read["flush"], read["bytes"]))
    reductions = [item for one in found for item in one.get("reduction_us", [])]
    return {"dense_tflops": dense, "read_us": reads, "reduction_us": reductions}


def part(name: str, about: dict[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """What a merged file keeps of one of its runs."""
    kept = {key: about[key] for key in ("date", "worker_status", "spent") if key in about}
    shapes = list(dict.fromkeys(row.shape for row in rows))
    dense = about.get("roofs", {}).get("dense_tflops", {})
    return {"file": name, "shapes": shapes, "rows": len(rows), "dense_tflops": dense} | kept
