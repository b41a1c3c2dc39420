"""What the CDNA tests share: simulated runs of the backend, judged by the check engine."""

from dataclasses import replace

from cdnasim import flydsl as simulator
from mixmoe import verify
from mixmoe.backends.cdna import cdna
from mixmoe.spec import Recipe

RECIPES = ("a4w4", "a8w4_mx", "a8w8_mx")
CASES = {case.name: case for case in verify.CASES}


def simulate(schedule="serial", seed=0, arch="gfx950"):
    """A session that checks hazards and races, and keeps going so that findings can be listed."""
    return simulator.session(
        arch, hazard=True, races=True, schedule=schedule, seed=seed, keep_going=True
    )


def findings(session):
    """Everything the simulator holds against a session's launches, register spills included."""
    launches = (x for x in session.launches if x.verdict != "pass")
    bad = [f"{x.name}: {x.verdict} {x.error or ''}" for x in launches]
    reports = [(x.name, x.report) for x in session.launches if x.report is not None]
    bad += [f"{name}: spills registers" for name, r in reports if r.counters.scratch_bytes]
    return bad + ([repr(session.error)] if session.error else [])


def judge(recipe, case, session, **changes):
    """Rows of one case by name, with fields of the case changed; all must be judged."""
    case = replace(CASES[case], **changes)
    rows = list(verify.judge(cdna(), recipe, Recipe.named(recipe), case))
    assert session.launches or not case.tokens
    return rows


def failures(rows):
    """Rows that are no pass."""
    return [row for row in rows if not row.ok]
