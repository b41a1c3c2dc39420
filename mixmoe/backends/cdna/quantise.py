"""MX quantisation on the device: the scale byte of a block of 32, and the codes under it.

Bit for bit what ``Format.quantise`` does: the scale from the bits of the block's maximum, codes
rounded to nearest even by the conversion instructions, saturated.
"""

from collections.abc import Iterator
from functools import cache

import flydsl.compiler as flyc
import flydsl.expr as fx

from mixmoe.backends.cdna.atoms import PIECE, SCALE_BLOCK, WAVE, WORD, Operand
from mixmoe.backends.cdna.config import THREADS
from mixmoe.backends.cdna.origin import one_origin
from mixmoe.backends.cdna.prebuilt import launcher
from mixmoe.formats import Rounding

MANTISSA = 23  # explicit bits of a float32
ALL_ONES = (1 << MANTISSA) - 1


def round_up_from(operand: Operand, rounding: Rounding) -> int:
    """What to add to a float32's bits so that its exponent grows where the scale rounds up.

    CEIL: beyond ``max = m 2^emax``, m = 1.5 (e2m1) or 1.75 (e4m3). EVEN: from half an ulp of the
    element below the next power of two on. FLOOR: never.
    """
    if rounding is Rounding.CEIL:
        mantissa = int((operand.largest / 2.0**operand.emax - 1) * (1 << MANTISSA))
        return ALL_ONES - mantissa
    return 1 << (MANTISSA - operand.mantissa - 1) if rounding is Rounding.EVEN else 0


def scale_bits(operand: Operand, amax: fx.Float32, rounding: Rounding) -> fx.Int32:
    """The scale of a block whose largest magnitude is ``amax``: bits of a float32 whose exponent is
    the E8M0 byte, whatever lies below it."""
    bits = amax.bitcast(fx.Int32) + (round_up_from(operand, rounding) - (operand.emax << MANTISSA))
    # Beyond 254 - emax a code could stand for 2^128.
    return fx.min(fx.max(bits, 0), ((255 - operand.emax) << MANTISSA) - 1)


def scale_byte(operand: Operand, amax: fx.Float32, rounding: Rounding) -> fx.Int32:
    """Its byte."""
    return scale_bits(operand, amax, rounding) >> MANTISSA


def encode(operand: Operand, values: fx.Vector, bits: fx.Int32) -> fx.Int32:
    """Four values under a scale, see :func:`scale_bits`: codes in order from the lowest bit. e2m1
    fills 16 bits, above them is what happened to be there."""
    word = values[0].bitcast(fx.Int32)  # overwritten; spares the zeros of a fresh register
    if operand.bits == 4:
        scale = bits.bitcast(fx.Float32)  # the instruction reads the exponent
        for pair in range(2):
            word = fx.Int32(
                fx.rocdl.cvt_scalef32_pk_fp4_f32(
                    fx.Int32.ir_type, word, values[2 * pair], values[2 * pair + 1], scale, pair
                )
            )
        return word
    inverse = ((254 - (bits >> MANTISSA)) << MANTISSA).bitcast(fx.Float32)
    for pair in range(2):
        # The instruction makes NaN of what lies beyond 448.
        low, high = (
            fx.min(fx.max(values[2 * pair + i] * inverse, -operand.largest), operand.largest)
            for i in range(2)
        )
        word = fx.Int32(
            fx.rocdl.cvt_pk_fp8_f32(fx.Int32.ir_type, low, high, word, bool(pair))
        )
    return word


def block_max(values: list[fx.Vector]):
    """Largest magnitude of a block of 32: a lane's eight values, then the lanes 16 and 32 on. Steps
    for :func:`stagger`; returns it."""
    top = fx.Float32(0.0)
    for vector in values:
        for i in range(4):
            top = fx.max(top, abs(vector[i]))
    lane = fx.Int32(fx.thread_idx.x) % WAVE
    for distance in (16, 32):
        other = other_lane(top, (lane ^ distance) * WORD)
        yield distance
        top = fx.max(top, other)
    return top


def stagger(works) -> None:
    """Generators step by step, each a step behind the one before it: what one of them waits for is
    on its way while a later one computes."""
    waiting, running = list(works), list[Iterator]()
    while waiting or running:
        running = waiting[:1] + running
        waiting = waiting[1:]
        running = [work for work in running if step(work)]
        fx.rocdl.sched_barrier(0)


