"""One projection of one expert as it lies on disk, and the exact cuts a shard takes of it.

What a pair of stored tensors means is decided by both dtypes and both shapes together; a pair that
fits no row of the table is refused, never guessed. Sources: gpt-oss and OCP MX v1.0 (e2m1 pairs,
low nibble first, E8M0), DeepSeek-V3 (``weight_scale_inv``: one float32 factor per block), AMD Quark
(uint8 pairs + E8M0 bytes), compressed-tensors (``pack-quantized``: eight offset-binary int4 in an
int32, lowest bits first).
"""

from dataclasses import dataclass, replace
from math import gcd

import torch
from torch import Tensor

from mixmoe.checkpoint.store import Entry
from mixmoe.errors import MixMoEError
from mixmoe.formats import (
    E8M0_NAN,
    SCALE_STORAGE,
    Element,
    Format,
    Quantised,
    ScaleKind,
    e8m0_value,
    fp8_block,
    int4_group,
)
from mixmoe.formats import bf16 as BF16
from mixmoe.formats import fp8_channel as FP8_CHANNEL
from mixmoe.formats import fp16 as FP16
from mixmoe.formats import int8_channel as INT8_CHANNEL
from mixmoe.formats import mxfp4 as MXFP4
from mixmoe.formats import mxfp8 as MXFP8

E8M0 = ("U8", "F8_E8M0")
FLOATS = ("F32", "BF16", "F16")
OFFSET_BINARY = 0x88  # flips the top bit of both nibbles: code + 8 -> two's complement

# float32 checkpoints have no format of their own; they are read only to be converted.
FLOAT32 = Format(
    "float32",
    Element(
        "f32",
        32,
        torch.float32,
        torch.finfo(torch.float32).max,
        127,
        23,
        lambda y: y,
        lambda codes, dtype: codes.to(dtype),
    ),
    ScaleKind.NONE,
    1,
    0,
    0.0,
    0.0,
)


@dataclass(frozen=True, slots=True, eq=False)
class Matrix:
    """``(N, K)`` values: views of the stored codes and scales, and the format they are in.

    ``codes: (N, K)`` or ``(N, K/2)`` bytes for 4-bit elements, possibly strided (interleaved rows,
    transposed storage); ``flip`` is xor-ed into the code bytes. ``scales`` are those of the whole
    stored tensor, in which this matrix is the rows ``first, first + step, ...``.
    """

    name: str
    scales_name: str
    codes: Tensor
    scales: Tensor | None
    format: Format
    flip: int = 0
    first: int = 0
    step: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns in values."""
        rows, cols = self.codes.shape
        return rows, cols * self.format.element.per_byte

    def part(self, rows: slice) -> "Matrix":
        """Some of the rows as a matrix, still a view: gate or up of a tensor that holds both."""
        return replace(self, codes=self.codes[rows], first=rows.start, step=rows.step or 1)

    def copy_codes(self, rows: slice, cols: slice, out: Tensor) -> None:
        """Write the codes of a cut into ``out``; refuses NaN and infinity among float elements."""
        p = self.format.element.per_byte
        out.copy_(self.codes[rows, cols.start // p : cols.stop // p])
        if self.flip:
            out.bitwise_xor_(self.flip)
        if out.is_floating_point() and not _finite(out):
            raise MixMoEError(f"{self.name}: weights must be finite", "NaN or infinity")

    def copy_scales(self, rows: slice, cols: slice, target: Format, out: Tensor) -> None:
        """Write the scales of a cut into ``out``, repeated where ``target`` has smaller blocks."""
        if self.scales is None:
            return
        first, step = self.first, self.step
        down = range(first + step * rows.start, first + step * rows.stop, step * target.rows)
        picked = self.scales[_blocks(down, self.format.rows)]
        if self.format.cols:
            across = range(cols.start, cols.stop, target.cols)
            picked = picked[:, _blocks(across, self.format.cols)]
        self._check_scales(picked)
        out.copy_(_in_storage(picked, self.format))

    def _check_scales(self, scales: Tensor) -> None:
        e8m0 = scales.dtype in (torch.uint8, torch.float8_e8m0fnu)
        if int(scales.view(torch.uint8).amax()) < E8M0_NAN if e8m0 else _finite(scales):
            return
        bad = scales.view(torch.uint8) == E8M0_NAN if e8m0 else ~torch.isfinite(scales)
        at = tuple(int(i) for i in bad.nonzero()[0])
        value = "E8M0 NaN (0xFF)" if e8m0 else float(scales[at])
        raise MixMoEError(
            f"{self.scales_name}: scales must be finite", f"{value} at {at} of what is loaded"
        )

    def cut(self, rows: slice, cols: slice, target: Format) -> Quantised:
        """A copy of some rows and columns with the scales of ``target``'s blocks; values equal."""
        shape = (rows.stop - rows.start, cols.stop - cols.start)
        made = empty(shape, target, "cpu")
        self.copy_codes(rows, cols, made.codes)
        if made.scales is not None:
            self.copy_scales(rows, cols, target, made.scales)
        return made


