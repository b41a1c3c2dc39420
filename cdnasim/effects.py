"""Which registers an instruction reads and writes, from its operands: for the checks, not for
execution.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .asm import Instr, Operand
from .batch import EXEC, M0, VCC

TWO_RESULTS = re.compile(
    r'^v_(add|sub|subrev|addc|subb|subbrev)_co_u32|^v_div_scale|^v_mad_(u64|i64)'
)
NO_RESULT = re.compile(
    r'^(s_cmp|s_bitcmp|s_waitcnt|s_nop|s_branch|s_cbranch|s_barrier|s_endpgm|s_setprio|s_sleep|s_setpc|'
    r's_sendmsg|s_setreg|s_trap|s_store|s_buffer_store|ds_write|ds_nop|s_set_gpr)'
)
READS_DST = re.compile(
    r'^v_(fmac|mac|dot\w+c_|smfmac|cvt_pkaccum|pk_fmac|writelane|swap|permlane)|^s_(addk|mulk|cmov|bitset)'
)
VCC_SOURCE = re.compile(r'^v_div_fmas|^v_(addc|subb|subbrev)_co_u32_e32|^s_cbranch_vcc')
VCC_RESULT = re.compile(r'^v_cmp.*_e32$|^v_(add|sub|subrev|addc|subb|subbrev)_co_u32_e32')


@dataclass(slots=True)
class Effects:
    """Register rows (VGPR and AGPR) and scalar registers; `masks`: SGPRs a vector instruction
    writes.
    """

    reads: tuple[int, ...]
    writes: tuple[int, ...]
    sreads: tuple[int, ...]
    swrites: tuple[int, ...]
    writes_exec: bool
    dpp: bool
    kind: str  # valu, mfma, vmem, lds, salu, smem


def span(o: Operand) -> range:
    return range(o.idx, o.idx + o.n)


def kind_of(op: str) -> str:
    if op.startswith(('v_mfma', 'v_smfmac')):
        return 'mfma'
    if op.startswith(('s_load', 's_buffer_load', 's_store', 's_buffer_store')):
        return 'smem'
    if op.startswith('ds_'):
        return 'lds'
    if op.startswith(('buffer_', 'global_', 'flat_', 'scratch_')):
        return 'vmem'
    return 'valu' if op.startswith('v_') else 'salu'


def results(ins: Instr, kind: str) -> int:
    """How many leading operands are written."""
    op = ins.op
    if NO_RESULT.match(op) or not ins.ops:
        return 0
    if kind == 'vmem':
        if '_store' in op or 'lds' in ins.flags or '_lds_' in op:
            return 0
        return int('_load' in op or 'sc0' in ins.flags or 'glc' in ins.flags)
    if kind == 'lds':
        return int(
            op.startswith(('ds_read', 'ds_bpermute', 'ds_permute', 'ds_swizzle')) or '_rtn' in op
        )
    if op.startswith('v_cmp') and op.endswith('_e32') and len(ins.ops) == 2:
        return 0
    if TWO_RESULTS.match(op) or op.startswith(('v_swap', 'v_permlane')):
        return 2
    return 1


def effects(ins: Instr) -> Effects:
    kind = kind_of(ins.op)
    n = results(ins, kind)
    reads: set[int] = set()
    writes: set[int] = set()
    sreads: set[int] = set()
    swrites: set[int] = set()
    for k, o in enumerate(ins.ops):
        if o.kind not in 'vs' or len(o.kind) != 1:
            continue
        is_v = o.kind == 'v'
        if k < n:
            (writes if is_v else swrites).update(span(o))
            if READS_DST.match(ins.op):
                (reads if is_v else sreads).update(span(o))
        else:
            (reads if is_v else sreads).update(span(o))
    if VCC_RESULT.match(ins.op):
        swrites.update((VCC, VCC + 1))
    if VCC_SOURCE.match(ins.op) or (ins.op.startswith('v_cndmask') and len(ins.ops) == 3):
        sreads.update((VCC, VCC + 1))
    if kind == 'vmem' and ('lds' in ins.flags or '_lds_' in ins.op):
        sreads.add(M0)
    exec_written = (
        bool({EXEC, EXEC + 1} & swrites)
        or '_saveexec_' in ins.op
        or '_wrexec_' in ins.op
        or ins.op.startswith('v_cmpx')
    )
    return Effects(
        tuple(sorted(reads)),
        tuple(sorted(writes)),
        tuple(sorted(sreads)),
        tuple(sorted(swrites)),
        exec_written,
        '_dpp' in ins.op,
        kind,
    )
