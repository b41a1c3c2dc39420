"""Rows of x and h as the streamed kernels take them: e4m3 in the order of wgmma's K slots.

Lane q of a quad holds the 32-block q of 128 columns of the packed weights, so the rows they meet
have their columns in the order `mixmoe.preshuffle.HOPPER_SLOTS`. Rows that the layer quantises for
itself are written so; rows that a caller hands over in natural order are reordered on entry.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixmoe.errors import MixMoEError
from mixmoe.formats import Quantised, fp8_token
from mixmoe.preshuffle import HOPPER_SLOTS

COUNTED = 1 << 31  # codes that a 32-bit offset reaches
GROUP = HOPPER_SLOTS.tile[1]  # columns that change places among themselves


def padded(k: int) -> int:
    """Slots of a row of K columns: whole groups."""
    return -(-k // GROUP) * GROUP


@triton.jit
def to_slots(x, QB: tl.constexpr, KP: tl.constexpr):
    """``(QB, KP)`` with the columns q, (ks lohi), by of each group of 128 in slot order."""
    parts = tl.reshape(x, (QB, KP // 128, 4, 8, 4))
    return tl.reshape(tl.permute(parts, (0, 1, 3, 2, 4)), (QB, KP))


@dataclass(frozen=True, slots=True, eq=False)
class SlotRows:
    """e4m3 ``codes: (R, padded(K))`` in slot order, zero past K; float32 ``scales: (R, 1)``."""

    codes: Tensor
    scales: Tensor

    @classmethod
    def of(cls, q: Quantised) -> "SlotRows":
        """``fp8_token`` rows in natural order, reordered."""
        k = q.shape[1]
        assert q.scales is not None
        whole = q.codes.view(torch.uint8)
        if k % GROUP:
            whole = torch.nn.functional.pad(whole, (0, padded(k) - k))
        return cls(turned(whole.contiguous(), 4, 8).view(q.codes.dtype), q.scales)

    def counted(self) -> "SlotRows":
        """Itself; MixMoEError where the codes are more than kernels count in 32 bits."""
        bytes_of_codes = self.codes.shape[0] * self.codes.stride(0)
        if bytes_of_codes > COUNTED:
            rule = f"gathered rows have at most {COUNTED} codes: split the tokens"
            raise MixMoEError(rule, bytes_of_codes, COUNTED)
        return self

    def natural(self, k: int) -> Quantised:
        """The first ``k`` columns of each row in natural order."""
        codes = turned(self.codes.contiguous(), 8, 4)[:, :k].contiguous()
        return Quantised(codes, self.scales, fp8_token)


def turned(rows: Tensor, high: int, low: int) -> Tensor:
    """Bytes ``(R, K)``, of each group the pieces of four codes (high, low) as (low, high)."""
    out = torch.empty_like(rows)
    count, groups = rows.shape[0], rows.shape[1] // GROUP
    pieces = rows.view(torch.int32).view(count, groups, high, low)
    out.view(torch.int32).view(count, groups, low, high).copy_(pieces.transpose(2, 3))
    return out
