"""Races through scalar loads and atomics, and registers and LDS bytes with a load in flight."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from .support import run

DATA = np.arange(1024, dtype=np.uint32)
ALL: dict[str, Any] = {'hazard': True, 'races': True, 'schedule': 'serial'}


def kinds(body: str, **options: Any) -> dict[str, int]:
    return dict(run(body, DATA, 1024, **{**ALL, **options})[1].kinds)


@pytest.mark.parametrize('hazard', (False, True))
def test_lds_atomics_of_two_waves_are_no_race(hazard: bool) -> None:
    add = ' v_mov_b32_e32 v3, 0\n ds_add_u32 v3, v0\n s_waitcnt lgkmcnt(0)\n'
    read = ' ds_read_b32 v2, v3\n s_waitcnt lgkmcnt(0)\n'
    assert not kinds(add, block=128, hazard=hazard)
    assert not kinds(add + ' s_barrier\n' + read, block=128, hazard=hazard)
    assert kinds(add + read, block=128, hazard=hazard)['race'] >= 1


SCALAR_LOAD = ' s_load_dword s8, s[4:5], 0x0\n{} s_waitcnt lgkmcnt(0)\n'


def test_scalar_register_written_while_its_load_is_in_flight() -> None:
    for other in (' s_mov_b32 s8, 1\n', ' v_readfirstlane_b32 s8, v0\n'):
        report = run(SCALAR_LOAD.format(other), DATA, **ALL)[1]
        assert 's8 is written again before the wait for its load' in report.findings[0]
        assert not kinds(SCALAR_LOAD.format('') + other)
    assert not kinds(SCALAR_LOAD.format(' s_mov_b32 s9, 1\n'))


STORE_OWN = (
    ' s_lshl_b32 s8, s2, 2\n v_mov_b32_e32 v3, s8\n v_mov_b32_e32 v4, 1\n'
    ' global_store_dword v3, v4, s[6:7]\n s_waitcnt vmcnt(0)\n'
)


@pytest.mark.parametrize('schedule', ('serial', 'lockstep', 'reverse'))
def test_scalar_load_of_what_another_workgroup_stores(schedule: str) -> None:
    load = ' s_load_dword s9, {}, 0x{:x}\n s_waitcnt lgkmcnt(0)\n'
    assert kinds(STORE_OWN + load.format('s[6:7]', 4), grid=2, schedule=schedule) == {'race': 1}
    assert not kinds(STORE_OWN + load.format('s[6:7]', 8), grid=2, schedule=schedule)
    assert not kinds(STORE_OWN + load.format('s[4:5]', 4), grid=2, schedule=schedule)


def test_scalar_buffer_load_is_cut_by_its_descriptor() -> None:
    body = (
        STORE_OWN + ' s_mov_b32 s12, s6\n s_mov_b32 s13, s7\n s_mov_b32 s14, {}\n'
        ' s_mov_b32 s15, 0x27000\n s_buffer_load_dwordx2 s[16:17], s[12:15], 0x4\n'
        ' s_waitcnt lgkmcnt(0)\n'
    )
    # From byte 4 on: with 8 bytes, workgroup 0 reads what workgroup 1 stores; with 4, nothing.
    assert kinds(body.format(8), grid=2) == {'race': 1}
    assert not kinds(body.format(4), grid=2)


ATOMIC = ' global_atomic_add v3, v4, s[6:7]\n s_waitcnt vmcnt(0)\n'
PLAIN = (
    ' global_load_dword v5, v3, s[6:7]\n s_waitcnt vmcnt(0)\n',
    ' global_store_dword v3, v4, s[6:7]\n s_waitcnt vmcnt(0)\n',
)


@pytest.mark.parametrize('schedule', ('serial', 'reverse'))
@pytest.mark.parametrize('plain', PLAIN)
def test_atomic_against_plain_access_in_either_order(plain: str, schedule: str) -> None:
    """Workgroup 0 performs the atomic, workgroup 1 the plain access; two schedules, two orders."""
    body = (
        ' {}\n v_mov_b32_e32 v4, 1\n s_cmp_eq_u32 s2, 0\n s_cbranch_scc0 L1\n'
        + ATOMIC
        + ' s_endpgm\nL1:\n'
        + plain
    )
    same, own = 'v_mov_b32_e32 v3, 0', 's_lshl_b32 s8, s2, 2\n v_mov_b32_e32 v3, s8'
    assert kinds(body.format(same), grid=2, schedule=schedule)['race'] >= 1
    assert not kinds(body.format(own), grid=2, schedule=schedule)


def test_atomics_of_many_workgroups_are_no_race() -> None:
    body = ' v_mov_b32_e32 v3, 0\n v_mov_b32_e32 v4, 1\n' + ATOMIC
    assert not kinds(body, grid=5, block=128)
    assert kinds(body + PLAIN[0], grid=5)['race'] >= 1
    assert not kinds(body + PLAIN[0], grid=1)
