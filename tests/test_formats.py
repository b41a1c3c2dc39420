"""Number formats: bit for bit against ml_dtypes, scale rules against their definition, refusals."""

import copy
import math
import pickle
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch

from mixmoe import MixMoEError, Rounding, quantise
from mixmoe.formats import (
    FORMATS,
    ScaleKind,
    e2m1,
    e4m3fn,
    e4m3fnuz,
    e8m0_value,
    format_named,
    fp8_block,
    int4_group,
)

ML = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e4m3fn": ml_dtypes.float8_e4m3fn,
    "e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
}
ELEMENTS = [e2m1, e4m3fn, e4m3fnuz]


def ml_codes(values: np.ndarray, element) -> np.ndarray:
    """ml_dtypes' codes of values already inside the element's range."""
    return values.astype(np.float32).astype(ML[element.name]).view(np.uint8)


def our_codes(values: np.ndarray, element) -> np.ndarray:
    """One byte per value, whatever the packing."""
    y = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    codes = element.encode(y).view(torch.uint8).numpy()
    if element.per_byte == 1:
        return codes
    return np.stack([codes & 15, codes >> 4], axis=-1).reshape(values.shape)


def probes(element) -> np.ndarray:
    """Every representable value, every tie between neighbours, their float32 neighbours, denormals,
    zeros, and random values over all binades, all inside the element's range."""
    codes = np.arange(16 if element.bits == 4 else 256, dtype=np.uint8)
    every = codes.view(ML[element.name]).astype(np.float64)
    every = np.unique(every[np.isfinite(every)])
    ties = (every[1:] + every[:-1]) / 2
    exact = np.concatenate([every, ties]).astype(np.float32)
    near = [np.nextafter(exact, np.float32(s), dtype=np.float32) for s in (-np.inf, np.inf)]
    rng = np.random.default_rng(0)
    random = rng.standard_normal(200_000) * 2.0 ** rng.integers(-30, 9, 200_000)
    tiny = np.array([0.0, -0.0, 1e-45, -1e-45, 1e-38, -1e-40], dtype=np.float32)
    values = np.concatenate([exact, *near, random.astype(np.float32), tiny])
    values = values[np.abs(values) <= element.max]
    return np.concatenate([values, values[: len(values) % 2]])


@pytest.mark.parametrize("element", ELEMENTS, ids=lambda e: e.name)
def test_encode_is_ml_dtypes(element):
    values = probes(element)
    np.testing.assert_array_equal(our_codes(values, element), ml_codes(values, element))


@pytest.mark.parametrize("element", ELEMENTS, ids=lambda e: e.name)
def test_encode_check_can_fail(element):
    values = probes(element)
    biased = values * np.float32(1 + 2**-20)  # pushes every tie upward
    assert (our_codes(biased, element) != ml_codes(values, element)).any()


