"""The checks find what they are for, and stay silent on correct code."""

from __future__ import annotations

import numpy as np
import pytest

import cdnasim
from cdnasim import Memory

from .support import compile_ir, program, run

LOAD, STORE, WAIT = (
    ' global_load_dword v2, v1, s[4:5]\n',
    ' global_store_dword v1, v2, s[6:7]\n',
    ' s_waitcnt vmcnt(0)\n',
)
DATA = np.arange(64, dtype=np.uint32)


def kinds(body: str, data: np.ndarray = DATA, **options: object) -> dict[str, int]:
    return dict(run(body, data, 256, **options)[1].kinds)  # type: ignore[arg-type]


def test_missing_wait() -> None:
    out, report = run(LOAD + WAIT + STORE, DATA, hazard=True)
    assert (out == DATA).all() and report.ok
    out, report = run(LOAD + STORE, DATA, hazard=True)
    assert (out == 0x7FBADBAD).all() and report.kinds['hazard'] == 1
    assert 'v2 is read before the wait for its load' in report.findings[0]
    with pytest.raises(cdnasim.CheckError, match='v2 is read'):
        report.check()


def test_wait_count_too_high() -> None:
    two = LOAD + ' global_load_dword v3, v1, s[4:5]\n'
    assert not kinds(two + ' s_waitcnt vmcnt(1)\n' + STORE, hazard=True)
    assert kinds(two + ' s_waitcnt vmcnt(1)\n' + STORE.replace('v2', 'v3'), hazard=True) == {
        'hazard': 1
    }


def test_scalar_loads_need_a_full_wait() -> None:
    body = (
        ' s_load_dword s8, s[4:5], 0x0\n s_load_dword s9, s[4:5], 0x4\n s_waitcnt lgkmcnt({})\n'
        ' v_mov_b32_e32 v2, s8\n'
    ) + STORE
    assert not kinds(body.format(0), hazard=True)
    assert kinds(body.format(1), hazard=True) == {'hazard': 1}


@pytest.mark.parametrize(
    'body,needs',
    [
        (' v_readfirstlane_b32 s8, v0\n{}buffer_load_dword v2, v1, s[4:7], s8 offen\n', 5),
        (' v_cmp_lt_u32_e32 vcc, 3, v0\n{}v_div_fmas_f32 v2, v3, v3, v3\n', 4),
        (
            (
                ' v_mov_b32_e32 v3, v0\n'
                '{}v_mov_b32_dpp v2, v3 quad_perm:[1,0,3,2] row_mask:0xf bank_mask:0xf\n'
            ),
            2,
        ),
        (
            (
                ' v_cmpx_lt_u32_e32 vcc, 3, v0\n'
                '{}v_mov_b32_dpp v2, v9 quad_perm:[1,0,3,2] row_mask:0xf bank_mask:0xf\n'
            ),
            5,
        ),
        (' v_readfirstlane_b32 s8, v0\n{}v_readlane_b32 s9, v0, s8\n', 4),
        (' v_cmp_lt_u32_e32 vcc, 3, v0\n{}v_cndmask_b32_e32 v2, v3, v9, vcc\n', 2),
        (' v_mov_b32_e32 v3, v0\n{}v_readfirstlane_b32 s8, v3\n', 1),
        (' v_cmpx_lt_u32_e32 vcc, 3, v0\n{}v_readlane_b32 s9, v0, 3\n', 4),
        (' v_exp_f32_e32 v3, v0\n{}v_add_f32_e32 v2, v3, v3\n', 1),
        (' v_mfma_f32_16x16x16_f16 v[8:11], v[4:5], v[6:7], 0\n{}v_add_f32_e32 v2, v8, v8\n', 8),
        (
            (
                ' v_mfma_f32_16x16x16_f16 v[8:11], v[4:5], v[6:7], 0\n'
                '{}global_store_dword v1, v8, s[6:7]\n'
            ),
            8,
        ),
        (
            (
                ' v_mfma_f32_16x16x16_f16 v[8:11], v[4:5], v[6:7], 0\n'
                '{}v_mfma_f32_16x16x16_f16 v[12:15], v[8:9], v[6:7], 0\n'
            ),
            8,
        ),
    ],
)
def test_wait_states(body: str, needs: int) -> None:
    """The state count in the ISA's table is enough, one fewer is a finding."""
    prologue = (
        ' v_mov_b32_e32 v3, 1.0\n v_mov_b32_e32 v9, 1.0\n'
        + ''.join(f' v_mov_b32_e32 v{k}, 0\n' for k in (4, 5, 6, 7))
        + ' s_nop 7\n'
    )
    idle = f' s_nop {needs - 1}\n '
    fewer = f' s_nop {needs - 2}\n ' if needs > 1 else ' '
    assert 'wait-states' not in kinds(
        prologue + body.format(idle),
        np.zeros(4096, np.uint32),
        hazard=True,
        memory=Memory(lenient=True),
    )
    assert (
        kinds(
            prologue + body.format(fewer),
            np.zeros(4096, np.uint32),
            hazard=True,
            memory=Memory(lenient=True),
        ).get('wait-states')
        == 1
    )


