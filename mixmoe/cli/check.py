"""``mixmoe check``: a backend against float64, every recipe x stage x edge case."""

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mixmoe import backends, verify
from mixmoe.backends import DEFAULT_FOR_DEVICE


def check(
    backend: Annotated[str, typer.Option(help="which backend to judge")] = "cpu",
    recipe: Annotated[str, typer.Option(help="names, comma-separated; all of the matrix")] = "all",
    as_json: Annotated[bool, typer.Option("--json", help="JSON on standard output")] = False,
    device: Annotated[str | None, typer.Option(help="where; the backend's own by default")] = None,
) -> None:
    """Judge a backend against float64 on the same quantised operands.

    Exit code 1 when any row exceeds its tolerance or nothing could be judged. A cell that the
    backend refuses is listed as refused and counts as neither passed nor failed.
    """
    device = device or next((d for d, b in DEFAULT_FOR_DEVICE.items() if b == backend), "cpu")
    chosen = backends.pick(device, backend)
    names = None if recipe == "all" else [name.strip() for name in recipe.split(",")]
    verify.recipes(names)
    log = Console(stderr=True)
    with log.status("checking") as status:
        rows = list(verify.verify(chosen, names, device=device, progress=status.update))
    report = verify.report(rows, backend, device)
    if as_json:
        print(json.dumps(report, indent=1, allow_nan=False))
    else:
        show(rows, report)
    if report["failed"] or not report["judged"]:
        raise typer.Exit(1)


def show(rows: list[verify.Row], report: dict[str, object]) -> None:
    """A line per recipe: the row nearest to its tolerance for each stage; then each failure."""
    console = Console()
    title = f"{report['backend']} against float64: worst error, or values that differ, per stage"
    table = Table(title=title, title_justify="left")
    table.add_column("recipe")
    for stage in verify.STAGES:
        table.add_column(stage, justify="right")
    table.add_column("refused", justify="right")
    for name, stages in verify.summary(rows).items():
        refused = sum(row.refused for row in rows if row.recipe == name)
        cells = [cell(stages.get(stage)) for stage in verify.STAGES]
        table.add_row(name, *cells, f"[yellow]{refused}" if refused else "0")
    console.print(table)
    for row in rows:
        if row.failed:
            console.print(
                f"[red]failed[/] {row.recipe}, {row.case}, {row.stage}: {row.worst:.2e}, "
                f"tolerance {row.tolerance:.2e} {row.note}"
            )
    for reason in dict.fromkeys(f"{row.recipe}: {row.note}" for row in rows if row.refused):
        console.print(f"[yellow]refused[/] {reason}")
    colour = "red" if report["failed"] else "green"
    counts = ", ".join(f"{report[key]} {key}" for key in ("judged", "failed", "refused"))
    console.print(f"[{colour}]{counts}")


def cell(row: verify.Row | None) -> str:
    """Worst error, coloured; bit-for-bit stages count values."""
    if row is None:
        return "[yellow]-"
    text = f"{row.worst:.1e}" if row.tolerance else f"{row.worst:.0f}"
    return f"[red]{text}" if row.failed else text
