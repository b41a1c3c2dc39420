"""Instruction semantics against an independent source: LLVM lowers a known operation, NumPy says
what it must give.

Each launch runs in hazard mode, so LLVM's own waits and wait states are judged too: a finding fails
the test.
"""

from __future__ import annotations

import numpy as np
import pytest

from .support import llvm_map

RNG = np.random.default_rng(7)
ARCHS = ('gfx942', 'gfx950')


def ints(bits: int, signed: bool = False, n: int = 640) -> np.ndarray:
    """Random magnitudes, with the awkward values in front."""
    ty = np.dtype(f'{"i" if signed else "u"}{bits // 8}')
    x = RNG.integers(0, 1 << 63, n, dtype=np.uint64) >> RNG.integers(0, 64, n).astype(np.uint64)
    x[:6] = [0, 1, (1 << bits) - 1, 1 << (bits - 1), (1 << (bits - 1)) - 1, 2]
    return (x & np.uint64((1 << bits) - 1)).astype(f'u{bits // 8}').view(ty)


def floats(ty: type, n: int = 640) -> np.ndarray:
    info = np.finfo(ty)
    x = np.ldexp(RNG.standard_normal(n), RNG.integers(info.minexp, info.maxexp - 3, n)).astype(ty)
    x[:10] = [0, -0.0, 1, -1, np.inf, -np.inf, np.nan, info.max, info.tiny, info.smallest_subnormal]
    return x


INTEGER = {
    'add i64': ('i64', '%r = add i64 %a, %b', 64, lambda a, b: a + b),
    'sub i64': ('i64', '%r = sub i64 %a, %b', 64, lambda a, b: a - b),
    'mul i64': ('i64', '%r = mul i64 %a, %b', 64, lambda a, b: a * b),
    'mul i32': ('i32', '%r = mul i32 %a, %b', 32, lambda a, b: a * b),
    'udiv i32': (
        'i32',
        '%d = or i32 %b, 1\n  %r = udiv i32 %a, %d',
        32,
        lambda a, b: a // (b | np.uint32(1)),
    ),
    'urem i32': (
        'i32',
        '%d = or i32 %b, 1\n  %r = urem i32 %a, %d',
        32,
        lambda a, b: a % (b | np.uint32(1)),
    ),
    'udiv i64': (
        'i64',
        '%d = or i64 %b, 1\n  %r = udiv i64 %a, %d',
        64,
        lambda a, b: a // (b | np.uint64(1)),
    ),
    'urem i64': (
        'i64',
        '%d = or i64 %b, 1\n  %r = urem i64 %a, %d',
        64,
        lambda a, b: a % (b | np.uint64(1)),
    ),
    'shl i64': (
        'i64',
        '%s = and i64 %b, 63\n  %r = shl i64 %a, %s',
        64,
        lambda a, b: a << (b & np.uint64(63)),
    ),
    'lshr i64': (
        'i64',
        '%s = and i64 %b, 63\n  %r = lshr i64 %a, %s',
        64,
        lambda a, b: a >> (b & np.uint64(63)),
    ),
    'ashr i64': (
        'i64',
        '%s = and i64 %b, 63\n  %r = ashr i64 %a, %s',
        64,
        lambda a, b: (a.view(np.int64) >> (b & np.uint64(63)).astype(np.int64)).view(np.uint64),
    ),
    'ashr i32': (
        'i32',
        '%s = and i32 %b, 31\n  %r = ashr i32 %a, %s',
        32,
        lambda a, b: (a.view(np.int32) >> (b & np.uint32(31)).astype(np.int32)).view(np.uint32),
    ),
    'umin i32': (
        'i32',
        '%c1 = icmp ult i32 %a, %b\n  %r = select i1 %c1, i32 %a, i32 %b',
        32,
        np.minimum,
    ),
    'smax i64': (
        'i64',
        '%c1 = icmp sgt i64 %a, %b\n  %r = select i1 %c1, i64 %a, i64 %b',
        64,
        lambda a, b: np.maximum(a.view(np.int64), b.view(np.int64)).view(np.uint64),
    ),
    'mul i16': ('i16', '%r = mul i16 %a, %b', 16, lambda a, b: a * b),
    'ashr i16': (
        'i16',
        '%s = and i16 %b, 15\n  %r = ashr i16 %a, %s',
        16,
        lambda a, b: (a.view(np.int16) >> (b & np.uint16(15)).astype(np.int16)).view(np.uint16),
    ),
}
INTRINSIC = {
    'ctlz': lambda x, bits: np.array([bits - int(v).bit_length() for v in x]),
    'cttz': lambda x, bits: np.array(
        [(int(v) & -int(v)).bit_length() - 1 if v else bits for v in x]
    ),
    'ctpop': lambda x, bits: np.array([int(v).bit_count() for v in x]),
    'bitreverse': lambda x, bits: np.array(
        [int(format(int(v), f'0{bits}b')[::-1], 2) for v in x], f'u{bits // 8}'
    ),
    'bswap': lambda x, bits: x.byteswap(),
}


