"""The main loop of both GEMMs: weights from memory to registers, tokens through two LDS stages.

A workgroup multiplies ``tokens`` sorted routes of one expert by ``4 x blocks x 16`` weight rows
of each half. The four waves split the rows; every wave reads all tokens from LDS. Scales of the
tokens are put into LDS once, for all K, in the order in which a lane reads one dword per 32 tokens
and K tile of 256.

A tile is a row of phases, one for 16 tokens of one MFMA step. Each phase starts some of the next
tile's loads, reads the tokens of the phase two on from LDS, and issues its MFMAs; a phase's
instructions stay in it. Two phases before the end the next tile's tokens go to the other LDS
stage and the one barrier of the tile is met, so that the last phases already read ahead into it.

K tails: weights are packed with zero codes to a multiple of 128, and the last tile takes one MFMA
step where that is no multiple of 256; a token's codes beyond K are zeros and its scales 2^0. Row
tails: blocks beyond the last row repeat it and are not stored. No load leaves its tensor.
"""

from dataclasses import dataclass
from functools import partial

import flydsl.compiler as flyc
import flydsl.expr as fx
from flydsl.expr import const_expr, range_constexpr

from mixmoe.backends.cdna.atoms import MFMA_ROWS, PIECE, SCALE_BLOCK, WAVE, WORD
from mixmoe.backends.cdna.config import THREADS, TILE_K, Gemm, Modes

ONE = 127  # E8M0 of 1
RING, AHEAD = 4, 2  # token fragments in registers; phases between a read and its use
TOKEN_MASK = 0xFFFFFF  # a sorted route is token | slot << 24


@dataclass(frozen=True, slots=True)
class Place:
    """Where a thread stands: wave, lane's row ``r`` of 16 and K group ``g`` of 4; the expert."""

    tid: fx.Int32
    wave: fx.Int32
    r: fx.Int32
    g: fx.Int32
    expert: fx.Int32


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


