"""Branches, calls, barriers, waits and hardware registers (SOPP and the rest of SOP1/SOPK)."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from ..asm import Instr
from ..batch import ALL, M0, Batch, Scalar, each
from ..errors import ExecError, UnsupportedError
from ..numerics import u64
from ..operands import rs32, rs64, ws32, ws64

Closure = Callable[[Batch], Any]
END, BARRIER, YIELD = -1, -2, -3
POISON_SGPR = 0x7FBADBAD


class Divergence:
    """Result of a branch that waves take differently: `pcs[k]` is where wave k goes on."""

    __slots__ = ('pcs',)

    def __init__(self, pcs: Any):
        self.pcs = pcs


CONDITION: dict[str, Callable[[Batch], Scalar]] = {  # non-zero: taken
    's_cbranch_scc0': lambda w: w.scc ^ 1,
    's_cbranch_scc1': lambda w: w.scc,
    's_cbranch_vccz': lambda w: zero(w.vcc64()),
    's_cbranch_vccnz': lambda w: w.vcc64(),
    's_cbranch_execz': lambda w: zero(w.exec64()),
    's_cbranch_execnz': lambda w: w.exec64(),
    's_cbranch_cdbgsys': lambda w: 0,
    's_cbranch_cdbguser': lambda w: 0,
    's_cbranch_cdbgsys_or_user': lambda w: 0,
    's_cbranch_cdbgsys_and_user': lambda w: 0,
}
# no effect on results: caches, priorities, debugging, messages to the host
NO_EFFECT = {
    's_nop',
    's_setprio',
    's_sethalt',
    's_dcache_inv',
    's_icache_inv',
    's_dcache_wb',
    's_ttracedata',
    's_incperflevel',
    's_decperflevel',
    's_inst_prefetch',
    's_sendmsg',
    's_code_end',
    's_clause',
    's_dcache_discard',
    's_dcache_discard_x2',
    's_dcache_inv_vol',
    's_dcache_wb_vol',
    's_setkill',
    's_set_gpr_idx_off',
    's_set_gpr_idx_mode',
    's_wakeup',
    's_setvskip',
    's_atc_probe',
    's_atc_probe_buffer',
}
STOPPING = (
    's_branch',
    's_endpgm',
    's_barrier',
    's_sleep',
    's_trap',
    's_setpc',
    's_swappc',
    's_call',
)
HWREG = re.compile(r'(?:hwreg\()?(\w+)(?:,\s*(\d+),\s*(\d+))?\)?')
NUMBERED = {
    '1': 'HW_REG_MODE',
    '2': 'HW_REG_STATUS',
    '3': 'HW_REG_TRAPSTS',
    '4': 'HW_REG_HW_ID',
    '20': 'HW_REG_XCC_ID',
}
READABLE = {
    'HW_REG_MODE',
    'HW_REG_XCC_ID',
    'HW_REG_HW_ID',
    'HW_REG_STATUS',
    'HW_REG_TRAPSTS',
    'HW_REG_GPR_ALLOC',
    'HW_REG_LDS_ALLOC',
    'HW_REG_IB_STS',
    'HW_REG_SQ_SHADER_TBA_LO',
    'HW_REG_SQ_SHADER_TBA_HI',
}


def may_branch(op: str) -> bool:
    """Whether the closure of `op` returns something: where to go on, or why to stop."""
    return op.startswith(STOPPING) or op in CONDITION


def zero(x: Scalar) -> Scalar:
    return int(x == 0) if type(x) is int else (x == 0).astype(u64)


def branch(ins: Instr, kernel: Any) -> Closure:
    target = kernel.label(ins.ops[0], ins)
    if ins.op == 's_branch':
        return lambda w: target
    cond, after = CONDITION[ins.op], ins.pc + 1

    def f(w: Batch) -> Any:
        c = cond(w)
        if type(c) is int:
            return target if c else None
        taken = c != 0
        if taken.all():
            return target
        return Divergence(np.where(taken, target, after)) if taken.any() else None

    return f


def jump(ins: Instr, kernel: Any) -> Closure:
    """s_getpc, s_setpc, s_swappc, s_call: addresses as Module.address gives them."""
    module, op, o = kernel.module, ins.op, ins.ops
    here = module.address(ins.pc + 1)
    if op == 's_getpc_b64':
        wr = ws64(o[0])
        return lambda w: wr(w, here)
    if op == 's_call_b64':
        wr, target = ws64(o[0]), kernel.label(o[1], ins)

        def call(w: Batch) -> int:
            wr(w, here)
            return target

        return call
    src = rs64(o[-1])
    save = ws64(o[0]) if op == 's_swappc_b64' else None

    def f(w: Batch) -> Any:
        to = src(w)
        if save:
            save(w, here)
        pcs = each(lambda x: module.index(x) & ALL, to)
        if np.any(np.asarray(pcs) >= len(module.instrs)):
            raise ExecError(f'`{ins.text}` jumps to {np.ravel(to)[0]:#x}, which is no instruction')
        return pcs if type(pcs) is int else Divergence(pcs.astype(np.int64))

    return f


def cbranch_fork(ins: Instr) -> Closure:
    raise UnsupportedError(
        f'`{ins.text}`: s_cbranch_i_fork and s_cbranch_g_fork do not exist on gfx940 and later'
    )


def wait_counts(arg: str) -> tuple[int | None, int | None]:
    """`vmcnt(3) lgkmcnt(0)` or the plain immediate -> (vmcnt, lgkmcnt), None when not waited
    for.
    """
    counts = {k: int(v) for k, v in re.findall(r'(\w+)\((\d+)\)', arg)}
    if not counts:
        x = int(arg, 0)
        counts = {'vmcnt': (x & 15) | (x >> 14 & 3) << 4, 'lgkmcnt': x >> 8 & 15}
    return counts.get('vmcnt'), counts.get('lgkmcnt')


def wait(ins: Instr) -> Closure:
    vm, lgkm = wait_counts(ins.mods['arg'])

    def f(w: Batch) -> None:
        if not w.hazard:
            return
        if vm is not None:
            w.wait(w.vm, vm)
        if lgkm is not None and (not lgkm or not any(p.smem for p in w.lgkm)):
            w.wait(
                w.lgkm, lgkm
            )  # scalar loads return out of order: with one in flight only lgkmcnt(0) is a promise

    return f


def register_field(text: str, ins: Instr) -> tuple[str, int, int]:
    m = HWREG.match(text)
    name = NUMBERED.get(m.group(1), m.group(1)) if m else ''
    if not m or not (name in READABLE or name.isdigit()):
        raise UnsupportedError(f'`{ins.text}`: hardware register {text!r}')
    return name, int(m.group(2) or 0), int(m.group(3) or 32)


def get_register(ins: Instr) -> Closure:
    wr = ws32(ins.ops[0])
    name, off, size = register_field(ins.ops[1].text, ins)

    def f(w: Batch) -> None:
        x = w.mode if name == 'HW_REG_MODE' else 0
        if name == 'HW_REG_XCC_ID':  # workgroups go round the 8 XCCs in order of their linear id
            x = each(lambda k: k % 8, w.group.scalar(w, w.group.linear))
        wr(w, each(lambda v: v >> off & ((1 << size) - 1), x))

    return f


def set_register(ins: Instr) -> Closure:
    name, off, size = register_field(ins.ops[0].text, ins)
    value, field = rs32(ins.ops[1]), ((1 << size) - 1) << off

    def f(w: Batch) -> None:  # every other register steers traps and caches, not results
        if name == 'HW_REG_MODE':
            w.mode = each(lambda m, v: (m & ~field) | (v << off & field), w.mode, value(w))

    return f


def gpr_index(ins: Instr) -> Closure:
    """s_set_gpr_idx_on / _idx: M0[7:0] = index; which operands are indexed is known when decoding
    (machine.py).
    """
    a = rs32(ins.ops[0])

    def f(w: Batch) -> None:
        w.s[M0] = each(lambda m, x: (m & 0xFFFFFF00) | (x & 255), w.s[M0], a(w))

    return f


def relative_move(ins: Instr) -> Closure:
    """s_movrels (source register + M0), s_movreld (destination register + M0)."""
    n, to = 2 if ins.op.endswith('b64') else 1, 'movreld' in ins.op
    d, s = ins.ops[0].idx, ins.ops[1].idx

    def f(w: Batch) -> None:
        k = w.s[M0]
        if type(k) is not int:
            raise ExecError(
                f'`{ins.text}`: waves of one batch disagree on M0; run with batch_waves=1'
            )
        for j in range(n):
            w.s[d + j + (k if to else 0)] = w.s[s + j + (0 if to else k)]

    return f


def clock(ins: Instr) -> Closure:
    """s_memtime, s_memrealtime: instructions the wave has executed, times 4."""
    wr = ws64(ins.ops[0])
    return lambda w: wr(w, 4 * w.steps & ALL)


def trap(ins: Instr) -> Closure:
    def f(w: Batch) -> None:
        raise ExecError(f'`{ins.text}` reached: the kernel gives up on purpose')

    return f


def decode(ins: Instr, kernel: Any) -> Closure | None:
    op = ins.op
    if op == 's_branch' or op in CONDITION:
        return branch(ins, kernel)
    if op in ('s_getpc_b64', 's_setpc_b64', 's_swappc_b64', 's_call_b64'):
        return jump(ins, kernel)
    if op in ('s_endpgm', 's_endpgm_saved', 's_endpgm_ordered_ps_done'):
        return lambda w: END
    if op == 's_barrier':
        return lambda w: BARRIER
    if op == 's_sleep':
        return lambda w: YIELD  # a spinning wave gives the others a turn
    if op == 's_waitcnt':
        return wait(ins)
    if op in NO_EFFECT:
        return lambda w: None
    if op in ('s_trap', 's_sendmsghalt'):
        return trap(ins)
    if op in ('s_memtime', 's_memrealtime'):
        return clock(ins)
    if op in ('s_set_gpr_idx_on', 's_set_gpr_idx_idx'):
        return gpr_index(ins)
    if op.startswith('s_movrel'):
        return relative_move(ins)
    if op.startswith('s_getreg'):
        return get_register(ins)
    if op.startswith('s_setreg'):
        return set_register(ins)
    if op.startswith('s_cbranch_') and op.endswith('_fork'):
        return cbranch_fork(ins)
    return None
