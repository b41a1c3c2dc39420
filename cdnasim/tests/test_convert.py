"""Number formats and conversion instructions against ml_dtypes, exhaustively where the source has
16 bits.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from cdnasim import numerics as nm

from .support import lanewise, with_registers

ALL16 = np.arange(1 << 16, dtype=np.uint16)
ONE = np.array([1.0], np.float32).view(np.uint32)[0]
TYPES = {
    ('fp8', 'gfx950'): ml_dtypes.float8_e4m3fn,
    ('bf8', 'gfx950'): ml_dtypes.float8_e5m2,
    ('fp8', 'gfx942'): ml_dtypes.float8_e4m3fnuz,
    ('bf8', 'gfx942'): ml_dtypes.float8_e5m2fnuz,
    ('fp6', 'gfx950'): ml_dtypes.float6_e2m3fn,
    ('bf6', 'gfx950'): ml_dtypes.float6_e3m2fn,
    ('fp4', 'gfx950'): ml_dtypes.float4_e2m1fn,
}
WIDE = {'f16': np.float16, 'bf16': ml_dtypes.bfloat16}


def encode(x: np.ndarray, ty: type) -> np.ndarray:
    """ml_dtypes' codes; NaN of a format without NaN is not asked for."""
    with np.errstate(all='ignore'):
        return x.astype(ty).view(np.uint8)


def same_codes(got: np.ndarray, want: np.ndarray, ty: type) -> np.ndarray:
    nan = np.isnan(want.view(ty).astype(np.float32))
    return (got == want) | (nan & np.isnan(got.astype(np.uint8).view(ty).astype(np.float32)))


@pytest.mark.parametrize('name,gpu', TYPES)
def test_tables(name: str, gpu: str) -> None:
    """All codes decode to ml_dtypes' values."""
    fmt, ty = nm.minifloat(name, gpu), TYPES[name, gpu]
    want = np.arange(1 << fmt.bits, dtype=np.uint8).view(ty).astype(np.float32)
    assert (np.isnan(fmt.table) == np.isnan(want)).all()
    assert (fmt.table.view(np.uint32) == want.view(np.uint32))[~np.isnan(want)].all()


@pytest.mark.parametrize('src', WIDE)
@pytest.mark.parametrize('name,gpu', TYPES)
def test_encoder_exhaustive(name: str, gpu: str, src: str) -> None:
    """Every f16 and every bf16 value, ties, denormals, overflow and NaN included."""
    fmt, ty, x = nm.minifloat(name, gpu), TYPES[name, gpu], ALL16.view(WIDE[src]).astype(np.float32)
    if fmt.nan is None:
        x = x[np.isfinite(x)]
    got, want = fmt.encode(x), encode(x, ty)
    assert same_codes(got, want, ty).all()
    assert not same_codes(fmt.encode(x * np.float32(1.01)), want, ty).all()


@pytest.mark.parametrize('name', ('fp8', 'bf8'))
@pytest.mark.parametrize('gpu', ('gfx942', 'gfx950'))
def test_cvt_pk_from_f32(name: str, gpu: str) -> None:
    """v_cvt_pk_{fp8,bf8}_f32 over every bf16 value as f32; the other half of the register stays."""
    x = ALL16.astype(np.uint32) << 16
    got = lanewise(
        f'v_cvt_pk_{name}_f32 v9, v8, v10 op_sel:[0,0,1]',
        [x, x[::-1].copy()],
        gpu,
        keep=np.full(1 << 16, 0xBEEF, np.uint32),
    )
    ty = TYPES[name, gpu]
    assert (got & 0xFFFF == 0xBEEF).all()
    for half, src in ((got >> 16 & 255, x), (got >> 24, x[::-1].copy())):
        assert same_codes(half, encode(src.view(np.float32), ty), ty).all()


@pytest.mark.parametrize('name', ('fp8', 'bf8'))
@pytest.mark.parametrize('gpu', ('gfx942', 'gfx950'))
def test_cvt_to_f32(name: str, gpu: str) -> None:
    x = np.arange(256, dtype=np.uint32) << 16
    want = np.arange(256, dtype=np.uint8).view(TYPES[name, gpu]).astype(np.float32)
    got = lanewise(f'v_cvt_f32_{name}_sdwa v9, v8 src0_sel:BYTE_2', [x], gpu).view(np.float32)
    assert np.array_equal(got, want, equal_nan=True)


@pytest.mark.parametrize('name', ('fp8', 'bf8', 'fp4'))
@pytest.mark.parametrize('src', ('f16', 'bf16'))
def test_scaled_pack_exhaustive(name: str, src: str) -> None:
    """v_cvt_scalef32_pk_* over every 16-bit source value, at scale 1 and at scale 4."""
    ty, x = TYPES[name, 'gfx950'], ALL16.view(WIDE[src]).astype(np.float32)
    for scale in (1.0, 4.0):
        bits = np.full(1 << 16, np.float32(scale).view(np.uint32), np.uint32)
        got = lanewise(
            f'v_cvt_scalef32_pk_{name}_{src} v9, v8, v10',
            [ALL16.astype(np.uint32) << 16, bits],
            keep=np.zeros(1 << 16, np.uint32),
        )
        width = 4 if name == 'fp4' else 8
        high = got >> width & ((1 << width) - 1)
        use = np.isfinite(x) if name == 'fp4' else np.ones(len(x), bool)
        assert same_codes(high[use], encode(x / np.float32(scale), ty)[use], ty).all()
        assert (got & ((1 << width) - 1) == 0).all()  # the low half was +0


