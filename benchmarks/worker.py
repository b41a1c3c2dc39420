"""The measuring process. A rival that crashes or hangs the device takes this process with it, not
the run: the failure is in the journal by then, and the parent (run.py) starts the next one."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch

from mixmoe.timing import Captured, Flush, GraphClock, Timing

from . import reference, registry, warm
from .case import Case
from .compile_only import CompileOnly
from .counts import RECIPES, Stage, cost
from .models import Models, tidy
from .plan import Plan, Spot
from .registry import OURS, Entry, Run, Unsupported
from .results import Journal, LeftOut, Row
from .roofs import Roofs, highest
from .routing import Skew
from .shapes import TABLE_TOKENS
from .spent import Spent, listed

AGAIN = 75  # exit status: start me again, the failure is noted
STEP_LIMIT = 45.0  # seconds for one provider's set-up and first call, JIT compiles included
WARM_LIMIT = 240.0  # the same where every core compiles
BEATEN = 1.5
SLOW = 1.0  # seconds of set-up worth a line
Failure = tuple[str, str, int, str]  # label, shape, tokens, stage
WRONG = 0.1  # a worst row error above this is a broken kernel, not an inexact one


class Poisoned(Exception):
    """The CUDA context is lost."""


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A provider that has run the case and was right."""

    entry: Entry
    run: Run
    error: float
    deterministic: bool


def prepare(entry: Entry, case: Case, spent: Spent | None = None) -> Prepared:
    """Builds, runs twice and checks. ArithmeticError for a wrong result, and for one of ours that
    claims to be deterministic and is not; a rival that varies is marked so."""
    spent = spent or Spent()
    with spent.on("build"):
        run = entry.build(case)
        run.call()
    with spent.on("check"):
        index = reference.sample(case, run)
        first = run.rows(index).double()
        run.call()
        same = torch.equal(first, run.rows(index).double())
        error = reference.worst_row_error(case, entry, run, index)
    if not error < WRONG:
        raise ArithmeticError(f"wrong result: worst row error {error:.2g}")
    if entry.provider == OURS and entry.deterministic and not same:
        raise ArithmeticError("claims to be deterministic, but two runs differ")
    return Prepared(entry, run, error, entry.deterministic and same)


