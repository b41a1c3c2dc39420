"""The weights of a wave on their way: memory, registers, operands.

Stored weights lie in registers for a K tile, or two. A load of the next one starts as soon as what
it overwrites was decoded (or multiplied, where it is an operand as it is), so nearly a tile is in
flight. Operands are decoded a unit ahead, piece by piece between MFMAs, once for all tokens.
"""

from functools import partial

import flydsl.expr as fx

from mixmoe.backends.cdna.atoms import MFMA_ROWS
from mixmoe.backends.cdna.plain.config import Gemm
from mixmoe.backends.cdna.plain.decode import scaled_bf16
from mixmoe.backends.cdna.plain.tokens import words_of
from mixmoe.backends.cdna.weights import CACHED, NON_TEMPORAL, NOWHERE, of_expert


class Weights:
    """Fragments of stored codes and of operands; ``factors`` has the scales that fold."""

    def __init__(self, cfg: Gemm, place, codes: fx.Tensor, factors, first_block):
        self.cfg, self.place, self.factors = cfg, place, factors
        end = cfg.rows // MFMA_ROWS
        self.blocks = [fx.min(first_block + b, end - 1) for b in range(cfg.blocks)]
        self.keys = [(h, b) for h in range(cfg.halves) for b in range(cfg.blocks)]
        self.source = of_expert(codes, place.expert, cfg.code_words, cfg.code_modes())
        policy = NON_TEMPORAL if cfg.streaming else CACHED
        self.piece = fx.make_copy_atom(fx.rocdl.BufferCopy128b(policy), fx.Int32)
        self.ring = [
            {key: fx.make_rmem_tensor(4 * cfg.weight_pieces, fx.Int32) for key in self.keys}
            for _ in range(cfg.ring)
        ]
        decoded = range(0 if cfg.keeps else cfg.steps)
        self.operands = {
            (key, step): fx.make_rmem_tensor(cfg.mma_words * cfg.mmas, fx.Int32)
            for key in self.keys
            for step in decoded
        }

    def loads(self, kt, slot: int, steps: int, unit: int | None = None):
        """Functions that start one load each, of K tile ``kt`` that has ``steps`` steps: all, or
        into the places that are free in a unit of the tile before."""
        return [
            partial(self._load, kt, slot, key, piece)
            for piece in range(self.cfg.weight_pieces)
            if self.cfg.first_step(piece) < steps
            and unit in (None, self.cfg.last_step(piece) // self.cfg.unit)
            for key in self.keys
        ]

    def _load(self, kt, slot: int, key, piece: int) -> None:
        cfg, (half, block) = self.cfg, key
        quarters = fx.logical_divide(self.ring[slot][key], fx.make_layout(4, 1))
        column = piece * 4 + self.place.g
        source = self.source[(self.place.r, self.blocks[block], half), (None, column)]
        away: fx.Int32 | int = 0
        if cfg.parts > 1:  # where a part reaches beyond K its weights are zeros
            kt = self.place.first_tile + kt
            inside = kt * cfg.weight_pieces + piece < cfg.row_pieces
            kt, away = inside.select(kt, 0), inside.select(fx.Int32(0), NOWHERE)
        at = fx.make_view(fx.get_iter(source) + away, fx.make_layout(4, 1))
        offset = kt * (cfg.weight_pieces * 4 * MFMA_ROWS * 4)
        fx.copy(self.piece, at, quarters[None, piece], soffset=offset)

    def decodes(self, slot: int, unit: int, steps: int):
        """Functions that make some words of operands each, of the steps of a unit."""
        cfg = self.cfg
        if cfg.keeps:
            return []
        first = unit * cfg.unit
        parts = 2 if cfg.folds else len(cfg.weight_decoder.parts)
        return [
            partial(self._decode, slot, key, step, word, part)
            for step in range(first, min(first + cfg.unit, steps))
            for key in self.keys
            for word in range(cfg.step_words)
            for part in range(parts)
        ]

    def _decode(self, slot: int, key, step: int, word: int, part: int) -> None:
        cfg = self.cfg
        (stored,) = words_of(self.ring[slot][key], step * cfg.step_words + word, 1)
        if cfg.folds:
            words = scaled_bf16(stored, self.factors.of_row(slot, key, step))[2 * part :][:2]
            parts = 2
        else:
            words = cfg.weight_decoder.parts[part](stored)
            parts = len(cfg.weight_decoder.parts)
        first = (word * parts + part) * len(words)
        for i, value in enumerate(words):
            self.operands[key, step][first + i] = value

    def operand(self, slot: int, key, step: int, mma: int) -> fx.Tensor:
        """The operand of an MFMA of a step of the tile."""
        cfg, held = self.cfg, self.operands.get((key, step))
        if held is None:  # it is what was stored
            held, mma = self.ring[slot][key], step * cfg.mmas + mma
        return fx.logical_divide(held, fx.make_layout(cfg.mma_words, 1))[None, mma]
