"""PNG plots: time against tokens per shape, and the roofline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .registry import OURS
from .report import STAGES, column_of, ours_of
from .results import Row

INK, GRID = "#d1242f", "#d0d7de"
RIVAL_INKS = (
    "#0969da",
    "#1a7f37",
    "#8250df",
    "#bf8700",
    "#57606a",
    "#0a7ea4",
    "#953800",
    "#e85aad",
    "#24292f",
    "#6fdd8b",
)
MARKS = {"stage1": "o", "stage2": "s", "layer": "^"}


def draw_all(about: dict[str, Any], rows: Sequence[Row], folder: Path) -> list[Path]:
    """Every plot that the rows allow; clean L2 and uniform routing where there is a choice."""
    chosen = [row for row in rows if row.flush == "clean" and row.routing == "uniform"]
    chosen = chosen or list(rows)
    shapes = list(dict.fromkeys(row.shape for row in chosen))
    drawn = [
        draw_times(about, [r for r in chosen if r.shape == shape], folder / f"time-{shape}.png")
        for shape in shapes
    ]
    if chosen:
        drawn.append(draw_roofline(about, chosen, folder / "roofline.png"))
    return drawn


def draw_times(about: dict[str, Any], rows: Sequence[Row], path: Path) -> Path:
    """Three panels, one per stage: time against tokens, ours in red, the roof dashed."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(17, 5.4), sharex=True)
    rivals = list(dict.fromkeys(column_of(row) for row in rows if row.provider != OURS))
    ink = {name: RIVAL_INKS[i % len(RIVAL_INKS)] for i, name in enumerate(rivals)}
    for axis, stage in zip(axes, STAGES, strict=True):
        of_stage = [row for row in rows if row.stage == stage]
        for name in rivals:
            line(axis, [row for row in of_stage if column_of(row) == name], ink[name], name)
        ours = ours_of(of_stage).values()
        mine = sorted((item.default for item in ours), key=lambda row: row.tokens)
        line(axis, mine, INK, OURS, width=2.6)
        line(axis, [item.fastest for item in ours if item.extra], "#fa7a8a", f"{OURS}, fastest")
        if roof := mine or sorted(fastest_by_tokens(of_stage), key=lambda row: row.tokens):
            axis.plot(
                [r.tokens for r in roof],
                [r.roof_us for r in roof],
                "--",
                color="black",
                linewidth=1,
                label="roof (measured)",
            )
        dress(axis, f"{rows[0].shape} {stage}", "tokens", "us")
    labels = {
        text: handle
        for axis in axes
        for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        labels.values(), labels.keys(), loc="lower center", ncol=5, fontsize=8, frameon=False
    )
    sign(figure, about, "L2 clean, uniform routing")
    figure.tight_layout(rect=(0, 0.12, 1, 0.95))
    return finish(plt, figure, path)


def draw_roofline(about: dict[str, Any], rows: Sequence[Row], path: Path) -> Path:
    """TFLOP/s against FLOP per byte for ours and the best rivals, under the measured roofs."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(9.5, 6.4))
    best: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        at = (row.shape, row.tokens, row.stage)
        if row.provider != OURS and (at not in best or row.us < best[at].us):
            best[at] = row
    for name, points, ink, size in (
        ("best rival", list(best.values()), RIVAL_INKS[0], 22),
        (OURS, [item.default for item in ours_of(rows).values()], INK, 34),
    ):
        for stage in STAGES:
            here = [row for row in points if row.stage == stage]
            axis.scatter(
                [row.flops / row.nbytes for row in here],
                [row.flops / row.us * 1e-6 for row in here],
                s=size,
                color=ink,
                marker=MARKS[stage],
                alpha=0.75,
                linewidths=0,
                label=f"{name}, {stage}",
            )
    dress(axis, "roofline", "FLOP per byte of the active experts' floor", "TFLOP/s", base=10)
    roof_lines(axis, about, rows)
    axis.legend(fontsize=8, frameon=False)
    sign(figure, about, "L2 clean, uniform routing")
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    return finish(plt, figure, path)


def roof_lines(axis: Any, about: dict[str, Any], rows: Sequence[Row]) -> None:
    """The bandwidth of the largest read and the dense rates."""
    roofs = about.get("roofs", {})
    reads = [read for read in roofs.get("read_us", []) if read["us"] > 0]
    low, high = (f(row.flops / row.nbytes for row in rows) for f in (min, max))
    if reads:
        largest = max(reads, key=lambda read: read["bytes"])
        rate = largest["bytes"] / largest["us"] * 1e-6  # TB/s
        label = f"read {rate:.2f} TB/s"
        axis.plot([low, high], [low * rate, high * rate], "k--", linewidth=1, label=label)
    for kind, rate in roofs.get("dense_tflops", {}).items():
        axis.axhline(rate, color="black", linestyle=":", linewidth=1)
        axis.text(low, rate * 1.06, f"dense {kind} GEMM {rate:.0f} TFLOP/s", fontsize=8)
    rates = [row.flops / row.us * 1e-6 for row in rows]
    axis.set_ylim(min(rates) / 2, 3 * max([*rates, *roofs.get("dense_tflops", {}).values()]))


def line(axis: Any, rows: Sequence[Row], ink: str, name: str, width: float = 1.3) -> None:
    """One provider's curve."""
    ordered = sorted(rows, key=lambda row: row.tokens)
    if ordered:
        axis.plot(
            [row.tokens for row in ordered],
            [row.us for row in ordered],
            "o-",
            color=ink,
            markersize=3,
            linewidth=width,
            label=name,
        )


def fastest_by_tokens(rows: Sequence[Row]) -> list[Row]:
    """The fastest row of each token count."""
    best: dict[int, Row] = {}
    for row in rows:
        if row.tokens not in best or row.us < best[row.tokens].us:
            best[row.tokens] = row
    return list(best.values())


def dress(axis: Any, title: str, x: str, y: str, base: int = 2) -> None:
    """Logarithmic axes, grid, labels."""
    axis.set_xscale("log", base=base)
    axis.set_yscale("log")
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter("{x:g}")
    axis.set_title(title, fontsize=11)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(True, which="major", color=GRID, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def sign(figure: Any, about: dict[str, Any], how: str) -> None:
    """Device, versions, commit and date, on the picture itself."""
    text = (
        f"{about['device']}, torch {about['torch']}, triton {about['triton']}, {how}, "
        f"commit {about['commit'][:12]}, {about['date']}"
    )
    figure.suptitle(text, fontsize=9, color="#57606a")


def pyplot() -> Any:
    """matplotlib without a display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def finish(plt: Any, figure: Any, path: Path) -> Path:
    """Writes and closes the figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
