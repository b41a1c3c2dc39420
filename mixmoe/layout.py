"""Layout algebra on plain integers: where the element at a coordinate sits.

A layout is a function from coordinates to offsets, written ``shape:stride`` with the same nesting
on both sides. ``(4,8):(8,1)`` is a row-major 4 x 8 matrix: ``(i, j) -> 8 i + j``. A mode that is
itself a tuple has several strides: ``((16,2),32):((32,2048),1)`` holds rows 0..15 at stride 32
and rows 16..31 from 2048 on. The first mode counts fastest: a plain integer is turned into a
coordinate from left to right (colexicographic), so every layout is also a function of one integer.

The algebra is that of CuTe (NVIDIA CUTLASS 3, `media/docs/cpp/cute/02_layout_algebra.md`). Sizes
and strides are non-negative; what a function cannot express is refused with MixMoEError.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

from mixmoe.errors import MixMoEError

IntTuple = int | tuple["IntTuple", ...]


def log2_exact(n: int) -> int:
    """The power of a power of two. Raises MixMoEError for any other ``n``."""
    if n < 1 or n & (n - 1):
        raise MixMoEError("a shift needs a power of two", n, 1 << max(n, 1).bit_length() - 1)
    return n.bit_length() - 1


def div_pow2(x: int, n: int) -> int:
    """``x // n`` as a shift; ``n`` is a power of two and ``x`` may be a value of a kernel DSL."""
    return x >> log2_exact(n)


def mod_pow2(x: int, n: int) -> int:
    """``x % n`` as a mask; ``n`` is a power of two and ``x`` may be a value of a kernel DSL."""
    return x & ((1 << log2_exact(n)) - 1)


def div_mod(x: int, n: int) -> tuple[int, int]:
    """``x // n, x % n``: shift and mask where ``n`` is a power of two, else a division."""
    if n & (n - 1) == 0:
        return div_pow2(x, n), mod_pow2(x, n)
    return x // n, x % n


def flatten(t: IntTuple) -> tuple[int, ...]:
    """The leaves of a nested tuple, left to right."""
    if isinstance(t, int):
        return (t,)
    return tuple(leaf for part in t for leaf in flatten(part))


def product(t: IntTuple) -> int:
    """The product of the leaves: the number of coordinates of a shape."""
    result = 1
    for leaf in flatten(t):
        result *= leaf
    return result


def _congruent(a: IntTuple, b: IntTuple) -> bool:
    if isinstance(a, int) or isinstance(b, int):
        return isinstance(a, int) and isinstance(b, int)
    return len(a) == len(b) and all(map(_congruent, a, b))


def crd2idx(coord: IntTuple, shape: IntTuple, stride: IntTuple) -> int:
    """Offset of ``coord``: ``sum(c_i * d_i)`` over the leaves.

    Wherever the coordinate is an integer and the shape a tuple, the integer is split first.
    ``crd2idx((1, 5), (4, 8), (8, 1)) = 13`` and ``crd2idx(21, (4, 8), (8, 1)) = 13``.
    """
    if isinstance(shape, int) and isinstance(stride, int):
        if isinstance(coord, tuple):
            raise MixMoEError(f"coordinate must fit shape {shape}", coord)
        return coord * stride
    if not isinstance(shape, tuple) or not isinstance(stride, tuple):
        raise MixMoEError("shape and stride must nest alike", f"{shape}:{stride}")
    if not isinstance(coord, tuple):
        coord = idx2crd(coord, shape)
    if not isinstance(coord, tuple) or len(coord) != len(shape):
        raise MixMoEError(f"coordinate must fit shape {shape}", coord)
    return sum(crd2idx(c, s, d) for c, s, d in zip(coord, shape, stride, strict=True))


