"""One GEMM of a layer as a compile-time record, and the layouts that its kernel reads through.

The layouts are those that ``mixmoe.preshuffle`` packs by: stated there once, taken apart here
into the coordinates a wave holds, in 32-bit words.
"""

import math
from dataclasses import dataclass
from enum import Enum

from mixmoe.backends.cdna.atoms import (
    MFMA_ROWS,
    PIECE,
    SCALE_BLOCK,
    WAVE,
    WORD,
    Atoms,
    Operand,
)
from mixmoe.backends.cdna.grid import Walk
from mixmoe.errors import MixMoEError
from mixmoe.formats import ScaleKind
from mixmoe.layout import Layout
from mixmoe.preshuffle import order_named

TILE_K = 256  # one dword of weight scales per lane: two MFMA steps of two 16-row blocks
WAVES = 4
THREADS = WAVES * WAVE
STEPS_OF_DWORD = 4  # MFMA steps that a lane's dword of token scales serves: two K tiles
MOST_STAGES = 4
LDS_GRANULE = 1280  # LDS is given out in these, gfx950 (LLVM AMDGPUUsage)
TOKENS, BLOCKS, RINGS = (16, 32, 64, 128), (2, 4, 8), (4, 8)

class RowsOut(Enum):
    """What stage 2 leaves in memory."""

    ROWS = "rows"  # a row per route in the output's type; combine adds them in slot order
    SUMS = "sums"  # float32 per token, to which every route adds its weighted row atomically
    CODES = "codes"  # a row per route in e4m3 with an E8M0 scale per 32: half of bf16's bytes


Modes = tuple[tuple[int, int], ...]  # (size, stride) of each part, fastest first


