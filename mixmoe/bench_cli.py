"""`mixmoe bench`: ours beside the rivals on this machine's GPU."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from mixmoe.errors import MixMoEError
from mixmoe.shapes import counts, listed

app = typer.Typer(add_completion=False, rich_markup_mode="rich")
RECIPES = "a8w4"


@app.command()
def bench(
    rivals: Annotated[str, typer.Option(help="all, none, or plug-ins: humming,deepgemm")] = "all",
    shape: Annotated[str, typer.Option(help="all, or names: dsv3_tp8,gptoss120b")] = "all",
    tokens: Annotated[str, typer.Option(help="all (1 .. 16384), table, or counts: 1,8,64")] = "all",
    rival_tokens: Annotated[str, typer.Option(help="counts at which rivals run too")] = "all",
    routing: Annotated[str, typer.Option(help="uniform, zipf or both")] = "both",
    stages: Annotated[str, typer.Option(help="of stage1,stage2,layer")] = "stage1,stage2,layer",
    flush: Annotated[str, typer.Option(help="L2 before each call: clean, dirty or both")] = "both",
    recipes: Annotated[str, typer.Option(help="of ours: a8w4,a16w4,...")] = RECIPES,
    seconds: Annotated[float, typer.Option(help="stop measuring after this long")] = 480.0,
    out: Annotated[
        Path | None, typer.Option(help="folder, default benchmarks/results; --show: for plots")
    ] = None,
    commit: Annotated[str, typer.Option(help="name the commit, where there is no checkout")] = "",
    resume: Annotated[bool, typer.Option(help="keep what the last run measured")] = False,
    warm: Annotated[bool, typer.Option(help="only compile, time nothing")] = False,
    jobs: Annotated[int, typer.Option(help="with --warm: processes, 0: one a core")] = 0,
    shard: Annotated[str, typer.Option(help="0/2: every second shape from the first on")] = "",
    merge: Annotated[str, typer.Option(help="files of shards, a.json,b.json, into one")] = "",
    detail: Annotated[bool, typer.Option(help="print every provider's times")] = False,
    show: Annotated[Path | None, typer.Option(help="print a results file, run nothing")] = None,
    markdown: Annotated[Path | None, typer.Option(help="document for the tables shown")] = None,
) -> None:
    """Measure stage 1, stage 2 and the layer, cold L2, CUDA graphs, rivals interleaved.

    Writes <out>/<device>.json and PNG plots beside it. Rivals that are not installed, or cannot do
    a case, are named with the reason.
    """
    run = _benchmarks()
    folder = out or run.RESULTS
    with _refusing():
        if show is not None:
            run.show(show, detail=detail, markdown=markdown, plots=out)
            return
        if merge:
            path = run.merge([Path(name) for name in listed(merge)], folder)
            run.show(path, detail=detail, markdown=markdown, plots=folder)
            typer.echo(f"wrote {path}")
            return
        plan = _planned(
            shape, tokens, rival_tokens, routing, flush, stages=tuple(listed(stages)),
            rivals=rivals, recipes=tuple(listed(recipes)), seconds=seconds, out=str(folder),
            commit=commit, resume=resume, warm=warm,
        )  # fmt: skip
        plan = plan.share(shard) if shard else plan
    path = run.execute(plan, jobs)
    if not warm and not shard:  # a shard's tables and plots are the merged file's
        run.show(path, detail=detail, plots=folder)
    typer.echo(f"wrote {path}")


def _planned(
    shape: str, tokens: str, rival_tokens: str, routing: str, flush: str, **options: Any
) -> Any:
    """The options as a plan; what they name must be there."""
    from benchmarks.plan import Plan
    from benchmarks.shapes import SHAPES, TABLE_TOKENS, TOKENS

    def numbers(text: str) -> tuple[int, ...]:
        named = {"all": TOKENS, "table": TABLE_TOKENS}
        return named[text] if text in named else tuple(counts(text))

    return Plan(
        shapes=tuple(SHAPES) if shape == "all" else tuple(listed(shape)),
        tokens=numbers(tokens),
        rival_tokens=None if rival_tokens == "all" else numbers(rival_tokens),
        skews=("uniform", "zipf") if routing == "both" else tuple(listed(routing)),
        flushes=("clean", "dirty") if flush == "both" else tuple(listed(flush)),
        **options,
    )


@contextmanager
def _refusing() -> Iterator[None]:
    """What is refused, or is not there, is one line on standard error and exit code 2."""
    try:
        yield
    except (ValueError, RuntimeError, OSError) as error:
        typer.echo(f"mixmoe: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from error


def _benchmarks():  # type: ignore[no-untyped-def]
    """The benchmark package, which is in the source tree and not in the wheel."""
    root = Path(__file__).parents[1]
    if (root / "benchmarks" / "registry.py").is_file() and str(root) not in sys.path:
        sys.path.insert(0, str(root))  # a console script does not look where it is run
    try:
        from benchmarks import run
    except ModuleNotFoundError as missing:
        if missing.name != "benchmarks":
            raise
        raise MixMoEError(
            "the benchmark and its rivals live in the source tree",
            "an installed mixmoe",
            "run it from the root of a checkout",
        ) from missing
    return run