@pytest.mark.parametrize("element", ELEMENTS, ids=lambda e: e.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decode_every_code(element, dtype):
    codes = np.arange(256, dtype=np.uint8)
    stored = torch.from_numpy(codes).view(element.storage)
    got = element.decode(stored, dtype).numpy()
    if element.bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(-1)
    want = codes.view(ML[element.name]).astype(got.dtype)
    np.testing.assert_array_equal(got, want)
    real = ~np.isnan(want)
    np.testing.assert_array_equal(np.signbit(got)[real], np.signbit(want)[real])


@pytest.mark.parametrize("element", ELEMENTS, ids=lambda e: e.name)
def test_encode_saturates(element):
    huge = np.array([element.max * 1.04, 1e30, -1e30, np.float32(3e38)], dtype=np.float32)
    got = our_codes(huge, element).view(ML[element.name]).astype(np.float32)
    np.testing.assert_array_equal(got, np.sign(huge) * element.max)


def test_e8m0_is_ml_dtypes():
    codes = torch.arange(255, dtype=torch.uint8)
    want = codes.numpy().view(ml_dtypes.float8_e8m0fnu)
    for dtype, np_dtype in ((torch.float32, np.float32), (torch.float64, np.float64)):
        np.testing.assert_array_equal(e8m0_value(codes, dtype).numpy(), want.astype(np_dtype))


def scale_of(amax: float, element, rounding: Rounding) -> int:
    """The exponent by definition, in exact arithmetic."""
    x = math.frexp(amax)[1] - 1
    if rounding is Rounding.FLOOR:
        e = x - element.emax
    elif rounding is Rounding.EVEN:
        step = 2.0 ** (x - element.mantissa)
        rounded = round(amax / step) * step  # Python rounds halves to even
        e = math.frexp(rounded)[1] - 1 - element.emax
    else:
        e = -400
        while amax > element.max * 2.0**e:
            e += 1
    return min(max(e, -127), 127 - element.emax)


@pytest.mark.parametrize("rounding", list(Rounding))
@pytest.mark.parametrize("name", ["mxfp4", "mxfp8"])
def test_e8m0_rule(name, rounding):
    fmt = FORMATS[name]
    edges = [fmt.element.max, 1.0, 1.5, 1.75, 1.9375, 1.9374, 1.7499, 2 - 2**-23, 1.5 + 2**-20]
    powers = [-149, -130, -127, -126, -20, 0, 3, 100, 126]
    exact = [m * 2.0**p for m in edges for p in powers]
    amaxes = [np.float32(a) for a in exact if 2.0**-149 <= a < 2.0**128]
    x = torch.zeros(len(amaxes), 32)
    x[:, 7] = torch.tensor(np.array(amaxes)) * torch.tensor([1.0, -1.0]).repeat(len(amaxes))[
        : len(amaxes)
    ]
    got = fmt.quantise(x, rounding).scales[:, 0].int() - 127
    assert got.tolist() == [scale_of(float(a), fmt.element, rounding) for a in amaxes]


def test_roundings_differ_and_ceil_never_saturates():
    torch.manual_seed(0)
    x = torch.randn(512, 64)
    scales = {r: FORMATS["mxfp4"].quantise(x, r).scales for r in Rounding}
    assert (scales[Rounding.CEIL] >= scales[Rounding.EVEN]).all()
    assert (scales[Rounding.EVEN] >= scales[Rounding.FLOOR]).all()
    assert len({bytes(s.numpy().tobytes()) for s in scales.values()}) == 3
    blocks = x.reshape(512, 2, 32).abs().amax(-1)
    assert (blocks <= 6 * e8m0_value(scales[Rounding.CEIL])).all()
    assert not (blocks <= 6 * e8m0_value(scales[Rounding.FLOOR])).all()


@pytest.mark.parametrize("rounding", list(Rounding))
@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-40, 1e-38, 1.0, 6e4, 1e38, 3e38])
def test_hostile_rows_stay_finite(name, value, rounding):
    fmt = FORMATS[name]
    if value > 65504 and name == "fp16":
        with pytest.raises(MixMoEError, match="row \\(0\\)"):
            fmt.quantise(torch.full((2, 128), value))
        return
    x = torch.full((3, 128), value)
    x[1, ::2] *= -1
    back = fmt.quantise(x, rounding).dequantise()
    assert torch.isfinite(back).all()
    if value >= 1.0 and rounding is not Rounding.FLOOR and value < 3e38:
        assert ((back - x).abs() <= x.abs() * 0.26).all()
    if value == 0.0:
        assert (back == 0).all()


@pytest.mark.parametrize("name", list(FORMATS))
def test_noise_bound_holds_and_is_tight(name):
    torch.manual_seed(1)
    x = torch.randn(64, 4096)
    fmt = FORMATS[name]
    error = ((fmt.quantise(x).dequantise() - x).norm(dim=1) / x.norm(dim=1)).max()
    assert error <= fmt.noise
    coarser = fmt.quantise(x).dequantise() * (1 + 2 * fmt.noise)  # a wrong scale is seen
    assert ((coarser - x).norm(dim=1) / x.norm(dim=1)).max() > fmt.noise


