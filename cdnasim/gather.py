"""Byte-addressed gathers and scatters on a flat buffer, as wide as alignment allows. Used by LDS
and by global memory.
"""

from __future__ import annotations

import numpy as np

from .numerics import Array, u8, u16, u32, u64

WORDS = {
    1: u8,
    2: u16,
    4: u32,
    8: u64,
    16: np.complex128,
}  # 16 bytes move as one complex number, bits untouched


def gather(data: Array, off: Array, n: int) -> Array:
    """data: uint8 buffer, off: int64[k] byte offsets, all in range -> uint8[k, n]."""
    ty = WORDS.get(n)
    if ty is not None and (n == 1 or not (off & (n - 1)).any()):
        whole = len(data) // n * n
        items: Array = data[:whole].view(ty)
        if len(data) == whole or not len(off) or int(off.max()) + n <= whole:
            return items.take(off // n if n > 1 else off).view(u8).reshape(len(off), n)
    if n > 4 and n % 4 == 0 and not (off & 3).any():
        words = data[: len(data) // 4 * 4].view(u32)
        return words.take((off >> 2)[:, None] + np.arange(n // 4)).view(u8)
    return data.take(off[:, None] + np.arange(n))


def scatter(data: Array, off: Array, rows: Array) -> None:
    """The inverse: rows uint8[k, n]. Of two rows at one offset the later wins."""
    n = rows.shape[1]
    ty = WORDS.get(n)
    if ty is not None and (n == 1 or not (off & (n - 1)).any()):
        whole = len(data) // n * n
        if len(data) == whole or not len(off) or int(off.max()) + n <= whole:
            data[:whole].view(ty)[off // n] = np.ascontiguousarray(rows).view(ty)[:, 0]
            return
    if n > 4 and n % 4 == 0 and not (off & 3).any():
        data[: len(data) // 4 * 4].view(u32)[(off >> 2)[:, None] + np.arange(n // 4)] = (
            np.ascontiguousarray(rows).view(u32)
        )
        return
    data[off[:, None] + np.arange(n)] = rows
