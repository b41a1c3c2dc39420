"""The main loop of both GEMMs: weights from memory to registers, tokens through two LDS stages.

A workgroup multiplies ``tokens`` sorted routes of one expert by ``4 x blocks x 16`` weight rows
of each half. The four waves split the rows; every wave reads all tokens from LDS. Per K tile of
256, while the MFMAs of tile i run, the weights of tile i + 1 travel to registers and its tokens to
the other LDS stage; one barrier a tile. Scales of the tokens are put into LDS once, for all K, in
the order in which a lane reads one dword per 32 tokens and tile.

K tails: weights are packed with zero codes to a multiple of 128, and the last tile takes one MFMA
step where that is no multiple of 256; a token's codes beyond K are zeros and its scales 2^0. Row
tails: blocks beyond the last row repeat it and are not stored. No load leaves its tensor.
"""

from dataclasses import dataclass

import flydsl.compiler as flyc
import flydsl.expr as fx
from flydsl.expr import const_expr, range_constexpr

from mixmoe.backends.cdna.atoms import MFMA_ROWS, PIECE, SCALE_BLOCK, WAVE, WORD
from mixmoe.backends.cdna.config import THREADS, TILE_K, Gemm, Modes

ONE = 127  # E8M0 of 1
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

    def load(self, kt, stage: int, steps: int) -> None:
        """Start K tile ``kt``: weights and scales into fragments, tokens into registers."""
        cfg, place = self.cfg, self.place
        pieces = cfg.weight.pieces
        for (half, block, step), frag in self.weight_frags[stage].items():
            if step >= steps:
                continue
            quarters = fx.logical_divide(frag, fx.make_layout(4, 1))
            row = (place.r, self.blocks[block], half)
            for p in range(pieces):
                column = (step * pieces + p) * 4 + place.g
                source = self.codes[row, (None, column)]
                fx.copy(self.piece, source, quarters[None, p], soffset=kt * cfg.tile_stride)
        shared = 1 if cfg.halves_share_scales else 2
        for (half, group), frag in self.scale_frags[stage].items():
            row = (place.r, self.blocks[group * shared] // shared, half)
            source = fx.make_view(
                fx.get_iter(self.scales[row, (place.g, None)]), fx.make_layout(1, 1)
            )
            fx.copy(self.word, source, frag, soffset=kt * cfg.scale_modes()[1][1][1])
        for (row, chunk), frag in zip(self.rows, self.moving, strict=True):
            self._load_piece(row, kt * cfg.chunks + chunk, frag)

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

    def token_codes(self, group: int, step: int, stage: int) -> fx.Tensor:
        """16 tokens of one MFMA step, from LDS."""
        cfg, place = self.cfg, self.place
        frag = fx.make_rmem_tensor(4 * cfg.token.pieces, fx.Int32)
        quarters = fx.logical_divide(frag, fx.make_layout(4, 1))
        for p in range(cfg.token.pieces):
            chunk = (step * cfg.token.pieces + p) * 4 + place.g
            token = group * MFMA_ROWS + place.r
            fx.copy(self.local, self.shared[None, chunk, token, stage], quarters[None, p])
        return frag

    def token_scales(self, kt):
        """A dword per 32 tokens of K tile ``kt``, from LDS."""
        cfg, place = self.cfg, self.place
        words = fx.recast_iter(fx.Int32, self.lds.scales.ptr)
        lane = place.g * 16 + place.r
        return [
            (words + (((t * cfg.k_tiles) + kt) * WAVE + lane)).load()
            for t in range(cfg.tokens // 32)
        ]


def make_accumulators(cfg: Gemm):
    """Zeroed results: (half, block, token group) -> 4 rows of one token."""
    acc = {}
    for half in range(cfg.halves):
        for block in range(cfg.blocks):
            for group in range(cfg.tokens // MFMA_ROWS):
                acc[half, block, group] = fx.make_rmem_tensor(4, fx.Float32)
                acc[half, block, group].fill(0.0)
    return acc


def multiply(cfg: Gemm, loads: Loads, acc, kt, stage: int, steps: int) -> None:
    """The MFMAs of K tile ``kt``."""
    scales = loads.token_scales(kt)
    shared = cfg.halves_share_scales
    for step in range(steps):
        for group in range(cfg.tokens // MFMA_ROWS):
            token = loads.token_codes(group, step, stage)
            for half, block, _ in (key for key in loads.weights() if key[2] == step):
                key = (0, block) if shared else (half, block // 2)
                bytes_of = (cfg.scale_byte(half, block, step), 2 * step + group % 2)
                fx.gemm(
                    cfg.atoms.mma(cfg.weight, cfg.token, bytes_of),
                    acc[half, block, group],
                    loads.weight_frags[stage][half, block, step],
                    token,
                    acc[half, block, group],
                    scale_a=loads.scale_frags[stage][key].load()[0],
                    scale_b=scales[group // 2],
                )


@flyc.jit
def run(cfg: Gemm, loads: Loads, acc) -> None:
    """All K tiles: load i + 1, multiply i, hand the tokens over."""
    last = cfg.k_tiles - 1
    # A shorter last tile is loaded by a step of its own, after the loop.
    looped = last if cfg.last_steps == cfg.steps else max(0, last - 1)
    loads.load(0, 0, cfg.steps if last else cfg.last_steps)
    loads.publish(0)
    fx.gpu.barrier()
    for pair in range(0, looped // 2, 1):
        kt = fx.Int32(pair) * 2
        step(cfg, loads, acc, kt, 0, cfg.steps)
        step(cfg, loads, acc, kt + 1, 1, cfg.steps)
    if const_expr(looped % 2 == 1):
        step(cfg, loads, acc, looped - 1, 0, cfg.steps)
    if const_expr(looped < last):
        step(cfg, loads, acc, last - 1, (last - 1) % 2, cfg.last_steps)
    multiply(cfg, loads, acc, last, last % 2, cfg.last_steps)


def step(cfg: Gemm, loads: Loads, acc, kt, stage: int, next_steps: int) -> None:
    """Multiply tile ``kt`` while tile ``kt + 1`` travels."""
    loads.load(kt + 1, stage ^ 1, next_steps)
    multiply(cfg, loads, acc, kt, stage, cfg.steps)
    loads.publish(stage ^ 1)
    fx.gpu.barrier()


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
