"""Scales along K: those of the weights in registers, those of the tokens in LDS."""

from functools import partial
from typing import Any

import flydsl.compiler as flyc
import flydsl.expr as fx

from mixmoe.backends.cdna.atoms import MFMA_ROWS
from mixmoe.backends.cdna.config import THREADS
from mixmoe.backends.cdna.plain.config import SCALE_WORDS
from mixmoe.backends.cdna.weights import of_expert
from mixmoe.formats import ScaleKind

RING = 4  # token fragments in registers


def words_of(frag: fx.Tensor, first: int, count: int) -> list[fx.Int32]:
    """Some words of a fragment."""
    values = frag.load()
    return [fx.Int32(values[i]) for i in range(first, first + count)]


class Factors:
    """The scales that sums are closed with.

    A lane's results are four rows of one token, so it holds four weight scales and one of a token.
    """

    def __init__(self, loads, row_of):
        self.cfg, self.place, self.loads = loads.cfg, loads.place, loads
        cfg = self.cfg
        self.size = 1 if cfg.weight.rows > 1 else SCALE_WORDS.get(cfg.weight.scale, 0)
        self.count = cfg.tile_k // cfg.weight_period if cfg.weight_period else 0
        self.per = min(4 // max(1, self.size), self.count) if cfg.weight.rows == 1 else 1
        self.weights = [
            {key: fx.make_rmem_tensor(self.size * self.count, fx.Int32) for key in loads.keys}
            if self.count
            else {}
            for _ in range(2)
        ]
        self.stored: Any = None  # block scales of the expert's rows
        if self.count and cfg.weight.rows == 1:
            self.stored = of_expert(
                loads.sources.scales, self.place.expert, cfg.scale_words, cfg.scale_modes()
            )
        entries = cfg.tokens * cfg.tile_scales
        self.ring = [fx.make_rmem_tensor(1, fx.Float32) for _ in range(RING if entries else 0)]
        self.rounds = -(-entries // THREADS)
        self.rows = []
        for i in range(self.rounds):
            token, _ = self.slot(i)
            self.rows.append(fx.Int64(row_of(token)) * cfg.token_scales)

    # Weights.

    def weight_loads(self, kt, stage: int, steps: int):
        """Functions that start one load each."""
        cfg = self.cfg
        if not self.count:
            return []
        needed = -(-steps * cfg.step_k // cfg.weight_period)
        load = self._load_rows if cfg.weight.rows == 1 else self._load_block
        return [
            partial(load, kt, stage, key, i)
            for i in range(-(-needed // self.per))
            for key in self.loads.keys
        ]

    def _load_rows(self, kt, stage: int, key, i: int) -> None:
        """Four rows' scales of ``per`` blocks of K."""
        half, block = key
        words, first = self.per * self.size, kt * self.count + i * self.per
        whole = 4 // self.size
        # Results are rows 4 g ..; an operand is row r.
        quad = self.place.r // 4 if self.cfg.folds else self.place.g
        row = (quad, self.loads.blocks[block], half)
        column = self.stored[row, (None, (first % whole, first // whole))]
        source = fx.make_view(fx.get_iter(column), fx.make_layout(words, 1))
        parts = fx.logical_divide(self.weights[stage][key], fx.make_layout(words, 1))
        atom = fx.make_copy_atom(fx.rocdl.BufferCopy(32 * words), fx.Int32)
        fx.copy(atom, source, parts[None, i])

    def _load_block(self, kt, stage: int, key, i: int) -> None:
        """The one scale of a block of rows and columns, in plain order."""
        cfg, (half, block) = self.cfg, key
        columns = -(-cfg.k // cfg.weight.cols)
        rows = -(-cfg.halves * cfg.rows // cfg.weight.rows)
        row = (half * cfg.rows + self.loads.blocks[block] * MFMA_ROWS) // cfg.weight.rows
        at = (fx.Int64(self.place.expert) * rows + row) * columns + (kt * self.count + i)
        source = fx.get_iter(self.loads.sources.scales) + at
        parts = fx.logical_divide(self.weights[stage][key], fx.make_layout(1, 1))
        word = fx.make_copy_atom(fx.UniversalCopy32b(), fx.Int32)
        fx.copy(word, source.view(fx.make_layout(1, 1)), parts[None, i])

    def decode(self, stage: int, step: int) -> None:
        """Scales of every block for the sums that a step closes."""
        if self.cfg.weight_period:
            column = step * self.cfg.step_k // self.cfg.weight_period
            self.decoded = {key: self.of_rows(stage, key, column) for key in self.loads.keys}

    def of_rows(self, stage: int, key, column: int) -> list[fx.Float32]:
        """Scales of a lane's four rows for a block of K of the tile."""
        words = words_of(self.weights[stage][key], column * self.size, self.size)
        if len(words) == 1 and self.cfg.weight.rows > 1:
            return [words[0].bitcast(fx.Float32)] * 4
        return factors_of(self.cfg.weight.scale, words)

    def of_row(self, stage: int, key, column: int) -> fx.Float32:
        """The E8M0 scale of the row that a lane holds codes of, for a block of K of the tile."""
        (word,) = words_of(self.weights[stage][key], column * self.size, self.size)
        return power((word >> (self.place.r % 4 * 8)) & 0xFF)

    # Tokens.

    def slot(self, i):
        """(token, column) of the table in LDS that a thread fills in round i."""
        cfg = self.cfg
        index = (self.place.tid + i * THREADS) % (cfg.tokens * cfg.tile_scales)
        return index // cfg.tile_scales, index % cfg.tile_scales

    def load_tokens(self, kt) -> None:
        """Start the scales of the tile's tokens; beyond K those of column 0, for zero codes."""
        cfg = self.cfg
        self.moving = []
        for i, row in enumerate(self.rows):
            column = kt * cfg.tile_scales + self.slot(i)[1]
            at = row + (column < cfg.token_scales).select(column, 0)
            value = fx.get_iter(self.loads.sources.token_scales)[at]
            if cfg.token.scale is ScaleKind.E8M0:
                value = power(fx.Int32(value) & 0xFF)
            self.moving.append(value)

    def publish(self, stage: int) -> None:
        """Write the scales to an LDS stage."""
        cfg = self.cfg
        for i, value in enumerate(self.moving):
            token, column = self.slot(i)
            # A tile may have fewer scales than threads.
            used = self.place.tid + i * THREADS < cfg.tokens * cfg.tile_scales
            store_if(used, self.table(), (column, token, stage), value)

    def read_token(self, phase: int, stage: int) -> None:
        """The scale of a lane's token for a phase's block of K, as early as the token's codes: in
        the last phases of a tile other waves may already write the next but one."""
        cfg = self.cfg
        if not cfg.tile_scales:
            return
        step, group = divmod(phase, cfg.groups)
        column = step * cfg.step_k // cfg.token_period
        token = group * MFMA_ROWS + self.place.r
        slot = self.loads.ring_slot(phase, stage)
        self.ring[slot][0] = fx.Float32(self.table()[column, token, stage])

    def table(self) -> fx.Tensor:
        """``(columns, tokens, 2)`` float32 in LDS."""
        cfg = self.cfg
        shape = (cfg.tile_scales, cfg.tokens, 2)
        return self.loads.lds.scales.view(fx.make_ordered_layout(shape, (0, 1, 2)))


@flyc.jit
def store_if(used, table: fx.Tensor, where, value) -> None:
    """``table[where] = value`` of some threads."""
    if used:
        table[where] = value


def power(byte: fx.Int32) -> fx.Float32:
    """``2^(byte - 127)``; 2^-127 is a denormal float32."""
    return fx.max(byte << 23, fx.Int32(1 << 22)).bitcast(fx.Float32)


def factors_of(kind: ScaleKind, words: list[fx.Int32]) -> list[fx.Float32]:
    """Four stored scales, lowest first."""
    if kind is ScaleKind.E8M0:
        return [power((words[0] >> 8 * i) & 0xFF) for i in range(4)]
    if kind is ScaleKind.BF16:
        halves = [x for word in words for x in (word << 16, word & -0x10000)]
        return [x.bitcast(fx.Float32) for x in halves]
    return [word.bitcast(fx.Float32) for word in words]
