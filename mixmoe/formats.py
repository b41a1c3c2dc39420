"""Number formats as records: element, scale rule, and the quantise / dequantise they define.

A tensor ``x`` is stored as ``x ~ element * scale`` with one scale for a block of ``rows x cols``
values. Everything here is plain torch and defines the bits every backend must produce.

Sources: OCP Microscaling Formats (MX) v1.0 for e2m1, e4m3, E8M0 and blocks of 32; ONNX float8
notes for e4m3fnuz; DeepSeek-V3 report section 3.3 for 128x128 blocks.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cache

import torch
from torch import Tensor

from mixmoe.errors import MixMoEError, nearest_multiple

CHUNK = 1 << 22  # elements quantised at a time: under 128 MB beside input and output
E8M0_BIAS = 127
E8M0_NAN = 0xFF
F32_TINY = 2.0**-126  # smallest normal: a float32 scale never goes below it, so x / scale is finite


class Rounding(Enum):
    """How the block maximum becomes a power-of-two scale (E8M0).

    FLOOR is OCP MX v1.0: ``floor(log2 amax) - emax``; the largest values may saturate.
    EVEN rounds amax to the element's mantissa first (add half an ulp), then floors.
    CEIL is the smallest power of two with ``amax / scale <= element max``: nothing saturates.
    No scale exceeds ``2^(127 - emax)``, so that every code stands for a finite float32.
    """

    FLOOR = "FLOOR"
    EVEN = "EVEN"
    CEIL = "CEIL"

    @classmethod
    def named(cls, name: "str | Rounding") -> "Rounding":
        """Look a rounding up by name; an instance passes through."""
        if isinstance(name, cls):
            return name
        try:
            return cls[str(name).upper()]
        except KeyError:
            raise MixMoEError("unknown E8M0 rounding", name, "FLOOR, EVEN or CEIL") from None


def _encode_e2m1(y: Tensor) -> Tensor:
    # |y| in [0, 2) has step 1/2, [2, 4) step 1, [4, 8) step 2. The three lines cross exactly where
    # the step changes, so the code of |y| is the least of them; torch.round is ties-to-even.
    a = y.abs()
    code = torch.minimum((a * 2).round_(), a.round().add_(2))
    code = torch.minimum(code, a.mul_(0.5).round_().add_(4)).clamp_(max=7).to(torch.uint8)
    code |= torch.signbit(y).to(torch.uint8) << 3
    return code[..., 0::2] | code[..., 1::2] << 4


def _decode_e2m1(codes: Tensor, dtype: torch.dtype) -> Tensor:
    # Inverse of the encoder, doubled so that it stays in int8: 2|v| = max(m, 2m - 4, 4m - 16).
    nibbles = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2).view(torch.int8)
    m = nibbles & 7
    twice = torch.maximum(m, torch.maximum(2 * m - 4, 4 * m - 16)).to(dtype)
    return torch.where(nibbles >= 8, -twice, twice).mul_(0.5)


def _encode_int4(y: Tensor) -> Tensor:
    code = y.round().clamp_(-8, 7).to(torch.int8).view(torch.uint8) & 15
    return code[..., 0::2] | code[..., 1::2] << 4


def _decode_int4(codes: Tensor, dtype: torch.dtype) -> Tensor:
    high = codes.view(torch.int8) >> 4
    low = (codes << 4).view(torch.int8) >> 4
    return torch.stack([low, high], dim=-1).flatten(-2).to(dtype)


def _encode_int8(y: Tensor) -> Tensor:
    return y.round().clamp_(-127, 127).to(torch.int8)


@dataclass(frozen=True, slots=True)
class Element:
    """One stored number: its storage dtype, codes per storage byte, and range.

    ``max`` is the largest finite value, ``emax`` its exponent, ``mantissa`` its explicit bits;
    ``encode`` rounds float32 to nearest even and saturates, ``decode`` is exact in any float dtype.
    """

    name: str
    bits: int
    storage: torch.dtype
    max: float
    emax: int
    mantissa: int
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor, torch.dtype], Tensor]

    @property
    def per_byte(self) -> int:
        """Codes in one storage element: 2 for 4-bit elements, else 1."""
        return 2 if self.bits == 4 else 1


def _cast(dtype: torch.dtype, limit: float) -> Callable[[Tensor], Tensor]:
    return lambda y: y.clamp(-limit, limit).to(dtype)


def _value(codes: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.to(dtype)


E4M3FN, E4M3FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz
e2m1 = Element("e2m1", 4, torch.uint8, 6.0, 2, 1, _encode_e2m1, _decode_e2m1)
e4m3fn = Element("e4m3fn", 8, E4M3FN, 448.0, 8, 3, _cast(E4M3FN, 448.0), _value)
e4m3fnuz = Element("e4m3fnuz", 8, E4M3FNUZ, 240.0, 7, 3, _cast(E4M3FNUZ, 240.0), _value)
int8 = Element("int8", 8, torch.int8, 127.0, 6, 0, _encode_int8, _value)
int4 = Element("int4", 4, torch.uint8, 7.0, 2, 0, _encode_int4, _decode_int4)
bfloat16 = Element(
    "bf16", 16, torch.bfloat16, torch.finfo(torch.bfloat16).max, 127, 7,
    lambda y: y.to(torch.bfloat16), _value,
)
float16 = Element(
    "fp16", 16, torch.float16, 65504.0, 15, 10, lambda y: y.to(torch.float16), _value
)


class ScaleKind(Enum):
    """How a block's scale is stored."""

    NONE = "none"
    E8M0 = "e8m0"  # raw uint8, value 2^(byte - 127), 0xFF is NaN and refused
    F32 = "f32"
    BF16 = "bf16"


