"""Architectural state of a batch: waves that walk the same path and execute each instruction as one
NumPy operation.

Layout: a vector register is an array (waves, 64) of uint32, *replaced, never changed in place*, so
that moves are free, a decoded matrix operand can be cached by the identity of its rows, and
"nothing wrote this register" is `row is fresh`. A scalar is a Python int while it is the same for
every wave of the batch and a uint64 array (waves,) when it is not; `norm` brings an array whose
entries agree back to an int.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import CdnaSimError
from .numerics import Array, i64, u8, u32, u64
from .rows import Rows, merge_rows, sorted_by

if TYPE_CHECKING:
    from .machine import Group

LANES = np.arange(64)
ALL = (1 << 64) - 1
M32 = 0xFFFFFFFF
VCC, M0, EXEC = 106, 124, 126
POISON = u32(
    0x7FBADBAD
)  # a NaN: what a register holds before its first write, and while a load is in flight
DEPTH = 8  # splits within splits before registers are copied
Scalar = Any  # int | uint64 array (waves,)
Row = Any  # uint32 array that broadcasts to (waves, 64)


def spread(x: Row, shape: tuple[int, int]) -> Row:
    """np.broadcast_to, without its overhead for one value and for whole rows."""
    if x.shape == shape:
        return x
    return np.ndarray(shape, x.dtype, x, 0, (0, 0)) if x.ndim == 0 else np.broadcast_to(x, shape)


def norm(x: Array) -> Scalar:
    """uint64[waves] -> int when all waves agree."""
    first = x[0]
    return int(first) if len(x) == 1 or (x == first).all() else x


def each(fn: Callable[..., int], *xs: Scalar) -> Scalar:
    """Apply a function on Python ints wave by wave; once when every argument is uniform."""
    n = next((len(x) for x in xs if type(x) is not int), 0)
    if not n:
        return fn(*xs)
    cols = [[x] * n if type(x) is int else x.tolist() for x in xs]
    return norm(np.array([fn(*row) & ALL for row in zip(*cols, strict=True)], u64))


def pair(lo: Scalar, hi: Scalar) -> Scalar:
    """Two 32-bit scalars -> one 64-bit scalar."""
    if type(lo) is int and type(hi) is int:
        return lo | hi << 32
    return (lo if type(lo) is not int else u64(lo)) | (
        (hi if type(hi) is not int else u64(hi)) << u64(32)
    )


def mask_to_bool(mask: Scalar, n: int) -> Array:
    """64-bit lane mask -> bool (waves, 64)."""
    if type(mask) is int:
        row = np.unpackbits(np.array([mask], u64).view(u8), bitorder='little').view(bool)
        return np.broadcast_to(row, (n, 64))
    bits = np.ascontiguousarray(mask).view(u8).reshape(n, 8)
    return np.unpackbits(bits, axis=1, bitorder='little').view(bool)


def bool_to_mask(b: Array) -> Scalar:
    """bool (waves, 64) -> 64-bit lane mask."""
    return norm(np.packbits(b, axis=1, bitorder='little').view(u64)[:, 0])


def signed(x: Scalar) -> Any:
    """32-bit scalar -> signed int or int64[waves]."""
    if type(x) is int:
        return x - (1 << 32) if x >> 31 else x
    return x.astype(u32).view(np.int32).astype(i64)


class Pending:
    """A memory operation that has been issued and has not landed.

    `land(batch, *args)` performs it. Arrays in `args` whose first axis is the batch's waves follow
    a split. `lds`: (offsets, bytes) of an LDS access; of an LDS instruction args[0] is the address
    and args[1] the lanes. `span`: where it lies, once flight.py asked.
    """

    __slots__ = ('land', 'args', 'pc', 'rows', 'sgprs', 'smem', 'lds', 'span')

    def __init__(
        self,
        land: Callable[..., None],
        args: tuple[Any, ...],
        pc: int,
        rows: tuple[int, int] = (0, 0),
        sgprs: tuple[int, int] = (0, 0),
        smem: bool = False,
        lds: tuple[list[int], int] | None = None,
    ):
        self.land, self.args, self.pc, self.rows, self.sgprs, self.smem = (
            land,
            args,
            pc,
            rows,
            sgprs,
            smem,
        )
        self.lds = lds
        self.span: tuple[Array, Array] | None = None

    def take(self, keep: Array, n: int) -> Pending:
        args = tuple(take(a, keep, n) for a in self.args)
        return self.like(args)

    def like(self, args: tuple[Any, ...]) -> Pending:
        """The same operation of other waves."""
        return Pending(self.land, args, self.pc, self.rows, self.sgprs, self.smem, self.lds)


def take(a: Any, keep: Array, n: int) -> Any:
    if isinstance(a, list):
        return [take(x, keep, n) for x in a]
    return a[keep] if isinstance(a, np.ndarray) and a.ndim and a.shape[0] == n else a


def join(xs: list[Any], sizes: list[int]) -> Any:
    """Concatenate one Pending argument or scalar over batches."""
    if isinstance(xs[0], list):
        return [join(list(col), sizes) for col in zip(*xs, strict=True)]
    if all(not isinstance(x, np.ndarray) for x in xs) and all(x == xs[0] for x in xs):
        return xs[0]
    xs = [True if x is None else x for x in xs]  # None stands for "every lane"
    dtype = next(x.dtype for x in xs if isinstance(x, np.ndarray))
    shape = next(x.shape[1:] for x in xs if isinstance(x, np.ndarray))
    return np.concatenate(
        [np.broadcast_to(np.asarray(x, dtype), (k, *shape)) for x, k in zip(xs, sizes, strict=True)]
    )


class Batch:
    """`group` holds what the waves share; `wg` is each wave's workgroup slot in it, `wave` its
    number there.
    """

    def __init__(self, group: Group, wg: Array, wave: Array, nregs: int):
        self.group, self.wg, self.wave = group, wg, wave
        self.n = len(wg)
        self.shape = (self.n, 64)
        self.fresh = np.full(self.shape, POISON, u32)
        self.v: list[Row] = [self.fresh] * nregs
        self.s: list[Scalar] = [int(POISON)] * 128
        self.scc: Scalar = 0
        self.mode: Scalar = 0
        self.pc = 0
        self.steps = 0
        self.vm: list[Pending] = []
        self.lgkm: list[Pending] = []
        self.hazard = group.hazard
        self.state = ''  # '' ready, 'barrier' or 'end'
        self.decoded: dict[Any, Any] = {}  # matrix operands by identity of their rows (isa/mfma.py)
        self.descriptors: dict[int, Any] = {}  # buffer resources by register (isa/vmem.py)
        self.path = 0  # number of the path in hazard mode (paths.py)
        self.states: Any = None  # its clock while a run of instructions is being checked
        self.trace: list[int] = []
        self.history: list[list[list[int]]] = [[] for _ in range(self.n)]
        self.parent: Batch | None = None  # where these waves split off, with the scalars of then
        self.start: list[Scalar] = []
        self.set_exec(ALL)

    # ---- masks and pairs
    def set_exec(self, mask: Scalar) -> None:
        if type(mask) is int:
            self.s[EXEC], self.s[EXEC + 1] = mask & M32, mask >> 32
            self.full = mask == ALL
        else:
            self.s[EXEC], self.s[EXEC + 1] = norm(mask & u64(M32)), norm(mask >> u64(32))
            self.full = False
        self.m = mask_to_bool(mask, self.n)  # replaced, never changed in place
        self.active: Array | None = None

    def exec64(self) -> Scalar:
        return pair(self.s[EXEC], self.s[EXEC + 1])

    def vcc64(self) -> Scalar:
        return pair(self.s[VCC], self.s[VCC + 1])

    def lanes(self) -> Array:
        """Flat indices wave * 64 + lane of the active lanes."""
        if self.active is None:
            self.active = np.flatnonzero(self.m)
        return self.active

    # ---- writes
    def put(self, i: int, x: Row) -> None:
        """EXEC-masked write of one vector register."""
        if self.full:
            self.v[i] = spread(x, self.shape)
        else:
            self.v[i] = np.where(self.m, x, self.v[i])

    def put_masked(self, i: int, x: Row, mask: Array) -> None:
        self.v[i] = np.where(mask, x, self.v[i])

    # ---- memory operations in flight
    def wait(self, queue: list[Pending], left: int) -> None:
        while len(queue) > left:
            op = queue.pop(0)
            try:
                op.land(self, *op.args)
            except CdnaSimError as e:
                e.issued = op.pc
                raise

    def drain(self) -> None:
        self.wait(self.vm, 0)
        self.wait(self.lgkm, 0)

    # ---- divergence
    def subset(self, keep: Array) -> Batch:
        """The waves selected by the index array `keep`, as a batch of their own."""
        b = Batch(self.group, self.wg[keep], self.wave[keep], 0)
        rows = Rows(self.v, keep, self.fresh, b.fresh)
        b.s = [x if type(x) is int else norm(x[keep]) for x in self.s]
        if rows.depth > DEPTH:
            b.v = list(iter(rows))
        else:
            b.v, b.parent, b.start = rows, self, list(b.s)
        b.scc, b.mode = (x if type(x) is int else norm(x[keep]) for x in (self.scc, self.mode))
        b.pc, b.state, b.steps = self.pc, self.state, self.steps
        b.vm = [p.take(keep, self.n) for p in self.vm]
        b.lgkm = [p.take(keep, self.n) for p in self.lgkm]
        b.path = self.path
        b.history = [[*self.history[k], self.trace] for k in keep.tolist()]
        b.set_exec(b.exec64())
        return b

    def can_merge(self, other: Batch) -> bool:
        def key(b: Batch) -> Any:
            return b.pc, b.state, [p.pc for p in b.vm], [p.pc for p in b.lgkm]

        return key(self) == key(other)

    @staticmethod
    def merge(batches: list[Batch]) -> Batch:
        """Batches at one place (see can_merge) -> one batch, in order of workgroup and wave."""
        first, sizes = batches[0], [b.n for b in batches]
        wg, wave = (np.concatenate([getattr(b, k) for b in batches]) for k in ('wg', 'wave'))
        found = np.lexsort((wave, wg))
        order = None if (np.diff(found) == 1).all() else found
        out = Batch(first.group, sorted_by(wg, order), sorted_by(wave, order), 0)
        out.v, out.fresh = merge_rows(
            [b.v for b in batches], [b.fresh for b in batches], order, out.fresh
        )
        out.s = merge_scalars(batches, sizes, order)
        parent = first.parent
        if parent is not None and out.n == len(parent.wg) and out.fresh is parent.fresh:
            out.parent, out.start = parent.parent, parent.start
        out.scc, out.mode = (
            join_scalar([getattr(b, k) for b in batches], sizes, order) for k in ('scc', 'mode')
        )
        out.pc, out.state, out.steps = first.pc, first.state, max(b.steps for b in batches)
        for name in ('vm', 'lgkm'):
            for ps in zip(*[getattr(b, name) for b in batches], strict=True):
                args = tuple(
                    join(list(col), sizes) for col in zip(*[p.args for p in ps], strict=True)
                )
                p = ps[0].like(args)
                getattr(out, name).append(p if order is None else p.take(order, out.n))
        out.path = first.path
        history = [[*h, b.trace] for b in batches for h in b.history]
        out.history = history if order is None else [history[k] for k in order.tolist()]
        out.set_exec(out.exec64())
        return out


def merge_scalars(batches: list[Batch], sizes: list[int], order: Array | None) -> list[Scalar]:
    """Scalars of the merged batch; one that no part wrote since they left their parent is its."""
    parent = batches[0].parent
    together = parent is not None and all(b.parent is parent for b in batches)
    if parent is None or not together or sum(sizes) < len(parent.wg):
        return [join_scalar(xs, sizes, order) for xs in zip(*[b.s for b in batches], strict=True)]
    kept = [all(b.s[k] is b.start[k] for b in batches) for k in range(len(parent.s))]
    return [
        parent.s[k] if same else join_scalar([b.s[k] for b in batches], sizes, order)
        for k, same in enumerate(kept)
    ]


def join_scalar(xs: Any, sizes: list[int], order: Array | None) -> Scalar:
    if all(type(x) is int for x in xs) and len(set(xs)) == 1:
        return xs[0]
    columns = [np.full(k, x, u64) if type(x) is int else x for x, k in zip(xs, sizes, strict=True)]
    return norm(sorted_by(np.concatenate(columns), order))
