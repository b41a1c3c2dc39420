"""An mbarrier on paper, for tests that play a kernel's waits and arrivals through."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

Role = Iterator[Callable[[], bool]]  # yields what it waits for


@dataclass
class Barrier:
    """mbarrier: a phase ends when all arrivals and all bytes of it have come."""

    count: int
    phase: int = 0
    pending: int = field(init=False)
    flying: int = 0

    def __post_init__(self) -> None:
        self.pending = self.count

    def arrive(self) -> None:
        self.pending -= 1
        self.settle()

    def land(self) -> None:
        self.flying -= 1
        self.settle()

    def settle(self) -> None:
        assert self.pending >= 0, "an arrival too many"
        if self.pending == 0 and self.flying == 0:
            self.phase += 1
            self.pending = self.count

    def done(self, parity: int) -> Callable[[], bool]:
        """What `mbarrier.wait(parity)` waits for: that the current phase is of the other parity."""
        return lambda: self.phase & 1 != parity


@dataclass
class Scratch:
    """Slots of rows that CTAs share, with the counters of their groups: what lies at (cta or tile,
    slot, row), and the stores under way, of a CTA each, which land late and in any order."""

    groups: int
    written: list[int] = field(init=False)
    reduced: list[int] = field(init=False)
    rows: dict[tuple[int, int, int], int] = field(default_factory=dict)
    flying: list[tuple[int, Callable[[], None]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.written = [0] * self.groups
        self.reduced = [0] * self.groups

    def store(self, cta: int, at: tuple[int, int, int], what: int) -> None:
        """A store that lands some time."""
        self.flying.append((cta, lambda: self.rows.update({at: what})))

    def landed(self, cta: int) -> Callable[[], bool]:
        """Whether all stores that the CTA has issued by now have landed."""
        mine = [store for store in self.flying if store[0] == cta]
        return lambda: not any(store in self.flying for store in mine)


def step(
    roles: list[Role], flying: list[tuple[int, Callable[[], None]]], rng: random.Random,
    patience: int = 200,
) -> None:  # fmt: skip
    """Steps the roles and landings of `flying` in random order until the roles have ended;
    TimeoutError where nothing can move any more. Some are slow in one run, others in the next."""
    waiting = [next(role, None) for role in roles]
    weight = [rng.choice((1, 1, 8, 40)) for _ in roles] + [rng.choice((1, 8, 40))]
    choices = range(len(roles) + 1)
    idle = 0
    while any(waiting):
        idle += 1
        choice = rng.choices(choices, weight)[0]
        if choice == len(roles):
            if flying:
                flying.pop(rng.randrange(len(flying)))[1]()
                idle = 0
        elif (condition := waiting[choice]) is not None and condition():
            waiting[choice] = next(roles[choice], None)
            idle = 0
        if idle > patience:
            if not flying and not any(ready() for ready in waiting if ready is not None):
                raise TimeoutError("deadlock")
            idle = 0
