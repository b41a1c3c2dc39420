"""The weights of a wave on their way from memory to registers: a ring of MFMA steps.

While one step is multiplied the others are in flight: the only copy of a weight that a workgroup
reads goes to the one wave that multiplies it.
"""

from functools import partial

import flydsl.expr as fx

from mixmoe.backends.cdna.atoms import MFMA_ROWS, WORD
from mixmoe.backends.cdna.config import Gemm, Modes

CACHED, NON_TEMPORAL = 0, 2  # cache modifiers of a buffer load
# Words past which no expert's weights reach: a load there brings zeros and asks no memory.
NOWHERE = 1 << 29


def as_layout(modes: tuple[Modes, Modes]) -> fx.Layout:
    """The device's layout of a host layout's modes; what follows the first column part is one."""
    rows, (first, *rest) = modes
    shape, stride = (
        (tuple(part[i] for part in rows), (first[i], tuple(part[i] for part in rest)))
        for i in range(2)
    )
    return fx.make_layout(shape, stride)


def of_expert(tensor: fx.Tensor, expert: fx.Int32, words: int, modes) -> fx.Tensor:
    """One expert's part of a weight tensor: 64-bit base, hardware bounds at its end."""
    base = fx.get_iter(tensor) + fx.Int64(expert) * words
    view = fx.Tensor(fx.make_view(base, as_layout(modes)))
    return fx.rocdl.make_buffer_tensor(view, num_records_bytes=words * WORD)


class Weights:
    """Fragments of codes for ``ring`` steps and of scales for the K tiles they belong to."""

    def __init__(self, cfg: Gemm, place, codes: fx.Tensor, scales: fx.Tensor, first_block):
        self.cfg, self.place = cfg, place
        end = cfg.rows // MFMA_ROWS
        self.blocks = [fx.min(first_block + b, end - 1) for b in range(cfg.blocks)]
        self.source = of_expert(codes, place.expert, cfg.code_words, cfg.code_modes())
        self.scale_source = of_expert(
            scales, place.expert, cfg.scale_bytes // WORD, cfg.scale_modes()
        )
        policy = NON_TEMPORAL if cfg.streaming else CACHED
        self.piece = fx.make_copy_atom(fx.rocdl.BufferCopy128b(policy), fx.Int32)
        self.word = fx.make_copy_atom(fx.rocdl.BufferCopy32b(), fx.Int32)
        self.codes = [
            {key: fx.make_rmem_tensor(4 * cfg.weight.pieces, fx.Int32) for key in self.fragments()}
            for _ in range(cfg.ring)
        ]
        self.scales = [
            {key: fx.make_rmem_tensor(1, fx.Int32) for key in self.scale_keys()}
            for _ in range(cfg.ring // cfg.steps)
        ]

    def fragments(self) -> list[tuple[int, int]]:
        """(half, block) of every fragment of a step."""
        return [(h, b) for h in range(self.cfg.halves) for b in range(self.cfg.blocks)]

    def scale_keys(self) -> list[tuple[int, int]]:
        """(half, group) of every dword of a K tile's scales."""
        cfg = self.cfg
        if cfg.halves_share_scales:
            return [(0, b) for b in range(cfg.blocks)]
        return [(h, b) for h in range(cfg.halves) for b in range(cfg.blocks // 2)]

    def scale_key(self, half: int, block: int) -> tuple[int, int]:
        """The dword that scales a block."""
        return (0, block) if self.cfg.halves_share_scales else (half, block // 2)

    def loads(self, kt, tile: int, step: int):
        """Functions that start one load each: the codes of a step of K tile ``kt``, which is
        number ``tile`` of the ring's tiles."""
        slot = (tile * self.cfg.steps + step) % self.cfg.ring
        return [
            partial(self._load, kt, step, slot, key, p)
            for key in self.fragments()
            for p in range(self.cfg.weight.pieces)
        ]

    def scale_loads(self, kt, tile: int):
        """The same for the scales of a K tile."""
        slot = tile % len(self.scales)
        return [partial(self._load_scale, kt, slot, key) for key in self.scale_keys()]

    def _load(self, kt, step: int, slot: int, key, piece: int) -> None:
        cfg, (half, block) = self.cfg, key
        quarters = fx.logical_divide(self.codes[slot][key], fx.make_layout(4, 1))
        column = (step * cfg.weight.pieces + piece) * 4 + self.place.g
        source = self.source[(self.place.r, self.blocks[block], half), (None, column)]
        kt, away = self._part(kt, step)
        at = fx.make_view(fx.get_iter(source) + away, fx.make_layout(4, 1))
        fx.copy(self.piece, at, quarters[None, piece], soffset=kt * cfg.tile_stride)

    def _load_scale(self, kt, slot: int, key) -> None:
        cfg, (half, group) = self.cfg, key
        shared = 1 if cfg.halves_share_scales else 2
        row = (self.place.r, self.blocks[group * shared] // shared, half)
        column = self.scale_source[row, (self.place.g, None)]
        kt, away = self._part(kt, 0)
        source = fx.make_view(fx.get_iter(column) + away, fx.make_layout(1, 1))
        offset = kt * cfg.scale_modes()[1][1][1]
        fx.copy(self.word, source, self.scales[slot][key], soffset=offset)

    def _part(self, kt, step: int):
        """(K tile of all K, words to add): where a part reaches beyond K its weights are zeros."""
        cfg = self.cfg
        if cfg.parts == 1:
            return kt, 0
        kt = self.place.first_tile + kt
        inside = kt * cfg.steps + step < cfg.k_steps
        return inside.select(kt, 0), inside.select(fx.Int32(0), NOWHERE)
