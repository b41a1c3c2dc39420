"""How stored codes become operands of an MFMA, in registers, exactly.

A decoder takes 32-bit words and gives words of the target element, in the same order of codes.
Tables are made with the formats' own encoders, so a value is stated in one place.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import flydsl.expr as fx
import torch

from mixmoe.formats import Element, e2m1, e4m3fn, e4m3fnuz, int4, int8

Words = list[fx.Int32]
HIGH = -0x0F0F0F10  # a byte's upper nibble
SIGN = -0x7F7F7F80  # a byte's top bit


@dataclass(frozen=True, slots=True)
class Decoder:
    """``values = factor * decoded``. Each of ``parts`` makes some operand words of a stored one, so
    that the work can be spread between MFMAs; in order, they make all."""

    parts: tuple[Callable[[fx.Int32], Words], ...]
    factor: float = 1.0

    def decode(self, words: Words) -> Words:
        """All operand words of stored ones."""
        return [out for word in words for part in self.parts for out in part(word)]


def keep(word: fx.Int32) -> Words:
    """Codes that are operands already."""
    return [word]


def without_negative_zero(word: fx.Int32, low: int) -> fx.Int32:
    """The codes of a word, -0 as +0. ``low`` masks all bits but the signs: added to those bits it
    sets a sign's place unless they are zero."""
    rest = word & low
    return (word & (rest + low)) | rest


def clear_negative_zero(word: fx.Int32) -> Words:
    """e4m3fn as e4m3fnuz of half the value: the same bits, but 0x80, which is -0 there and NaN
    here."""
    return [without_negative_zero(word, 0x7F7F7F7F)]


def lower_int4(word: fx.Int32) -> Words:
    """int4 0..3 of the order v4v0 v5v1 v6v2 v7v3 to int8 of 16 times the value."""
    return [(word << 4) & HIGH]


def upper_int4(word: fx.Int32) -> Words:
    """The same of 4..7."""
    return [word & HIGH]


def table(source: Element, target: Element) -> list[list[int]]:
    """Byte b of the target's code for each of the 16 codes of a 4-bit element."""
    codes = torch.arange(16, dtype=torch.uint8)[:, None]
    values = source.decode(codes, torch.float32)[:, :1]
    raw = target.encode(values).contiguous().view(torch.uint8).reshape(16, -1)
    return raw.T.tolist()


def constant(values: list[int]) -> fx.Int32:
    """Four bytes as a word."""
    word = sum(value << 8 * i for i, value in enumerate(values))
    return fx.Int32(word - (1 << 32) if word >> 31 else word)


def permute(high: fx.Int32, low: fx.Int32, select: fx.Int32) -> fx.Int32:
    """Byte i is byte ``select[i]`` of the eight of low and high."""
    return fx.Int32(fx.rocdl.perm_b32(high, low, select))


def signed(plane: list[int]) -> bool:
    """Whether codes 8..15 are 0..7 with the top bit set, as in e2m1."""
    return all(plane[i + 8] == plane[i] | 0x80 for i in range(8))


def unsigned_zero(plane: list[int]) -> bool:
    """The same, but for a zero that has no sign."""
    return plane[0] == plane[8] == 0 and signed([*plane[:8], 0x80, *plane[9:]])


def look_up(word: fx.Int32, plane: list[int], upper: bool) -> fx.Int32:
    """The plane's byte for each of the codes 0..3, or 4..7, of a word v4v0 v5v1 v6v2 v7v3."""
    if not any(plane):
        return fx.Int32(0)
    if unsigned_zero(plane):
        word = without_negative_zero(word, 0x77777777)
    low = ((word >> 4) if upper else word) & 0x07070707
    first = permute(constant(plane[4:8]), constant(plane[:4]), low)
    if signed(plane) or unsigned_zero(plane):
        return first | ((word if upper else word << 4) & SIGN)
    if plane[8:] == plane[:8]:
        return first
    second = permute(constant(plane[12:]), constant(plane[8:12]), low)
    sign = ((word >> 5) if upper else (word >> 1)) & 0x04040404
    return permute(second, first, sign | 0x03020100)


def interleave(low: fx.Int32, high: fx.Int32) -> Words:
    """Bytes l0 h0 l1 h1 and l2 h2 l3 h3."""
    return [permute(high, low, fx.Int32(select)) for select in (0x05010400, 0x07030602)]


def from_table(source: Element, target: Element) -> tuple[Callable[[fx.Int32], Words], ...]:
    """The decoder of a 4-bit element in the order v4v0 v5v1 v6v2 v7v3: lower codes, upper ones."""
    planes = table(source, target)

    def half(upper: bool, word: fx.Int32) -> Words:
        found = [look_up(word, plane, upper) for plane in planes]
        return found if len(found) == 1 else interleave(*found)

    return partial(half, False), partial(half, True)


def scaled_bf16(word: fx.Int32, scale: fx.Float32) -> Words:
    """e2m1 in the order v4v0 v5v1 v6v2 v7v3 times a power of two, to bf16, exactly: bf16 has the
    exponents of float32. A conversion takes a byte, so pairs come out as 0 4, 1 5, 2 6, 3 7."""
    pairs = [
        fx.Vector(
            fx.rocdl.cvt_scalef32_pk_bf16_fp4(fx.BFloat16x2.ir_type, word, scale, byte)
        ).bitcast(fx.Int32)[0]
        for byte in range(4)
    ]
    return [
        permute(pairs[i + 1], pairs[i], fx.Int32(select))
        for select in (0x05040100, 0x07060302)  # low halves, high halves
        for i in (0, 2)
    ]


def in_order(source: Element, target: Element) -> Callable[[fx.Int32], Words]:
    """The decoder of a 4-bit element as tokens have it, the even k in the low nibble; to bytes."""
    (plane,) = table(source, target)
    return lambda word: interleave(*(look_up(word, plane, upper) for upper in (False, True)))


UNSIGNED = Decoder((keep,), 2.0)  # of e4m3fn as e4m3fnuz, where no -0 is stored


@cache
def weight_decoder(stored: Element, operand: Element) -> Decoder | None:
    """From weights to the MFMA's element; None where there is no exact way."""
    if stored is operand:
        return Decoder((keep,))
    if (stored, operand) == (e4m3fn, e4m3fnuz):
        return Decoder((clear_negative_zero,), 2.0)
    if (stored, operand) == (int4, int8):
        return Decoder((lower_int4, upper_int4), 1 / 16)
    if stored.bits == 4 and operand is not int8:
        return Decoder(from_table(stored, operand))
    return None


@cache
def token_decoder(stored: Element, operand: Element) -> Decoder | None:
    """From tokens in memory to the MFMA's element in LDS; None where there is no exact way."""
    if stored is operand:
        return Decoder((keep,))
    if (stored, operand) == (e4m3fn, e4m3fnuz):
        return Decoder((clear_negative_zero,), 2.0)
    if stored is e2m1 and operand.bits == 8 and operand is not int8:
        return Decoder((in_order(stored, operand),))
    return None
