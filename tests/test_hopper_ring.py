"""The ring of prefill stage 2, played through on paper: its CTAs wait for each other.

The roles' waits and arrivals are restated as `gemm2_prefill` makes them and stepped in random
order. Stores land late and in any order; only a release waits for those issued before it. Every
row that is read is compared with the slice it should be of.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from hopper_mbarrier import Barrier, Role, Scratch, step


@dataclass(frozen=True, slots=True)
class Cut:
    """segments: of each CTA. What a mutation changes: `trusting` matrix warps wait for no slot, a
    `hasty` loading warp announces without waiting for the stores, another waits for them `late`
    segments after it should (before: negative)."""

    segments: tuple[int, ...]
    slices: int = 11
    ring: int = 3
    group: int = 1
    stages: int = 2
    trusting: bool = False
    hasty: bool = False
    late: int = 0

    @property
    def groups(self) -> int:
        return -(-self.slices // self.group)

    def slices_of(self, group: int) -> range:
        return range(group * self.group, min((group + 1) * self.group, self.slices))


class Device(Scratch):
    """The ring: the slice whose rows of a CTA lie in a slot."""

    def __init__(self, cut: Cut) -> None:
        super().__init__(cut.groups)
        self.cut = cut


@dataclass
class Cta:
    """The barriers of a CTA."""

    index: int
    device: Device
    full: list[Barrier] = field(init=False)
    empty: list[Barrier] = field(init=False)
    granted: list[Barrier] = field(init=False)
    done: list[Barrier] = field(init=False)
    ready: list[Barrier] = field(init=False)
    weights: list[tuple[int, int] | None] = field(init=False)

    def __post_init__(self) -> None:
        cut = self.device.cut
        self.full = [Barrier(1) for _ in range(cut.stages)]
        self.empty = [Barrier(1) for _ in range(cut.stages)]
        self.granted, self.done, self.ready = (
            [Barrier(1) for _ in range(cut.ring)] for _ in range(3)
        )
        self.weights = [None] * cut.stages

    @property
    def segments(self) -> int:
        return self.device.cut.segments[self.index]

    def multiply(self) -> Role:
        cut, item = self.device.cut, 0
        for group in range(cut.groups):
            slot, turn = group % cut.ring, group // cut.ring & 1 ^ 1
            for s in cut.slices_of(group):
                for i in range(self.segments):
                    stage = item % cut.stages
                    yield self.full[stage].done(item // cut.stages & 1)
                    assert self.weights[stage] == (s, i), "stale weights"
                    if not cut.trusting:
                        yield self.granted[slot].done(turn)
                    at = slot * cut.group + s % cut.group, self.index, i
                    self.device.store(self.index, at, s)
                    self.empty[stage].arrive()
                    item += 1
            if not cut.trusting:
                yield self.granted[slot].done(turn)
            self.done[slot].arrive()

    def announce(self, group: int) -> Role:
        cut = self.device.cut
        if not cut.hasty:
            yield self.done[group % cut.ring].done(group // cut.ring & 1)
        yield self.device.landed(self.index)
        self.device.written[group] += 1

    def produce(self) -> Role:
        cut, item, announced = self.device.cut, 0, 0
        due = cut.group * self.segments - 1 + cut.stages + cut.late
        for s in range(cut.slices):
            for i in range(self.segments):
                stage = item % cut.stages
                yield self.empty[stage].done(item // cut.stages & 1 ^ 1)
                self.weights[stage] = (s, i)
                self.full[stage].arrive()
                if item == due:
                    yield from self.announce(announced)
                    announced += 1
                    due += cut.group * self.segments
                item += 1
        for group in range(announced, cut.groups):
            yield from self.announce(group)

    def watch(self, look: int = 3) -> Role:
        cut, device = self.device.cut, self.device
        full, free, fulls, frees = 0, 0, 0, 0
        grid = len(cut.segments)

        def complete(counts: list[int], first: int, last: int) -> int:
            """Complete counts from `first` on, of `look` and before `last`."""
            window = counts[first : min(first + look, last)]
            return next((i for i, n in enumerate(window) if n < grid), len(window))

        def poll() -> bool:
            nonlocal frees, fulls
            frees = complete(device.reduced, free, max(cut.groups - cut.ring, 0))
            fulls = complete(device.written, full, cut.groups)
            return frees + fulls > 0

        while full < cut.groups:
            yield poll
            for _ in range(frees):
                self.granted[free % cut.ring].arrive()
                free += 1
            for _ in range(fulls):
                self.ready[full % cut.ring].arrive()
                full += 1

    def reduce(self) -> Role:
        cut = self.device.cut
        for group in range(cut.groups):
            slot = group % cut.ring
            yield self.ready[slot].done(group // cut.ring & 1)
            for s in cut.slices_of(group):
                for other, segments in enumerate(cut.segments):
                    for i in range(segments):
                        yield lambda: True
                        at = slot * cut.group + s % cut.group, other, i
                        assert self.device.rows.get(at) == s, "rows of another slice"
            self.device.reduced[group] += 1

    def roles(self) -> Iterator[Role]:
        yield from (self.multiply(), self.reduce(), self.produce(), self.watch())


def play(cut: Cut, seed: int) -> None:
    """Everything, and what must be left at the end."""
    device = Device(cut)
    roles = [role for i in range(len(cut.segments)) for role in Cta(i, device).roles()]
    step(roles, device.flying, random.Random(seed))
    assert not device.flying and device.reduced == [len(cut.segments)] * cut.groups


CTAS = [(1, 1, 1), (2, 1, 3), (0, 1, 2), (0, 0), (5, 1), (1,)]


@pytest.mark.parametrize("segments", CTAS, ids=str)
@pytest.mark.parametrize(
    "ring, group, stages", [(2, 1, 1), (2, 1, 4), (3, 2, 2), (4, 3, 3), (16, 1, 3)]
)
def test_no_deadlock_and_no_stale_row(
    segments: tuple[int, ...], ring: int, group: int, stages: int
) -> None:
    for seed in range(6):
        play(Cut(segments, ring=ring, group=group, stages=stages), seed)


@pytest.mark.parametrize("fault", [{"trusting": True}, {"hasty": True}])
def test_rows_of_another_slice_are_seen(fault: dict[str, bool]) -> None:
    with pytest.raises((AssertionError, TimeoutError), match="another slice|deadlock|too many"):
        for seed in range(50):
            play(Cut((1, 2, 1), **fault), seed)


def test_announcing_before_the_last_weights_deadlocks() -> None:
    with pytest.raises(TimeoutError):
        play(Cut((1, 1), late=-3), 0)


def test_an_unordered_store_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Announcing without a release."""
    monkeypatch.setattr(Device, "landed", lambda self, cta: lambda: True)
    with pytest.raises(AssertionError, match="another slice"):
        for seed in range(50):
            play(Cut((1, 2, 1)), seed)
