"""What a launch found: hazards, reads of values nothing wrote, and the container that holds every
finding.

Hazard mode checks two things while a batch runs:
  loads    a register is read, or written again, while a memory result for it is in flight
  states   wait states that the hardware does not insert itself (CDNA3 ISA 4.5 and 7.5; values as in
           LLVM's hazard recogniser)
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .batch import Batch
from .effects import Effects
from .numerics import Array
from .paths import HWREG, TRANS_OPS, Clock

if TYPE_CHECKING:
    from .asm import Instr, Operand
    from .machine import Kernel, Options
    from .memory import Region

LIMIT = 200  # different findings kept


@dataclass(frozen=True, slots=True)
class Finding:
    """`kind`: race, hazard, wait-states or uninitialised. `first` and `second` are program
    counters, -1 for none.
    """

    kind: str
    what: str
    first: int
    second: int = -1


class Findings:
    """Different findings with how often each was seen."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self.seen: Counter[Finding] = Counter()

    def add(self, finding: Finding, times: int = 1) -> None:
        if finding in self.seen or len(self.seen) < LIMIT:
            self.seen[finding] += times

    def place(self, pc: int) -> str:
        ins = self.kernel.module.instrs[pc]
        return f'`{ins.text}` (line {ins.line}{", " + ins.source if ins.source else ""})'

    def lines(self) -> list[str]:
        out = []
        for f, n in self.seen.most_common():
            where = ' / '.join(self.place(pc) for pc in (f.first, f.second) if pc >= 0)
            out.append(f'{f.kind}: {f.what} x{n}: {where}')
        return out


def register_name(row: int) -> str:
    return f'v{row}' if row < 256 else f'a{row - 256}'


class Uninitialised:
    """Reads of LDS bytes, fresh buffers and registers that nothing wrote."""

    def __init__(self, findings: Findings):
        self.findings = findings
        self.group_pc = -1

    def lds(self, w: Batch, ids: Array, off: Array, n: int, ins: Instr) -> None:
        where = (
            f'LDS byte {int(off[0]):#x}, wave {int(w.wave[int(ids[0]) // 64])}, lane '
            f'{int(ids[0]) % 64}'
        )
        known = [f for f in self.findings.seen if f.kind == 'uninitialised' and f.first == ins.pc]
        self.findings.add(known[0] if known else Finding('uninitialised', where, ins.pc), len(ids))

    def unwritten(self, region: Region, off: Array, n: int) -> None:
        assert region.written is not None
        bad = ~region.written[off[:, None] + np.arange(n)].all(1)
        if bad.any():
            pc = self.group_pc
            known = [f for f in self.findings.seen if f.kind == 'uninitialised' and f.first == pc]
            what = f'buffer {region.name or "?"} offset {int(off[bad][0]):#x}'
            self.findings.add(
                known[0] if known else Finding('uninitialised', what, pc), int(bad.sum())
            )


# ---- wait states
# Wait states between producer and consumer; s_nop N counts N + 1, every other instruction 1.
VALU_SGPR_VMEM = 5  # VALU writes an SGPR, VMEM reads it
VALU_VCC_FMAS = 4  # VALU writes VCC, v_div_fmas reads it
VALU_LANE_SELECT = 4  # VALU writes an SGPR, v_readlane / v_writelane takes it as lane select
VALU_EXEC_DPP = 5  # VALU writes EXEC, DPP instruction
VALU_VGPR_DPP = 2  # VALU writes a VGPR, DPP reads it
SALU_M0_LDS = 1  # SALU writes M0, load into LDS, s_movrel, ds_gws
TRANS_VALU = 1  # transcendental result read by the next VALU that is not transcendental
VALU_SGPR_VALU = 2  # VALU writes an SGPR or VCC, VALU reads it
VALU_VGPR_LANE = 1  # VALU writes a VGPR, v_readlane or v_readfirstlane reads it
VALU_EXEC_LANE = 4  # VALU writes EXEC, v_readlane, v_readfirstlane, v_writelane
VALU_VGPR_MATRIX = 2  # VALU writes a VGPR, matrix instruction reads it
VALU_VGPR_SWAP = 2  # VALU writes a VGPR, v_permlane16_swap or v_permlane32_swap takes it
DOT_OTHER = 3  # v_dot result, another instruction than the same v_dot reads or VALU writes it
STORE_DATA = 2  # data of a 12 or 16 byte store, VALU writes it
SETREG_GETREG = 2  # s_setreg, s_getreg of the same hardware register
LANE_OPS = ('v_readlane', 'v_readfirstlane', 'v_writelane')


