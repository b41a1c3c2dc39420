"""The path of a batch as far as hazard mode depends on it, and which runs of instructions were
checked after which path.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .asm import Instr
from .batch import M0, Batch
from .effects import Effects, span

if TYPE_CHECKING:
    from .machine import Kernel

TRANS_OPS = ('v_exp_', 'v_log_', 'v_rcp_', 'v_rsq_', 'v_sqrt_', 'v_sin_', 'v_cos_')
HWREG = re.compile(r'hwreg\((\w+)')
MOST_STATES = 8  # wait states any rule but those of the matrix core looks back
MATRIX_MARGIN = 6  # states a matrix rule adds to the passes, and some
MOST_RUNS = 100_000  # remembered
Run = tuple[int, int]  # program counters [first, end)
Finding = tuple[int, int, str, str]  # what StateChecker.report takes
State = tuple[tuple[Run, ...], tuple[int, ...], tuple[int, ...]]  # runs; operations in flight


def length(ins: Instr) -> int:
    """Wait states an instruction counts for; s_nop has four bits."""
    return 1 + (int(ins.ops[0].val) & 15 if ins.op == 's_nop' and ins.ops else 0)


def wide_data(ins: Instr) -> range:
    """Data registers of a store of 12 or 16 bytes, which are read for two states more; a buffer
    store with its offset in a scalar register reads them in time (LLVM GCNHazardRecognizer).
    """
    if not ins.op.endswith(('_store_dwordx3', '_store_dwordx4')):
        return range(0)
    if ins.op.startswith('buffer_'):
        return range(0) if ins.ops[3].kind == 's' else span(ins.ops[0])
    return span(ins.ops[1])


class Clock:
    """When each register was last written, and by whom: (time, program counter)."""

    def __init__(self) -> None:
        self.now = 0
        self.valu_sgpr: dict[int, tuple[int, int]] = {}
        self.valu_vgpr: dict[int, tuple[int, int]] = {}
        self.trans: dict[int, tuple[int, int]] = {}
        self.matrix: dict[int, tuple[int, int]] = {}
        self.valu_exec: tuple[int, int] | None = None
        self.salu_m0: tuple[int, int] | None = None
        self.dot: dict[int, tuple[int, int]] = {}
        self.matrix_c: dict[int, tuple[int, int]] = {}  # read as C
        self.stored: dict[int, tuple[int, int]] = {}  # data of a store of 12 or 16 bytes
        self.setreg: dict[str, tuple[int, int]] = {}  # by hardware register

    def pass_by(self, pc: int, e: Effects, ins: Instr) -> None:
        """The instruction executes."""
        self.produce(pc, e, ins)
        self.now += length(ins)

    def produce(self, pc: int, e: Effects, ins: Instr) -> None:
        stamp = (self.now, pc)
        for r in e.writes:
            self.matrix.pop(r, None)
            self.trans.pop(r, None)
            self.valu_vgpr.pop(r, None)
            self.dot.pop(r, None)
        for s in e.swrites:
            self.valu_sgpr.pop(s, None)
        if e.kind == 'mfma':
            self.matrix.update(dict.fromkeys(e.writes, stamp))
            if len(ins.ops) > 3 and ins.ops[3].kind == 'v':
                self.matrix_c.update(dict.fromkeys(span(ins.ops[3]), stamp))
        elif e.kind == 'valu':
            self.valu_vgpr.update(dict.fromkeys(e.writes, stamp))
            self.valu_sgpr.update(dict.fromkeys(e.swrites, stamp))
            if e.writes_exec:
                self.valu_exec = stamp
            if ins.op.startswith(TRANS_OPS):
                self.trans.update(dict.fromkeys(e.writes, stamp))
            if ins.op.startswith('v_dot'):
                self.dot.update(dict.fromkeys(e.writes, stamp))
        elif ins.op.startswith('s_setreg'):
            if m := HWREG.search(ins.text):
                self.setreg[m.group(1)] = stamp
        elif e.kind == 'vmem':
            self.stored.update(dict.fromkeys(wide_data(ins), stamp))
        elif M0 in e.swrites:
            self.salu_m0 = stamp


class Paths:
    """Numbered path states of one kernel; 0 is the start of a wave."""

    def __init__(self, kernel: Kernel):
        self.instrs = kernel.module.instrs
        passes = max((i.cycles // 4 for i in self.instrs if i.op.startswith('v_')), default=0)
        self.reach = max(MOST_STATES, passes + MATRIX_MARGIN)
        self.states: list[State] = [((), (), ())]
        self.numbers: dict[State, int] = {self.states[0]: 0}
        self.runs: dict[tuple[int, int, int], tuple[int, list[Finding]]] = {}

    def clock(self, path: int, effects: list[Effects]) -> Clock:
        """The clock at the end of a path: what it remembers of older instructions is of no use."""
        clock = Clock()
        for first, end in self.states[path][0]:
            for pc in range(first, end):
                clock.pass_by(pc, effects[pc], self.instrs[pc])
        return clock

    def extend(self, b: Batch, first: int, end: int, found: list[Finding]) -> int:
        """The batch ran [first, end) on its path -> number of the path it is on now."""
        before = self.states[b.path][0]
        if before and before[-1][1] == first:
            runs = [*before[:-1], (before[-1][0], end)]
        else:
            runs = [*before, (first, end)]
        state = (
            self.recent(runs),
            tuple(op.pc for op in b.vm),
            tuple(op.pc for op in b.lgkm),
        )
        if len(self.runs) > MOST_RUNS:
            self.runs.clear()
        after = self.numbers.setdefault(state, len(self.states))
        if after == len(self.states):
            self.states.append(state)
        self.runs[b.path, first, end] = after, found
        return after

    def recent(self, runs: list[Run]) -> tuple[Run, ...]:
        """The end of a path, `reach` wait states long."""
        out: list[Run] = []
        left = self.reach
        for first, end in reversed(runs):
            pc = end
            while pc > first and left > 0:
                pc -= 1
                left -= length(self.instrs[pc])
            out.append((pc, end))
            if left <= 0:
                break
        return tuple(reversed(out))
