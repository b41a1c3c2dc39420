"""Bytes and floating-point operations that a stage cannot do without."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from .shapes import Shape


class Stage(Enum):
    """What is timed. LAYER = route + quantise + gemm1 + gemm2 + combine."""

    STAGE1 = "stage1"
    STAGE2 = "stage2"
    LAYER = "layer"


@dataclass(frozen=True, slots=True)
class Numbers:
    """A recipe: the formats of activations and weights and the tensor-core rate that bounds it."""

    activation: str
    weight: str
    tensor: str  # "fp8" or "bf16"


RECIPES = {
    "a8w4": Numbers("fp8_token", "mxfp4", "fp8"),
    "a8w4_mx": Numbers("mxfp8", "mxfp4", "fp8"),
    "a8w4_tensor": Numbers("fp8_tensor", "mxfp4", "fp8"),
    "a4w4": Numbers("mxfp4", "mxfp4", "fp8"),
    "a16w4": Numbers("bf16", "mxfp4", "bf16"),
    "a8w8": Numbers("fp8_token", "fp8_channel", "fp8"),
    "a8w8_block": Numbers("fp8_1x128", "fp8_block", "fp8"),
    "a16w16": Numbers("bf16", "bf16", "bf16"),
}

# element bits, scale bits, rows and columns that share a scale (0 = the whole)
FORMAT_BITS = {
    "mxfp4": (4, 8, 1, 32),
    "mxfp8": (8, 8, 1, 32),
    "fp8_token": (8, 32, 1, 0),
    "fp8_tensor": (8, 32, 0, 0),
    "fp8_channel": (8, 32, 1, 0),
    "fp8_block": (8, 32, 128, 128),
    "fp8_1x128": (8, 32, 1, 128),
    "bf16": (16, 0, 1, 0),
}


def matrix_bytes(name: str, rows: int, columns: int) -> int:
    """Codes and scales of a (rows, columns) matrix."""
    element, scale, high, wide = FORMAT_BITS[name]
    blocks = -(-rows // (high or rows or 1)) * -(-columns // (wide or columns or 1))
    return (rows * columns * element + blocks * scale) // 8


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes that must cross the memory bus once, and multiply-adds x 2."""

    nbytes: int
    flops: int


def cost(
    shape: Shape, tokens: int, active: int, stage: Stage, recipe: str, reduces: bool = True
) -> Cost:
    """The floor of a stage for `active` experts, which really have routes.

    stage 1: active w13 + x + h. stage 2: active w2 + h + y, where y is (T, H) bf16, or one bf16
    row per route when the provider leaves the reduction out (`reduces` False). layer: both weights
    + x as bf16 + y; h and the rest may stay in the L2.
    """
    numbers = RECIPES[recipe]
    hidden, inter, routes = shape.hidden, shape.intermediate, shape.routes(tokens)
    w13 = active * matrix_bytes(numbers.weight, 2 * inter, hidden)
    w2 = active * matrix_bytes(numbers.weight, hidden, inter)
    rows_of_y = tokens if reduces else routes
    y = matrix_bytes("bf16", rows_of_y, hidden)
    x = matrix_bytes(numbers.activation, tokens, hidden)
    h = matrix_bytes(numbers.activation, routes, inter)
    up, down = 2 * routes * 2 * inter * hidden, 2 * routes * inter * hidden
    if stage is Stage.STAGE1:
        return Cost(w13 + x + h, up)
    if stage is Stage.STAGE2:
        return Cost(w2 + h + y, down)
    return Cost(w13 + w2 + matrix_bytes("bf16", tokens, hidden) + y, up + down)
