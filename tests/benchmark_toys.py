"""Small stand-ins that the tests of the benchmark share."""

import torch

from benchmarks.registry import Entry
from benchmarks.results import Row
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


def row(provider="mixmoe", us=20.0, tokens=8, stage="stage1", **changes):
    fields = {
        "provider": provider,
        "shape": "dsv3_tp8",
        "recipe": "a8w4",
        "tokens": tokens,
        "stage": stage,
        "flush": "clean",
        "deterministic": True,
        "us": us,
        "spread": 0.4,
        "roof_us": 10.0,
        "worst_row_error": 2e-3,
        "routing": "uniform",
        "accumulate": "auto",
        "active_experts": 57,
        "nbytes": 44_800_000,
        "flops": 10**9,
        "roof_by": "read",
        "compared": "x",
        "leaves_out": "",
    }
    return Row(**fields | changes)
