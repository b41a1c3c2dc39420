"""The weights of a wave on their way from memory to registers: a ring of MFMA steps.

While one step is multiplied the others are in flight: the only copy of a weight that a workgroup
reads goes to the one wave that multiplies it.
"""

from functools import partial

import flydsl.expr as fx

from mixmoe.backends.cdna.atoms import MFMA_ROWS, WORD
from mixmoe.backends.cdna.config import THREADS, Gemm, Modes
from mixmoe.backends.cdna.tokens import ONES, write_word

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
    """Fragments of codes for ``ring`` steps and of scales for the K tiles they belong to; of rows
    that have one scale it is that of 2^0, always."""

    def __init__(self, cfg: Gemm, place, codes: fx.Tensor, scales: fx.Tensor, first_block):
        self.cfg, self.place = cfg, place
        end = cfg.rows // MFMA_ROWS
        self.blocks = [fx.min(first_block + b, end - 1) for b in range(cfg.blocks)]
        self.source = of_expert(codes, place.expert, cfg.code_words, cfg.code_modes())
        if cfg.weight.block:
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
        for scale in [] if cfg.weight.block else self.scales[0].values():
            scale.fill(ONES)

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

    def scale(self, tile: int, half: int, block: int) -> fx.Int32:
        """The dword that scales a block in the ring's K tile ``tile``."""
        of_tile = self.scales[tile % len(self.scales) if self.cfg.weight.block else 0]
        return fx.Int32(of_tile[self.scale_key(half, block)].load()[0])

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
        if not self.cfg.weight.block:
            return []
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


class ChannelScales:
    """The float32 scales of the tile's weight rows, ``(E, halves * rows)`` in memory, into LDS and
    onto the sums. Of weights whose blocks have scales nothing: others apply those."""

    def __init__(self, cfg: Gemm, place, lds, source: fx.Tensor, first_block):
        self.cfg, self.place, self.source = cfg, place, source
        self.wave_row = place.wave % cfg.team * (cfg.blocks * MFMA_ROWS)
        self.first = first_block * MFMA_ROWS - self.wave_row
        self.count = 0 if cfg.period else cfg.channel_bytes // WORD
        base = lds.scales.ptr + cfg.scale_room // WORD
        self.table = fx.recast_iter(fx.Float32, base).view(fx.make_layout(max(1, self.count), 1))
        self.values: list[fx.Float32] = []

    def start(self) -> None:
        """Load a row's scale a thread and turn; what is beyond repeats the last row."""
        cfg = self.cfg
        for turn in range(-(-self.count // THREADS)):
            at = fx.min(self.place.tid + turn * THREADS, self.count - 1)
            half, row = at // cfg.tile_rows, fx.min(self.first + at % cfg.tile_rows, cfg.rows - 1)
            of_half = fx.Int64(self.place.expert * cfg.halves + half) * cfg.rows
            self.values.append(fx.Float32(fx.get_iter(self.source)[of_half + row]))

    def publish(self) -> None:
        """Write to LDS."""
        for turn, value in enumerate(self.values):
            at = self.place.tid + turn * THREADS
            write_word(self.table, at, value, at < self.count)

    def factors(self) -> dict[tuple[int, int], fx.Vector]:
        """(half, block) -> what a lane's four rows of sums still lack."""
        keys = [(h, b) for h in range(self.cfg.halves) for b in range(self.cfg.blocks)]
        return {key: self._of(*key) for key in keys} if self.count else {}

    def _of(self, half: int, block: int) -> fx.Vector:
        first = half * self.cfg.tile_rows + block * MFMA_ROWS
        at = fx.get_iter(self.table) + (self.wave_row + self.place.g * 4 + first)
        frag = fx.make_rmem_tensor(4, fx.Float32)
        piece = fx.make_copy_atom(fx.UniversalCopy128b(), fx.Float32)
        fx.copy(piece, at.view(fx.make_layout(4, 1)), frag)
        return frag.load()
