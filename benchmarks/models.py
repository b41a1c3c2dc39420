"""The weights of a run, and the memory that they take."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from .case import Model
from .shapes import SHAPES
from .spent import Spent

ROOMY = 0.6  # of the memory; above this the allocator's cache is emptied between cases
KEPT = 0.4  # of the memory; above this the weights of earlier shapes go when a shape comes


@dataclass(slots=True)
class Models:
    """The shapes' weights in every form that was asked for. They depend on no token and are kept
    from case to case, and from shape to shape while there is room."""

    device: str
    spent: Spent
    kept: dict[str, Model] = field(default_factory=dict)

    def of(self, name: str) -> Model:
        if name not in self.kept:
            if taken() > KEPT:
                self.drop()
            with self._weighed():
                model = Model.random(SHAPES[name], self.device)
            model.memo.watch = self._weighed
            self.kept[name] = model
            tidy(force=True)  # drawing them takes more memory than they do
        return self.kept[name]

    def drop(self) -> None:
        self.kept.clear()
        tidy(force=True)

    @contextmanager
    def _weighed(self) -> Iterator[None]:
        with self.spent.on("weights"):
            yield
            if torch.cuda.is_available():
                torch.cuda.synchronize()


def tidy(force: bool = False) -> None:
    """Frees graphs in reference cycles, and the allocator's cache when it holds much."""
    gc.collect()
    if torch.cuda.is_available() and (force or taken(torch.cuda.memory_reserved) > ROOMY):
        torch.cuda.empty_cache()


def taken(how_much: Callable[[], int] = torch.cuda.memory_allocated) -> float:
    """The fraction of the device's memory that tensors take, or that the allocator holds."""
    if not torch.cuda.is_available():
        return 0.0
    return how_much() / torch.cuda.get_device_properties(0).total_memory