def idx2crd(index: int, shape: IntTuple) -> IntTuple:
    """The coordinate with number ``index``, first mode fastest: ``idx2crd(21, (4, 8)) = (1, 5)``.

    The last leaf takes what is left, as in CuTe. Power-of-two sizes use shift and mask only.
    """
    if isinstance(shape, int):
        return index
    parts: list[IntTuple] = []
    for part in shape[:-1]:
        index, low = div_mod(index, product(part))
        parts.append(idx2crd(low, part))
    return (*parts, idx2crd(index, shape[-1])) if shape else ()


@dataclass(frozen=True, slots=True)
class Layout:
    """A function from coordinates to offsets; see the module's text. Hashable, printable."""

    shape: IntTuple
    stride: IntTuple

    def __post_init__(self) -> None:
        if not _congruent(self.shape, self.stride):
            raise MixMoEError("shape and stride must nest alike", f"{self}")
        if any(s < 1 for s in flatten(self.shape)) or any(d < 0 for d in flatten(self.stride)):
            raise MixMoEError("sizes are positive and strides not negative", f"{self}")

    def __call__(self, *coord: IntTuple) -> int:
        """Offset of a coordinate, given as one integer or as one argument for each mode."""
        return crd2idx(coord[0] if len(coord) == 1 else coord, self.shape, self.stride)

    def __str__(self) -> str:
        return f"{self.shape}:{self.stride}".replace(" ", "")

    def __getitem__(self, mode: int) -> "Layout":
        return self.modes[mode]

    @property
    def modes(self) -> tuple["Layout", ...]:
        """The top-level modes, each a layout."""
        if isinstance(self.shape, int) or isinstance(self.stride, int):
            return (self,)
        return tuple(map(Layout, self.shape, self.stride))

    @property
    def flat(self) -> tuple[tuple[int, int], ...]:
        """The leaves as (size, stride)."""
        return tuple(zip(flatten(self.shape), flatten(self.stride), strict=True))

    @property
    def rank(self) -> int:
        """Number of top-level modes."""
        return len(self.modes)

    @property
    def size(self) -> int:
        """Number of coordinates."""
        return product(self.shape)

    @property
    def cosize(self) -> int:
        """One more than the largest offset."""
        return 1 + sum((s - 1) * d for s, d in self.flat)

    def offsets(self) -> Iterator[int]:
        """The offset of every coordinate, in counting order."""
        return (self(i) for i in range(self.size))

    def is_permutation(self) -> bool:
        """Whether the offsets are 0 .. size-1, each once: a layout that only reorders."""
        expect = 1
        for size, stride in sorted((m for m in self.flat if m[0] > 1), key=lambda m: m[1]):
            if stride != expect:
                return False
            expect *= size
        return True


def compact(shape: IntTuple) -> Layout:
    """The identity on integers: strides are the running products, first mode fastest."""
    stride, _ = _running(shape, 1)
    return Layout(shape, stride)


def _running(shape: IntTuple, start: int) -> tuple[IntTuple, int]:
    if isinstance(shape, int):
        return start, start * shape
    strides: list[IntTuple] = []
    for part in shape:
        stride, start = _running(part, start)
        strides.append(stride)
    return tuple(strides), start


def _of(modes: "list[tuple[int, int]] | tuple[tuple[int, int], ...]") -> Layout:
    if len(modes) == 1:
        return Layout(*modes[0])
    if not modes:
        return Layout(1, 0)
    return Layout(tuple(s for s, _ in modes), tuple(d for _, d in modes))


def concat(*layouts: Layout) -> Layout:
    """One layout with the given layouts as its modes."""
    return Layout(tuple(x.shape for x in layouts), tuple(x.stride for x in layouts))


def coalesce(layout: Layout) -> Layout:
    """The flattest layout that is the same function of one integer."""
    merged: list[tuple[int, int]] = []
    for size, stride in layout.flat:
        if size == 1:
            continue
        if merged and stride == merged[-1][0] * merged[-1][1]:
            merged[-1] = merged[-1][0] * size, merged[-1][1]
        else:
            merged.append((size, stride))
    return _of(merged)


