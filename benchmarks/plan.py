"""What a run measures, as a record that travels to the worker process as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mixmoe.timing import Flush

from .counts import Stage
from .routing import Skew
from .shapes import SHAPES, TABLE_TOKENS, TOKENS


@dataclass(frozen=True, slots=True)
class Plan:
    """Names as the command line gives them; `seconds` bounds the whole run, set-up included."""

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

    def __post_init__(self) -> None:
        if unknown := set(self.shapes) - set(SHAPES):
            raise ValueError(f"no such shape: {sorted(unknown)}; there are {sorted(SHAPES)}")
        if bad := [t for t in self.tokens if t < 1]:
            raise ValueError(f"tokens must be at least 1: got {bad}")
        for value, kind in ((self.skews, Skew), (self.stages, Stage), (self.flushes, Flush)):
            for name in value:
                kind(name)

    def rivals_run(self, tokens: int) -> bool:
        """Whether rivals are measured at this count."""
        return self.rival_tokens is None or tokens in self.rival_tokens

    @property
    def folder(self) -> Path:
        return Path(self.out)

    def cases(self) -> list[tuple[Skew, int]]:
        """(skew, tokens) of every shape: the counts with a goal first, so that a run cut short
        still has them under both routings."""
        goals = [tokens for tokens in self.tokens if tokens in TABLE_TOKENS]
        others = [tokens for tokens in self.tokens if tokens not in TABLE_TOKENS]
        return [
            (Skew(skew), tokens)
            for counts in (goals, others)
            for skew in self.skews
            for tokens in sorted(counts)
        ]

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


def shares(seconds: float, parts: int) -> float:
    """What the next of `parts` parts may take of the seconds that are left."""
    return max(seconds, 0.0) / max(parts, 1)