@pytest.mark.parametrize('name', ('fp8', 'bf8', 'fp4'))
@pytest.mark.parametrize('dst', ('f32', 'f16', 'bf16'))
def test_scaled_unpack(name: str, dst: str) -> None:
    """All codes times a power of two; 2^-3 keeps every result exact in f32."""
    n = 16 if name == 'fp4' else 256
    codes = np.arange(n, dtype=np.uint32)
    scale = np.full(n, np.float32(0.125).view(np.uint32), np.uint32)
    want = codes.astype(np.uint8).view(TYPES[name, 'gfx950']).astype(np.float32) * np.float32(0.125)
    if dst == 'f32':
        regs = np.zeros((2, 64), np.uint32)
        for at in range(0, n, 64):
            part = codes[at : at + 64]
            regs[0, : len(part)], regs[1] = part, scale[0]
            got = with_registers(f' v_cvt_scalef32_pk_f32_{name} v[12:13], v8, v9', regs, [12])[
                0
            ].view(np.float32)[: len(part)]
            assert np.array_equal(got, want[at : at + 64], equal_nan=True)
        return
    got = lanewise(f'v_cvt_scalef32_pk_{dst}_{name} v9, v8, v10', [codes, scale]) & 0xFFFF
    got_f = got.astype(np.uint16).view(WIDE[dst]).astype(np.float32)
    assert np.array_equal(got_f, want.astype(WIDE[dst]).astype(np.float32), equal_nan=True)


@pytest.mark.parametrize('name', ('fp6', 'bf6'))
def test_pk32_round_trip(name: str) -> None:
    """32 values -> 6 registers -> 32 values, codes by ml_dtypes."""
    rng = np.random.default_rng(3)
    x = (rng.standard_normal((64, 32)) * 4).astype(np.float16)
    regs = np.concatenate([np.ascontiguousarray(x).view(np.uint32).T, np.full((1, 64), ONE)])
    got = with_registers(
        f' v_cvt_scalef32_pk32_{name}_f16 v[32:37], v[8:23], v24',
        regs.astype(np.uint32),
        list(range(32, 38)),
    )
    packed = nm.unpack_bits(np.ascontiguousarray(got.T).view(np.uint8), 6)
    assert (packed == encode(x.astype(np.float32), TYPES[name, 'gfx950'])).all()
    wide = np.concatenate([got, np.full((1, 64), ONE)]).astype(np.uint32)
    back = with_registers(
        f' v_cvt_scalef32_pk32_f32_{name} v[32:63], v[8:13], v14', wide, list(range(32, 64))
    ).view(np.float32)
    assert (x.astype(np.float32).astype(TYPES[name, 'gfx950']).astype(np.float32) == back.T).all()


def test_16_bit_conversions_exhaustive() -> None:
    x = ALL16.astype(np.uint32)
    with np.errstate(all='ignore'):
        f = ALL16.view(np.float16).astype(np.float32)
        assert np.array_equal(
            lanewise('v_cvt_f32_f16_e32 v9, v8', [x]).view(np.float32), f, equal_nan=True
        )
        bf = x << 16
        got = lanewise('v_cvt_pk_bf16_f32 v9, v8, v10', [bf | 0x8000, bf | 0x7FFF])
        want = [
            (v.view(np.float32).astype(ml_dtypes.bfloat16).view(np.uint16))
            for v in (bf | 0x8000, bf | 0x7FFF)
        ]
        nan = np.isnan((bf | 0x7FFF).view(np.float32))
        assert (got[~nan] & 0xFFFF == want[0][~nan]).all() and (
            got[~nan] >> 16 == want[1][~nan]
        ).all()
        half = lanewise('v_cvt_f16_f32_e32 v9, v8', [bf | 0x1234]) & 0xFFFF
        ref = (bf | 0x1234).view(np.float32).astype(np.float16)
        assert np.array_equal(half.astype(np.uint16).view(np.float16), ref, equal_nan=True)
        truncated = lanewise('v_cvt_pkrtz_f16_f32 v9, v8, v8', [bf | 0x1234]) & 0xFFFF
        back = truncated.astype(np.uint16).view(np.float16).astype(np.float64)
        exact = (bf | 0x1234).view(np.float32).astype(np.float64)
        ok = np.isfinite(exact)
        assert (np.abs(back[ok]) <= np.abs(exact[ok])).all()


@pytest.mark.parametrize('name', ('fp8', 'bf8'))
def test_stochastic_rounding_is_unbiased(name: str) -> None:
    """The mean over random words approaches the value; nearest-even does not."""
    rng = np.random.default_rng(5)
    value = np.float32(1.05)
    words = rng.integers(0, 1 << 32, 1 << 14, dtype=np.uint64).astype(np.uint32)
    got = lanewise(
        f'v_cvt_sr_{name}_f32 v9, v8, v10',
        [np.full(len(words), value.view(np.uint32)), words],
        keep=np.zeros(len(words), np.uint32),
    )
    mean = got.astype(np.uint8).view(TYPES[name, 'gfx950']).astype(np.float64).mean()
    assert abs(mean - value) < 2e-3
    assert abs(float(np.asarray(value).astype(TYPES[name, 'gfx950'])) - value) > 1e-2
