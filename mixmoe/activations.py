"""Gated activation functions of stage 1: ``h = act(gate, up)``, scalars known only at run time."""

import math
from dataclasses import dataclass, field
from enum import Enum
from numbers import Real

import torch
from torch import Tensor

from mixmoe.errors import MixMoEError


class ActivationKind(Enum):
    """Which formula; the value is the name users type."""

    SILU = "silu"
    SWIGLU = "swiglu"
    GELU_TANH = "gelu"
    SITUV2 = "situv2"


SCALARS = ("limit", "alpha", "beta", "beta2")  # fields of Activation, in the order of its key


@dataclass(frozen=True, slots=True)
class Activation:
    """A gated activation, ``(gate, up) -> h``, elementwise.

    ========  ==========================================================================
    silu      ``g * sigmoid(g) * u``
    swiglu    ``g * sigmoid(alpha * g) * (u + 1)`` (gpt-oss)
    gelu      ``0.5 g (1 + tanh(sqrt(2/pi) (g + 0.044715 g^3))) * u``
    situv2    ``beta tanh(g/beta) sigmoid(g) * beta2 tanh(u/beta2)``
    ========  ==========================================================================

    ``limit`` (all kinds) first clamps ``g <= limit`` and ``-limit <= u <= limit``; None: no clamp.
    ``alpha`` is read by swiglu, ``beta`` and ``beta2`` by situv2.
    Source: gpt-oss reference model (swiglu, limit 7, alpha 1.702); DeepSeek-V4 (clamped silu).
    """

    kind: ActivationKind
    limit: float | None = None
    alpha: float = 1.702
    beta: float = 4.0
    beta2: float = 25.0
    # One word that names kind and scalars; :func:`parse_activation` reads it back.
    key: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        words = [self.kind.value]
        for name in SCALARS:
            value = getattr(self, name)
            if not (isinstance(value, Real) or (value is None and name == "limit")):
                raise MixMoEError(f"an activation's {name} is a number", repr(value))
            object.__setattr__(self, name, None if value is None else float(value))
            words.append("none" if value is None else repr(float(value)))
        object.__setattr__(self, "key", "/".join(words))
        if self.limit is not None and not self.limit > 0:
            raise MixMoEError("an activation's limit must be positive or None", self.limit, None)
        if not math.isfinite(self.alpha):
            raise MixMoEError("an activation's alpha is finite", self.alpha, 1.702)
        if not (0 < self.beta < math.inf and 0 < self.beta2 < math.inf):
            raise MixMoEError("situv2 needs positive beta and beta2", (self.beta, self.beta2))

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """Apply to two tensors of one shape, in their own dtype."""
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return FORMULAS[self.kind](self, gate, up)


def _silu(act: Activation, g: Tensor, u: Tensor) -> Tensor:
    return g * torch.sigmoid(g) * u


def _swiglu(act: Activation, g: Tensor, u: Tensor) -> Tensor:
    return g * torch.sigmoid(act.alpha * g) * (u + 1)


def _gelu_tanh(act: Activation, g: Tensor, u: Tensor) -> Tensor:
    return torch.nn.functional.gelu(g, approximate="tanh") * u


def _situv2(act: Activation, g: Tensor, u: Tensor) -> Tensor:
    gated = act.beta * torch.tanh(g / act.beta) * torch.sigmoid(g)
    return gated * act.beta2 * torch.tanh(u / act.beta2)


FORMULAS = {
    ActivationKind.SILU: _silu,
    ActivationKind.SWIGLU: _swiglu,
    ActivationKind.GELU_TANH: _gelu_tanh,
    ActivationKind.SITUV2: _situv2,
}


def silu(limit: float | None = None) -> Activation:
    """``g * sigmoid(g) * u``, with ``limit`` the clamped form."""
    return Activation(ActivationKind.SILU, limit=limit)


def swiglu(limit: float | None = 7.0, alpha: float = 1.702) -> Activation:
    """The gpt-oss form ``g * sigmoid(alpha g) * (u + 1)`` after clamping by ``limit``."""
    return Activation(ActivationKind.SWIGLU, limit=limit, alpha=alpha)


def gelu() -> Activation:
    """``gelu_tanh(g) * u``."""
    return Activation(ActivationKind.GELU_TANH)


def situv2(beta: float = 4.0, beta2: float = 25.0) -> Activation:
    """``beta tanh(g/beta) sigmoid(g) * beta2 tanh(u/beta2)``."""
    return Activation(ActivationKind.SITUV2, beta=beta, beta2=beta2)


def parse_activation(key: str) -> Activation:
    """Read what :attr:`Activation.key` wrote; a bare kind gives that kind's defaults."""
    kind, *scalars = key.split("/")
    makers = {"silu": silu, "swiglu": swiglu, "gelu": gelu, "situv2": situv2}
    if kind not in makers:
        raise MixMoEError("unknown activation function", kind, ", ".join(makers))
    if not scalars:
        return makers[kind]()
    try:
        limit, alpha, beta, beta2 = scalars
        numbers = [float(s) for s in (alpha, beta, beta2)]
        clamp = None if limit == "none" else float(limit)
    except ValueError:
        raise MixMoEError("not an activation's key", key, makers[kind]().key) from None
    return Activation(ActivationKind(kind), clamp, *numbers)
