"""Command line: `cdnasim run` and `cdnasim coverage`. Entry point: cdnasim.cli:main."""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .errors import AsmError, CdnaSimError, LaunchError
from .machine import Options, load
from .report import Report

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help='Run AMD CDNA3 and CDNA4 kernels with no AMD GPU. All figures are simulated.',
)
console = Console(soft_wrap=True)
Flag = Annotated[bool, typer.Option()]


PICTURES = ('.png', '.svg', '.pdf')
ARGUMENTS = 'f32:1024, f32:64x64:rand, x.npy, 3, 1.5'


def parse_size(text: str) -> tuple[int, ...]:
    """`4,2` or `4x2` -> (4, 2). LaunchError for what is no size."""
    try:
        return tuple(int(x) for x in text.replace('x', ',').split(','))
    except ValueError:
        raise LaunchError(f'{text!r} is no size: write one like 4 or 4,2') from None


def parse_argument(text: str) -> Any:
    """`f32:1024` zeros, `f32:1024:rand` random, `x.npy` a file, `1.5` or `0x10` a number.
    LaunchError for what is none of them.
    """
    try:
        return argument(text)
    except (ValueError, KeyError, TypeError, OSError, EOFError, MemoryError, OverflowError) as e:
        raise LaunchError(f'--arg {text!r} ({e}): write one like {ARGUMENTS}') from None


def argument(text: str) -> Any:
    import numpy as np

    if text.endswith('.npy'):
        return np.ascontiguousarray(np.load(text))
    if ':' in text:
        kind, size, *fill = text.split(':')
        name = {'f': 'float', 'i': 'int', 'u': 'uint'}[kind[0]] + kind[1:]
        shape = parse_size(size)
        if not fill:
            return np.zeros(shape, name)
        rng = np.random.default_rng(0)
        if fill[0] == 'rand':
            return (
                rng.standard_normal(shape).astype(name)
                if kind[0] == 'f'
                else rng.integers(0, 100, shape).astype(name)
            )
        return np.full(shape, float(fill[0])).astype(name)
    return (
        float(text) if any(c in text for c in '.eE') and not text.startswith('0x') else int(text, 0)
    )


@contextlib.contextmanager
def script_arguments(path: Path, args: list[str]) -> Iterator[None]:
    saved, saved_path = sys.argv, list(sys.path)
    sys.argv, sys.path[:0] = [str(path), *args], [str(path.parent)]
    try:
        yield
    finally:
        sys.argv, sys.path[:] = saved, saved_path


def run_script(
    path: Path, args: list[str], options: Options, arch: str, lenient: bool
) -> tuple[list[Any], str]:
    """Run a FlyDSL program -> (launches, how the script ended)."""
    from .flydsl import session

    if not path.is_file():
        raise AsmError(f'{path} does not exist')
    ended = 'ended normally'
    with (
        session(arch, options=options, keep_going=True, lenient=lenient) as s,
        script_arguments(path, args),
    ):
        try:
            runpy.run_path(str(path), run_name='__main__')
        except SystemExit as e:
            ended = 'ended normally' if e.code in (None, 0) else f'exited with {e.code}'
        except Exception as e:  # noqa: BLE001
            ended = f'raised {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ""}'
    return s.launches, ended


def launches_table(launches: list[Any]) -> Table:
    t = Table(title='launches (simulated)', title_justify='left')
    for name in ('#', 'kernel', 'grid', 'block', 'wave-instructions', 'host s', 'verdict'):
        t.add_column(name, overflow='fold')
    for k, r in enumerate(launches):
        n = f'{r.report.instructions:,}' if r.report else '-'
        sec = f'{r.report.seconds:.2f}' if r.report else '-'
        style = 'green' if r.verdict == 'pass' else 'red'
        t.add_row(
            str(k), r.name, str(r.grid), str(r.block), n, sec, f'[{style}]{r.verdict}[/{style}]'
        )
    return t


def refuse_ignored(ctx: typer.Context, file: Path) -> None:
    """LaunchError for options that a script, or a kernel, would leave unread."""
    script = file.suffix == '.py'
    if ctx.args and not script:
        raise LaunchError(f'{" ".join(ctx.args)}: only a script.py takes options of its own')
    for name in ('grid', 'block', 'arg', 'kernel') if script else ('arch', 'lenient'):
        source = ctx.get_parameter_source(name)
        if source is not None and source.name == 'COMMANDLINE':
            other = 'a kernel, not for a script' if script else 'a script, not for a kernel'
            raise LaunchError(f'--{name} is for {other}')


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """What cdnasim raises on purpose, as one line and exit status 1."""
    try:
        yield
    except CdnaSimError as e:
        console.print(
            f'[red]{type(e).__name__}[/red]: {escape(str(e))}', highlight=False, emoji=False
        )
        raise typer.Exit(1) from e


