"""The tokens of a tile on their way: memory, registers, LDS as operands, a lane's registers.

A K tile is loaded while the one before it is multiplied, becomes operands once for the waves that
share it, and is written to the other of two LDS stages.
"""

from functools import partial

import flydsl.compiler as flyc
import flydsl.expr as fx

from mixmoe.backends.cdna.atoms import MFMA_ROWS, PIECE, WAVE, WORD
from mixmoe.backends.cdna.plain.config import FRAGMENTS, Gemm

SHARE = 8  # neighbouring threads that fill one row: 128 bytes of 8-bit tokens


def words_of(frag: fx.Tensor, first: int, count: int) -> list[fx.Int32]:
    """Some words of a fragment."""
    values = frag.load()
    return [fx.Int32(values[i]) for i in range(first, first + count)]


def shared_storage(cfg: Gemm):
    """LDS: the stages of token codes, and of their scales along K."""
    codes = fx.Array[fx.Int32, cfg.stages * cfg.code_bytes // WORD, PIECE]
    if not cfg.tile_scales:
        return fx.Struct["codes":codes]
    return fx.Struct[
        "codes":codes,
        "scales" : fx.Array[fx.Float32, cfg.stages * cfg.scale_room, PIECE],
    ]


class Tokens:
    """Token codes in LDS and in registers. ``rows`` says where tokens lie: ``rows.id(t)`` loads
    what is sorted at place t of the tile, ``rows.row(id)`` is the row in memory."""

    def __init__(self, cfg: Gemm, place, lds, source: fx.Tensor, rows):
        self.cfg, self.place, self.lds = cfg, place, lds
        self.source, self.rows = source, rows
        self.run = fx.make_copy_atom(fx.UniversalCopy(32 * cfg.run_words), fx.Int32)
        self.moved = fx.make_copy_atom(fx.UniversalCopy(32 * cfg.chunk_words), fx.Int32)
        self.ring = [
            fx.make_rmem_tensor(cfg.run_words * cfg.pieces * cfg.unit, fx.Int32)
            for _ in range(FRAGMENTS)
        ]
        self.threads = cfg.team * WAVE
        self.count = -(-cfg.tokens * cfg.chunks // self.threads)
        self.moving = [fx.make_rmem_tensor(cfg.chunk_words, fx.Int32) for _ in range(self.count)]
        self.ids = [rows.id(self.slot(i)[0]) for i in range(self.count)]
        self.starts: list = []

    def slot(self, i: int):
        """(token, chunk) of a stage that a thread moves in round i. Where a chunk is two runs,
        neighbours take 8 chunks of one row and of the next, whose runs lie in other banks."""
        cfg = self.cfg
        index = (self.place.mate + i * self.threads) % (cfg.tokens * cfg.chunks)
        if cfg.run_words == 4:
            return index // cfg.chunks, index % cfg.chunks
        wide, rest = cfg.chunks // SHARE, index // (2 * SHARE)
        token = index // SHARE % 2 + rest // wide * 2
        return token, index % SHARE + rest % wide * SHARE

    def find(self) -> None:
        """Where in memory the rows of a thread's tokens begin."""
        for packed in self.ids:
            row = fx.Int64(self.rows.row(packed)) * (self.cfg.row_chunks * self.cfg.chunk_words)
            self.starts.append(fx.get_iter(self.source) + row)

    def loads(self, kt):
        """Functions that start one load each, of K tile ``kt``."""
        return [partial(self._load, kt, i) for i in range(self.count)]

    def _load(self, kt, i: int) -> None:
        """Zeros beyond K, where weights are zeros too."""
        cfg, frag = self.cfg, self.moving[i]
        chunk = (self.place.first_tile + kt) * cfg.chunks + self.slot(i)[1]
        reaches = cfg.parts > 1 or (isinstance(kt, int) and (kt + 1) * cfg.tile_k > cfg.k)
        inside = chunk < cfg.row_chunks
        at = inside.select(chunk, 0) if reaches else chunk
        source = (self.starts[i] + at * cfg.chunk_words).view(fx.make_layout(cfg.chunk_words, 1))
        fx.copy(self.moved, source, frag)
        if reaches:
            zeros = fx.Vector.filled(cfg.chunk_words, 0, fx.Int32)
            frag.store(inside.select(frag.load(), zeros))

    def writes(self, kt):
        """Functions that decode what was loaded and write one chunk each to the stage of ``kt``."""
        return [partial(self._write, kt, i) for i in range(self.count)]

    def _write(self, kt, i: int) -> None:
        cfg = self.cfg
        token, chunk = self.slot(i)
        words = cfg.token_decoder.decode(words_of(self.moving[i], 0, cfg.chunk_words))
        runs = 4 // cfg.run_words
        for part in range(runs):
            run = cfg.swizzled(token, chunk * runs + part)
            at = self._stage(kt) + (token * cfg.chunks * 4 + run * cfg.run_words)
            frag = fragment(words[part * cfg.run_words : (part + 1) * cfg.run_words])
            target = (self.lds.codes.ptr + at).view(fx.make_layout(cfg.run_words, 1))
            if (i + 1) * self.threads <= cfg.tokens * cfg.chunks:
                fx.copy(self.run, frag, target)
            else:  # a tile of fewer chunks than threads
                used = self.place.mate + i * self.threads < cfg.tokens * cfg.chunks
                copy_if(used, self.run, frag, target)

    def _stage(self, kt):
        """First word of the stage that holds K tile ``kt`` of the wave's part."""
        return (kt % 2 + self.place.part * 2) * (self.cfg.code_bytes // WORD)

    def read(self, kt, unit: int, group: int, slot: int) -> None:
        """The 16 tokens of a phase of K tile ``kt``, from LDS into the ring."""
        cfg, place = self.cfg, self.place
        row_words = cfg.chunks * 4
        parts = fx.logical_divide(self.ring[slot], fx.make_layout(cfg.run_words, 1))
        base = self.lds.codes.ptr + (self._stage(kt) + group * MFMA_ROWS * row_words)
        layout = fx.make_layout(
            (cfg.run_words, row_words // cfg.run_words, MFMA_ROWS), (1, cfg.run_words, row_words)
        )
        rows = fx.make_view(base, layout)
        for p in range(cfg.unit * cfg.pieces):
            run = cfg.swizzled(place.r, (unit * cfg.unit * cfg.pieces + p) * 4 + place.g)
            fx.copy(self.run, rows[None, run, place.r], parts[None, p])

    def operand(self, slot: int, step: int, mma: int) -> fx.Tensor:
        """The operand of an MFMA of a step of a unit."""
        parts = fx.logical_divide(self.ring[slot], fx.make_layout(self.cfg.mma_words, 1))
        return parts[None, step * self.cfg.mmas + mma]


def fragment(words: list[fx.Int32]) -> fx.Tensor:
    """A fragment of these words."""
    frag = fx.make_rmem_tensor(len(words), fx.Int32)
    for i, word in enumerate(words):
        frag[i] = word
    return frag


@flyc.jit
def copy_if(used, atom, source, target) -> None:
    """``fx.copy`` of some threads."""
    if used:
        fx.copy(atom, source, target)
