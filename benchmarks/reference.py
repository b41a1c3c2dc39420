"""How exact a result is: its worst row against float64 on the same quantised operands."""

from __future__ import annotations

import torch
from torch import Tensor

from .case import Case, quantise_rows
from .counts import RECIPES, Numbers, Stage
from .operands import activate
from .registry import Entry, Run, Shows


def sample_routes(case: Case, count: int = 16) -> Tensor:
    """Routes of the fullest and the emptiest active expert, the first, the last, and a spread."""
    counts = case.routing.counts
    flat = case.routing.ids.flatten().long()
    emptiest = torch.where(counts > 0, counts, counts.max() + 1).argmin()
    picks = [torch.nonzero(flat == e).flatten()[-2:] for e in (counts.argmax(), emptiest)]
    spread = torch.linspace(0, flat.numel() - 1, count - 4, device=flat.device).long()
    return torch.cat([*picks, spread]).unique()


def sample_tokens(case: Case, count: int = 4) -> Tensor:
    """The first token, the last and some between."""
    return torch.linspace(0, case.tokens - 1, count, device=case.x.device).long().unique()


def gate_up(case: Case, numbers: Numbers, routes: Tensor) -> Tensor:
    """(n, 2I) float64."""
    x = case.x_in(numbers.activation).dense(routes // case.routing.topk, torch.float64)
    return _per_expert(case, numbers, routes, x, 0)


def down(case: Case, numbers: Numbers, routes: Tensor, h: Tensor) -> Tensor:
    """(n, H) float64 from h (n, I) float64."""
    return _per_expert(case, numbers, routes, h, 1)


def _per_expert(case: Case, numbers: Numbers, routes: Tensor, a: Tensor, which: int) -> Tensor:
    weights = case.model.weights(numbers.weight)[which]
    expert = case.routing.ids.flatten().long()[routes]
    out = torch.empty(len(routes), weights.codes.shape[1], dtype=torch.float64, device=a.device)
    for e in expert.unique().tolist():
        here = expert == e
        out[here] = a[here] @ weights.dense(e, torch.float64).T
    return out


def expected(case: Case, entry: Entry, run: Run, index: Tensor) -> Tensor:
    """The float64 rows that `run.rows(index)` should show, made once for all who show the same."""
    key = ("expected", entry.recipe, entry.stage, run.shows, run.activation, *index.tolist())
    rows: Tensor = case.memo.once(key, lambda: _expected(case, entry, run, index))
    return rows


def _expected(case: Case, entry: Entry, run: Run, index: Tensor) -> Tensor:
    numbers = RECIPES[entry.recipe]
    activation = run.activation or case.shape.activation
    if run.shows is Shows.GATE_UP:
        return gate_up(case, numbers, index)
    if run.shows in (Shows.HIDDEN, Shows.HIDDEN_REQUANTISED):
        hidden = activate(activation, gate_up(case, numbers, index))
        return requantised(hidden, numbers) if run.shows is Shows.HIDDEN_REQUANTISED else hidden
    if run.shows is Shows.ROUTE:
        return down(case, numbers, index, case.h_in(numbers.activation).dense(index, torch.float64))
    topk = case.routing.topk
    routes = (index[:, None] * topk + torch.arange(topk, device=index.device)).flatten()
    if entry.stage is Stage.LAYER:
        h = requantised(activate(activation, gate_up(case, numbers, routes)), numbers)
    else:
        h = case.h_in(numbers.activation).dense(routes, torch.float64)
    rows = down(case, numbers, routes, h).unflatten(0, (-1, topk))
    return (rows * case.routing.weights[index].double().unsqueeze(-1)).sum(1)


def requantised(hidden: Tensor, numbers: Numbers) -> Tensor:
    """hidden rounded to the activation format, as every provider does between the stages."""
    return quantise_rows(hidden.float(), numbers.activation).dense(slice(None), torch.float64)


def sample(case: Case, run: Run) -> Tensor:
    """The routes, or tokens, whose rows are compared."""
    return sample_tokens(case) if run.shows is Shows.TOKEN else sample_routes(case)


def worst_row_error(case: Case, entry: Entry, run: Run, index: Tensor) -> float:
    """max over the rows in `index` of |got - want| / |want|; inf where a row is not finite."""
    got = run.rows(index).double()
    want = expected(case, entry, run, index)
    error = ((got - want).norm(dim=-1) / want.norm(dim=-1).clamp_min(1e-300)).max().item()
    return error if error == error else float("inf")
