"""Vector ALU, the general part: a table row `name -> (signature, function)` becomes a closure with
operand modifiers (neg, abs, op_sel), DPP, SDWA, output modifiers, clamp and EXEC around the
function.

Signature: destination type then source types, see operands.py (`'f f f'` is v_add_f32). The
functions get arrays that broadcast to (waves, 64) and return the typed result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..asm import Instr, Operand
from ..batch import LANES, M32, Batch, Row, spread
from ..errors import UnsupportedError
from ..numerics import Array, i32, i64, u16, u32, u64
from ..operands import RAW, TYPED, Read, lo32, rv32, rv64, wv32, wv64

Closure = Callable[[Batch], Any]
Fn = Callable[..., Any]
FLOAT, HALF, WIDE = set('fhDb'), set('hHsb'), set('UID')


class Table(dict[str, tuple[list[str], Fn]]):
    """Rows of one instruction family. `acc` marks instructions that read their destination as the
    last source.
    """

    def __init__(self) -> None:
        super().__init__()
        self.acc: set[str] = set()

    def add(self, sig: str, **fns: Fn) -> None:
        for name, fn in fns.items():
            self['v_' + name] = (sig.split(), fn)

    def accumulate(self, sig: str, **fns: Fn) -> None:
        """Rows whose last source is the destination's old value."""
        self.add(sig, **fns)
        self.acc.update('v_' + name for name in fns)


# ---- DPP: which lane a lane reads (CDNA3 ISA 6.4.2 / table of DPP_CTRL)


def dpp_source(mods: dict[str, Any], flags: set[str]) -> tuple[Array, Array]:
    """-> (source lane, inside the row) per lane."""
    row, pos = LANES & ~15, LANES & 15
    ok = np.ones(64, bool)
    if 'quad_perm' in mods:
        return (LANES & ~3) + np.array(mods['quad_perm'])[LANES & 3], ok
    if 'row_shl' in mods:
        return LANES + mods['row_shl'], pos + mods['row_shl'] < 16
    if 'row_shr' in mods:
        return LANES - mods['row_shr'], pos - mods['row_shr'] >= 0
    if 'row_ror' in mods:
        return row + ((pos - mods['row_ror']) & 15), ok
    if 'row_newbcast' in mods:
        return row + mods['row_newbcast'], ok
    if 'row_bcast' in mods:
        return (row - 1, LANES >= 16) if mods['row_bcast'] == 15 else (np.full(64, 31), LANES >= 32)
    named: dict[str, tuple[Array, Array]] = {
        'row_mirror': (row + 15 - pos, ok),
        'row_half_mirror': ((LANES & ~7) + 7 - (LANES & 7), ok),
        'wave_shl': (LANES + 1, LANES < 63),
        'wave_shr': (LANES - 1, LANES > 0),
        'wave_rol': ((LANES + 1) & 63, ok),
        'wave_ror': ((LANES - 1) & 63, ok),
    }
    for key, value in named.items():
        if key in flags or key in mods:
            return value
    raise UnsupportedError(f'DPP control {mods} {sorted(flags)}')


class Dpp:
    """Decoded DPP control. A source lane is valid when it is in the row and active."""

    def __init__(self, ins: Instr):
        src, self.inside = dpp_source(ins.mods, ins.flags)
        self.src = np.where(self.inside, src, 0)
        rows, banks = ins.mods.get('row_mask', 15), ins.mods.get('bank_mask', 15)
        self.enabled = ((rows >> (LANES >> 4)) & 1).astype(bool) & (
            (banks >> ((LANES >> 2) & 3)) & 1
        ).astype(bool)
        self.zero = ins.mods.get('bound_ctrl') in (0, 1)  # LLVM prints either for BOUND_CTRL = 1

    def read(self, rd: Read) -> Read:
        src, inside, whole = self.src, self.inside, bool(self.inside.all())

        def get(w: Batch) -> Row:
            x = spread(rd(w), w.shape)[:, src]
            if w.full:
                return x if whole else np.where(inside, x, u32(0))
            return np.where(inside & w.m[:, src], x, u32(0))

        return get

    def mask(self, w: Batch) -> Array:
        """Lanes that are written."""
        m = w.m & self.enabled
        return m if self.zero else m & self.inside & w.m[:, self.src]