SCALE_STORAGE = {
    ScaleKind.E8M0: torch.uint8,
    ScaleKind.F32: torch.float32,
    ScaleKind.BF16: torch.bfloat16,
}


@dataclass(frozen=True, slots=True)
class Format:
    """A number format: element, scale kind, and the block one scale covers.

    ``cols = 0`` means a whole row. ``tolerance`` is the largest relative row error a kernel may
    show against float64 on the same operands when its result is stored in this format; where the
    result is requantised it is the error of the value before rounding, so a code may differ from
    the twin's only that close to a rounding boundary. ``noise`` bounds the relative row error that
    quantising Gaussian data to this format costs: what to expect of a model, not of a kernel.
    """

    name: str
    element: Element
    scale: ScaleKind
    rows: int
    cols: int
    tolerance: float
    noise: float

    def __str__(self) -> str:
        return self.name

    def __reduce__(self) -> tuple[Callable[..., "Format"], tuple[str]]:
        """Pickled by name, as encoders are functions that have none: a changed record comes back
        as the registered one."""
        return format_named, (self.name,)

    @property
    def family(self) -> str:
        """The name without block or group size: formats of a family differ in those alone."""
        return next((f for f in ("fp8_block", "int4_group") if self.name.startswith(f)), self.name)

    @property
    def bits_per_value(self) -> float:
        """Storage for one value, scale included; a whole-row scale counts as nothing."""
        if self.scale is ScaleKind.NONE or self.cols == 0:
            return float(self.element.bits)
        return self.element.bits + 8 * SCALE_STORAGE[self.scale].itemsize / (self.rows * self.cols)

    def check_columns(self, k: int, name: str = "x") -> None:
        """Refuse a row length that breaks a block; fp8 blocks alone may be partial at the edge.
        ``name`` is the operand's, for the error."""
        whole_blocks = self.scale is ScaleKind.E8M0 or self.element is int4
        step = self.cols if whole_blocks else self.element.per_byte
        if k < 1 or k % step:
            raise MixMoEError(
                f"{name}: K must be a positive multiple of {step} for {self.name}",
                k,
                nearest_multiple(k, step),
            )

    def scale_shape(self, rows: int, k: int) -> tuple[int, int]:
        """Shape of the scales of a ``(rows, k)`` matrix; blocks at the edges may be partial."""
        return -(-rows // self.rows), -(-k // self.cols) if self.cols else 1

    def quantise(
        self, x: Tensor, rounding: "Rounding | str" = Rounding.CEIL, name: str = "x"
    ) -> "Quantised":
        """Quantise ``x: (..., R, K)`` of any float dtype; elements round to nearest even.

        With ``s`` the block's scale, ``codes = rne(x / s)`` in IEEE float32, saturated:
        E8M0 as :class:`Rounding` says, else ``s = max(amax / element max, 2^-126)`` rounded to
        the scale's dtype. Raises MixMoEError, of the operand ``name``, with the row of the first
        NaN or infinity, or magnitude beyond what float32 (a format without scales: the element)
        holds.
        """
        rounding = Rounding.named(rounding)
        if x.dim() < 2 or not x.is_floating_point():
            raise MixMoEError(
                f"{name}: quantise takes a float tensor (..., R, K)", (tuple(x.shape), x.dtype)
            )
        *lead, rows, k = x.shape
        self.check_columns(k, name)
        codes = x.new_empty((*lead, rows, k // self.element.per_byte), dtype=self.element.storage)
        scales = None
        if self.scale is not ScaleKind.NONE:
            shape = (*lead, *self.scale_shape(rows, k))
            scales = x.new_empty(shape, dtype=SCALE_STORAGE[self.scale])
        for at, block in self._chunks(x):
            index, span = at
            values = x[index][block].to(torch.float32)
            amax = self._block_amax(values)
            if not torch.isfinite(amax).all() or amax.amax() > self._largest_input:
                self._refuse(name, x[index][block], (*index, block.start))
            if scales is None:
                codes[index][block] = self.element.encode(values)
                continue
            scale = self._scale_of(amax, rounding)
            scales[index][span] = scale
            codes[index][block] = self.element.encode(values / self._spread(scale, values.shape))
        return Quantised(codes, scales, self)

    @property
    def _largest_input(self) -> float:
        scaled = self.scale is not ScaleKind.NONE
        return torch.finfo(torch.float32).max if scaled else self.element.max

    def _chunks(self, x: Tensor) -> Iterator[tuple[tuple[tuple[int, ...], slice], slice]]:
        """Index of a matrix, rows of its scales, and rows of it: CHUNK elements at a time."""
        *lead, rows, k = x.shape
        step = max(1, CHUNK // max(1, k * self.rows)) * self.rows
        for index in torch.cartesian_prod(*(torch.arange(n) for n in lead)) if lead else [()]:
            at = tuple(int(i) for i in torch.as_tensor(index).reshape(-1)) if lead else ()
            for start in range(0, rows if x.numel() else 0, step):
                stop = min(start + step, rows)
                span = slice(start // self.rows, -(-stop // self.rows))
                yield (at, span), slice(start, stop)

    def _block_amax(self, values: Tensor) -> Tensor:
        rows, k = values.shape
        cols = self.cols or k
        if rows % self.rows or k % cols:
            pad = (0, -k % cols, 0, -rows % self.rows)
            values = torch.nn.functional.pad(values, pad)
        tiles = values.reshape(values.shape[0] // self.rows, self.rows, -1, cols)
        return torch.maximum(tiles.amax(dim=(1, 3)), -tiles.amin(dim=(1, 3)))

    def _scale_of(self, amax: Tensor, rounding: Rounding) -> Tensor:
        """Scales in storage dtype of float32 block maxima."""
        if self.scale is not ScaleKind.E8M0:
            # By a tensor: CUDA multiplies by the reciprocal of a Python scalar, which rounds twice.
            scale = amax / amax.new_tensor(self.element.max)
            return scale.clamp_(min=F32_TINY).to(SCALE_STORAGE[self.scale])
        fraction, exponent = torch.frexp(amax)  # amax = fraction * 2^exponent, fraction in [1/2, 1)
        if rounding is Rounding.CEIL:
            up = fraction > self.element.max / 2.0 ** (self.element.emax + 1)
        elif rounding is Rounding.EVEN:
            up = fraction >= 1 - 2.0 ** -(self.element.mantissa + 2)
        else:
            up = torch.zeros_like(fraction, dtype=torch.bool)
        power = exponent - 1 - self.element.emax + up.to(torch.int32)
        power = torch.where(amax > 0, power, -E8M0_BIAS)
        top = E8M0_BIAS - self.element.emax  # above it a code could stand for 2^128
        return (power.clamp_(-E8M0_BIAS, top) + E8M0_BIAS).to(torch.uint8)

    def _spread(
        self, scale: Tensor, shape: torch.Size, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Scales in storage dtype -> float factors that broadcast over values of ``shape``."""
        factor = self.scale_value(scale, dtype)
        if self.rows > 1:
            factor = factor.repeat_interleave(self.rows, dim=-2)[..., : shape[-2], :]
        if self.cols:
            factor = factor.repeat_interleave(self.cols, dim=-1)[..., : shape[-1]]
        return factor

    def _refuse(self, operand: str, values: Tensor, where: tuple[int, ...]) -> None:
        values = values.to(torch.float64)  # where a finite number that float32 lacks stays finite
        bad = ~(values.abs() <= self._largest_input).all(dim=-1)
        row = int(bad.nonzero()[0])
        name = ", ".join(str(i) for i in (*where[:-1], where[-1] + row))
        finite = torch.isfinite(values[row]).all()
        what = f"magnitudes up to {self._largest_input}" if finite else "finite values"
        raise MixMoEError(
            f"{operand}: {self.name} takes {what}: row ({name}) breaks that",
            float(values[row].abs().max()),
        )

    def dequantise(
        self, codes: Tensor, scales: Tensor | None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """``element * scale`` as ``(..., R, K)``; exact in float64, rounded once in float32.

        Other dtypes are rounded from float32.
        """
        work = torch.float64 if dtype == torch.float64 else torch.float32
        values = self.element.decode(codes, work)
        if scales is None:
            return values.to(dtype)
        if self.rows == 1 and self.cols and values.shape[-1] % self.cols == 0:
            # One multiply over a view: no spread copy of the scales.
            factor = self.scale_value(scales, work).unsqueeze(-1)
            values = values.unflatten(-1, (-1, self.cols)).mul_(factor).flatten(-2)
        else:
            values = values.mul_(self._spread(scales, values.shape, work))
        return values.to(dtype)

    def scale_value(self, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Stored scales as float factors, one per block."""
        return e8m0_value(scales, dtype) if self.scale is ScaleKind.E8M0 else scales.to(dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Quantised:
    """Codes with the scales and the format that give them meaning.

    ``codes: (..., R, K)`` in the element's storage, or ``(..., R, K/2)`` uint8 for 4-bit elements
    with the LOW nibble at even k. ``scales: (..., ceil(R/rows), ceil(K/cols))``, raw uint8 for
    E8M0, one column where a scale covers a whole row, None for 16-bit formats.
    """

    codes: Tensor
    scales: Tensor | None
    format: Format

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in values, not in storage."""
        *lead, k = self.codes.shape
        return (*lead, k * self.format.element.per_byte)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + (0 if self.scales is None else self.scales.nbytes)

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.codes.device

    def to(self, device: torch.device | str) -> "Quantised":
        """The same numbers on another device."""
        scales = None if self.scales is None else self.scales.to(device)
        return Quantised(self.codes.to(device), scales, self.format)

    def __getitem__(self, index: int) -> "Quantised":
        """One matrix of a stack, as a view."""
        scales = None if self.scales is None else self.scales[index]
        return Quantised(self.codes[index], scales, self.format)

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values these codes stand for, see :meth:`Format.dequantise`."""
        return self.format.dequantise(self.codes, self.scales, dtype)

    def check(self, name: str) -> None:
        """Refuse codes or scales whose dtype, shape or values the format does not allow."""
        fmt = self.format
        if self.codes.dtype != fmt.element.storage:
            raise MixMoEError(
                f"{name}: codes of {fmt} must be {fmt.element.storage}", self.codes.dtype
            )
        *lead, rows, k = self.shape
        fmt.check_columns(k, name)
        if fmt.scale is ScaleKind.NONE:
            if self.scales is not None:
                raise MixMoEError(f"{name}: {fmt} has no scales", tuple(self.scales.shape))
            return
        want = (*lead, *fmt.scale_shape(rows, k))
        got = None if self.scales is None else tuple(self.scales.shape)
        if self.scales is None or got != want:
            raise MixMoEError(f"{name}: scales of {fmt} must have shape {want}", got)
        if self.scales.dtype != SCALE_STORAGE[fmt.scale]:
            raise MixMoEError(
                f"{name}: scales of {fmt} must be {SCALE_STORAGE[fmt.scale]}", self.scales.dtype
            )

    def check_scales(self, name: str) -> None:
        """Refuse a NaN scale (0xFF in E8M0), NaN or infinity; reads every scale once."""
        if self.scales is None:
            return
        e8m0 = self.format.scale is ScaleKind.E8M0
        bad = self.scales == E8M0_NAN if e8m0 else ~torch.isfinite(self.scales)
        if bad.any():
            at = tuple(int(i) for i in bad.nonzero()[0])
            raise MixMoEError(f"{name}: scales must be finite", f"{self.scales[at].item()} at {at}")


def e8m0_value(scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``2^(byte - 127)`` of raw E8M0 bytes, exact (2^-127 is a float32 denormal)."""
    if dtype == torch.float64:
        return (scales.to(torch.int64) + (1023 - E8M0_BIAS) << 52).view(torch.float64)
    bits = scales.to(torch.int32) << 23
    return torch.where(scales == 0, 1 << 22, bits).view(torch.float32).to(dtype)


# Tolerances: 2^-8 is one bf16 ulp, what is asked of a row; a requantised code may move only
# where the value before rounding is that near a boundary. Noise: measured on 4096 Gaussian rows
# of 4096 values (2026-11-24, CPU, CEIL rounding), worst row, rounded up.
ROW = 2.0**-8
mxfp4 = Format("mxfp4", e2m1, ScaleKind.E8M0, 1, 32, ROW, 0.14)
mxfp8 = Format("mxfp8", e4m3fn, ScaleKind.E8M0, 1, 32, ROW, 0.030)
fp8_token = Format("fp8_token", e4m3fn, ScaleKind.F32, 1, 0, ROW, 0.030)
fp8_channel = Format("fp8_channel", e4m3fn, ScaleKind.F32, 1, 0, ROW, 0.030)
fp8_token_fnuz = Format("fp8_token_fnuz", e4m3fnuz, ScaleKind.F32, 1, 0, ROW, 0.030)
fp8_channel_fnuz = Format("fp8_channel_fnuz", e4m3fnuz, ScaleKind.F32, 1, 0, ROW, 0.030)
fp8_1x128 = Format("fp8_1x128", e4m3fn, ScaleKind.F32, 1, 128, ROW, 0.030)
int8_token = Format("int8_token", int8, ScaleKind.F32, 1, 0, ROW, 0.015)
int8_channel = Format("int8_channel", int8, ScaleKind.F32, 1, 0, ROW, 0.015)
int8_smooth = Format("int8_smooth", int8, ScaleKind.F32, 1, 0, ROW, 0.015)
bf16 = Format("bf16", bfloat16, ScaleKind.NONE, 1, 0, ROW, 2.0**-8)
fp16 = Format("fp16", float16, ScaleKind.NONE, 1, 0, 2.0**-10, 2.0**-11)


@cache
def fp8_block(rows: int = 128, cols: int = 128) -> Format:
    """e4m3fn with one float32 scale per ``rows x cols`` block; 128x128 is DeepSeek-V3's.

    Smaller blocks hold tensor-parallel shards whose edge falls inside a 128 block.
    """
    if rows < 1 or cols < 1:
        raise MixMoEError("fp8_block takes a positive block", (rows, cols), "(128, 128)")
    name = "fp8_block" if (rows, cols) == (128, 128) else f"fp8_block{rows}x{cols}"
    return Format(name, e4m3fn, ScaleKind.F32, rows, cols, ROW, 0.030)


@cache
def int4_group(group: int = 32, scale: ScaleKind = ScaleKind.BF16) -> Format:
    """Symmetric int4: codes -8..7, scale = amax / 7 in bf16 or float32 per group along K."""
    if group not in (32, 64, 128):
        raise MixMoEError("int4 groups hold 32, 64 or 128 values", group, "32, 64 or 128")
    if scale not in (ScaleKind.BF16, ScaleKind.F32):
        raise MixMoEError("int4 scales are bf16 or f32", scale.value, "bf16 or f32")
    suffix = "" if scale is ScaleKind.BF16 else "_f32"
    return Format(f"int4_group{group}{suffix}", int4, scale, 1, group, ROW, 0.14)


INT4 = [int4_group(g, s) for g in (32, 64, 128) for s in (ScaleKind.BF16, ScaleKind.F32)]
FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        mxfp4, mxfp8, fp8_token, fp8_channel, fp8_token_fnuz, fp8_channel_fnuz, fp8_block(),
        fp8_1x128, int8_token, int8_channel, int8_smooth, *INT4, bf16, fp16,
    )
}
ALIASES = {"int4_group": "int4_group32", "float16": "fp16", "bfloat16": "bf16"}


def format_named(name: "str | Format") -> Format:
    """Look a format up by name (``fp8_block64x128`` builds one); an instance passes through."""
    if isinstance(name, Format):
        return name
    if not isinstance(name, str):
        raise MixMoEError("a number format is a Format or its name", name, ", ".join(FORMATS))
    key = ALIASES.get(name, name)
    if key in FORMATS:
        return FORMATS[key]
    rows, x, cols = key.removeprefix("fp8_block").partition("x")
    if key.startswith("fp8_block") and x and rows.isdigit() and cols.isdigit():
        return fp8_block(int(rows), int(cols))
    raise MixMoEError("unknown number format", name, ", ".join(FORMATS))
