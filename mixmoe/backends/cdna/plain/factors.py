"""Scales along K: those of the weights in registers, those of the tokens in LDS."""

from functools import partial
from typing import Any

import flydsl.compiler as flyc
import flydsl.expr as fx

from mixmoe.backends.cdna.atoms import MFMA_ROWS, WAVE
from mixmoe.backends.cdna.plain.config import FRAGMENTS, SCALE_WORDS, Gemm
from mixmoe.backends.cdna.plain.tokens import words_of
from mixmoe.backends.cdna.weights import NOWHERE, of_expert
from mixmoe.formats import ScaleKind


class WeightFactors:
    """The weight scales that sums are closed with, or that fold into operands.

    A lane's results are four rows of one token, so it holds four weight scales. As the codes: a
    load starts when what it overwrites was decoded.
    """

    def __init__(self, cfg: Gemm, place, scales: fx.Tensor, first_block):
        self.cfg, self.place = cfg, place
        end = cfg.rows // MFMA_ROWS
        self.blocks = [fx.min(first_block + b, end - 1) for b in range(cfg.blocks)]
        self.keys = [(h, b) for h in range(cfg.halves) for b in range(cfg.blocks)]
        self.size = 1 if cfg.weight.rows > 1 else SCALE_WORDS.get(cfg.weight.scale, 0)
        self.count = cfg.tile_k // cfg.weight_period if cfg.weight_period else 0
        # Two loads a tile at least: one would be asked for when it is needed.
        most = self.count if cfg.ring > 1 else self.count // 2
        self.per = min(4 // self.size, most) if self.count and cfg.weight.rows == 1 else 1
        self.ring: list[dict] = []
        self.decoded: dict = {}
        self.stored: Any = None
        if not self.count:
            return
        self.ring = [
            {key: fx.make_rmem_tensor(self.size * self.count, fx.Int32) for key in self.keys}
            for _ in range(cfg.ring)
        ]
        if cfg.weight.rows == 1:
            self.stored = of_expert(scales, place.expert, cfg.scale_words, cfg.scale_modes())
        else:
            self.columns = -(-cfg.k // cfg.weight.cols)
            words = -(-cfg.halves * cfg.rows // cfg.weight.rows) * self.columns
            modes = (((words, 1), (1, 0)), ((1, 1), (1, 0)))
            self.stored = of_expert(scales, place.expert, words, modes)
        if not cfg.folds:
            width = 1 if cfg.weight.rows > 1 else 4
            self.decoded = {
                (key, unit): fx.make_rmem_tensor(width, fx.Float32)
                for key in self.keys
                for unit in range(cfg.units_of(cfg.steps))
            }

    def loads(self, kt, slot: int, steps: int, unit: int | None = None):
        """As those of the codes."""
        cfg, period = self.cfg, self.cfg.weight_period
        return [
            partial(self._load, kt, slot, key, i)
            for i in range(self.count // self.per)
            if i * self.per * period < steps * cfg.step_k
            and unit in (None, ((i + 1) * self.per * period - 1) // cfg.step_k // cfg.unit)
            for key in self.keys
        ]

    def _load(self, kt, slot: int, key, i: int) -> None:
        """``per`` blocks of K of four rows, or of the block of rows."""
        cfg, (half, block) = self.cfg, key
        words, away = self.per * self.size, 0
        if cfg.parts > 1:
            kt = self.place.first_tile + kt
            inside = (kt * self.count + i * self.per) * cfg.weight_period < cfg.k
            kt, away = inside.select(kt, 0), inside.select(fx.Int32(0), NOWHERE)
        first = kt * self.count + i * self.per
        if cfg.weight.rows > 1:
            row = (half * cfg.rows + self.blocks[block] * MFMA_ROWS) // cfg.weight.rows
            place = fx.get_iter(self.stored) + (row * self.columns + first)
        else:
            # Results are rows 4 g ..; an operand is row r.
            quad = self.place.r // 4 if cfg.folds else self.place.g
            whole = 4 // self.size
            row = (quad, self.blocks[block], half)
            place = fx.get_iter(self.stored[row, (None, (first % whole, first // whole))])
        source = fx.make_view(place + away, fx.make_layout(words, 1))
        parts = fx.logical_divide(self.ring[slot][key], fx.make_layout(words, 1))
        atom = fx.make_copy_atom(fx.rocdl.BufferCopy(32 * words), fx.Int32)
        fx.copy(atom, source, parts[None, i])

    def decodes(self, slot: int, unit: int):
        """Functions that make the factors of a unit, of some rows each."""
        if not self.decoded:
            return []
        return [partial(self._decode, slot, unit, key) for key in self.keys]

    def _decode(self, slot: int, unit: int, key) -> None:
        column = unit * self.cfg.unit * self.cfg.step_k // self.cfg.weight_period
        words = words_of(self.ring[slot][key], column * self.size, self.size)
        if self.cfg.weight.rows > 1:
            values = [words[0].bitcast(fx.Float32)]
        else:
            values = factors_of(self.cfg.weight.scale, words)
        for i, value in enumerate(values):
            self.decoded[key, unit][i] = value

    def of_unit(self, key, unit: int):
        """Factors of a lane's four rows; one where they share it."""
        values = self.decoded[key, unit].load()
        return fx.Float32(values[0]) if self.cfg.weight.rows > 1 else values

    def of_row(self, slot: int, key, step: int) -> fx.Float32:
        """The E8M0 scale of the row that a lane holds codes of, for a step of the tile."""
        column = step * self.cfg.step_k // self.cfg.weight_period
        (word,) = words_of(self.ring[slot][key], column * self.size, self.size)
        return power((word >> (self.place.r % 4 * 8)) & 0xFF)


class TokenFactors:
    """The scales of tokens along K: as their codes, through registers to two LDS stages."""

    def __init__(self, cfg: Gemm, place, lds, source: fx.Tensor, rows):
        self.cfg, self.place, self.lds, self.source, self.rows = cfg, place, lds, source, rows
        self.threads = cfg.team * WAVE
        self.entries = cfg.tokens * cfg.tile_scales
        self.count = -(-self.entries // self.threads)
        self.ids = [rows.id(self.slot(i)[0]) for i in range(self.count)]
        held = range(FRAGMENTS if self.entries else 0)
        self.ring = [fx.make_rmem_tensor(1, fx.Float32) for _ in held]
        kind = fx.Int32 if cfg.token.scale is ScaleKind.E8M0 else fx.Float32
        self.moving = [fx.make_rmem_tensor(1, kind) for _ in range(self.count)]
        self.starts: list = []

    def slot(self, i: int):
        """(token, column) of a stage that a thread fills in round i."""
        index = (self.place.mate + i * self.threads) % self.entries
        return index // self.cfg.tile_scales, index % self.cfg.tile_scales

    def find(self) -> None:
        """Where in memory the scales of a thread's tokens begin."""
        for packed in self.ids:
            row = fx.Int64(self.rows.row(packed)) * self.cfg.token_scales
            self.starts.append(fx.get_iter(self.source) + row)

    def loads(self, kt):
        """Functions that start one load each, of K tile ``kt``."""
        return [partial(self._load, kt, i) for i in range(self.count)]

    def _load(self, kt, i: int) -> None:
        """Beyond K the scale of column 0, for zero codes."""
        cfg = self.cfg
        column = (self.place.first_tile + kt) * cfg.tile_scales + self.slot(i)[1]
        value = self.starts[i][(column < cfg.token_scales).select(column, 0)]
        self.moving[i][0] = self.moving[i].element_type(value)

    def writes(self, kt):
        """Functions that write them to the stage of ``kt``."""
        return [partial(self._write, kt, i) for i in range(self.count)]

    def _write(self, kt, i: int) -> None:
        value = self.moving[i].load()[0]
        if self.cfg.token.scale is ScaleKind.E8M0:
            value = power(fx.Int32(value) & 0xFF)
        token, column = self.slot(i)
        # A tile may have fewer scales than threads.
        used = self.place.mate + i * self.threads < self.entries
        store_if(used, self.table(kt), (column, token), fx.Float32(value))

    def read(self, kt, unit: int, group: int, slot: int) -> None:
        """The scale of a lane's token for a phase's block of K."""
        if self.entries:
            column = unit * self.cfg.unit * self.cfg.step_k // self.cfg.token_period
            token = group * MFMA_ROWS + self.place.r
            self.ring[slot][0] = fx.Float32(self.table(kt)[column, token])

    def table(self, kt) -> fx.Tensor:
        """``(columns, tokens)`` float32 of the stage of K tile ``kt``."""
        cfg, stage = self.cfg, kt % 2 + self.place.part * 2
        layout = fx.make_layout((cfg.tile_scales, cfg.tokens), (cfg.scale_stride, 1))
        return (self.lds.scales.ptr + stage * cfg.scale_room).view(layout)


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
