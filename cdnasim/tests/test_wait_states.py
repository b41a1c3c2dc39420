"""Wait states that LLVM 22 fills with s_nop (llc -run-pass=post-RA-hazard-rec, gfx950)."""

from __future__ import annotations

import numpy as np
import pytest

from .support import run

MFMA = ' v_mfma_f32_{} v[{}:{}], v[4:5], v[6:7], v[{}:{}]\n'
SMALL = MFMA.format('16x16x16_f16', 8, 11, 12, 15)
STORE = ' global_store_dwordx4 v2, v[8:11], s[6:7]\n'
BUFFER = ' buffer_store_dwordx3 v[8:10], v2, s[8:11], {} offen\n'
SETUP = (
    ' s_mov_b32 s8, s6\n s_mov_b32 s9, s7\n s_mov_b32 s10, 4096\n s_mov_b32 s11, 0x27000\n'
    ' s_mov_b32 s12, 0\n v_lshlrev_b32_e32 v2, 4, v0\n'
    + ''.join(f' v_mov_b32_e32 v{k}, 0\n' for k in range(4, 64))
    + ' s_nop 7\n'
)
RULES = [
    (' v_mov_b32_e32 v4, 1\n', SMALL, 2),
    (' v_mov_b32_e32 v6, 1\n', SMALL, 2),
    (' v_mov_b32_e32 v12, 1\n', SMALL, 2),
    (SMALL, ' v_mov_b32_e32 v12, 1\n', 3),
    (MFMA.format('4x4x4_16b_f16', 8, 11, 12, 15), ' v_mov_b32_e32 v12, 1\n', 1),
    (MFMA.format('32x32x8_f16', 16, 31, 32, 47), ' v_mov_b32_e32 v32, 1\n', 7),
    (STORE, ' v_mov_b32_e32 v8, 1\n', 2),
    (BUFFER.format(0), ' v_mov_b32_e32 v8, 1\n', 2),
    (BUFFER.format('s12'), ' v_mov_b32_e32 v8, 1\n', 0),
    (STORE.replace('x4 v2, v[8:11]', 'x2 v2, v[8:9]'), ' v_mov_b32_e32 v8, 1\n', 0),
    (' v_dot2_f32_f16 v4, v5, v6, v7\n', ' v_add_f32_e32 v8, v4, v4\n', 3),
    (' v_mov_b32_e32 v4, 1\n', ' v_permlane16_swap_b32 v4, v5\n', 2),
    (' v_mov_b32_e32 v5, 1\n', ' v_permlane32_swap_b32 v4, v5\n', 2),
    (SMALL, ' v_mov_b32_e32 v4, 1\n', 0),
    (' s_mov_b32 m0, 0\n', ' s_movrels_b32 s13, s12\n', 1),
    (
        ' s_setreg_imm32_b32 hwreg(HW_REG_MODE, 0, 4), 3\n',
        ' s_getreg_b32 s13, hwreg(HW_REG_MODE, 0, 4)\n',
        2,
    ),
]


@pytest.mark.parametrize('first,second,needs', RULES)
def test_states_that_llvm_inserts(first: str, second: str, needs: int) -> None:
    """That many are enough, one fewer is a finding."""
    for states in range(max(0, needs - 1), needs + 1):
        nop = f' s_nop {states - 1}\n' if states else ''
        report = run(SETUP + first + nop + second, np.zeros(1024, np.uint32), 1024, hazard=True)[1]
        assert report.kinds.get('wait-states', 0) == (states < needs)
