"""Results on their way to memory: rows of routes, whose places in memory lie in LDS.

Near results, below 2 GiB, are one buffer: offsets of 32 bits, and what would lie past its end is
not written, so that padding needs no branch. Far ones take 64-bit addresses and a branch.
"""

import flydsl.compiler as flyc
import flydsl.expr as fx

from mixmoe.backends.cdna.atoms import MFMA_ROWS, PIECE, SCALE_BLOCK, WORD
from mixmoe.backends.cdna.config import THREADS, Gemm, swizzled

QUAD = 4  # columns that a lane holds side by side; rows begin at multiples
HALF = 1 << 31  # bytes: what a lane that stores nothing adds to its offset
NEAR_BYTES = HALF - (1 << 22)  # of results at most, and where padding lies; no row is 4 MiB long


def places(cfg: Gemm, bits: int) -> dict[str, int]:
    """``stride`` from one row of results to the next and ``padding``'s place, in quads, a column
    being so many bits; far places are numbers of rows."""
    if cfg.far_rows:
        return {"stride": 1, "padding": -1}
    return {"stride": cfg.rows // QUAD, "padding": NEAR_BYTES * 2 // bits}


class Target:
    """Rows of a tensor whose elements hold so many columns each: four codes, or one float, or the
    32 of a scale. A store takes ``elements`` of them."""

    def __init__(self, cfg: Gemm, tensor: fx.Tensor, columns: int, elements: int = 1):
        self.far, self.columns, self.elements = cfg.far_rows, columns, elements
        self.type = tensor.element_type
        self.row = cfg.rows // columns
        self.tails = cfg.rows % cfg.tile_rows != 0
        self.rows = cfg.rows
        # As a lane's offset: this lane stores nothing. In bytes it would not fit an Int32.
        self.nowhere = -1 if self.far else HALF // max(2, self.type.width // 8)
        near = fx.rocdl.make_buffer_tensor(tensor, max_size=False)
        self.base = fx.get_iter(tensor if self.far else near)
        kind = fx.UniversalCopy if self.far else fx.rocdl.BufferCopy
        self.copy = fx.make_copy_atom(kind(elements * self.type.width), self.type)

    def within(self, column, lane):
        """A lane's offset, or nowhere where a column is beyond the last."""
        return (column < self.rows).select(lane, self.nowhere) if self.tails else lane

    def put(self, place, lane, column, values) -> None:
        """Elements of a row: ``place`` is the row's, ``lane`` a lane's offset in it and ``column``
        what the whole wave adds, in elements."""
        frag = fx.make_rmem_tensor(self.elements, self.type)
        frag.store(values if self.elements > 1 else fx.Vector.from_elements([values], self.type))
        (put_far if self.far else put_near)(self, place, lane, column, frag)


def put_near(target: Target, place, lane, column, frag) -> None:
    """By an offset."""
    per = target.columns
    first = place * (QUAD // per) if per <= QUAD else place >> (per // QUAD).bit_length() - 1
    at = fx.make_view(target.base + (first + lane), fx.make_layout(target.elements, 1))
    fx.copy(target.copy, frag, at, soffset=column)


@flyc.jit
def put_far(target: Target, place, lane, column, frag) -> None:
    """By an address."""
    if (place >= 0) & (lane >= 0):
        at = target.base + (fx.Int64(place) * target.row + (lane + column))
        fx.copy(target.copy, frag, at.view(fx.make_layout(target.elements, 1)))


class Quads:
    """Codes stored four at a time, and their scales one by one, as lanes make them."""

    def __init__(self, cfg: Gemm, place, first, h: fx.Tensor, scales: fx.Tensor):
        self.place, self.first = place, first
        self.routes: list = []
        self.h, self.scales = Target(cfg, h, QUAD), Target(cfg, scales, SCALE_BLOCK)

    def open(self, places) -> None:
        """Read where rows of the groups go."""
        self.routes = places.of_groups(self.place)

    def write(self, group: int, block: int, word) -> None:
        """Four codes of a lane's token in a block of 16 columns of its wave."""
        column = (self.first + block) * MFMA_ROWS
        lane = self.h.within(column, self.place.g)
        self.h.put(self.routes[group], lane, column // QUAD, word)

    def write_scale(self, group: int, pair: int, byte) -> None:
        """The scale of 32 columns of a lane's token, by the first of its lanes."""
        column = (self.first + 2 * pair) * MFMA_ROWS
        lane = (self.place.g == 0).select(fx.Int32(0), self.scales.nowhere)
        lane = self.scales.within(column, lane)
        self.scales.put(self.routes[group], lane, column // SCALE_BLOCK, byte)

    def close(self, places, first) -> None:
        """Nothing is left."""


class Lines:
    """Codes of a tile's rows and their scales in LDS, the codes in the place of the tokens':
    written four at a time as lanes make them, stored in 16-byte pieces along the rows, to which all
    waves have added. Four codes of a lane are 2 or 4 bytes of a row; stored by themselves a wave
    would touch sixteen lines of memory for 128 bytes."""

    def __init__(self, cfg: Gemm, place, lds, h: fx.Tensor, scales: fx.Tensor):
        self.cfg, self.place = cfg, place
        self.items = PIECE * 8 // h.element_type.width  # fours of codes in a piece
        self.pieces = cfg.tile_rows // (QUAD * self.items)  # of a row
        self.base = fx.recast_iter(h.element_type, lds.codes.ptr)
        self.blocks = cfg.tile_rows // SCALE_BLOCK
        self.table = lds.blocks.view(fx.make_layout((self.blocks, cfg.tokens), (1, self.blocks)))
        self.source = lds.blocks.ptr
        self.h = Target(cfg, h, QUAD, self.items)
        self.scales = Target(cfg, scales, SCALE_BLOCK, WORD)

    def _at(self, row, piece):
        """A piece of a row."""
        return self.base + (row * self.pieces + swizzled(row, piece, self.pieces)) * self.items

    def open(self, places) -> None:
        """When the last tokens are read."""
        fx.gpu.barrier()

    def write(self, group: int, block: int, word) -> None:
        """Four codes of a lane's token in a block of 16 columns of its wave."""
        first = (self.place.wave * self.cfg.blocks + block) * (MFMA_ROWS // QUAD)
        at = self._at(group * MFMA_ROWS + self.place.r, first // self.items)
        (at + (first % self.items + self.place.g)).store(word)

    def write_scale(self, group: int, pair: int, byte) -> None:
        """The scale of 32 columns of a lane's token: all lanes of a token hold the same."""
        column = self.place.wave * (self.cfg.blocks // 2) + pair
        self.table[column, group * MFMA_ROWS + self.place.r] = byte

    def close(self, places, first) -> None:
        """Store everything; ``first``: the tile's first column."""
        fx.gpu.barrier()
        piece = fx.make_copy_atom(fx.UniversalCopy128b(), self.h.type)
        for row, at, lane in self._shared_out(self.pieces, self.items, self.h):
            frag = fx.make_rmem_tensor(self.items, self.h.type)
            fx.copy(piece, self._at(row, at).view(fx.make_layout(self.items, 1)), frag)
            self.h.put(places.of(row), lane, first // QUAD, frag.load())
        word = fx.make_copy_atom(fx.UniversalCopy32b(), self.scales.type)
        for row, at, lane in self._shared_out(self.blocks // WORD, WORD, self.scales):
            frag = fx.make_rmem_tensor(WORD, self.scales.type)
            source = self.source + (row * self.blocks + at * 4)
            fx.copy(word, source.view(fx.make_layout(WORD, 1)), frag)
            self.scales.put(places.of(row), lane, first // SCALE_BLOCK, frag.load())

    def _shared_out(self, pieces: int, items: int, target: Target):
        """(row, piece, lane's offset) of all pieces of all rows, by threads and turns."""
        total = self.cfg.tokens * pieces
        for turn in range(-(-total // THREADS)):
            index = self.place.tid + turn * THREADS
            row, at = index // pieces % self.cfg.tokens, index % pieces
            lane = at * items
            if total % THREADS:
                lane = (index < total).select(lane, target.nowhere)
            yield row, at, lane
