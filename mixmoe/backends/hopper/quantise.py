"""quantise: rows of bf16, fp16 or f32 -> activation codes, bit for bit as ``mixmoe.formats``.

A *writer* turns a tile of float32 rows into codes and scales and stores them; the kernels differ
only in where the rows come from (x itself, h of live routes, x times a smooth factor). A tile is a
tuple of pieces, (QB rows, KP columns) each: rows are seldom a power of two long.

``folded_*`` writers serve the FP8 tensor cores: an MX row becomes e4m3 codes and ONE float32 scale
per row. mxfp4 folds exactly while a block lies at most 14 binades below the row's largest block
scale (e2m1 * 2^-8..2^6 are e4m3 numbers). Below that, and for mxfp8 wherever a block lies lower
than the largest, codes are rounded to nearest even once more; the error of an element is at most
half the smallest e4m3 subnormal, 2^-10 of the row scale (mxfp8: also 2^-4 of nothing but itself
where it drops into subnormals), that is <= 2^-17.8 of a row's amax for mxfp8 (amax >= 224 scales)
and <= 2^-17.5 for mxfp4 (amax >= 192 folded scales).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mixmoe.backends.hopper.launch import options, start_dependents
from mixmoe.backends.hopper.operands import operand
from mixmoe.backends.hopper.slots import SlotRows, padded, to_slots
from mixmoe.errors import MixMoEError
from mixmoe.formats import Format, Quantised, Rounding, ScaleKind, fp8_token

TINY = tl.constexpr(2.0**-126)  # formats.F32_TINY: the least scale of a whole row
RINT = tl.constexpr(1.5 * 2.0**23)  # x + RINT - RINT is rint(x) for |x| < 2^22, ties to even
TILE = 2048  # values of a CTA, unless a row has more
EIGHT_CTAS = 8 * 132  # as many are left where a CTA takes several rows: eight an SM


@triton.jit
def e8m0_of(amax, EMAX: tl.constexpr, UP: tl.constexpr):
    """E8M0 byte of block maxima; the scale goes up a binade where the mantissa field is >= UP."""
    bits = amax.to(tl.int32, bitcast=True)
    byte = (bits >> 23) - EMAX + ((bits & 0x7FFFFF) >= UP).to(tl.int32)
    return tl.minimum(tl.maximum(byte, 0), 254 - EMAX)


@triton.jit
def inverse_e8m0(byte):
    """``2^(127 - byte)`` for bytes 0..252, exact."""
    return ((254 - byte) << 23).to(tl.float32, bitcast=True)


@triton.jit
def e2m1_code(y):
    """Codes 0..15 of float32 values, nearest even, saturated; the sign of zero is kept.

    Adding 2^22, 2^23, 2^24 rounds |y| to steps of 1/2, 1, 2 and leaves the count of steps in the
    low bits; the lines of the three steps cross where the step changes, so the code is the least.
    """
    a = tl.abs(y)
    halves = (a + 4194304.0).to(tl.int32, bitcast=True) - 0x4A800000
    ones = (a + 8388608.0).to(tl.int32, bitcast=True) - (0x4B000000 - 2)
    twos = (a + 16777216.0).to(tl.int32, bitcast=True) - (0x4B800000 - 4)
    code = tl.minimum(tl.minimum(halves, ones), tl.minimum(twos, 7))
    return code | ((y.to(tl.int32, bitcast=True) >> 28) & 8)


@triton.jit
def quotient(x, scale):
    """``x / scale`` rounded as IEEE division, for |x / scale| < 2^10, in four instructions.

    Markstein: with r = 1/s correctly rounded and q within an ulp, ``q - r (q s - x)`` is the
    rounded quotient while the remainder is exact, so rows of tiny scale are scaled up first. The
    signs are those of factors of a row, so that a zero keeps its own and no value is negated. The
    IEEE division of Triton made this kernel 66 us instead of 40 (8192 x 7168, H200, 2026-11-24).
    """
    lift = tl.where(scale < 2.0**-60, 2.0**64, 1.0)
    s = scale * lift
    minus_r = tl.div_rn(-1.0, s)
    minus_x = x * -lift
    q = minus_x * minus_r
    return tl.fma(tl.fma(q, s, minus_x), minus_r, q)


@triton.jit
def e2m1_value(code):
    """float32 value of codes 0..15: exponent and mantissa bits at their places, times 2^126."""
    bits = ((code & 7) << 22) | ((code & 8) << 28)
    return bits.to(tl.float32, bitcast=True) * 2.0**126


@triton.jit
def row_amax(x):
    """Of rows in pieces."""
    largest = tl.abs(x[0])
    for i in tl.static_range(1, len(x)):
        largest = tl.maximum(largest, tl.abs(x[i]))
    return tl.max(largest, 1)


@triton.jit
def block_amax(x, QB: tl.constexpr, KP: tl.constexpr, G: tl.constexpr):
    """A piece ``(QB, KP)`` as ``(QB, KP/G, G)`` and its block maxima ``(QB, KP/G)``."""
    tiles = tl.reshape(x, (QB, KP // G, G))
    return tiles, tl.max(tl.abs(tiles), 2)


@triton.jit
def store_piece(ptr, values, i, row, live, K, QB: tl.constexpr, KP: tl.constexpr):
    """Store ``(QB, KP)`` values as the i-th columns KP of rows of ``K``."""
    k = i * KP + tl.arange(0, KP)
    mask = live[:, None] & (k < K)[None, :]
    tl.store(ptr + row.to(tl.int64)[:, None] * K + k[None, :], values, mask=mask)


@triton.jit
def store_slots(ptr, values, i, row, live, K, QB: tl.constexpr, KP: tl.constexpr):
    """`store_piece` in slot order; K is a multiple of 128."""
    store_piece(ptr, to_slots(values, QB, KP), i, row, live, K, QB, KP)


@triton.jit
def row_scale(x, MAX: tl.constexpr):
    """The float32 scale of each row of pieces whose codes end at MAX."""
    return tl.maximum(tl.div_rn(row_amax(x), MAX), TINY)


@triton.jit
def fp8_codes(x, scale):
    """e4m3 codes of a piece."""
    y = quotient(x, scale[:, None])  # at most 448 (1 + 2^-23): nothing to saturate
    return y.to(tl.float8e4nv)


@triton.jit
def write_fp8_row(x, codes_ptr, scales_ptr, row, live, K,
                  QB: tl.constexpr, KP: tl.constexpr, UP: tl.constexpr):  # fmt: skip
    scale = row_scale(x, 448.0)
    for i in tl.static_range(len(x)):
        store_piece(codes_ptr, fp8_codes(x[i], scale), i, row, live, K, QB, KP)
    tl.store(scales_ptr + row, scale, mask=live)


@triton.jit
def write_fp8_slots(x, codes_ptr, scales_ptr, row, live, K,
                    QB: tl.constexpr, KP: tl.constexpr, UP: tl.constexpr):  # fmt: skip
    scale = row_scale(x, 448.0)
    for i in tl.static_range(len(x)):
        store_slots(codes_ptr, fp8_codes(x[i], scale), i, row, live, K, QB, KP)
    tl.store(scales_ptr + row, scale, mask=live)


@triton.jit
def write_int8_row(x, codes_ptr, scales_ptr, row, live, K,
                   QB: tl.constexpr, KP: tl.constexpr, UP: tl.constexpr):  # fmt: skip
    scale = row_scale(x, 127.0)
    for i in tl.static_range(len(x)):
        y = (quotient(x[i], scale[:, None]) + RINT) - RINT
        store_piece(codes_ptr, y.to(tl.int8), i, row, live, K, QB, KP)
    tl.store(scales_ptr + row, scale, mask=live)


@triton.jit
def write_fp8_groups(x, codes_ptr, scales_ptr, row, live, K,
                     QB: tl.constexpr, KP: tl.constexpr, UP: tl.constexpr):  # fmt: skip
    for i in tl.static_range(len(x)):
        tiles, amax = block_amax(x[i], QB, KP, 128)
        scale = tl.maximum(tl.div_rn(amax, 448.0), TINY)
        y = tl.reshape(quotient(tiles, scale[:, :, None]), (QB, KP))
        store_piece(codes_ptr, y.to(tl.float8e4nv), i, row, live, K, QB, KP)
        store_piece(scales_ptr, scale, i, row, live, (K + 127) // 128, QB, KP // 128)


@triton.jit
def write_mxfp8(x, codes_ptr, scales_ptr, row, live, K,
                QB: tl.constexpr, KP: tl.constexpr, UP: tl.constexpr):  # fmt: skip
    for i in tl.static_range(len(x)):
        tiles, amax = block_amax(x[i], QB, KP, 32)
        byte = e8m0_of(amax, 8, UP)
        y = tl.reshape(tiles * inverse_e8m0(byte)[:, :, None], (QB, KP))
        y = tl.minimum(tl.maximum(y, -448.0), 448.0)
        store_piece(codes_ptr, y.to(tl.float8e4nv), i, row, live, K, QB, KP)
        store_piece(scales_ptr, byte.to(tl.uint8), i, row, live, K // 32, QB, KP // 32)


@triton.jit
def write_mxfp4(x, codes_ptr, scales_ptr, row, live, K,
                QB: tl.constexpr, KP: tl.constexpr, UP: tl.constexpr):  # fmt: skip
    for i in tl.static_range(len(x)):
        tiles, amax = block_amax(x[i], QB, KP, 32)
        byte = e8m0_of(amax, 2, UP)
        code = e2m1_code(tiles * inverse_e8m0(byte)[:, :, None])
        low, high = tl.split(tl.reshape(code, (QB, KP // 2, 2)))
        store_piece(
            codes_ptr, (low | (high << 4)).to(tl.uint8), i, row, live, K // 2, QB, KP // 2
        )
        store_piece(scales_ptr, byte.to(tl.uint8), i, row, live, K // 32, QB, KP // 32)


@triton.jit
def power_of_two(exponent):
    """``2^exponent`` in float32 for -149..127, as a product of two normal powers."""
    low = tl.maximum(exponent, -126)
    rest = tl.maximum(exponent - low, -126)
    a = ((low + 127) << 23).to(tl.float32, bitcast=True)
    return a * ((rest + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def fold(values, powers, codes_ptr, scales_ptr, row, live, K,
         QB: tl.constexpr, KP: tl.constexpr, SHIFT: tl.constexpr):  # fmt: skip
    """Slots of e4m3 values times ``2^(byte - top + SHIFT)``; scale ``2^(top - 127 - SHIFT)``.

    values and powers (E8M0 bytes): of each piece.
    """
    top = row_amax(powers)
    for i in tl.static_range(len(values)):
        y = values[i] * power_of_two(powers[i] - top[:, None] + SHIFT)[:, :, None]
        codes = tl.reshape(y, (QB, KP)).to(tl.float8e4nv)
        store_slots(codes_ptr, codes, i, row, live, K, QB, KP)
    tl.store(scales_ptr + row, power_of_two(top - 127 - SHIFT), mask=live)


@triton.jit
def write_folded_mxfp8(x, codes_ptr, scales_ptr, row, live, K,
                       QB: tl.constexpr, KP: tl.constexpr, UP: tl.constexpr):  # fmt: skip
    values, powers = (), ()
    for i in tl.static_range(len(x)):
        tiles, amax = block_amax(x[i], QB, KP, 32)
        byte = e8m0_of(amax, 8, UP)
        y = tl.minimum(tl.maximum(tiles * inverse_e8m0(byte)[:, :, None], -448.0), 448.0)
        values = values + (y.to(tl.float8e4nv).to(tl.float32),)  # type: ignore[assignment]
        powers = powers + (byte,)  # type: ignore[assignment]
    fold(values, powers, codes_ptr, scales_ptr, row, live, K, QB, KP, 0)


@triton.jit
def write_folded_mxfp4(x, codes_ptr, scales_ptr, row, live, K,
                       QB: tl.constexpr, KP: tl.constexpr, UP: tl.constexpr):  # fmt: skip
    values, powers = (), ()
    for i in tl.static_range(len(x)):
        tiles, amax = block_amax(x[i], QB, KP, 32)
        byte = e8m0_of(amax, 2, UP)
        y = e2m1_value(e2m1_code(tiles * inverse_e8m0(byte)[:, :, None]))
        values = values + (y,)  # type: ignore[assignment]
        powers = powers + (byte,)  # type: ignore[assignment]
    fold(values, powers, codes_ptr, scales_ptr, row, live, K, QB, KP, 6)


@triton.jit
def load_rows(x_ptr, row, live, K, stride, KP: tl.constexpr, COUNT: tl.constexpr):
    """COUNT pieces ``(QB, KP)`` of float32, zeros beyond K and in rows that are not live."""
    pieces = ()
    for i in tl.static_range(COUNT):
        k = i * KP + tl.arange(0, KP)
        mask = live[:, None] & (k < K)[None, :]
        at = row.to(tl.int64)[:, None] * stride + k[None, :]
        piece = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        pieces = pieces + (piece,)  # type: ignore[assignment]
    return pieces


@triton.jit(do_not_specialize=["rows"])
def quantise_rows(
    x_ptr, codes_ptr, scales_ptr, rows, K, stride, pitch, position_ptr,
    GATHER: tl.constexpr, BESIDE: tl.constexpr, WRITE: tl.constexpr, QB: tl.constexpr,
    KP: tl.constexpr, COUNT: tl.constexpr, UP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Rows of x, codes in rows of ``pitch`` columns, zeros from K on.

    With ``position_ptr`` a row whose position is -1 counts as zeros; the others lie at their
    position if GATHER, else at their own number.
    BESIDE: the kernels before this one may still run, as x was complete when the first of them
    started its dependents (`launch.wait_for_all`) and they have nothing to do with these rows. The
    last CTA waits for them at its end, on behalf of whoever waits for this kernel.
    """
    if not BESIDE:
        start_dependents(PDL)
    elif PDL:
        gdc_launch_dependents()
    row = tl.program_id(0) * QB + tl.arange(0, QB)
    live = row < rows
    real = live
    lies = row
    if position_ptr is not None:
        at = tl.load(position_ptr + row, mask=live, other=-1)
        real = at >= 0
        if GATHER:
            lies = at
    x = load_rows(x_ptr, lies, real, K, stride, KP, COUNT)
    WRITE(x, codes_ptr, scales_ptr, row, live, pitch, QB, KP, UP)
    if BESIDE and PDL:  # noqa: SIM102 (known when compiled, and not)
        if tl.program_id(0) == tl.num_programs(0) - 1:
            gdc_wait()


