"""The layout algebra against brute force; every property is shown to catch a broken version."""

import itertools
import math
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from mixmoe import layout as la
from mixmoe.errors import MixMoEError
from mixmoe.layout import Layout, Swizzle, arrange, concat, flatten, product

POW2, SMALL, STRIDE = st.sampled_from([1, 2, 4, 8]), st.integers(1, 4), st.integers(0, 9)


def shapes(leaf):
    nest = st.lists(leaf, min_size=1, max_size=2).map(tuple)
    return st.one_of(leaf, st.lists(st.one_of(leaf, nest), min_size=1, max_size=3).map(tuple))


def like(shape, strides):
    return next(strides) if isinstance(shape, int) else tuple(like(s, strides) for s in shape)


@st.composite
def layouts(draw, leaf=SMALL, stride=STRIDE):
    shape = draw(shapes(leaf))
    count = len(flatten(shape))
    return Layout(shape, like(shape, iter(draw(st.lists(stride, min_size=count, max_size=count)))))


@st.composite
def permutations(draw, leaf=POW2):
    """A nested layout that reaches 0 .. size-1 once."""
    shape = draw(shapes(leaf))
    sizes = flatten(shape)
    order = draw(st.permutations(range(len(sizes))))
    strides, reached = [0] * len(sizes), 1
    for i in order:
        strides[i], reached = reached, reached * sizes[i]
    return Layout(shape, like(shape, iter(strides)))


@st.composite
def gapped(draw, leaf=SMALL, gap=SMALL):
    """A layout whose strides nest with gaps, in any order, and a size it divides."""
    sizes = draw(st.lists(leaf, min_size=1, max_size=3))
    strides, reached = [], 1
    for size in sizes:
        strides.append(reached * draw(gap))
        reached = strides[-1] * size
    order = draw(st.permutations(range(len(sizes))))
    made = Layout(tuple(sizes[i] for i in order), tuple(strides[i] for i in order))
    return made, reached * draw(st.integers(1, 3))


def coordinates(shape):
    """Every coordinate, first mode fastest, by enumeration."""
    if isinstance(shape, int):
        return list(range(shape))
    back = itertools.product(*(coordinates(s) for s in reversed(shape)))
    return [tuple(reversed(c)) for c in back]


def dot(coord, stride):
    if isinstance(coord, int):
        return coord * stride
    return sum(map(dot, coord, stride))


# Each property takes the function under test and a hypothesis data object.
def crd2idx_property(crd2idx, data):
    x = data.draw(layouts())
    for number, coord in enumerate(coordinates(x.shape)):
        assert crd2idx(coord, x.shape, x.stride) == dot(coord, x.stride)
        assert crd2idx(number, x.shape, x.stride) == dot(coord, x.stride)


def idx2crd_property(idx2crd, data):
    shape = data.draw(shapes(st.integers(1, 5)))
    assert [idx2crd(i, shape) for i in range(product(shape))] == coordinates(shape)


def cosize_property(cosize, data):
    x = data.draw(layouts())
    assert cosize(x) == 1 + max(x.offsets())


def permutation_property(is_permutation, data):
    x = data.draw(st.one_of(layouts(), permutations()))
    assert is_permutation(x) == (sorted(x.offsets()) == list(range(x.size)))


def coalesce_property(coalesce, data):
    x = data.draw(st.one_of(layouts(), permutations()))
    y = coalesce(x)
    assert list(y.offsets()) == list(x.offsets())
    assert all(b[1] != a[0] * a[1] for a, b in itertools.pairwise(y.flat))


def compose_property(compose, data):
    """Over powers of two that nest it always exists; elsewhere it may refuse, never be wrong."""
    sure = data.draw(st.booleans())
    outer = data.draw(layouts(POW2 if sure else st.integers(1, 6)))
    inner = data.draw(permutations() if sure else layouts(st.sampled_from([1, 2, 4])))
    assume(inner.cosize <= outer.size)
    try:
        both = compose(outer, inner)
    except MixMoEError:
        assert not sure
        return
    assert list(both.offsets()) == [outer(inner(i)) for i in range(inner.size)]
    assert both.rank == inner.rank or isinstance(inner.shape, int)


def complement_property(complement, data):
    x, size = data.draw(gapped())
    rest = complement(x, size)
    assert sorted(concat(x, rest).offsets()) == list(range(size))
    assert list(rest.offsets()) == sorted(rest.offsets())


