"""An mbarrier on paper, for tests that play a kernel's waits and arrivals through."""

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
