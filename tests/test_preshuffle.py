"""Orders of weights: formula, layout and pack agree bit for bit; each check is seen to fail.

The formulas here are written out with // and % from the hardware's description, independently of
the patterns in mixmoe/preshuffle.py.
"""

import doctest
import pathlib
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mixmoe.arrangement import Word
from mixmoe.errors import MixMoEError
from mixmoe.fold import fold
from mixmoe.formats import (
    SCALE_STORAGE,
    Quantised,
    ScaleKind,
    bf16,
    e4m3fn,
    e4m3fnuz,
    format_named,
    fp8_block,
    fp8_channel,
    int4_group,
    int8_channel,
    mxfp4,
    mxfp8,
)
from mixmoe.layout import Layout
from mixmoe.preshuffle import ORDERS, HopperTile, Order, hopper_fp4, hopper_fp8, order_named

HOPPER = [HopperTile(), HopperTile(True), HopperTile(warps=4, repeat=2), HopperTile(warps=1)]
HOPPER += [HopperTile(True, 8, 1, 8), HopperTile(True, 8, 2, 4, True), HopperTile(True, 1)]
RUNS = [name for name in ORDERS if name.startswith("cdna_runs")]
UZ = [name for name in ORDERS if name.startswith("cdna_uz")]
CDNA = [name for name in ORDERS if name.startswith("cdna") and name not in RUNS + UZ]