def compiled(entry: Entry, case: Case, spent: Spent) -> Prepared:
    """Built and run once, unchecked: what fills the compile caches."""
    with spent.on("build"):
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
    spent: Spent = field(default_factory=Spent)
    models: Models = field(init=False)

    def __post_init__(self) -> None:
        self.models = Models(self.device, self.spent)

    def run(self) -> None:
        """The plan's cases in its order, until they are done or the time is up."""
        with self.spent.on("start"):
            self.entries = [entry for entry in self.entries if self._present(entry)]
            for kind in () if self.plan.warm else ("bf16", "fp8"):
                self.roofs.tflops(kind)  # the first work also wakes the clocks for what follows
        gc.freeze()  # the libraries stay; looking through them after every case takes long
        self._account("before the first case")
        waiting = self.plan.spots()
        total, end = len(waiting), self.started + self.plan.seconds
        while waiting and time.monotonic() <= end:
            spot = waiting.pop(0)
            if self._is_open(spot):
                self._guarded(spot)
                done = f"{total - len(waiting)} of {total}"
                self._account(f"{done}, at {time.monotonic() - self.started:.0f} s: {spot}")
            if not waiting or waiting[0].shape != spot.shape:
                self.journal.note_roofs(self.roofs.as_json())
        if waiting:
            say(f"out of time before {waiting[0]} and {len(waiting) - 1} more")
        say(f"whole run: {listed(self.journal.spent)}")

    def _account(self, what: str) -> None:
        seconds = self.spent.take()
        self.journal.note_spent(seconds)
        say(f"{what}: {listed(seconds)}")

    def _is_open(self, spot: Spot) -> bool:
        """Whether a provider is still to be measured there."""
        failed, stages = self._failed(), self.plan.stages
        here = [entry for entry in self.entries if entry.stage.value in stages]
        return any(self._is_due(entry, spot, failed) for entry in here)

    def _is_due(self, entry: Entry, spot: Spot, failed: set[Failure]) -> bool:
        if (entry.label, spot.shape, spot.tokens, entry.stage.value) in failed:
            return False
        return not self._done(entry, spot) and (
            entry.provider == OURS or self.plan.rivals_run(spot.tokens)
        )

    def _failed(self) -> set[Failure]:
        return {(x.provider, x.shape, x.tokens, x.stage) for x in self.journal.left_out}

    def _guarded(self, spot: Spot) -> None:
        """A case that does not fit into memory, say, is named and the run goes on."""
        try:
            model = self.models.of(spot.shape)
            with self.spent.on("inputs"):
                case = Case.random(model, spot.tokens, spot.skew)
            self.case(case, spot)
        except Poisoned:
            raise
        except Exception as error:
            reason = registry.one_line(error)
            self.journal.add(LeftOut("all", spot.shape, spot.tokens, "all", reason))
            say(f"{spot}: {reason}")
            self._check_context()
            self.models.drop()

    def case(self, case: Case, spot: Spot) -> None:
        """All stages of one case, and every flush of the same prepared calls."""
        for stage in map(Stage, self.plan.stages):
            prepared = self._prepare(case, stage, spot)
            for flush in () if self.plan.warm else map(Flush, self.plan.flushes):
                self._measure(case, spot, flush, prepared)
            prepared.clear()
        with self.spent.on("tidy"):
            tidy()

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

    def _prepare(self, case: Case, stage: Stage, spot: Spot) -> list[Prepared]:
        """Every provider that can do the case, compiled, run and checked."""
        prepared, make = [], compiled if self.plan.warm else prepare
        failed = self._failed()
        for entry in self.entries:
            if entry.stage is not stage or not self._is_due(entry, spot, failed):
                continue
            if entry.provider != OURS and self._beaten(entry, spot):
                reason = f"over {BEATEN} x the best rival at the neighbouring counts with a goal"
                self._leave_out(entry, spot.shape, spot.tokens, reason, quiet=True)
                continue
            begin = time.monotonic()
            reason = "ended the process"
            at = (entry.label, spot.shape, spot.tokens, stage.value)
            self.journal.trying(LeftOut(*at, reason))
            try:
                with self._limit([entry], spot):
                    prepared.append(make(entry, case, self.spent))
            except Exception as error:
                self._fail(entry, spot, error)
            if (seconds := time.monotonic() - begin) > SLOW:
                say(f"  {entry.label} {stage.value} T {spot.tokens}: set-up took {seconds:.1f} s")
        self.journal.trying(None)
        return prepared

    def _beaten(self, entry: Entry, spot: Spot) -> bool:
        """Whether a rival is far behind the best one at the nearest counts with a goal, below and
        above, uniform routing: there is no use in spending device time on it between them."""
        if spot.skew is Skew.UNIFORM and spot.tokens in TABLE_TOKENS:
            return False
        rivals = [
            row
            for row in self.journal.rows
            if (row.shape, row.stage) == (spot.shape, entry.stage.value)
            and row.provider != OURS
            and (row.routing, row.flush) == (Skew.UNIFORM.value, self.plan.flushes[0])
            and row.tokens in TABLE_TOKENS
        ]
        counts = {row.tokens for row in rivals}
        below = max((t for t in counts if t <= spot.tokens), default=None)
        above = min((t for t in counts if t >= spot.tokens), default=None)
        behind = []
        for tokens in {below, above} - {None}:
            times = {(r.provider, r.recipe): r.us for r in rivals if r.tokens == tokens}
            mine = times.get((entry.provider, entry.recipe))
            behind.append(mine is not None and mine > BEATEN * min(times.values()))
        return bool(behind) and all(behind)

    def _fail(self, entry: Entry, spot: Spot, error: Exception) -> None:
        quiet = isinstance(error, Unsupported)  # no news; the results name it
        self._leave_out(entry, spot.shape, spot.tokens, registry.one_line(error), quiet)
        self._check_context()

    def _check_context(self) -> None:
        try:
            self.synchronise()
        except Exception as lost:
            raise Poisoned from lost

    def _done(self, entry: Entry, spot: Spot) -> bool:
        at = (entry.label, spot.shape, spot.tokens, entry.stage.value, spot.skew.value)
        return all((*at, flush) in self.journal.measured for flush in self.plan.flushes)

    def _measure(self, case: Case, spot: Spot, flush: Flush, prepared: list[Prepared]) -> None:
        """All providers of a stage in turn, under one flush."""
        clock, captured = self.clocks[flush], dict[str, Captured]()
        with self.spent.on("capture"):
            for item in prepared:
                try:
                    with self._limit([item.entry], spot):
                        captured[item.entry.label] = clock.capture(item.run.call)
                except Exception as error:
                    self._fail(item.entry, spot, error)
        with self.spent.on("replay"):
            times = self._compare(clock, captured, spot, prepared)
        with self.spent.on("roofs"):
            for item in prepared:
                if item.entry.label in times:
                    self._record(case, spot, flush, item, times[item.entry.label])

    def _compare(
        self, clock: GraphClock, captured: dict[str, Captured], spot: Spot, prepared: list[Prepared]
    ) -> dict[str, Timing]:
        """A fault in a replay cannot be pinned on one provider: ours is taken to be the culprit,
        or all of them where ours is not among them."""
        entries = [item.entry for item in prepared if item.entry.label in captured]
        suspects = [entry for entry in entries if entry.provider == OURS] or entries
        try:
            with self._limit(suspects, spot):
                return clock.compare(captured)
        except Exception as error:
            for entry in suspects:
                reason = f"in a replay: {registry.one_line(error)}"
                self._leave_out(entry, spot.shape, spot.tokens, reason)
            self._check_context()
            return {}

    def _record(
        self, case: Case, spot: Spot, flush: Flush, item: Prepared, timing: Timing
    ) -> None:
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
            routing=spot.skew.value,
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
    def _limit(self, entries: list[Entry], spot: Spot) -> Iterator[None]:
        """Ends the process when one step hangs, with those who may have done it noted."""

        limit = WARM_LIMIT if self.plan.warm else STEP_LIMIT

        def expired() -> None:
            for entry in entries:
                reason = f"did not finish within {limit:.0f} s"
                self._leave_out(entry, spot.shape, spot.tokens, reason)
            os._exit(AGAIN)

        timer = threading.Timer(limit, expired)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


def say(line: str) -> None:
    print(line, flush=True)


def main(text: str) -> int:
    """Runs the plan in `text`; the exit status AGAIN asks for another go."""
    plan = Plan.read(text)
    journal = Journal(plan.journal, resume=plan.resume)
    entries = registry.choose(registry.load(), plan.rivals, plan.recipes)
    clocks = {} if plan.warm else {flush: GraphClock(flush) for flush in map(Flush, plan.flushes)}
    worker = Worker(plan, journal, entries, clocks, Roofs("cuda", clocks))
    # rivals compile where they launch
    only_ours = plan.warm and plan.rivals == "none"
    try:
        with CompileOnly(plan.folder / warm.CLAIMS) if only_ours else nullcontext():
            worker.run()
    except Poisoned:
        say("the CUDA context is lost; starting again")
        return AGAIN
    return 0


if __name__ == "__main__":
    status = main(sys.stdin.read())
    sys.stdout.flush()
    os._exit(status)  # a poisoned context may crash or hang in the exit handlers