def test_chained_accumulators_need_no_wait() -> None:
    body = (
        ' v_mfma_f32_16x16x16_f16 v[8:11], v[4:5], v[6:7], 0\n'
        ' v_mfma_f32_16x16x16_f16 v[8:11], v[4:5], v[6:7], v[8:11]\n'
    )
    assert not kinds(body, hazard=True)


MATRIX = [
    ('16x16x16f16', '<4 x half>', 4, 'gfx942'),
    ('16x16x16f16', '<4 x half>', 4, 'gfx950'),
    ('32x32x8f16', '<4 x half>', 16, 'gfx942'),
    ('32x32x8f16', '<4 x half>', 16, 'gfx950'),
    ('4x4x4f16', '<4 x half>', 4, 'gfx942'),
    ('4x4x4f16', '<4 x half>', 4, 'gfx950'),
    ('16x16x4f32', 'float', 4, 'gfx942'),
    ('32x32x2f32', 'float', 16, 'gfx950'),
    ('16x16x32.f16', '<8 x half>', 4, 'gfx950'),
    ('32x32x16.f16', '<8 x half>', 16, 'gfx950'),
]


@pytest.mark.parametrize('name,ty,n,arch', MATRIX)
def test_matrix_wait_states_are_llvms(name: str, ty: str, n: int, arch: str) -> None:
    """LLVM pads a use of a matrix result with s_nop: that many states pass, one fewer is a
    finding.
    """
    vec = f'<{n} x float>'
    ir = f'''define amdgpu_kernel void @k(ptr addrspace(1) %out, ptr addrspace(1) %in) #0 {{
  %p = getelementptr {ty}, ptr addrspace(1) %in, i32 1
  %a = load {ty}, ptr addrspace(1) %in
  %b = load {ty}, ptr addrspace(1) %p
  %d = call {vec} @llvm.amdgcn.mfma.f32.{name}({ty} %a, {ty} %b, {vec} zeroinitializer,
                                               i32 0, i32 0, i32 0)
  %e = fadd {vec} %d, %d
  store {vec} %e, ptr addrspace(1) %out
  ret void
}}
declare {vec} @llvm.amdgcn.mfma.f32.{name}({ty}, {ty}, {vec}, i32, i32, i32)
attributes #0 = {{ "amdgpu-flat-work-group-size"="64,64" }}
'''
    text = compile_ir(ir, arch)
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if 'v_mfma' in line)
    nops = [i for i in range(at, len(lines)) if 's_nop' in lines[i]]
    data, out = np.zeros(4096, np.float16), np.zeros(4096, np.float32)
    assert cdnasim.load(text).launch(1, 64, [out, data], hazard=True).ok
    last = nops[-1]
    count = int(lines[last].split()[1])
    lines[last] = f'\ts_nop {count - 1}' if count else ''
    assert (
        cdnasim.load('\n'.join(lines)).launch(1, 64, [out, data], hazard=True).kinds['wait-states']
        >= 1
    )


RACE = (
    ' ds_write_b32 v1, v0\n s_waitcnt lgkmcnt(0)\n{} v_xor_b32_e32 v3, 0x100, v1\n'
    ' ds_read_b32 v2, v3\n s_waitcnt lgkmcnt(0)\n'
)


@pytest.mark.parametrize('schedule', ('lockstep', 'serial', 'reverse', 'random'))
@pytest.mark.parametrize('hazard', (False, True))
def test_lds_race(schedule: str, hazard: bool) -> None:
    """Found under every schedule, also those that give the right numbers."""
    assert (
        kinds(RACE.format(''), block=128, races=True, schedule=schedule, hazard=hazard)['race'] >= 1
    )
    assert not kinds(
        RACE.format(' s_barrier\n'), block=128, races=True, schedule=schedule, hazard=hazard
    )


def test_race_inside_one_wave_instruction() -> None:
    """Two waves write one byte with the same instruction."""
    assert kinds(' v_mov_b32_e32 v3, 0\n ds_write_b32 v3, v0\n', block=128, races=True) == {
        'race': 1
    }
    assert not kinds(' ds_write_b32 v1, v0\n', block=128, races=True)


