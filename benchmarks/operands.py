"""Quantised operands, made on the device, and their float values.

Written apart from the library on purpose: a benchmark that checked a library's numbers with the
library's own decoder would not see a wrong decoder.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_EDGES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)  # midpoints between neighbours
FP8_MAX = 448.0
MX_BLOCK = 32


@dataclass(frozen=True, slots=True, eq=False)
class Operand:
    """codes (..., R, K) and scales, one per `block` (rows, columns) of the last two dimensions.

    mxfp4: codes uint8 (..., R, K/2), the low nibble is the even k; scales uint8 E8M0.
    fp8: codes e4m3fn; scales f32. bf16: the values themselves, scales None.
    """

    codes: Tensor
    scales: Tensor | None
    block: tuple[int, int]

    def dense(self, index: Tensor | int | slice, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values of the experts (3 dimensions) or rows (2 dimensions) at `index`."""
        scales = None if self.scales is None else self.scales[index]
        return dequantise(self.codes[index], scales, self.block, dtype)


def dequantise(
    codes: Tensor, scales: Tensor | None, block: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """code * scale, in `dtype`; exact for mxfp4 in every dtype with bf16's range."""
    values = unpack_e2m1(codes, dtype) if codes.dtype == torch.uint8 else codes.to(dtype)
    if scales is None:
        return values
    wide = scales.to(dtype)
    if scales.dtype == torch.uint8:
        wide = torch.exp2(scales.to(dtype) - 127)
    rows, columns = values.shape[-2:]
    if block[0] > 1:
        wide = wide.repeat_interleave(block[0], -2)[..., :rows, :]
    return values * wide.repeat_interleave(block[1], -1)[..., :columns]


def unpack_e2m1(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """(..., K/2) uint8 -> (..., K) values."""
    table = torch.tensor(
        [*E2M1_VALUES, *(-v for v in E2M1_VALUES)], dtype=dtype, device=codes.device
    )
    both = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
    return table[both.int()]


def quantise_mxfp4(values: Tensor) -> tuple[Tensor, Tensor]:
    """(..., K) -> codes (..., K/2) uint8 and E8M0 (..., K/32) uint8.

    The scale is the smallest power of two that does not saturate.
    """
    blocks = values.float().unflatten(-1, (-1, MX_BLOCK))
    largest = blocks.abs().amax(-1).clamp_min(2.0**-100)
    exponent = torch.ceil(torch.log2(largest / E2M1_VALUES[-1]))
    scaled = blocks * torch.exp2(-exponent).unsqueeze(-1)
    edges = torch.tensor(E2M1_EDGES, device=values.device)
    code = torch.bucketize(scaled.abs(), edges, out_int32=True).to(torch.uint8)
    code |= (scaled < 0).to(torch.uint8) << 3
    code = code.flatten(-2).unflatten(-1, (-1, 2))
    return code[..., 0] | (code[..., 1] << 4), (exponent + 127).to(torch.uint8)


def quantise_mxfp8(values: Tensor) -> Operand:
    """(R, K) -> e4m3fn codes with E8M0 scales per 32, the smallest that do not saturate."""
    blocks = values.float().unflatten(-1, (-1, MX_BLOCK))
    largest = blocks.abs().amax(-1).clamp_min(2.0**-100)
    exponent = torch.ceil(torch.log2(largest / FP8_MAX))
    codes = (blocks * torch.exp2(-exponent).unsqueeze(-1)).to(torch.float8_e4m3fn)
    return Operand(codes.flatten(-2), (exponent + 127).to(torch.uint8), (1, MX_BLOCK))


def random_mxfp4(experts: int, rows: int, columns: int, seed: int, device: str) -> Operand:
    """Gaussian weights whose blocks vary by 2^-2 .. 2^2 around 1 / sqrt(K), as mxfp4.

    Real checkpoints look like this; uniform random codes would toggle more bits, and under the
    power limit of the card that alone costs several per cent of a prefill.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    codes = torch.empty(experts, rows, columns // 2, dtype=torch.uint8, device=device)
    scales = torch.empty(experts, rows, columns // MX_BLOCK, dtype=torch.uint8, device=device)
    step = max(1, (1 << 26) // (rows * columns))
    for first in range(0, experts, step):
        part = slice(first, min(first + step, experts))
        count = part.stop - part.start
        blocks = (count, rows, columns // MX_BLOCK, 1)
        shift = torch.randint(-2, 3, blocks, generator=generator, device=device)
        noise = torch.randn(*blocks[:3], MX_BLOCK, generator=generator, device=device)
        values = noise * torch.exp2(shift.float()) * columns**-0.5
        codes[part], scales[part] = quantise_mxfp4(values.flatten(-2))
    return Operand(codes, scales, (1, MX_BLOCK))


def quantise_fp8(values: Tensor, block: tuple[int, int]) -> Operand:
    """(..., R, K) -> e4m3fn codes and f32 scales amax / 448, one per `block` (0 = the whole)."""
    rows, columns = values.shape[-2:]
    high, wide = block[0] or rows, block[1] or columns
    padded = torch.nn.functional.pad(values.float(), (0, -columns % wide, 0, -rows % high))
    tiles = padded.unflatten(-1, (-1, wide)).unflatten(-3, (-1, high))
    # by a tensor: a GPU multiplies by the reciprocal of a number, and a scale that is an ulp off
    # breaks the ties of bf16 values the other way (5 % of rows, up to 2.4e-2 of a row)
    largest = tiles.abs().amax((-3, -1)).clamp_min(1e-12)
    scales = largest / torch.full_like(largest, FP8_MAX)
    codes = (tiles / scales[..., :, None, :, None]).to(torch.float8_e4m3fn)
    flat = codes.view(torch.uint8).flatten(-4, -3).flatten(-2)[..., :rows, :columns].contiguous()
    return Operand(flat.view(torch.float8_e4m3fn), scales, (high, wide))


def swiglu(gate: Tensor, up: Tensor, alpha: float = 1.702, limit: float = 7.0) -> Tensor:
    """gpt-oss: clamp(g, max=limit) * sigmoid(alpha g) * (clamp(u, -limit, limit) + 1)."""
    gate = gate.clamp(max=limit)
    return gate * torch.sigmoid(alpha * gate) * (up.clamp(-limit, limit) + 1)


def activate(name: str, gate_up: Tensor) -> Tensor:
    """act(gate, up) of rows (..., 2 I), gate first."""
    gate, up = gate_up.chunk(2, -1)
    return swiglu(gate, up) if name == "swiglu" else torch.nn.functional.silu(gate) * up
