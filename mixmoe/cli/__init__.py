"""The command line: ``mixmoe run | check | info | inspect | build``, ``bench`` where it is present.

One module per command. A broken rule is one line on standard error and exit code 2.
"""

import sys
from importlib import import_module
from importlib.util import find_spec

try:
    import rich  # noqa: F401
    import typer
except ModuleNotFoundError as missing:
    message = f"mixmoe: {missing.name} is not installed: pip install '.[cli]' in a checkout"
    raise SystemExit(message) from None

from mixmoe.cli import build, check, info, inspect, run
from mixmoe.errors import MixMoEError

MOUNTED = ("bench_cli", "tune_cli")  # typer apps of their own, mounted where they are installed

app = typer.Typer(
    help="Mixed-precision Mixture-of-Experts inference.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for command in (run.run, check.check, info.info, inspect.inspect, build.build):
    app.command()(command)
for mounted in MOUNTED:
    if find_spec(f"mixmoe.{mounted}") is not None:
        app.add_typer(import_module(f"mixmoe.{mounted}").app)


def main() -> None:
    """The console entry: every MixMoEError as one line, exit code 2."""
    try:
        app()
    except MixMoEError as error:
        line = " ".join(str(error).split())
        print(f"mixmoe: {line}", file=sys.stderr)
        raise SystemExit(2) from None