def test_global_races() -> None:
    own = ' s_lshl_b32 s8, s2, 8\n v_add_u32_e32 v3, s8, v1\n global_store_dword v3, v0, s[6:7]\n'
    assert not kinds(own, grid=4, races=True)
    assert kinds(own.replace('s2, 8', 's2, 7'), grid=4, races=True)['race'] >= 1
    within = (
        ' global_store_dword v1, v0, s[6:7]\n s_waitcnt vmcnt(0)\n'
        '{} v_xor_b32_e32 v3, 0x100, v1\n global_load_dword v2, v3, s[6:7]\n s_waitcnt vmcnt(0)\n'
    )
    assert kinds(within.format(''), block=128, races=True)['race'] >= 1
    assert not kinds(within.format(' s_barrier\n'), block=128, races=True)


def test_what_lies_past_a_buffers_end_is_no_race() -> None:
    """Two waves store at one offset: a race, unless the descriptor ends before it, whatever lies
    there in memory."""
    body = (
        ' s_mov_b32 s8, s6\n s_mov_b32 s9, s7\n s_mov_b32 s10, {}\n s_mov_b32 s11, 0x27000\n'
        ' v_mov_b32_e32 v3, 128\n buffer_store_dword v0, v3, s[8:11], 0 offen\n'
    )
    assert kinds(body.format(256), block=128, races=True)['race'] >= 1
    assert not kinds(body.format(128), block=128, races=True)


def test_load_into_lds_without_wait() -> None:
    """The barrier does not wait for a load into LDS: only vmcnt does."""
    setup = (
        ' s_mov_b32 s8, s4\n s_mov_b32 s9, s5\n s_mov_b32 s10, 256\n'
        ' s_mov_b32 s11, 0x27000\n s_mov_b32 m0, 0\n s_nop 0\n'
        ' buffer_load_dword v1, s[8:11], 0 offen lds\n'
    )
    rest = (
        ' s_barrier\n ds_read_b32 v2, v1\n s_waitcnt lgkmcnt(0)\n'
        ' global_store_dword v1, v2, s[6:7]\n'
    )
    out, report = run(setup + ' s_waitcnt vmcnt(0)\n' + rest, DATA, hazard=True)
    assert (out == DATA).all() and report.ok
    out, _ = run(setup + rest, DATA, hazard=True)
    assert (out == 0xA5A5A5A5).all()


def test_uninitialised() -> None:
    assert kinds(' ds_read_b32 v2, v1\n s_waitcnt lgkmcnt(0)\n', uninitialised=True) == {
        'uninitialised': 1
    }
    assert not kinds(
        ' ds_write_b32 v1, v0\n ds_read_b32 v2, v1\n s_waitcnt lgkmcnt(0)\n', uninitialised=True
    )
    assert kinds(' v_add_u32_e32 v2, v0, v9\n', uninitialised=True) == {'uninitialised': 1}
    memory = Memory()
    fresh, out = memory.alloc(256, 'fresh'), np.zeros(64, np.uint32)
    pointers = np.array([fresh, memory.alloc(out)], np.uint64).tobytes()
    for body, expected in (
        (LOAD + WAIT, 1),
        (' global_store_dword v1, v0, s[4:5]\n' + WAIT + LOAD + WAIT, 0),
    ):
        report = cdnasim.load(program(body)).launch(
            1, 64, pointers, memory=memory, uninitialised=True
        )
        assert report.kinds['uninitialised'] == expected


def test_race_granularity() -> None:
    """Waves that own different bytes of one dword do not race; the same byte does."""
    byte = ' v_lshlrev_b32_e32 v3, 1, v0\n v_lshrrev_b32_e32 v4, 6, v0\n v_and_b32_e32 v5, 63, v0\n'
    own = byte + ' v_lshl_add_u32 v3, v5, 1, v4\n ds_write_b8 v3, v0\n'
    assert not kinds(own, block=128, races=True)
    same = byte + ' v_lshl_add_u32 v3, v5, 1, 0\n ds_write_b8 v3, v0\n'
    assert kinds(same, block=128, races=True) == {'race': 1}
    mixed = ' ds_write_b32 v1, v0\n s_waitcnt lgkmcnt(0)\n' + own.replace(
        'v3, v5', 'v6, v5'
    ).replace('b8 v3', 'b8 v6')
    assert kinds(mixed, block=128, races=True)['race'] >= 1
