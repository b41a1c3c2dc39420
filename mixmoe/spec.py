"""What a layer is: Problem (sizes), Recipe (numbers), Tile (how), Weights, Routed.

A record refuses what it cannot be; how records and tensors may meet stands in ``checks``.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from mixmoe.activations import Activation, parse_activation, silu
from mixmoe.errors import MixMoEError, nearest_multiple
from mixmoe.formats import Format, Quantised, Rounding, format_named
from mixmoe.preshuffle import Packed

SCALE_BLOCK = 32  # H and I are multiples of the smallest scale block
MAX_TOKENS = (1 << 24) - 1  # a route is token | slot << 24, and T itself is the padding sentinel
MAX_TOPK = 64
OUT_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "f32": torch.float32}
WIDE_FLOATS = (torch.bfloat16, torch.float16, torch.float32)

# Activation format -> weight families it may meet.
PAIRS: dict[str, tuple[str, ...]] = {
    "bf16": ("mxfp4", "int4_group", "bf16"),
    "fp16": ("mxfp4", "int4_group", "fp16"),
    "fp8_token": ("mxfp4", "mxfp8", "fp8_channel", "int4_group"),
    "fp8_token_fnuz": ("mxfp4", "mxfp8", "fp8_channel_fnuz", "int4_group"),
    "fp8_1x128": ("fp8_block",),
    "mxfp8": ("mxfp4", "mxfp8"),
    "mxfp4": ("mxfp4",),
    "int8_token": ("int8_channel", "int4_group"),
    "int8_smooth": ("int8_channel", "int4_group"),
}

# The names of the matrix's cells: activation format, weight format.
CELLS: dict[str, tuple[str, str]] = {
    "a16w16": ("bf16", "bf16"),
    "a16w4": ("bf16", "mxfp4"),
    "a16i4": ("bf16", "int4_group32"),
    "a8w4": ("fp8_token", "mxfp4"),
    "a8w8": ("fp8_token", "fp8_channel"),
    "a8w8_mxw": ("fp8_token", "mxfp8"),
    "a8i4": ("fp8_token", "int4_group32"),
    "a8w8_block": ("fp8_1x128", "fp8_block"),
    "a8w4_mx": ("mxfp8", "mxfp4"),
    "a8w8_mx": ("mxfp8", "mxfp8"),
    "a4w4": ("mxfp4", "mxfp4"),
    "w8a8": ("int8_token", "int8_channel"),
    "w4a8": ("int8_token", "int4_group32"),
    "w8a8_smooth": ("int8_smooth", "int8_channel"),
    "w4a8_smooth": ("int8_smooth", "int4_group32"),
}


@dataclass(frozen=True, slots=True)
class Problem:
    """Sizes of one call: tokens T, hidden H, intermediate I, experts E, topk."""

    tokens: int
    hidden: int
    intermediate: int
    experts: int
    topk: int

    def __post_init__(self) -> None:
        if not 0 <= self.tokens <= MAX_TOKENS:
            raise MixMoEError(f"T must be in 0..{MAX_TOKENS}", self.tokens, MAX_TOKENS)
        if not 1 <= self.topk <= MAX_TOPK:
            raise MixMoEError(
                f"topk must be in 1..{MAX_TOPK}", self.topk, min(max(self.topk, 1), MAX_TOPK)
            )
        if self.experts < 1:
            raise MixMoEError("E must be at least 1", self.experts, 1)
        for name, size in (("H", self.hidden), ("I", self.intermediate)):
            if size < SCALE_BLOCK or size % SCALE_BLOCK:
                raise MixMoEError(
                    f"{name} must be a positive multiple of {SCALE_BLOCK}",
                    size,
                    nearest_multiple(size, SCALE_BLOCK),
                )

    @property
    def routes(self) -> int:
        """Token-slot pairs; route ``r = token * topk + slot``."""
        return self.tokens * self.topk

    def padded_routes(self, block: int) -> int:
        """Room for every route sorted into blocks of one expert, whatever the routing."""
        return (self.routes + min(self.routes, self.experts) * (block - 1)) // block * block


@dataclass(frozen=True, slots=True)
class Tile:
    """How a GEMM is cut: ``tokens x rows x k`` a step, ring stages, warps, K split, CTAs an SM;
    registers of a thread at the launch, None: those of a CTA's part of an SM."""

    tokens: int
    rows: int
    k: int = 128
    stages: int = 4
    warps: int = 4
    split_k: int = 1
    ctas_per_sm: int = 1
    registers: int | None = None