def _blocks(places: range, block: int) -> slice | Tensor:
    """Indices of the blocks that hold these places: a slice (a view) unless one is repeated."""
    if places.step % block:
        return torch.tensor(places) // block
    return slice(places[0] // block, places[-1] // block + 1, places.step // block)


def empty(shape: tuple[int, ...], fmt: Format, device: torch.device | str) -> Quantised:
    """Unwritten codes and scales for ``(..., R, K)`` values."""
    *lead, rows, k = shape
    p = fmt.element.per_byte
    codes = torch.empty((*lead, rows, k // p), dtype=fmt.element.storage, device=device)
    if fmt.scale is ScaleKind.NONE:
        return Quantised(codes, None, fmt)
    dims = (*lead, *fmt.scale_shape(rows, k))
    return Quantised(codes, torch.empty(dims, dtype=SCALE_STORAGE[fmt.scale], device=device), fmt)


def shard_format(fmt: Format, starts: tuple[int, ...], stage: int) -> Format:
    """The format of a cut of w13's rows (stage 1) or w2's columns (stage 2) at these edges.

    Block formats get the largest block that divides every edge and the stored block, so that each
    new block lies inside one stored block: the values do not change. Other formats are kept.
    """
    size = fmt.rows if stage == 1 else fmt.cols
    if fmt.rows == 1:
        return fmt
    small = gcd(size, *starts)
    if small == size:
        return fmt
    return fp8_block(small, fmt.cols) if stage == 1 else fp8_block(fmt.rows, small)


def interpret(
    codes: Entry, scales: Entry | None, shape: tuple[int, int], block: tuple[int, int]
) -> tuple[Format, int]:
    """Format (and xor) of stored tensors whose last axes hold an ``(N, K)`` matrix.

    Raises MixMoEError naming the tensor whose dtype or shape fits no known storage.
    """
    n, k = shape
    if scales is None:
        plain = {"BF16": BF16, "F16": FP16, "F32": FLOAT32}.get(codes.dtype)
        if plain is None:
            raise MixMoEError(
                f"{codes.name}: {codes.dtype} codes need a tensor of scales, which must be in the "
                "checkpoint",
                "none",
            )
        return plain, 0
    kind, grid = scales.dtype, scales.shape
    if codes.dtype in ("U8", "I8") and kind in E8M0:
        return _expect(scales, (n, k // 32), MXFP4), 0
    if codes.dtype == "I32" and kind in FLOATS:
        group = k // grid[-1] if grid and grid[-1] else 0
        stored = ScaleKind.BF16 if kind == "BF16" else ScaleKind.F32
        fmt = int4_group(group, stored) if group in (32, 64, 128) else int4_group(32, stored)
        return _expect(scales, (n, k // fmt.cols), fmt), OFFSET_BINARY
    if codes.dtype == "F8_E4M3" and kind in E8M0 and grid[-2:] == (n, k // 32):
        return MXFP8, 0
    if codes.dtype in ("F8_E4M3", "I8") and kind in FLOATS and _per_row(grid, n):
        return FP8_CHANNEL if codes.dtype == "F8_E4M3" else INT8_CHANNEL, 0
    if codes.dtype == "F8_E4M3" and (kind in FLOATS or kind == "F8_E8M0"):
        return _expect(scales, (-(-n // block[0]), -(-k // block[1])), fp8_block(*block)), 0
    raise MixMoEError(
        f"{scales.name}: no format has {codes.dtype} codes with {kind} scales of shape {grid} for "
        f"a {n} x {k} matrix",
        f"{codes.dtype} + {kind}",
        "U8 + U8 (mxfp4), I32 + BF16 (int4), F8_E4M3 + F32 (fp8), I8 + F32 (int8)",
    )


def stored_shape(codes: Entry, fmt: Format, shape: tuple[int, int]) -> tuple[int, int]:
    """Last two axes that the codes of an ``(N, K)`` matrix take on disk."""
    n, k = shape
    per = 8 if codes.dtype == "I32" else fmt.element.per_byte
    return n, k // per


def as_bytes(codes: Tensor, fmt: Format) -> Tensor:
    """Codes in the dtype the format stores: packed int4 and e2m1 are pairs in bytes."""
    return codes if codes.dtype == fmt.element.storage else codes.view(fmt.element.storage)


def _expect(scales: Entry, shape: tuple[int, int], fmt: Format) -> Format:
    if scales.shape[-2:] != shape:
        raise MixMoEError(f"{scales.name}: scales of {fmt} must have shape {shape}", scales.shape)
    return fmt


def _per_row(grid: tuple[int, ...], n: int) -> bool:
    return grid in ((), (1,), (n,)) or grid[-2:] == (n, 1)


def _in_storage(scales: Tensor, fmt: Format) -> Tensor:
    if fmt.scale is ScaleKind.E8M0:
        return scales.view(torch.uint8)
    if scales.dtype == torch.float8_e8m0fnu:
        return e8m0_value(scales.view(torch.uint8))
    return scales


def _finite(values: Tensor) -> bool:
    """No NaN, no infinity. aminmax is ten times cheaper than isfinite (CPU, 2026-11-24)."""
    if values.dtype == torch.float8_e4m3fn:  # NaN is 0x7F and 0xFF, infinity does not exist
        tops = (values.view(kind).amax() for kind in (torch.int8, torch.uint8))
        return all(int(top) < nan for top, nan in zip(tops, (0x7F, 0xFF), strict=True))
    low, high = torch.aminmax(values)
    return bool(torch.isfinite(low) & torch.isfinite(high))
