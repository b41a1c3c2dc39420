"""Stage 2 of two layers at once, each in a stream of its own; to run as a process of its own,
because what hangs on a GPU ends only with its process (test_hopper_streams.py).

    python tests/gpu/two_streams.py 1300,1300 1300,200  # pairs of tokens: the ring, column groups
    python tests/gpu/two_streams.py 1300,200 --apart    # grids that may start in part: hangs

A kernel holds half of every SM's shared memory while both arrive, so that of the first grid a half
can start. Then the second one, whose stream goes before, takes what comes free, and nothing moves
any more. Last, grids of a CTA more than the device holds are to be refused.
"""

import os
import sys
import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import globaltimer

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import hopper_cases as cases  # noqa: E402

from mixmoe.backends.hopper import (  # noqa: E402
    gemm2_prefill,
    gemm2_red_sum,
    hopper,
    prefill_schedule,
)
from mixmoe.backends.hopper.decode import multiprocessors  # noqa: E402
from mixmoe.backends.hopper.gemm2_red_sum import Sums  # noqa: E402
from mixmoe.formats import Quantised  # noqa: E402
from mixmoe.spec import Problem, Routed, Weights  # noqa: E402

HUNG, WRONG, TAKEN = 7, 8, 9  # exit status
HELD, PATIENCE = 0.03, 2.0  # seconds
TURNS = 3
BACKEND = hopper()


@gluon.jit
def hold(out_ptr, ns):
    """Keeps 100 KB of an SM's shared memory for so long: one CTA of stage 2 fits beside it."""
    L: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    memory = gl.allocate_shared_memory(gl.int32, [25, 1024], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    n = gl.arange(0, 1024, layout=L)
    for i in range(25):
        memory.index(i).store(n + i)
    began = globaltimer()
    while globaltimer() - began < ns:
        pass
    total = n * 0
    for i in range(25):
        total += memory.index(i).load(L)
    gl.store(out_ptr + gl.program_id(0) * 1024 + n, total)


@dataclass(frozen=True)
class Layer:
    """h, routed, of a layer; the stream of its stage 2, and what this gives alone."""

    case: cases.Case
    weights: Weights
    routed: Routed
    h: Quantised
    stream: torch.cuda.Stream
    alone: torch.Tensor

    @classmethod
    @cache
    def of(cls, tokens: int, turn: int) -> "Layer":
        """The later its turn, the higher its priority."""
        recipe = cases.RECIPES["a8w4"]
        case = cases.make_case(recipe, tokens, 2048, 256, experts=8, topk=4, seed=turn)
        weights = BACKEND.prepare(case.weights, recipe).to("cuda")
        ids, topk = case.ids.cuda(), case.topk_weights.cuda()
        routed = BACKEND.route(ids, topk, case.problem, None, None)
        x = BACKEND.quantise(case.x.cuda(), weights, routed, recipe)
        h = BACKEND.gemm1(x, weights, routed, recipe)
        stream = torch.cuda.Stream(priority=-turn)
        layer = cls(case, weights, routed, h, stream, torch.empty(0))
        torch.cuda.synchronize()
        return replace(layer, alone=layer.run())

    def run(self) -> torch.Tensor:
        """y (T, H), not awaited."""
        shape = self.case.x.shape
        with torch.cuda.stream(self.stream):
            out = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
            return BACKEND.down(self.h, self.weights, self.routed, self.case.recipe, out)


def few_slots(problem: Problem, device: torch.device) -> Sums | None:
    """Fewer than the groups of columns, as in layers of many experts: else nobody waits for one."""
    made = Sums.of(problem, device)
    return made and replace(made, slots=3)


def one_more(cut: Any) -> Any:
    """The cut, with a CTA more than the device holds; None stays."""
    return cut and replace(cut, ctas=cut.ctas + 1)


def await_all(layers: list[Layer]) -> None:
    """Until all streams are empty; ends the process if they stay full."""
    limit = time.monotonic() + PATIENCE
    while not all(layer.stream.query() for layer in layers):
        if time.monotonic() > limit:
            print("hung; ended:", [layer.stream.query() for layer in layers], flush=True)
            os._exit(HUNG)


def beside(layers: list[Layer]) -> list[torch.Tensor]:
    """Their results, all under way at once."""
    kept = torch.empty(multiprocessors(torch.device("cuda")), 1024, dtype=torch.int32).cuda()
    torch.cuda.synchronize()
    hold[(len(kept),)](kept, int(HELD * 1e9))
    held, results = torch.cuda.Event(), []
    held.record()
    for layer in layers:
        time.sleep(HELD / 10)
        results.append(layer.run())
    time.sleep(HELD / 10)
    assert not held.query(), "all must have arrived before"
    await_all(layers)
    return results


def both_end(layers: list[Layer]) -> int:
    """Exit status of a pair at once, a few times."""
    for _ in range(TURNS):
        for layer, result in zip(layers, beside(layers), strict=True):
            if not torch.equal(result, layer.alone):
                return WRONG
    return 0


def refused(layer: Layer) -> bool:
    """Whether CUDA refuses a grid of a CTA too many, and serves the right one afterwards."""
    ring_of, sums_of = prefill_schedule.ring_of, prefill_schedule.sums_of
    prefill_schedule.ring_of = lambda *of: one_more(ring_of(*of))
    prefill_schedule.sums_of = lambda *of: one_more(sums_of(*of))
    try:
        layer.run()
        await_all([layer])
        return False
    except RuntimeError as error:
        assert "too many blocks in cooperative launch" in str(error), error
    finally:
        prefill_schedule.ring_of, prefill_schedule.sums_of = ring_of, sums_of
    again = layer.run()
    await_all([layer])
    return torch.equal(again, layer.alone)


def main(pairs: list[list[int]]) -> int:
    """Exit status of all pairs."""
    torch.set_num_threads(8)
    prefill_schedule.sums_of = few_slots
    for pair in pairs:
        layers = [Layer.of(tokens, turn) for turn, tokens in enumerate(pair)]
        torch.cuda.synchronize()
        if status := both_end(layers):
            return status
    return 0 if all(map(refused, layers)) else TAKEN


if __name__ == "__main__":
    if "--apart" in sys.argv:
        gemm2_prefill.TOGETHER = gemm2_red_sum.TOGETHER = {}
    words = [word for word in sys.argv[1:] if not word.startswith("--")]
    sys.exit(main([[int(tokens) for tokens in word.split(",")] for word in words]))
