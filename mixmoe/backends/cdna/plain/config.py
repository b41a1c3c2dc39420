"""One GEMM on the MFMAs without scales as a compile-time record, and the layouts it reads through.

K in a lane. A step of the main loop multiplies ``step_k`` values of K; of these, lane group g of
4 holds ``pieces`` runs of ``run`` consecutive ones, from ``run * (4 piece + g)`` on, of weights
and of tokens alike. So 16-byte pieces of plain rows (``run`` = 16 bytes of weights) serve where a
scale is a whole row's, and runs of 8 where a block of 32 has a scale of its own.
"""

import math
from dataclasses import dataclass

from mixmoe.backends.cdna.atoms import MFMA_ROWS, PIECE, SCALE_BLOCK, WAVE, WORD, Atoms, Mma
from mixmoe.backends.cdna.config import WAVES, Modes
from mixmoe.backends.cdna.grid import Walk
from mixmoe.backends.cdna.plain.decode import UNSIGNED, Decoder, keep, token_decoder, weight_decoder
from mixmoe.errors import MixMoEError
from mixmoe.formats import Format, ScaleKind, bfloat16, e2m1
from mixmoe.layout import Layout
from mixmoe.preshuffle import Order, order_named

TOKENS = (16, 32, 64, 128)
STAGES_BYTES = 32 << 10  # LDS of token codes that two workgroups of gfx942 have room for
FRAGMENTS = 4  # of tokens in registers: those ahead, the phase's, and the one whose sums are closed
LOAD_CYCLES = 640  # from a load's start to its use, of a memory latency of 600
SCALE_WORDS = {ScaleKind.E8M0: 1, ScaleKind.BF16: 2, ScaleKind.F32: 4}  # of four rows


