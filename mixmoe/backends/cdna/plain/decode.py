"""How stored codes become operands of an MFMA, in registers, exactly.

A decoder takes 32-bit words and gives words of the target element, in the same order of codes.
Tables are made with the formats' own encoders, so a value is stated in one place.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import flydsl.expr as fx
import torch

from mixmoe.formats import Element, e2m1, e4m3fn, e4m3fnuz, int4, int8

Words = list[fx.Int32]
LOW, HIGH = 0x0F0F0F0F, -0x0F0F0F10  # a byte's nibbles
SIGN = -0x7F7F7F80  # a byte's top bit


@dataclass(frozen=True, slots=True)
class Decoder:
    """``values = factor * decoded``. ``words(list)`` decodes a run of codes."""

    words: Callable[[Words], Words]
    factor: float = 1.0


def keep(words: Words) -> Words:
    """Codes that are operands already."""
    return words


def clear_negative_zero(words: Words) -> Words:
    """e4m3fn as e4m3fnuz of half the value: the same bits, but 0x80, which is -0 there and NaN
    here. Adding 0x7F to its low seven bits sets a byte's top bit unless those bits are zero."""
    return [w & (((w & 0x7F7F7F7F) + 0x7F7F7F7F) | 0x7F7F7F7F) for w in words]


def widen_int4(words: Words) -> Words:
    """int4 in the order v4v0 v5v1 v6v2 v7v3 to int8 of 16 times the value: two masks."""
    return [x & HIGH for w in words for x in (w << 4, w)]


def nibbles(word: fx.Int32) -> Words:
    """Codes 0..3 and 4..7 of a word v4v0 v5v1 v6v2 v7v3, a byte each."""
    return [word & LOW, (word >> 4) & LOW]


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


def look_up(codes: fx.Int32, values: list[int]) -> fx.Int32:
    """The table's byte for each of four codes below 16, one in each byte."""
    if not any(values):
        return fx.Int32(0)
    low = codes & 0x07070707
    first = permute(constant(values[4:8]), constant(values[:4]), low)
    if all(values[i + 8] == values[i] | 0x80 for i in range(8)):  # a sign bit, as in e2m1
        return first | ((codes << 4) & SIGN)
    if values[8:] == values[:8]:
        return first
    second = permute(constant(values[12:]), constant(values[8:12]), low)
    mask = (codes >> 3) & 0x01010101
    mask = (mask << 8) - mask
    return first ^ ((first ^ second) & mask)


def interleave(low: fx.Int32, high: fx.Int32) -> Words:
    """Bytes l0 h0 l1 h1 and l2 h2 l3 h3."""
    return [permute(high, low, fx.Int32(select)) for select in (0x05010400, 0x07030602)]


def from_table(source: Element, target: Element) -> Callable[[Words], Words]:
    """The decoder of a 4-bit element in the order v4v0 v5v1 v6v2 v7v3."""
    planes = table(source, target)

    def decode(words: Words) -> Words:
        out: Words = []
        for four in (four for word in words for four in nibbles(word)):
            found = [look_up(four, plane) for plane in planes]
            out += found if len(found) == 1 else interleave(*found)
        return out

    return decode


def scaled_bf16(words: Words, scale: fx.Float32) -> Words:
    """e2m1 in the order v4v0 v5v1 v6v2 v7v3 times a power of two, to bf16, exactly: bf16 has the
    exponents of float32. A conversion takes a byte, so pairs come out as 0 4, 1 5, 2 6, 3 7."""
    out: Words = []
    for word in words:
        pairs = [
            fx.Vector(
                fx.rocdl.cvt_scalef32_pk_bf16_fp4(fx.BFloat16x2.ir_type, word, scale, byte)
            ).bitcast(fx.Int32)[0]
            for byte in range(4)
        ]
        for select in (0x05040100, 0x07060302):  # low halves, high halves
            out += [permute(pairs[i + 1], pairs[i], fx.Int32(select)) for i in (0, 2)]
    return out


def in_order(source: Element, target: Element) -> Callable[[Words], Words]:
    """The decoder of a 4-bit element as tokens have it, the even k in the low nibble; to bytes."""
    (plane,) = table(source, target)

    def decode(words: Words) -> Words:
        pairs = [[look_up(four, plane) for four in nibbles(word)] for word in words]
        return [word for even, odd in pairs for word in interleave(even, odd)]

    return decode


@cache
def weight_decoder(stored: Element, operand: Element) -> Decoder | None:
    """From weights to the MFMA's element; None where there is no exact way."""
    if stored is operand:
        return Decoder(keep)
    if (stored, operand) == (e4m3fn, e4m3fnuz):
        return Decoder(clear_negative_zero, 2.0)
    if (stored, operand) == (int4, int8):
        return Decoder(widen_int4, 1 / 16)
    if stored.bits == 4 and operand is not int8:
        return Decoder(from_table(stored, operand))
    return None


@cache
def token_decoder(stored: Element, operand: Element) -> Decoder | None:
    """From tokens in memory to the MFMA's element in LDS; None where there is no exact way."""
    if stored is operand:
        return Decoder(keep)
    if (stored, operand) == (e4m3fn, e4m3fnuz):
        return Decoder(clear_negative_zero, 2.0)
    if stored is e2m1 and operand.bits == 8 and operand is not int8:
        return Decoder(in_order(stored, operand))
    return None