def _nests(layout: Layout) -> bool:
    """Whether each stride is a multiple of what the smaller ones span: digits, no carries."""
    spans = sorted((d, s * d) for s, d in layout.flat if s > 1 and d > 0)
    return all(b[0] % a[1] == 0 for a, b in pairwise(spans))


def compose(outer: Layout, inner: Layout) -> Layout:
    """``R(c) = outer(inner(c))``, with the shape of ``inner`` (its leaves may split further).

    Raises MixMoEError where the result is no layout, or where ``inner`` leaves outer's domain.
    """
    if inner.cosize > outer.size:
        raise MixMoEError(f"{inner} must stay inside {outer}", inner.cosize, f"<= {outer.size}")
    source = coalesce(outer)
    # Modes compose one by one only where their offsets add up without a carry between outer's.
    if inner.cosize > source.flat[0][0] and not _nests(inner):
        raise MixMoEError(f"the strides of {inner} must nest to compose with {outer}", inner.stride)
    return _compose(source, inner)


def _compose(outer: Layout, inner: Layout) -> Layout:
    if isinstance(inner.shape, tuple):
        return concat(*(_compose(outer, mode) for mode in inner.modes))
    (count, step), *_ = inner.flat
    if count == 1 or step == 0:
        return Layout(count, 0)
    taken: list[tuple[int, int]] = []
    for size, stride in outer.flat[:-1]:
        if size % step and step % size:
            raise MixMoEError(f"stride of {inner} must divide the modes of {outer}", step)
        have = min(max(size // step, 1), count)
        if count % have:
            raise MixMoEError(f"size of {inner} must divide over the modes of {outer}", count)
        if have > 1:
            taken.append((have, step * stride))
        count, step = count // have, -(-step // size)
    if count > 1:
        taken.append((count, step * outer.flat[-1][1]))
    return _of(taken)


def complement(layout: Layout, size: int) -> Layout:
    """What ``layout`` leaves out of ``0 .. size-1``.

    ``concat(layout, complement(layout, size))`` reaches every offset below ``size`` once. Raises
    MixMoEError where the gaps are not regular.
    """
    gaps: list[tuple[int, int]] = []
    reached = 1
    for count, stride in sorted((m for m in layout.flat if m[0] > 1), key=lambda m: m[1]):
        if stride < reached or stride % reached:
            raise MixMoEError(f"{layout} has no complement: strides must nest", stride, reached)
        gaps.append((stride // reached, reached))
        reached = stride * count
    if size % reached:
        raise MixMoEError(f"the complement of {layout} needs a multiple of {reached}", size)
    gaps.append((size // reached, reached))
    return coalesce(_of(gaps))


def divide(layout: Layout, tile: Layout) -> Layout:
    """Split into ``(inside a tile, which tile)``: ``compose(layout, (tile, rest of tile))``."""
    return compose(layout, concat(tile, complement(tile, layout.size)))


def zipped_divide(layout: Layout, *tiles: Layout) -> Layout:
    """Divide each top-level mode by its tile: ``((tile0, tile1, ..), (rest0, rest1, ..))``."""
    if len(tiles) != layout.rank:
        raise MixMoEError(f"one tile for each mode of {layout}", len(tiles), layout.rank)
    parts = [divide(mode, tile).modes for mode, tile in zip(layout.modes, tiles, strict=True)]
    return concat(concat(*(p[0] for p in parts)), concat(*(p[1] for p in parts)))


def repeat(layout: Layout, over: Layout) -> Layout:
    """The product: ``layout`` repeated over ``over``; mode 0 inside a copy, mode 1 which copy."""
    reach = max(size * stride if size > 1 else 1 for size, stride in layout.flat)
    rest = complement(layout, reach * over.cosize)
    return concat(layout, compose(rest, over))


def right_inverse(layout: Layout) -> Layout:
    """The layout ``R`` with ``layout(R(i)) == i``, for as many ``i`` from 0 as it reaches.

    Of a permutation it is the whole inverse: from a storage offset back to the coordinate.
    """
    ordinal, _ = _running(flatten(layout.shape), 1)
    steps = sorted(
        (stride, size, step)
        for (size, stride), step in zip(layout.flat, flatten(ordinal), strict=True)
        if size > 1
    )
    found: list[tuple[int, int]] = []
    reached = 1
    for stride, size, step in steps:
        if stride != reached:
            break
        found.append((size, step))
        reached *= size
    return coalesce(_of(found))


def coarsen(layout: Layout, unit: int) -> Layout:
    """The same layout counted in units of ``unit`` neighbours, as when 4-bit codes are moved as
    16-bit words: the mode of stride 1 shrinks, every other stride is divided.

    Raises MixMoEError where a unit is not contiguous.
    """
    if unit == 1:
        return layout

    def part(shape: IntTuple, stride: IntTuple) -> tuple[IntTuple, IntTuple]:
        if isinstance(shape, tuple) and isinstance(stride, tuple):
            pairs = [part(s, d) for s, d in zip(shape, stride, strict=True)]
            return tuple(s for s, _ in pairs), tuple(d for _, d in pairs)
        size, step = product(shape), product(stride)
        if size == 1 or (step == 1 and size % unit == 0):
            return -(-size // unit), 1 if size > 1 else 0
        if step % unit:
            raise MixMoEError(f"units of {unit} must be contiguous in {layout}", f"{size}:{step}")
        return size, step // unit

    if not any(s % unit == 0 and d == 1 for s, d in layout.flat):
        raise MixMoEError(f"units of {unit} must be contiguous", f"{layout}")
    return Layout(*part(layout.shape, layout.stride))


@dataclass(frozen=True, slots=True)
class Swizzle:
    """XOR of address bits against bank conflicts: ``x ^ ((x >> shift) & mask)``.

    ``mask`` is the ``bits`` bits from bit ``base`` on. Its own inverse, so ``shift >= bits``.
    ``Swizzle(3, 4, 3)`` is the 128-byte swizzle of Hopper's TMA on byte addresses.
    """

    bits: int
    base: int
    shift: int

    def __post_init__(self) -> None:
        if min(self.bits, self.base) < 0 or self.shift < self.bits:
            raise MixMoEError("a swizzle has bits, base >= 0 and shift >= bits", f"{self}")

    def __call__(self, offset: int) -> int:
        """The offset after the XOR; also for values of a kernel DSL."""
        return offset ^ ((offset >> self.shift) & (((1 << self.bits) - 1) << self.base))

    def __str__(self) -> str:
        return f"Swizzle<{self.bits},{self.base},{self.shift}>"


def arrange(pattern: str, sizes: Mapping[str, int]) -> Layout:
    """A reordering written as names: ``"(logical axes) (..) -> storage order"``.

    On both sides the slowest name comes first, as in a loop nest or in ``einops``:
    ``arrange("(i r) (j c) -> i j r c", {"i": 2, "j": 4, "r": 16, "c": 32})`` stores a 32 x 128
    matrix as 16 x 32 tiles, row-major in and over the tiles. The result has one mode for each
    bracket and is a permutation: ``((16,2),(32,4)):((32,2048),(1,512))``.
    """
    logical, arrow, stored = pattern.partition("->")
    axes = [axis.split() for axis in logical.replace("(", " ").split(")") if axis.strip()]
    names, order = [name for axis in axes for name in axis], stored.split()
    if not arrow or sorted(names) != sorted(order) or len(set(names)) != len(names):
        raise MixMoEError("a pattern names each part once on each side of ->", pattern)
    stride: dict[str, int] = {}
    reached = 1
    for name in reversed(order):
        if sizes.get(name, 0) < 1:
            raise MixMoEError(f"part {name!r} of {pattern!r} needs a size", sizes.get(name))
        stride[name], reached = reached, reached * sizes[name]
    return Layout(
        tuple(tuple(sizes[n] for n in reversed(axis)) for axis in axes),
        tuple(tuple(stride[n] for n in reversed(axis)) for axis in axes),
    )