@one_origin
def step(work: Iterator) -> bool:
    """Whether there was one more."""
    return next(work, None) is not None


def other_lane(value: fx.Float32, address) -> fx.Float32:
    """The value of lane ``address / 4``. Through LDS: an instruction, where a shuffle is five of
    the vector unit, which an epilogue keeps busy."""
    word = value.bitcast(fx.Int32)
    return fx.Int32(fx.rocdl.ds_bpermute(fx.Int32.ir_type, address, word)).bitcast(fx.Float32)


def decode(word: fx.Int32, byte: fx.Int32) -> fx.Vector:
    """Four values of e4m3 codes times ``2^(byte - 127)``, byte not 0: float32, exact."""
    scale = (byte << MANTISSA).bitcast(fx.Float32)
    pairs = [
        fx.Vector(fx.rocdl.cvt_pk_f32_fp8(fx.Vector.make_type(2, fx.Float32), word, bool(half)))
        for half in range(2)
    ]
    return fx.Vector.from_elements([p[i] for p in pairs for i in range(2)], fx.Float32) * scale


VALUES = 8  # of a thread: four threads share a block of 32


@cache
def build(operand: Operand, source: type[fx.Numeric], rounding: Rounding):
    """The launcher of ``x (T, H) -> codes, scales`` for an element, type of x and rounding."""
    variant = f"quantise_{source.__name__}_{operand.name}_{rounding.value}"
    pieces = VALUES * source.width // (8 * PIECE)

    @flyc.kernel(name=variant)
    def quantise_kernel(
        codes: fx.Tensor,  # (T, H) as words
        scales: fx.Tensor,  # (T, H / 32)
        x: fx.Tensor,  # (T, H), rows row_stride apart
        tokens: fx.Int32,
        hidden: fx.Int32,
        row_stride: fx.Int32,
    ):
        index = fx.Int32(fx.block_idx.x) * THREADS + fx.Int32(fx.thread_idx.x)
        per_row = hidden // VALUES
        row, part = index // per_row, index % per_row
        if row < tokens:
            # 1. Load eight values
            base = fx.get_iter(x) + (fx.Int64(row) * row_stride + part * VALUES)
            frag = fx.make_rmem_tensor(VALUES, source)
            piece = fx.make_copy_atom(fx.UniversalCopy128b(), source)
            width = fx.make_layout(VALUES // pieces, 1)
            for p in fx.range_constexpr(pieces):
                at = (base + p * (VALUES // pieces)).view(width)
                fx.copy(piece, at, fx.logical_divide(frag, width)[None, p])
            values = frag.load().to(fx.Float32)

            # 2. Maximum of the block, its scale
            top = abs(values).reduce(fx.ReductionOp.MAX)
            for distance in (1, 2):
                top = fx.max(top, fx.gpu.shuffle_xor(top, distance, 64))
            bits = scale_bits(operand, top, rounding)

            # 3. Codes, and the scale once
            store_codes(operand, codes, values, bits, fx.Int64(row) * per_row + part)
            if part % 4 == 0:
                at = fx.Int64(row) * (hidden // SCALE_BLOCK) + part // 4
                (fx.get_iter(scales) + at).store((bits >> MANTISSA).to(fx.Uint8))

    @flyc.jit
    def launch(
        codes: fx.Tensor,
        scales: fx.Tensor,
        x: fx.Tensor,
        tokens: fx.Int32,
        hidden: fx.Int32,
        row_stride: fx.Int32,
        grid: fx.Int32,
        name: fx.Constexpr[str],
        stream: fx.Stream,
    ):
        quantise_kernel(codes, scales, x, tokens, hidden, row_stride).launch(
            grid=(grid, 1, 1), block=(THREADS, 1, 1), stream=stream
        )

    return launcher(variant, launch)


def store_codes(operand: Operand, codes: fx.Tensor, values: fx.Vector, bits, unit) -> None:
    """Eight codes of a thread: one word of e2m1, two of e4m3."""
    halves = [encode(operand, values.shuffle(values, [4 * i + j for j in range(4)]), bits)
              for i in range(2)]
    if operand.bits == 4:
        (fx.get_iter(codes) + unit).store((halves[0] & 0xFFFF) | (halves[1] << 16))
        return
    for i, word in enumerate(halves):
        (fx.get_iter(codes) + (unit * 2 + i)).store(word)
