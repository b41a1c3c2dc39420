"""Providers: one decorated function per provider and stage.

    @provider("deepgemm", "contiguous", Stage.STAGE1, recipe="a8w8_block", needs=("deep_gemm",),
              leaves_out="activation, requantisation, gather")
    def stage1(case: Case) -> Run: ...

The function prepares its operands (outside the timing; what belongs to the weights goes into
`case.model.memo`) and returns the call to time and a way to read rows of its result.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum

from torch import Tensor

from mixmoe.shapes import listed

from .case import Case
from .counts import Stage


class Shows(Enum):
    """What rows a provider's result holds, and so what they are compared with."""

    GATE_UP = "gate | up of a route"
    HIDDEN = "activated row of a route"
    HIDDEN_REQUANTISED = "activated row of a route, requantised"
    ROUTE = "down projection of a route"
    TOKEN = "reduced row of a token"


class Unsupported(Exception):
    """A provider cannot do this case; the message says why."""


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """`call()` launches the work on the current stream. `rows(index)` gives the result's rows of
    the routes (or tokens, for Shows.TOKEN) in `index`, in any float type."""

    call: Callable[[], object]
    rows: Callable[[Tensor], Tensor]
    shows: Shows
    activation: str | None = None  # where it is not the shape's own


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """A provider's way to do a stage."""

    provider: str
    stage: Stage
    recipe: str
    build: Callable[[Case], Run]
    plugin: str
    needs: tuple[str, ...]
    leaves_out: str
    deterministic: bool
    reduces: bool
    accumulate: str  # of ours: "auto", "precise" or "fast"; the rivals have one way

    @property
    def label(self) -> str:
        """Unique among the entries of a stage."""
        tail = "" if self.deterministic else ", atomics"
        tail += f", {self.accumulate}" if self.accumulate not in ("", "auto") else ""
        return f"{self.provider} [{self.recipe}{tail}]"


ENTRIES: list[Entry] = []
OURS = "mixmoe"


def provider(
    name: str,
    stage: Stage,
    *,
    recipe: str,
    needs: tuple[str, ...] = (),
    leaves_out: str = "",
    deterministic: bool = True,
    reduces: bool = True,
    accumulate: str = "",
) -> Callable[[Callable[[Case], Run]], Callable[[Case], Run]]:
    """Registers the decorated function. `needs` are modules that must import; `leaves_out` says
    which work of the stage is not in the time (always to the provider's advantage)."""

    def register(build: Callable[[Case], Run]) -> Callable[[Case], Run]:
        plugin = build.__module__.rsplit(".", 1)[-1]
        entry = Entry(
            name,
            stage,
            recipe,
            build,
            plugin,
            needs,
            leaves_out,
            deterministic,
            reduces,
            accumulate,
        )
        if any(e.label == entry.label and e.stage is stage for e in ENTRIES):
            raise ValueError(f"two providers are called {entry.label!r} in {stage.value}")
        ENTRIES.append(entry)
        return build

    return register


def load() -> list[Entry]:
    """Imports ours and every plug-in under benchmarks/rivals, and gives all entries."""
    importlib.import_module("benchmarks.ours")
    package = importlib.import_module("benchmarks.rivals")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"benchmarks.rivals.{module.name}")
    return ENTRIES


def choose(entries: Iterable[Entry], rivals: str, recipes: Iterable[str]) -> list[Entry]:
    """Ours in `recipes`, and the rivals named by plug-in: "all", "none", "humming,deepgemm"."""
    known = {entry.plugin for entry in entries if entry.provider != OURS}
    wanted = {"all": known, "none": set[str]()}.get(rivals, set(listed(rivals)))
    if unknown := wanted - known:
        raise ValueError(f"no such rival: {sorted(unknown)}; there are {sorted(known)}")
    ours = set(recipes)
    return [
        entry
        for entry in entries
        if (entry.recipe in ours if entry.provider == OURS else entry.plugin in wanted)
    ]


def why_missing(entry: Entry) -> str | None:
    """None when everything that the entry needs imports, else the reason, in one line."""
    for name in entry.needs:
        try:
            importlib.import_module(name)
        except Exception as error:  # a broken install is a reason too
            return one_line(f"{name} does not import: {error}")
    return None


def one_line(error: BaseException | str, limit: int = 200) -> str:
    """The first non-empty line of an error, with its type, cut to `limit`."""
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines[0] if lines else "no message")[:limit]
