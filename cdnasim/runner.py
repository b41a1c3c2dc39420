"""Scheduling: which waves of the workgroups of a group take their turn, splitting and rejoining
batches.

Schedules (all deterministic):
  lockstep  all waves of all workgroups are one batch: near lockstep, the fastest
  serial    each wave runs to its next barrier before the next wave starts: the most adversarial
  reverse   serial with the waves in descending order
  random    each turn a wave picked by the seed runs a number of instructions picked by the seed
Workgroups are independent, so the same wave of many workgroups is one batch in every schedule.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .batch import Batch
from .errors import BudgetError, CdnaSimError, DeadlockError, ExecError, MemFault
from .group import Group
from .isa.control import BARRIER, END, Divergence

# instructions a batch runs while others of its workgroups wait for a turn: lets a spin loop yield
PATIENCE = 20_000


@dataclass(frozen=True, slots=True)
class Schedule:
    """`quantum`: instructions per turn (0: until the barrier). `together`: all waves of a workgroup
    are one batch.
    """

    together: bool = False
    quantum: int = 0
    descending: bool = False
    seed: int | None = None

    @staticmethod
    def named(name: str, quantum: int = 0, seed: int = 0) -> Schedule:
        table = {
            'lockstep': Schedule(True),
            'serial': Schedule(False, quantum),
            'reverse': Schedule(False, quantum, True),
            'random': Schedule(False, quantum, False, seed),
        }
        if name not in table:
            raise CdnaSimError(f'schedule {name!r}: choose one of {", ".join(table)}')
        return table[name]

    def turns(self, slots: int, rng: random.Random) -> Iterator[tuple[int, int]]:
        """(slot, instructions) for one round."""
        order = list(range(slots))
        if self.seed is not None:
            rng.shuffle(order)
            yield from ((k, rng.randint(1, self.quantum or 40)) for k in order)
            return
        yield from (
            (k, self.quantum or PATIENCE) for k in (reversed(order) if self.descending else order)
        )


class Slot:
    """Batches that share a turn. Of several, the one furthest behind runs until it meets the next,
    and they merge.
    """

    def __init__(self, first: Batch):
        self.batches = [first]

    def ready(self) -> list[Batch]:
        return [b for b in self.batches if not b.state]

    def live(self) -> bool:
        return any(b.state != 'end' for b in self.batches)


class Runner:
    """Runs one group to the end."""

    def __init__(self, group: Group, schedule: Schedule):
        self.group, self.schedule = group, schedule
        self.rng = random.Random(schedule.seed or 0)
        block = group.launch.block
        if schedule.together:
            self.slots = [Slot(group.all_waves(block))]
        else:
            self.slots = [Slot(group.all_waves(block, k)) for k in range(group.waves)]
        self.checker = group.launch.checker
        self.tracing = group.launch.options.trace and int(group.linear[0]) in group.launch.traced
        self.budget = group.launch.options.budget
        # turns of random length cut runs anywhere: checked paths repeat instruction by instruction
        self.single = self.checker is not None and schedule.seed is not None

    def run(self) -> None:
        while any(slot.live() for slot in self.slots):
            moved = False
            for k, quantum in self.schedule.turns(len(self.slots), self.rng):
                moved |= self.turn(self.slots[k], quantum)
            if not moved:
                self.release()

    def turn(self, slot: Slot, quantum: int) -> bool:
        """Give the ready batches of a slot up to `quantum` instructions -> whether any ran."""
        ready = slot.ready()
        moved = bool(ready)
        left = quantum
        while left > 0 and (ready := slot.ready()):
            b = min(ready, key=lambda x: (x.pc, x.steps))
            stops = {x.pc for x in ready if x is not b}
            before = b.steps
            for part in self.execute(b, min(left, PATIENCE) if stops else left, stops):
                if part is not b:
                    slot.batches.append(part)
            if b.n == 0:
                slot.batches.remove(b)
            left -= max(1, b.steps - before)
            if stops:
                self.rejoin(slot)
        return moved

    def rejoin(self, slot: Slot) -> None:
        """Merge batches of a slot that stand at the same instruction."""
        by_place: dict[int, list[Batch]] = {}
        for b in slot.ready():
            by_place.setdefault(b.pc, []).append(b)
        for same in by_place.values():
            if len(same) > 1 and all(same[0].can_merge(b) for b in same[1:]):
                slot.batches = [b for b in slot.batches if b not in same] + [Batch.merge(same)]

    def release(self) -> None:
        """Every live wave waits at a barrier: open it."""
        waiting = [b for slot in self.slots for b in slot.batches if b.state == 'barrier']
        if not waiting:
            raise DeadlockError(f'{self.group.kernel.name}: no wave can go on')
        arrived = np.unique(np.concatenate([b.wg for b in waiting]))
        self.group.epochs[arrived] += 1
        self.group.counters.barriers += len(arrived)
        for slot in self.slots:
            for b in slot.batches:
                if b.state == 'barrier':
                    b.state = ''
            self.rejoin(slot)
            for b in slot.batches:
                if b.state == 'end':
                    self.group.launch.finished(b)
            slot.batches = [b for b in slot.batches if b.state != 'end']

    def execute(self, b: Batch, quantum: int, stops: set[int]) -> list[Batch]:
        """Run until a barrier, the end, a divergence, a stop or the quantum -> the batches that go
        on.

        A batch that diverged comes back empty (n = 0) with its parts beside it."""
        group, checker = self.group, self.checker
        code, ends, entered, n, pc = group.kernel.code, group.kernel.ends, group.entered, b.n, b.pc
        left, r = quantum, None
        try:
            while left > 0:
                first, end = pc, min(ends[pc], pc + (1 if self.single else left))
                if stops:
                    end = min([end, *(x for x in stops if pc < x)])
                left -= end - first
                entered[first] += n
                entered[end] -= n
                if self.tracing:
                    b.trace.extend(range(first, end))
                if checker is None or not checker.enter(b, first, end):
                    for pc in range(first, end):  # noqa: B007  (an error wants to know where)
                        r = code[pc](b)
                else:
                    for pc in range(first, end):
                        checker.before(b, pc)
                        r = code[pc](b)
                    checker.leave(b, first, end)
                pc = end
                if r is not None:
                    if type(r) is not int or r < 0:
                        break
                    pc, r = r, None
                if stops and pc in stops:
                    break
        except (MemFault, ExecError, IndexError, ValueError, FloatingPointError) as e:
            raise self.located(e, b, pc) from e
        b.pc, b.steps = pc, b.steps + quantum - left
        if b.steps > self.budget:
            raise self.over_budget(b)
        if r == BARRIER:
            b.state = 'barrier'
        elif r == END:
            try:
                b.drain()
            except (MemFault, ExecError) as e:
                raise self.located(e, b, pc - 1) from e
            b.state = 'end'
        elif isinstance(r, Divergence):
            parts = []
            for to in np.unique(r.pcs):
                part = b.subset(np.flatnonzero(r.pcs == to))
                part.pc = int(to)
                parts.append(part)
            b.n = 0
            return parts
        return [b]

    def located(self, e: Exception, b: Batch, pc: int) -> Exception:
        """The same error with kernel, instruction, source line, workgroup and wave in its
        message.
        """
        issued = getattr(e, 'issued', -1)
        pc = issued if issued >= 0 else min(pc, len(self.group.kernel.module.instrs) - 1)
        ins = self.group.kernel.module.instrs[pc]
        row = getattr(e, 'row', -1)
        who = row // 64 if row >= 0 else 0
        wave, wg = int(b.wave[who]), int(self.group.linear[b.wg[who]])
        source = f', source {ins.source}' if ins.source else ''
        text = (
            f'{e}\n'
            f'  in {self.group.kernel.name} at `{ins.text}` (assembly line {ins.line}{source}), '
            f'workgroup {wg}, wave {wave}'
        )
        if isinstance(e, MemFault):
            fault = MemFault(text, e.address, e.lane, row)
            fault.wave, fault.workgroup, fault.line = wave, wg, ins.line
            return fault
        return type(e)(text) if isinstance(e, CdnaSimError) else ExecError(text)

    def over_budget(self, b: Batch) -> BudgetError:
        ins = self.group.kernel.module.instrs[b.pc]
        return BudgetError(
            f'{self.group.kernel.name}: wave {int(b.wave[0])} of workgroup '
            f'{int(self.group.linear[b.wg[0]])} '
            f'passed {self.budget} instructions and stands at `{ins.text}` (line {ins.line}): '
            f'an endless loop? '
            'Raise `budget` if the kernel really is that long.'
        )
