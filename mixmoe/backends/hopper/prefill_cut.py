"""How the prefill GEMMs are cut: which tile of routes, and how precisely its products are added."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from mixmoe.backends.hopper.decode import multiprocessors
from mixmoe.spec import Problem

# Mean shares of an expert up to which a form is taken (stage 1, H100, 2026-11-28, us: 64 routes two
# to an SM / alone: mean 32 196 / 206, mean 48 207 / 218, mean 64 300 / 235; 128 + 64 / 256 routes:
# mean 171 585 / 678). Beyond them 256 + 32.
PAIRED_TO, SINGLE_TO, HALF_TO, JOINED_TO = 52, 72, 144, 190


class Form(NamedTuple):
    """A tile of up to main + extra routes, ring stages, CTAs an SM."""

    main: int
    extra: int
    stages: int
    ctas: int


@dataclass(frozen=True, slots=True)
class Cut:
    """A form, and how sums are added.

    registers: a thread's, of the second team and of the gathering warps; the first team has the
    rest of the CTA's. precise: products of 128 of K are added in float32.
    """

    form: Form
    registers: tuple[int, int]
    precise: bool

    @classmethod
    def of(cls, problem: Problem, precise: bool) -> "Cut":
        """For an expert's mean share of the routes."""
        form = form_of(problem.routes / problem.experts)
        registers = (96, 48) if form.ctas == 2 else (224, 56) if precise else (208, 88)
        return cls(form, registers, precise)

    @property
    def main(self) -> int:
        """Routes of a tile."""
        return self.form.main

    @property
    def extra(self) -> int:
        """Routes that an expert's last tile may have beyond that."""
        return self.form.extra

    def grid(self, device: torch.device, items: int) -> int:
        """Persistent CTAs."""
        return min(multiprocessors(device) * self.form.ctas, items)

    def options(self, k: int) -> dict[str, Any]:
        """Keywords of `prefill.grouped_prefill`'s launch for rows of k columns."""
        main, extra, stages, ctas = self.form
        stages = min(stages, -(-k // 128))  # the kernel's double buffers rely on it
        threads = 32 * 12
        registers = {} if ctas == 1 else {"maxnreg": 65536 // (ctas * threads) // 8 * 8}
        return {
            "MAIN": main, "EXTRA": max(8, extra), "SMALL": max(32, main // 4), "STAGES": stages,
            "TEAMS": 2, "PRECISE": self.precise, "TEAM_REGISTERS": self.registers[0],
            "GATHER_REGISTERS": self.registers[1], "PDL": True, "num_warps": 4,
            "launch_pdl": True, **registers,
        }  # fmt: skip


def form_of(mean: float) -> Form:
    """The narrowest form that an expert's mean share of the routes fills."""
    if mean <= PAIRED_TO:
        return Form(64, 0, 5, 2)
    if mean <= SINGLE_TO:
        return Form(64, 32, 8, 1)
    if mean <= HALF_TO:
        return Form(128, 32, 6, 1)
    return Form(128, 64, 6, 1) if mean <= JOINED_TO else Form(256, 32, 4, 1)