@pytest.mark.parametrize("name", [n for n in FORMATS if FORMATS[n].scale is ScaleKind.F32])
def test_f32_scale_rule(name):
    torch.manual_seed(2)
    fmt = FORMATS[name]
    x = torch.randn(256, 256) * torch.logspace(-30, 30, 256)[:, None]
    q = fmt.quantise(x)
    rows, cols = fmt.rows, fmt.cols or 256
    amax = x.abs().reshape(256 // rows, rows, 256 // cols, cols).amax(dim=(1, 3))
    assert torch.equal(q.scales, amax / fmt.element.max)


def test_fp8_block_partial_edges():
    torch.manual_seed(3)
    x = torch.randn(2, 192, 320)
    q = fp8_block().quantise(x)
    assert q.scales.shape == (2, 2, 3)
    for i in range(2):
        for j in range(3):
            block = x[1, 128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
            assert q.scales[1, i, j] == block.abs().max() / 448
    assert ((q.dequantise() - x).norm() / x.norm()) < 0.03


def test_fp8_1x128_partial_edge():
    x = torch.randn(3, 192)
    q = FORMATS["fp8_1x128"].quantise(x)
    want = torch.stack([x[:, :128].abs().amax(1), x[:, 128:].abs().amax(1)], 1) / 448
    assert torch.equal(q.scales, want)
    assert ((q.dequantise() - x).norm() / x.norm()) < 0.03


def test_int4_codes():
    x = torch.tensor([[7.0, -7.0, 0.5, 1.5, 2.5, -3.4, 3.6, 0.0] * 4])
    q = int4_group(32).quantise(x)
    low, high = (q.codes << 4).view(torch.int8) >> 4, q.codes.view(torch.int8) >> 4
    codes = torch.stack([low, high], -1).flatten().tolist()
    assert codes[:8] == [7, -7, 0, 2, 2, -3, 4, 0]  # halves to even, low nibble first
    assert q.scales.dtype == torch.bfloat16 and q.scales.item() == 1.0
    assert int4_group(32).dequantise(torch.full((1, 16), 0x88, dtype=torch.uint8),
                                     torch.ones(1, 1)).eq(-8).all()


@pytest.mark.parametrize("name", ["mxfp4", "fp8_token", "fp8_block", "int8_token", "bf16"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused_with_the_row(name, bad):
    x = torch.zeros(2, 300, 128)
    x[1, 261, 5] = bad
    with pytest.raises(MixMoEError, match=r"row \(1, 261\)"):
        FORMATS[name].quantise(x)


@pytest.mark.parametrize(
    "name, value, dtype", [("fp8_token", 1e300, torch.float64), ("bf16", 3.4e38, torch.float32)]
)
def test_magnitudes_out_of_range_are_refused_as_such(name, value, dtype):
    """Not as infinities: float32 lacks the one, bf16 would round the other to infinity."""
    x = torch.zeros(3, 32, dtype=dtype)
    x[1, 7] = -value
    with pytest.raises(MixMoEError, match=rf"x: {name} takes magnitudes .*row \(1\).*got 3?.*e"):
        quantise(x, name)
    x[1, 7] = FORMATS[name].element.max  # the largest of all passes, and stays what it is
    assert torch.isfinite(quantise(x, name).dequantise()).all()


@pytest.mark.parametrize("name", [*FORMATS, "fp8_block64x128"])
def test_formats_are_pickled_by_name(name):
    fmt = format_named(name)
    assert pickle.loads(pickle.dumps(fmt)) is fmt and copy.deepcopy(fmt) is fmt


def test_input_dtypes_agree():
    torch.manual_seed(4)
    x = torch.randn(40, 128).to(torch.bfloat16)
    for fmt in FORMATS.values():
        a, b = fmt.quantise(x), fmt.quantise(x.double())
        assert torch.equal(a.codes.view(torch.uint8), b.codes.view(torch.uint8))
        assert a.scales is None or torch.equal(a.scales, b.scales)


@pytest.mark.parametrize("name", list(FORMATS))
def test_chunks_do_not_show(name, monkeypatch):
    torch.manual_seed(5)
    x = torch.randn(2, 300, 256)
    whole = FORMATS[name].quantise(x)
    monkeypatch.setattr("mixmoe.formats.CHUNK", 1 << 10)
    pieces = FORMATS[name].quantise(x)
    assert torch.equal(whole.codes.view(torch.uint8), pieces.codes.view(torch.uint8))
    assert whole.scales is None or torch.equal(whole.scales, pieces.scales)


def test_quantised_checks():
    q = quantise(torch.randn(4, 64), "mxfp4", "EVEN")
    q.check("w")
    assert q.shape == (4, 64) and q.nbytes == 4 * 32 + 4 * 2
    with pytest.raises(MixMoEError, match="scales of mxfp4 must have shape"):
        replace(q, scales=q.scales[:2]).check("w")
    with pytest.raises(MixMoEError, match="codes of mxfp8"):
        replace(q, format=FORMATS["mxfp8"]).check("w")
    q.scales[2, 1] = 0xFF
    with pytest.raises(MixMoEError, match=r"w: scales must be finite: got 255 at \(2, 1\)"):
        q.check_scales("w")


def test_names():
    assert format_named("int4_group") is FORMATS["int4_group32"]
    assert format_named("fp8_block64x128") is fp8_block(64, 128)
    assert fp8_block(64, 128).family == "fp8_block" and FORMATS["mxfp4"].family == "mxfp4"
    for bad in ("mxfp5", "fp8_block0x4x", "fp8_blockx"):
        with pytest.raises(MixMoEError, match="unknown number format"):
            format_named(bad)
    with pytest.raises(MixMoEError, match="multiple of 32.*got 100, nearest legal: 96 or 128"):
        quantise(torch.randn(2, 100), "mxfp4")
    with pytest.raises(MixMoEError, match="x: K must be a positive multiple of 1 .*got 0, .*: 1$"):
        quantise(torch.zeros(2, 0), "fp8_token")
    with pytest.raises(MixMoEError, match="a Format or its name: got None"):
        format_named(None)
    with pytest.raises(MixMoEError, match="rounding"):
        quantise(torch.randn(2, 32), "mxfp4", "UP")
    with pytest.raises(MixMoEError, match="float tensor"):
        quantise(torch.zeros(2, 32, dtype=torch.int32), "mxfp4")
