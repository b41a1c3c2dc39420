"""Plant bugs in a kernel's assembly, to measure what the checks catch: `python` API used by tests
and by docs/cdnasim.md.

A mutant is the text with one instruction changed. Kinds:
  wait     an s_waitcnt removed                    count    one of its counts raised by one
  barrier  an s_barrier removed                    swizzle  a v_xor address step turned into a move
  bound    a buffer descriptor one dword short     tile     a matrix instruction removed (a lost K
           step)
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from .asm import Instr, parse_asm
from .errors import CdnaSimError
from .machine import Kernel
from .report import Report

KINDS = ('wait', 'count', 'barrier', 'swizzle', 'bound', 'tile')
Run = Callable[
    [Kernel, dict[str, object]], tuple[Report, bytes]
]  # run a kernel with options -> (report, output bytes)
MODES: list[dict[str, object]] = [
    {'hazard': True, 'races': True, 'uninitialised': True, 'schedule': 'serial'},
    {'hazard': True, 'races': True, 'uninitialised': True, 'schedule': 'lockstep'},
    {'hazard': True, 'races': True, 'schedule': 'reverse'},
]


@dataclass(slots=True)
class Mutant:
    kind: str
    line: int
    before: str
    after: str
    text: str
    caught: list[str] = field(
        default_factory=list
    )  # result, race, hazard, wait-states, uninitialised, fault, stall


def edit(lines: list[str], ins: Instr, after: str) -> str:
    out = list(lines)
    out[ins.line - 1] = '\t' + after
    return '\n'.join(out) + '\n'


def raised(text: str) -> str | None:
    """The wait with its first non-maximal count one higher."""
    m = re.search(r'(vmcnt|lgkmcnt)\((\d+)\)', text)
    limit = {'vmcnt': 62, 'lgkmcnt': 14}
    if not m or int(m.group(2)) > limit[m.group(1)]:
        return None
    return text[: m.start(2)] + str(int(m.group(2)) + 1) + text[m.end(2) :]


def record_counts(code: list[Instr]) -> set[int]:
    """SGPRs that hold num_records of a buffer descriptor in use."""
    out: set[int] = set()
    for ins in code:
        if ins.op.startswith('buffer_'):
            out.update(o.idx + 2 for o in ins.ops if o.kind == 's' and o.n == 4)
    return out


def mutants(kernel: Kernel, kinds: tuple[str, ...] = KINDS) -> Iterator[Mutant]:
    """Every single-instruction change of the given kinds in the kernel's own function."""
    lines = kernel.module.text.splitlines()
    lo, hi = kernel.module.functions[kernel.name]
    records = record_counts(kernel.module.instrs[lo:hi])

    def make(kind: str, ins: Instr, after: str) -> Mutant:
        return Mutant(kind, ins.line, ins.text, after, edit(lines, ins, after))

    for ins in kernel.module.instrs[lo:hi]:
        if ins.op == 's_waitcnt':
            if 'wait' in kinds:
                yield make('wait', ins, 's_nop 0')
            if 'count' in kinds and (after := raised(ins.text)):
                yield make('count', ins, after)
        elif ins.op == 's_barrier' and 'barrier' in kinds:
            yield make('barrier', ins, 's_nop 0')
        elif ins.op.startswith('v_xor_b32') and 'swizzle' in kinds:
            yield make('swizzle', ins, f'v_mov_b32_e32 {ins.ops[0].text}, {ins.ops[2].text}')
        elif (
            ins.op.startswith('s_')
            and ins.ops
            and ins.ops[0].kind == 's'
            and ins.ops[0].n == 1
            and ins.ops[0].idx in records
            and 'bound' in kinds
        ):
            reg = ins.ops[0].text
            yield make('bound', ins, f'{ins.text}\n\ts_sub_u32 {reg}, {reg}, 4')
        elif ins.op.startswith('v_mfma') and 'tile' in kinds:
            yield make('tile', ins, 's_nop 0')


def judge(mutant: Mutant, name: str, run: Run, want: bytes) -> Mutant:
    """Run a mutant in every mode until something catches it."""
    kernel = Kernel(module := parse_asm(mutant.text), module.kernels[name])
    for mode in MODES:
        try:
            report, out = run(kernel, mode)
        except CdnaSimError as e:
            mutant.caught = [
                {'MemFault': 'fault', 'BudgetError': 'stall', 'DeadlockError': 'stall'}.get(
                    type(e).__name__, 'fault'
                )
            ]
            break
        mutant.caught = sorted(report.kinds) + (['result'] if out != want else [])
        if mutant.caught:
            break
    return mutant


def table(judged: list[Mutant]) -> dict[str, tuple[int, int, dict[str, int]]]:
    """kind -> (caught, planted, by what)."""
    out: dict[str, tuple[int, int, dict[str, int]]] = {}
    for kind in dict.fromkeys(m.kind for m in judged):
        own = [m for m in judged if m.kind == kind]
        by: Counter[str] = Counter()
        for m in own:
            by.update(m.caught)
        out[kind] = (sum(bool(m.caught) for m in own), len(own), dict(by))
    return out