def divide_property(divide, data):
    x = data.draw(layouts(POW2))
    log = int(math.log2(x.size))
    stride = data.draw(st.integers(0, log))
    tile = Layout(1 << data.draw(st.integers(0, log - stride)), 1 << stride)
    inside, which = divide(x, tile).modes
    assert [inside(i) for i in range(tile.size)] == [x(tile(i)) for i in range(tile.size)]
    starts = [i for i in range(x.size) if i // tile.stride % tile.size == 0]
    assert list(which.offsets()) == [x(i) for i in starts]


def zipped_divide_property(zipped_divide, data):
    rows, cols = data.draw(POW2), data.draw(POW2)
    x = Layout((8, 16), (data.draw(st.integers(1, 20)), data.draw(st.integers(1, 20))))
    inside, which = zipped_divide(x, Layout(rows, 1), Layout(cols, 1)).modes
    for i, j in itertools.product(range(8), range(16)):
        at = inside((i % rows, j % cols)) + which((i // rows, j // cols))
        assert at == x(i, j)


def repeat_property(repeat, data):
    x, _ = data.draw(gapped(POW2, POW2))
    over = data.draw(permutations())
    assume(x.cosize * over.size < 1 << 12)
    copies = repeat(x, over)
    assert list(copies[0].offsets()) == list(x.offsets())
    gaps = [o for o in range(2 * x.cosize * over.size) if not shadowed(o, x)]
    assert list(copies[1].offsets()) == [gaps[over(i)] for i in range(over.size)]
    assert len(set(copies.offsets())) == copies.size


def shadowed(offset: int, x: Layout) -> bool:
    """Whether ``offset`` has a digit that ``x`` owns: copies start at the others."""
    return any(offset // d % s for s, d in x.flat)


def inverse_property(right_inverse, data):
    x = data.draw(st.one_of(permutations(st.integers(1, 4)), layouts()))
    back = right_inverse(x)
    assert [x(back(i)) for i in range(back.size)] == list(range(back.size))
    if sorted(x.offsets()) == list(range(x.size)):
        assert back.size == x.size


def coarsen_property(coarsen, data):
    unit = data.draw(st.sampled_from([1, 2, 4]))
    x = data.draw(permutations())
    x = Layout((unit * 2, x.shape), (1, like(x.shape, iter(2 * unit * d for _, d in x.flat))))
    y = coarsen(x, unit)
    assert [unit * y(i) for i in range(y.size)] == [x(i * unit) for i in range(y.size)]


def swizzle_property(swizzle, data):
    bits = data.draw(st.integers(0, 3))
    base, shift = data.draw(st.integers(0, 3)), data.draw(st.integers(bits, 4))
    made = swizzle(bits, base, shift)
    domain = range(1 << (base + shift + bits))
    for x in domain:
        digits = [x >> i & 1 for i in range(12)]
        for i in range(base, base + bits):
            digits[i] ^= x >> (i + shift) & 1
        assert made(x) == sum(d << i for i, d in enumerate(digits))
        assert made(made(x)) == x
    assert sorted(map(made, domain)) == list(domain)


def pow2_property(divide_by, data):
    x, n = data.draw(st.integers(0, 1 << 40)), 1 << data.draw(st.integers(0, 20))
    assert divide_by(x, n) == (x // n, x % n)


def arrange_property(make, data):
    names = data.draw(st.lists(st.sampled_from("abcdef"), min_size=2, max_size=5, unique=True))
    cut, stored = data.draw(st.integers(1, len(names) - 1)), data.draw(st.permutations(names))
    sizes = {n: data.draw(st.integers(1, 3)) for n in names}
    pattern = f"({' '.join(names[:cut])}) ({' '.join(names[cut:])}) -> {' '.join(stored)}"
    x = make(pattern, sizes)
    assert x.is_permutation()
    for digits in itertools.product(*(range(sizes[n]) for n in names)):
        value = dict(zip(names, digits, strict=True))
        row, col, place = (mixed(part, value, sizes) for part in (names[:cut], names[cut:], stored))
        assert x(row, col) == place


def mixed(names, value, sizes):
    number = 0
    for n in names:
        number = number * sizes[n] + value[n]
    return number


def no_swizzle(bits, base, shift):
    return lambda x: x ^ (x >> shift & (1 << bits) - 1)


def row_major(index, shape):
    if isinstance(shape, int):
        return index
    parts = []
    for part in reversed(shape[1:]):
        parts.append(row_major(index % product(part), part))
        index //= product(part)
    return (row_major(index, shape[0]), *reversed(parts))


def linear_compose(a, b):
    return Layout(b.shape, like(b.shape, iter(a(d) for _, d in b.flat)))


def merge_all(x):
    return Layout(x.size, x.flat[0][1])


def swapped(f):
    """Mode 0 for mode 1."""
    return lambda *args: concat(*reversed(f(*args).modes))


PROPERTIES: dict[str, tuple[Callable, Callable, Callable]] = {
    "crd2idx": (crd2idx_property, la.crd2idx, lambda c, s, d: la.crd2idx(c, s, d) + (c == 3)),
    "idx2crd": (idx2crd_property, la.idx2crd, row_major),
    "cosize": (cosize_property, lambda x: x.cosize, lambda x: x.size),
    "is_permutation": (
        permutation_property, Layout.is_permutation, lambda x: x.cosize >= x.size,
    ),
    "coalesce": (coalesce_property, la.coalesce, merge_all),
    "compose": (compose_property, la.compose, linear_compose),
    "complement": (complement_property, la.complement, lambda x, n: Layout(n // x.size, x.cosize)),
    "divide": (divide_property, la.divide, swapped(la.divide)),
    "zipped_divide": (zipped_divide_property, la.zipped_divide, swapped(la.zipped_divide)),
    "repeat": (
        repeat_property, la.repeat, lambda x, o: concat(x, la.compose(Layout(99, x.size), o)),
    ),
    "right_inverse": (inverse_property, la.right_inverse, lambda x: x),
    "coarsen": (coarsen_property, la.coarsen, lambda x, unit: x),
    "swizzle": (swizzle_property, Swizzle, no_swizzle),
    "div_mod": (pow2_property, la.div_mod, lambda x, n: (x >> n.bit_length(), x & (n - 1))),
    "pow2": (
        pow2_property,
        lambda x, n: (la.div_pow2(x, n), la.mod_pow2(x, n)),
        lambda x, n: (la.div_pow2(x, n), x & n),
    ),
    "arrange": (
        arrange_property, arrange, lambda p, s: arrange(p.split("->")[0] + "->" + " ".join(
            reversed(p.split("->")[1].split())), s),
    ),
}
QUIET = [HealthCheck.too_slow, HealthCheck.filter_too_much]


def run(prop, function, examples, **options):
    @settings(max_examples=examples, deadline=None, suppress_health_check=QUIET, **options)
    @given(st.data())
    def inner(data):
        prop(function, data)

    inner()


@pytest.mark.parametrize("name", PROPERTIES)
def test_property(name):
    prop, function, _ = PROPERTIES[name]
    run(prop, function, 150)


@pytest.mark.parametrize("name", PROPERTIES)
def test_property_catches_a_mutation(name):
    prop, _, mutant = PROPERTIES[name]
    with pytest.raises(AssertionError):
        run(prop, mutant, 500, phases=[Phase.generate], derandomize=True)


def test_printing_and_parts():
    x = arrange("(i r) (j c) -> i j r c", {"i": 2, "j": 4, "r": 16, "c": 32})
    assert str(x) == "((16,2),(32,4)):((32,2048),(1,512))"
    assert (x.rank, x.size, x.cosize) == (2, 4096, 4096)
    assert str(x[0]) == "(16,2):(32,2048)" and x(17, 33) == 2048 + 32 + 512 + 1
    assert str(Swizzle(3, 4, 3)) == "Swizzle<3,4,3>" and len({x, x}) == 1


@pytest.mark.parametrize(
    "call",
    [
        lambda: la.log2_exact(12),
        lambda: la.div_pow2(5, 0),
        lambda: Layout((2, 3), (1,)),
        lambda: Layout(0, 1),
        lambda: Layout(2, -1),
        lambda: la.crd2idx((1, 2, 3), (4, 4), (1, 4)),
        lambda: la.crd2idx((1, 2), 4, 1),
        lambda: la.compose(Layout(4, 1), Layout(8, 1)),
        lambda: la.compose(Layout((4, 3), (3, 1)), Layout(2, 3)),
        lambda: la.complement(Layout((2, 3), (1, 3)), 12),
        lambda: la.complement(Layout(4, 1), 6),
        lambda: la.zipped_divide(Layout((4, 4), (1, 4)), Layout(2, 1)),
        lambda: la.coarsen(Layout((4, 4), (4, 2)), 2),
        lambda: la.coarsen(Layout((2, 3), (1, 3)), 2),
        lambda: Swizzle(3, 0, 2),
        lambda: arrange("(a b) (c) -> a b", {"a": 1, "b": 1, "c": 1}),
        lambda: arrange("(a) (b) -> b a", {"a": 2}),
    ],
)
def test_refusals(call):
    with pytest.raises(MixMoEError):
        call()