@pytest.mark.parametrize('arch', ARCHS)
@pytest.mark.parametrize('name', INTEGER)
def test_integer(name: str, arch: str) -> None:
    ty, body, bits, ref = INTEGER[name]
    a, b = ints(bits), RNG.permutation(ints(bits))
    got = llvm_map('  ' + body, ty, ty, [a, b], f'u{bits // 8}', arch)
    with np.errstate(all='ignore'):
        want = ref(a, b)
    assert (got == want).all()
    assert (got != np.roll(want, 1)).any()  # the comparison can fail


@pytest.mark.parametrize('bits', (32, 64))
@pytest.mark.parametrize('name', INTRINSIC)
def test_bit_intrinsics(name: str, bits: int) -> None:
    flag = ', i1 false' if name in ('ctlz', 'cttz') else ''
    decl = f'declare i{bits} @llvm.{name}.i{bits}(i{bits}{", i1" if flag else ""})'
    x = ints(bits)
    got = llvm_map(
        f'  %r = call i{bits} @llvm.{name}.i{bits}(i{bits} %a{flag})',
        f'i{bits}',
        f'i{bits}',
        [x],
        f'u{bits // 8}',
        declare=decl,
    )
    assert (got == INTRINSIC[name](x, bits).astype(got.dtype)).all()


FLOAT = {'fadd': np.add, 'fsub': np.subtract, 'fmul': np.multiply, 'fdiv': np.divide}


@pytest.mark.parametrize('ty', (np.float16, np.float32, np.float64))
@pytest.mark.parametrize('op', FLOAT)
def test_float_arithmetic(op: str, ty: type) -> None:
    """Correctly rounded, denormals included: fdiv exercises div_scale, div_fmas, div_fixup, rcp and
    the fma chain.
    """
    llvm = {np.float16: 'half', np.float32: 'float', np.float64: 'double'}[ty]
    a, b = floats(ty), RNG.permutation(floats(ty))
    got = llvm_map(f'  %r = {op} {llvm} %a, %b', llvm, llvm, [a, b], ty)
    with np.errstate(all='ignore'):
        want = FLOAT[op](a, b)
    same = (got == want) | (np.isnan(got) & np.isnan(want))
    assert same.all(), list(zip(a[~same], b[~same], got[~same], want[~same], strict=True))[:5]
    assert (np.signbit(got) == np.signbit(want))[~np.isnan(want)].all()
    assert (got != np.nextafter(want, ty(0)))[np.isfinite(want) & (want != 0)].all()


CONVERT = [
    ('float', np.float32, 'i32', np.int32, 'fptosi'),
    ('float', np.float32, 'i64', np.int64, 'fptosi'),
    ('double', np.float64, 'i32', np.int32, 'fptosi'),
    ('double', np.float64, 'i64', np.int64, 'fptosi'),
    ('i32', np.int32, 'float', np.float32, 'sitofp'),
    ('i64', np.int64, 'float', np.float32, 'sitofp'),
    ('i64', np.int64, 'double', np.float64, 'sitofp'),
    ('i32', np.int32, 'double', np.float64, 'sitofp'),
    ('i64', np.uint64, 'float', np.float32, 'uitofp'),
    ('i32', np.uint32, 'half', np.float16, 'uitofp'),
    ('double', np.float64, 'float', np.float32, 'fptrunc'),
    ('float', np.float32, 'double', np.float64, 'fpext'),
    ('float', np.float32, 'half', np.float16, 'fptrunc'),
    ('half', np.float16, 'float', np.float32, 'fpext'),
]


