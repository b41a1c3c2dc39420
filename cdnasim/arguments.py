"""The argument segment of a launch, packed from Python values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .asm import Argument
from .errors import LaunchError
from .memory import Memory
from .numerics import Array, u8

if TYPE_CHECKING:
    from .machine import Kernel


def argument_bytes(v: Any, size: int, memory: Memory, name: str) -> bytes:
    """One argument of `size` bytes: a buffer becomes its address, a number its little-endian
    bits.
    """
    if hasattr(v, 'untyped_storage'):  # torch tensor
        if v.device.type != 'cpu':
            raise LaunchError(
                f'argument {name}: the tensor is on {v.device}, cdnasim takes CPU tensors'
            )
        v = memory.map_tensor(v, f'{name} {tuple(v.shape)}')
    elif isinstance(v, np.ndarray) and v.ndim:
        v = memory.alloc(v, f'{name} {v.shape}')
    if isinstance(v, (bool, int, np.integer)):
        return (int(v) & ((1 << 8 * size) - 1)).to_bytes(size, 'little')
    if type(v) is float:  # np.float64 is a float too, and has its own size
        v = np.array(v, {2: np.float16, 4: np.float32, 8: np.float64}[size])
    raw = v if isinstance(v, (bytes, bytearray)) else np.asarray(v).tobytes()
    if len(raw) != size:
        raise LaunchError(f'argument {name} takes {size} bytes, {type(v).__name__} has {len(raw)}')
    return bytes(raw)


def pack_args(
    kernel: Kernel,
    args: Any,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    memory: Memory,
) -> Array:
    """The kernarg segment, laid out by the metadata (or, without metadata, in order: pointers 8
    bytes, numbers 4).
    """
    size = max(kernel.meta.get('kernarg_segment_size', 0), kernel.hsa.get('kernarg_size', 0), 16)
    if isinstance(args, (bytes, bytearray)):
        buf = np.zeros(max(size, (len(args) + 3) // 4 * 4), u8)
        buf[: len(args)] = np.frombuffer(bytes(args), u8)
    else:
        layout = kernel.visible_args if kernel.args else plain_layout(args)
        if len(args) != len(layout):
            names = ', '.join(a.name or a.kind for a in layout)
            raise LaunchError(
                f'{kernel.name} takes {len(layout)} arguments ({names}), {len(args)} were given'
            )
        buf = np.zeros(max([size] + [(a.offset + a.size + 3) // 4 * 4 for a in layout]), u8)
        for k, (a, v) in enumerate(zip(layout, args, strict=True)):
            raw = argument_bytes(v, a.size, memory, a.name or f'#{k}')
            buf[a.offset : a.offset + a.size] = np.frombuffer(raw, u8)
    hidden = {f'hidden_block_count_{x}': g for x, g in zip('xyz', grid, strict=True)}
    hidden.update({f'hidden_group_size_{x}': b for x, b in zip('xyz', block, strict=True)})
    hidden.update(
        {f'hidden_remainder_{x}': 0 for x in 'xyz'}, hidden_grid_dims=sum(g > 1 for g in grid) or 1
    )
    for a in kernel.args:
        if a.kind in hidden:
            buf[a.offset : a.offset + a.size] = np.frombuffer(
                int(hidden[a.kind]).to_bytes(a.size, 'little'), u8
            )
    return buf


def plain_layout(args: Sequence[Any]) -> list[Argument]:
    out, at = [], 0
    for v in args:
        size = 8 if getattr(v, 'ndim', 0) else 4
        size = len(v) if isinstance(v, (bytes, bytearray)) else size
        at = (at + min(size, 8) - 1) // min(size, 8) * min(size, 8)
        out.append(Argument(at, size))
        at += size
    return out
