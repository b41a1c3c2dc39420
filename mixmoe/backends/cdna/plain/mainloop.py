"""The main loop without scaled MFMAs: weights through registers, tokens through two LDS stages.

As the scaled loop (``mixmoe.backends.cdna.mainloop``): a workgroup multiplies ``tokens`` sorted
routes of one expert by ``4 x blocks x 16`` weight rows of each half, the four waves split the
rows, and a tile of K is a row of phases, one for 16 tokens of one step.

Decoding. Tokens become operands on their way into LDS, once for the four waves; weights in a
wave's registers, once for all token groups of a step.

Scales along K. The sum of the steps that share a scale of each operand is kept apart and closed
onto the float32 total: ``total += sum * (weight scale of the row * token scale)``. Scales of whole
rows wait for the epilogue.

Tails as in the scaled loop: weights and tokens beyond K are zero codes, blocks beyond the last row
repeat it and are not stored, no load leaves its tensor.
"""

from dataclasses import dataclass
from functools import partial

import flydsl.compiler as flyc
import flydsl.expr as fx
from flydsl.expr import const_expr

from mixmoe.backends.cdna.atoms import MFMA_ROWS, PIECE, WORD
from mixmoe.backends.cdna.config import THREADS
from mixmoe.backends.cdna.plain.config import Gemm
from mixmoe.backends.cdna.plain.decode import scaled_bf16
from mixmoe.backends.cdna.plain.factors import RING, Factors, words_of
from mixmoe.backends.cdna.plain.place import Place
from mixmoe.backends.cdna.weights import of_expert

AHEAD = 2  # phases between a read of tokens and its use


@dataclass(frozen=True, slots=True)
class Sources:
    """Tensors a GEMM reads: codes and scales of the weights and of the tokens, as words (scales of
    the tokens as they are)."""

    codes: fx.Tensor
    scales: fx.Tensor
    tokens: fx.Tensor
    token_scales: fx.Tensor


