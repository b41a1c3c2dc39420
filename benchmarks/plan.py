"""What a run measures, as a record that travels to the worker process as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from mixmoe.timing import Flush

from .counts import RECIPES, Stage
from .routing import Skew
from .shapes import SHAPES, TABLE_TOKENS, TOKENS


class Spot(NamedTuple):
    """Where a case lies: all providers, stages and flushes are measured there together."""

    shape: str
    skew: Skew
    tokens: int

    def __str__(self) -> str:
        return f"{self.shape} T {self.tokens} {self.skew.value}"


@dataclass(frozen=True, slots=True)
class Plan:
    """Names as the command line gives them; `seconds` bounds the whole run, set-up included.

    `part` names a share of a larger plan, and the files that it writes.
    """

    shapes: tuple[str, ...] = tuple(SHAPES)
    tokens: tuple[int, ...] = TOKENS
    rival_tokens: tuple[int, ...] | None = None  # None: as many as ours
    skews: tuple[str, ...] = ("uniform", "zipf")
    stages: tuple[str, ...] = ("stage1", "stage2", "layer")
    flushes: tuple[str, ...] = ("clean", "dirty")
    rivals: str = "all"
    recipes: tuple[str, ...] = ("a8w4",)
    seconds: float = 480.0
    out: str = "results"
    commit: str = ""
    resume: bool = False
    warm: bool = False
    part: str = ""

    def __post_init__(self) -> None:
        if unknown := set(self.shapes) - set(SHAPES):
            raise ValueError(f"no such shape: {sorted(unknown)}; there are {sorted(SHAPES)}")
        if bad := [t for t in self.tokens if t < 1]:
            raise ValueError(f"tokens must be at least 1: got {bad}")
        if unknown := set(self.recipes) - set(RECIPES):
            raise ValueError(f"no such recipe: {sorted(unknown)}; there are {sorted(RECIPES)}")
        for what in ("shapes", "tokens", "skews", "stages", "flushes"):
            if not getattr(self, what):
                raise ValueError(f"nothing to measure: no {what}")
        known = {"routing": (self.skews, Skew), "stage": (self.stages, Stage)}
        for what, (names, kind) in (known | {"flush": (self.flushes, Flush)}).items():
            legal = [one.value for one in kind]
            if unknown := set(names) - set(legal):
                raise ValueError(f"no such {what}: {sorted(unknown)}; there are {legal}")

    def rivals_run(self, tokens: int) -> bool:
        """Whether rivals are measured at this count."""
        return self.rival_tokens is None or tokens in self.rival_tokens

    @property
    def folder(self) -> Path:
        return Path(self.out)

    @property
    def journal(self) -> Path:
        """Where the measuring process notes what it has done."""
        return self.folder / f"journal{self.suffix}.jsonl"

    @property
    def suffix(self) -> str:
        """What the names of a part's files end in."""
        return f"-{self.part}" if self.part else ""

    def spots(self) -> list[Spot]:
        """In the order of their worth, for a run that is cut short: the counts with a goal in every
        shape, then the other counts, then the same under the next routing."""
        goals = [tokens for tokens in self.tokens if tokens in TABLE_TOKENS]
        others = [tokens for tokens in self.tokens if tokens not in TABLE_TOKENS]
        return [
            Spot(shape, Skew(skew), tokens)
            for skew in self.skews
            for counts in (goals, others)
            for shape in self.shapes
            for tokens in sorted(counts)
        ]

    def share(self, name: str) -> Plan:
        """Part "0/2" takes every second shape from the first on: whole shapes, because their
        weights are made and packed once. ValueError for a part without a shape."""
        number, _, parts = name.partition("/")
        if not (number.isdecimal() and parts.isdecimal() and int(number) < int(parts)):
            raise ValueError(f"a share is like 0/2, the first of two: got {name!r}")
        shapes = self.shapes[int(number) :: int(parts)]
        if not shapes:
            rule = f"a share is of whole shapes, and there are {len(self.shapes)}"
            raise ValueError(f"{rule}: got {name}")
        return replace(self, shapes=shapes, part=f"{number}of{parts}")

    def dump(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def read(text: str) -> Plan:
        stored = json.loads(text)
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in stored.items()
        }
        return Plan(**fields)