@dataclass(frozen=True, slots=True)
class Recipe:
    """Number formats and activation of a layer.

    ``activation`` is the format x is quantised to, and h after stage 1; ``weight`` that of w13 and
    w2 (a family: another block or group size may be on the weights). ``weight_on`` is the stage
    that multiplies by the routing weight: 2 (the usual ``sum_k w_k out_k``) or 1 (on h, before it
    is quantised). ``accumulate``: "precise" meets the format's tolerance on any data; "fast" may
    keep the hardware's shorter accumulators where a backend says by how much it then errs; "auto"
    leaves it to the backend: on hopper it is "fast" in prefill of mxfp4 weights beyond 75 routes an
    expert, where "precise" costs a layer more than 3 %, and "precise" everywhere else.
    """

    activation: Format
    weight: Format
    act: Activation = silu()
    out_dtype: torch.dtype = torch.bfloat16
    rounding: Rounding = Rounding.CEIL
    weight_on: int = 2
    accumulate: str = "auto"
    # One word that holds every field; ``Recipe.named(key)`` reads it back. A field, not a property:
    # a compiler that traces a call then sees a constant.
    key: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        set_field(self, "activation", format_named(self.activation))
        set_field(self, "weight", format_named(self.weight))
        set_field(self, "rounding", Rounding.named(self.rounding))
        if isinstance(self.act, str):
            set_field(self, "act", parse_activation(self.act))
        if not isinstance(self.act, Activation):
            raise MixMoEError("act is an Activation or its key", self.act, "mixmoe.silu()")
        legal = PAIRS.get(self.activation.name)
        if legal is None:
            raise MixMoEError(
                "not a format for activations", self.activation.name, ", ".join(PAIRS)
            )
        if self.weight.family not in legal:
            raise MixMoEError(
                f"{self.activation} activations do not meet {self.weight} weights",
                f"{self.activation} x {self.weight}",
                " or ".join(legal),
            )
        if self.out_dtype not in OUT_DTYPES.values():
            raise MixMoEError("out_dtype is bf16, fp16 or f32", self.out_dtype, "torch.bfloat16")
        if self.weight_on not in (1, 2):
            raise MixMoEError("weight_on is the stage 1 or 2", self.weight_on, 2)
        set_field(self, "weight_on", int(self.weight_on))
        if self.accumulate not in ("auto", "precise", "fast"):
            raise MixMoEError("accumulate is 'auto', 'precise' or 'fast'", self.accumulate, "auto")
        out = next(n for n, d in OUT_DTYPES.items() if d == self.out_dtype)
        formats = (self.activation.name, self.weight.name)
        words = (*formats, self.act.key, out, self.rounding.value, str(self.weight_on))
        set_field(self, "key", ":".join([*words, self.accumulate]))

    @classmethod
    def named(
        cls, name: "str | Recipe", act: "Activation | str | None" = None, **changes: object
    ) -> "Recipe":
        """A cell of the matrix by name (:data:`CELLS`), or what :attr:`key` wrote; an instance
        passes through."""
        if isinstance(name, cls):
            recipe = name
        elif not isinstance(name, str):
            raise MixMoEError("a recipe is a Recipe or its name", name, ", ".join(CELLS))
        elif ":" in name:
            recipe = cls._parse(name)
        elif name in CELLS:
            activation, weight = CELLS[name]
            recipe = cls(format_named(activation), format_named(weight))
        else:
            raise MixMoEError("unknown recipe", name, ", ".join(CELLS))
        if act is not None:
            changes["act"] = act
        return replace(recipe, **changes) if changes else recipe  # type: ignore[arg-type]

    @property
    def name(self) -> str:
        """The cell's name where it has one, else ``activation x weight``."""
        pair = (self.activation.name, self.weight.name)
        return next((n for n, c in CELLS.items() if c == pair), " x ".join(pair))

    @property
    def unsmoothed(self) -> "Recipe":
        """The recipe of int8 activations whose weights need no smooth factors."""
        return replace(self, activation=format_named("int8_token"))

    @classmethod
    def _parse(cls, key: str) -> "Recipe":
        try:
            activation, weight, act, out, rounding, weight_on, accumulate = key.split(":")
            dtype, stage = OUT_DTYPES[out], int(weight_on)
        except (ValueError, KeyError):
            raise MixMoEError("not a recipe's key", key, Recipe.named("a8w4").key) from None
        return cls(
            format_named(activation),
            format_named(weight),
            parse_activation(act),
            dtype,
            Rounding.named(rounding),
            stage,
            accumulate,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """Quantised experts of one layer.

    ``w13: (E, 2I, H)``, gate rows above up rows; ``w2: (E, H, I)``; biases float32 ``(E, 2I)``
    (gate then up) and ``(E, H)``; smooth factors float32 ``(E, H)`` and ``(E, I)``: what the input
    of that GEMM is multiplied by before an ``int8_smooth`` recipe quantises it. ``w13`` and ``w2``
    are Quantised (plain rows) or Packed in a backend's order.
    """

    w13: Quantised | Packed
    w2: Quantised | Packed
    w13_bias: Tensor | None = None
    w2_bias: Tensor | None = None
    w13_smooth: Tensor | None = None
    w2_smooth: Tensor | None = None
    # Format, order and shape of w13 and of w2: what is not a tensor, as one word (see Recipe.key).
    key: str = field(init=False, repr=False)

    TENSORS: ClassVar[tuple[str, ...]] = ("w13_bias", "w2_bias", "w13_smooth", "w2_smooth")

    def __post_init__(self) -> None:
        orders = []
        for name, stored in (("w13", self.w13), ("w2", self.w2)):
            if not isinstance(stored, (Quantised, Packed)):
                raise MixMoEError(
                    f"{name} is Quantised or Packed (Weights.from_dense quantises floats)",
                    type(stored).__name__,
                )
            orders.append(stored.order.name if isinstance(stored, Packed) else "")
        e, n, h = sizes = _fitting(self.w13.shape, self.w2.shape)
        if self.w13.format.family != self.w2.format.family:
            raise MixMoEError(
                "w13 and w2 share one format family",
                f"{self.w13.format} and {self.w2.format}",
                self.w13.format,
            )
        for name, stored in (("w13", self.w13), ("w2", self.w2)):
            if isinstance(stored, Quantised):
                stored.check(name)
        for name, shape in _extra_shapes(*sizes).items():
            _check_extra(name, getattr(self, name), shape)
        first = f"{self.w13.format}|{orders[0]}|{e}|{n}|{h}"
        second = f"{self.w2.format}|{orders[1]}|{e}|{h}|{n // 2}"
        object.__setattr__(self, "key", f"{first}|{second}")

    def __repr__(self) -> str:
        held = [name for name in self.TENSORS if getattr(self, name) is not None]
        words = [f"{self.format}", f"E={self.E}", f"H={self.H}", f"I={self.I}"]
        words += ["orders " + " and ".join(self.orders), *held]
        return f"Weights({', '.join(words)}, {self.nbytes} bytes on {self.device})"

    @property
    def E(self) -> int:
        """Experts."""
        return self.w13.shape[0]

    @property
    def H(self) -> int:
        """Hidden size."""
        return self.w13.shape[2]

    @property
    def I(self) -> int:  # noqa: E743
        """Intermediate size."""
        return self.w13.shape[1] // 2

    @property
    def format(self) -> Format:
        """Format of w13; w2 is of the same family."""
        return self.w13.format

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.w13.codes.device

    @property
    def orders(self) -> tuple[str, str]:
        """Names of the memory orders of w13 and w2; plain rows are ``rows``."""
        stored = (self.w13, self.w2)
        return tuple(s.order.name if isinstance(s, Packed) else "rows" for s in stored)  # type: ignore[return-value]

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is kept for the experts."""
        extra = (getattr(self, name) for name in self.TENSORS)
        return self.w13.nbytes + self.w2.nbytes + sum(t.nbytes for t in extra if t is not None)

    @classmethod
    def from_dense(
        cls,
        w13: Tensor,
        w2: Tensor,
        format: Format | str = "mxfp4",
        w13_bias: Tensor | None = None,
        w2_bias: Tensor | None = None,
        gate_up: str = "concatenated",
        rounding: Rounding | str = Rounding.CEIL,
        w13_smooth: Tensor | None = None,
        w2_smooth: Tensor | None = None,
    ) -> "Weights":
        """Quantise floats: ``w13 (E, 2I, H)``, ``w2 (E, H, I)``, biases ``(E, 2I)``, ``(E, H)``.

        ``gate_up="interleaved"`` takes w13 (and its bias) with rows gate, up, gate, up, ... as
        gpt-oss stores them. Smooth factors divide the weights' columns here, as they multiply the
        GEMM's input there: ``(x * s) (w / s)^T = x w^T``. Raises MixMoEError naming the operand.
        """
        fmt = format_named(format)
        if gate_up not in ("concatenated", "interleaved"):
            raise MixMoEError(
                "gate_up is 'concatenated' or 'interleaved'", gate_up, "concatenated"
            )
        sizes = _fitting(tuple(w13.shape), tuple(w2.shape))
        given = dict(zip(cls.TENSORS, (w13_bias, w2_bias, w13_smooth, w2_smooth), strict=True))
        extra = {name: None if t is None else t.to(torch.float32) for name, t in given.items()}
        for name, shape in _extra_shapes(*sizes).items():
            _check_extra(name, extra[name], shape)
        interleaved = gate_up == "interleaved"
        bias = extra["w13_bias"]
        if interleaved and bias is not None:
            extra["w13_bias"] = torch.cat([bias[:, 0::2], bias[:, 1::2]], dim=1)
        q13 = _quantise_experts("w13", w13, fmt, rounding, interleaved, extra["w13_smooth"])
        q2 = _quantise_experts("w2", w2, fmt, rounding, False, extra["w2_smooth"])
        return cls(q13, q2, **extra)

    def to(self, device: torch.device | str) -> "Weights":
        """The same weights on another device."""
        extra = {n: getattr(self, n) for n in self.TENSORS}
        moved = {n: None if t is None else t.to(device) for n, t in extra.items()}
        return Weights(self.w13.to(device), self.w2.to(device), **moved)

    def dense(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """w13 and w2 as floats (for tests and small models: it holds every expert at once)."""
        return self.rows("w13").dequantise(dtype), self.rows("w2").dequantise(dtype)

    def rows(self, stage: str) -> Quantised:
        """``w13`` or ``w2`` in plain rows; unpacks (a copy) when it is Packed."""
        stored = getattr(self, stage)
        return stored.order.unpack(stored) if isinstance(stored, Packed) else stored

    def packed(self, order13: object, order2: object) -> "Weights":
        """The same weights with w13 and w2 in these orders (``Order`` records of preshuffle)."""
        w13 = order13.pack(self.rows("w13"))  # type: ignore[attr-defined]
        return replace(self, w13=w13, w2=order2.pack(self.rows("w2")))  # type: ignore[attr-defined]


def _fitting(w13: tuple[int, ...], w2: tuple[int, ...]) -> tuple[int, int, int]:
    """E, 2I and H of matrices of these shapes; refuses shapes that do not fit each other."""
    if len(w13) != 3 or len(w2) != 3 or w13[1] % 2:
        raise MixMoEError("w13 is (E, 2I, H) and w2 (E, H, I)", (w13, w2))
    e, n, h = w13
    if w2 != (e, h, n // 2):
        raise MixMoEError(
            f"w2 must be (E, H, I) of w13's (E, 2I, H) = {(e, n, h)}", w2, (e, h, n // 2)
        )
    Problem(0, h, n // 2, e, 1)  # H and I obey the block rule
    return e, n, h


def _extra_shapes(e: int, n: int, h: int) -> dict[str, tuple[int, int]]:
    """Shapes of what may stand beside w13 ``(e, n, h)``."""
    return {
        "w13_bias": (e, n), "w2_bias": (e, h), "w13_smooth": (e, h), "w2_smooth": (e, n // 2),
    }  # fmt: skip


def _check_extra(name: str, tensor: Tensor | None, shape: tuple[int, int]) -> None:
    if tensor is not None and (tuple(tensor.shape) != shape or tensor.dtype != torch.float32):
        raise MixMoEError(
            f"{name} must be float32 of shape {shape}", f"{tensor.dtype} of {tuple(tensor.shape)}"
        )


def _quantise_experts(
    name: str, w: Tensor, fmt: Format, rounding: Rounding | str, interleaved: bool,
    smooth: Tensor | None,
) -> Quantised:  # fmt: skip
    """Quantise expert by expert, so that only one expert's float copy is alive."""
    if not interleaved and smooth is None:
        return fmt.quantise(w, rounding, name)
    if smooth is not None and (bad := ~smooth.isfinite() | (smooth == 0)).any():
        at = tuple(int(i) for i in bad.nonzero()[0])
        raise MixMoEError(f"{name}_smooth is finite and not 0", f"{float(smooth[at])} at {at}")
    how = " with gate rows above up rows" if interleaved else ""
    how += "" if smooth is None else f" by {name}_smooth"
    first, codes, scales = True, w, None
    for e in range(w.shape[0]):
        rows = torch.cat([w[e, 0::2], w[e, 1::2]]) if interleaved else w[e]
        if smooth is not None:
            rows = rows.to(torch.float32) / smooth[e]
        q = fmt.quantise(rows, rounding, f"{name}[{e}]{how}")
        if first:
            codes = q.codes.new_empty((w.shape[0], *q.codes.shape))
            if q.scales is not None:
                scales = q.scales.new_empty((w.shape[0], *q.scales.shape))
            first = False
        codes[e] = q.codes
        if scales is not None and q.scales is not None:
            scales[e] = q.scales
    return Quantised(codes, scales, fmt)


@dataclass(frozen=True, slots=True, eq=False)
class Routed:
    """Routes sorted into blocks of one expert each.

    ``sorted_token_ids`` int32 ``(P,)``: ``token | slot << 24``, stable by route inside an expert,
    each expert padded to ``block`` with the sentinel ``T | topk << 24``; ``sorted_weights`` float32
    ``(P,)``; ``sorted_expert_ids`` int32 ``(P / block,)``, -1 unused; ``num_valid_ids`` int32
    ``(2,)``: padded count, tokens; ``expert_offsets`` int32 ``(E + 1,)``: padded start of each
    expert; ``expert_counts`` int32 ``(E,)``. P depends on sizes alone, so a graph can capture it.
    Source of the packing: AMD aiter's moe_sorting.
    """

    sorted_token_ids: Tensor
    sorted_weights: Tensor
    sorted_expert_ids: Tensor
    num_valid_ids: Tensor
    expert_offsets: Tensor
    expert_counts: Tensor
    block: int
    problem: Problem