def shared_storage(cfg: Gemm):
    """LDS: two stages of token codes, two of their scales."""
    if not cfg.tile_scales:
        return fx.Struct["codes" : fx.Array[fx.Int32, 2 * cfg.code_bytes // WORD, PIECE]]
    return fx.Struct[
        "codes" : fx.Array[fx.Int32, 2 * cfg.code_bytes // WORD, PIECE],
        "scales" : fx.Array[fx.Float32, 2 * cfg.tokens * cfg.tile_scales, PIECE],
    ]


def shared_codes(cfg: Gemm, lds) -> fx.Tensor:
    """Token codes in LDS: ``((words of a run, runs of a chunk), chunks, tokens, 2)``, swizzled."""
    runs = 4 // cfg.run_words
    plain = fx.make_ordered_layout(
        (cfg.run_words, runs, cfg.chunks, cfg.tokens, 2), (0, 1, 2, 3, 4)
    )
    swizzle = fx.static(fx.SwizzleType.get(*cfg.swizzle))
    return lds.codes.view(fx.make_composed_layout(swizzle, plain))


def shared_chunks(cfg: Gemm, lds) -> fx.Tensor:
    """The same by chunks: ``(4 words, chunks, tokens, 2)``."""
    plain = fx.make_ordered_layout((4, cfg.chunks, cfg.tokens, 2), (0, 1, 2, 3))
    swizzle = fx.static(fx.SwizzleType.get(*cfg.swizzle))
    return lds.codes.view(fx.make_composed_layout(swizzle, plain))


def fragment(words: list[fx.Int32]) -> fx.Tensor:
    """A fragment of these words."""
    frag = fx.make_rmem_tensor(len(words), fx.Int32)
    for i, word in enumerate(words):
        frag[i] = word
    return frag


class Loads:
    """Fragments of the main loop and the copies that fill them."""

    def __init__(self, cfg: Gemm, place: Place, sources: Sources, row_of, row_block, lds):
        self.cfg, self.place, self.sources, self.lds = cfg, place, sources, lds
        end = cfg.rows // MFMA_ROWS
        self.blocks = [fx.min(row_block + b, end - 1) for b in range(cfg.blocks)]
        self.codes = of_expert(sources.codes, place.expert, cfg.code_words, cfg.code_modes())
        self.shared, self.chunks = shared_codes(cfg, lds), shared_chunks(cfg, lds)
        self.keys = [(h, b) for h in range(cfg.halves) for b in range(cfg.blocks)]
        self.piece = fx.make_copy_atom(fx.rocdl.BufferCopy128b(), fx.Int32)
        self.chunk = fx.make_copy_atom(fx.UniversalCopy128b(), fx.Int32)
        self.run = fx.make_copy_atom(fx.UniversalCopy(32 * cfg.run_words), fx.Int32)
        self.moved = fx.make_copy_atom(fx.UniversalCopy(32 * cfg.chunk_words), fx.Int32)
        self.weights = [
            {key: fx.make_rmem_tensor(4 * cfg.weight_pieces, fx.Int32) for key in self.keys}
            for _ in range(2)
        ]
        self.ring = [
            fx.make_rmem_tensor(cfg.run_words * cfg.pieces, fx.Int32) for _ in range(RING)
        ]
        count = -(-cfg.tokens * cfg.chunks // THREADS)
        self.moving = [fx.make_rmem_tensor(cfg.chunk_words, fx.Int32) for _ in range(count)]
        self.rows = []
        for i in range(count):
            token, chunk = self.slot(i)
            row = fx.Int64(row_of(token)) * (cfg.row_chunks * cfg.chunk_words)
            self.rows.append((fx.get_iter(sources.tokens) + row, chunk))
        self.operands: dict = {}
        self.factors = Factors(self, row_of)

    def slot(self, i):
        """(token, chunk) of LDS that a thread moves in round i."""
        index = (self.place.tid + i * THREADS) % (self.cfg.tokens * self.cfg.chunks)
        return index // self.cfg.chunks, index % self.cfg.chunks

    def ring_slot(self, phase: int, stage: int) -> int:
        """Where the ring holds the tokens of a phase; phases of two tiles follow each other."""
        return (stage * self.cfg.steps * self.cfg.groups + phase) % RING

    def load_tokens(self, kt) -> None:
        """Start the tokens of K tile ``kt``, and their scales, towards registers."""
        for (row, chunk), frag in zip(self.rows, self.moving, strict=True):
            self._load_chunk(row, kt * self.cfg.chunks + chunk, frag)
        self.factors.load_tokens(kt)

    def _load_chunk(self, row, chunk, frag) -> None:
        cfg = self.cfg
        whole = cfg.k % cfg.tile_k == 0
        inside = chunk < cfg.row_chunks
        at = chunk if whole else inside.select(chunk, 0)
        source = (row + at * cfg.chunk_words).view(fx.make_layout(cfg.chunk_words, 1))
        fx.copy(self.moved, source, frag)
        if not whole:
            zeros = fx.Vector.filled(cfg.chunk_words, 0, fx.Int32)
            frag.store(inside.select(frag.load(), zeros))

    def weight_loads(self, kt, stage: int, steps: int):
        """Functions that start one load each: the scales, then the weights, of K tile ``kt``."""
        starts = self.factors.weight_loads(kt, stage, steps)
        for piece in range(self.cfg.pieces_of(steps)):
            starts += [partial(self._load_weight, kt, stage, key, piece) for key in self.keys]
        return starts

    def _load_weight(self, kt, stage: int, key, piece: int) -> None:
        half, block = key
        quarters = fx.logical_divide(self.weights[stage][key], fx.make_layout(4, 1))
        column = piece * 4 + self.place.g
        source = self.codes[(self.place.r, self.blocks[block], half), (None, column)]
        offset = kt * (self.cfg.weight_pieces * 4 * MFMA_ROWS * 4)
        fx.copy(self.piece, source, quarters[None, piece], soffset=offset)

    def publish(self, stage: int) -> None:
        """Decode the tokens that :meth:`load_tokens` fetched and write them to an LDS stage."""
        decode = self.cfg.token_decoder.words
        for i, frag in enumerate(self.moving):
            token, chunk = self.slot(i)
            chunk_frag = fragment(decode(words_of(frag, 0, self.cfg.chunk_words)))
            target = self.chunks[None, chunk, token, stage]
            if (i + 1) * THREADS <= self.cfg.tokens * self.cfg.chunks:
                fx.copy(self.chunk, chunk_frag, target)
            else:  # a tile of fewer chunks than threads
                used = self.place.tid + i * THREADS < self.cfg.tokens * self.cfg.chunks
                copy_if(used, self.chunk, chunk_frag, target)
        self.factors.publish(stage)

    def read_tokens(self, phase: int, stage: int) -> None:
        """The 16 tokens of a phase, from LDS into the ring."""
        cfg, place = self.cfg, self.place
        step, group = divmod(phase, cfg.groups)
        parts = fx.logical_divide(
            self.ring[self.ring_slot(phase, stage)], fx.make_layout(cfg.run_words, 1)
        )
        runs = 4 // cfg.run_words
        for p in range(cfg.pieces):
            at = (step * cfg.pieces + p) * 4 + place.g
            token = group * MFMA_ROWS + place.r
            source = self.shared[None, at % runs, at // runs, token, stage]
            fx.copy(self.run, source, parts[None, p])
        self.factors.read_token(phase, stage)

    def decode(self, stage: int, step: int) -> None:
        """Operands of every block for a step."""
        cfg = self.cfg
        for key in self.keys:
            stored = words_of(self.weights[stage][key], step * cfg.step_words, cfg.step_words)
            if cfg.folds:
                column = step * cfg.step_k // cfg.weight_period
                words = scaled_bf16(stored, self.factors.of_row(stage, key, column))
            else:
                words = cfg.weight_decoder.words(stored)
            self.operands[key] = split(cfg, words)

    def token_operands(self, phase: int, stage: int) -> list[fx.Tensor]:
        """Operands of a phase's tokens."""
        cfg, frag = self.cfg, self.ring[self.ring_slot(phase, stage)]
        return split(cfg, words_of(frag, 0, cfg.run_words * cfg.pieces))


def split(cfg: Gemm, words: list[fx.Int32]) -> list[fx.Tensor]:
    """A step's operands, one fragment for each MFMA."""
    n = cfg.mma_words
    return [fragment(words[i * n : (i + 1) * n]) for i in range(cfg.mmas)]


@flyc.jit
def copy_if(used, atom, source, target) -> None:
    """``fx.copy`` of some threads."""
    if used:
        fx.copy(atom, source, target)


class Sums:
    """Results of a wave: ``(half, block, group)`` -> four rows of one token."""

    def __init__(self, cfg: Gemm, keys):
        self.cfg = cfg
        all_keys = [(*key, group) for key in keys for group in range(cfg.groups)]
        kind = fx.Float32 if cfg.period else cfg.mma.sum
        self.total = {key: fx.make_rmem_tensor(4, kind) for key in all_keys}
        for frag in self.total.values():
            frag.fill(kind(0))
        self.open = self.total
        if cfg.period:
            self.open = {key: fx.make_rmem_tensor(4, cfg.mma.sum) for key in all_keys}

    def begin(self, step: int, key) -> None:
        """A sum that has a scale of its own starts from zero."""
        cfg = self.cfg
        if cfg.period and step * cfg.step_k % cfg.period == 0:
            self.open[key].fill(cfg.mma.sum(0))

    def close(self, factors: Factors, phase: int, stage: int, key) -> None:
        """Scale the sum of a period and add it to the total."""
        cfg, (half, block, _) = self.cfg, key
        scale = [fx.Float32(1.0)] * 4
        if cfg.weight_period and not cfg.folds:
            scale = factors.decoded[half, block]
        if cfg.token_period:
            of_token = factors.ring[factors.loads.ring_slot(phase, stage)].load()[0]
            scale = [s * of_token for s in scale] if cfg.weight_period else [of_token] * 4
        part = self.open[key].load().to(fx.Float32)
        with fx.fastmath("contract"):
            total = self.total[key].load() + part * fx.Vector.from_elements(scale)
        self.total[key].store(total)


def multiply(cfg: Gemm, loads: Loads, sums: Sums, phase: int, stage: int, last: bool) -> None:
    """The MFMAs of one phase: every row block times 16 tokens. ``last``: the tile ends here."""
    step, group = divmod(phase, cfg.groups)
    closes = cfg.period and (last or (step + 1) * cfg.step_k % cfg.period == 0)
    if group == 0:
        loads.decode(stage, step)
        if closes:
            loads.factors.decode(stage, step)
    tokens = loads.token_operands(phase, stage)
    for key in loads.keys:
        total = (*key, group)
        sums.begin(step, total)
        for weight, token in zip(loads.operands[key], tokens, strict=True):
            frag = sums.open[total]
            fx.gemm(cfg.mma.atom(cfg.mma_k), frag, weight, token, frag)
    if closes:
        for key in loads.keys:
            sums.close(loads.factors, phase, stage, (*key, group))


def hand_over(loads: Loads, stage: int) -> None:
    """Publish the tokens of the next tile and meet the other waves."""
    loads.publish(stage)
    fx.gpu.barrier()


def tile(cfg: Gemm, loads: Loads, sums: Sums, kt, steps: int, stage: int, next_steps: int) -> None:
    """The phases of K tile ``kt``; ``next_steps`` steps follow, none after the last tile."""
    phases, other = steps * cfg.groups, stage ^ 1
    starts = loads.weight_loads(kt + 1, other, next_steps) if next_steps else []
    share = -(-len(starts) // max(1, phases // 2))
    for phase in range(phases):
        if next_steps and phase == 0:
            loads.load_tokens(kt + 1)
        for start in starts[phase * share : (phase + 1) * share]:
            start()
        if next_steps and phase == phases - AHEAD:
            hand_over(loads, other)
        ahead = phase + AHEAD
        if ahead < phases:
            loads.read_tokens(ahead, stage)
        elif next_steps:
            loads.read_tokens(ahead - phases, other)
        multiply(cfg, loads, sums, phase, stage, phase // cfg.groups == steps - 1)
        fx.rocdl.sched_barrier(0)


@flyc.jit
def run(cfg: Gemm, loads: Loads, sums: Sums) -> None:
    """All K tiles."""
    last = cfg.k_tiles - 1
    # A shorter last tile is loaded by a tile of its own, after the loop.
    looped = last if cfg.last_steps == cfg.steps else max(0, last - 1)
    begin(cfg, loads, cfg.steps if last else cfg.last_steps)
    for pair in range(0, looped // 2, 1):
        kt = fx.Int32(pair) * 2
        tile(cfg, loads, sums, kt, cfg.steps, 0, cfg.steps)
        tile(cfg, loads, sums, kt + 1, cfg.steps, 1, cfg.steps)
    if const_expr(looped % 2 == 1):
        tile(cfg, loads, sums, looped - 1, cfg.steps, 0, cfg.steps)
    if const_expr(looped < last):
        tile(cfg, loads, sums, last - 1, cfg.steps, (last - 1) % 2, cfg.last_steps)
    tile(cfg, loads, sums, last, cfg.last_steps, last % 2, 0)
    hold(sums)


def begin(cfg: Gemm, loads: Loads, steps: int) -> None:
    """Tile 0 into place, its first phases read."""
    loads.load_tokens(0)
    for start in loads.weight_loads(0, 0, steps):
        start()
    hand_over(loads, 0)
    for phase in range(min(AHEAD, steps * cfg.groups)):
        loads.read_tokens(phase, 0)


SAME_LANE, ALL = 0xE4, 0xF  # quad_perm [0, 1, 2, 3], every row and bank


def hold(sums: Sums) -> None:
    """Finish the totals here. What only a branch of the epilogue uses is computed inside it: the
    compiler would keep the last tile's sums and scales until then, beyond the register file. It
    does not move an operation between lanes, not even this one from each lane to itself."""
    for frag in sums.total.values():
        values = frag.load()
        kind = values.dtype
        for i in range(4):
            bits = kind(values[i]).bitcast(fx.Int32).ir_value()
            held = fx.rocdl.update_dpp(fx.Int32.ir_type, bits, bits, SAME_LANE, ALL, ALL, True)
            frag[i] = fx.Int32(held).bitcast(kind)


def results(cfg: Gemm, sums: Sums, half: int, block: int, group: int, scales) -> fx.Vector:
    """Four rows of one token in float32. ``scales``: the rows' and the token's, or None."""
    of_rows, of_token = scales
    value = sums.total[half, block, group].load().to(fx.Float32)
    if cfg.factor != 1:
        value = value * fx.Float32(cfg.factor)
    if const_expr(of_token is not None):
        value = value * of_token
    return value if of_rows is None else value * of_rows


