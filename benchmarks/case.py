"""One layer with its weights, and one case of it: tokens and a routing."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from .operands import (
    MX_BLOCK,
    Operand,
    quantise_fp8,
    quantise_mxfp4,
    quantise_mxfp8,
    random_mxfp4,
)
from .routing import Routing, Skew, route
from .shapes import Shape

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Memo:
    """Builds what is asked for once. Dropped with its owner, so that a shape's packed weights go
    go with the shape. Building goes on inside `watch()`."""

    made: dict[Hashable, Any] = field(default_factory=dict)
    watch: Callable[[], AbstractContextManager[None]] = nullcontext

    def once(self, key: Hashable, build: Callable[[], T]) -> T:
        if key not in self.made:
            with self.watch():
                self.made[key] = build()
        value: T = self.made[key]
        return value


@dataclass(slots=True, eq=False)
class Model:
    """The weights of a shape: w13 (E, 2I, H) gate above up and w2 (E, H, I), in mxfp4, and the
    same values in the formats that the rivals take."""

    shape: Shape
    device: str
    w13: Operand
    w2: Operand
    memo: Memo = field(default_factory=Memo)

    @staticmethod
    def random(shape: Shape, device: str, seed: int = 0) -> Model:
        h, i, e = shape.hidden, shape.intermediate, shape.experts
        w13 = random_mxfp4(e, 2 * i, h, 2 * seed + 1, device)
        w2 = random_mxfp4(e, h, i, 2 * seed + 2, device)
        return Model(shape, device, w13, w2)

    def weights(self, name: str) -> tuple[Operand, Operand]:
        """(w13, w2) in the format `name`: mxfp4, bf16 (exact), fp8_channel or fp8_block."""
        if name == "mxfp4":
            return self.w13, self.w2
        convert = WEIGHT_FORMATS[name]
        return self.memo.once(
            ("weights", name), lambda: (_by_expert(self.w13, convert), _by_expert(self.w2, convert))
        )


@dataclass(slots=True, eq=False)
class Case:
    """Inputs of one measurement: x (T, H) bf16, h (R, I) bf16 in route order, a routing."""

    model: Model
    tokens: int
    routing: Routing
    x: Tensor
    h: Tensor
    memo: Memo = field(default_factory=Memo)

    @staticmethod
    def random(model: Model, tokens: int, skew: Skew, seed: int = 0) -> Case:
        shape, device = model.shape, model.device
        routing = route(shape, tokens, skew, device, seed)
        generator = torch.Generator(device=device).manual_seed(seed + 7 * tokens)
        x = torch.randn(tokens, shape.hidden, generator=generator, device=device)
        h = torch.randn(
            shape.routes(tokens), shape.intermediate, generator=generator, device=device
        )
        return Case(model, tokens, routing, x.bfloat16(), h.bfloat16())

    @property
    def shape(self) -> Shape:
        return self.model.shape

    def x_in(self, name: str) -> Operand:
        """x in an activation format, quantised once for every provider that takes it."""
        return self.memo.once(("x", name), lambda: quantise_rows(self.x, name))

    def h_in(self, name: str) -> Operand:
        """h likewise."""
        return self.memo.once(("h", name), lambda: quantise_rows(self.h, name))


def quantise_rows(rows: Tensor, name: str) -> Operand:
    """Activations (R, K) in the format `name`; a per-tensor scale is repeated for every row."""
    if name == "bf16":
        return Operand(rows.bfloat16(), None, (1, rows.shape[-1]))
    if name == "fp8_tensor":
        whole = quantise_fp8(rows, (0, 0))
        assert whole.scales is not None
        return Operand(whole.codes, whole.scales.expand(rows.shape[0], 1), (1, rows.shape[-1]))
    if name == "mxfp4":
        return Operand(*quantise_mxfp4(rows), (1, MX_BLOCK))
    if name == "mxfp8":
        return quantise_mxfp8(rows)
    return quantise_fp8(rows, {"fp8_token": (1, 0), "fp8_1x128": (1, 128)}[name])


def _bf16(values: Tensor) -> Operand:
    return Operand(values.bfloat16(), None, (1, values.shape[-1]))


WEIGHT_FORMATS: dict[str, Callable[[Tensor], Operand]] = {
    "bf16": _bf16,
    "fp8_channel": lambda values: quantise_fp8(values, (1, 0)),
    "fp8_block": lambda values: quantise_fp8(values, (128, 128)),
}


def _by_expert(source: Operand, convert: Callable[[Tensor], Operand]) -> Operand:
    """Converts a few experts at a time: the float32 copy of a whole layer would not fit."""
    rows, columns = source.codes.shape[1], source.codes.shape[2] * 2
    step = max(1, (1 << 26) // (rows * columns))
    parts = [
        convert(source.dense(slice(first, first + step)))
        for first in range(0, source.codes.shape[0], step)
    ]
    codes = torch.cat([part.codes.view(torch.uint8) for part in parts]).view(parts[0].codes.dtype)
    scales = [part.scales for part in parts if part.scales is not None]
    return Operand(codes, torch.cat(scales) if scales else None, parts[0].block)