@dataclass(frozen=True, slots=True)
class Gemm:
    """Weights ``(halves * rows, k)`` of an expert times ``tokens`` sorted routes, per workgroup.

    ``mma`` multiplies; ``halves`` is 2 for gate above up, else 1; a wave owns ``blocks`` 16-row
    blocks of each half; ``sort_tiles`` tiles make up a block of the sorted routes. ``k_waves`` of
    the four waves share K, and their sums meet in LDS; ``streaming`` weights are not kept in L2;
    ``walk`` says which workgroup takes which tiles.
    """

    atoms: Atoms
    mma: Mma
    weight: Format
    token: Format
    order: str
    halves: int
    rows: int
    k: int
    tokens: int = 32
    blocks: int = 2
    sort_tiles: int = 1
    k_waves: int = 1
    streaming: bool = False
    walk: Walk = Walk()

    def __post_init__(self) -> None:
        if self.tokens not in TOKENS:
            raise MixMoEError("a tile holds 16, 32, 64 or 128 tokens", self.tokens, 32)
        if self.k_waves not in (1, 2, 4):
            raise MixMoEError("1, 2 or 4 waves share K", self.k_waves, 1)
        if self.blocks not in (1, 2):
            raise MixMoEError("a wave owns 1 or 2 blocks of 16 rows", self.blocks, 2)
        for what, period in (("weight", self.weight_period), ("token", self.token_period)):
            if period and (period % self.step_k or self.tile_k % period):
                legal = f"a multiple of {self.step_k} that divides {self.tile_k}"
                raise MixMoEError(f"K of a {what} scale on {self.atoms.arch}", period, legal)
        if self.weight.rows % MFMA_ROWS and self.weight.rows > 1:
            raise MixMoEError(f"rows of a weight scale on {self.atoms.arch}, a multiple of",
                              self.weight.rows, MFMA_ROWS)
        if self.sums_bytes > self.stages * self.code_bytes:
            raise MixMoEError("sums of waves that share K fit where the codes were",
                              f"{self.sums_bytes} bytes", "fewer blocks")
        if self.lds_bytes > self.atoms.lds_bytes:
            rule = f"{self.atoms.arch} has {self.atoms.lds_bytes} bytes of LDS: the tile needs"
            raise MixMoEError(rule, self.lds_bytes, "fewer tokens")

    @property
    def name(self) -> str:
        """All of it as one identifier: a kernel's name in profiles, and the cache's key."""
        shape = f"{self.halves}x{self.rows}x{self.k}"
        tile = f"t{self.tokens}b{self.blocks}s{self.sort_tiles}k{self.k_waves}"
        place = f"n{self.streaming:d}{self.walk.name}"
        formats = f"{self.atoms.arch}_{self.token}_{self.weight}"
        return f"{formats}_{self.order}_{shape}_{tile}{place}"

    # K.

    @property
    def runs(self) -> bool:
        """Whether a lane's weights are runs of 8 codes of several blocks of 32."""
        return "_runs" in self.order

    @property
    def run(self) -> int:
        """Consecutive K of a lane."""
        return 8 if self.runs else 8 * PIECE // self.weight.element.bits

    @property
    def mma_k(self) -> int:
        """K of the MFMA: the largest that a scale's blocks and the lanes' runs allow."""
        block = self.weight_period or SCALE_BLOCK
        return max(k for k in self.mma.ks if not self.runs or k <= block)

    @property
    def pieces(self) -> int:
        """Runs of a lane in a step."""
        return max(1, self.mma_k // 4 // self.run)

    @property
    def step_k(self) -> int:
        """K of a step."""
        return 4 * self.run * self.pieces

    @property
    def mmas(self) -> int:
        """MFMAs of a step for 16 rows and 16 tokens."""
        return self.step_k // self.mma_k

    @property
    def mma_words(self) -> int:
        """32-bit words of a lane's operand of one MFMA."""
        return self.mma_k // 4 * self.mma.bits // 32

    @property
    def tile_k(self) -> int:
        """K of a tile: a sum's period lies twice in it, so that weights are decoded a period
        ahead; twice as much for 16 tokens, whose tiles else take less than a load, if it fits."""
        least = max(2048 // self.mma.bits, 2 * self.period)
        stages = 2 * self.k_waves * MFMA_ROWS * least * self.mma.bits // 8
        few = self.tokens == MFMA_ROWS and self.mma_k < 128 and 2 * stages <= STAGES_BYTES
        return 2 * least if few else least

    @property
    def k_tiles(self) -> int:
        """Tiles of the main loop."""
        return -(-self.k // self.tile_k)

    @property
    def steps(self) -> int:
        """Steps of a K tile."""
        return self.tile_k // self.step_k

    @property
    def k_steps(self) -> int:
        """Steps of all K."""
        return -(-self.k // self.step_k)

    def steps_of(self, kt: int) -> int:
        """Steps of a part's K tile; none behind the last, which may be short."""
        if kt >= self.part_tiles:
            return 0
        return self.steps if self.parts > 1 else min(self.steps, self.k_steps - kt * self.steps)

    @property
    def unit(self) -> int:
        """Steps whose products share a sum: those of 16 tokens follow each other. Two at least,
        where weights are operands: the compiler moves an MFMA that stands alone."""
        if self.period:
            return max(1, self.period // self.step_k)
        return 2 if self.keeps and self.steps > 2 * (self.tokens == MFMA_ROWS) else 1

    def units_of(self, steps: int) -> int:
        """Units of a tile of so many steps."""
        return -(-steps // self.unit)

    @property
    def unit_cycles(self) -> int:
        """What the MFMAs of a unit take."""
        mmas = self.unit * self.mmas * self.halves * self.blocks * self.groups
        return mmas * self.mma.cycles(self.mma_k)

    @property
    def ring(self) -> int:
        """K tiles of weights in registers: a place is filled again as soon as it is decoded, so
        one is enough where the rest of the tile takes longer than a load."""
        enough = self.weight_pieces > 1 and self.load_share(1) >= 0.5
        return 1 if enough and self.phases % FRAGMENTS == 0 else 2

    def load_share(self, ring: int) -> float:
        """The share of a unit's time in which loads for it may start and still be in time. What
        is an operand as it is waits for the unit to end, and is needed all at once; what is decoded
        is needed in the order of its loads."""
        units = self.units_of(self.steps) * ring
        if self.keeps:
            return min(1.0, units - 1 - LOAD_CYCLES / self.unit_cycles)
        busy = max(1.0, 4 / self.step_words / self.unit)
        return float((units - busy) * self.unit_cycles >= LOAD_CYCLES)

    @property
    def phases(self) -> int:
        """Phases of a whole tile, one for 16 tokens of one unit."""
        return self.units_of(self.steps) * self.groups

    @property
    def ahead(self) -> int:
        """Phases between a read of tokens and its use."""
        return 2 if self.phases > 2 else 1

    # Scales.

    @property
    def weight_period(self) -> int:
        """K of a weight's scale; 0 where it is the row's or there is none."""
        return 0 if self.weight.scale is ScaleKind.NONE else self.weight.cols

    @property
    def token_period(self) -> int:
        """K of a token's scale; 0 where it is the row's or there is none."""
        return 0 if self.token.scale is ScaleKind.NONE else self.token.cols

    @property
    def folds(self) -> bool:
        """Whether weights take their scales as they are decoded: exact, as bf16 has float32's
        exponents, and cheaper than scaling sums. fp16 has not."""
        return (
            self.atoms.converts_e2m1
            and self.weight.element is e2m1
            and self.mma.element is bfloat16
        )

    @property
    def period(self) -> int:
        """K after which a sum is scaled and put onto the float32 total; 0: only at the end."""
        return math.gcd(0 if self.folds else self.weight_period, self.token_period)

    @property
    def weight_decoder(self) -> Decoder:
        """From stored weights to operands."""
        if not order_named(self.order).signed_zero:
            return UNSIGNED
        decoder = weight_decoder(self.weight.element, self.mma.element)
        assert decoder is not None, (self.weight, self.mma)
        return decoder

    @property
    def keeps(self) -> bool:
        """Whether weights are operands as they are stored."""
        return not self.folds and self.weight_decoder.parts == (keep,)

    @property
    def token_decoder(self) -> Decoder:
        """From tokens in memory to operands."""
        decoder = token_decoder(self.token.element, self.mma.element)
        assert decoder is not None, (self.token, self.mma)
        return decoder

    @property
    def factor(self) -> float:
        """What every sum is multiplied by, beside the scales."""
        return self.weight_decoder.factor * self.token_decoder.factor

    @property
    def row_scaled(self) -> tuple[bool, bool]:
        """Whether weights, tokens have one scale for a whole row."""
        return tuple(
            f.scale is not ScaleKind.NONE and f.cols == 0 for f in (self.weight, self.token)
        )  # type: ignore[return-value]

    # Tiles.

    @property
    def groups(self) -> int:
        """MFMA columns of a tile: groups of 16 tokens."""
        return self.tokens // MFMA_ROWS

    @property
    def tile_rows(self) -> int:
        """Rows of each half that a workgroup computes."""
        return self.team * self.blocks * MFMA_ROWS

    @property
    def team(self) -> int:
        """Waves that multiply the same part of K."""
        return WAVES // self.k_waves

    @property
    def split_k(self) -> int:
        """Workgroups that share K: one."""
        return 1

    @property
    def parts(self) -> int:
        """Parts that K is cut into."""
        return self.k_waves

    @property
    def part_tiles(self) -> int:
        """K tiles of a part; the last part may reach beyond K."""
        return -(-self.k_tiles // self.parts)

    @property
    def sums_bytes(self) -> int:
        """LDS through which the sums of all parts but the first pass."""
        fragments = self.halves * self.blocks * self.groups
        return (self.k_waves - 1) * self.team * fragments * WAVE * PIECE

    @property
    def row_tiles(self) -> int:
        """Workgroups along the rows."""
        return -(-self.rows // self.tile_rows)

    # Tokens, in memory and in LDS.

    @property
    def chunks(self) -> int:
        """16-byte chunks of a token's K tile in LDS."""
        return self.tile_k * self.mma.bits // (8 * PIECE)

    @property
    def row_chunks(self) -> int:
        """The same of its whole row."""
        return self.k * self.mma.bits // (8 * PIECE)

    @property
    def chunk_words(self) -> int:
        """Words in memory that become a chunk."""
        return 4 * self.token.element.bits // self.mma.bits

    @property
    def run_words(self) -> int:
        """Words of a run of tokens in LDS: a chunk or half of one."""
        return self.run * self.mma.bits // 32

    @property
    def code_bytes(self) -> int:
        """LDS of one stage of token codes."""
        return self.tokens * self.chunks * PIECE

    @property
    def token_scales(self) -> int:
        """Scales of a token along K."""
        return -(-self.k // self.token_period) if self.token_period else 0

    @property
    def tile_scales(self) -> int:
        """Scales of a token in a K tile."""
        return self.tile_k // self.token_period if self.token_period else 0

    @property
    def scale_stride(self) -> int:
        """Words from one column of token scales in LDS to the next: neighbours of a row that are
        written together lie in other banks."""
        return self.tokens + self.atoms.banks // 8

    @property
    def scale_room(self) -> int:
        """Words of one stage of token scales."""
        return self.tile_scales * self.scale_stride

    @property
    def stages(self) -> int:
        """Stages of tokens in LDS: two of each part of K."""
        return 2 * self.k_waves

    @property
    def lds_bytes(self) -> int:
        """LDS of a workgroup: the stages of codes and of scales."""
        return self.stages * (self.code_bytes + WORD * self.scale_room)

    def swizzled(self, token, run):
        """Where in its row a run of codes lies: XOR with the row, so that lanes that read one
        column of 16 rows spread over all banks. Where a bank line holds 32 runs two lane groups
        are served together: then neighbours stay apart too. Its own inverse."""
        row = token % MFMA_ROWS
        if self.atoms.banks // self.run_words > MFMA_ROWS:
            row = 2 * row + row % 2
        return run ^ row

    # Weights, in memory.

    @property
    def weight_pieces(self) -> int:
        """16-byte pieces of a lane's weights of 16 rows in a K tile."""
        return self.tile_k // 4 * self.weight.element.bits // (8 * PIECE)

    @property
    def step_words(self) -> int:
        """Words of a lane's weights in a step."""
        return self.step_k // 4 * self.weight.element.bits // 32

    @property
    def row_pieces(self) -> int:
        """16-byte pieces of a lane's weights of 16 rows in all K, padding included."""
        columns = self.code_modes()[1][1][0]
        return columns // 4

    def first_step(self, piece: int) -> int:
        """The first step of a tile that a piece has words of."""
        return piece * 4 // self.step_words

    def last_step(self, piece: int) -> int:
        """The last one."""
        return (piece * 4 + 3) // self.step_words

    def code_modes(self) -> tuple[Modes, Modes]:
        """``((16, row blocks, halves), (4, 16-byte columns))`` of an expert's codes, in words."""
        order = order_named(self.order)
        layout = order.layout(self.halves * self.rows, self.k, self.weight.element.bits)
        rows = self._row_modes(layout, order, 32 // order.unit)
        total = self.code_words // (self.halves * rows[1][0] * MFMA_ROWS * 4)
        return rows, ((4, 1), (total, MFMA_ROWS * 4))

    @property
    def code_words(self) -> int:
        """Words of an expert's codes, padding included."""
        order = order_named(self.order)
        n, k = self.halves * self.rows, order.columns(self.k, self.weight.element.bits)
        return math.prod(order.codes.padded(n, k)) * order.unit // 32

    def scale_modes(self) -> tuple[Modes, Modes]:
        """``((4 row groups, row blocks, halves), (words of 4 rows, (columns of a load, loads)))``
        of an expert's block scales, in words."""
        order, kind = order_named(self.order), self.weight.scale
        arrangement = order.scale_order(kind)
        assert arrangement is not None, (self.order, kind)
        size = SCALE_WORDS[kind]
        layout = arrangement.layout(self.halves * self.rows, self.k // self.weight_period)
        _, blocks, halves = self._row_modes(layout, order, 4 // size)
        per = 4 // size
        loads = -(-self.k // self.weight_period // per)
        return ((4, 4), blocks, halves), ((size, 1), (per, size), (loads, 16))

    @property
    def scale_words(self) -> int:
        """Words of an expert's block scales, padding included."""
        rows, columns = self.scale_modes()
        return math.prod(n for n, _ in (*rows, *columns))

    def _row_modes(self, layout: Layout, order: Order, unit: int) -> Modes:
        """Rows of a block, blocks, halves of a layout in ``1 / unit`` words."""
        n = self.halves * self.rows
        blocks = self.rows // MFMA_ROWS
        step = layout(MFMA_ROWS, 0) // unit if blocks > 1 else 0
        half = layout(order.codes.row_of(self.rows, n), 0) // unit if self.halves == 2 else 0
        return ((MFMA_ROWS, layout(1, 0) // unit), (blocks, step), (self.halves, half))
