"""Folding E8M0 block scales into FP8 codes, exactly.

An e2m1 value times ``2^k`` is an e4m3fn value for ``-8 <= k <= 6``. So the scales of a row of mxfp4
weights are written relative to one exponent of the row, the kernel makes e4m3 codes from code and
scale, and the row's power of two is multiplied back in float32 in the epilogue: MXFP4 at the FP8
tensor rate with no rounding. Kernels of Humming and FlashInfer fold per expert over 12 exponents.
"""

from enum import Enum

import torch
from torch import Tensor

from mixmoe.arrangement import contiguous
from mixmoe.errors import MixMoEError
from mixmoe.formats import E8M0_BIAS, Quantised, ScaleKind, e2m1


class Fold(Enum):
    """How the E8M0 scale of a block is stored relative to one exponent of its row.

    A block's values are ``e2m1 * 2^k * row_scale`` and ``e2m1 * 2^k`` is an e4m3fn value, exactly,
    for ``-8 <= k <= 6``. NARROW stores ``(k + 5) * 8`` for ``-5 <= k <= 6``: two multiply-adds
    make the eight e4m3 codes of such a block (:func:`fold_table`). WIDE stores ``k + 8``, the row
    of that table. A row whose exponents span more (over 11, over 14) cannot fold.
    """

    NARROW = (-5, 8)
    WIDE = (-8, 1)

    @property
    def lowest(self) -> int:
        """The smallest exponent k."""
        return self.value[0]

    @property
    def step(self) -> int:
        """What one exponent adds to the stored byte."""
        return self.value[1]

    @property
    def reach(self) -> int:
        """The largest range of exponents in a row."""
        return FOLD_TOP - self.lowest


FOLD_TOP = 6  # 6 * 2^6 = 384 is an e4m3fn value, 6 * 2^7 is over its 448


def fold_table() -> Tensor:
    """uint8 (15, 8): the e4m3fn code of ``magnitude(j) * 2^k`` for k = row - 8 and e2m1 code j.

    Row ``r = k + 8 >= 3`` is also ``b = 8 (k + 5)`` times 0x01010101 added to the bytes
    0x141008 and 0x24201C18, with byte 0 left at 0: the arithmetic of the narrow fold.
    """
    codes = torch.tensor([[0x10, 0x32, 0x54, 0x76]], dtype=torch.uint8)
    power = torch.arange(Fold.WIDE.lowest, FOLD_TOP + 1).exp2().unsqueeze(1)
    return (e2m1.decode(codes, torch.float32) * power).to(torch.float8_e4m3fn).view(torch.uint8)


def _span(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest E8M0 byte of each row over blocks that hold a non-zero code."""
    magnitude = contiguous(codes).view(torch.int64) & 0x7777777777777777
    used = (magnitude != 0).unflatten(-1, (-1, 2)).any(-1)
    low = torch.where(used, scales, 255).amin(-1).to(torch.int16)
    high = torch.where(used, scales, 0).amax(-1).to(torch.int16)
    dead = low > high  # a row of zeros
    return low.masked_fill_(dead, E8M0_BIAS), high.masked_fill_(dead, E8M0_BIAS)


def fold_range(q: Quantised) -> Tensor:
    """int16 (E, N): by how many binades the scales of each row of mxfp4 weights differ.

    Blocks whose codes are all zero do not count. Up to 11 the row folds NARROW, up to 14 WIDE;
    beyond that no FP8 fold is exact: a backend keeps plain rows and decodes them to bf16.
    """
    if q.format.element is not e2m1 or q.format.scale is not ScaleKind.E8M0 or q.scales is None:
        raise MixMoEError("a fold takes e2m1 codes with E8M0 scales", q.format.name, "mxfp4")
    spans = [_span(c, s) for c, s in zip(q.codes, q.scales, strict=True)]
    return torch.stack([high - low for low, high in spans])


def narrowest_fold(q: Quantised) -> Fold | None:
    """The fold that holds every row of mxfp4 weights; None where some row fits neither."""
    widest = int(fold_range(q).amax())
    return next((kind for kind in Fold if widest <= kind.reach), None)


def fold(
    codes: Tensor, scales: Tensor, kind: Fold, where: str = "weights"
) -> tuple[Tensor, Tensor]:
    """Fold one matrix: bytes (N, K/32) and row_scale f32 (N,), a power of two.

    ``2^(scale - 127) = 2^k * row_scale``, k from the byte as ``kind`` says; for a block of zeros k
    is the nearest that fits. Raises MixMoEError naming the first row that spans too much.
    """
    low, high = _span(codes, scales)
    span = high - low
    if int(span.amax()) > kind.reach:
        row = int((span > kind.reach).nonzero()[0])
        wider = "the _wide order" if kind is Fold.NARROW and span.amax() <= Fold.WIDE.reach else ""
        raise MixMoEError(
            f"{where}, row {row}: E8M0 exponents of a row may differ by {kind.reach}",
            int(span[row]),
            wider or "order rows, decoded to bf16",
        )
    # The base nearest to 0 that fits: |base| <= 122, so 2^base is a normal float32.
    low, high = low - E8M0_BIAS, high - E8M0_BIAS
    base = torch.minimum((high - FOLD_TOP).clamp_(min=0), low - kind.lowest)
    k = scales.to(torch.int16) - (base + E8M0_BIAS).unsqueeze(1)
    k = k.clamp_(kind.lowest, FOLD_TOP)  # only a block of zeros can be outside
    return ((k - kind.lowest) * kind.step).to(torch.uint8), base.to(torch.float32).exp2_()


def unfold(stored: Tensor, row_scale: Tensor, kind: Fold) -> Tensor:
    """E8M0 bytes (.., N, K/32) again; those of blocks of zeros may differ from what was folded."""
    base = (torch.frexp(row_scale).exponent - 1).to(torch.int16).unsqueeze(-1)
    k = stored.to(torch.int16) // kind.step + kind.lowest
    return (k + base + E8M0_BIAS).to(torch.uint8)