# ---- SDWA (CDNA3 ISA 6.4.1)
SEL = {
    'BYTE_0': (0, 8),
    'BYTE_1': (8, 8),
    'BYTE_2': (16, 8),
    'BYTE_3': (24, 8),
    'WORD_0': (0, 16),
    'WORD_1': (16, 16),
    'DWORD': (0, 32),
}


def sdwa_read(rd: Read, sel: str, sext: bool) -> Read:
    off, width = SEL[sel]
    if width == 32:
        return rd
    m, drop = u32((1 << width) - 1), u32(32 - width)
    if sext:
        return lambda w: (((rd(w) >> u32(off)) << drop).view(i32) >> drop.view(i32)).view(u32)
    return lambda w: (rd(w) >> u32(off)) & m


def sdwa_write(old: Row, x: Row, sel: str, unused: str) -> Row:
    off, width = SEL[sel]
    if width == 32:
        return x
    m = u32((1 << width) - 1)
    x = x & m
    if unused == 'UNUSED_PRESERVE':
        return (old & ~(m << u32(off))) | (x << u32(off))
    if unused == 'UNUSED_SEXT':
        sign = (x >> u32(width - 1)) & u32(1)
        above = u32((M32 << (off + width)) & M32)
        return (x << u32(off)) | np.where(sign != 0, above, u32(0))
    return x << u32(off)


# ---- operands


def raw_reader(o: Operand, ty: str) -> Read:
    if ty in WIDE:
        return rv64(o, ty)
    return rv32(o, 'h' if ty in 'Hs' and o.kind == 'flt' else ty)


def source(ins: Instr, k: int, ty: str, nth: int) -> Read:
    """Typed reader of operand k, the nth source."""
    o, mods = ins.ops[k], ins.mods
    rd = raw_reader(o, ty)
    if ty not in WIDE:
        if ins.sdwa:
            rd = sdwa_read(rd, mods.get(f'src{nth}_sel', 'DWORD'), o.sext)
        if ins.dpp and nth == 0:
            rd = ins.dpp.read(rd)
        if ty in HALF and not ins.sdwa:
            rd = half_reader(rd, nth < len(mods.get('op_sel', ())) and mods['op_sel'][nth])
    elif ins.dpp and nth == 0:
        rd = wide_dpp(ins, o)
    return with_modifiers(rd, o, ty, ins)


def wide_dpp(ins: Instr, o: Operand) -> Read:
    lo, hi = (ins.dpp.read(lambda w, i=o.idx + k: w.v[i]) for k in (0, 1))
    return lambda w: lo(w).astype(u64) | hi(w).astype(u64) << u64(32)


def half_reader(rd: Read, high: Any) -> Read:
    return (lambda w: rd(w) >> u32(16)) if high else (lambda w: rd(w) & u32(0xFFFF))


def with_modifiers(rd: Read, o: Operand, ty: str, ins: Instr) -> Read:
    conv, neg, ab = TYPED[ty], o.neg, o.abs
    if not (neg or ab):
        return rd if ty in 'uU' else lambda w: conv(rd(w))
    if ty not in FLOAT:
        raise UnsupportedError(f'neg/abs on an integer operand: `{ins.text}`')

    def get(w: Batch) -> Any:
        x = conv(rd(w))
        x = np.abs(x) if ab else x
        return -x if neg else x

    return get


def post_steps(ins: Instr, ty: str) -> list[Fn]:
    """Output modifiers mul:2, mul:4, div:2 and the float clamp to [0, 1] (NaN gives 0,
    DX10_CLAMP).
    """
    steps: list[Fn] = []
    scale = {2: 2.0, 4: 4.0}.get(ins.mods.get('mul', 0)) or (
        0.5 if ins.mods.get('div') == 2 else None
    )
    if scale:
        steps.append(lambda x: x * x.dtype.type(scale))
    if 'clamp' in ins.flags and ty in FLOAT:
        steps.append(
            lambda x: np.where(
                np.isnan(x), x.dtype.type(0), np.clip(x, x.dtype.type(0), x.dtype.type(1))
            )
        )
    return steps


