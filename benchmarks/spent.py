"""Where a run's time goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

REST = "rest"


@dataclass(slots=True)
class Spent:
    """Wall seconds by what they went into: of what is nested, only the innermost is charged, so
    that they add up to the whole."""

    clock: Callable[[], float] = time.monotonic
    seconds: dict[str, float] = field(default_factory=dict)
    within: list[str] = field(default_factory=lambda: [REST])
    since: float = field(init=False)

    def __post_init__(self) -> None:
        self.since = self.clock()

    @contextmanager
    def on(self, name: str) -> Iterator[None]:
        """Charges what is done inside to `name`."""
        self._charge()
        self.within.append(name)
        try:
            yield
        finally:
            self._charge()
            self.within.pop()

    def take(self) -> dict[str, float]:
        """The seconds since the last take."""
        self._charge()
        taken, self.seconds = self.seconds, {}
        return taken

    def _charge(self) -> None:
        now, name = self.clock(), self.within[-1]
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.since
        self.since = now


def listed(seconds: Mapping[str, float]) -> str:
    """ "0.62 s (build 0.40, replay 0.22)", without what rounds to nothing."""
    parts = [f"{name} {took:.2f}" for name, took in seconds.items() if took >= 0.005]
    return f"{sum(seconds.values()):.2f} s ({', '.join(parts)})"
