"""The layers and token counts that are measured: those of ``mixmoe.shapes``."""

from __future__ import annotations

from mixmoe.shapes import SHAPES, TABLE_TOKENS, TOKENS, Shape

__all__ = ["SHAPES", "TABLE_TOKENS", "TOKENS", "Shape"]