def finish(ins: Instr, ty: str) -> Callable[[Batch, Any], None]:
    """Writer of a typed result. 16-bit results clear the upper half unless op_sel names a half
    (CDNA3 ISA 6.2.4).
    """
    o, mods, raw, wide = ins.ops[0], ins.mods, RAW[ty], ty in WIDE
    wr, i, post = wv64(o) if wide else wv32(o), o.idx, post_steps(ins, ty)
    sel = mods.get('op_sel', [])
    half = ty in HALF and len(sel) > 1
    high = half and len(sel) == len(ins.ops) and sel[-1]
    dst_sel, unused = mods.get('dst_sel', 'DWORD'), mods.get('dst_unused', 'UNUSED_PAD')
    sdwa = ins.sdwa and dst_sel != 'DWORD'
    if not (post or half or sdwa or ins.dpp):
        return wr if ty in 'uU' else lambda w, x: wr(w, raw(x))

    def put(w: Batch, x: Any) -> None:
        for step in post:
            x = step(x)
        x = raw(x)
        if half:
            x = (w.v[i] & u32(0xFFFF)) | (x << u32(16)) if high else (w.v[i] & u32(0xFFFF0000)) | x
        if sdwa:
            x = sdwa_write(w.v[i], x, dst_sel, unused)
        if ins.dpp and wide:
            w.put_masked(i, lo32(x), ins.dpp.mask(w))
            w.put_masked(i + 1, (x >> u64(32)).astype(u32), ins.dpp.mask(w))
        elif ins.dpp:
            w.put_masked(i, x, ins.dpp.mask(w))
        else:
            wr(w, x)

    return put


RANGE: dict[str, tuple[int, int, Any]] = {
    'u': (0, M32, u32),
    'i': (-(2**31), 2**31 - 1, i32),
    'H': (0, 65535, u16),
    's': (-32768, 32767, np.int16),
}


CLAMPED = ('add', 'sub', 'subrev', 'mad', 'dot2', 'dot4', 'dot8', 'dot2c', 'dot4c', 'dot8c')


def saturating(ins: Instr, fn: Fn, ty: str) -> Fn:
    """Integer clamp: the exact result, limited to the destination's range (CDNA3 ISA 6.2.5)."""
    lo, hi, dtype = RANGE[ty]
    if ins.base.split('_')[1] not in CLAMPED:
        return fn  # no result of the others can leave the range: clamp changes nothing

    def clamped(*xs: Any) -> Any:
        return np.clip(fn(*[wide_int(x) for x in xs]), lo, hi).astype(dtype)

    return clamped


def wide_int(x: Any) -> Any:
    return np.asarray(x).astype(i64)


def generic(ins: Instr, sig: list[str], fn: Fn, acc: bool = False) -> Closure:
    dst, srcs = sig[0], sig[1:]
    given = srcs[:-1] if acc else srcs
    if len(ins.ops) < len(given) + 1:
        raise UnsupportedError(f'`{ins.text}`: {len(given)} sources expected')
    get = [source(ins, k + 1, t, k) for k, t in enumerate(given)]
    if acc:
        old, conv, narrow = raw_reader(ins.ops[0], srcs[-1]), TYPED[srcs[-1]], srcs[-1] in HALF
        get.append(lambda w: conv(old(w) & u32(0xFFFF)) if narrow else conv(old(w)))
    put = finish(ins, dst)
    if 'clamp' in ins.flags and dst in RANGE:
        fn = saturating(ins, fn, dst)
    if len(get) == 1:
        a = get[0]
        return lambda w: put(w, fn(a(w)))
    if len(get) == 2:
        a, b = get
        return lambda w: put(w, fn(a(w), b(w)))
    return lambda w: put(w, fn(*[g(w) for g in get]))
