"""cdnasim behind the command line: ``check --simulate``, ``inspect --backend cdna``, ``build``.

The library's one module that imports the simulator. Inside a session torch sees an AMD GPU that is
none: FlyDSL compiles for it, and each launch runs on the CPU or is only recorded.
"""

from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from io import StringIO
from typing import Any

from mixmoe import verify
from mixmoe.activations import swiglu
from mixmoe.errors import MixMoEError

TARGETS = ("gfx950", "gfx942")
SCHEDULES = ("serial", "reverse", "random", "lockstep")  # of waves; each finds other faults
SIMULATOR = "simulator"  # the stage of rows that say what a simulation held against a case
# Beyond verify.CASES, whose routes fill no more than one small tile of an expert.
CASES = (
    *verify.CASES,
    verify.Case("64 routes an expert", tokens=70, experts=2, topk=2, hidden=288, intermediate=96),
    verify.Case("128 routes of an expert", tokens=150, experts=1, topk=1, hidden=96,
                intermediate=64, act=swiglu(), bias=True),
)  # fmt: skip

# What the kernels of each recipe have of their own; the rest of CASES repeats it.
FEW = (
    "plain", "T=0", "T=1", "masked ids", "expert map", "tail 288 x 96", "tail 96 x 288",
    "tail 32 x 320", "bias", "swiglu", "weight on 1", "out f32, x f32", "rounding EVEN",
    "strided x and out, int32 ids", "64 routes an expert", "128 routes of an expert",
)  # fmt: skip


def known_target(target: str) -> str:
    """The target. Raises MixMoEError for one that is not simulated."""
    if target not in TARGETS:
        raise MixMoEError("unknown simulated target", target, ", ".join(TARGETS))
    return target


@contextmanager
def session(target: str, **options: Any) -> Iterator[Any]:
    """A ``cdnasim.flydsl.session``, without the lines that FlyDSL prints for each dump.

    Raises MixMoEError for an unknown target and where the simulator lacks what it needs.
    """
    known_target(target)
    try:
        from cdnasim import flydsl
        from cdnasim.errors import ToolError
    except ModuleNotFoundError as missing:
        absent = f"no {missing.name}"
        raise MixMoEError(
            "simulation needs cdnasim", absent, "pip install '.[sim,cdna]'"
        ) from None
    simulated = flydsl.session(target, **options)
    try:
        simulated.__enter__()
    except ToolError as error:
        raise MixMoEError("simulation needs a tool", str(error)) from None
    try:
        with redirect_stdout(StringIO()):
            yield simulated
    except BaseException as error:
        simulated.__exit__(type(error), error, error.__traceback__)
        raise
    simulated.__exit__(None, None, None)


def findings(simulated: Any) -> list[str]:
    """Races, hazards, stray loads, faults and register spills of a session's launches."""
    found = []
    for launch in simulated.launches:
        if launch.verdict != "pass":
            report = launch.report
            why = [launch.error] if report is None else [*report.findings, *report.stray_loads]
            found.append(f"{launch.name}: {launch.verdict}: {why[0] if why else ''}")
        elif launch.report.counters.scratch_bytes:
            found.append(f"{launch.name}: spills registers")
    return found + ([repr(simulated.error)] if simulated.error else [])


def judge(target: str, name: str, case: verify.Case) -> Iterator[verify.Row]:
    """Rows of one case through the compiled kernels, and one of what the simulator found."""
    from mixmoe.backends.cdna import cdna

    recipe = verify.recipes([name])[name]
    seed = sum(map(ord, name + case.name))
    options = {"schedule": SCHEDULES[seed % len(SCHEDULES)], "seed": seed}
    with session(target, hazard=True, races=True, keep_going=True, **options) as simulated:
        rows = list(verify.judge(cdna(), name, recipe, case))
    yield from rows
    if any(row.refused for row in rows):
        return
    found = findings(simulated)
    note = "; ".join(" ".join(line.split()) for line in found[:3])
    yield verify.Row(name, case.name, SIMULATOR, float(len(found)), 0.0, note)


def refusals(target: str, names: list[str] | None) -> dict[str, verify.Row | None]:
    """By recipe: the row that says why the architecture has no kernels for it, or None."""
    from mixmoe.backends.cdna import cdna

    found: dict[str, verify.Row | None] = {}
    with session(target, run=False):
        for name, recipe in verify.recipes(names).items():
            case = next(case for case in verify.CASES if verify.fits(case, recipe))
            try:
                verify.Trial(cdna(), recipe, verify.make_operands(case, recipe), "cpu")
                found[name] = None
            except MixMoEError as error:
                row = verify.Row(name, case.name, "check", 0.0, 0.0, str(error))
                found[name] = replace(row, refused=True)
    return found


def chosen_cases(names: str) -> tuple[verify.Case, ...]:
    """``few``, ``all``, or cases by name with semicolons between, as names hold commas."""
    known = {case.name: case for case in CASES}
    named = {"all": list(known), "few": list(FEW)}
    wanted = named.get(names) or [name.strip() for name in names.split(";")]
    for name in wanted:
        if name not in known:
            raise MixMoEError("unknown case", name, "; ".join(known))
    return tuple(known[name] for name in wanted)


def work(task: tuple[str, str, tuple[verify.Case, ...]]) -> list[verify.Row]:
    """Rows of several cases of a recipe: what one process does at a time."""
    import torch

    target, name, cases = task
    torch.set_num_threads(1)
    recipe = verify.recipes([name])[name]
    return [row for case in cases if verify.fits(case, recipe) for row in judge(target, name, case)]


def verify_simulated(
    target: str, names: list[str] | None, cases: tuple[verify.Case, ...], jobs: int
) -> Iterator[tuple[list[verify.Row], int]]:
    """(rows, share of 1000 that is done) as they come, in order of recipe and case.

    ``jobs`` processes, each with kernels compiled for itself; cases that share kernels stay
    together.
    """
    refused = refusals(target, names)
    yield [row for row in refused.values() if row is not None], 0
    group = max(1, -(-len(cases) // (2 * jobs)))
    tasks = [
        (target, name, cases[at : at + group])
        for name, row in refused.items()
        if row is None
        for at in range(0, len(cases), group)
    ]
    for done, rows in enumerate(results(tasks, jobs), 1):
        yield rows, 1000 * done // len(tasks)


def results(tasks: list[Any], jobs: int) -> Iterator[list[verify.Row]]:
    """``work`` of each task, in order."""
    if jobs == 1:
        yield from map(work, tasks)
        return
    from multiprocessing import get_context

    with get_context("spawn").Pool(jobs) as pool:  # torch and MLIR hold threads: no fork
        yield from pool.imap(work, tasks)
