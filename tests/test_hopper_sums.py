"""Stage 2 that sums column groups beside its product, played through on paper.

The roles' waits and arrivals are restated as `gemm2_red_sum` and `gemm2_red` make them and stepped
in random order, some roles slow. Stores land late and in any order; only a release waits for those
issued before it. Every row that is read is compared with the group it should be of.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from hopper_mbarrier import Barrier, Role, Scratch, step


@dataclass(frozen=True, slots=True)
class Cut:
    """tiles: of routes; parts: groups of an item; span: column tiles of a group. What a mutation
    changes: `trusting` warps store without waiting for a slot, `hasty` ones count an item before
    they store it, items go `tile_first`."""

    ctas: int
    tiles: int
    groups: int = 7
    parts: int = 2
    slots: int = 3
    span: int = 2
    stages: int = 2
    records: int = 4
    trusting: bool = False
    hasty: bool = False
    tile_first: bool = False

    @property
    def items(self) -> int:
        """Items of a tile."""
        return -(-self.groups // self.parts)

    def groups_of(self, item: int) -> range:
        return range(item * self.parts, min((item + 1) * self.parts, self.groups))

    def columns_of(self, item: int) -> int:
        return self.span * len(self.groups_of(item))


class Device(Scratch):
    """The group whose rows of a tile lie in a slot, and how many items have been drawn."""

    def __init__(self, cut: Cut) -> None:
        super().__init__(cut.groups)
        self.cut = cut
        self.drawn = 0

    def draw(self) -> tuple[int, int] | None:
        """Which groups and which tile the next item has."""
        cut, index = self.cut, self.drawn
        self.drawn += 1
        if index >= cut.items * cut.tiles:
            return None
        if cut.tile_first:
            return index % cut.items, index // cut.items
        return index // cut.tiles, index % cut.tiles


Item = tuple[int, int] | None


@dataclass
class Cta:
    """The barriers of a CTA, and what lies in its shared memory."""

    index: int
    device: Device
    full: list[Barrier] = field(init=False)
    empty: list[Barrier] = field(init=False)
    weights: list[object] = field(init=False)
    held: tuple[Barrier, Barrier] = field(init=False)
    outs: list[tuple[Barrier, Barrier]] = field(init=False)
    tiles: list[object] = field(init=False)
    records: list[Item] = field(init=False)
    stored: int = 0
    free: int = 0

    def __post_init__(self) -> None:
        cut = self.device.cut
        self.full = [Barrier(1) for _ in range(cut.stages)]
        self.empty = [Barrier(1) for _ in range(cut.stages)]
        self.weights = [None] * cut.stages
        self.held = Barrier(1), Barrier(1)
        self.outs = [(Barrier(1), Barrier(1)) for _ in range(2)]
        self.tiles = [None, None]
        self.records = [None] * cut.records

    def produce(self) -> Role:
        cut, filled, turn = self.device.cut, 0, 0
        item: Item = (0, 0)
        while item is not None:
            item = self.device.draw()
            yield self.held[1].done(turn & 1 ^ 1)
            self.records[turn % cut.records] = item
            self.held[0].arrive()
            turn += 1
            for c in range(cut.columns_of(item[0]) if item else 0):
                stage = filled % cut.stages
                yield self.empty[stage].done(filled // cut.stages & 1 ^ 1)
                self.weights[stage] = item, c
                self.full[stage].arrive()
                filled += 1

    def multiply(self) -> Role:
        cut, done, turn = self.device.cut, 0, 0
        while True:
            yield self.held[0].done(turn & 1)
            item = self.records[turn % cut.records]
            turn += 1
            if item is None:
                break
            for c in range(cut.columns_of(item[0])):
                stage, (full, empty) = done % cut.stages, self.outs[done % 2]
                yield self.full[stage].done(done // cut.stages & 1)
                assert self.weights[stage] == (item, c), "stale weights"
                self.empty[stage].arrive()
                yield empty.done(done // 2 & 1 ^ 1)
                self.tiles[done % 2] = item, c
                full.arrive()
                done += 1
            self.held[1].arrive()
        full, empty = self.outs[done % 2]
        yield empty.done(done // 2 & 1 ^ 1)
        full.arrive()

    def store(self) -> Role:
        cut, turn = self.device.cut, 0
        while True:
            yield self.outs[self.stored % 2][0].done(self.stored // 2 & 1)
            item = self.records[turn % cut.records]
            turn += 1
            if item is None:
                break
            yield from self.store_item(item)

    def store_item(self, item: tuple[int, int]) -> Role:
        cut, device, tile = self.device.cut, self.device, item[1]
        for group in cut.groups_of(item[0]):
            while self.free + cut.slots <= group and not cut.trusting:
                yield lambda: device.reduced[self.free] == cut.ctas
                self.free += 1
            if cut.hasty:
                device.written[group] += 1
            for c in range(cut.span):
                full, empty = self.outs[self.stored % 2]
                yield full.done(self.stored // 2 & 1)
                column = group % cut.parts * cut.span + c
                assert self.tiles[self.stored % 2] == (item, column), "stale tile or record"
                device.store(self.index, (group % cut.slots, tile, c), group)
                empty.arrive()
                self.stored += 1
            if not cut.hasty:
                yield device.landed(self.index)
                device.written[group] += 1

    def sum(self) -> Role:
        cut, device = self.device.cut, self.device
        for group in range(cut.groups):
            yield lambda group=group: device.written[group] == cut.tiles  # type: ignore[misc]
            for tile in range(cut.tiles):
                for c in range(cut.span):
                    yield lambda: True
                    seen = device.rows.get((group % cut.slots, tile, c))
                    assert seen == group, "rows of another group"
            device.reduced[group] += 1

    def roles(self) -> Iterator[Role]:
        yield from (self.produce(), self.multiply(), self.store(), self.sum())


def play(cut: Cut, seed: int) -> None:
    """Everything, and what must be left at the end."""
    device = Device(cut)
    roles = [role for i in range(cut.ctas) for role in Cta(i, device).roles()]
    step(roles, device.flying, random.Random(seed))
    assert not device.flying and device.drawn == cut.items * cut.tiles + cut.ctas
    assert device.written == [cut.tiles] * cut.groups
    assert device.reduced == [cut.ctas] * cut.groups


@pytest.mark.parametrize("ctas, tiles", [(3, 5), (4, 2), (2, 9), (1, 3), (2, 0)], ids=str)
@pytest.mark.parametrize(
    "parts, slots, span", [(1, 1, 1), (1, 2, 3), (2, 2, 1), (2, 3, 2), (3, 4, 1), (1, 7, 2)]
)
def test_no_deadlock_and_no_stale_row(
    ctas: int, tiles: int, parts: int, slots: int, span: int
) -> None:
    for seed in range(3):
        play(Cut(ctas, tiles, parts=parts, slots=slots, span=span), seed)


@pytest.mark.parametrize(
    "fault, match",
    [({"trusting": True}, "another group"), ({"hasty": True}, "another group"),
     ({"tile_first": True}, "deadlock"), ({"records": 1}, "stale"),
     ({"parts": 3, "slots": 2}, "deadlock")],
    ids=lambda value: next(iter(value), "") if isinstance(value, dict) else None,
)  # fmt: skip
def test_faults_are_seen(fault: dict[str, int], match: str) -> None:
    with pytest.raises((AssertionError, TimeoutError), match=match):
        for seed in range(50):
            play(Cut(3, 5, **fault), seed)  # type: ignore[arg-type]


def test_an_unordered_store_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting without a release."""
    monkeypatch.setattr(Device, "landed", lambda self, cta: lambda: True)
    with pytest.raises(AssertionError, match="another group"):
        for seed in range(50):
            play(Cut(3, 5), seed)