@dataclass(frozen=True, slots=True)
class Gemm:
    """Weights ``(halves * rows, k)`` of an expert times ``tokens`` sorted routes, per workgroup.

    ``halves`` is 2 for gate above up, else 1; a wave owns ``blocks`` 16-row blocks of each half;
    ``sort_tiles`` tiles make up a block of the sorted routes; ``ring`` MFMA steps of weights live
    in registers: the one multiplied and those on their way. K may be shared out: over ``k_waves``
    of the four waves, whose sums meet in LDS, and over ``split_k`` workgroups, whose sums meet in
    memory. ``streaming`` weights are not kept in L2; ``waves_per_eu`` waves a SIMD (workgroups a
    CU) shall fit, by the LDS they use; ``far`` tokens lie more than 4 GiB apart, ``far_rows`` of
    results more than 2; ``walk`` says which workgroup takes which tiles.
    """

    atoms: Atoms
    weight: Operand
    token: Operand
    order: str
    halves: int
    rows: int
    k: int
    tokens: int = 32
    blocks: int = 2
    sort_tiles: int = 1
    ring: int = 4
    k_waves: int = 1
    split_k: int = 1
    streaming: bool = False
    waves_per_eu: int = 1
    far: bool = False
    far_rows: bool = False
    walk: Walk = Walk()

    def __post_init__(self) -> None:
        if self.tokens not in TOKENS:
            raise MixMoEError("a tile holds 16, 32, 64 or 128 tokens", self.tokens, 32)
        if self.blocks not in BLOCKS:  # pairs: 32 rows share a dword of scales and an MX block
            raise MixMoEError("a wave owns 2, 4 or 8 blocks of 16 rows", self.blocks, 2)
        if self.ring not in RINGS:
            raise MixMoEError("a ring holds 4 or 8 steps of weights", self.ring, 4)
        if self.period and self.tokens > 64:
            raise MixMoEError("sums scaled along K leave registers for 64 tokens", self.tokens, 64)
        if self.period and self.period % (self.blocks * MFMA_ROWS):
            raise MixMoEError("a wave's rows lie in one block of scales", self.blocks, 4)
        if self.k_waves not in (1, 2, 4):
            raise MixMoEError("1, 2 or 4 waves share K", self.k_waves, 1)
        if not 1 <= self.split_k <= max(1, self.k_tiles):
            raise MixMoEError("split_k, at most the K tiles", self.split_k, self.k_tiles)
        if self.split_k > 1 and self.halves == 1:
            raise MixMoEError("split_k is for stage 1, which has a kernel that adds up",
                              self.split_k, "k_waves")
        if self.split_k > 1 and not self.token.block:
            raise MixMoEError("split_k is for tokens with a scale for each block of K",
                              self.split_k, "k_waves")
        if self.sums_bytes > self.k_waves * self.stages * self.code_bytes:
            raise MixMoEError("sums of waves that share K fit where the codes were",
                              f"{self.sums_bytes} bytes", "fewer blocks")
        if self.lds_bytes > self.atoms.lds_bytes:
            raise MixMoEError(
                f"{self.atoms.arch} has {self.atoms.lds_bytes} bytes of LDS: a tile of "
                f"{self.tokens} tokens and K = {self.k}",
                f"{self.lds_bytes} bytes",
                "fewer tokens",
            )

    @property
    def name(self) -> str:
        """All of it as one identifier: a kernel's name in profiles, and the cache's key."""
        formats = f"{self.atoms.arch}_{self.token.name}_{self.weight.name}"
        shape = f"{self.halves}x{self.rows}x{self.k}"
        tile = f"t{self.tokens}b{self.blocks}s{self.sort_tiles}r{self.ring}"
        split = f"k{self.k_waves}z{self.split_k}"
        place = f"n{self.streaming:d}o{self.waves_per_eu}f{self.far:d}{self.far_rows:d}"
        return f"{formats}_{self.order}_{shape}_{tile}{split}{place}{self.walk.name}"

    @property
    def scaled(self) -> bool:
        """Whether the MFMA applies a scale: of either operand, the other's may be 2^0."""
        return self.weight.block > 0 or self.token.block > 0

    @property
    def period(self) -> int:
        """K after which a sum is scaled and put onto the total; 0: the total is the MFMA's."""
        return self.token.period

    @property
    def groups(self) -> int:
        """MFMA columns of a tile: groups of 16 tokens."""
        return self.tokens // MFMA_ROWS

    @property
    def sum_registers(self) -> int:
        """A lane's registers of results."""
        return self.halves * self.blocks * self.groups * 4

    @property
    def peels(self) -> bool:
        """Whether the loop's first round stands before it: its MFMAs then add to a constant 0, and
        no register is set to it first, up to a fifth of all VALU. With more results the compiler
        needs so many registers for it that no second workgroup fits a CU (simulated: 250 to 290
        for a4w4, 256 x 128)."""
        return self.sum_registers <= 64

    @property
    def crowded(self) -> bool:
        """Whether results, weights on their way and tokens overfill the 256 registers that vector
        instructions reach. Results then go where the MFMA alone reads and writes (AGPRs); else the
        compiler moves them to and fro: for a8w8_mx, 256 x 128, 0.41 VALU an MFMA where it is 0.15
        (simulated). With less on its way that would only add moves at the end."""
        ring = self.halves * self.blocks * self.ring * 4 * self.weight.pieces
        return self.sum_registers + ring + 4 * 4 * self.token.pieces > 272

    @property
    def tile_rows(self) -> int:
        """Rows of each half that a workgroup computes."""
        return self.team * self.blocks * MFMA_ROWS

    @property
    def team(self) -> int:
        """Waves that multiply the same part of K."""
        return WAVES // self.k_waves

    @property
    def parts(self) -> int:
        """Parts that K is cut into."""
        return self.k_waves * self.split_k

    @property
    def part_tiles(self) -> int:
        """K tiles of a part; an even number where there are several, so that a part begins with
        a dword of token scales. The last part may reach beyond K."""
        if self.parts == 1:
            return self.k_tiles
        return -(-self.k_tiles // (2 * self.parts)) * 2

    @property
    def sums_bytes(self) -> int:
        """LDS through which the sums of all parts but the first of a workgroup pass."""
        fragments = self.halves * self.blocks * self.groups
        return (self.k_waves - 1) * self.team * fragments * WAVE * PIECE

    @property
    def row_tiles(self) -> int:
        """Workgroups along the rows."""
        return -(-self.rows // self.tile_rows)

    @property
    def k_tiles(self) -> int:
        """Steps of the main loop."""
        return -(-self.k // TILE_K)

    @property
    def steps(self) -> int:
        """MFMA steps of a K tile."""
        return TILE_K // self.atoms.mfma_k

    @property
    def k_steps(self) -> int:
        """MFMA steps of all K."""
        return -(-self.k // self.atoms.mfma_k)

    def steps_of(self, kt: int) -> int:
        """MFMA steps of a part's K tile: the last of K may be short."""
        return self.steps if self.parts > 1 else min(self.steps, self.k_steps - kt * self.steps)

    @property
    def chunks(self) -> int:
        """16-byte pieces of a token's K tile."""
        return self.token.row_bytes(TILE_K) // PIECE

    @property
    def row_words(self) -> int:
        """32-bit words of a token's row in memory."""
        return self.token.row_bytes(self.k) // WORD

    @property
    def scale_blocks(self) -> int:
        """Scales of a token's row."""
        return self.k // SCALE_BLOCK

    @property
    def scale_unit(self) -> int:
        """Bytes of a token's scales that one load takes: rows start at multiples of it."""
        unit = math.gcd(self.scale_blocks, PIECE)
        return WORD if unit == 2 * WORD else unit

    @property
    def code_bytes(self) -> int:
        """LDS of one stage of token codes."""
        return self.tokens * self.token.row_bytes(TILE_K)

    @property
    def scale_dwords(self) -> int:
        """A lane's dwords of the scales of one token, for all K."""
        return -(-self.k_steps // STEPS_OF_DWORD)

    @property
    def scale_stride(self) -> int:
        """LDS words from one dword's token scales to the next's: a 16-byte piece of every token,
        and two more, so that pieces of one token lie in different banks. Of float32 scales along K
        from one column of tokens to the next: neighbours that bring a token's write other banks."""
        if self.period:
            return self.tokens * 5 // 4
        return (self.tokens + 2) * PIECE // WORD

    @property
    def scale_room(self) -> int:
        """LDS bytes of the token scales: of all K, or one of each row."""
        if self.period:
            return self.k_steps * self.scale_stride * WORD
        if not self.token.block:
            return self.tokens * WORD
        return self.scale_dwords * self.scale_stride * WORD

    @property
    def channel_bytes(self) -> int:
        """LDS of the scales of the tile's weight rows, where each row has one; of each wave's rows
        along K."""
        if self.period:
            return WAVES * self.halves * self.k_steps * WORD
        return 0 if self.weight.block else self.halves * self.tile_rows * WORD

    @property
    def place_bytes(self) -> int:
        """LDS of the rows of memory that the tile's results go to."""
        return self.tokens * WORD

    @property
    def lines(self) -> bool:
        """Whether codes of h go through LDS, to be stored in 16-byte pieces: where every wave has
        columns of its own and all of them exist."""
        mine = self.halves == 2 and self.token.block > 0 and self.parts == 1
        return mine and self.rows % self.tile_rows == 0

    @property
    def block_bytes(self) -> int:
        """LDS of the scales of those."""
        return self.tokens * self.tile_rows // SCALE_BLOCK if self.lines else 0

    @property
    def stages(self) -> int:
        """K tiles of token codes in LDS: as many as fit, of at most four."""
        room = self.atoms.lds_bytes // self.waves_per_eu // LDS_GRANULE * LDS_GRANULE
        fit = (room - self.fixed_bytes) // (self.k_waves * self.code_bytes)
        return max(2, min(MOST_STAGES, fit))

    @property
    def fixed_bytes(self) -> int:
        """LDS of all but the codes: every scale, where results go, scales of them."""
        return self.scale_room + self.channel_bytes + self.place_bytes + self.block_bytes

    @property
    def lds_bytes(self) -> int:
        """LDS of a workgroup: the stages of codes, and the rest."""
        return self.k_waves * self.stages * self.code_bytes + self.fixed_bytes

    def stages_rows(self, item: int) -> bool:
        """Whether rows of results, items of so many bytes, go through LDS, to be stored in whole
        lines: where a wave has its columns for itself and twice 16 rows of every wave fit where
        the codes were."""
        size = 2 * WAVES * MFMA_ROWS * self.blocks * MFMA_ROWS * item
        return self.k_waves == 1 and size <= self.stages * self.code_bytes

    @property
    def copy_bytes(self) -> int:
        """Bytes a lane moves to LDS at once: 16, or 4 where a stage is less for every thread."""
        return PIECE if self.code_bytes >= self.team * WAVE * PIECE else WORD

    @property
    def copies(self) -> int:
        """Copies of a thread that fill a stage."""
        return self.code_bytes // (self.team * WAVE * self.copy_bytes)

    def swizzled(self, token, chunk):
        """Where in its row a 16-byte piece of codes lies, see :func:`swizzled`."""
        return swizzled(token, chunk, self.chunks)

    def code_modes(self) -> tuple[Modes, Modes]:
        """``((16, row blocks, halves), (4, 16-byte columns ..))`` of an expert's codes, in words.

        A k-major order has its columns in two parts.
        """
        layout = self._code_layout()
        rows, cols = (list(mode.flat) for mode in layout.modes)
        if len(rows) == 2:
            rows = [rows[0], *split(rows[1], self.rows // MFMA_ROWS)]
        (piece, _), *columns = cols
        return (
            tuple((n, s // WORD) for n, s in rows),
            ((piece // WORD, 1), *((n, s // WORD) for n, s in columns)),
        )

    @property
    def tile_stride(self) -> int:
        """Words from one K tile of codes to the next."""
        if self.k_tiles == 1:
            return 0
        return self._code_layout()(0, self.weight.row_bytes(TILE_K)) // WORD

    def _code_layout(self) -> Layout:
        order = order_named(self.order)
        return order.layout(self.halves * self.rows, self.k, self.weight.bits)

    @property
    def code_words(self) -> int:
        """Words of an expert's codes, padding included."""
        return math.prod(n for mode in self.code_modes() for n, _ in mode)

    def scale_modes(self) -> tuple[Modes, Modes]:
        """``((16, row groups, halves), (4, K tiles))`` of an expert's scale dwords."""
        rows, cols = self._scale_parts()
        keep = [p for p in rows if p[1] >= WORD]
        if len(keep) == 2 and self.halves == 2 and not self.halves_share_scales:
            keep = [keep[0], *split(keep[1], self.rows // (2 * MFMA_ROWS))]
        elif len(keep) == 2:
            keep.append((1, 0))
        words = [(n, s // WORD) for n, s in keep]
        return tuple(words), tuple((n, s // WORD) for n, s in cols if s >= WORD)

    @property
    def halves_share_scales(self) -> bool:
        """Whether a dword holds gate row r and up row r, rather than rows r and r + 16."""
        return order_named(self.order).codes.halves == 2

    @property
    def scale_bytes(self) -> int:
        """Bytes of an expert's scales, padding included."""
        return math.prod(n for mode in self._scale_parts() for n, _ in mode)

    def _scale_parts(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        order = order_named(self.order).scale_order(ScaleKind.E8M0)
        assert order is not None, self.order
        layout = order.layout(self.halves * self.rows, self.k // SCALE_BLOCK)
        rows, cols = (list(mode.flat) for mode in layout.modes)
        return rows, cols

    def scale_byte(self, half: int, block: int, step: int) -> int:
        """Which byte of its dword scales a 16-row block at a step of the K tile."""
        return 2 * step + (half if self.halves_share_scales else block % 2)


def swizzled(row, piece, pieces: int):
    """Where in its row of so many 16-byte pieces one lies: XOR with the row, so that 16 lanes that
    touch one column of 16 rows cover all 64 banks. Rows of 128 bytes share a bank line in pairs,
    hence row / 2 there. Its own inverse."""
    shared = max(1, 256 // (pieces * PIECE))
    return piece ^ (row // shared % pieces)


def split(part: tuple[int, int], size: int) -> Modes:
    """One part of a mode as ``(size, halves)``: the halves lie one after the other."""
    count, stride = part
    return (size, stride), (max(1, count // size), size * stride)
