"""How the prefill GEMMs are cut: which tile of routes, and how precisely its products are added."""

from dataclasses import dataclass
from typing import Any

from mixmoe.spec import Problem

# Means from 144 up to this one take tiles of 128 + 64 routes instead of 256. None does: these
# compile clean, but were not measured.
JOINED_TO = 144


@dataclass(frozen=True, slots=True)
class Cut:
    """Tiles of up to main + extra routes, of main, and `small` where so few suffice.

    registers: a thread's, of the second team and of the gathering warps; the first team has the
    rest of 65536. flush: steps of 128 of K after which sums are added in float32, 0: never. part:
    routes of a tile whose product is added at a time, long_part: the same in tiles of more than
    main routes.
    """

    main: int
    small: int
    stages: int
    registers: tuple[int, int]
    flush: int
    part: int = 64
    long_part: int = 32
    extra: int = 32

    @classmethod
    def of(cls, problem: Problem, precise: bool) -> "Cut":
        """For an expert's mean share of the routes."""
        main, extra = shape_of(problem.routes / problem.experts)
        registers = (224, 64) if precise else (208, 88)
        stages = {256: 4, 128: 6, 64: 8}[main]
        long_part = 32 if main == 256 else 64
        return cls(
            main, max(32, main // 4), stages, registers, int(precise), 64, long_part, extra
        )

    def options(self, k: int) -> dict[str, Any]:
        """Keywords of `prefill.grouped_prefill`'s launch for rows of k columns."""
        steps = -(-k // 128)
        stages = min(self.stages, steps)  # the kernel's double buffers rely on it
        flush = self.flush if self.flush and steps % self.flush == 0 else min(self.flush, 1)
        return {
            "MAIN": self.main, "EXTRA": self.extra, "SMALL": self.small, "STAGES": stages,
            "TEAMS": 2, "FLUSH": flush, "PART": self.part,
            "LONG_PART": self.long_part, "TEAM_REGISTERS": self.registers[0],
            "GATHER_REGISTERS": self.registers[1], "PDL": True, "num_warps": 4, "launch_pdl": True,
        }  # fmt: skip


def shape_of(mean: float) -> tuple[int, int]:
    """(main, extra): the narrowest tile that an expert's mean share of the routes fills."""
    if 144 < mean <= JOINED_TO:
        return 128, 64
    return 256 if mean > 144 else 128 if mean > 72 else 64, 32