class StateChecker:
    """Checks each instruction of a batch before it runs. All waves of a batch share their history,
    so one clock serves.

    What hazard mode finds in a run of instructions depends on the path to it only: the instructions
    of the last few wait states and the memory operations in flight. A run is checked when it is
    first met after such a path, and its findings are repeated from memory ever after.
    """

    def __init__(self, kernel: Kernel, findings: Findings, options: Options):
        self.kernel, self.findings = kernel, findings
        self.hazard, self.uninitialised = options.hazard, options.uninitialised
        self.effects = kernel.effects
        self.known = kernel.paths
        self.reported: set[tuple[int, int, int]] = set()
        self.caught: list[tuple[int, int, str, str]] = []

    def enter(self, b: Batch, pc: int, end: int) -> bool:
        """The batch is about to run [pc, end) -> whether `before` must see each instruction."""
        if not self.hazard:
            return True
        hit = self.known.runs.get((b.path, pc, end))
        if hit is None:
            b.states = self.known.clock(b.path, self.effects)
            self.caught = []
            return True
        b.path = hit[0]
        for finding in hit[1]:
            self.add(*finding)
        return self.uninitialised

    def leave(self, b: Batch, pc: int, end: int) -> None:
        """[pc, end) was run under `before`."""
        if b.states is not None:
            b.path, b.states = self.known.extend(b, pc, end, self.caught), None

    def before(self, b: Batch, pc: int) -> None:
        uninit = b.group.uninitialised
        if uninit is not None:
            uninit.group_pc = pc
            self.registers(b, pc, self.effects[pc])
        if b.states is not None:
            if b.vm or b.lgkm:
                self.in_flight(b, pc, self.effects[pc])
            self.states(b.states, pc, self.effects[pc])

    def registers(self, b: Batch, pc: int, e: Effects) -> None:
        for row in e.reads:
            if b.v[row] is b.fresh and (row, pc, -3) not in self.reported:
                self.reported.add((row, pc, -3))
                self.findings.add(
                    Finding('uninitialised', f'{register_name(row)} was never written', pc)
                )

    def in_flight(self, b: Batch, pc: int, e: Effects) -> None:
        """Read or overwritten while a load for it is outstanding."""
        for op in itertools.chain(b.vm, b.lgkm):
            lo, hi = op.rows
            if hi:
                for rows, what in ((e.reads, 'read'), (e.writes, 'written again')):
                    bad = next((r for r in rows if lo <= r < hi), None)
                    if bad is not None and not (what != 'read' and self.ordered(op.pc, pc)):
                        self.report(
                            pc,
                            op.pc,
                            f'{register_name(bad)} is {what} before the wait for its load',
                        )
            lo, hi = op.sgprs
            if hi:
                # Scalar loads return in any order, so even another load may not write these.
                for regs, what in ((e.sreads, 'read'), (e.swrites, 'written again')):
                    bad = next((r for r in regs if lo <= r < hi), None)
                    if bad is not None:
                        self.report(pc, op.pc, f's{bad} is {what} before the wait for its load')

    def ordered(self, first: int, second: int) -> bool:
        """Two loads of one queue return in order: the second may overwrite the first."""
        return self.effects[first].kind == self.effects[second].kind

    def report(self, pc: int, other: int, what: str, kind: str = 'hazard') -> None:
        self.caught.append((pc, other, what, kind))
        self.add(pc, other, what, kind)

    def add(self, pc: int, other: int, what: str, kind: str) -> None:
        key = (pc, other, hash(kind))  # one finding per pair of instructions
        if key not in self.reported:
            self.reported.add(key)
            self.findings.add(Finding(kind, what, other, pc))

    def states(self, t: Clock, pc: int, e: Effects) -> None:
        ins = self.kernel.module.instrs[pc]
        self.consume(t, pc, e, ins)
        t.pass_by(pc, e, ins)

    def consume(self, t: Clock, pc: int, e: Effects, ins: Instr) -> None:
        op = ins.op
        if e.kind in ('vmem', 'lds') and e.sreads:
            for s in e.sreads:
                self.need(
                    t,
                    t.valu_sgpr.get(s),
                    VALU_SGPR_VMEM if e.kind == 'vmem' else 0,
                    pc,
                    f's{s} from a VALU',
                )
        if op.startswith('v_div_fmas'):
            self.need(t, t.valu_sgpr.get(106), VALU_VCC_FMAS, pc, 'VCC from a VALU for v_div_fmas')
        if op.startswith(('v_readlane', 'v_writelane')) and ins.ops[2].kind == 's':
            self.need(
                t, t.valu_sgpr.get(ins.ops[2].idx), VALU_LANE_SELECT, pc, 'lane select from a VALU'
            )
        if e.dpp:
            self.need(t, t.valu_exec, VALU_EXEC_DPP, pc, 'EXEC from a VALU for DPP')
            for r in e.reads[:]:
                if ins.ops[1].kind == 'v' and r in range(
                    ins.ops[1].idx, ins.ops[1].idx + ins.ops[1].n
                ):
                    self.need(
                        t,
                        t.valu_vgpr.get(r),
                        VALU_VGPR_DPP,
                        pc,
                        f'{register_name(r)} from a VALU for DPP',
                    )
        if e.kind == 'vmem' and ('lds' in ins.flags or '_lds_' in op):
            self.need(t, t.salu_m0, SALU_M0_LDS, pc, 'M0 from a scalar instruction')
        if e.kind == 'valu' and not op.startswith(TRANS_OPS):
            for r in e.reads:
                self.need(
                    t, t.trans.get(r), TRANS_VALU, pc, f'{register_name(r)} from a transcendental'
                )
        if e.kind == 'valu':
            for s in e.sreads:
                self.need(t, t.valu_sgpr.get(s), VALU_SGPR_VALU, pc, f's{s} from a VALU')
            if op.startswith(LANE_OPS):
                self.need(t, t.valu_exec, VALU_EXEC_LANE, pc, 'EXEC from a VALU for a lane move')
                if not op.startswith('v_writelane'):
                    for r in e.reads:
                        what = f'{register_name(r)} from a VALU for a lane move'
                        self.need(t, t.valu_vgpr.get(r), VALU_VGPR_LANE, pc, what)
        self.write_after_read(t, pc, e)
        self.special(t, pc, e, ins)
        self.matrix(t, pc, e, ins)

    def write_after_read(self, t: Clock, pc: int, e: Effects) -> None:
        """A VALU result may not come before a slow reader has the old value."""
        if e.kind != 'valu' or not (t.stored or t.matrix_c):
            return
        for r in e.writes:
            self.need(t, t.stored.get(r), STORE_DATA, pc, f'{register_name(r)} to a wide store')
            if (read := t.matrix_c.get(r)) is not None:
                passes = max(2, self.kernel.module.instrs[read[1]].cycles // 4)
                what = f'{register_name(r)} to the matrix core as C'
                self.need(t, read, passes - 1, pc, what)

    def special(self, t: Clock, pc: int, e: Effects, ins: Instr) -> None:
        """Rules of single instructions."""
        op = ins.op
        if e.kind == 'mfma' or '_swap_b32' in op and op.startswith('v_permlane'):
            states = VALU_VGPR_MATRIX if e.kind == 'mfma' else VALU_VGPR_SWAP
            for r in e.reads:
                what = f'{register_name(r)} from a VALU for {op}'
                self.need(t, t.valu_vgpr.get(r), states, pc, what)
        if t.dot:
            for r in (*e.reads, *(e.writes if e.kind == 'valu' else ())):
                made = t.dot.get(r)
                if made is not None and self.kernel.module.instrs[made[1]].op != op:
                    self.need(t, made, DOT_OTHER, pc, f'{register_name(r)} from a dot product')
        if op.startswith('s_movrel'):
            self.need(t, t.salu_m0, SALU_M0_LDS, pc, 'M0 from a scalar instruction')
        if t.setreg and op == 's_getreg_b32' and (m := HWREG.search(ins.text)):
            self.need(t, t.setreg.get(m.group(1)), SETREG_GETREG, pc, f'{m.group(1)} from s_setreg')

    def matrix(self, t: Clock, pc: int, e: Effects, ins: Instr) -> None:
        """Results of the matrix core. An accumulator may follow back to back into the same C and
        D.
        """
        if not t.matrix:
            return
        accumulator = (
            ins.ops[3] if e.kind == 'mfma' and len(ins.ops) > 3 and ins.ops[3].kind == 'v' else None
        )
        if ins.op.startswith('v_smfmac'):
            accumulator = ins.ops[0]
        for r in (*e.reads, *(e.writes if e.kind == 'valu' else ())):
            hit = t.matrix.get(r)
            if hit is None:
                continue
            made, producer = hit
            chained = (
                accumulator is not None and accumulator.idx <= r < accumulator.idx + accumulator.n
            )
            need = self.matrix_states(producer, accumulator if chained else None)
            self.need(t, (made, producer), need, pc, f'{register_name(r)} from the matrix core')

    def matrix_states(self, producer: int, accumulator: Operand | None) -> int:
        """Wait states after an N-pass matrix instruction (LLVM GCNHazardRecognizer, gfx940 and
        gfx950; tests/test_checks.py compares them with what LLVM inserts): as C of the next, 0 for
        exactly the same registers, N + 1 when they overlap; as A or B, for VALU, VMEM and LDS N +
        3. gfx950 takes one more unless N is 2, f32 inputs (not XDL) one fewer."""
        ins = self.kernel.module.instrs[producer]
        passes = max(2, ins.cycles // 4)
        xdl = not ins.op.endswith(('f32', 'f64')) or 'xf32' in ins.op
        more = int(self.kernel.arch == 'gfx950' and passes != 2) if xdl else -1
        if accumulator is None:
            return passes + 3 + more
        d = ins.ops[0]
        if (accumulator.idx, accumulator.n) == (d.idx, d.n):
            return 0 if passes > 2 else 2
        return passes + 1 + more

    def need(self, t: Clock, made: tuple[int, int] | None, states: int, pc: int, what: str) -> None:
        if made is None or not states:
            return
        have = t.now - made[0] - 1
        if have < states:
            self.report(
                pc, made[1], f'{what} needs {states} wait states, has {have}', 'wait-states'
            )
