"""v_cmp, v_cmpx and v_cmp_class (CDNA3 ISA 12.10): lane masks into VCC or an SGPR pair."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from ..asm import Instr, Operand
from ..batch import EXEC, VCC, Batch
from ..numerics import u32
from ..operands import rv32, write_mask
from .vop import Closure, source

NAME = re.compile(r'^v_cmp(x?)_(class|\w+?)_(f32|f16|f64|i32|u32|i64|u64|i16|u16)$')
TYPE = {
    'f32': 'f',
    'f16': 'h',
    'f64': 'D',
    'i32': 'i',
    'u32': 'u',
    'i64': 'I',
    'u64': 'U',
    'i16': 's',
    'u16': 'H',
}
RELATION: dict[str, Callable[[Any, Any], Any]] = {
    'f': lambda a, b: np.zeros(np.broadcast(a, b).shape, bool),
    't': lambda a, b: np.ones(np.broadcast(a, b).shape, bool),
    'lt': lambda a, b: a < b,
    'eq': lambda a, b: a == b,
    'le': lambda a, b: a <= b,
    'gt': lambda a, b: a > b,
    'ge': lambda a, b: a >= b,
    'ne': lambda a, b: a != b,
    'lg': lambda a, b: (a < b) | (a > b),
    'o': lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    'u': lambda a, b: np.isnan(a) | np.isnan(b),
    'nge': lambda a, b: ~(a >= b),
    'nlg': lambda a, b: ~((a < b) | (a > b)),
    'ngt': lambda a, b: ~(a > b),
    'nle': lambda a, b: ~(a <= b),
    'neq': lambda a, b: ~(a == b),
    'nlt': lambda a, b: ~(a < b),
}
RELATION['tru'] = RELATION['t']


def fp_class(x: Any, mask: Any) -> Any:
    """Bit k of mask asks for class k: sNaN, qNaN, -inf, -normal, -denormal, -0, +0, +denormal,
    +normal, +inf.
    """
    neg, zero, inf, nan = np.signbit(x), x == 0, np.isinf(x), np.isnan(x)
    sub = (np.abs(x) < np.finfo(x.dtype).tiny) & ~zero
    normal = ~(zero | sub | inf | nan)
    quiet = quiet_nan(x)
    tests = [
        nan & ~quiet,
        nan & quiet,
        inf & neg,
        normal & neg,
        sub & neg,
        zero & neg,
        zero & ~neg,
        sub & ~neg,
        normal & ~neg,
        inf & ~neg,
    ]
    out = np.zeros(np.broadcast(x, mask).shape, bool)
    for k, t in enumerate(tests):
        out |= t & ((mask >> u32(k)) & u32(1)).astype(bool)
    return out


def quiet_nan(x: Any) -> Any:
    size = x.dtype.itemsize
    bits = x.view({2: np.uint16, 4: np.uint32, 8: np.uint64}[size])
    return (bits >> bits.dtype.type({2: 9, 4: 22, 8: 51}[size])) & bits.dtype.type(1) != 0


def decode(ins: Instr) -> Closure | None:
    m = NAME.match(ins.base)
    if not m:
        return None
    exec_too, relation, ty = m.group(1), m.group(2), TYPE[m.group(3)]
    explicit = len(ins.ops) == 3
    ops = ins.ops if explicit else [Operand('s', VCC, 2, text='vcc'), *ins.ops]
    ins.ops = ops
    fn: Callable[[Any, Any], Any]
    if relation == 'class':
        a, b, fn = source(ins, 1, ty, 0), rv32(ops[2]), fp_class
    else:
        a, b, fn = source(ins, 1, ty, 0), source(ins, 2, ty, 1), RELATION[relation]
    wr = write_mask(ops[0])
    # v_cmpx writes EXEC as well (CDNA3 ISA 4.3: on GFX9 both VCC/SDST and EXEC)
    wx = write_mask(Operand('s', EXEC, 2, text='exec')) if exec_too else None

    def f(w: Batch) -> None:
        r = fn(a(w), b(w))
        wr(w, r)
        if wx:
            wx(w, r)

    return f
