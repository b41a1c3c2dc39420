"""The tables of docs/measured.md, written from a results file between two marks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .registry import OURS
from .report import STAGES, Ours, column_of, failures, left_out_lines, ours_of
from .results import Row, best_rival
from .shapes import TABLE_TOKENS

BEGIN, END = "<!-- benchmark tables: begin -->", "<!-- benchmark tables: end -->"


def update(path: Path, about: dict[str, Any], rows: Sequence[Row]) -> None:
    """Replaces what stands between the marks of `path`. ValueError when it has no marks."""
    text = path.read_text() if path.is_file() else ""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{path} must be a document with one line {BEGIN} and one line {END}")
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    path.write_text(f"{head}{BEGIN}\n\n{tables(about, rows)}\n\n{END}{tail}")


def tables(about: dict[str, Any], rows: Sequence[Row]) -> str:
    """Run, roofs, ours beside the best rival per shape, everybody side by side, errors."""
    parts = [heading(about), roofs_line(about)]
    for shape in dict.fromkeys(row.shape for row in rows):
        for routing in dict.fromkeys(row.routing for row in rows if row.shape == shape):
            for flush in ("clean", "dirty"):
                parts.append(beside_best(rows, shape, routing, flush))
    for stage in STAGES:
        parts.append(side_by_side(rows, stage))
    parts += [errors(rows), absent(about, rows)]
    return "\n\n".join(part for part in parts if part)


def heading(about: dict[str, Any]) -> str:
    """Device, versions, commit, date."""
    rivals = ", ".join(f"{name} {version}" for name, version in about.get("rivals", {}).items())
    runs = len(about.get("parts", []))
    device = about["device"] + (f" ({runs} runs, each of its own shapes)" if runs else "")
    return (
        f"{device}, torch {about['torch']}, triton {about['triton']}, {rivals}; "
        f"commit `{about['commit'][:12]}`, {about['date']}."
    )


def roofs_line(about: dict[str, Any]) -> str:
    """The measured rates of the run."""
    roofs = about.get("roofs", {})
    dense = ", ".join(f"{kind} {rate:.0f}" for kind, rate in roofs.get("dense_tflops", {}).items())
    reads = [read for read in roofs.get("read_us", []) if read["flush"] == "clean"]
    largest = max(reads, key=lambda read: read["bytes"], default=None)
    read = ""
    if largest:
        rate = largest["bytes"] / largest["us"] * 1e-6
        read = f"; a read of {largest['bytes'] / 1e6:.0f} MB at {rate:.2f} TB/s"
    return f"Roofs of this run: dense GEMM in TFLOP/s: {dense}{read}." if dense else ""


def beside_best(rows: Sequence[Row], shape: str, routing: str, flush: str) -> str:
    """Ours and the best rival per token count, us."""
    here = [r for r in rows if (r.shape, r.routing, r.flush) == (shape, routing, flush)]
    if not here:
        return ""
    ours, rivals = ours_of(here), best_rival(here)
    lines = [
        f"**{shape}, {routing} routing, {flush} L2** (us; roof / best rival / **mixmoe**, rival "
        "over mixmoe)",
        "",
        "| T | experts | " + " | ".join(STAGES) + " |",
        "|---|---|" + "---|" * len(STAGES),
    ]
    for tokens in sorted({row.tokens for row in here}):
        at = [(shape, tokens, stage, routing, flush) for stage in STAGES]
        experts = next(row.active_experts for row in here if row.tokens == tokens)
        cells = [beside(ours.get(key), rivals.get(key)) for key in at]
        lines.append(f"| {tokens} | {experts} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def beside(ours: Ours | None, rival: Row | None) -> str:
    """ "27 / 34.1 humming_fp8 / **31.0**, 1.10x", and the fastest of ours where it is not that."""
    known = ours.default if ours else rival
    if known is None:
        return "-"
    theirs = f"{rival.us:.1f} {rival.provider}" if rival else "-"
    if ours is None:
        return f"{known.roof_us:.1f} / {theirs} / -"
    gain = f", {rival.us / ours.default.us:.2f}x" if rival else ""
    extra = f" ({ours.extra})" if ours.extra else ""
    return f"{known.roof_us:.1f} / {theirs} / **{ours.default.us:.1f}**{gain}{extra}"


def side_by_side(rows: Sequence[Row], stage: str, shape: str = "dsv3_tp8") -> str:
    """Every provider at the token counts with a goal, clean L2, uniform routing."""
    here = [
        row
        for row in rows
        if (row.shape, row.stage, row.routing, row.flush) == (shape, stage, "uniform", "clean")
        and row.tokens in TABLE_TOKENS
    ]
    if not here:
        return ""
    counts = sorted({row.tokens for row in here})
    lines = [
        f"**{shape} {stage}, every provider** (us, half the quartile distance, rate; clean L2)",
        "",
        "| provider | " + " | ".join(f"T {tokens}" for tokens in counts) + " |",
        "|---|" + "---|" * len(counts),
    ]
    for column in dict.fromkeys(column_of(row) for row in here):
        found = {row.tokens: row for row in here if column_of(row) == column}
        cells = [
            f"{row.us:.1f} ±{row.spread / 2:.1f}, {row.rate}" if row else "-"
            for row in (found.get(tokens) for tokens in counts)
        ]
        lines.append(f"| {column} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def errors(rows: Sequence[Row]) -> str:
    """The worst sampled row of each provider and stage over the whole run."""
    worst: dict[tuple[str, str], Row] = {}
    for row in rows:
        at = (column_of(row), row.stage)
        if at not in worst or row.worst_row_error > worst[at].worst_row_error:
            worst[at] = row
    if not worst:
        return ""
    lines = [
        "**Worst row error** against float64 on the same quantised operands (sampled rows, all "
        "cases)",
        "",
        "| provider | " + " | ".join(STAGES) + " |",
        "|---|" + "---|" * len(STAGES),
    ]
    for column in dict.fromkeys(column for column, _ in worst):
        cells = []
        for stage in STAGES:
            found = worst.get((column, stage))
            where = f" ({found.shape} T {found.tokens})" if found else ""
            cells.append(f"{found.worst_row_error:.1e}{where}" if found else "-")
        lines.append(f"| {column} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def absent(about: dict[str, Any], rows: Sequence[Row]) -> str:
    """What the rivals' times leave out, and who did not run where."""
    lines = [f"* {line}" for line in dict.fromkeys(left_out_lines(rows))]
    lines += [f"* not run: {line}" for line in failures(about.get("left_out", []))]
    lines += [f"* out of time before: {line}" for line in about.get("not_reached", [])]
    whose = f"All of it is in {OURS}'s times." if lines else ""
    return "\n".join(["**Left out of the rivals' times, and cases not run.** " + whose, "", *lines])
