"""How the prefill GEMMs are cut: which tile of routes, and how precisely its products are added."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from mixmoe.backends.hopper.decode import multiprocessors
from mixmoe.spec import Problem

# Mean shares of an expert up to which a form is taken: docs/measured-prefill.md, "Tall tiles".
# Where weight rows do not fill those, H100, us: 64 routes two to an SM / alone: mean 48 207 / 218,
# mean 64 300 / 235. Wide tiles: 128 + 64 / 256 routes: mean 171 585 / 678. Beyond them 256 + 32.
FEW_TO, SINGLE_TO, HALF_TO, JOINED_TO = 52, 72, 144, 190
TALL_TO = {True: 96, False: 75}  # precise, fast: 64 + 32 routes, then 128 + 32
# Routes of the tiles that have a loop of their own beside main and main + extra: skewed routing
# leaves experts with any share (H200, 2026-11-28, DeepSeek-V3 TP8 T 8192, stage 1 under Zipf
# routing: 64 alone 588 us, 64 to 192 544; uniform routing the same).
NARROW = {64: (32,), 128: (32, 64), 256: (64, 128, 192)}
FILLED = 0.9  # of the weight rows of tall tiles
# Mean share up to which adding in float32 is the rule: it costs a layer 2 % there, then 8, medians
# of six layers and both routings (H200, 2026-11-28: docs/measured.md, "What precise costs").
PRECISE_TO = 75


class Form(NamedTuple):
    """A tile of up to main + extra routes x `rows` weight rows, ring stages, CTAs an SM."""

    main: int
    extra: int
    stages: int
    ctas: int
    rows: int = 128


def is_precise(accumulate: str, problem: Problem) -> bool:
    """Whether `Recipe.accumulate` asks for sums in float32. Routes that an expert map leaves to
    other ranks count as well: how many there are is known on the device alone."""
    few = problem.routes <= PRECISE_TO * problem.experts
    return accumulate == "precise" or (accumulate == "auto" and few)


@dataclass(frozen=True, slots=True)
class Cut:
    """A form, and how sums are added.

    registers: a thread's, of the second team and of the gathering warps; the first team has the
    rest of the CTA's. precise: products of `added` columns of K are added in float32.
    """

    form: Form
    registers: tuple[int, int]
    precise: bool

    @classmethod
    def of(cls, problem: Problem, precise: bool) -> "Cut":
        """For an expert's mean share of the routes."""
        form = form_of(problem, precise)
        registers = (224, 56) if precise else (208, 88)
        if form.ctas == 2:
            registers = 96, 48
        elif form.main * form.rows > 128 * 128 and form.rows > 128:
            registers = 232, 40  # with 224 Triton 3.9 serialises wgmma (C7511)
        return cls(form, registers, precise)

    def added(self, k: int) -> int:
        """Columns of K after which products are added in float32, 0: never. 256 where the ring is
        long enough to give two stages back at once (H200, 2026-11-28: DeepSeek-V3 TP8 T 4096, stage
        1, 274 -> 264 us; Kimi-K2 T 8192 519 -> 507; but with 256 + 32 routes 456 -> 465)."""
        if not self.precise:
            return 0
        return 256 if self.form.main == 128 and self.form.rows == 128 and k > 384 else 128

    @property
    def main(self) -> int:
        """Routes of a tile."""
        return self.form.main

    @property
    def extra(self) -> int:
        """Routes that an expert's last tile may have beyond that."""
        return self.form.extra

    @property
    def sizes(self) -> tuple[int, ...]:
        """Routes of the tiles that the kernel tells apart, ascending."""
        whole = (self.main, self.main + self.extra) if self.extra else (self.main,)
        return NARROW[self.main] + whole

    @property
    def box(self) -> int:
        """16-row units of a tile's weights, of both teams."""
        return self.form.rows // 16

    def grid(self, device: torch.device, items: int) -> int:
        """Persistent CTAs."""
        return min(multiprocessors(device) * self.form.ctas, items)

    def options(self, k: int) -> dict[str, Any]:
        """Keywords of `prefill.grouped_prefill`'s launch for rows of k columns."""
        main, extra, stages, ctas, _ = self.form
        stages = min(stages, -(-k // 128))  # the kernel's double buffers rely on it
        threads = 32 * 12
        registers = {} if ctas == 1 else {"maxnreg": 65536 // (ctas * threads) // 8 * 8}
        return {
            "MAIN": main, "EXTRA": max(8, extra), "SIZES": self.sizes, "STAGES": stages,
            "ADDED": self.added(k), "TEAM_REGISTERS": self.registers[0],
            "GATHER_REGISTERS": self.registers[1], "PDL": True, "num_warps": 4,
            "launch_pdl": True, **registers,
        }  # fmt: skip


def form_of(problem: Problem, precise: bool) -> Form:
    """The form that an expert's mean share of the routes fills."""
    mean, rows = problem.routes / problem.experts, 2 * problem.intermediate
    if rows >= FILLED * 256 * -(-rows // 256):
        if mean <= FEW_TO:
            return Form(64, 0, 8, 1, 256)
        if mean <= TALL_TO[precise]:
            return Form(64, 32, 7, 1, 256)
        if mean <= HALF_TO and not precise:
            return Form(128, 32, 5, 1, 256)
    if mean <= FEW_TO:
        return Form(64, 0, 5, 2)
    if mean <= SINGLE_TO:
        return Form(64, 32, 8, 1)
    if mean <= HALF_TO:
        return Form(128, 32, 6, 1)
    return Form(128, 64, 6, 1) if mean <= JOINED_TO else Form(256, 32, 4, 1)
