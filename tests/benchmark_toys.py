"""Small stand-ins that the tests of the benchmark share."""

import torch

from benchmarks.registry import Entry
from benchmarks.shapes import Shape

TINY = Shape("tiny", 256, 64, 8, 2)


def entry_of(stage, recipe="a16w16", **changes):
    fields = {
        "provider": "toy",
        "stage": stage,
        "recipe": recipe,
        "build": lambda case: None,
        "plugin": "toy",
        "needs": (),
        "leaves_out": "",
        "deterministic": True,
        "reduces": True,
        "accumulate": "",
    }
    return Entry(**fields | changes)


def plain_gate_up(case, w13):
    """(R, 2I) in float64, a plain loop over routes."""
    rows = []
    for route, expert in enumerate(case.routing.ids.flatten().tolist()):
        rows.append(w13[expert].double() @ case.x[route // TINY.topk].double())
    return torch.stack(rows)
