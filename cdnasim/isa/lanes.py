"""Vector instructions that are no lane-wise function: carries, lane moves, selects, division
helpers (CDNA3 ISA 12.8-12.12).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from ..asm import Instr, Operand
from ..batch import LANES, M0, M32, VCC, Batch, Row, mask_to_bool, norm, spread
from ..errors import UnsupportedError
from ..numerics import f32, f64, i32, i64, u32, u64
from ..operands import RAW, TYPED, lo32, rs32, rs64, rv32, rv64, write_mask, ws32, wv32, wv64
from .valu_float import fma16, fma32, fma64
from .vop import Closure, finish, sdwa_read, source

CARRY = re.compile(r'^v_(add|sub|subrev)_co_u32$|^v_(addc|subb|subbrev)_co_u32$')
FULL = Operand('s', VCC, 2, text='vcc')


def carry(ins: Instr) -> Closure:
    """v_add_co_u32 and relatives: dst, carry-out, a, b [, carry-in]. The carry of an inactive lane
    is 0.
    """
    op, o = ins.base, ins.ops
    rd, wr, put_carry = [rv32(x) for x in o[2:4]], wv32(o[0]), write_mask(o[1])
    if ins.sdwa:
        rd = [
            sdwa_read(r, ins.mods.get(f'src{k}_sel', 'DWORD'), o[2 + k].sext)
            for k, r in enumerate(rd)
        ]
    if ins.dpp:
        rd[0] = ins.dpp.read(rd[0])
    cin = rs64(o[4]) if len(o) > 4 else None
    sub, rev, i, clamp = 'sub' in op, 'rev' in op, o[0].idx, 'clamp' in ins.flags

    def f(w: Batch) -> None:
        a, b = (r(w).astype(i64) for r in rd)
        if rev:
            a, b = b, a
        c = mask_to_bool(cin(w), w.n).astype(i64) if cin else 0
        r = a - b - c if sub else a + b + c
        over = (r < 0) | (r > M32)
        if clamp:
            r = np.clip(r, 0, M32)
        x = (r & M32).astype(u32)
        if ins.dpp:
            m = ins.dpp.mask(w)
            w.put_masked(i, x, m)
            put_carry(w, over & m)
        else:
            wr(w, x)
            put_carry(w, over)

    return f


def cndmask(ins: Instr) -> Closure:
    o = ins.ops
    cond = rs64(o[3] if len(o) > 3 else FULL)
    a, b = (source(ins, k, 'f' if o[k].neg or o[k].abs else 'u', k - 1) for k in (1, 2))
    put = finish(ins, 'u')

    def f(w: Batch) -> None:
        put(
            w,
            np.where(
                mask_to_bool(cond(w), w.n), np.asarray(b(w)).view(u32), np.asarray(a(w)).view(u32)
            ),
        )

    return f


def first_lane(ins: Instr) -> Closure:
    """v_readfirstlane: lane of the lowest active bit, lane 0 when EXEC is empty."""
    a, wr = rv32(ins.ops[1]), ws32(ins.ops[0])

    def f(w: Batch) -> None:
        x = spread(a(w), w.shape)
        col = x[:, 0] if w.full else x[np.arange(w.n), np.argmax(w.m, axis=1)]
        wr(w, norm(col.astype(u64)))

    return f


def read_lane(ins: Instr) -> Closure:
    i, lane, wr = ins.ops[1].idx, rs32(ins.ops[2]), ws32(ins.ops[0])

    def f(w: Batch) -> None:
        k = lane(w) & 63
        row = w.v[i]
        col = row[:, k] if type(k) is int else row[np.arange(w.n), k.astype(i64)]
        wr(w, norm(col.astype(u64)))

    return f


def write_lane(ins: Instr) -> Closure:
    """v_writelane ignores EXEC."""
    i, val, lane = ins.ops[0].idx, rv32(ins.ops[1]), rs32(ins.ops[2])

    def f(w: Batch) -> None:
        k = lane(w)
        here: Any = ((k & 63) if type(k) is int else (k.astype(i64) & 63)[:, None]) == LANES
        w.put_masked(i, val(w), here)

    return f


def swap(ins: Instr) -> Closure:
    i, j = ins.ops[0].idx, ins.ops[1].idx

    def f(w: Batch) -> None:
        a, b = w.v[i], w.v[j]
        w.put(i, b)
        w.put(j, a)

    return f


def permlane_swap(ins: Instr) -> Closure:
    """v_permlane32_swap d, s: d[32..63] <-> s[0..31]; v_permlane16_swap: odd rows of 16 of d <->
    even rows of s. All lanes take part, whatever EXEC says (CDNA4 ISA, pseudo-code of
    V_PERMLANE16_SWAP_B32)."""
    d, s, half = ins.ops[0].idx, ins.ops[1].idx, 32 if '32_swap' in ins.base else 16
    lo = LANES[(LANES & half) == 0]

    def f(w: Batch) -> None:
        x, y = np.array(w.v[d]), np.array(w.v[s])
        x[:, lo + half], y[:, lo] = y[:, lo].copy(), x[:, lo + half].copy()
        w.v[d], w.v[s] = x, y

    return f


def bitop3(ins: Instr) -> Closure:
    """Any function of three bits: bit (4a + 2b + c) of the immediate."""
    table, rd, wr = ins.mods.get('bitop3', 0), [rv32(x) for x in ins.ops[1:4]], wv32(ins.ops[0])
    keep = u32(0xFFFF) if ins.base.endswith('b16') else u32(M32)
    sel = ins.mods.get('op_sel', [0, 0, 0, 0])
    if any(sel):
        raise UnsupportedError(f'op_sel: `{ins.text}`')
    terms = [k for k in range(8) if table >> k & 1]

    def f(w: Batch) -> None:
        x = [r(w) for r in rd]
        out = u32(0)
        for k in terms:
            out = out | (
                (x[0] if k & 4 else ~x[0]) & (x[1] if k & 2 else ~x[1]) & (x[2] if k & 1 else ~x[2])
            )
        wr(w, out & keep)

    return f


def mad64(ins: Instr) -> Closure:
    """v_mad_u64_u32, v_mad_i64_i32: 32 x 32 + 64; the mask gets bit 64 of the sum (CDNA3 ISA,
    V_MAD_U64_U32).
    """
    o = ins.ops
    a, b, c, wr, put_carry = rv32(o[2]), rv32(o[3]), rv64(o[4]), wv64(o[0]), write_mask(o[1])
    is_signed = ins.base == 'v_mad_i64_i32'

    def f(w: Batch) -> None:
        x, y, z = a(w), b(w), c(w)
        if is_signed:
            p = (x.view(i32).astype(i64) * y.view(i32).astype(i64)).view(u64)
            r = p + z
            wraps = (~(p ^ z) & (p ^ r)) >> u64(63)
            over = (r >> u64(63)) ^ wraps != 0  # bit 64 of the 65-bit sum, its sign
        else:
            p = x.astype(u64) * y.astype(u64)
            r = p + z
            over = r < p
        wr(w, r)
        put_carry(w, over)

    return f


def gpr_index_move(ins: Instr, index: set[str]) -> Closure:
    """v_mov_b32 between s_set_gpr_idx_on and _off: M0[7:0] is added to the register number of SRC0
    or DST.
    """
    src, dst = ins.ops[1], ins.ops[0].idx
    rd = rv32(src)

    def f(w: Batch) -> None:
        k = w.s[M0] & 255
        shifts = [k] if type(k) is int else sorted(set(k.tolist()))
        for shift in shifts:
            here = w.m if type(k) is int else w.m & (k == shift)[:, None]
            x = w.v[src.idx + shift] if 'SRC0' in index and src.kind == 'v' else rd(w)
            w.put_masked(dst + (shift if 'DST' in index else 0), x, here)

    return f


# ---- division: v_div_scale, v_div_fmas (LLVM lowers fdiv to these; CDNA3 ISA, V_DIV_SCALE_F32)
# type: (float, exponent bits' shift, mask, scale, small exponent)
LAYOUT: dict[str, tuple[Any, int, int, int, int]] = {
    'f': (f32, 23, 255, 64, 23),
    'D': (f64, 52, 2047, 128, 53),
}


def div_scale(ins: Instr) -> Closure:
    """Scale numerator or denominator so that the Newton steps stay in range; the mask tells
    v_div_fmas to undo it.
    """
    ty = 'D' if ins.base.endswith('f64') else 'f'
    fl, shift, field, by, small = LAYOUT[ty]
    far = 96 if ty == 'f' else 768
    a, b, c = (source(ins, k, ty, k - 2) for k in (2, 3, 4))
    put, put_mask = finish_plain(ins, ty), write_mask(ins.ops[1])
    bits = u32 if ty == 'f' else u64
    tiny = np.finfo(fl).tiny

    def exponent(x: Any) -> Any:
        return ((x.view(bits) >> bits(shift)) & bits(field)).astype(i64)

    def f(w: Batch) -> None:
        s0, s1, s2 = (np.broadcast_to(g(w), w.shape).astype(fl) for g in (a, b, c))
        up, down = np.ldexp(s0, by).astype(fl), np.ldexp(s0, -by).astype(fl)
        den, num = s0 == s1, s0 == s2
        rcp, q = 1 / s1.astype(np.longdouble), s2.astype(np.longdouble) / s1
        inv_small, q_small = (
            (np.abs(rcp) < tiny) & (rcp != 0),
            (np.abs(q) < tiny) & (q != 0),
        )  # denormal results
        conditions = [
            (s2 == 0) | (s1 == 0),
            exponent(s2) - exponent(s1) >= far,
            (np.abs(s1) < tiny) & (s1 != 0),
            inv_small & q_small,
            inv_small,
            q_small,
            exponent(s2) <= small,
        ]
        # Fourth case: the manual's text says 2^+64, which overflows the large denominators it is
        # for; only 2^-64 makes LLVM's fdiv correctly rounded (tests/test_llvm.py).
        values = [
            np.full(w.shape, np.nan, fl),
            np.where(den, up, s0),
            up,
            np.where(den, down, s0),
            down,
            np.where(num, up, s0),
            up,
        ]
        flags = np.select(
            conditions, [np.full(w.shape, k, bool) for k in (0, 1, 0, 1, 0, 1, 0)], False
        )
        put(w, np.select(conditions, values, s0).astype(fl))
        put_mask(w, flags)

    return f


def finish_plain(ins: Instr, ty: str) -> Callable[[Batch, Any], None]:
    wr = wv64(ins.ops[0]) if ty == 'D' else wv32(ins.ops[0])
    bits = u64 if ty == 'D' else u32
    return lambda w, x: wr(w, x.view(bits))


def div_fmas(ins: Instr) -> Closure:
    """fma, then times 2^64 (f64: 2^128) in lanes of VCC, towards whichever end of the range is
    near.
    """
    ty = 'D' if ins.base.endswith('f64') else 'f'
    fl, shift, field, by, _ = LAYOUT[ty]
    a, b, c = (source(ins, k, ty, k - 1) for k in (1, 2, 3))
    put, bits = finish(ins, ty), u32 if ty == 'f' else u64

    def f(w: Batch) -> None:
        x, y, z = a(w), b(w), c(w)
        # f32 stays in f64, where the scaling below cannot overflow
        r = np.asarray(x).astype(f64) * y + z if ty == 'f' else fma64(x, y, z)
        raw: Any = np.asarray(z).view(bits)
        e = (raw >> bits(shift)) & bits(field)
        up = np.where(e > field // 2, by, -by)
        power = np.where(mask_to_bool(w.vcc64(), w.n), up, 0)
        if ty == 'D':
            r = off_the_tie(r, fma64(x, y, z - r), power)
        put(w, np.ldexp(r, power).astype(fl))

    return f


def off_the_tie(r: Any, rest: Any, power: Any) -> Any:
    """``r``, which stands for ``r + rest``, ready for a scaling by 2^power that rounds once: where
    it would be halfway between two denormals it moves to the side of the rest.
    """
    units = np.ldexp(r, power + 1074)  # of the smallest denormal; whole where nothing is dropped
    tie = (np.abs(units) < 2.0**52) & (units - np.floor(units) == 0.5) & (rest != 0)
    return np.where(tie, np.nextafter(r, np.where(rest > 0, np.inf, -np.inf)), r)


def constant_fma(ins: Instr) -> Closure:
    """v_fmamk: s0 * K + s1 (text: dst, s0, K, s1); v_fmaak: s0 * s1 + K."""
    o = ins.ops
    a, b, c = (rv32(x, 'f') for x in ((o[1], o[2], o[3])))
    wr = wv32(o[0])
    return lambda w: wr(w, fma32(a(w).view(f32), b(w).view(f32), c(w).view(f32)).view(u32))


def constant_mad_f16(ins: Instr) -> Closure:
    """v_madmk_f16, v_madak_f16."""
    a, b, c = (rv32(x, 'h') for x in ins.ops[1:4])
    wr = wv32(ins.ops[0])

    def half(x: Any) -> Any:
        return TYPED['h'](x & u32(0xFFFF))

    return lambda w: wr(w, RAW['h'](fma16(half(a(w)), half(b(w)), half(c(w)))))


def mqsad_u32(ins: Instr) -> Closure:
    """Four masked SADs of a sliding window into four registers."""
    from .valu_int import sad, wrap

    d, c, wide, ref = ins.ops[0].idx, ins.ops[3].idx, rv64(ins.ops[1]), rv32(ins.ops[2])

    def f(w: Batch) -> None:
        x, r = wide(w), ref(w)
        rows: list[Row] = [
            wrap(sad(lo32(x >> u64(8 * k)), r, w.v[c + k], masked=True)) for k in range(4)
        ]
        for k, row in enumerate(rows):
            w.put(d + k, row)

    return f


NAMED: dict[str, Callable[[Instr], Closure]] = {
    'v_nop': lambda ins: lambda w: None,
    'v_clrexcp': lambda ins: lambda w: None,
    'v_cndmask_b32': cndmask,
    'v_readfirstlane_b32': first_lane,
    'v_readlane_b32': read_lane,
    'v_writelane_b32': write_lane,
    'v_swap_b32': swap,
    'v_permlane32_swap_b32': permlane_swap,
    'v_permlane16_swap_b32': permlane_swap,
    'v_bitop3_b32': bitop3,
    'v_bitop3_b16': bitop3,
    'v_mad_u64_u32': mad64,
    'v_mad_i64_i32': mad64,
    'v_div_scale_f32': div_scale,
    'v_div_scale_f64': div_scale,
    'v_div_fmas_f32': div_fmas,
    'v_div_fmas_f64': div_fmas,
    'v_fmamk_f32': constant_fma,
    'v_fmaak_f32': constant_fma,
    'v_madmk_f32': constant_fma,
    'v_madak_f32': constant_fma,
    'v_madmk_f16': constant_mad_f16,
    'v_madak_f16': constant_mad_f16,
    'v_mqsad_u32_u8': mqsad_u32,
}


def decode(ins: Instr) -> Closure | None:
    if CARRY.match(ins.base):
        return carry(ins)
    build = NAMED.get(ins.base)
    return build(ins) if build else None