def can_write(option: str, path: Path | None, suffixes: tuple[str, ...] = ()) -> None:
    """LaunchError, before anything runs, for a file that could not be written after it."""
    if path is None:
        return
    if suffixes and path.suffix not in suffixes:
        raise LaunchError(f'{option} {path}: a name that ends in {", ".join(suffixes)} is expected')
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise LaunchError(f'{option} {path}: no file can be written there')


def write_outputs(report: Report, json_out: Path | None, timeline_out: Path | None) -> None:
    if json_out:
        json_out.write_text(report.to_json())
        console.print(f'wrote {json_out}')
    if timeline_out:
        from .show import timeline

        timeline(report, timeline_out)
        console.print(f'wrote {timeline_out}')


@app.command(context_settings={'allow_extra_args': True, 'ignore_unknown_options': True})
def run(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(help='kernel.s, a code object, or a FlyDSL script.py')],
    grid: Annotated[str, typer.Option(help='workgroups, e.g. 4,2')] = '1',
    block: Annotated[str, typer.Option(help='work-items of a workgroup')] = '64',
    arg: Annotated[
        list[str] | None,
        typer.Option(help=f'kernel argument: {ARGUMENTS}'),
    ] = None,
    kernel: Annotated[str | None, typer.Option(help='which kernel of the file')] = None,
    arch: Annotated[str, typer.Option(help='gfx950 or gfx942, for scripts')] = 'gfx950',
    hazard: Flag = True,
    races: Flag = True,
    uninitialised: Flag = False,
    lenient: Flag = False,
    schedule: Annotated[str, typer.Option(help='lockstep, serial, reverse, random')] = 'serial',
    seed: int = 0,
    budget: int = Options().budget,
    json_out: Annotated[Path | None, typer.Option('--json', help='write the (last) report')] = None,
    timeline: Annotated[
        Path | None, typer.Option(help='write a PNG of the first workgroup')
    ] = None,
) -> None:
    """Run a kernel, or a FlyDSL program, with the checks on. Exit status 1 when something was
    found.
    """
    with one_line():
        options = Options(hazard, races, uninitialised, schedule, seed=seed, budget=budget)
        refuse_ignored(ctx, file)
        can_write('--json', json_out)
        can_write('--timeline', timeline, PICTURES)
        if file.suffix == '.py':
            ok = run_program(file, ctx.args, options, arch, lenient, json_out, timeline)
        else:
            values = [parse_argument(a) for a in (arg or [])]
            report = load(file, kernel).launch(
                parse_size(grid), parse_size(block), values, options=options
            )
            console.print(report)
            write_outputs(report, json_out, timeline)
            ok = report.ok
    raise typer.Exit(0 if ok else 1)


def run_program(
    file: Path,
    args: list[str],
    options: Options,
    arch: str,
    lenient: bool,
    json_out: Path | None,
    timeline: Path | None,
) -> bool:
    launches, ended = run_script(file, args, options, arch, lenient)
    if launches:
        console.print(launches_table(launches))
    for k, r in enumerate(launches):
        for line in r.report.findings if r.report else [str(r.error)]:
            console.print(f'#{k} {line}', style='red', highlight=False, markup=False)
    done = [r.report for r in launches if r.report]
    if done:
        console.print(done[-1])
        write_outputs(done[-1], json_out, timeline)
    console.print(f'script {ended}', markup=False, highlight=False)
    if not launches and ended == 'ended normally':
        console.print('no kernel was launched', style='red')
        return False
    return ended == 'ended normally' and all(r.verdict == 'pass' for r in launches)


@app.command()
def coverage(
    gpu: Annotated[str, typer.Argument(help='gfx942 or gfx950')] = 'gfx950',
    missing: Flag = True,
    json_out: Annotated[Path | None, typer.Option('--json')] = None,
) -> None:
    """List LLVM's instruction table for a GPU against what the simulator implements."""
    from .coverage import coverage as measure

    with one_line():
        can_write('--json', json_out)
        c = measure(gpu)
    t = Table(
        title=f'{gpu}: {len(c.implemented)} of {c.total} mnemonics, {c.forms} encodings',
        title_justify='left',
    )
    for name in ('family', 'implemented', 'all'):
        t.add_column(name, justify='left' if name == 'family' else 'right')
    for name, (have, total) in c.families().items():
        t.add_row(name, str(have), str(total), style='' if have == total else 'yellow')
    console.print(t)
    if missing:
        for name, why in [*c.missing.items(), *c.left_out.items()]:
            console.print(f'  {name}: {why}', highlight=False)
    if json_out:
        json_out.write_text(
            json.dumps(
                {
                    'gpu': gpu,
                    'implemented': c.implemented,
                    'missing': c.missing,
                    'left_out': c.left_out,
                },
                indent=1,
            )
        )


def main() -> None:
    app()


if __name__ == '__main__':
    main()
