"""Weight orders: named, stated once as layouts, packed and unpacked by generic code.

A kernel wants its weights in the order in which its lanes read them. Each :class:`Order` here
states where a code sits (:class:`mixmoe.arrangement.Arrangement`, and :class:`Word` where 4-bit
codes change places inside 32 bits), where a block scale sits, and what its byte means
(:class:`mixmoe.fold.Fold`). ``pack`` and ``unpack`` derive from that, one expert at a time.
``docs/layouts.md`` has the pictures.

Sources: FlyDSL ``shuffle_weight`` and ``e8m0_shuffle`` (CDNA); PTX ISA 9.0 section 9.7.15, wgmma
m64k32 A fragment (Hopper); OCP MX v1.0 (E8M0).
"""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mixmoe.arrangement import Arrangement, Word, contiguous, picture_lines
from mixmoe.errors import MixMoEError, nearest_multiple
from mixmoe.fold import Fold, fold, unfold
from mixmoe.formats import (
    Element,
    Format,
    Quantised,
    ScaleKind,
    bfloat16,
    e2m1,
    e4m3fn,
    e4m3fnuz,
    float16,
    int4,
    int8,
)
from mixmoe.layout import Layout

BLOCK = 32  # K of every weight is a multiple of it, so that rows hold whole E8M0 blocks


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """Weights in the order of a kernel; ``shape`` is the true (E, N, K), without padding.

    ``codes`` and ``scales`` are storage, ``(E, ...)``, in the order that ``order`` names.
    ``row_scale: (E, N) f32`` is the factor of each output row, in plain order, gate above up: the
    power of two that a fold took out, or the scale of a format with one scale for a whole row.
    """

    codes: Tensor
    scales: Tensor | None
    row_scale: Tensor | None
    order: "Order"
    format: Format
    shape: tuple[int, int, int]

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and row scales, padding included."""
        return sum(t.nbytes for t in (self.codes, self.scales, self.row_scale) if t is not None)

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.codes.device

    def to(self, device: torch.device | str) -> "Packed":
        """The same weights on another device."""
        scales = None if self.scales is None else self.scales.to(device)
        row_scale = None if self.row_scale is None else self.row_scale.to(device)
        codes = self.codes.to(device)
        return Packed(codes, scales, row_scale, self.order, self.format, self.shape)

    def unpack(self) -> Quantised:
        """The plain weights, see :meth:`Order.unpack`."""
        return self.order.unpack(self)


@dataclass(frozen=True, slots=True)
class Order:
    """One way to store weights (E, N, K).

    ``codes`` orders columns of ``unit`` bits; ``k_step`` is the K that one step of the kernel
    reads, to which K is padded with zero codes. ``word`` moves 4-bit codes inside 32 bits.
    ``scales`` orders block scales by kind (a kind not listed stays as it is), ``fold`` says what
    an E8M0 byte becomes, ``lane`` how many bytes a lane reads at once. Without ``signed_zero`` an
    e4m3fn -0 is stored as +0: the code is then e4m3fnuz of half the value. Storage has the dtype of
    the codes and shape (E, N', K'), or, with ``line``, (E, lines, 32) int32 codes and (E, lines,
    min(128, a tile)) uint8 scales.
    """

    name: str
    elements: tuple[Element, ...]
    codes: Arrangement
    unit: int = 8
    k_step: int = 1
    word: Word | None = None
    scales: tuple[tuple[ScaleKind, Arrangement], ...] = ()
    fold: Fold | None = None
    line: bool = False
    lane: int = 16
    signed_zero: bool = True

    def __str__(self) -> str:
        return self.name

    def __reduce__(self) -> tuple:
        return order_named, (self.name,)

    def require(self, weights: Packed | Quantised, name: str = "weights") -> Packed:
        """The weights, if they are in this order, see :func:`require`."""
        return require(weights, (self,), name)

    def columns(self, k: int, bits: int) -> int:
        """Columns of the code arrangement for K values of ``bits`` bits, before its padding."""
        return -(-k // self.k_step) * self.k_step * bits // self.unit

    def layout(self, n: int, k: int, bits: int) -> Layout:
        """``((row parts), (column parts)):strides`` of the padded codes, in units of ``unit`` bits.

        Where :attr:`word` is set the codes of a word then change places inside it.
        """
        return self.codes.layout(n, self.columns(k, bits))

    def bit_of(self, n: int, k: int, bit: int, shape: tuple[int, int], bits: int = 4) -> int:
        """Where bit ``bit`` of the code of weight (n, k) sits in the storage of one expert.

        ``shape`` is (N, K), ``bits`` the width of a code; bits count from the lowest of byte 0.
        """
        column, low = divmod(k * bits + bit, self.unit)
        place = self.layout(*shape, bits)(self.codes.row_of(n, shape[0]), column) * self.unit + low
        if self.word is None:
            return place
        return place // 32 * 32 + 4 * self.word.nibble(place % 32 // 4, bit) + bit

    def scale_order(self, kind: ScaleKind) -> Arrangement | None:
        """The arrangement of block scales of a kind; None where they stay as they are."""
        return dict(self.scales).get(kind)

    def pack(self, q: Quantised) -> Packed:
        """Put weights ``q: (E, N, K)`` into this order.

        Holds input, output and a few copies of one expert. K must be a multiple of 32, N even
        for gate/up orders; both are padded with zero codes. Raises MixMoEError for an element the
        order does not store, a NaN scale, or a row whose scales do not fold.
        """
        self._check(q)
        experts, n, k = q.shape
        codes = q.codes if self.codes.plain else self._pack_codes(q)
        scales, row_scale = self._pack_scales(q)
        return Packed(codes, scales, row_scale, self, q.format, (experts, n, k))

    def _check(self, q: Quantised) -> None:
        if q.format.element not in self.elements:
            names = " or ".join(e.name for e in self.elements)
            raise MixMoEError(f"{self.name} stores {names}", q.format.element.name, names)
        if len(q.shape) != 3:
            raise MixMoEError("weights have shape (E, N, K)", q.shape)
        q.check("weights")
        q.check_scales("weights")
        if q.shape[2] % BLOCK and not self.codes.plain:
            nearest = nearest_multiple(q.shape[2], BLOCK)
            raise MixMoEError(f"K must be a multiple of {BLOCK}", q.shape[2], nearest)

    def _pack_codes(self, q: Quantised) -> Tensor:
        experts, n, k = q.shape
        per_byte = 8 // self.unit
        rows, cols = self.codes.padded(n, self.columns(k, q.format.element.bits))
        out = q.codes.new_empty((experts, rows, cols // per_byte), dtype=torch.uint8)
        raw = (contiguous(x).view(torch.uint8) for x in q.codes)
        if not self.signed_zero:
            raw = (x.masked_fill(x == 0x80, 0) for x in raw)
        self.codes.pack(raw, out, per_byte)
        if self.word is not None:
            for storage in out:
                self.word.apply(storage.view(torch.int32))
        return out.view(torch.int32).view(experts, -1, 32) if self.line else out.view(q.codes.dtype)

    def _pack_scales(self, q: Quantised) -> tuple[Tensor | None, Tensor | None]:
        if q.scales is None or q.format.cols == 0:
            return None, None if q.scales is None else q.scales[..., 0].contiguous()
        order = self.scale_order(q.format.scale)
        if order is None:
            return q.scales, None
        experts, n, blocks = q.scales.shape
        out = q.scales.new_empty((experts, *order.padded(n, blocks)))
        row_scale, matrices = None, iter(q.scales)
        if self.fold is not None:
            row_scale = q.scales.new_empty((experts, n), dtype=torch.float32)
            matrices = self._folded(q, self.fold, row_scale)
        order.pack(matrices, out)
        if self.line:
            out = out.view(experts, -1, min(128, order.tile_items))
        return out, row_scale

    def _folded(self, q: Quantised, kind: Fold, row_scale: Tensor) -> Iterator[Tensor]:
        """The bytes of each expert; fills ``row_scale`` on the way."""
        assert q.scales is not None
        for expert, (codes, scales) in enumerate(zip(q.codes, q.scales, strict=True)):
            where = f"{self.name}, expert {expert}"
            matrix, row_scale[expert] = fold(codes, scales, kind, where)
            yield matrix

    def picture(self, element: Element | None = None) -> str:
        """A text that shows which (row, k) sits where, in a matrix of two tiles each way.

        A line gives an offset, the part of the pattern that steps there, and what 16 bytes of
        codes, or 4 scales, hold from that offset on. Offsets count codes of ``unit`` bits.
        """
        return picture(self, element)

    def unpack(self, p: Packed) -> Quantised:
        """The plain weights of ``p``, bit for bit; only the scale of a block of zero codes may
        come back as another power of two after a fold."""
        self.require(p)
        return Quantised(self._unpack_codes(p), self._unpack_scales(p), p.format)

    def _unpack_codes(self, p: Packed) -> Tensor:
        if self.codes.plain:
            return p.codes
        experts, n, k = p.shape
        element, per_byte = p.format.element, 8 // self.unit
        rows, cols = self.codes.padded(n, self.columns(k, element.bits))
        stored = p.codes.view(torch.uint8).view(experts, rows, cols // per_byte)
        out = stored.new_empty((experts, n, k * element.bits // 8))
        self.codes.unpack(map(self._plain_words, stored), out, per_byte)
        return out.view(element.storage)

    def _plain_words(self, storage: Tensor) -> Tensor:
        if self.word is not None:
            storage = storage.clone()
            self.word.apply(storage.view(torch.int32), back=True)
        return storage

    def _unpack_scales(self, p: Packed) -> Tensor | None:
        if p.format.cols == 0:
            return None if p.row_scale is None else p.row_scale.unsqueeze(-1)
        order = self.scale_order(p.format.scale)
        if p.scales is None or order is None:
            return p.scales
        experts, n, k = p.shape
        blocks = k // p.format.cols
        out = p.scales.new_empty((experts, n, blocks))
        order.unpack(p.scales.view(experts, *order.padded(n, blocks)), out)
        if self.fold is not None and p.row_scale is not None:
            for scales, row_scale in zip(out, p.row_scale, strict=True):
                scales.copy_(unfold(scales, row_scale, self.fold))
        return out


def require(
    weights: Packed | Quantised, orders: Sequence[Order], name: str = "weights"
) -> Packed:
    """The weights, if they are in one of these orders: the check that every kernel makes.

    Raises MixMoEError naming the orders that the kernel reads and the order it got.
    """
    if isinstance(weights, Packed) and weights.order in orders:
        return weights
    got = weights.order.name if isinstance(weights, Packed) else "weights that are not packed"
    legal = " or ".join(order.name for order in orders)
    raise MixMoEError(f"{name} must be packed as {legal}", got, f"order_named(..).pack({name})")


def picture(order: Order, element: Element | None = None) -> str:
    """Which (row, k) sits where, for two tiles each way: see :meth:`Order.picture`."""
    element = element or order.elements[0]
    codes, bits = order.codes, element.bits
    n = 2 * codes.halves * codes.tile[0]
    k = 2 * max(BLOCK, order.k_step, codes.tile[1] * order.unit // bits)
    units = "bytes" if order.unit == 8 else f"{order.unit}-bit codes"
    lines = [f"{order.name}: {element.name}, offsets in {units}", f"  codes: {codes.pattern}"]
    shape = n, order.columns(k, bits)
    lines += picture_lines(codes, shape, order.unit, bits, 8 * order.lane // order.unit)
    if order.word is not None:
        value, sign = ({order.word.nibble(i, bit): i for i in range(8)} for bit in (0, 3))
        show = " ".join(f"{value[i]}/{sign[i]}" for i in range(8))
        lines.append(f"  a word's nibbles, lowest first, are value/sign of its codes {show}")
    for kind, scales in order.scales:
        block = BLOCK if kind is ScaleKind.E8M0 else 1
        what = {Fold.NARROW: "(k + 5) * 8", Fold.WIDE: "k + 8", None: f"{kind.value}"}[order.fold]
        lines.append(f"  scales, {what}: {scales.pattern}")
        size = 2 * scales.halves * scales.tile[0], 2 * max(scales.tile[1], BLOCK // block)
        lines += picture_lines(scales, size, block, 1, 4)
    return "\n".join(lines) + "\n"


ROWS = Order(
    "rows",
    (e2m1, e4m3fn, e4m3fnuz, int8, int4, bfloat16, float16),
    Arrangement("(n) (k) -> n k"),
)

# Hopper. The A operand of wgmma m64nNk32 lives in registers: lane 4 g + q of a warp holds rows g
# and g + 8 ("half") of the warp's 16, and of every 32 k the bytes 4 q .. 4 q + 3 ("by") at 0 and
# at 16 ("lohi"). A tile is 16 rows a warp x 128 k. Its parts, slowest first, are
#   row = tile rep warp half g      (gate and up: the half is that of the whole matrix, "gu")
#   k   = slice kt q ks lohi by     (4-bit codes, "ks" the k32 step: see HOPPER_SLOTS)
#   k   = slice kt ks1 ks0 lohi q by                                 (8-bit codes)
# and they are stored so that a lane reads 16 bytes that are its own registers. With k_slices, so
# many warps share their rows ("slice"), each with its own slice of K, and add up.
FRAGMENT_4BIT = "tile kt rep warp slice {half} g q ks lohi by"
FRAGMENT_8BIT = "tile kt {rep_ks1} ks0 warp slice g q lohi {half} by"
K_4BIT, K_8BIT = "q ks lohi by", "ks1 ks0 lohi q by"
# The k32 steps of a wgmma may take the columns of a row in any order that A and B share. In the
# order of 4-bit weights lane q of a quad owns the whole 32-block q of each 128 columns, so that
# its 32 codes need one scale. Stated for the rows of B, x and h, as the hardware counts k: slot
# 16 (2 ks + lohi) + 4 q + by of a group "kg" holds column 32 q + 4 (2 ks + lohi) + by, the layout
# (4,8,4):(1,16,4) of columns by, (ks lohi), q. Rows are padded to whole groups with zeros.
HOPPER_SLOTS = Arrangement(
    "(n) (kg q ks lohi by) -> n kg ks lohi q by", (("q", 4), ("ks", 4), ("lohi", 2), ("by", 4))
)
# Signs leave the nibble so that prmt can use its low three bits: codes 0..3 keep their sign at
# bits 7, 15, 23, 31, codes 4..7 at 3, 11, 19, 27. One mask and one shift sign all eight results.
HOPPER_WORD = Word(Layout(8, 1), Layout((4, 2), (2, 1)), flip=1)


@dataclass(frozen=True, slots=True)
class HopperTile:
    """Which rows and k lie together in a Hopper order: ``16 * repeat * warps`` rows x 128 k.

    ``gate_up`` pairs gate row i and up row i in one lane, as rows g and g + 8 of a fragment.
    ``k_slices`` splits K over the warps that share rows. ``k64`` (with ``repeat`` > 1) stores the
    first 64 k of all rows of a tile before the last 64.
    """

    gate_up: bool = False
    warps: int = 8
    repeat: int = 1
    k_slices: int = 1
    k64: bool = False

    def __post_init__(self) -> None:
        legal = {"warps": (1, 2, 4, 8), "repeat": (1, 2, 4)}
        for field, values in legal.items():
            if getattr(self, field) not in values:
                raise MixMoEError(f"{field} of a Hopper order", getattr(self, field), values)
        if self.k_slices < 1 or self.warps % self.k_slices:
            raise MixMoEError("k_slices divides the warps", (self.k_slices, self.warps), self.warps)
        if self.k64 and self.repeat == 1:
            raise MixMoEError("k64 orders repeats and needs some", "repeat 1", "repeat 2")

    def __str__(self) -> str:
        parts = [("gu", self.gate_up), (f"w{self.warps}", self.warps != 8)]
        parts += [(f"r{self.repeat}", self.repeat != 1), (f"s{self.k_slices}", self.k_slices != 1)]
        return "".join(f"_{text}" for text, said in [*parts, ("k64", self.k64)] if said)

    def arrangement(self, k: str, stored: str) -> Arrangement:
        """The order of the codes; ``k`` names the parts of 128 columns, ``stored`` leaves open
        where the half and the repeats go."""
        half = "gu" if self.gate_up else "half"
        row = "gu tile rep warp g" if self.gate_up else "tile rep warp half g"
        order = stored.format(half=half, rep_ks1="ks1 rep" if self.k64 else "rep ks1")
        apart = self.warps // self.k_slices
        teams = ("rep", self.repeat), ("warp", apart), ("slice", self.k_slices)
        parts = {"ks1": 2, "ks0": 2, "ks": 4, "lohi": 2, "q": 4, "by": 4}
        lane = ((half, 2), ("g", 8), *((name, parts[name]) for name in k.split()))
        return Arrangement(f"({row}) (slice kt {k}) -> {order}", teams + lane)


def hopper_fp4(tile: HopperTile = HopperTile(), fold: Fold = Fold.NARROW) -> Order:
    """mxfp4 as the A fragment of an FP8 wgmma whose B rows are in the order ``HOPPER_SLOTS``.

    Codes: int32 (E, 8 * warps * repeat * tiles, 32), one word = 8 codes of one row and one
    32-block, a lane's four words = one block; scales: uint8 (E, warps * repeat / 2 * tiles, 128),
    the bytes that ``fold`` says, stored as the codes are, without the parts inside a block.
    """
    if tile.k64:
        raise MixMoEError("4-bit orders keep 128 k together", "k64", "k64=False")
    codes = tile.arrangement(K_4BIT, FRAGMENT_4BIT)
    suffix = "_wide" if fold is Fold.WIDE else ""
    scales = ((ScaleKind.E8M0, codes.without("ks", "lohi", "by")),)
    name = f"hopper_fp4q{tile}{suffix}"
    return Order(
        name, (e2m1,), codes, unit=4, word=HOPPER_WORD, scales=scales, fold=fold, line=True
    )


def hopper_fp8(tile: HopperTile = HopperTile()) -> Order:
    """e4m3fn as the A fragment of an FP8 wgmma: a lane's 16 bytes are the four registers of one
    m16k32 step. Codes: int32 (E, 16 * warps * repeat * tiles, 32); block scales stay plain."""
    return Order(f"hopper_fp8{tile}", (e4m3fn,), tile.arrangement(K_8BIT, FRAGMENT_8BIT), line=True)


# CDNA. A lane reads 16 bytes of one row ("b"), 16 lanes 16 rows ("r"): 256 bytes, and the wave's
# four groups of lanes the next 16 bytes each, so a wave's load is 1 KiB without gaps. "gu" stores
# 16 gate rows, then the 16 up rows that belong to them. K is padded to one scaled MFMA (128).
CDNA_K_STEP = 128
CDNA_SIZES = (("gu", 2), ("r", 16), ("kl", 2), ("b", 16))
CDNA_ELEMENTS = (e2m1, e4m3fn, e4m3fnuz, int8, bfloat16, float16)
# E8M0 scales: one dword a lane holds rows r and r + 16 of blocks kl and kl + 4, which are the four
# bytes op_sel picks from; padded to 256 rows and 8 blocks with 2^0.
TILE_SIZES = (("gu", 2), ("rh", 2), ("r", 16), ("kh", 2), ("kl", 4))
E8M0_TILE = Arrangement("(rb rh r) (kb kh kl) -> rb kb kl r kh rh", TILE_SIZES, (256, 8), 127)
E8M0_TILE_GU = Arrangement("(gu rb r) (kb kh kl) -> rb kb kl r kh gu", TILE_SIZES, (128, 8), 127)
# int4: eight codes in the bytes v4v0 v5v1 v6v2 v7v3, so that one mask gives four int8 in order.
# Scales lie along N, bf16 in pairs of groups so that a lane reads a dword.
CDNA_INT4_WORD = Word(Layout((4, 2), (2, 1)), Layout((4, 2), (2, 1)))
INT4_SIZES = (("gu", 2), ("r", 16), ("e", 16), ("pair", 2))


def _cdna(name: str, pattern: str, scales: Arrangement) -> Order:
    codes, kinds = Arrangement(pattern, CDNA_SIZES), ((ScaleKind.E8M0, scales),)
    return Order(name, CDNA_ELEMENTS, codes, k_step=CDNA_K_STEP, scales=kinds)


def _cdna_int4(name: str, pattern: str, pairs: str, single: str) -> Order:
    scales = (
        (ScaleKind.BF16, Arrangement(pairs, INT4_SIZES)),
        (ScaleKind.F32, Arrangement(single, INT4_SIZES)),
    )
    codes = Arrangement(pattern, INT4_SIZES)
    return Order(
        name,
        (int4,),
        codes,
        unit=4,
        k_step=CDNA_K_STEP,
        word=CDNA_INT4_WORD,
        scales=scales,
        lane=8,
    )


# Runs, for instructions without scales: a lane's 16 bytes are runs of 8 codes ("e"), each from the
# next block of 32 ("s"), so that an MFMA of K = 32 multiplies one block and its scale goes onto
# that sum. Scales: four rows ("q", those of one lane's results) of as many blocks as 16 bytes hold.
# 4-bit codes lie in a word as in cdna_int4.
RUN_SIZES = (("gu", 2), ("r", 16), ("kl", 4), ("e", 8), ("rg", 4), ("q", 4))


def _cdna_runs(bits: int, gate_up: bool) -> Order:
    rows, stored = ("gu nb", "nb gu") if gate_up else ("nb", "nb")
    sizes = (*RUN_SIZES, ("s", 16 // bits))
    codes = f"({rows} r) (kb s kl e) -> {stored} kb kl r s e"
    scale = f"({rows} rg q) (kb c) -> {stored} kb rg c q"
    sizes_of = {ScaleKind.E8M0: 1, ScaleKind.BF16: 2, ScaleKind.F32: 4}
    kinds = sizes_of if bits == 4 else (ScaleKind.E8M0,)
    scales = [
        (kind, Arrangement(scale, (*RUN_SIZES, ("c", 4 // sizes_of[kind])))) for kind in kinds
    ]
    return Order(
        f"cdna_runs{bits}{'_gui' if gate_up else ''}",
        (e2m1, int4) if bits == 4 else (e4m3fn,),
        Arrangement(codes, sizes),
        unit=bits,
        k_step=CDNA_K_STEP,
        word=CDNA_INT4_WORD if bits == 4 else None,
        scales=tuple(scales),
    )


CDNA_ORDERS = (
    _cdna("cdna_n16", "(nb r) (kb b) -> nb kb r b", E8M0_TILE),
    _cdna("cdna_n16_gui", "(gu nb r) (kb b) -> nb gu kb r b", E8M0_TILE_GU),
    _cdna("cdna_k_major", "(nb r) (kb kl b) -> kb nb kl r b", E8M0_TILE),
    _cdna("cdna_k_major_gui", "(gu nb r) (kb kl b) -> kb nb gu kl r b", E8M0_TILE_GU),
    _cdna_int4("cdna_int4", "(nb r) (kb e) -> nb kb r e",
               "(nb r) (kb pair) -> kb nb r pair", "(nb r) (kb) -> kb nb r"),
    _cdna_int4("cdna_int4_gui", "(gu nb r) (kb e) -> nb gu kb r e",
               "(gu nb r) (kb pair) -> kb nb gu r pair", "(gu nb r) (kb) -> kb nb gu r"),
)
CDNA_RUNS = tuple(_cdna_runs(bits, gate_up) for bits in (4, 8) for gate_up in (False, True))
CDNA_UZ = tuple(
    replace(o, name=o.name.replace("cdna", "cdna_uz"), elements=(e4m3fn,), signed_zero=False)
    for o in (*CDNA_ORDERS[:2], *CDNA_RUNS[2:])
)

HOPPER_TILES = [
    HopperTile(gate_up, warps, repeat, k_slices, k64)
    for gate_up in (False, True)
    for warps in (1, 2, 4, 8)
    for repeat in (1, 2)
    for k_slices in (1, 2, 4, 8)
    if warps % k_slices == 0
    for k64 in (False, True)
    if repeat > 1 or not k64
]
ORDERS: dict[str, Order] = {
    order.name: order
    for order in (
        ROWS,
        *CDNA_ORDERS,
        *CDNA_RUNS,
        *CDNA_UZ,
        *(hopper_fp4(tile, fold) for tile in HOPPER_TILES if not tile.k64 for fold in Fold),
        *(hopper_fp8(tile) for tile in HOPPER_TILES),
    )
}


def order_named(name: str | Order) -> Order:
    """Look an order up by name; an instance passes through."""
    if isinstance(name, Order):
        return name
    if name not in ORDERS:
        near = difflib.get_close_matches(name, ORDERS, 4) or ["rows", "hopper_fp4q", "cdna_n16"]
        raise MixMoEError("unknown order of weights", name, ", ".join(near))
    return ORDERS[name]