@triton.jit(do_not_specialize=["rows", "share"])
def quantise_smooth(
    x_ptr, smooth_ptr, experts_ptr, position_ptr, codes_ptr, scales_ptr, rows, K, stride, share,
    BLOCK: tl.constexpr, WRITE: tl.constexpr, QB: tl.constexpr, KP: tl.constexpr,
    COUNT: tl.constexpr, UP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Row ``r // share`` of x times its expert's smooth factors, one row per route."""
    start_dependents(PDL)
    row = tl.program_id(0) * QB + tl.arange(0, QB)
    live = row < rows
    at = tl.load(position_ptr + row, mask=live, other=-1)
    real = at >= 0
    expert = tl.load(experts_ptr + at // BLOCK, mask=real, other=0)
    x = load_rows(x_ptr, row // share, real, K, stride, KP, COUNT)
    factors = load_rows(smooth_ptr, expert, real, K, K, KP, COUNT)
    smooth = ()
    for i in tl.static_range(COUNT):
        smooth = smooth + (x[i] * factors[i],)  # type: ignore[assignment]
    WRITE(smooth, codes_ptr, scales_ptr, row, live, K, QB, KP, UP)


@triton.jit(do_not_specialize=["rows"])
def fold_rows(
    q_ptr, q_scales_ptr, codes_ptr, scales_ptr, rows, K, pitch, X: tl.constexpr,
    SHIFT: tl.constexpr, QB: tl.constexpr, KP: tl.constexpr, COUNT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Stored MX rows -> e4m3 slots and a scale per row, as :func:`fold` does from values."""
    start_dependents(PDL)
    row = (tl.program_id(0) * QB + tl.arange(0, QB)).to(tl.int64)
    live = row < rows
    powers = ()
    for i in tl.static_range(COUNT):
        block = i * (KP // 32) + tl.arange(0, KP // 32)
        mask = live[:, None] & (block < K // 32)[None, :]
        at = q_scales_ptr + row[:, None] * (K // 32) + block[None, :]
        power = tl.load(at, mask=mask, other=0).to(tl.int32)
        powers = powers + (power,)  # type: ignore[assignment]
    top = row_amax(powers)
    for i in tl.static_range(COUNT):
        x = X.tile(q_ptr, q_scales_ptr, row, row, live, i * KP, K, QB, KP, tl.float32)
        y = x * power_of_two(127 - top)[:, None] * 2.0**SHIFT
        store_slots(codes_ptr, y.to(tl.float8e4nv), i, row, live, pitch, QB, KP)
    tl.store(scales_ptr + row, power_of_two(top - 127 - SHIFT), mask=live)


WRITERS = {
    "fp8_token": write_fp8_row,
    "int8_token": write_int8_row,
    "int8_smooth": write_int8_row,
    "fp8_1x128": write_fp8_groups,
    "mxfp8": write_mxfp8,
    "mxfp4": write_mxfp4,
}
FP8_WRITERS = {  # into rows of slots (`SlotRows`), whole groups of 128 of them
    "fp8_token": write_fp8_slots,
    "mxfp8": write_folded_mxfp8,
    "mxfp4": write_folded_mxfp4,
}


def round_up_from(fmt: Format, rounding: Rounding) -> int:
    """Mantissa field (23 bits) from which the block scale goes up a binade."""
    if fmt.scale is not ScaleKind.E8M0 or rounding is Rounding.FLOOR:
        return 1 << 23
    if rounding is Rounding.EVEN:
        return (1 << 23) - (1 << (22 - fmt.element.mantissa))
    return int((fmt.element.max / 2.0**fmt.element.emax - 1) * (1 << 23)) + 1


def piece_of(columns: int) -> int:
    """The widest piece, up to 1024 columns, that adds at most a tenth to rows of so many."""
    widths = (1024, 512, 256)
    return next((w for w in widths if -(-columns // w) * w <= 1.1 * columns), 128)


def plan(columns: int, rows: int) -> dict[str, int]:
    """Rows of a CTA's tile, pieces of a row, and warps: 32 to 63 values a thread where a CTA has
    1024 or more.

    Against rows padded to a power of two, 32 values a thread, on an H200, us: 32768 x 2880 78.4 ->
    64.6, 8192 x 7168 43.5 -> 39.9, whose bytes take 63 and 39 (docs/measured-prefill.md).
    """
    kp = piece_of(columns)
    count = -(-columns // kp)
    qb = 1
    while 2 * qb * count * kp <= TILE and 2 * qb * EIGHT_CTAS <= rows:
        qb *= 2
    warps = 1
    while 2 * warps <= min(16, qb * count * kp // 1024):
        warps *= 2
    return {"QB": qb, "KP": kp, "COUNT": count, "num_warps": warps}


def empty_codes(fmt: Format, rows: int, K: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Uninitialised codes ``(rows, K)`` and scales of a format that has scales."""
    codes = torch.empty(
        (rows, K // fmt.element.per_byte), dtype=fmt.element.storage, device=device
    )
    dtype = torch.uint8 if fmt.scale is ScaleKind.E8M0 else torch.float32
    return codes, torch.empty(fmt.scale_shape(rows, K), dtype=dtype, device=device)


def empty_rows(rows: int, K: int, device: torch.device) -> SlotRows:
    """Uninitialised rows of K columns."""
    return SlotRows(*empty_codes(fp8_token, rows, padded(K), device))


def writer_of(fmt: Format) -> object:
    """The writer of an activation format; refuses one this backend has none for."""
    if fmt.name not in WRITERS:
        raise MixMoEError("hopper quantises activations to", fmt.name, ", ".join(WRITERS))
    return WRITERS[fmt.name]


def quantise(
    x: Tensor, fmt: Format, rounding: Rounding = Rounding.CEIL, position: Tensor | None = None,
    gather: bool = False,
) -> Quantised:  # fmt: skip
    """``x: (R, K)`` of any float dtype -> codes and scales of ``fmt``; 16-bit formats only cast.

    With ``position`` (int32, a row of the result each) rows where it is -1 become zeros and are
    not read; with ``gather`` row r of the result is row ``position[r]`` of x. Bits as
    :meth:`mixmoe.formats.Format.quantise` gives them; NaN is not looked for here.
    """
    if fmt.scale is ScaleKind.NONE:
        return Quantised(x.to(fmt.element.storage).contiguous(), None, fmt)
    rows, K = (x if position is None else position).shape[0], x.shape[1]
    fmt.check_columns(K)
    codes, scales = empty_codes(fmt, rows, K, x.device)
    launch_rows(x, codes, scales, K, writer_of(fmt), round_up_from(fmt, rounding), position, gather)
    return Quantised(codes, scales, fmt)


def quantise_fp8(
    x: Tensor, fmt: Format, rounding: Rounding = Rounding.CEIL, position: Tensor | None = None,
    gather: bool = False,
) -> SlotRows:  # fmt: skip
    """x as the FP8 tensor cores take it beside packed weights: e4m3 slots, one scale a row.

    ``fp8_token`` as it is, MX formats folded (:func:`fold` states the bound).
    """
    out = empty_rows((x if position is None else position).shape[0], x.shape[1], x.device)
    up = round_up_from(fmt, rounding)
    writer, pitch = FP8_WRITERS[fmt.name], out.codes.shape[1]
    launch_rows(x, out.codes, out.scales, pitch, writer, up, position, gather)
    return out


def folded(q: Quantised) -> SlotRows:
    """A stored ``mxfp8`` or ``mxfp4`` matrix as :func:`quantise_fp8` would have made it."""
    rows, K = q.shape
    out = empty_rows(rows, K, q.device)
    if rows:
        pitch = out.codes.shape[1]
        shape = plan(pitch, rows)
        fold_rows[(-(-rows // shape["QB"]),)](
            q.codes.contiguous(), q.scales, out.codes, out.scales, rows, K, pitch,
            X=operand(q.format), SHIFT=6 if q.format.element.bits == 4 else 0,
            **shape, **options(q.device),
        )  # fmt: skip
    return out


def slot_rows(q: Quantised) -> SlotRows:
    """Rows of a caller for the FP8 tensor cores: ``fp8_token`` reordered, MX formats folded."""
    return SlotRows.of(q) if q.format.name == "fp8_token" else folded(q)


def launch_rows(
    x: Tensor, codes: Tensor, scales: Tensor, pitch: int, writer: object, up: int,
    position: Tensor | None, gather: bool, beside: bool = False,
) -> None:  # fmt: skip
    """``quantise_rows`` over all rows of ``codes``."""
    rows = codes.shape[0]
    if rows:
        shape = plan(pitch, rows)
        quantise_rows[(-(-rows // shape["QB"]),)](
            x, codes, scales, rows, x.shape[1], x.stride(0), pitch, position,
            GATHER=gather, BESIDE=beside, WRITE=writer, UP=up, **shape, **options(x.device),
        )  # fmt: skip


def quantise_routes(
    x: Tensor, fmt: Format, smooth: Tensor, experts: Tensor, position: Tensor, block: int
) -> Quantised:
    """``int8_smooth``: a row per route, ``x[r // topk] * smooth[expert of r]`` quantised.

    ``experts`` is Routed's ``sorted_expert_ids``, ``position`` each route's place in it.
    """
    rows, K = position.shape[0], x.shape[1]
    codes, scales = empty_codes(fmt, rows, K, x.device)
    if rows:
        shape = plan(K, rows)
        quantise_smooth[(-(-rows // shape["QB"]),)](
            x, smooth, experts, position, codes, scales, rows, K, x.stride(0), rows // x.shape[0],
            BLOCK=block, WRITE=writer_of(fmt), UP=0, **shape, **options(x.device),
        )  # fmt: skip
    return Quantised(codes, scales, fmt)
