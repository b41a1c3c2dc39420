"""Scalar ALU: SOP1, SOP2, SOPK, SOPC (CDNA3 ISA chapter 5 and 12.1-12.5). Semantics are functions
of Python ints.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from ..asm import GOT_BASE, Instr
from ..batch import ALL, M32, Batch, Scalar, each, norm
from ..errors import UnsupportedError
from ..numerics import i32, i64, u32, u64
from ..operands import rs32, rs64, ws32, ws64

Closure = Callable[[Batch], Any]


def sx(x: int, bits: int = 32) -> int:
    return x - (1 << bits) if x >> (bits - 1) & 1 else x


def ffs(x: int) -> int:
    return (x & -x).bit_length() - 1 if x else M32


def flbit(x: int, bits: int) -> int:
    return bits - x.bit_length() if x else M32


def flbit_signed(x: int, bits: int) -> int:
    """Distance of the first bit that differs from the sign; -1 for 0 and -1."""
    return flbit(x ^ ((1 << bits) - 1 if x >> (bits - 1) else 0), bits)


def brev(x: int, bits: int) -> int:
    return int(format(x, f'0{bits}b')[::-1], 2)


def wqm(x: int) -> int:
    return sum(0xF << 4 * q for q in range(16) if x >> 4 * q & 0xF)


def quadmask(x: int) -> int:
    return sum(1 << q for q in range(16) if x >> 4 * q & 0xF)


def bitreplicate(x: int) -> int:
    return sum(3 << 2 * k for k in range(32) if x >> k & 1)


def bfe(x: int, s1: int, bits: int, is_signed: bool) -> int:
    off, width = s1 & (bits - 1), (s1 >> 16) & 0x7F
    x = (sx(x, bits) >> off if is_signed else x >> off) & ((1 << width) - 1)
    return (sx(x, width) if width else 0) & ((1 << bits) - 1) if is_signed else x


def sat_i32_overflow(a: Any, b: Any, r: Any) -> Any:
    return ((a ^ r) & (b ^ r)) >> 31 & 1


# name -> (dst bits, s0 bits, s1 bits, function, SCC rule); a function in VECTORISED also takes
# uint64 arrays
NZ = 'nonzero'
BIN: dict[str, tuple[int, int, int, Callable[..., Any], Any]] = {}
VECTORISED: set[str] = set()
LOGIC: dict[str, Callable[..., Any]] = {
    'and': lambda a, b: a & b,
    'or': lambda a, b: a | b,
    'xor': lambda a, b: a ^ b,
    'andn2': lambda a, b: a & ~b,
    'orn2': lambda a, b: a | ~b,
    'nand': lambda a, b: ~(a & b),
    'nor': lambda a, b: ~(a | b),
    'xnor': lambda a, b: ~(a ^ b),
}


def binary(
    bits: tuple[int, int, int], rule: Any, vectorised: bool = False, **fns: Callable[..., Any]
) -> None:
    for name, fn in fns.items():
        BIN['s_' + name] = (*bits, fn, rule)
        if vectorised:
            VECTORISED.add('s_' + name)


for logic_name, logic_fn in LOGIC.items():
    binary((32, 32, 32), NZ, True, **{logic_name + '_b32': logic_fn})
    binary((64, 64, 64), NZ, True, **{logic_name + '_b64': logic_fn})
binary(
    (32, 32, 32), NZ, True, lshl_b32=lambda a, b: a << (b & 31), lshr_b32=lambda a, b: a >> (b & 31)
)
binary(
    (64, 64, 32), NZ, True, lshl_b64=lambda a, b: a << (b & 63), lshr_b64=lambda a, b: a >> (b & 63)
)
binary(
    (32, 32, 32),
    NZ,
    ashr_i32=lambda a, b: sx(a) >> (b & 31),
    absdiff_i32=lambda a, b: abs(sx(a) - sx(b)),
    bfe_u32=lambda a, b: bfe(a, b, 32, False),
    bfe_i32=lambda a, b: bfe(a, b, 32, True),
)
binary(
    (64, 64, 32),
    NZ,
    ashr_i64=lambda a, b: sx(a, 64) >> (b & 63),
    bfe_u64=lambda a, b: bfe(a, b, 64, False),
    bfe_i64=lambda a, b: bfe(a, b, 64, True),
)
binary(
    (32, 32, 32),
    None,
    True,
    mul_i32=lambda a, b: a * b,
    mul_hi_u32=lambda a, b: (a * b) >> 32,
    pack_ll_b32_b16=lambda a, b: (a & 0xFFFF) | (b & 0xFFFF) << 16,
    pack_lh_b32_b16=lambda a, b: (a & 0xFFFF) | (b & 0xFFFF0000),
    pack_hh_b32_b16=lambda a, b: a >> 16 | (b & 0xFFFF0000),
)
binary(
    (32, 32, 32),
    None,
    mul_hi_i32=lambda a, b: (sx(a) * sx(b)) >> 32,
    bfm_b32=lambda a, b: ((1 << (a & 31)) - 1) << (b & 31),
)
binary((64, 32, 32), None, bfm_b64=lambda a, b: ((1 << (a & 63)) - 1) << (b & 63))
binary((32, 32, 32), lambda a, b, r: r >> 32, True, add_u32=lambda a, b: a + b)
binary((32, 32, 32), lambda a, b, r: b > a, True, sub_u32=lambda a, b: a - b)
binary(
    (32, 32, 32), lambda a, b, r: sat_i32_overflow(a, b, r & M32), True, add_i32=lambda a, b: a + b
)
binary(
    (32, 32, 32),
    lambda a, b, r: ((a ^ b) & (a ^ (r & M32))) >> 31 & 1,
    True,
    sub_i32=lambda a, b: a - b,
)
binary((32, 32, 32), lambda a, b, r: int(a < b), min_u32=min)
binary((32, 32, 32), lambda a, b, r: int(a > b), max_u32=max)
binary((32, 32, 32), lambda a, b, r: int(sx(a) < sx(b)), min_i32=lambda a, b: min(sx(a), sx(b)))
binary((32, 32, 32), lambda a, b, r: int(sx(a) > sx(b)), max_i32=lambda a, b: max(sx(a), sx(b)))
for shift in (1, 2, 3, 4):
    binary(
        (32, 32, 32),
        lambda a, b, r: (r >> 32) > 0,
        True,
        **{f'lshl{shift}_add_u32': lambda a, b, k=shift: (a << k) + b},
    )

UN: dict[
    str, tuple[int, int, Callable[[int], int], Any]
] = {  # name -> (dst bits, source bits, function, SCC rule)
    's_not_b32': (32, 32, lambda a: ~a, NZ),
    's_not_b64': (64, 64, lambda a: ~a, NZ),
    's_mov_b32': (32, 32, lambda a: a, None),
    's_mov_b64': (64, 64, lambda a: a, None),
    's_wqm_b32': (32, 32, lambda a: wqm(a) & M32, NZ),
    's_wqm_b64': (64, 64, wqm, NZ),
    's_quadmask_b32': (32, 32, quadmask, NZ),
    's_quadmask_b64': (64, 64, quadmask, NZ),
    's_bitreplicate_b64_b32': (64, 32, bitreplicate, None),
    's_brev_b32': (32, 32, lambda a: brev(a, 32), None),
    's_brev_b64': (64, 64, lambda a: brev(a, 64), None),
    's_bcnt0_i32_b32': (32, 32, lambda a: 32 - a.bit_count(), NZ),
    's_bcnt1_i32_b32': (32, 32, int.bit_count, NZ),
    's_bcnt0_i32_b64': (32, 64, lambda a: 64 - a.bit_count(), NZ),
    's_bcnt1_i32_b64': (32, 64, int.bit_count, NZ),
    's_ff0_i32_b32': (32, 32, lambda a: ffs(~a & M32), None),
    's_ff1_i32_b32': (32, 32, ffs, None),
    's_ff0_i32_b64': (32, 64, lambda a: ffs(~a & ALL), None),
    's_ff1_i32_b64': (32, 64, ffs, None),
    's_flbit_i32_b32': (32, 32, lambda a: flbit(a, 32), None),
    's_flbit_i32_b64': (32, 64, lambda a: flbit(a, 64), None),
    's_flbit_i32': (32, 32, lambda a: flbit_signed(a, 32), None),
    's_flbit_i32_i64': (32, 64, lambda a: flbit_signed(a, 64), None),
    's_sext_i32_i8': (32, 32, lambda a: sx(a & 0xFF, 8), None),
    's_sext_i32_i16': (32, 32, lambda a: sx(a & 0xFFFF, 16), None),
    's_abs_i32': (32, 32, lambda a: abs(sx(a)), NZ),
}
def sx_array(x: Any) -> Any:
    """uint64 array of 32-bit values -> int64, sign-extended."""
    return x.astype(u32).view(i32).astype(i64)


# the same on uint64 arrays, for those above that Python ints alone can do: (result, SCC or None)
ARRAYS: dict[str, tuple[Callable[..., Any], Callable[..., Any] | None]] = {
    's_ashr_i32': (lambda a, b: (sx_array(a) >> (b & 31).astype(i64)).view(u64), None),
    's_ashr_i64': (lambda a, b: (a.view(i64) >> (b & 63).astype(i64)).view(u64), None),
    's_mul_hi_i32': (lambda a, b: ((sx_array(a) * sx_array(b)) >> 32).view(u64), None),
    's_min_u32': (np.minimum, lambda a, b: a < b),
    's_max_u32': (np.maximum, lambda a, b: a > b),
    's_min_i32': (
        lambda a, b: np.minimum(sx_array(a), sx_array(b)).view(u64),
        lambda a, b: sx_array(a) < sx_array(b),
    ),
    's_max_i32': (
        lambda a, b: np.maximum(sx_array(a), sx_array(b)).view(u64),
        lambda a, b: sx_array(a) > sx_array(b),
    ),
    's_bfe_u32': (
        lambda a, b: (a >> (b & 31)) & ((u64(1) << np.minimum(b >> 16 & 0x7F, 32)) - u64(1)),
        None,
    ),
}
CMP: dict[str, Callable[..., Any]] = {
    'eq': lambda a, b: a == b,
    'lg': lambda a, b: a != b,
    'lt': lambda a, b: a < b,
    'le': lambda a, b: a <= b,
    'gt': lambda a, b: a > b,
    'ge': lambda a, b: a >= b,
}
SAVEEXEC: dict[str, Callable[..., Any]] = {  # new EXEC from (source, old EXEC)
    'and': lambda s, e: s & e,
    'or': lambda s, e: s | e,
    'xor': lambda s, e: s ^ e,
    'andn2': lambda s, e: s & ~e,
    'orn2': lambda s, e: s | ~e,
    'nand': lambda s, e: ~(s & e),
    'nor': lambda s, e: ~(s | e),
    'xnor': lambda s, e: ~(s ^ e),
    'andn1': lambda s, e: ~s & e,
    'orn1': lambda s, e: ~s | e,
}
COMPARE = re.compile(r'^s_cmp(k?)_(eq|lg|lt|le|gt|ge)_([ui])(32|64)$')


def wide(x: Scalar) -> Any:
    return u64(x) if type(x) is int else x


def apply2(fn: Callable[..., Any], array_fn: Any, a: Scalar, b: Scalar) -> Scalar:
    """`array_fn`: the function for uint64 arrays, None when there is none."""
    if type(a) is int and type(b) is int:
        return fn(a, b)
    if array_fn is None:
        return each(fn, a, b)
    return array_fn(wide(a), wide(b))


def as_flag(x: Any) -> Scalar:
    return norm(x.astype(u64)) if isinstance(x, np.ndarray) else int(x)


def mask_of(bits: int) -> int:
    return M32 if bits == 32 else ALL


def two_sources(ins: Instr) -> Closure:
    o = ins.ops
    db, ab, bb, fn, rule = BIN[ins.op]
    a, b = (rs32 if ab == 32 else rs64)(o[1]), (rs32 if bb == 32 else rs64)(o[2])
    wr, dm = (ws32 if db == 32 else ws64)(o[0]), mask_of(db)
    vec, array_rule = fn if ins.op in VECTORISED else None, None
    if ins.op in ARRAYS:
        array_fn, array_rule = ARRAYS[ins.op]
        vec = lambda x, y: norm(array_fn(x, y))  # noqa: E731

    def plain(w: Batch) -> None:
        r = apply2(fn, vec, a(w), b(w)) & dm
        wr(w, r)
        if rule is NZ:
            w.scc = as_flag(r != 0)

    def with_rule(w: Batch) -> None:
        x, y = a(w), b(w)
        r = apply2(fn, vec, x, y)
        wr(w, r & dm)
        if type(x) is int and type(y) is int:
            w.scc = int(rule(x, y, r))
        elif array_rule:
            w.scc = as_flag(np.broadcast_to(array_rule(wide(x), wide(y)), w.n))
        elif vec:
            w.scc = as_flag(rule(wide(x), wide(y), r))
        else:
            w.scc = each(lambda p, q: int(rule(p, q, 0)), x, y)

    return plain if rule is NZ or rule is None else with_rule


def carry(ins: Instr) -> Closure:
    """s_addc_u32, s_subb_u32."""
    a, b, wr = rs32(ins.ops[1]), rs32(ins.ops[2]), ws32(ins.ops[0])
    sub = ins.op == 's_subb_u32'

    def f(w: Batch) -> None:
        x, y, c = a(w), b(w), w.scc
        if not (type(x) is int and type(y) is int and type(c) is int):
            x, y, c = wide(x), wide(y), wide(c)
        r = x - y - c if sub else x + y + c
        w.scc = as_flag((y + c > x) if sub else (r > M32))
        wr(w, r & M32)

    return f


def one_source(ins: Instr) -> Closure:
    db, ab, fn, rule = UN[ins.op]
    a, wr, dm = (
        (rs32 if ab == 32 else rs64)(ins.ops[1]),
        (ws32 if db == 32 else ws64)(ins.ops[0]),
        mask_of(db),
    )
    if ins.op in ('s_mov_b32', 's_mov_b64'):
        return lambda w: wr(w, a(w))

    def f(w: Batch) -> None:
        r = each(fn, a(w)) & dm
        wr(w, r)
        if rule:
            w.scc = as_flag(r != 0)

    return f


def select(ins: Instr) -> Closure:
    """s_cselect_*, s_cmov_*."""
    o, is64 = ins.ops, ins.op.endswith('b64')
    rd, wr = (rs64, ws64(o[0])) if is64 else (rs32, ws32(o[0]))
    a, b = rd(o[1]), rd(o[2]) if 'cselect' in ins.op else rd(o[0])

    def f(w: Batch) -> None:
        if type(w.scc) is int:
            wr(w, a(w) if w.scc else b(w))
        else:
            wr(w, norm(np.where(w.scc != 0, wide(a(w)), wide(b(w)))))

    return f


def compare(ins: Instr, m: re.Match[str]) -> Closure:
    bits, is_signed, fn = int(m.group(4)), m.group(3) == 'i', CMP[m.group(2)]
    rd = rs64 if bits == 64 else rs32
    a, b = rd(ins.ops[0]), rd(ins.ops[1])
    if m.group(1):
        k = int(ins.ops[1].val)
        k = sx(k & 0xFFFF, 16) & M32 if is_signed else k & 0xFFFF
        b = lambda w: k  # noqa: E731
    flip = 1 << (bits - 1) if is_signed else 0  # maps signed order to unsigned order

    def f(w: Batch) -> None:
        w.scc = as_flag(fn(a(w) ^ flip, b(w) ^ flip))

    return f


def bit_compare(ins: Instr) -> Closure:
    """s_bitcmp0/1: SCC = (bit == 0 or 1)."""
    is64, want = ins.op.endswith('64'), int('bitcmp1' in ins.op)
    a, b, width = (rs64 if is64 else rs32)(ins.ops[0]), rs32(ins.ops[1]), 63 if is64 else 31

    def f(w: Batch) -> None:
        w.scc = each(lambda x, y: int((x >> (y & width) & 1) == want), a(w), b(w))

    return f


def bit_set(ins: Instr) -> Closure:
    is64, one = ins.op.endswith('b64'), '1' in ins.op.split('_')[1]
    rd, wr = (rs64, ws64(ins.ops[0])) if is64 else (rs32, ws32(ins.ops[0]))
    a, d, width = rs32(ins.ops[1]), rd(ins.ops[0]), 63 if is64 else 31

    def fn(x: int, y: int) -> int:
        return y | 1 << (x & width) if one else y & ~(1 << (x & width))

    return lambda w: wr(w, each(fn, a(w), d(w)))


def immediate(ins: Instr) -> Closure:
    """s_movk, s_cmovk, s_addk, s_mulk: a signed 16-bit constant."""
    o = ins.ops
    k, d, wr = sx(int(o[1].val) & 0xFFFF, 16), rs32(o[0]), ws32(o[0])
    if ins.op == 's_movk_i32':
        return lambda w: wr(w, k & M32)
    if ins.op == 's_mulk_i32':
        return lambda w: wr(w, each(lambda x: x * k & M32, d(w)))
    if ins.op == 's_cmovk_i32':
        return lambda w: wr(w, each(lambda c, x: k & M32 if c else x, w.scc, d(w)))

    def add(w: Batch) -> None:
        x = d(w)
        w.scc = each(lambda x: int(not -1 << 31 <= sx(x) + k < 1 << 31), x)
        wr(w, each(lambda x: (x + k) & M32, x))

    return add


def save_exec(ins: Instr, kind: str) -> Closure:
    fn, a, wr = SAVEEXEC[kind], rs64(ins.ops[1]), ws64(ins.ops[0])

    def f(w: Batch) -> None:
        src, old = a(w), w.exec64()
        wr(w, old)
        r = (
            fn(src, old)
            if type(src) is int and type(old) is int
            else norm(fn(wide(src), wide(old)))
        ) & ALL
        w.set_exec(r)
        w.scc = as_flag(r != 0)

    return f


def write_exec(ins: Instr, kind: str) -> Closure:
    """s_andn1_wrexec_b64, s_andn2_wrexec_b64: EXEC and destination get the result."""
    fn, a, wr = SAVEEXEC[kind], rs64(ins.ops[1]), ws64(ins.ops[0])

    def f(w: Batch) -> None:
        r = each(lambda s, e: fn(s, e) & ALL, a(w), w.exec64())
        w.set_exec(r)
        wr(w, r)
        w.scc = as_flag(r != 0)

    return f


RELOCATION = re.compile(r'^(.+?)@(rel32|gotpcrel32)@(lo|hi)\+\d+$')


def symbol_offset(ins: Instr, kernel: Any) -> None:
    """Rewrite `sym@rel32@lo+4` or `sym@gotpcrel32@lo+4` (S + A - P, or G + GOT + A - P) into the
    constant that completes an s_getpc address."""
    for o in ins.ops[1:]:
        m = RELOCATION.match(o.val) if o.kind == 'sym' else None
        if not m:
            continue
        name = m.group(1)
        if name not in kernel.module.labels:
            raise UnsupportedError(f'`{ins.text}`: {name} is not a function of this file')
        to = kernel.module.address(kernel.module.labels[name])
        if m.group(2) == 'gotpcrel32':
            to = GOT_BASE + 8 * kernel.module.got.setdefault(name, len(kernel.module.got))
        delta = to - kernel.module.address(ins.pc - (m.group(3) == 'hi'))
        o.kind, o.val = 'imm', delta & M32 if m.group(3) == 'lo' else delta >> 32 & M32


def decode(ins: Instr, kernel: Any) -> Closure | None:
    op = ins.op
    symbol_offset(ins, kernel)
    if op in BIN:
        return two_sources(ins)
    if op in UN:
        return one_source(ins)
    if op in ('s_addc_u32', 's_subb_u32'):
        return carry(ins)
    if op in ('s_cselect_b32', 's_cselect_b64', 's_cmov_b32', 's_cmov_b64'):
        return select(ins)
    if m := COMPARE.match(op):
        return compare(ins, m)
    if op.startswith('s_bitcmp'):
        return bit_compare(ins)
    if op.startswith('s_bitset'):
        return bit_set(ins)
    if op in ('s_movk_i32', 's_cmovk_i32', 's_addk_i32', 's_mulk_i32'):
        return immediate(ins)
    if m := re.match(r'^s_(\w+)_saveexec_b64$', op):
        return save_exec(ins, m.group(1))
    if m := re.match(r'^s_(andn[12])_wrexec_b64$', op):
        return write_exec(ins, m.group(1))
    return None
