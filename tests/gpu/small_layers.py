"""Small layers through every schedule, to run under compute-sanitizer (test_sanitizer.py).

    compute-sanitizer --tool memcheck python tests/gpu/small_layers.py
    compute-sanitizer --tool memcheck python tests/gpu/small_layers.py --plant   # must be found

With PYTORCH_NO_CUDA_MEMORY_CACHING=1 every tensor is an allocation of its own, so that a read or
write past its end is seen.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import hopper_cases as cases  # noqa: E402

from mixmoe.backends.hopper import hopper, prefill_schedule  # noqa: E402

# Schedule -> sizes of a layer it serves; 3 experts of 2 routes a token, rows with tails.
LAYERS: dict[str, dict[str, Any]] = {
    "general": {"recipe": "a8w8", "tokens": 9},
    "one token": {"tokens": 1},
    "one token of long rows": {"tokens": 1, "inter": 416, "bias": True},
    "two tokens": {"tokens": 2, "skew": "masked", "bias": True},
    "decode": {"tokens": 7, "bias": True, "skew": "masked"},
    "decode of long rows": {"tokens": 7, "inter": 416},
    "prefill, sums": {"tokens": 40, "skew": "masked"},
    "prefill, long rows": {"tokens": 40, "inter": 416, "bias": True},
    "prefill, ring": {"tokens": 40, "ring": True, "bias": True},
    "prefill, atomics": {"tokens": 40, "deterministic": False},
}


@triton.jit
def store_past_the_end(ptr, n):
    tl.store(ptr + n + tl.program_id(0), 1.0)


def run(recipe: str = "a8w4", tokens: int = 1, inter: int = 160, bias: bool = False,
        skew: str = "uniform", ring: bool = False, deterministic: bool = True) -> None:  # fmt: skip
    """One layer on the device, its rows finite."""
    hidden = 288 if recipe == "a8w4" else 256
    case = cases.make_case(
        cases.RECIPES[recipe], tokens, hidden, inter if recipe == "a8w4" else 128, experts=3,
        topk=2, bias=bias, skew=skew,
    )  # fmt: skip
    backend = hopper()
    weights = backend.prepare(case.weights, case.recipe).to("cuda")
    out = torch.full((tokens, hidden), torch.nan, dtype=torch.bfloat16, device="cuda")
    prefill_schedule.RING_FROM = 1 if ring else 1 << 30
    backend.layer(
        case.x.cuda(), weights, case.ids.cuda(), case.topk_weights.cuda(), case.recipe, out=out,
        deterministic=deterministic,
    )
    assert out.isfinite().all()


def main() -> None:
    torch.set_num_threads(2)
    if "--plant" in sys.argv:
        row = torch.zeros(128, device="cuda")
        store_past_the_end[(1,)](row, 1 << 10)
        torch.cuda.synchronize()
        return
    for name, layer in LAYERS.items():
        run(**layer)
        print(name, flush=True)


if __name__ == "__main__":
    main()
