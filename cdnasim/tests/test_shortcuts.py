"""What the simulator leaves out because it knows the answer must not change any."""

from __future__ import annotations

import numpy as np
import pytest

import cdnasim
from cdnasim import numerics as nm
from cdnasim.isa import fragment
from cdnasim.isa.fragment import SPAN, Fragment, product, run_length
from cdnasim.isa.memop import in_order
from cdnasim.isa.salu import ARRAYS, BIN
from cdnasim.isa.valu_int import perm_same, v_perm

from .support import program, run

RNG = np.random.default_rng(7)
u32, u64 = np.uint32, np.uint64


def fp4(waves: int, share: int, spread: int) -> Fragment:
    """Random fp4 rows whose four blocks have scales up to 2^spread."""
    codes = RNG.integers(0, 16, (waves // share, 1, 16, 4, 32))
    scale = np.exp2(RNG.integers(0, spread + 1, (waves // share, 1, 16, 4, 1)))
    scale[..., 0, :], scale[..., 1, :] = 1, 2.0**spread
    x = (nm.FP4.table[codes] * scale).astype(np.float32)
    return Fragment(x.reshape(-1, 1, 16, 128), share, SPAN['fp4'] + spread)


def exactly(a: Fragment, b: Fragment) -> np.ndarray:
    return np.matmul(a.whole(), b.whole().swapaxes(-1, -2))


@pytest.mark.parametrize('shares', [(1, 1), (4, 1), (1, 4), (2, 8), (8, 4), (1, 3), (2, 3)])
def test_product_in_f32_is_exact(shares: tuple[int, int]) -> None:
    a, b = (fp4(24, s, 4) for s in shares)
    got = product(a, b, 24)
    assert got.dtype == np.float32 and (got == exactly(a, b)).all()


def test_product_that_f32_would_round(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = fp4(4, 1, 12), fp4(4, 1, 12)
    assert (product(a, b, 4) == exactly(a, b)).all()
    monkeypatch.setattr(fragment, 'EXACT_BITS', 99)
    assert (product(a, b, 4) != exactly(a, b)).any()


def test_waves_that_hold_the_same_operand() -> None:
    raw = RNG.integers(0, 1 << 32, (4, 64, 4), dtype=u64).astype(u32).repeat(3, 0)
    row = RNG.integers(0, 1 << 32, (2, 64), dtype=u64).astype(u32).repeat(6, 0)
    assert run_length(raw, []) == 3 and run_length(raw, [row]) == 3
    row[4, 63] += 1
    assert run_length(raw, [row]) == 1


NESTED = '''
 v_lshrrev_b32_e32 v3, 6, v0
 v_readfirstlane_b32 s8, v3
 v_mov_b32_e32 v9, 7
 v_mov_b32_e32 v10, v0
 s_mov_b32 s9, 0
.Lloop:
 v_add_u32_e32 v9, v9, v0
 s_add_u32 s9, s9, s8
 s_bitcmp1_b32 s8, 0
 s_cbranch_scc0 .Leven
 v_add_u32_e32 v10, 0x100, v10
 s_cmp_gt_u32 s8, 4
 s_cbranch_scc1 .Leven
 v_xor_b32_e32 v9, 1, v9
.Leven:
 s_sub_u32 s8, s8, 1
 s_cmp_lg_u32 s8, -1
 s_cbranch_scc1 .Lloop
 v_lshl_add_u32 v9, v10, 16, v9
 v_add_u32_e32 v9, s9, v9
 global_store_dword v1, v9, s[6:7]
'''


def test_divergence_copies_what_changes() -> None:
    """Loops of different length with branches inside: all waves at once or each alone."""
    together, alone = (
        run(NESTED, np.zeros(64, u32), 1024, block=1024, **options)
        for options in ({}, {'schedule': 'serial'})
    )
    want = np.empty(1024, u32)
    for lane in range(1024):
        v9, v10, total = 7, lane, 0
        for s in range(lane >> 6, -1, -1):
            v9, total = v9 + lane, total + s
            if s & 1:
                v10 += 0x100
                v9 ^= int(s <= 4)
        want[lane] = ((v10 << 16) + v9 + total) & 0xFFFFFFFF
    assert (together[0] == want).all() and (alone[0] == want).all()
    assert (together[1].counts == alone[1].counts).all()


def test_findings_come_back_on_a_known_path() -> None:
    body = ' global_load_dword v2, v1, s[4:5]\n v_add_u32_e32 v3, v2, v2\n s_waitcnt vmcnt(0)\n'
    kernel, args = cdnasim.load(program(body)), [np.zeros(64, u32), np.zeros(64, u32)]
    first, second = (kernel.launch(3, 64, args, hazard=True, batch_waves=1) for _ in range(2))
    assert first.findings == second.findings and first.kinds['hazard'] == 1
    fixed = body.replace(' v_add', ' s_waitcnt vmcnt(0)\n v_add')
    assert cdnasim.load(program(fixed)).launch(3, 64, args, hazard=True).ok


BYTE_OF = '''
 v_lshlrev_b32_e32 v3, 4, v0
 ds_write_b128 v3, v[4:7]
 s_waitcnt lgkmcnt(0)
 v_xor_b32_e32 v8, {other}, v3
 ds_write_b8 v8, v4 offset:5
'''


@pytest.mark.parametrize(('other', 'races'), [(0, 0), (0x400, 1)])
def test_race_of_a_byte_with_sixteen(other: int, races: int) -> None:
    """Cells that were 16 bytes wide are divided and still know who wrote them."""
    report = run(BYTE_OF.format(other=other), np.zeros(64, u32), block=128, races=True)[1]
    assert report.kinds['race'] == races
    if races:
        assert 'x128' in report.findings[0]  # one byte per lane


READ_LATE = (
    ' global_load_dword v2, v1, s[6:7]\n s_waitcnt vmcnt(0)\n'
    '{} global_store_dword v3, v0, s[6:7]\n'
)


def test_race_with_a_read_that_was_kept_for_later() -> None:
    swap, own = (f' v_xor_b32_e32 v3, {k:#x}, v1\n' for k in (0x100, 0))
    for move, races in ((swap, 1), (own, 0), (swap + ' s_barrier\n', 0)):
        report = run(READ_LATE.format(move), np.zeros(64, u32), 128, block=128, races=True)[1]
        assert report.kinds['race'] == races


def test_order_of_atomics() -> None:
    for top in (3, 50, 1 << 20, (1 << 62) - 1):
        addr = RNG.integers(0, top, 500)
        order, ranked = in_order(addr)
        assert (order == np.argsort(addr, kind='stable')).all()
        assert (np.diff(ranked) == np.diff(addr[order])).all()


@pytest.mark.parametrize('op', ARRAYS)
def test_scalar_instructions_on_arrays(op: str) -> None:
    bits, a_bits, _, fn, _ = BIN[op]
    fast, rule = ARRAYS[op]
    mask = (1 << bits) - 1
    a = RNG.integers(0, (1 << a_bits) - 1, 400, dtype=u64)
    b = np.where(RNG.random(400) < 0.5, RNG.integers(0, 1 << 32, 400, dtype=u64), u64(0x50003))
    want = np.array([fn(int(x), int(y)) & mask for x, y in zip(a, b, strict=True)], u64)
    assert (fast(a, b) & u64(mask) == want).all()
    if rule is not None:
        scc = [BIN[op][4](int(x), int(y), 0) for x, y in zip(a, b, strict=True)]
        assert (rule(a, b) == scc).all()


def test_byte_permutes() -> None:
    a, b, sel = RNG.integers(0, 1 << 32, (3, 2, 64), dtype=u64).astype(u32)
    sel = (sel & u32(0x0F0F0F0F)) | (sel & u32(0x80000000))
    want = [
        int(perm_same(x, y, int(s))) for x, y, s in zip(a.flat, b.flat, sel.flat, strict=True)
    ]
    assert v_perm(a, b, sel).ravel().tolist() == want
    one, two = u32(0x80FF017F), u32(0x00C3A596)
    want = [int(perm_same(one, two, int(s))) for s in sel.flat]
    assert v_perm(one, two, sel).ravel().tolist() == want
