"""MoE layers of known models, as one GPU sees them: what is inspected, built and measured."""

from dataclasses import dataclass

from mixmoe.activations import Activation, silu, swiglu
from mixmoe.errors import MixMoEError


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

    @property
    def act(self) -> Activation:
        """The activation function, with its model's scalars."""
        return {"silu": silu, "swiglu": swiglu}[self.activation]()

    @property
    def biased(self) -> bool:
        """Whether the model's experts have biases: gpt-oss, whose activation is swiglu."""
        return self.activation == "swiglu"


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


def shape_named(name: str) -> Shape:
    """A shape by name. Raises MixMoEError for another name."""
    if name not in SHAPES:
        raise MixMoEError("unknown shape", name, ", ".join(SHAPES))
    return SHAPES[name]


def listed(text: str) -> list[str]:
    """The names of a comma-separated list."""
    return [name.strip() for name in text.split(",") if name.strip()]


def counts(text: str) -> list[int]:
    """The token counts of a comma-separated list. Raises MixMoEError for what is none, for a count
    below 1 and for an empty list: nothing would be launched."""
    try:
        found = [int(name) for name in listed(text)]
    except ValueError:
        found = []
    if not found:
        raise MixMoEError("token counts are numbers with commas between", text, "1,8,64")
    if min(found) < 1:
        raise MixMoEError("a layer launches kernels for T of 1 or more", min(found), 1)
    return found


def recipes_of(text: str) -> list[str]:
    """The names of a comma-separated list of recipes. Raises MixMoEError for an empty one."""
    names = listed(text)
    if not names:
        raise MixMoEError("recipes are names with commas between", repr(text), "a4w4,a8w8")
    return names
