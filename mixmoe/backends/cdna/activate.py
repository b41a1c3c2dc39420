"""``h = act(gate, up)`` on the device; the scalars come at run time, see mixmoe.activations."""

from dataclasses import dataclass

import flydsl.expr as fx

from mixmoe.activations import ActivationKind

LOG2E = 1.4426950408889634
GELU = 2 * 0.7978845608028654  # tanh(z) = 2 sigmoid(2 z) - 1, z = sqrt(2/pi) (g + ...)
# exp and reciprocal by their instructions: one ulp each, far inside a format's 2^-8.
APPROXIMATE = "afn,arcp,contract"


@dataclass(frozen=True, slots=True)
class Scalars:
    """Run-time scalars of an activation; ``limit`` is infinite where there is none."""

    limit: fx.Float32
    alpha: fx.Float32
    beta: fx.Float32
    beta2: fx.Float32


def activate(
    kind: ActivationKind, s: Scalars, gate: fx.Vector, up: fx.Vector, limited: bool = True
) -> fx.Vector:
    """Elementwise over a vector of gate and one of up values; three operations of some twelve
    are the limit's, which a kernel that is compiled for none leaves out."""
    if limited:
        gate = fx.min(gate, s.limit)
        up = fx.max(fx.min(up, s.limit), -s.limit)
    with fx.fastmath(APPROXIMATE):
        return FORMULAS[kind](s, gate, up)


def sigmoid(x):
    """``1 / (1 + e^-x)``."""
    return 1.0 / (1.0 + fx.exp2(x * -LOG2E))


def tanh(x):
    """``2 sigmoid(2 x) - 1``."""
    return 2.0 * sigmoid(2.0 * x) - 1.0


def silu(s: Scalars, g, u):
    """``g sigmoid(g) u``."""
    return g * sigmoid(g) * u


def swiglu(s: Scalars, g, u):
    """``g sigmoid(alpha g) (u + 1)``."""
    return g * sigmoid(g * s.alpha) * (u + 1.0)


def gelu(s: Scalars, g, u):
    """``0.5 g (1 + tanh z) u = g sigmoid(2 z) u``."""
    return g * sigmoid(GELU * (g + 0.044715 * g * g * g)) * u


def situv2(s: Scalars, g, u):
    """``beta tanh(g / beta) sigmoid(g) beta2 tanh(u / beta2)``."""
    return s.beta * tanh(g / s.beta) * sigmoid(g) * (s.beta2 * tanh(u / s.beta2))


FORMULAS = {
    ActivationKind.SILU: silu,
    ActivationKind.SWIGLU: swiglu,
    ActivationKind.GELU_TANH: gelu,
    ActivationKind.SITUV2: situv2,
}
