"""Vector registers of waves that left a batch.

A divergent branch touches few registers before its waves meet again, so a part takes a row from its
parent when it first needs it, and rows that no part changed are the parent's again after the merge.
The parent must not run on: its rows are the parts' source.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import is_
from typing import TYPE_CHECKING, Any

import numpy as np

from .numerics import Array

if TYPE_CHECKING:
    from .batch import Row


class Rows(list[Any]):
    """Row k is None until it is read or written; then it is the waves `keep` of `base[k]`.

    `stale`: the object that stands for "nothing wrote this register" in base, `fresh`: here.
    """

    def __init__(self, base: list[Row], keep: Array, stale: Row, fresh: Row):
        super().__init__([None] * len(base))
        self.base, self.keep, self.stale, self.fresh = base, keep, stale, fresh
        self.taken: dict[int, Row] = {}
        self.depth: int = getattr(base, 'depth', 0) + 1
        first, last = int(keep[0]), int(keep[-1])
        whole = last - first + 1 == len(keep) and (np.diff(keep) == 1).all()
        self.pick: Any = slice(first, last + 1) if whole else keep

    def fetch(self, k: int) -> Row:
        row = self.base[k]
        row = self.fresh if row is self.stale else row[self.pick]
        self[k] = self.taken[k] = row
        return row

    def __getitem__(self, k: Any) -> Any:
        x = list.__getitem__(self, k)
        if x is None:
            return self.fetch(k)
        if type(k) is slice and any(row is None for row in x):
            return [self[j] for j in range(*k.indices(len(self)))]
        return x

    def __iter__(self) -> Iterator[Row]:
        return (self[k] for k in range(len(self)))

    def changed(self) -> list[int]:
        """Registers that were written since the split."""
        taken = self.taken
        return [
            k
            for k, row in enumerate(list.__iter__(self))
            if row is not None and row is not taken.get(k)
        ]

    def clone(self) -> Rows:
        out = Rows(self.base, self.keep, self.stale, self.fresh)
        out[:] = list.__iter__(self)
        out.taken = dict(self.taken)
        return out

    def relative_to(self, base: list[Row]) -> Rows:
        """The same registers as a part of an ancestor."""
        out = self
        while out.base is not base:
            parent = out.base
            assert isinstance(parent, Rows)
            flat = Rows(parent.base, parent.keep[out.keep], parent.stale, out.fresh)
            for k in {*out.changed(), *parent.changed()}:
                flat[k] = out[k]
            out = flat
        return out


def ancestors(v: list[Row]) -> list[list[Row]]:
    out = []
    while isinstance(v, Rows):
        v = v.base
        out.append(v)
    return out


def merge_rows(
    parts: list[list[Row]], fresh: list[Row], order: Array | None, new: Row
) -> tuple[list[Row], Row]:
    """Registers of batches that become one, its waves sorted by `order` (None: as they come).

    fresh: the stand-in for "never written" of each part; new: one for the merged batch.
    -> (registers, the stand-in they use)
    """
    chains = [ancestors(v) for v in parts]
    common = next(
        (base for base in chains[0] if all(any(base is x for x in c) for c in chains[1:])), None
    )
    if common is None:
        rows = [joined(list(row), fresh, order, new) for row in zip(*parts, strict=True)]
        return rows, new
    mine = [v.relative_to(common) for v in parts]  # type: ignore[attr-defined]
    keep = sorted_by(np.concatenate([v.keep for v in mine]), order)
    stale = mine[0].stale
    if len(keep) < len(stale):
        out: list[Row] = Rows(common, keep, stale, new)
    else:
        out, new = common.clone() if isinstance(common, Rows) else list(common), stale
    own = [v.fresh for v in mine]
    for k in {k for v in mine for k in v.changed()}:
        out[k] = joined([v[k] for v in mine], own, order, new)
    return out, new


def joined(rows: list[Row], fresh: list[Row], order: Array | None, new: Row) -> Row:
    if all(map(is_, rows, fresh)):
        return new
    return sorted_by(np.concatenate(rows), order)


def sorted_by(x: Array, order: Array | None) -> Array:
    return x if order is None else x[order]
