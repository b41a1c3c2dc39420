"""The tokens of a tile on their way from memory through LDS to a lane's registers.

Codes: a ring of K tiles in LDS that asynchronous copies fill, 16 bytes a lane, with no register
in between. A copy writes 64 lanes one after the other, so the swizzle is applied to the column
that a lane reads from memory.

Scales of blocks: all K once, before the main loop. A lane's dword holds its token's scales of four
MFMA steps, one byte each, from which op_sel picks; a row of plain scales is transposed into that,
16 bytes at a time. Scales of rows: a float32 of each token, for the sums.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import flydsl.compiler as flyc
import flydsl.expr as fx

from mixmoe.backends.cdna.atoms import MFMA_ROWS, PIECE, WAVE, WORD
from mixmoe.backends.cdna.config import STEPS_OF_DWORD, THREADS, TILE_K, Gemm

TOKEN_MASK = 0xFFFFFF  # a sorted route is token | slot << 24
ONES = 0x7F7F7F7F  # four E8M0 scales of 1
FRAGMENTS, AHEAD = 4, 2  # token fragments in registers; phases between a read and its use
EVEN, ODD = (0x05010400, 0x07030602)  # perm: bytes 0 and 1, 2 and 3 of two words, taken in turn
LOW, HIGH = (0x05040100, 0x07060302)  # perm: lower halves, upper halves of two words


def shared_storage(cfg: Gemm):
    """LDS: the stages of token codes; the tokens' scales of all K, the weight rows' after them;
    where results go, and scales of them."""
    return fx.Struct[
        "codes" : fx.Array[fx.Int32, cfg.k_waves * cfg.stages * cfg.code_bytes // WORD, PIECE],
        "scales" : fx.Array[fx.Int32, (cfg.scale_room + cfg.channel_bytes) // WORD, PIECE],
        "places" : fx.Array[fx.Int32, cfg.place_bytes // WORD, PIECE],
        "blocks" : fx.Array[fx.Uint8, max(1, cfg.block_bytes), PIECE],
    ]


@dataclass(frozen=True, slots=True)
class Rows:
    """Where the tokens of a tile lie: ``id(t)`` loads what is sorted at place t, ``row(id)`` is
    the memory row of a token, or of a route where ``topk`` is given. Padding reads row 0.
    ``place(id)`` is where a result goes: row ``token * spread + slot``, or the token's with
    ``spread`` None, times ``stride``; ``padding`` for padding."""

    ids: fx.Tensor
    first: fx.Int32
    tokens: fx.Int32
    topk: Any = None
    spread: Any = None
    stride: int = 1
    padding: int = -1

    def id(self, t) -> fx.Int32:
        """The packed token and slot."""
        return fx.Int32(self.ids[self.first + t])

    def row(self, packed):
        """The row in memory."""
        token = packed & TOKEN_MASK
        row = token if self.topk is None else token * self.topk + (packed >> 24)
        return (token < self.tokens).select(row, 0)

    def place(self, packed) -> fx.Int32:
        """Where results go."""
        token = packed & TOKEN_MASK
        row = token if self.spread is None else token * self.spread + (packed >> 24)
        return fx.Int32((token < self.tokens).select(row * self.stride, self.padding))


class Ids:
    """What is sorted where a thread needs it: the tokens that it copies, those whose scales it
    brings, the one whose place it notes. Asked for before it is known whether the tile holds any,
    as all the rest waits for them; positions exist all the same."""

    def __init__(self, cfg: Gemm, rows):
        tid = fx.Int32(fx.thread_idx.x)
        mate = tid % (cfg.team * WAVE)
        self.copied = [rows.id(copied(cfg, mate, i)[0]) for i in range(cfg.copies)]
        self.scaled = [
            rows.id(fx.min(filled(cfg, tid, p, 0)[0], cfg.tokens - 1)) for p in range(passes(cfg))
        ]
        self.own = rows.id(tid % cfg.tokens)
        if cfg.period:  # neighbours share a token's scales
            self.shared = rows.id(tid // (THREADS // cfg.tokens))
        fx.rocdl.sched_barrier(0)


def copied(cfg: Gemm, mate, i: int):
    """(token, word of its K tile) of a thread's i-th place of a stage."""
    word = (i * cfg.team * WAVE + mate) * (cfg.copy_bytes // WORD)
    per_row = cfg.chunks * 4
    return word // per_row, word % per_row


def sharers(cfg: Gemm) -> int:
    """Threads that share a token whose scales are brought: up to eight, for 128 bytes."""
    return min(8, 1 << (cfg.scale_dwords - 1).bit_length())


def passes(cfg: Gemm) -> int:
    """Times that the threads of a workgroup turn to other tokens' scales."""
    return -(-cfg.tokens * sharers(cfg) // THREADS) if cfg.token.block else 0


def filled(cfg: Gemm, tid, p: int, i: int):
    """(token, dword) of a thread in pass p, round i."""
    token, first = tid // sharers(cfg), tid % sharers(cfg)
    return token + p * (THREADS // sharers(cfg)), first + i * sharers(cfg)


class Places:
    """Where results of the tile's tokens go, in LDS. Read there an epilogue waits neither for
    memory nor, as memory answers in order, for its own stores."""

    def __init__(self, cfg: Gemm, lds):
        self.cfg = cfg
        self.table = lds.places.view(fx.make_layout(cfg.tokens, 1))

    def publish(self, ids: Ids, rows) -> None:
        """Write a token's a thread."""
        tid = fx.Int32(fx.thread_idx.x)
        write_word(self.table, tid, rows.place(ids.own), tid < self.cfg.tokens)

    def of(self, t) -> fx.Int32:
        """The place of what is sorted at position t of the tile."""
        return fx.Int32(self.table[t])

    def of_groups(self, place) -> list[fx.Int32]:
        """Those of a lane's token of every group."""
        return [self.of(group * MFMA_ROWS + place.r) for group in range(self.cfg.groups)]


class Tokens:
    """Token codes in LDS and in registers, and their scales.

    ``rows.row(id)`` is the row of memory in which a token lies.
    """

    def __init__(self, cfg: Gemm, place, lds, source: fx.Tensor):
        self.cfg, self.place, self.lds, self.source = cfg, place, lds, source
        width = 8 * cfg.copy_bytes
        near, far = fx.rocdl.cdna4.BufferLoadAsyncLDS, fx.rocdl.cdna4.GlobalLoadAsyncLDS
        self.dma = fx.make_copy_atom((far if cfg.far else near)(width), fx.Int32)
        self.piece = fx.make_copy_atom(fx.UniversalCopy128b(), fx.Int32)
        self.word = fx.make_copy_atom(fx.UniversalCopy32b(), fx.Int32)
        self.ring = [
            fx.make_rmem_tensor(4 * cfg.token.pieces, fx.Int32) for _ in range(FRAGMENTS)
        ]
        self.scales = [fx.make_rmem_tensor(1, fx.Int32) for _ in range(cfg.groups)]
        for scale in self.scales:
            scale.fill(ONES)
        self.sources: list[tuple] = []

    def find(self, ids: Ids, rows) -> None:
        """(row's first word, piece of a K tile, word) that fill each place."""
        for i, packed in enumerate(ids.copied):
            token, column = copied(self.cfg, self.place.mate, i)
            row = rows.row(packed)
            first = (fx.Int64(row) if self.cfg.far else row) * self.cfg.row_words
            chunk = self.cfg.swizzled(token, column // 4)
            self.sources.append((first, chunk, column % 4))

    def copies(self, kt):
        """Functions that start one copy each, of K tile ``kt`` into its stage."""
        return [partial(self._start, kt, i) for i in range(self.cfg.copies)]

    def _start(self, kt, i: int) -> None:
        cfg = self.cfg
        words = cfg.copy_bytes // WORD
        row, chunk, word = self.sources[i]
        step = kt * (cfg.chunks * 4)
        if cfg.parts > 1 or (isinstance(kt, int) and (kt + 1) * TILE_K > cfg.k):
            # Beyond K weights are zero codes: any finite code of the row will do.
            chunk, step = (self.place.first_tile + kt) * cfg.chunks + chunk, 0
            chunk = (chunk < cfg.row_words // 4).select(chunk, 0)
        place = (i * cfg.team + self.place.wave % cfg.team) * WAVE * words
        layout = fx.make_layout(words, 1)
        target = (self.lds.codes.ptr + (self._stage(kt) + place)).view(layout)
        at = row + (chunk * 4 + word)
        if cfg.far:
            fx.copy(self.dma, (fx.get_iter(self.source) + (at + step)).view(layout), target)
            return
        # A scalar carries the K tile, so that no lane computes an address.
        buffer = fx.get_iter(fx.rocdl.make_buffer_tensor(self.source))
        fx.copy(self.dma, fx.make_view(buffer + at, layout), target, soffset=step)

    def _stage(self, kt):
        """First word of the stage that holds K tile ``kt`` of the wave's part."""
        stage = kt % self.cfg.stages + self.place.part * self.cfg.stages
        return stage * (self.cfg.code_bytes // WORD)

    def read(self, kt, phase: int, slot: int) -> None:
        """The 16 tokens of a phase of K tile ``kt``, from LDS into the ring."""
        cfg, place = self.cfg, self.place
        step, group = divmod(phase, cfg.groups)
        quarters = fx.logical_divide(self.ring[slot % FRAGMENTS], fx.make_layout(4, 1))
        base = self.lds.codes.ptr + (self._stage(kt) + group * MFMA_ROWS * cfg.chunks * 4)
        rows = fx.make_view(base, fx.make_layout((4, cfg.chunks, 16), (1, 4, 4 * cfg.chunks)))
        for p in range(cfg.token.pieces):
            chunk = cfg.swizzled(place.r, (step * cfg.token.pieces + p) * 4 + place.g)
            fx.copy(self.piece, rows[None, chunk, place.r], quarters[None, p])

    def read_scale(self, dword, group: int) -> None:
        """The dword of a group's scales that serves MFMA steps ``4 dword ..``; of rows that have
        one scale it is that of 2^0, always."""
        if not self.cfg.token.block:
            return
        place = self.place
        lane = (group * MFMA_ROWS + place.r) * 4 + place.g
        if self.cfg.parts > 1:
            per = STEPS_OF_DWORD // self.cfg.steps
            dword = fx.min(place.first_tile // per + dword, self.cfg.scale_dwords - 1)
        source = self.lds.scales.ptr + (dword * self.cfg.scale_stride + lane)
        fx.copy(self.word, source.view(fx.make_layout(1, 1)), self.scales[group])


class ScaleFill:
    """The scales of the tile's tokens, ``(rows, K / 32)`` bytes in memory, into LDS.

    Up to eight neighbouring threads share a token: 128 bytes, one line of memory.
    """

    def __init__(self, cfg: Gemm, place, lds, source: fx.Tensor):
        self.cfg, self.place, self.lds, self.source = cfg, place, lds, source
        self.rounds = -(-cfg.scale_dwords // sharers(cfg))
        self.frags = {
            (p, i): fx.make_rmem_tensor(4, fx.Int32)
            for p in range(passes(cfg))
            for i in range(self.rounds)
        }

    def start(self, ids: Ids, rows) -> None:
        """Load 16 scales of a token a thread, pass and round; what is beyond repeats the last."""
        cfg = self.cfg
        unit, per_row = cfg.scale_unit, cfg.scale_blocks // cfg.scale_unit
        piece = fx.make_copy_atom(fx.UniversalCopy128b(), fx.Int32)
        for p in range(passes(cfg)):
            row = fx.get_iter(self.source) + fx.Int64(rows.row(ids.scaled[p])) * per_row
            for i in range(self.rounds):
                dword = fx.min(filled(cfg, self.place.tid, p, i)[1], cfg.scale_dwords - 1)
                frag = self.frags[p, i]
                if unit == PIECE:
                    at = fx.recast_iter(fx.Int32, row) + dword * 4
                    fx.copy(piece, at.view(fx.make_layout(4, 1)), frag)
                    continue
                frag.store(fx.Vector.from_elements(
                    [self._dword(row, dword, s, per_row) for s in range(4)], fx.Int32))

    def _dword(self, row, dword, step: int, per_row: int):
        """Four scales of one step from loads of less; 2^0 beyond K."""
        unit = self.cfg.scale_unit
        value = fx.Int32(0)
        for part in range(WORD // unit):
            at = (dword * 4 + step) * (WORD // unit) + part
            inside = at < per_row
            mask = (1 << 8 * unit) - 1  # a narrow load may extend a sign
            loaded = fx.Int32(row[inside.select(at, 0)]) & mask
            value = value | (inside.select(loaded, ONES & mask) << (8 * unit * part))
        return value

    def publish(self) -> None:
        """Transpose and write to LDS."""
        cfg = self.cfg
        for (p, i), frag in self.frags.items():
            token, dword = filled(cfg, self.place.tid, p, i)
            frag.store(fx.Vector.from_elements(transposed(frag.load()), fx.Int32))
            target = self.lds.scales.ptr + (dword * cfg.scale_stride + token * 4)
            width = sharers(cfg)
            whole = cfg.scale_dwords % width == 0 and not cfg.tokens * width % THREADS
            live = True if whole else (token < cfg.tokens) & (dword < cfg.scale_dwords)
            write_piece(frag, target, live)


    def factors(self) -> list:
        """What a lane's sums of each group still lack: nothing, the MFMAs have applied it."""
        return []


class RowScales:
    """The float32 scales of the tile's tokens, ``(rows)`` in memory, into LDS and onto the sums."""

    def __init__(self, cfg: Gemm, place, lds, source: fx.Tensor):
        self.cfg, self.place, self.source = cfg, place, source
        self.table = fx.recast_iter(fx.Float32, lds.scales.ptr).view(fx.make_layout(cfg.tokens, 1))
        self.value: fx.Float32 = fx.Float32(1.0)

    def start(self, ids: Ids, rows) -> None:
        """Load a token's scale a thread."""
        self.value = fx.Float32(fx.get_iter(self.source)[fx.Int64(rows.row(ids.own))])

    def publish(self) -> None:
        """Write to LDS."""
        write_word(self.table, self.place.tid, self.value, self.place.tid < self.cfg.tokens)

    def factors(self) -> list[fx.Float32]:
        """What a lane's sums of each group still lack: the scale of its token."""
        groups = range(self.cfg.groups)
        return [fx.Float32(self.table[group * MFMA_ROWS + self.place.r]) for group in groups]


@flyc.jit
def write_word(table: fx.Tensor, at, value, live) -> None:
    """``table[at] = value`` of the threads that are live."""
    if live:
        table[at] = value


@flyc.jit
def write_piece(frag, target, live) -> None:
    """16 bytes of the threads that are live, to LDS."""
    piece = fx.make_copy_atom(fx.UniversalCopy128b(), fx.Int32)
    if live:
        fx.copy(piece, frag, target.view(fx.make_layout(4, 1)))


def perm(low, high, picks: int):
    """A word of the bytes that ``picks`` names: 0-3 of ``low``, 4-7 of ``high``."""
    return fx.Int32(fx.rocdl.perm_b32(high, low, picks))


def transposed(steps):
    """Words of four columns by step -> words of four steps by column, a byte each."""
    pairs = [[perm(steps[s], steps[s + 1], picks) for picks in (EVEN, ODD)] for s in (0, 2)]
    return [perm(pairs[0][c // 2], pairs[1][c // 2], (LOW, HIGH)[c % 2]) for c in range(4)]