def shared_storage(cfg: Gemm):
    """LDS: two stages of token codes; the scales of all K."""
    return fx.Struct[
        "codes" : fx.Array[fx.Int32, 2 * cfg.code_bytes // WORD, PIECE],
        "scales" : fx.Array[fx.Uint8, cfg.scale_words * WORD, PIECE],
    ]


def shared_codes(cfg: Gemm, lds) -> fx.Tensor:
    """Token codes in LDS: ``(4 words, pieces, tokens, 2 stages)``, swizzled."""
    plain = fx.make_ordered_layout((4, cfg.chunks, cfg.tokens, 2), (0, 1, 2, 3))
    swizzle = fx.static(fx.SwizzleType.get(*cfg.swizzle))
    return lds.codes.view(fx.make_composed_layout(swizzle, plain))


@flyc.jit
def fill_scales(cfg: Gemm, place: Place, lds, source: fx.Tensor, row_of) -> None:
    """Scales of the tile's tokens, ``(rows, K / 32)`` bytes in memory, into LDS.

    ``row_of(t)`` is the memory row of token t. A lane's dword holds the bytes of tokens r and
    r + 16, K blocks g and g + 4: the four that op_sel picks from.
    """
    unit = cfg.scale_unit
    units = cfg.k_tiles * TILE_K // SCALE_BLOCK // unit
    for i in range_constexpr(-(-cfg.tokens * units // THREADS)):
        index = place.tid + i * THREADS
        if index < cfg.tokens * units:
            token, column = index // units, index % units
            move_scales(cfg, lds, fx.get_iter(source), row_of(token), token, column)


def move_scales(cfg: Gemm, lds, base, row, token, column) -> None:
    """One load of ``scale_unit`` scales of a token; 2^0 beyond K."""
    unit = cfg.scale_unit
    # (token % 16, token / 16 % 2, token / 32), (block % 4, block / 4 % 2, block / 8)
    order = fx.make_layout(
        ((16, 2, cfg.tokens // 32), (4, 2, cfg.k_tiles)),
        ((4, 1, cfg.k_tiles * WAVE * WORD), (16 * WORD, 2, WAVE * WORD)),
    )
    out = lds.scales.view(order)
    per_row = cfg.scale_blocks // unit
    inside = column < per_row
    at = fx.Int64(row) * per_row + inside.select(column, 0)
    value = fx.Uint32(base[at])
    for j in range(unit):
        block = column * unit + j
        byte = inside.select((value >> (8 * j)) & 0xFF, fx.Uint32(ONE))
        where = (token % 16, token // 16 % 2, token // 32)
        out[where, (block % 4, block // 4 % 2, block // 8)] = byte.to(fx.Uint8)


class Loads:
    """Fragments of the main loop and the copies that fill them."""

    def __init__(self, cfg: Gemm, place: Place, codes, scales, tokens, row_of, row_block, lds):
        self.cfg, self.place = cfg, place
        end = cfg.rows // MFMA_ROWS
        self.blocks = [fx.min(row_block + b, end - 1) for b in range(cfg.blocks)]
        self.codes = of_expert(codes, place.expert, cfg.code_words, cfg.code_modes())
        self.scales = of_expert(
            scales, place.expert, cfg.scale_bytes // WORD, cfg.scale_modes()
        )
        self.shared, self.lds = shared_codes(cfg, lds), lds
        self.piece = fx.make_copy_atom(fx.rocdl.BufferCopy128b(), fx.Int32)
        self.word = fx.make_copy_atom(fx.rocdl.BufferCopy32b(), fx.Int32)
        self.local = fx.make_copy_atom(fx.UniversalCopy128b(), fx.Int32)
        self.local_word = fx.make_copy_atom(fx.UniversalCopy32b(), fx.Int32)
        self.weight_frags = [
            {key: fx.make_rmem_tensor(4 * cfg.weight.pieces, fx.Int32) for key in self.weights()}
            for _ in range(2)
        ]
        self.scale_frags = [
            {key: fx.make_rmem_tensor(1, fx.Int32) for key in self.weight_scales()}
            for _ in range(2)
        ]
        self.ring = [
            fx.make_rmem_tensor(4 * cfg.token.pieces, fx.Int32) for _ in range(RING)
        ]
        self.token_scales = [
            [fx.make_rmem_tensor(1, fx.Int32) for _ in range(cfg.tokens // 32)] for _ in range(2)
        ]
        count = cfg.tokens * cfg.chunks // THREADS
        self.moving = [fx.make_rmem_tensor(4, fx.Int32) for _ in range(count)]
        self.rows = []
        for i in range(count):
            token, chunk = self.slot(i)
            row = fx.get_iter(tokens) + fx.Int64(row_of(token)) * cfg.row_words
            self.rows.append((row, chunk))

    def weights(self):
        """(half, block, step) of every fragment of weights."""
        cfg = self.cfg
        return [
            (h, b, s)
            for h in range(cfg.halves)
            for b in range(cfg.blocks)
            for s in range(cfg.steps)
        ]

    def weight_scales(self):
        """(half, group) of every dword of weight scales."""
        cfg = self.cfg
        if cfg.halves_share_scales:
            return [(0, b) for b in range(cfg.blocks)]
        return [(h, b) for h in range(cfg.halves) for b in range(cfg.blocks // 2)]

    def slot(self, i):
        """(token, piece) of LDS that a thread moves in round i."""
        index = self.place.tid + i * THREADS
        return index // self.cfg.chunks, index % self.cfg.chunks

    def load_tokens(self, kt) -> None:
        """Start the tokens of K tile ``kt`` towards registers.

        The counter of loads in flight runs in order: with these before the weights, publishing
        them waits for nothing else, and the weights stay in flight across the barrier.
        """
        for (row, chunk), frag in zip(self.rows, self.moving, strict=True):
            self._load_piece(row, kt * self.cfg.chunks + chunk, frag)

    def weight_loads(self, kt, stage: int, steps: int):
        """Functions that start one load each: the scales, then the weights, of K tile ``kt``."""
        starts = [partial(self._load_scale, kt, stage, key) for key in self.weight_scales()]
        for step in range(steps):
            for key in (key for key in self.weights() if key[2] == step):
                for p in range(self.cfg.weight.pieces):
                    starts.append(partial(self._load_weight, kt, stage, key, p))
        return starts

    def _load_scale(self, kt, stage: int, key) -> None:
        cfg, (half, group) = self.cfg, key
        shared = 1 if cfg.halves_share_scales else 2
        row = (self.place.r, self.blocks[group * shared] // shared, half)
        column = self.scales[row, (self.place.g, None)]
        source = fx.make_view(fx.get_iter(column), fx.make_layout(1, 1))
        offset = kt * cfg.scale_modes()[1][1][1]
        fx.copy(self.word, source, self.scale_frags[stage][key], soffset=offset)

    def _load_weight(self, kt, stage: int, key, piece: int) -> None:
        cfg, (half, block, step) = self.cfg, key
        quarters = fx.logical_divide(self.weight_frags[stage][key], fx.make_layout(4, 1))
        column = (step * cfg.weight.pieces + piece) * 4 + self.place.g
        source = self.codes[(self.place.r, self.blocks[block], half), (None, column)]
        fx.copy(self.piece, source, quarters[None, piece], soffset=kt * cfg.tile_stride)

    def _load_piece(self, row, chunk, frag) -> None:
        cfg = self.cfg
        if not cfg.k % TILE_K:
            fx.copy(self.local, (row + chunk * 4).view(fx.make_layout(4, 1)), frag)
            return
        inside = chunk < cfg.row_words // 4
        source = (row + inside.select(chunk, 0) * 4).view(fx.make_layout(4, 1))
        fx.copy(self.local, source, frag)
        frag.store(inside.select(frag.load(), fx.Vector.filled(4, 0, fx.Int32)))

    def publish(self, stage: int) -> None:
        """Write the tokens that :meth:`load` fetched to an LDS stage."""
        for i, frag in enumerate(self.moving):
            token, chunk = self.slot(i)
            fx.copy(self.local, frag, self.shared[None, chunk, token, stage])

    def read_tokens(self, phase: int, stage: int) -> None:
        """The 16 tokens of a phase, from LDS into the ring."""
        cfg, place = self.cfg, self.place
        step, group = divmod(phase, cfg.groups)
        quarters = fx.logical_divide(self.ring[phase % RING], fx.make_layout(4, 1))
        for p in range(cfg.token.pieces):
            chunk = (step * cfg.token.pieces + p) * 4 + place.g
            token = group * MFMA_ROWS + place.r
            fx.copy(self.local, self.shared[None, chunk, token, stage], quarters[None, p])

    def read_scales(self, kt, stage: int) -> None:
        """A dword per 32 tokens of K tile ``kt``, from LDS."""
        cfg, place = self.cfg, self.place
        words = fx.recast_iter(fx.Int32, self.lds.scales.ptr)
        lane = place.g * 16 + place.r
        for t, frag in enumerate(self.token_scales[stage]):
            source = words + ((t * cfg.k_tiles + kt) * WAVE + lane)
            fx.copy(self.local_word, source.view(fx.make_layout(1, 1)), frag)


def make_accumulators(cfg: Gemm):
    """Zeroed results: (half, block, token group) -> 4 rows of one token."""
    acc = {}
    for half in range(cfg.halves):
        for block in range(cfg.blocks):
            for group in range(cfg.groups):
                acc[half, block, group] = fx.make_rmem_tensor(4, fx.Float32)
                acc[half, block, group].fill(0.0)
    return acc


def multiply(cfg: Gemm, loads: Loads, acc, phase: int, stage: int) -> None:
    """The MFMAs of one phase: every row block times 16 tokens."""
    step, group = divmod(phase, cfg.groups)
    for half, block, _ in (key for key in loads.weights() if key[2] == step):
        key = (0, block) if cfg.halves_share_scales else (half, block // 2)
        bytes_of = (cfg.scale_byte(half, block, step), 2 * step + group % 2)
        fx.gemm(
            cfg.atoms.mma(cfg.weight, cfg.token, bytes_of),
            acc[half, block, group],
            loads.weight_frags[stage][half, block, step],
            loads.ring[phase % RING],
            acc[half, block, group],
            scale_a=loads.scale_frags[stage][key].load()[0],
            scale_b=loads.token_scales[stage][group // 2].load()[0],
        )


def hand_over(loads: Loads, kt, stage: int) -> None:
    """Publish the tokens of tile ``kt`` and meet the other waves; its scales."""
    loads.publish(stage)
    fx.gpu.barrier()
    loads.read_scales(kt, stage)


def tile(cfg: Gemm, loads: Loads, acc, kt, steps: int, stage: int, next_steps: int) -> None:
    """The phases of K tile ``kt``; ``next_steps`` MFMA steps follow, none after the last tile."""
    phases, other = steps * cfg.groups, stage ^ 1
    starts = loads.weight_loads(kt + 1, other, next_steps) if next_steps else []
    share = -(-len(starts) // max(1, phases // 2))
    for phase in range(phases):
        if next_steps and phase == 0:
            loads.load_tokens(kt + 1)
        for start in starts[phase * share : (phase + 1) * share]:
            start()
        if next_steps and phase == phases - AHEAD:
            hand_over(loads, kt + 1, other)
        ahead = phase + AHEAD
        if ahead < phases:
            loads.read_tokens(ahead, stage)
        elif next_steps:
            loads.read_tokens(ahead - phases, other)
        multiply(cfg, loads, acc, phase, stage)
        fx.rocdl.sched_barrier(0)


@flyc.jit
def run(cfg: Gemm, loads: Loads, acc) -> None:
    """All K tiles."""
    last = cfg.k_tiles - 1
    # A shorter last tile is loaded by a tile of its own, after the loop.
    looped = last if cfg.last_steps == cfg.steps else max(0, last - 1)
    begin(cfg, loads, cfg.steps if last else cfg.last_steps)
    for pair in range(0, looped // 2, 1):
        kt = fx.Int32(pair) * 2
        tile(cfg, loads, acc, kt, cfg.steps, 0, cfg.steps)
        tile(cfg, loads, acc, kt + 1, cfg.steps, 1, cfg.steps)
    if const_expr(looped % 2 == 1):
        tile(cfg, loads, acc, looped - 1, cfg.steps, 0, cfg.steps)
    if const_expr(looped < last):
        tile(cfg, loads, acc, last - 1, cfg.steps, (last - 1) % 2, cfg.last_steps)
    tile(cfg, loads, acc, last, cfg.last_steps, last % 2, 0)


def begin(cfg: Gemm, loads: Loads, steps: int) -> None:
    """Tile 0 into place, its first phases read."""
    loads.load_tokens(0)
    for start in loads.weight_loads(0, 0, steps):
        start()
    hand_over(loads, 0, 0)
    for phase in range(AHEAD):
        loads.read_tokens(phase, 0)


@dataclass(frozen=True, slots=True)
class Tile:
    """Which rows and which sorted routes a workgroup computes, for which expert."""

    rows: fx.Int32  # in tiles
    routes: fx.Int32  # first sorted position
    expert: fx.Int32
    used: fx.Boolean


def tile_of(cfg: Gemm, sorted_ids, expert_ids, tokens) -> Tile:
    """The workgroup's tile. Row tiles count fastest: with round-robin dispatch over 8 XCDs an L2
    then holds every eighth row tile of an expert and reuses it for all of the expert's tokens."""
    index = fx.Int32(fx.block_idx.x)
    rows, block = index % cfg.row_tiles, index // cfg.row_tiles
    expert = fx.Int32(expert_ids[block // cfg.sort_tiles])
    first = block * cfg.tokens
    # Padding closes a sorted block: a tile that begins with it holds nothing else.
    used = (expert >= 0) & ((fx.Int32(sorted_ids[first]) & TOKEN_MASK) < tokens)
    return Tile(rows, first, expert, used)


def stand(tile: Tile) -> Place:
    """The calling thread's place; the expert is made uniform, as addresses hang on it."""
    tid = fx.Int32(fx.thread_idx.x)
    wave = fx.Int32(fx.rocdl.readfirstlane(fx.Int32.ir_type, tid // WAVE))
    expert = fx.Int32(fx.rocdl.readfirstlane(fx.Int32.ir_type, tile.expert))
    return Place(tid, wave, tid % 16, tid % WAVE // 16, expert)


def row_bias(bias: fx.Tensor, offset) -> fx.Vector:
    """Four consecutive float32 from ``offset``."""
    frag = fx.make_rmem_tensor(4, fx.Float32)
    source = fx.get_iter(bias) + offset
    quad = fx.make_copy_atom(fx.UniversalCopy128b(), fx.Float32)
    fx.copy(quad, source.view(fx.make_layout(4, 1)), frag)
    return frag.load()