def weights(fmt, experts, n, k, seed=0, scales=(122, 134)):
    """Random codes and scales of a format; E8M0 bytes come from the half-open range ``scales``."""
    make = torch.Generator().manual_seed(seed)
    size = (experts, n, k * fmt.element.bits // 8)
    raw = torch.randint(0, 256, size, dtype=torch.uint8, generator=make)
    if fmt.element.storage.is_floating_point:
        raw &= 0x3F  # no NaN and no infinity, in either half of a 16-bit number
    codes = raw.view(fmt.element.storage)
    if fmt.scale is ScaleKind.NONE:
        return Quantised(codes, None, fmt)
    shape = (experts, *fmt.scale_shape(n, k))
    if fmt.scale is ScaleKind.E8M0:
        byte = torch.randint(*scales, shape, dtype=torch.uint8, generator=make)
        return Quantised(codes, byte, fmt)
    dtype = torch.bfloat16 if fmt.scale is ScaleKind.BF16 else torch.float32
    return Quantised(codes, torch.rand(shape, generator=make).to(dtype), fmt)


def bits_of(stored):
    """The bits of one expert's storage, lowest of byte 0 first."""
    return np.unpackbits(stored.contiguous().view(torch.uint8).numpy().ravel(), bitorder="little")


# ---------------------------------------------------------------- formulas: (n, k, bit) -> bit
def hopper_place(tile, n, k, shape):
    """Parts of a weight's place in a Hopper tile: of its rows, of tiles of K, its k of 128."""
    rows, cols = shape
    apart = tile.warps // tile.k_slices
    if tile.gate_up:
        half, i = n // (rows // 2), n % (rows // 2)
        g, block = i % 8, i // 8
    else:
        g, half, block = n % 8, n // 8 % 2, n // 16
    warp, rep = block % apart, block // apart % tile.repeat
    index = block // (apart * tile.repeat)
    steps = -(-cols // (128 * tile.k_slices))
    piece, k = k // (128 * steps), k % (128 * steps)
    unit = warp * tile.k_slices + piece
    return index * steps + k // 128, rep, unit, half, g, k % 128


def hopper_fp4_block(tile, n, k, shape):
    """The number of the 16 bytes that hold weight (n, k)'s block: q k / 32 of row (half, g)."""
    whole, rep, unit, half, g, k = hopper_place(tile, n, k, shape)
    unit = (whole * tile.repeat + rep) * tile.warps + unit
    return ((unit * 2 + half) * 8 + g) * 4 + k // 32


def hopper_fp4_bit(tile):
    def place(n, k, bit, shape):
        word = 4 * hopper_fp4_block(tile, n, k, shape) + k % 32 // 8
        lohi, by = k // 4 % 2, k % 4
        sign = np.where(lohi == 0, 8 * by + 7, 8 * by + 3)
        return 32 * word + np.where(bit == 3, sign, 4 * (by + 4 * lohi) + bit)

    return place


def hopper_fp8_bit(tile):
    def place(n, k, bit, shape):
        whole, rep, unit, half, g, k = hopper_place(tile, n, k, shape)
        ks1, ks0, lohi, q, by = k // 64, k // 32 % 2, k // 16 % 2, k // 4 % 4, k % 4
        part = ks1 * tile.repeat + rep if tile.k64 else 2 * rep + ks1
        group = 2 * (whole * 2 * tile.repeat + part) + ks0
        lane = (group * tile.warps + unit) * 32 + 4 * g + q
        return 32 * (4 * lane + 2 * lohi + half) + 8 * by + bit

    return place


def interleaved(n, shape):
    """Row after 16 gate rows and 16 up rows alternate; each half padded to 16."""
    half = shape[0] // 2
    i, up = n % half, n // half
    return i // 16 * 32 + up * 16 + i % 16


def cdna_bit(order, bits):
    """Facts on CDNA layouts: offset of byte kb of row n, Kb bytes a row after padding to 128 k."""

    def place(n, k, bit, shape):
        row = interleaved(n, shape) if order.endswith("gui") else n
        rows = -(-shape[0] // 2 // 16) * 32 if order.endswith("gui") else -(-shape[0] // 16) * 16
        wide = -(-shape[1] // 128) * 128
        if order.startswith("cdna_int4"):  # preshuffled as int8, then v4v0 v5v1 v6v2 v7v3
            off = row // 16 * 16 * wide + k // 16 * 256 + row % 16 * 16 + k % 16
            return 32 * (off // 8) + 8 * (off % 4) + 4 * (off // 4 % 2) + bit
        kb, row_bytes, low = (k * bits + bit) // 8, wide * bits // 8, (k * bits + bit) % 8
        off = row // 16 * 16 * row_bytes + kb // 16 * 256 + row % 16 * 16 + kb % 16
        if "k_major" in order:
            off = kb // 32 * (rows // 16) * 512 + row // 16 * 512 + kb % 32 // 16 * 256
            off = off + row % 16 * 16 + kb % 16
        return 8 * off + low

    return place


def runs_bit(order, bits):
    """A lane's 16 bytes: 8 codes of each of ``16 / bits`` blocks of 32, lane group kl the kl-th."""

    def place(n, k, bit, shape):
        row = interleaved(n, shape) if order.endswith("gui") else n
        wide, span = -(-shape[1] // 128) * 128, 512 // bits
        lane = k // span * 64 + k // 8 % 4 * 16 + row % 16
        code = row // 16 * 16 * wide + lane * (128 // bits) + k // 32 % (16 // bits) * 8 + k % 8
        if bits == 4:
            code = code // 8 * 8 + 2 * (code % 4) + code // 4 % 2
        return bits * code + bit

    return place


def check_order(order: Order, formula, fmt, n, k):
    """Ramp the index of every weight through ``pack``, digit by digit, and find it again."""
    bits = fmt.element.bits
    row, col, bit = np.meshgrid(np.arange(n), np.arange(k), np.arange(bits), indexing="ij")
    place = formula(row, col, bit, (n, k))
    assert np.unique(place).size == place.size
    for r, c, b in [(0, 0, 0), (1, 5, bits - 1), (n - 1, k - 1, 0), (n // 2, k // 2, bits - 1)]:
        assert order.bit_of(r, c, b, (n, k), bits) == place[r, c, b]
    for digit in range(0, 20, bits):
        ramp = (row * k + col) >> digit >> bit & 1  # bit planes of this digit of the index
        raw = np.packbits(ramp.reshape(n, -1), axis=1, bitorder="little")
        q = Quantised(
            torch.from_numpy(raw[None]).view(fmt.element.storage), weights(fmt, 1, n, k).scales, fmt
        )
        stored = bits_of(order.pack(q).codes)
        assert np.array_equal(stored[place], ramp)
        assert int(stored.sum()) == int(ramp.sum())  # padding holds zero codes


CASES = [(hopper_fp4(t), hopper_fp4_bit(t), mxfp4) for t in HOPPER if not t.k64]
CASES += [(hopper_fp8(t), hopper_fp8_bit(t), fp8_channel) for t in HOPPER]
CASES += [(ORDERS[n], cdna_bit(n, 4), mxfp4) for n in CDNA if "int4" not in n]
CASES += [(ORDERS[n], cdna_bit(n, 8), int8_channel) for n in CDNA if "int4" not in n]
CASES += [(ORDERS[n], cdna_bit(n, 16), bf16) for n in CDNA if "int4" not in n]
CASES += [(ORDERS[n], cdna_bit(n, 4), int4_group()) for n in CDNA if "int4" in n]
CASES += [(ORDERS[n], runs_bit(n, 4), f) for n in RUNS[:2] for f in (mxfp4, int4_group())]
CASES += [(ORDERS[n], runs_bit(n, 8), mxfp8) for n in RUNS[2:]]
IDS = [f"{order}-{fmt}" for order, _, fmt in CASES]


@pytest.mark.parametrize(("order", "formula", "fmt"), CASES, ids=IDS)
@pytest.mark.parametrize(("n", "k"), [(32, 256), (38, 192), (130, 320)])
def test_index_ramp(order, formula, fmt, n, k):
    check_order(order, formula, fmt, n, k)


def test_index_ramp_at_2880():
    tile = HopperTile(True)
    check_order(hopper_fp4(tile), hopper_fp4_bit(tile), mxfp4, 10, 2880)
    check_order(ORDERS["cdna_n16"], cdna_bit("cdna_n16", 4), mxfp4, 10, 2880)


@pytest.mark.parametrize(
    ("order", "part", "value"),
    [
        (hopper_fp4(), "word", None),
        (hopper_fp4(), "word", Word(Layout(8, 1), Layout(8, 1))),
        (hopper_fp4(), "pattern", ("half g q", "g half q")),
        (hopper_fp4(), "pattern", ("q ks lohi by)", "ks lohi q by)")),
        (hopper_fp4(HopperTile(True)), "pattern", ("gu tile rep warp", "tile rep warp gu")),
        (ORDERS["cdna_n16"], "pattern", ("nb kb r b", "kb nb r b")),
        (ORDERS["cdna_n16_gui"], "pattern", ("-> nb gu", "-> gu nb")),
        (ORDERS["cdna_int4"], "word", None),
        (ORDERS["cdna_runs4"], "word", None),
        (ORDERS["cdna_runs8_gui"], "pattern", ("r s e", "s r e")),
    ],
)
def test_index_ramp_catches_a_mutation(order, part, value):
    _, formula, fmt = next(case for case in CASES if case[0] == order)
    if part == "word":
        broken = replace(order, word=value)
    else:
        codes = order.codes.pattern.replace(*value)
        assert codes != order.codes.pattern
        broken = replace(order, codes=replace(order.codes, pattern=codes), scales=())
    with pytest.raises(AssertionError):
        check_order(broken, formula, fmt, 48, 320)


# ------------------------------------------------------------------------------- scale orders
def e8m0_tile(r, b, blocks):
    wide = -(-blocks // 8) * 8
    place = r // 32 * 32 * wide + b // 8 * 256 + b % 4 * 64 + r % 16 * 4
    return place + b // 4 % 2 * 2 + r // 16 % 2


def check_scales(order: Order, fmt, n, k, formula):
    q = weights(fmt, 2, n, k)
    packed = order.pack(q)
    row, block = np.meshgrid(np.arange(n), np.arange(k // fmt.cols), indexing="ij")
    places = torch.from_numpy(formula(row, block))
    for expert in range(2):
        want = q.scales[expert]
        if order.fold is not None:
            want, _ = fold(q.codes[expert], want, order.fold)
        assert torch.equal(packed.scales[expert].flatten()[places], want)
    return packed, places


@pytest.mark.parametrize(("n", "k"), [(32, 256), (38, 192), (600, 320)])
def test_cdna_scale_tile(n, k):
    blocks = k // 32
    packed, places = check_scales(
        ORDERS["cdna_n16"], mxfp4, n, k, lambda r, b: e8m0_tile(r, b, blocks)
    )
    assert packed.scales.shape == (2, -(-n // 256) * 256, -(-blocks // 8) * 8)
    rest = torch.ones(packed.scales[0].numel(), dtype=torch.bool)
    rest[places.flatten()] = False
    assert (packed.scales[0].flatten()[rest] == 127).all()
    gui = ORDERS["cdna_n16_gui"]
    check_scales(gui, mxfp4, n, k, lambda r, b: e8m0_tile(interleaved(r, (n, k)), b, blocks))
    with pytest.raises(AssertionError):
        check_scales(gui, mxfp4, n, k, lambda r, b: e8m0_tile(r ^ 1, b, blocks))


@pytest.mark.parametrize("group", [32, 64, 128])
def test_cdna_int4_scales(group):
    n, k, order = 48, 384, ORDERS["cdna_int4"]
    groups = k // group
    pairs = check_scales(order, int4_group(group), n, k, lambda r, g: (g // 2 * n + r) * 2 + g % 2)
    assert pairs[0].scales.numel() == 2 * n * (groups + groups % 2)
    single = int4_group(group, ScaleKind.F32)
    check_scales(order, single, n, k, lambda r, g: g * n + r)
    gui = ORDERS["cdna_int4_gui"]
    check_scales(gui, single, n, k, lambda r, g: g * 64 + interleaved(r, (n, k)))
    with pytest.raises(AssertionError):
        check_scales(order, single, n, k, lambda r, g: r * groups + g)


@pytest.mark.parametrize("fmt", [
    mxfp4, mxfp8, int4_group(), int4_group(128), int4_group(64, ScaleKind.F32)
], ids=str)
def test_cdna_runs_scales(fmt):
    """16 bytes of four rows: as many of their scales as fit, then the next four rows."""
    n, k = 48, 384
    per = 4 // {ScaleKind.E8M0: 1, ScaleKind.BF16: 2, ScaleKind.F32: 4}[fmt.scale]
    wide = -(-(k // fmt.cols) // per)

    def place(r, b):
        return ((r // 16 * wide + b // per) * 4 + r // 4 % 4) * 4 * per + b % per * 4 + r % 4

    bits = fmt.element.bits
    check_scales(ORDERS[f"cdna_runs{bits}"], fmt, n, k, place)
    gui = ORDERS[f"cdna_runs{bits}_gui"]
    check_scales(gui, fmt, n, k, lambda r, b: place(interleaved(r, (n, k)), b))
    with pytest.raises(AssertionError):
        check_scales(gui, fmt, n, k, place)


@pytest.mark.parametrize("tile", [t for t in HOPPER if not t.k64], ids=str)
def test_hopper_scales_lie_as_their_codes(tile):
    """A block's byte sits where its first code does, with the parts inside a block left out."""
    n, k = 38, 320

    def place(row, block):
        return hopper_fp4_block(tile, row, 32 * block, (n, k))

    check_scales(hopper_fp4(tile), mxfp4, n, k, place)
    with pytest.raises(AssertionError):
        check_scales(hopper_fp4(tile), mxfp4, n, k, lambda r, b: place(r, b) ^ 1)


# --------------------------------------------------------------------------------- round trips
FORMATS_OF = {
    "e2m1": [mxfp4], "e4m3fn": [mxfp8, fp8_channel, fp8_block()], "int8": [int8_channel],
    "e4m3fnuz": [format_named("fp8_channel_fnuz")], "int4": [int4_group(), int4_group(64)],
    "bf16": [bf16], "fp16": [format_named("fp16")],
}


def equal(a, b):
    if a is None or b is None:
        return a is b
    return torch.equal(a.view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("name", ORDERS)
def test_round_trip(name):
    order = order_named(name)
    for fmt in (f for e in order.elements for f in FORMATS_OF[e.name]):
        for n, k in [(2, 64), (38, 192)]:
            q = weights(fmt, 2, n, k, seed=n)
            packed = order.pack(q)
            back = packed.unpack()
            assert packed.shape == (2, n, k) == back.shape and back.format is fmt
            assert equal(back.codes, q.codes) and equal(back.scales, q.scales)
            assert packed.nbytes >= q.nbytes


def test_round_trip_at_2880_and_from_views():
    q = weights(mxfp4, 3, 96, 2880)
    q = Quantised(q.codes[1:, 7:43], q.scales[1:, 7:43], mxfp4)
    for name in ("rows", "cdna_n16_gui", "cdna_k_major", "hopper_fp4q_gu", "hopper_fp4q_s8"):
        back = order_named(name).pack(q).unpack()
        assert torch.equal(back.codes, q.codes) and torch.equal(back.scales, q.scales)


def test_storage_shapes():
    """The shapes that Hopper's TMA boxes are cut from."""
    packed = hopper_fp4(HopperTile(True)).pack(weights(mxfp4, 2, 192, 320))  # 2 tiles of 64, 3 of K
    assert packed.codes.dtype == torch.int32 and packed.codes.shape == (2, 6 * 64, 32)
    assert packed.scales.dtype == torch.uint8 and packed.scales.shape == (2, 6 * 4, 128)
    assert packed.row_scale.dtype == torch.float32 and packed.row_scale.shape == (2, 192)
    fp8 = hopper_fp8().pack(weights(fp8_channel, 2, 192, 320))
    assert fp8.codes.shape == (2, 6 * 128, 32) and fp8.row_scale.shape == (2, 192)
    assert ORDERS["cdna_n16"].pack(weights(mxfp4, 2, 38, 192)).codes.shape == (2, 48, 128)


# ---------------------------------------------------------------------------- refusals, memory
def test_require():
    packed = hopper_fp4(HopperTile(True)).pack(weights(mxfp4, 1, 32, 64))
    assert order_named("hopper_fp4q_gu").require(packed) is packed
    with pytest.raises(MixMoEError, match="w13 must be packed as hopper_fp4q: got hopper_fp4q_gu"):
        order_named("hopper_fp4q").require(packed, "w13")
    with pytest.raises(MixMoEError, match="not packed"):
        order_named("hopper_fp4q").require(packed.unpack())
    with pytest.raises(MixMoEError, match="hopper_fp4q_gu"):
        order_named("cdna_n16").unpack(packed)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: hopper_fp4().pack(weights(fp8_channel, 1, 16, 64)), "stores e2m1: got e4m3fn"),
        (lambda: ORDERS["cdna_n16"].pack(weights(int4_group(), 1, 16, 64)), "got int4"),
        (lambda: ORDERS["cdna_n16_gui"].pack(weights(mxfp4, 1, 17, 64)), "even: got 17"),
        (lambda: hopper_fp8().pack(weights(fp8_channel, 1, 16, 40)), "multiple of 32: got 40"),
        (lambda: hopper_fp4().pack(weights(mxfp4, 1, 16, 64)[0]), "E, N, K"),
        (lambda: hopper_fp4().pack(weights(mxfp4, 1, 16, 64, scales=(255, 256))), "255"),
        (lambda: HopperTile(warps=3), "warps"),
        (lambda: HopperTile(k_slices=3), "k_slices"),
        (lambda: HopperTile(k64=True), "repeat"),
        (lambda: hopper_fp4(HopperTile(repeat=2, k64=True)), "keep 128 k together"),
        (lambda: order_named("hopper_fp4q_gi"), "hopper_fp4q_gu"),
    ],
)
def test_refusals(call, match):
    with pytest.raises(MixMoEError, match=match):
        call()


class Allocations(TorchDispatchMode):
    """Remembers the storage of every tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.bytes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            storage = out.untyped_storage()
            self.bytes[storage.data_ptr()] = max(
                storage.nbytes(), self.bytes.get(storage.data_ptr(), 0)
            )
        return out


def largest_temporary(call, q):
    with Allocations() as seen:
        out = call(q)
    known = {
        t.untyped_storage().data_ptr()
        for t in (q.codes, q.scales, out.codes, out.scales, out.row_scale)
        if t is not None
    }
    return max(size for at, size in seen.bytes.items() if at not in known)


@pytest.mark.parametrize("name", ["hopper_fp4q_gu", "cdna_n16_gui", "cdna_k_major"])
def test_packing_holds_one_expert(name):
    """Beside input and output, nothing is larger than one expert in the fold's 16-bit numbers."""
    q, order = weights(mxfp4, 16, 120, 992), order_named(name)
    one = order.pack(q).codes[0].nbytes
    assert largest_temporary(order.pack, q) <= 2 * one < q.codes.nbytes / 4

    def copies_all(q):
        return order.pack(Quantised(q.codes + 0, q.scales, mxfp4))

    assert largest_temporary(copies_all, q) > 2 * one


def test_strided_copies_equal_gathers(monkeypatch):
    """Matrices too large for an index take the other way through the same view."""
    q, order = weights(mxfp4, 2, 38, 320), order_named("hopper_fp4q_gu")
    packed = order.pack(q)
    monkeypatch.setattr("mixmoe.arrangement.INDEX_LIMIT", 0)
    again = order.pack(q)
    assert torch.equal(again.codes, packed.codes) and torch.equal(again.scales, packed.scales)
    assert torch.equal(packed.unpack().codes, q.codes)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name", ["hopper_fp4q_gu_w1", "hopper_fp8_w1", "cdna_n16_gui", "cdna_int4"]
)
def test_packing_on_the_gpu_gives_the_same_bits(name):
    order = order_named(name)
    q = weights(FORMATS_OF[order.elements[0].name][0], 3, 38, 320)
    here, there = order.pack(q), order.pack(q.to("cuda"))
    assert equal(here.codes, there.codes.cpu())
    assert equal(here.scales, None if there.scales is None else there.scales.cpu())
    assert equal(there.unpack().codes.cpu(), q.codes)


def test_pictures():
    for name in ("rows", "cdna_n16_gui", "cdna_int4", "hopper_fp4q_gu", "hopper_fp8"):
        assert order_named(name).picture().startswith(f"{name}: ")
    lines = ORDERS["cdna_n16"].picture().splitlines()
    assert lines[3].split() == ["16", "r", "x", "16", "row", "1", "k", "0-31"]
    text = order_named("hopper_fp4q_gu").picture()
    assert "q    x 4  gate 0 k 32-63" in text and "gu   x 2  up 0 k 0-31" in text
    assert "0/4 1/0 2/5 3/1 4/6 5/2 6/7 7/3" in text


def test_the_docs_are_true(capsys):
    text = (pathlib.Path(__file__).parents[1] / "docs" / "layouts.md").read_text()
    shown = re.findall(r"```text\n((\w+): .*?)```", text, re.DOTALL)
    assert len(shown) >= 6
    for picture, name in shown:
        assert picture == order_named(name).picture()
    examples = doctest.DocTestParser().get_doctest(text.replace("```", ""), {}, "docs", None, 0)
    assert doctest.DocTestRunner().run(examples) == (0, 6)
    (packing,) = re.findall(r"```python\n((?!>>>).*?)```", text, re.DOTALL)
    exec(packing, names := {})
    assert names["packed"].order.name in capsys.readouterr().out


@pytest.mark.parametrize("name", UZ)
def test_orders_without_a_negative_zero(name):
    """Every value as it was, the code of -0 that of +0; else the bytes of the order beside it."""
    fmt = mxfp8 if "runs" in name else fp8_channel
    codes = torch.arange(64 * 128).reshape(1, 64, 128).remainder(256).to(torch.uint8)
    codes = codes.masked_fill(codes & 0x7F == 0x7F, 0)  # NaN
    scales = torch.ones(fmt.scale_shape(64, 128))
    scales = scales[None].to(SCALE_STORAGE[fmt.scale])
    q = Quantised(codes.view(e4m3fn.storage), scales, fmt)
    packed, beside = order_named(name).pack(q), order_named(name.replace("_uz", "")).pack(q)
    raw, other = packed.codes.view(torch.uint8), beside.codes.view(torch.uint8)
    assert (other == 0x80).sum() > 0 and torch.equal(raw, other.masked_fill(other == 0x80, 0))
    back = order_named(name).unpack(packed).codes.view(torch.uint8)
    assert torch.equal(back, codes.masked_fill(codes == 0x80, 0))
    halves = e4m3fnuz.decode(back.view(e4m3fnuz.storage), torch.float32)
    assert torch.equal(2 * halves, e4m3fn.decode(q.codes, torch.float32))
