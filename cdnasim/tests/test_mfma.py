"""Every matrix instruction of gfx942 and gfx950 against scalar sums over AMD's published register
maps.

The maps below restate the formulas of the CDNA3 ISA, section 7.1.4 (and, for 8-bit operands of
*_f8f6f4, the register tables of composable_kernel's mx_mfma_op test), lane by lane and register by
register. The simulator gets there by reshapes.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import cdnasim
from cdnasim import numerics as nm

from .support import with_registers

DATA = Path(cdnasim.__file__).with_name('data')
NAME = re.compile(r'v_(s?)mf\w+?_(scale_)?(f32|i32|f64)_(\d+)x(\d+)x(\d+)_(?:(\d+)b_)?(\w+)')
BITS = {
    'f64': 64,
    'f32': 32,
    'xf32': 32,
    'f16': 16,
    'bf16': 16,
    'i8': 8,
    'fp8': 8,
    'bf8': 8,
    'fp6': 6,
    'bf6': 6,
    'fp4': 4,
}
RNG = np.random.default_rng(11)


def listed(gpu: str, sparse: bool) -> list[tuple[str, str]]:
    names = {line.split()[0] for line in (DATA / f'{gpu}.txt').read_text().splitlines()}
    start = 'v_smfmac' if sparse else 'v_mfma'
    return [(gpu, n) for n in sorted(names) if n.startswith(start)]


def a_map(lane: int, e: int, M: int, B: int, K: int, ty: str, wide: bool) -> tuple[int, int, int]:
    """-> (block, row, k) of element e of a lane (CDNA3 ISA 7.1.4.1)."""
    if wide and ty in ('fp8', 'bf8'):
        return 0, lane % M, e // 16 * (K // 2) + lane // M * 16 + e % 16
    per = K // (64 // (M * B))
    return lane // M % B, lane % M, per * (lane // (M * B)) + e


def d_map(lane: int, r: int, M: int, B: int, out: str) -> tuple[int, int, int]:
    """-> (block, row, column) of result register r (CDNA3 ISA 7.1.4.2, with H = 4, or 1 for
    f64).
    """
    H = 1 if out == 'f64' else 4
    BI = -(-64 // (M * M // H))
    MI = 64 // BI // M
    G = M // (H * MI)
    block = BI * (r // (G * H)) + lane // M % BI
    return block, H * (MI * (r // H % G) + lane // (M * BI)) + r % H, lane % M


def codes(ty: str, shape: tuple[int, ...], gpu: str) -> tuple[np.ndarray, np.ndarray]:
    """Random finite codes and their values."""
    if ty in ('f32', 'xf32'):
        x = (RNG.integers(-512, 512, shape) / 16).astype(np.float32)
        return x.view(np.uint32), x.astype(float)
    if ty == 'f64':
        x = RNG.standard_normal(shape)
        return x.view(np.uint64), x
    if ty in ('f16', 'bf16'):
        x = (RNG.integers(-128, 128, shape) / 16).astype(np.float32)
        bits = x.astype(np.float16).view(np.uint16) if ty == 'f16' else (x.view(np.uint32) >> 16)
        return bits, x.astype(float)
    if ty == 'i8':
        x = RNG.integers(-128, 128, shape)
        return x & 255, x.astype(float)
    fmt = nm.minifloat(ty, gpu)
    c = RNG.integers(0, 1 << fmt.bits, shape)
    c[~np.isfinite(fmt.table64[c])] = 0
    return c, fmt.table64[c]


def pack_lane(values: list[int], bits: int) -> np.ndarray:
    word = sum(int(v) << (bits * k) for k, v in enumerate(values))
    n = bits * len(values) // 32
    return np.array([word >> 32 * k & 0xFFFFFFFF for k in range(n)], np.uint32)


def registers(code: np.ndarray, M: int, B: int, K: int, ty: str, wide: bool) -> np.ndarray:
    """Matrix codes [B, M, K] -> registers [n, 64]."""
    per = K * M * B // 64
    rows = [
        pack_lane([code[a_map(lane, e, M, B, K, ty, wide)] for e in range(per)], BITS[ty])
        for lane in range(64)
    ]
    return np.array(rows).T


def vrange(first: int, n: int) -> str:
    return f'v{first}' if n == 1 else f'v[{first}:{first + n - 1}]'


def unpack_result(regs: np.ndarray, M: int, B: int, out: str) -> np.ndarray:
    if out == 'f64':
        words = np.ascontiguousarray(regs.reshape(-1, 2, 64).transpose(0, 2, 1)).view(np.float64)[
            ..., 0
        ]
    else:
        words = regs.view({'f32': np.float32, 'i32': np.int32}[out])
    got = np.full((B, M, M), np.nan)
    for r in range(len(words)):
        for lane in range(64):
            got[d_map(lane, r, M, B, out)] = words[r, lane]
    return got


def pack_result(mat: np.ndarray, M: int, B: int, out: str) -> np.ndarray:
    n = M * M * B // 64
    vals = np.array([[mat[d_map(lane, r, M, B, out)] for lane in range(64)] for r in range(n)])
    if out == 'f64':
        return np.ascontiguousarray(
            vals.view(np.uint32).reshape(n, 64, 2).transpose(0, 2, 1)
        ).reshape(2 * n, 64)
    return vals.astype({'f32': np.float32, 'i32': np.int32}[out]).view(np.uint32)


def multiply(
    name: str, gpu: str, types: tuple[str, str], mods: str = '', scales: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Run one instruction on random matrices -> (result, expected)."""
    m = NAME.match(name)
    assert m
    out, M, K, B = m.group(3), int(m.group(4)), int(m.group(6)), int(m.group(7) or 1)
    wide = m.group(8) == 'f8f6f4'
    (ca, va), (cb, vb) = (codes(t, (B, M, K), gpu) for t in types)
    c = (
        np.round(RNG.standard_normal((B, M, M)) * 64)
        if out != 'f64'
        else RNG.standard_normal((B, M, M))
    )
    ra, rb, rc = (
        registers(ca, M, B, K, types[0], wide),
        registers(cb, M, B, K, types[1], wide),
        pack_result(c, M, B, out),
    )
    fa = 8
    fb = fa + (len(ra) + 7) // 8 * 8
    fc = fb + (len(rb) + 7) // 8 * 8
    fs = fc + len(rc)
    regs = np.zeros((fs + 2 - fa, 64), np.uint32)
    regs[: len(ra)], regs[fb - fa : fb - fa + len(rb)], regs[fc - fa : fc - fa + len(rc)] = (
        ra,
        rb,
        rc,
    )
    tail = ''
    if scales:
        sa, sb = RNG.integers(120, 134, (2, M, K // 32))
        regs[fs - fa] = [
            int(sa[k % M, k // M]) << 16 for k in range(64)
        ]  # byte 2: op_sel 0, op_sel_hi 1
        regs[fs - fa + 1] = [
            int(sb[k % M, k // M]) << 8 for k in range(64)
        ]  # byte 1: op_sel 1, op_sel_hi 0
        va, vb = va * 2.0 ** (sa - 127).repeat(32, 1), vb * 2.0 ** (sb - 127).repeat(32, 1)
        tail = f', v{fs}, v{fs + 1} op_sel:[0,1,0] op_sel_hi:[1,0,0]'
    text = (
        f' {name} {vrange(fc, len(rc))}, {vrange(fa, len(ra))}, {vrange(fb, len(rb))}, '
        f'{vrange(fc, len(rc))}{tail}{mods}'
    )
    got = with_registers(text, regs, list(range(fc, fc + len(rc))), arch=gpu)
    return unpack_result(got, M, B, out), np.einsum('bik,bjk->bij', va, vb) + c


def close(got: np.ndarray, want: np.ndarray) -> bool:
    """To the last f32 bit: the simulator rounds the exact sum once."""
    return bool((np.abs(got - want) <= 1e-7 * np.abs(want) + 1e-9 * np.abs(want).max()).all())


@pytest.mark.parametrize(
    'gpu,name',
    listed('gfx942', False) + [x for x in listed('gfx950', False) if 'f8f6f4' not in x[1]],
)
def test_dense(gpu: str, name: str) -> None:
    parts = NAME.match(name).group(8).split('_')  # type: ignore[union-attr]
    got, want = multiply(name, gpu, (parts[0], parts[-1]))
    assert close(got, want)
    assert not close(got.swapaxes(1, 2), want)  # the map matters: a transposed result fails


FORMATS = ['fp8', 'bf8', 'fp6', 'bf6', 'fp4']


@pytest.mark.parametrize('a', range(5))
@pytest.mark.parametrize('b', range(5))
@pytest.mark.parametrize('shape', ('16x16x128', '32x32x64'))
@pytest.mark.parametrize('scaled', (False, True))
def test_f8f6f4(shape: str, a: int, b: int, scaled: bool) -> None:
    name = f'v_mfma_{"scale_" if scaled else ""}f32_{shape}_f8f6f4'
    got, want = multiply(name, 'gfx950', (FORMATS[a], FORMATS[b]), f' cbsz:{a} blgp:{b}', scaled)
    assert close(got, want)
    assert not close(np.roll(got, 1, 1), want)


@pytest.mark.parametrize('gpu,name', listed('gfx942', True) + listed('gfx950', True))
@pytest.mark.parametrize('abid', (0, 1))
def test_sparse(gpu: str, name: str, abid: int) -> None:
    """D += A B, two of every four k of A kept; the positions come from 2-bit fields of the set that
    ABID picks.
    """
    m = NAME.match(name)
    assert m
    out, M, K, parts = m.group(3), int(m.group(4)), int(m.group(6)), m.group(8).split('_')
    types, groups = (parts[0], parts[-1]), 64 // int(m.group(4))
    kept = K // 2 // groups  # A elements per lane
    sets = 16 // kept
    abid %= sets
    (cp, vp), (cb, vb) = codes(types[0], (1, M, K // 2), gpu), codes(types[1], (1, M, K), gpu)
    position = np.sort(
        np.array([[RNG.choice(4, 2, replace=False) for _ in range(K // 4)] for _ in range(M)]), -1
    ).reshape(M, K // 2)
    dense = np.zeros((M, K))
    for j in range(K // 2):
        dense[np.arange(M), 4 * (j // 2) + position[:, j]] = vp[0, :, j]
    index = RNG.integers(0, 1 << 32, 64, dtype=np.uint64)
    for lane in range(64):
        for e in range(kept):
            bit = 2 * kept * abid + 2 * e
            index[lane] = (
                int(index[lane]) & ~(3 << bit)
                | int(position[lane % M, kept * (lane // M) + e]) << bit
            )
    ra, rb = registers(cp, M, 1, K // 2, types[0], False), registers(cb, M, 1, K, types[1], False)
    c = np.round(RNG.standard_normal((1, M, M)) * 64)
    rc = pack_result(c, M, 1, out)
    regs = np.zeros((40, 64), np.uint32)
    regs[: len(ra)], regs[8 : 8 + len(rb)], regs[16 : 16 + len(rc)], regs[32] = (
        ra,
        rb,
        rc,
        index.astype(np.uint32),
    )
    text = (
        f' {name} {vrange(24, len(rc))}, {vrange(8, len(ra))}, {vrange(16, len(rb))}, '
        f'v40{f" abid:{abid}" if abid else ""}'
    )
    got = unpack_result(
        with_registers(text, regs, list(range(24, 24 + len(rc))), arch=gpu), M, 1, out
    )
    assert close(got, dense @ vb.swapaxes(1, 2) + c)
    assert not close(got, np.roll(dense, 1, 1) @ vb.swapaxes(1, 2) + c)


@pytest.mark.parametrize('cbsz,abid', [(1, 1), (2, 3), (3, 5), (4, 9)])
def test_broadcast_of_a(cbsz: int, abid: int) -> None:
    """CBSZ: groups of 2^cbsz blocks share block ABID of A."""
    name, B, M, K = 'v_mfma_f32_4x4x1_16b_f32', 16, 4, 1
    (ca, va), (cb, vb) = codes('f32', (B, M, K), 'gfx942'), codes('f32', (B, M, K), 'gfx942')
    regs = np.stack(
        [registers(ca, M, B, K, 'f32', False)[0], registers(cb, M, B, K, 'f32', False)[0]]
    )
    got = unpack_result(
        with_registers(
            f' {name} v[12:15], v8, v9, 0 cbsz:{cbsz} abid:{abid}', regs, [12, 13, 14, 15]
        ),
        M,
        B,
        'f32',
    )
    source = [(b & -(1 << cbsz)) + abid for b in range(B)]
    assert close(got, np.einsum('bik,bjk->bij', va[source], vb))
    assert not close(got, np.einsum('bik,bjk->bij', va, vb))


@pytest.mark.parametrize('blgp', range(1, 8))
def test_lane_groups_of_b(blgp: int) -> None:
    b, a = RNG.integers(-9, 9, 64).astype(np.float32), np.ones(64, np.float32)
    got = with_registers(
        f' v_mfma_f32_4x4x1_16b_f32 v[12:15], v8, v9, 0 blgp:{blgp}',
        np.stack([a, b]).view(np.uint32),
        [12],
    ).view(np.float32)[0]
    lane = np.arange(64)
    want = {1: b[lane % 32], 2: b[32 + lane % 32], 3: b[(lane + 16) % 64]}.get(
        blgp, b[16 * (blgp - 4) + lane % 16]
    )
    assert (got == want).all()
