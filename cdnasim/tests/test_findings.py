"""Three bugs that cdnasim found in public kernels, as small programs of our own: each is caught,
and its fix is clean.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import cdnasim

FOLDER = Path(cdnasim.__file__).parent / 'examples' / 'findings'


def text(name: str, fixed: bool) -> str:
    """The program; a line marked `FIX: instruction` (or a commented instruction with `FIX:`) is
    replaced when fixed.
    """
    out = []
    for line in (FOLDER / f'{name}.s').read_text().splitlines():
        if fixed and 'FIX:' in line:
            fix = line.split('FIX:')[1].strip()
            line = (
                '\t' + fix
                if re.match(r'^s_\w+ ', fix)
                else line.replace('; s_barrier', 's_barrier')
            )
        out.append(line)
    return '\n'.join(out)


def softmax(x: np.ndarray) -> np.ndarray:
    """Of the four waves' first values, base 2, as the program computes it."""
    heads = x[::64].astype(np.float64)
    e = np.exp2(x.astype(np.float64) - heads.max())
    return e / np.exp2(heads - heads.max()).sum()


@pytest.mark.parametrize('fixed', (False, True))
@pytest.mark.parametrize('schedule', ('lockstep', 'serial', 'random'))
def test_softmax_reduce(schedule: str, fixed: bool) -> None:
    x, y = (
        np.random.default_rng(0).standard_normal(256).astype(np.float32),
        np.zeros(256, np.float32),
    )
    report = cdnasim.load(text('softmax_reduce', fixed)).launch(
        1, 256, [x, y], schedule=schedule, races=True, hazard=True
    )
    right = np.allclose(y, softmax(x), rtol=1e-5)
    assert report.ok == fixed and bool(report.kinds['race']) != fixed
    assert right == (fixed or schedule == 'lockstep') or schedule == 'random'


@pytest.mark.parametrize('fixed', (False, True))
def test_wait_count(fixed: bool) -> None:
    x, y = np.arange(768, dtype=np.uint32), np.zeros(64, np.uint32)
    report = cdnasim.load(text('wait_count', fixed)).launch(
        1, 64, [x, y], hazard=True, uninitialised=True
    )
    assert (y == x[:64] + x[256:320]).all() == fixed
    assert report.ok == fixed
    report = cdnasim.load(text('wait_count', fixed)).launch(1, 64, [x, y], hazard=True)
    assert report.ok == fixed and bool(report.kinds['hazard']) != fixed
    y[:] = 0  # memory that answers at once hides it
    cdnasim.load(text('wait_count', False)).launch(1, 64, [x, y])
    assert (y == x[:64] + x[256:320]).all()


@pytest.mark.parametrize('fixed', (False, True))
def test_lds_rows(fixed: bool) -> None:
    x, y = np.arange(512, dtype=np.uint32), np.zeros(256, np.uint32)
    report = cdnasim.load(text('lds_rows', fixed)).launch(
        1, 64, [x, y], hazard=True, uninitialised=True
    )
    want = x.reshape(8, 2, 32)[:, 1].reshape(-1)
    assert (y == want).all() == fixed
    assert report.ok == fixed and bool(report.kinds['uninitialised']) != fixed


@pytest.mark.parametrize('fixed', (False, True))
def test_compare_schedules(fixed: bool) -> None:
    """The race is a result that depends on the schedule; the fixed program gives the same bytes."""
    x, y = (
        np.random.default_rng(0).standard_normal(256).astype(np.float32),
        np.zeros(256, np.float32),
    )
    found, report = cdnasim.compare_schedules(
        cdnasim.load(text('softmax_reduce', fixed)), 1, 256, [x, y]
    )
    assert bool(found) != fixed
    assert np.allclose(y, softmax(x), rtol=1e-5) and report.waves == 4
    assert fixed or found[0].schedule == {'schedule': 'serial'}
