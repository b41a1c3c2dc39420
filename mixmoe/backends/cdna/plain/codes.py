"""Float32 to codes on the device, bit for bit as ``Element.encode``: nearest even, saturated."""

from collections.abc import Callable

import flydsl.expr as fx

from mixmoe.backends.cdna.atoms import Atoms
from mixmoe.backends.cdna.origin import one_origin
from mixmoe.formats import Element, e2m1, e4m3fn, e4m3fnuz, int8

Four = list[fx.Float32]
Encoder = Callable[[Four], fx.Int32]


def clamp(values: Four, limit: float) -> Four:
    """To the finite range: the conversions make NaN of what lies beyond."""
    return [fx.max(fx.min(v, limit), -limit) for v in values]


@one_origin
def pack_fp8(v: Four) -> fx.Int32:
    """Four values to the GPU's own e4m3."""
    word = fx.Int32(0)
    for pair in range(2):
        low, high = v[2 * pair], v[2 * pair + 1]
        packed = fx.rocdl.cvt_pk_fp8_f32(fx.Int32.ir_type, low, high, word, bool(pair))
        word = fx.Int32(packed)
    return word


def native_fp8(largest: float) -> Encoder:
    """e4m3 as the GPU converts it."""
    return lambda values: pack_fp8(clamp(values, largest))


@one_origin
def fp8_by_fnuz(values: Four) -> fx.Int32:
    """e4m3fn where the GPU converts to e4m3fnuz: the code of half the value, and -0 its sign."""
    word = pack_fp8([v * 0.5 for v in clamp(values, e4m3fn.max)])
    for i, v in enumerate(values):
        word = word | ((fx.Uint32(v.bitcast(fx.Uint32)) >> 31) << (8 * i + 7)).bitcast(fx.Int32)
    return word


@one_origin
def to_int8(values: Four) -> fx.Int32:
    """Four bytes of rounded values."""
    word = fx.Int32(0)
    for i, v in enumerate(clamp(values, int8.max)):
        word = word | ((fx.math.roundeven(v).to(fx.Int32) & 0xFF) << 8 * i)
    return word


@one_origin
def to_e2m1(values: Four) -> fx.Int32:
    """16 bits, the first code lowest. The steps 1/2, 1 and 2 of |v| are three lines that cross
    where the step changes: the code is the least of them."""
    word = fx.Int32(0)
    for i, v in enumerate(clamp(values, e2m1.max)):
        a = abs(v)
        lines = (a * 2.0, 0.0), (a, 2.0), (a * 0.5, 4.0)
        least = [fx.math.roundeven(x) + base for x, base in lines]
        code = fx.min(fx.min(least[0], least[1]), fx.min(least[2], 7.0)).to(fx.Int32)
        sign = fx.Int32((fx.Uint32(v.bitcast(fx.Uint32)) >> 28).bitcast(fx.Int32)) & 8
        word = word | ((code | sign) << 4 * i)
    return word


def encoder(atoms: Atoms, element: Element) -> Encoder:
    """Four float32 to codes of an element on this GPU."""
    if element is int8:
        return to_int8
    if element is e2m1:
        return to_e2m1
    own = next(m.element for m in atoms.plain if m.element in (e4m3fn, e4m3fnuz))
    return native_fp8(element.max) if element is own else fp8_by_fnuz
