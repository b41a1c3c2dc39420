"""The layers and token counts that are measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shape:
    """One MoE layer: hidden H, intermediate I, E experts, topk routes a token, activation."""

    name: str
    hidden: int
    intermediate: int
    experts: int
    topk: int
    activation: str = "silu"

    def routes(self, tokens: int) -> int:
        """T * topk."""
        return tokens * self.topk


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("dsv3_tp8", 7168, 256, 256, 8),
        Shape("dsv3_ep", 7168, 2048, 32, 8),
        Shape("gptoss120b", 2880, 2880, 128, 4, activation="swiglu"),
        Shape("kimik2_tp8", 7168, 256, 384, 8),
        Shape("qwen3_tp4", 4096, 384, 128, 8),
        Shape("qwen3_tp8", 4096, 192, 128, 8),
    )
}

TABLE_TOKENS = (1, 8, 64, 512, 8192)  # the token counts that have a goal
TOKENS = tuple(2**i for i in range(15))  # 1 .. 16384
