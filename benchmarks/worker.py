"""The measuring process. A rival that crashes or hangs the device takes this process with it, not
the run: the failure is in the journal by then, and the parent (run.py) starts the next one."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from mixmoe.timing import Captured, Flush, GraphClock, Timing

from . import reference, registry
from .case import Case, Model
from .counts import RECIPES, Stage, cost
from .plan import Plan, shares
from .registry import OURS, Entry, Run
from .results import Journal, LeftOut, Row
from .roofs import Roofs, highest
from .routing import Skew
from .shapes import SHAPES, TABLE_TOKENS

AGAIN = 75  # exit status: start me again, the failure is noted
STEP_LIMIT = 45.0  # seconds for one provider's set-up and first call, JIT compiles included
BEATEN = 1.5
SLOW = 1.0  # seconds of set-up worth a line
WRONG = 0.1  # a worst row error above this is a broken kernel, not an inexact one
ROOMY = 90 << 30  # bytes; above this the allocator's cache is emptied between cases


class Poisoned(Exception):
    """The CUDA context is lost."""


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A provider that has run the case and was right."""

    entry: Entry
    run: Run
    error: float
    deterministic: bool


def prepare(entry: Entry, case: Case) -> Prepared:
    """Builds, runs twice and checks. ArithmeticError for a wrong result, and for one of ours that
    claims to be deterministic and is not; a rival that varies is marked so."""
    run = entry.build(case)
    index = reference.sample(case, run)
    seen = []
    for _ in range(2):
        run.call()
        seen.append(run.rows(index).double())
    error = reference.worst_row_error(case, entry, run, index)
    if not error < WRONG:
        raise ArithmeticError(f"wrong result: worst row error {error:.2g}")
    same = torch.equal(seen[0], seen[1])
    if entry.provider == OURS and entry.deterministic and not same:
        raise ArithmeticError("claims to be deterministic, but two runs differ")
    return Prepared(entry, run, error, entry.deterministic and same)


def compiled(entry: Entry, case: Case) -> Prepared:
    """Built and run once, unchecked: what fills the compile caches."""
    run = entry.build(case)
    run.call()
    return Prepared(entry, run, 0.0, entry.deterministic)


