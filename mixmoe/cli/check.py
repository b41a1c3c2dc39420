"""``mixmoe check``: a backend against float64, every recipe x stage x edge case."""

import json
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mixmoe import backends, verify
from mixmoe.backends import DEFAULT_FOR_DEVICE
from mixmoe.cli import simulated
from mixmoe.cli.info import cores
from mixmoe.cli.options import refuse_given
from mixmoe.errors import MixMoEError
from mixmoe.shapes import recipes_of


def check(
    ctx: typer.Context,
    backend: Annotated[str, typer.Option(help="which backend to judge")] = "cpu",
    recipe: Annotated[str, typer.Option(help="names, comma-separated; all of the matrix")] = "all",
    as_json: Annotated[bool, typer.Option("--json", help="JSON on standard output")] = False,
    device: Annotated[str | None, typer.Option(help="where; the backend's own by default")] = None,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="compiled kernels in cdnasim: no GPU needed")
    ] = False,
    target: Annotated[str, typer.Option(help="with --simulate: gfx950 or gfx942")] = "gfx950",
    cases: Annotated[
        str, typer.Option(help="with --simulate: few, all, or names with semicolons between")
    ] = "few",
    jobs: Annotated[
        int, typer.Option(min=0, help="with --simulate: processes; 0: one a core")
    ] = 0,
) -> None:
    """Judge a backend against float64 on the same quantised operands.

    Exit code 1 when any row exceeds its tolerance or nothing could be judged. A cell that the
    backend refuses is listed as refused and counts as neither passed nor failed. --simulate runs
    the cdna backend's compiled kernels in cdnasim, hazards and races checked: results are
    simulated.
    """
    names = None if recipe == "all" else recipes_of(recipe)
    verify.recipes(names)
    if simulate:
        if backend != "cdna":
            raise MixMoEError("--simulate runs the kernels of", backend, "--backend cdna")
        refuse_given(ctx, ("device",), "--simulate runs on no device of torch", "no --device")
        rows = run_simulated(target, names, cases, jobs or cores())
        device = f"{target}, simulated"
    else:
        rule = "only a simulation has this option"
        refuse_given(ctx, ("target", "cases", "jobs"), rule, "--simulate beside it")
        device = device or next((d for d, b in DEFAULT_FOR_DEVICE.items() if b == backend), "cpu")
        chosen = backends.pick(device, backend)
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


def run_simulated(
    target: str, names: list[str] | None, cases: str, jobs: int
) -> list[verify.Row]:
    """Rows of every recipe the architecture has kernels for, with a bar on standard error."""
    rows: list[verify.Row] = []
    chosen = simulated.chosen_cases(cases)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"simulating {target}", total=1000)
        for some, done in simulated.verify_simulated(target, names, chosen, jobs):
            rows += some
            bar.update(task, completed=done, description=f"simulating {target} {last(rows)}")
    return rows


def last(rows: list[verify.Row]) -> str:
    """The recipe that was judged last."""
    return next((row.recipe for row in reversed(rows) if not row.refused), "")


def show(rows: list[verify.Row], report: dict[str, object]) -> None:
    """A line per recipe: the row nearest to its tolerance for each stage; then each failure."""
    console = Console()
    title = f"{report['backend']} ({report['device']}) against float64: worst error above tolerance"
    table = Table(
        title=f"{title}, or values that differ", title_justify="left", box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0), collapse_padding=True,
    )  # fmt: skip
    table.add_column("recipe")
    stages_seen = {row.stage for row in rows}
    columns = [*verify.STAGES, *(s for s in (simulated.SIMULATOR,) if s in stages_seen)]
    for stage in columns:
        table.add_column(stage, justify="right")
    table.add_column("refused", justify="right")
    for name, stages in verify.summary(rows).items():
        refused = sum(row.refused for row in rows if row.recipe == name)
        cells = [cell(stages.get(stage)) for stage in columns]
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
    """Worst error above its tolerance, coloured; bit-for-bit stages count values."""
    if row is None:
        return "[yellow]-"
    text = short(row.worst) if row.tolerance else f"{row.worst:.0f}"
    text = f"[red]{text}[/]" if row.failed else text
    return f"{text}\n[dim]{short(row.tolerance)}" if row.tolerance else text


def short(value: float) -> str:
    """``2.0e-3``: a table of eight columns fits 80 characters."""
    return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e+")
