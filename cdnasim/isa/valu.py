"""Vector ALU: which family an instruction belongs to."""

from __future__ import annotations

from typing import Any

from ..asm import Instr
from . import compare, convert, lanes, packed, valu_float, valu_int
from .vop import Closure, Dpp, generic

SUFFIXES = ('_e64_dpp', '_e64', '_e32', '_sdwa', '_dpp')
TABLES = (valu_int.TABLE, valu_float.TABLE)


def prepare(ins: Instr) -> None:
    """Split the encoding suffix off: `base`, `sdwa`, `dpp`."""
    ins.base, ins.sdwa, ins.dpp = ins.op, False, None
    for suffix in SUFFIXES:
        if ins.op.endswith(suffix):
            ins.base = ins.op[: -len(suffix)]
            ins.sdwa = suffix == '_sdwa'
            ins.dpp = Dpp(ins) if suffix.endswith('_dpp') else None
            return


def decode(ins: Instr, kernel: Any) -> Closure | None:
    if not ins.op.startswith('v_'):
        return None
    prepare(ins)
    base = ins.base
    if base.startswith('v_ashr_pk') or base in ('v_cvt_sr_f16_f32', 'v_cvt_sr_bf16_f32'):
        ins.mods.setdefault('op_sel', [0] * len(ins.ops))  # they write one half and keep the other
    if base == 'v_mov_b32' and ins.pc in kernel.indexed:
        return lanes.gpr_index_move(ins, kernel.indexed[ins.pc])
    for family in (compare, packed, lanes):
        if f := family.decode(ins):
            return f
    if f := convert.decode(ins, kernel.arch):
        return f
    for table in TABLES:
        if base in table:
            sig, fn = table[base]
            return generic(ins, sig, fn, base in table.acc)
    return None
