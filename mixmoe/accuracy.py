"""How far a result is from the exact one: rows of floats, and codes at their rounding boundaries.

Two measures, both relative, both judged against ``Format.tolerance``:

- a row of floats: ``|y - ref| / |ref|``, Euclidean norms over the row;
- a requantised row: the smallest relative change of the exact float64 values that explains every
  code and every scale. A code that equals the twin's costs nothing; one that differs costs the
  distance from the exact value to the rounding boundary it should not have crossed. So "codes may
  differ only where the value lies within tolerance of a boundary" is one number per row.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from mixmoe.errors import MixMoEError
from mixmoe.formats import (
    E8M0_BIAS,
    E8M0_NAN,
    F32_TINY,
    FORMATS,
    Element,
    Format,
    Quantised,
    Rounding,
    ScaleKind,
    bfloat16,
    e8m0_value,
)
from mixmoe.spec import Recipe

# One ulp of the stored type; float32 keeps what FP8 tensor cores give (about 14 bits of the sum of
# |products|, which on signed data is a few times |sum|).
RESULT_TOLERANCE = {
    torch.bfloat16: FORMATS["bf16"].tolerance,
    torch.float16: FORMATS["fp16"].tolerance,
    torch.float32: 2.0**-11,
    torch.float64: 2.0**-11,
}


def layer_noise(recipe: Recipe) -> float:
    """The relative row error a recipe costs a layer of Gaussian data: ``2 sqrt(a^2 + w^2)``.

    ``a`` and ``w`` are the noise of its two formats. Three products err by ``sqrt(a^2 + w^2)``:
    gate, up and down; the gate's error grows by about sqrt(2) through the activation. What to
    expect of a model against its unquantised self; no bound on a kernel.
    """
    return 2 * math.hypot(recipe.activation.noise, recipe.weight.noise)


def row_errors(y: Tensor, ref: Tensor) -> Tensor:
    """``|y - ref| / |ref|`` of each row: y, ref (..., N) -> float64 (...).

    A row that must be zero and is not, or that holds a NaN or an infinity, has error infinity.
    """
    if y.shape != ref.shape:
        raise MixMoEError("results to compare must have one shape", tuple(y.shape), ref.shape)
    y, ref = y.double(), ref.double()
    return _relative((y - ref).norm(dim=-1), ref.norm(dim=-1))


def worst(errors: Tensor) -> float:
    """The largest error; 0.0 of no rows."""
    return float(errors.max()) if errors.numel() else 0.0


@dataclass(frozen=True, slots=True, eq=False)
class CodeErrors:
    """What :func:`code_errors` found. ``codes``: (R, K), ``scales``: (R', K') or None, relative
    errors that explain the codes and the scales; ``flips``: codes unlike the twin's.
    """

    codes: Tensor
    scales: Tensor | None
    flips: int

    @property
    def worst(self) -> float:
        """The largest of both."""
        return max(worst(self.codes), 0.0 if self.scales is None else worst(self.scales))

    def mismatches(self, tolerance: float) -> int:
        """Codes and scales that an error of ``tolerance`` does not explain."""
        count = int((self.codes > tolerance).sum())
        return count if self.scales is None else count + int((self.scales > tolerance).sum())


def code_errors(
    h: Quantised, exact: Tensor, rounding: Rounding | str = Rounding.CEIL
) -> CodeErrors:
    """The error before rounding that explains ``h``, given the exact values (R, K) float64.

    A code ``c`` under its scale ``s`` stands for every value between the midpoints to its
    neighbours, times s; the last codes reach to infinity. Its error is the distance of the exact
    value to that interval over ``max(|value|, rms of the row)``: sums of products err by the size
    of the row, not of one small element. A scale's error is the distance of the block's exact
    maximum to the maxima that give that scale, over ``max(maximum, rms)``.
    """
    fmt, exact = h.format, exact.double()
    if h.shape != tuple(exact.shape):
        raise MixMoEError("codes and exact values must have one shape", h.shape, exact.shape)
    h.check("h")
    rms = exact.square().mean(dim=-1, keepdim=True).sqrt()
    factor = None if h.scales is None else fmt._spread(h.scales, exact.shape, torch.float64)
    codes = _code_errors(h, exact, factor, rms)
    twin = fmt.quantise(exact.cpu(), rounding)
    flips = int((_bits(twin.codes) != _bits(h.codes).cpu()).sum()) if exact.numel() else 0
    scales = None
    if h.scales is not None and exact.numel():
        amax = _block_amax(fmt, exact)
        size = torch.maximum(amax, rms if fmt.rows == 1 else rms.amax())
        scales = _relative(_scale_distance(fmt, h.scales, amax, Rounding.named(rounding)), size)
        zero = _block_amax(fmt, h.dequantise(torch.float64)) == 0
        scales[(amax == 0) & zero] = 0.0  # a block of zeros says nothing about its scale
    return CodeErrors(codes, scales, flips)


def code_mismatches(
    h: Quantised,
    exact: Tensor,
    rounding: Rounding | str = Rounding.CEIL,
    tolerance: float | None = None,
) -> int:
    """How many codes and scales of ``h`` no error within ``tolerance`` (the format's) explains."""
    tolerance = h.format.tolerance if tolerance is None else tolerance
    return code_errors(h, exact, rounding).mismatches(tolerance)


def differing(a: Quantised, b: Quantised) -> int:
    """How many codes and scales differ in any bit."""
    if a.format != b.format or a.codes.shape != b.codes.shape:
        raise MixMoEError("not comparable bit for bit", (a.format, a.shape), (b.format, b.shape))
    count = int((_bits(a.codes) != _bits(b.codes)).sum())
    if a.scales is None or b.scales is None:
        return count
    return count + int((_bits(a.scales) != _bits(b.scales)).sum())


def _relative(distance: Tensor, size: Tensor) -> Tensor:
    error = distance / size
    error = torch.where((distance == 0) & (size == 0), 0.0, error)
    return torch.nan_to_num(error, nan=torch.inf, posinf=torch.inf)


def _bits(t: Tensor) -> Tensor:
    unsigned = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    return t.contiguous().view(unsigned[t.element_size()])


@cache
def values_of(element: Element) -> Tensor:
    """Every finite value of an element, ascending, float64."""
    patterns = torch.arange(1 << (16 if element.bits == 16 else 8), dtype=torch.int32)
    stored = patterns.to(torch.int16 if element.bits == 16 else torch.uint8).view(element.storage)
    values = element.decode(stored, torch.float64).flatten()
    return values[torch.isfinite(values)].unique()


@cache
def boundaries(element: Element) -> Tensor:
    """Rounding boundaries around every value: (values + 1,) float64, infinite at both ends."""
    values = values_of(element)
    ends = values.new_tensor([torch.inf])
    return torch.cat([-ends, (values[:-1] + values[1:]) / 2, ends])


def _outside(value: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.maximum(low - value, value - high).clamp(min=0)


def _code_errors(h: Quantised, exact: Tensor, factor: Tensor | None, rms: Tensor) -> Tensor:
    element, device = h.format.element, exact.device
    stored = element.decode(h.codes, torch.float64)
    at = torch.searchsorted(values_of(element).to(device), stored.contiguous())
    edges = boundaries(element).to(device)
    last = len(edges) - 1
    low, high = edges[at.clamp(max=last)], edges[(at + 1).clamp(max=last)]
    if factor is not None:
        low, high = low * factor, high * factor
    errors = _relative(_outside(exact, low, high), torch.maximum(exact.abs(), rms))
    bad = ~torch.isfinite(stored) if factor is None else ~torch.isfinite(stored * factor)
    return errors.masked_fill(bad, torch.inf)


def _block_amax(fmt: Format, values: Tensor) -> Tensor:
    return fmt._block_amax(values.flatten(0, -2))


def _scale_distance(fmt: Format, scales: Tensor, amax: Tensor, rounding: Rounding) -> Tensor:
    """Distance of each exact maximum to those that give the stored scale."""
    if fmt.scale is ScaleKind.E8M0:
        low, high = _e8m0_interval(fmt, scales, rounding)
        return _outside(amax, low, high).masked_fill(scales == E8M0_NAN, torch.inf)
    stored = scales.double()
    if fmt.scale is ScaleKind.BF16:
        at = torch.searchsorted(values_of(bfloat16).to(stored.device), stored)
        edges = boundaries(bfloat16).to(stored.device)
        low, high = edges[at], edges[at + 1]
    else:
        low, high = stored * (1 - 2.0**-24), stored * (1 + 2.0**-24)
    low = torch.where(stored <= F32_TINY, 0.0, low)  # no scale is smaller, whatever the maximum
    bad = ~(torch.isfinite(stored) & (stored > 0))
    distance = _outside(amax, low * fmt.element.max, high * fmt.element.max)
    return distance.masked_fill(bad, torch.inf)


def _e8m0_interval(fmt: Format, scales: Tensor, rounding: Rounding) -> tuple[Tensor, Tensor]:
    """Block maxima (low, high] or [low, high) that round to each E8M0 byte."""
    element = fmt.element
    reach = {  # the maximum at which the next byte begins, in units of the scale
        Rounding.CEIL: element.max,
        Rounding.EVEN: 2.0 ** (element.emax + 1) * (1 - 2.0 ** -(element.mantissa + 2)),
        Rounding.FLOOR: 2.0 ** (element.emax + 1),
    }[rounding]
    value = e8m0_value(scales, torch.float64)
    top = E8M0_BIAS - element.emax + E8M0_BIAS
    low = torch.where(scales == 0, 0.0, value / 2 * reach)
    high = torch.where(scales == top, torch.inf, value * reach)
    return low, high
