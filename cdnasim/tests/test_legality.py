"""What no assembler accepts for a GPU is refused before the kernel starts."""

from __future__ import annotations

import numpy as np
import pytest

from cdnasim.errors import AsmError, UnsupportedError

from .support import run

DATA = np.zeros(1024, np.uint32)
BUFFER = ' s_mov_b32 s8, s4\n s_mov_b32 s9, s5\n s_mov_b32 s10, 4096\n s_mov_b32 s11, 0x27000\n'
LDS16 = BUFFER + ' s_mov_b32 m0, 0\n s_nop 0\n buffer_load_dwordx4 v1, s[8:11], 0 offen lds\n'
ONLY_GFX950 = (
    ' v_permlane16_swap_b32 v4, v5\n',
    ' v_mfma_f32_16x16x32_f16 v[8:11], v[12:15], v[16:19], 0\n',
    ' v_cvt_scalef32_pk_fp4_f32 v4, v5, v6, v7\n',
    ' ds_read_b64_tr_b8 v[4:5], v1\n',
    ' v_bitop3_b32 v4, v5, v6, v7 bitop3:0x40\n',
    LDS16,
)


@pytest.mark.parametrize('body', ONLY_GFX950)
def test_instructions_of_gfx950_are_refused_on_gfx942(body: str) -> None:
    run(body, DATA, arch='gfx950')
    with pytest.raises(UnsupportedError, match='gfx942 has no such instruction: `') as e:
        run(body, DATA, arch='gfx942')
    assert body.splitlines()[-1].strip() in str(e.value)


def test_instructions_of_gfx942_are_refused_on_gfx950() -> None:
    body = ' v_mfma_f32_16x16x8_xf32 v[8:11], v[4:5], v[6:7], 0\n'
    run(body, DATA, arch='gfx942')
    with pytest.raises(UnsupportedError, match='v_mfma_f32_16x16x8_xf32'):
        run(body, DATA, arch='gfx950')


@pytest.mark.parametrize('arch', ('gfx942', 'gfx950'))
def test_both_spellings_of_matrix_instructions(arch: str) -> None:
    for name in ('16x16x16_f16', '16x16x16f16'):
        run(f' v_mfma_f32_{name} v[8:11], v[4:5], v[6:7], 0\n', DATA, arch=arch)
    run(LDS16.replace('x4', ''), DATA, arch=arch)  # four bytes: both GPUs have it


@pytest.mark.parametrize(
    'legal,illegal,what',
    [
        (' v_mov_b32_e32 v255, 7\n', ' v_mov_b32_e32 v256, 7\n', 'register 256'),
        (' ds_read_b64 v[254:255], v1\n', ' ds_read_b64 v[256:257], v1\n', 'register 257'),
        (' ds_write_b32 v1, v0 offset:2000\n', ' ds_write_b32 v1, v0 offset:70000\n', 'offset'),
        (' s_waitcnt vmcnt(63)\n', ' s_waitcnt vmcnt(64)\n', 'vmcnt 64'),
        (' s_waitcnt lgkmcnt(15)\n', ' s_waitcnt lgkmcnt(16)\n', 'lgkmcnt 16'),
    ],
)
def test_numbers_too_large_for_their_field(legal: str, illegal: str, what: str) -> None:
    run(legal, DATA)
    with pytest.raises(AsmError, match=what):
        run(illegal, DATA)


def test_s_nop_has_four_bits() -> None:
    """s_nop 99 is s_nop 3: four states, and the result of this matrix instruction takes eight."""
    body = (
        ' v_mfma_f32_16x16x16_f16 v[8:11], v[4:5], v[6:7], 0\n s_nop {}\n'
        ' v_add_f32_e32 v2, v8, v8\n'
    )
    assert run(body.format(99), DATA, hazard=True)[1].kinds['wait-states'] == 1
    assert run(body.format(15), DATA, hazard=True)[1].ok