@pytest.mark.parametrize('src,src_ty,dst,dst_ty,op', CONVERT)
def test_conversion(src: str, src_ty: type, dst: str, dst_ty: type, op: str) -> None:
    if np.issubdtype(src_ty, np.floating):
        x = floats(src_ty)
        if np.issubdtype(dst_ty, np.integer):  # out of range is poison in LLVM
            x = np.where(
                np.abs(x) < 2.0 ** (8 * np.dtype(dst_ty).itemsize - 1), x, src_ty(3.75)
            ).astype(src_ty)
    else:
        x = ints(8 * np.dtype(src_ty).itemsize).view(src_ty)
    got = llvm_map(f'  %r = {op} {src} %a to {dst}', src, dst, [x], dst_ty)
    with np.errstate(all='ignore'):
        want = x.astype(dst_ty)
    assert (
        (got == want) | (np.isnan(want) & np.isnan(got))
        if np.issubdtype(dst_ty, np.floating)
        else got == want
    ).all()


ROUND = {
    'floor': np.floor,
    'ceil': np.ceil,
    'trunc': np.trunc,
    'rint': np.rint,
    'sqrt': np.sqrt,
    'fabs': np.abs,
}


@pytest.mark.parametrize('ty', (np.float16, np.float32, np.float64))
@pytest.mark.parametrize('name', ROUND)
def test_rounding_and_sqrt(name: str, ty: type) -> None:
    llvm, short = {
        np.float16: ('half', 'f16'),
        np.float32: ('float', 'f32'),
        np.float64: ('double', 'f64'),
    }[ty]
    x = floats(ty)
    got = llvm_map(
        f'  %r = call {llvm} @llvm.{name}.{short}({llvm} %a)',
        llvm,
        llvm,
        [x],
        ty,
        declare=f'declare {llvm} @llvm.{name}.{short}({llvm})',
    )
    with np.errstate(all='ignore'):
        want = ROUND[name](x)
    assert ((got == want) | (np.isnan(got) & np.isnan(want))).all()


def test_frexp_ldexp() -> None:
    x = floats(np.float32)
    x = x[np.isfinite(x)]
    body = (
        '  %p = call {float, i32} @llvm.frexp.f32.i32(float %a)\n'
        '  %r = extractvalue {float, i32} %p, 0'
    )
    got = llvm_map(
        body,
        'float',
        'float',
        [x],
        np.float32,
        declare='declare {float, i32} @llvm.frexp.f32.i32(float)',
    )
    assert (got == np.frexp(x)[0]).all()


def test_exp_and_log_are_close() -> None:
    """LLVM's expansions around v_exp_f32 and v_log_f32."""
    x = np.linspace(-80, 80, 640).astype(np.float32)
    got = llvm_map(
        '  %r = call float @llvm.exp.f32(float %a)',
        'float',
        'float',
        [x],
        np.float32,
        declare='declare float @llvm.exp.f32(float)',
    )
    want = np.exp(x.astype(np.float64))
    assert (np.abs(got / want - 1) < 3e-7).all()
    x = np.exp(x)
    got = llvm_map(
        '  %r = call float @llvm.log.f32(float %a)',
        'float',
        'float',
        [x],
        np.float32,
        declare='declare float @llvm.log.f32(float)',
    )
    want = np.log(x.astype(np.float64))
    assert (np.abs(got - want) <= 3e-7 * np.maximum(1, np.abs(want))).all()
    assert not (
        np.abs(got * np.float32(1.00001) - want) <= 3e-7 * np.maximum(1, np.abs(want))
    ).all()
