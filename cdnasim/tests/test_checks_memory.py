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


# A load into LDS: work-item w's dword goes to LDS byte 4 w, and M0 holds its wave's first byte.
FILL = (
    ' s_mov_b32 s8, s4\n s_mov_b32 s9, s5\n s_mov_b32 s10, 4096\n s_mov_b32 s11, 0x27000\n'
    ' v_readfirstlane_b32 s12, v1\n s_nop 4\n s_mov_b32 m0, s12\n s_nop 0\n'
    ' buffer_load_dword v1, s[8:11], 0 offen lds\n'
)
READ, WRITE = ' ds_read_b32 v2, v1\n', ' ds_write_b32 v1, v0\n'
LANDED, DONE = ' s_waitcnt vmcnt(0)\n', ' s_waitcnt lgkmcnt(0)\n'


@pytest.mark.parametrize('races', (False, True))
@pytest.mark.parametrize(
    'body,fixed,what',
    [
        (FILL + READ + DONE, FILL + LANDED + READ + DONE, 'read before'),
        (FILL + READ + LANDED + DONE, FILL + LANDED + READ + DONE, 'read before'),
        (
            WRITE + DONE + FILL + READ + DONE,
            WRITE + DONE + FILL + LANDED + READ + DONE,
            'read before',
        ),
        (FILL + WRITE + DONE, FILL + LANDED + WRITE + DONE, 'written before'),
        (
            FILL + ' ds_add_u32 v1, v0\n' + DONE,
            FILL + LANDED + ' ds_add_u32 v1, v0\n',
            'written before',
        ),
        (
            WRITE + DONE + READ + FILL + LANDED + DONE,
            WRITE + DONE + READ + DONE + FILL + LANDED,
            'filled by a load before',
        ),
        (WRITE + FILL + LANDED + DONE, WRITE + DONE + FILL + LANDED, 'filled by a load before'),
    ],
)
def test_lds_bytes_with_a_load_in_flight(body: str, fixed: str, what: str, races: bool) -> None:
    report = run(body, DATA, 1024, block=128, hazard=True, races=races)[1]
    assert report.kinds == {'hazard': 1} and what in report.findings[0]
    assert run(fixed, DATA, 1024, block=128, hazard=True, races=races)[1].ok


def test_other_lds_bytes_are_free_while_a_load_is_in_flight() -> None:
    other = ' v_add_u32_e32 v3, {:#x}, v1\n ds_write_b32 v3, v0\n'
    assert not kinds(FILL + other.format(0x100) + DONE + LANDED)
    assert kinds(FILL + other.format(0xFC) + DONE + LANDED) == {'hazard': 1}
    assert not kinds(other.format(0x100) + FILL + DONE + LANDED)
    assert kinds(other.format(0xFC) + FILL + DONE + LANDED) == {'hazard': 1}
    # Between two rows of bytes that the load fills: the ranges meet, the bytes do not.
    odd = ' s_mov_b64 exec, 0x55555555\n'
    gaps = ' v_add_u32_e32 v3, 4, v1\n' + odd + FILL + ' ds_write_b32 v3, v0\n' + DONE + LANDED
    assert not kinds(gaps)
    assert kinds(gaps.replace(', 4, v1', ', 8, v1')) == {'hazard': 1}


def test_a_wait_lands_the_first_of_two_loads_into_lds() -> None:
    second = ' s_add_u32 m0, s12, 0x100\n s_nop 0\n buffer_load_dword v1, s[8:11], 0 offen lds\n'
    body = FILL + second + ' s_waitcnt vmcnt({})\n ds_read_b32 v2, v1{}\n' + DONE
    assert not kinds(body.format(1, ''))
    assert kinds(body.format(1, ' offset:256')) == {'hazard': 1}
    assert kinds(body.format(2, '')) == {'hazard': 1}
    assert not kinds(body.format(0, ' offset:256'))
    again = FILL + second.replace('0x100', '0') + ' s_waitcnt vmcnt({})\n' + READ + DONE
    assert kinds(again.format(1)) == {'hazard': 1} and not kinds(again.format(0))


def test_bytes_that_are_no_dwords() -> None:
    byte = ' v_mov_b32_e32 v3, {}\n' + FILL + ' ds_read_u16 v2, v3\n' + DONE + LANDED
    assert kinds(byte.format(254)) == {'hazard': 1}
    assert not kinds(byte.format(256))
    assert kinds(byte.format(253).replace('u16', 'u8')) == {'hazard': 1}