@dataclass(slots=True)
class Worker:
    """Runs a plan on one device."""

    plan: Plan
    journal: Journal
    entries: list[Entry]
    clocks: dict[Flush, GraphClock]
    roofs: Roofs
    device: str = "cuda"
    synchronise: Callable[[], None] = torch.cuda.synchronize
    started: float = field(default_factory=time.monotonic)
    spent: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def run(self) -> None:
        """Every shape gets an equal share of the time that is left when it comes."""
        self.entries = [entry for entry in self.entries if self._present(entry)]
        end = self.started + self.plan.seconds
        for kind in () if self.plan.warm else ("bf16", "fp8"):
            self.roofs.tflops(kind)  # the first work also wakes the clocks for what follows
        for place, name in enumerate(self.plan.shapes):
            now = time.monotonic()
            until = now + shares(end - now, len(self.plan.shapes) - place)
            model = Model.random(SHAPES[name], self.device)
            for skew, tokens in self.plan.cases():
                if time.monotonic() > until:
                    say(f"{name}: out of time before T {tokens}, {skew.value} routing")
                    break
                self._guarded(model, tokens, skew)
            self.journal.note_roofs(self.roofs.as_json())
            del model
            tidy(force=True)

    def _guarded(self, model: Model, tokens: int, skew: Skew) -> None:
        """A case that does not fit into memory, say, is named and the run goes on."""
        try:
            self.case(Case.random(model, tokens, skew), skew)
        except Poisoned:
            raise
        except Exception as error:
            reason = registry.one_line(error)
            self.journal.add(LeftOut("all", model.shape.name, tokens, "all", reason))
            say(f"{model.shape.name} T {tokens} {skew.value}: {reason}")
            self._check_context()
            tidy(force=True)

    def case(self, case: Case, skew: Skew) -> None:
        """All stages of one case."""
        begin = time.monotonic()
        for stage in map(Stage, self.plan.stages):
            prepared = self._prepare(case, stage, skew)
            self.spent["set-up"] += time.monotonic() - begin
            for flush in () if self.plan.warm else map(Flush, self.plan.flushes):
                self._measure(case, skew, flush, prepared)
            prepared.clear()
            begin = time.monotonic()
        tidy()
        spent = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.spent.items())
        say(f"{case.shape.name} T {case.tokens} {skew.value}: {spent} s")
        self.spent.clear()

    def _present(self, entry: Entry) -> bool:
        reason = registry.why_missing(entry)
        if reason:
            self._leave_out(entry, "all", 0, reason)
        return reason is None

    def _leave_out(
        self, entry: Entry, shape: str, tokens: int, reason: str, quiet: bool = False
    ) -> None:
        item = LeftOut(entry.label, shape, tokens, entry.stage.value, reason)
        if item in self.journal.left_out:
            return
        self.journal.add(item)
        if not quiet:
            say(f"left out: {item.provider} {shape} T {tokens} {item.stage}: {reason}")

    def _prepare(self, case: Case, stage: Stage, skew: Skew) -> list[Prepared]:
        """Every provider that can do the case, compiled, run and checked."""
        failed = {(x.provider, x.shape, x.tokens, x.stage) for x in self.journal.left_out}
        prepared, make = [], compiled if self.plan.warm else prepare
        for entry in self.entries:
            at = (entry.label, case.shape.name, case.tokens, stage.value)
            if entry.stage is not stage or at in failed or self._done(entry, case, skew):
                continue
            if entry.provider != OURS and not self.plan.rivals_run(case.tokens):
                continue
            if entry.provider != OURS and self._beaten(entry, case, skew):
                reason = f"over {BEATEN} x the best rival at the neighbouring counts with a goal"
                self._leave_out(entry, case.shape.name, case.tokens, reason, quiet=True)
                continue
            begin = time.monotonic()
            reason = "ended the process"
            self.journal.trying(LeftOut(at[0], at[1], at[2], at[3], reason))
            try:
                with self._limit([entry], case):
                    prepared.append(make(entry, case))
            except Exception as error:
                self._fail(entry, case, error)
            if (seconds := time.monotonic() - begin) > SLOW:
                say(f"  {entry.label} {stage.value} T {case.tokens}: set-up took {seconds:.1f} s")
        self.journal.trying(None)
        return prepared

    def _beaten(self, entry: Entry, case: Case, skew: Skew) -> bool:
        """Whether a rival is far behind the best one at the nearest counts with a goal, below and
        above, uniform routing: there is no use in spending device time on it between them."""
        if skew is Skew.UNIFORM and case.tokens in TABLE_TOKENS:
            return False
        rivals = [
            row
            for row in self.journal.rows
            if (row.shape, row.stage) == (case.shape.name, entry.stage.value)
            and row.provider != OURS
            and (row.routing, row.flush) == (Skew.UNIFORM.value, self.plan.flushes[0])
            and row.tokens in TABLE_TOKENS
        ]
        counts = {row.tokens for row in rivals}
        below = max((t for t in counts if t <= case.tokens), default=None)
        above = min((t for t in counts if t >= case.tokens), default=None)
        behind = []
        for tokens in {below, above} - {None}:
            times = {(r.provider, r.recipe): r.us for r in rivals if r.tokens == tokens}
            mine = times.get((entry.provider, entry.recipe))
            behind.append(mine is not None and mine > BEATEN * min(times.values()))
        return bool(behind) and all(behind)

    def _fail(self, entry: Entry, case: Case, error: Exception) -> None:
        self._leave_out(entry, case.shape.name, case.tokens, registry.one_line(error))
        self._check_context()

    def _check_context(self) -> None:
        try:
            self.synchronise()
        except Exception as lost:
            raise Poisoned from lost

    def _done(self, entry: Entry, case: Case, skew: Skew) -> bool:
        at = (entry.label, case.shape.name, case.tokens, entry.stage.value, skew.value)
        return all((*at, flush) in self.journal.measured for flush in self.plan.flushes)

    def _measure(self, case: Case, skew: Skew, flush: Flush, prepared: list[Prepared]) -> None:
        """All providers of a stage in turn, under one flush."""
        clock, captured = self.clocks[flush], dict[str, Captured]()
        marks = [time.monotonic()]
        for item in prepared:
            try:
                with self._limit([item.entry], case):
                    captured[item.entry.label] = clock.capture(item.run.call)
            except Exception as error:
                self._fail(item.entry, case, error)
        marks.append(time.monotonic())
        times = self._compare(clock, captured, case, prepared)
        marks.append(time.monotonic())
        for item in prepared:
            if item.entry.label in times:
                self._record(case, skew, flush, item, times[item.entry.label])
        marks.append(time.monotonic())
        for name, (start, end) in zip(("capture", "replay", "roofs"), pairwise(marks), strict=True):
            self.spent[name] += end - start

    def _compare(
        self, clock: GraphClock, captured: dict[str, Captured], case: Case, prepared: list[Prepared]
    ) -> dict[str, Timing]:
        """A fault in a replay cannot be pinned on one provider: ours is taken to be the culprit,
        or all of them where ours is not among them."""
        entries = [item.entry for item in prepared if item.entry.label in captured]
        suspects = [entry for entry in entries if entry.provider == OURS] or entries
        try:
            with self._limit(suspects, case):
                return clock.compare(captured)
        except Exception as error:
            for entry in suspects:
                reason = f"in a replay: {registry.one_line(error)}"
                self._leave_out(entry, case.shape.name, case.tokens, reason)
            self._check_context()
            return {}

    def _record(self, case: Case, skew: Skew, flush: Flush, item: Prepared, timing: Timing) -> None:
        entry, routing = item.entry, case.routing
        floor = cost(
            case.shape, case.tokens, routing.active, entry.stage, entry.recipe, entry.reduces
        )
        reduction = 0.0
        if entry.stage is Stage.STAGE2 and entry.reduces:
            reduction = self.roofs.reduction_us(flush, routing, case.shape.hidden)
        rate = self.roofs.tflops(RECIPES[entry.recipe].tensor)
        roof = highest(self.roofs.read_us(flush, floor.nbytes), floor, rate, reduction)
        row = Row(
            provider=entry.provider,
            shape=case.shape.name,
            recipe=entry.recipe,
            tokens=case.tokens,
            stage=entry.stage.value,
            flush=flush.value,
            deterministic=item.deterministic,
            us=round(timing.us, 3),
            spread=round(timing.spread, 3),
            roof_us=round(roof.us, 3),
            worst_row_error=float(f"{item.error:.3g}"),
            routing=skew.value,
            accumulate=entry.accumulate,
            active_experts=routing.active,
            nbytes=floor.nbytes,
            flops=floor.flops,
            roof_by=roof.by,
            compared=item.run.shows.value,
            leaves_out=entry.leaves_out,
        )
        self.journal.add(row, entry.label)

    @contextmanager
    def _limit(self, entries: list[Entry], case: Case) -> Iterator[None]:
        """Ends the process when one step hangs, with those who may have done it noted."""

        def expired() -> None:
            for entry in entries:
                reason = f"did not finish within {STEP_LIMIT:.0f} s"
                self._leave_out(entry, case.shape.name, case.tokens, reason)
            os._exit(AGAIN)

        timer = threading.Timer(STEP_LIMIT, expired)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


def tidy(force: bool = False) -> None:
    """Frees graphs in reference cycles, and the allocator's cache when it holds much."""
    gc.collect()
    if torch.cuda.is_available() and (force or torch.cuda.memory_reserved() > ROOMY):
        torch.cuda.empty_cache()


def say(line: str) -> None:
    print(line, flush=True)


def main(text: str) -> int:
    """Runs the plan in `text`; the exit status AGAIN asks for another go."""
    plan = Plan.read(text)
    journal = Journal(plan.folder / "journal.jsonl", resume=plan.resume)
    entries = registry.choose(registry.load(), plan.rivals, plan.recipes)
    clocks = {flush: GraphClock(flush) for flush in map(Flush, plan.flushes)}
    worker = Worker(plan, journal, entries, clocks, Roofs("cuda", clocks))
    try:
        worker.run()
    except Poisoned:
        say("the CUDA context is lost; starting again")
        return AGAIN
    return 0


if __name__ == "__main__":
    status = main(sys.stdin.read())
    sys.stdout.flush()
    os._exit(status)  # a poisoned context may crash or hang in the exit handlers
