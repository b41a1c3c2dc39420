"""The main loop of both GEMMs: weights from memory to registers, tokens through a ring in LDS.

A workgroup multiplies ``tokens`` sorted routes of one expert by ``4 x blocks x 16`` weight rows
of each half. The four waves split the rows; every wave reads all tokens from LDS.

A K tile is a row of phases, one for 16 tokens of one MFMA step. Loads are spread evenly over the
phases, so that the one path from L2 is asked at the pace at which it delivers: weights three (or
seven) steps ahead into registers, tokens as many K tiles ahead as LDS has stages. A phase reads the
tokens of the phase two on from LDS and issues its MFMAs; its instructions stay in it. Two phases
before the end the next tile's tokens are waited for and the one barrier of the tile is met, so that
the last phases already read ahead into it. All reads of a tile have then landed, and its stage may
be overwritten.

K tails: weights are packed with zero codes to a multiple of 128, and the last tile takes one MFMA
step where that is no multiple of 256; what stands for a token's codes beyond K is finite and its
scales are 2^0. Row tails: blocks beyond the last row repeat it and are not stored. No load leaves
its tensor.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import flydsl.compiler as flyc
import flydsl.expr as fx
from flydsl.expr import const_expr

from mixmoe.backends.cdna.arguments import Sources
from mixmoe.backends.cdna.atoms import MFMA_ROWS, WAVE
from mixmoe.backends.cdna.blocks import BlockScales
from mixmoe.backends.cdna.config import STEPS_OF_DWORD, TILE_K, Gemm
from mixmoe.backends.cdna.grid import Cut
from mixmoe.backends.cdna.origin import one_origin
from mixmoe.backends.cdna.tokens import (
    AHEAD,
    Ids,
    Places,
    Rows,
    RowScales,
    ScaleFill,
    Tokens,
)
from mixmoe.backends.cdna.weights import ChannelScales, Weights
from mixmoe.backends.cdna.work import Work


@dataclass(frozen=True, slots=True)
class Place:
    """Where a thread stands: wave, lane's row ``r`` of 16 and K group ``g`` of 4; the expert.

    ``part``: which of the workgroup's parts of K the wave multiplies; ``mate``: number among the
    threads that share it; ``first_tile``: K tile that the part begins with.
    """

    tid: fx.Int32
    wave: fx.Int32
    r: fx.Int32
    g: fx.Int32
    expert: fx.Int32
    part: Any
    mate: fx.Int32
    first_tile: Any


@dataclass(frozen=True, slots=True)
class Operands:
    """What the main loop multiplies: weights, tokens, and what brings the scales of tokens and of
    weight rows; where results go."""

    weights: Weights
    tokens: Tokens
    fill: ScaleFill | RowScales | BlockScales
    channels: ChannelScales
    places: Places

    @property
    def sums(self) -> BlockScales | None:
        """What closes the MFMAs' sums, where scales along K are none of theirs."""
        return self.fill if isinstance(self.fill, BlockScales) else None

    def read(self, kt, phase: int, slot: int) -> None:
        """What a phase of K tile ``kt`` needs of LDS."""
        self.tokens.read(kt, phase, slot)
        if self.sums is not None:
            self.sums.read(kt, phase, slot)


@one_origin
def make_accumulators(cfg: Gemm):
    """Zeroed results: (half, block, token group) -> 4 rows of one token."""
    acc = {}
    for half in range(cfg.halves):
        for block in range(cfg.blocks):
            for group in range(cfg.groups):
                acc[half, block, group] = fx.make_rmem_tensor(4, fx.Float32)
                acc[half, block, group].fill(0.0)
    return acc


def hints(cfg: Gemm) -> dict:
    """What the compiler is told: results in AGPRs where they would crowd the other registers."""
    return {"llvm_options": {"amdgpu-mfma-vgpr-form": False}} if cfg.crowded else {}


def multiplies(cfg: Gemm, ops: Operands, acc, at: "Step", group: int):
    """The MFMAs of one phase, each to be issued: every row block times 16 tokens."""
    return [partial(multiply, cfg, ops, acc, at, group, key) for key in ops.weights.fragments()]


def multiply(cfg: Gemm, ops: Operands, acc, at: "Step", group: int, key) -> None:
    """One MFMA: 16 rows times 16 tokens."""
    weights, tokens, (half, block) = ops.weights, ops.tokens, key
    slot = at.tile * cfg.steps + at.step
    bytes_of = (cfg.scale_byte(half, block, at.step), slot % STEPS_OF_DWORD)
    scales = {}
    if cfg.scaled:
        scales["scale_a"] = weights.scale(at.tile, half, block)
        scales["scale_b"] = tokens.scales[group].load()[0]
    phase, sums = slot * cfg.groups + group, ops.sums
    if sums is not None and key == (0, 0):
        sums.open(phase)
    into = acc[half, block, group] if sums is None else sums.begin(phase, key)
    fx.gemm(
        cfg.atoms.mma(cfg.weight, cfg.token, bytes_of),
        into,
        weights.codes[slot % cfg.ring][half, block],
        tokens.ring[phase % len(tokens.ring)],
        into,
        **scales,
    )
    if sums is not None:
        sums.close(acc, phase, key)


@dataclass(frozen=True, slots=True)
class Step:
    """A place in the unrolled loop: number of the K tile from the loop's start, MFMA step."""

    tile: int
    step: int


def spread(starts, slots: int):
    """Functions in order and evenly over ``slots``."""
    out: list[list] = [[] for _ in range(slots)]
    for i, start in enumerate(starts):
        out[i * slots // len(starts)].append(start)
    return out


def braid(rows):
    """Several rows of functions as one in which each is evenly spread."""
    places = [((i + 0.5) / len(row), k, i) for k, row in enumerate(rows) for i in range(len(row))]
    return [rows[k][i] for _, k, i in sorted(places)]


@dataclass(frozen=True, slots=True)
class Tile:
    """One K tile of the unrolled loop.

    ``kt`` is its number, ``tile`` that number modulo the unrolling; ``last`` the number of the
    last K tile where ``kt`` is known, None inside the loop, where everything ahead exists.
    """

    cfg: Gemm
    ops: Operands
    kt: Any  # int, or Int32 inside the loop
    tile: int
    last: int | None

    def exists(self, ahead: int, step: int = 0) -> bool:
        """Whether the tile ``ahead`` of this one has that MFMA step."""
        if self.last is None:
            return True
        kt = self.kt + ahead
        return kt <= self.last and step < self.cfg.steps_of(kt)

    @property
    def steps(self) -> int:
        """MFMA steps."""
        return self.cfg.steps if self.last is None else self.cfg.steps_of(self.kt)

    @property
    def phases(self) -> int:
        """Phases of the tile."""
        return self.steps * self.cfg.groups

    def loads(self, step: int):
        """Starts of the loads of a step, by MFMA."""
        cfg, weights = self.cfg, self.ops.weights
        ahead = cfg.ring // cfg.steps
        rows = []
        if step == 0 and self.exists(ahead - 1):
            rows.append(weights.scale_loads(self.kt + ahead - 1, self.tile + ahead - 1))
        tile, at = (ahead - 1, 1) if step == 0 else (ahead, 0)
        if self.exists(tile, at):
            rows.append(weights.loads(self.kt + tile, self.tile + tile, at))
        if self.exists(cfg.stages - 1):
            copies = self.ops.tokens.copies(self.kt + cfg.stages - 1)
            cut = len(copies) if cfg.stages == 2 else len(copies) // 2
            rows.append(copies[:cut] if step == 0 else copies[cut:])
        return spread(braid(rows), cfg.groups * len(weights.fragments()))

    def marks_step(self) -> int:
        """The step after which the copies of the tile are all started."""
        return 0 if self.cfg.stages == 2 else self.cfg.steps - 1

    def younger(self) -> int:
        """Tiles whose copies were started after those of the next tile, and closed by now."""
        cfg = self.cfg
        return sum(self.exists(ahead) for ahead in range(2, cfg.stages - 1))

    def hand_over(self) -> None:
        """Wait for the next tile's tokens and meet the other waves."""
        fx.rocdl.wait_asyncmark(self.younger())
        fx.gpu.barrier()

    def reads(self, phase: int):
        """(tiles ahead, phase) of the tokens to read in a phase: AHEAD phases on, the last of a
        tile one phase early so that it has landed when the barrier is met."""
        last = self.phases - 1
        if phase + AHEAD == last - 1 and phase >= 0:
            return [(0, last - 1), (0, last)]
        if phase + AHEAD <= last:
            return [(0, phase + AHEAD)] if phase + AHEAD < last else []
        following = phase + AHEAD - self.phases
        if not self.exists(1) or (self.last is not None
                                  and following >= cfg_phases(self.cfg, self.kt + 1)):
            return []
        return [(1, following)]

    def run(self, acc) -> None:
        """All phases."""
        barrier = max(0, self.phases - AHEAD)
        for step in range(self.steps):
            loads = self.loads(step)
            for group in range(self.cfg.groups):
                phase = step * self.cfg.groups + group
                if phase == barrier and self.exists(1):
                    self.hand_over()
                mfmas = multiplies(self.cfg, self.ops, acc, Step(self.tile, step), group)
                mine = loads[group * len(mfmas) : (group + 1) * len(mfmas)]
                mine[0] = self.token_reads(phase) + mine[0]
                mine[-1] = mine[-1] + self.scale_reads(phase)
                for mfma, starts in zip(mfmas, mine, strict=True):
                    start_all([mfma, *starts])
            if step == self.marks_step() and self.exists(self.cfg.stages - 1):
                fx.rocdl.asyncmark()

    def token_reads(self, phase: int):
        """The reads of a phase."""
        per_tile = self.cfg.steps * self.cfg.groups
        return [
            partial(self.ops.read, self.kt + ahead, at, (self.tile + ahead) * per_tile + at)
            for ahead, at in self.reads(phase)
        ]

    def scale_reads(self, phase: int):
        """The next dword of a group's scales, once its last byte was used; those of the phases
        around the barrier after it, which waits for all reads."""
        cfg, last = self.cfg, self.phases - 1
        closes = (self.tile + 1) * cfg.steps % STEPS_OF_DWORD == 0
        if not cfg.token.block or not closes or not self.exists(1):
            return []
        groups = range(cfg.groups)
        first = self.phases - cfg.groups  # phase of group 0 in the last step
        late = self.phases - AHEAD - 2
        due = [g for g in groups if max(first + g, last - 1 if first + g >= late else 0) == phase]
        dword = (self.kt + 1) // (STEPS_OF_DWORD // cfg.steps)
        return [partial(self.ops.tokens.read_scale, dword, group) for group in due]


def cfg_phases(cfg: Gemm, kt: int) -> int:
    """Phases of a K tile."""
    return cfg.steps_of(kt) * cfg.groups


def trips(cfg: Gemm, unrolled: int) -> int:
    """How often the loop of ``unrolled`` tiles runs: while all that it loads ahead exists, and is
    a whole tile."""
    ahead = max(cfg.ring // cfg.steps, cfg.stages - 1)
    whole = cfg.k // TILE_K if cfg.parts == 1 else cfg.part_tiles
    return max(0, (whole - ahead) // unrolled)


@flyc.jit
def run(cfg: Gemm, ops: Operands, rows: Rows, ids: Ids, acc) -> None:
    """All K tiles."""
    begin(cfg, ops, rows, ids)
    unrolled = max(cfg.ring, STEPS_OF_DWORD) // cfg.steps
    looped = trips(cfg, unrolled)
    peeled = int(cfg.peels and looped > 1)
    for tile in fx.range_constexpr(peeled * unrolled):
        Tile(cfg, ops, tile, tile, None).run(acc)
    if const_expr(looped > peeled):
        # FlyDSL reads the range.
        for i in range(peeled, looped, 1, unroll=1):  # type: ignore[call-overload]
            for tile in fx.range_constexpr(unrolled):
                Tile(cfg, ops, fx.Int32(i) * unrolled + tile, tile, None).run(acc)
    for tile in fx.range_constexpr(cfg.part_tiles - looped * unrolled):
        kt = looped * unrolled + tile
        Tile(cfg, ops, kt, tile, cfg.part_tiles - 1).run(acc)
    close_last(cfg, ops, acc, cfg.part_tiles - 1, cfg.part_tiles - 1 - looped * unrolled)


@one_origin
def close_last(cfg: Gemm, ops: Operands, acc, kt: int, tile: int) -> None:
    """The sums of the last phase of the last K tile."""
    sums, phase = ops.sums, (tile * cfg.steps + cfg.steps_of(kt)) * cfg.groups
    if sums is not None:
        sums.open(phase)
        for key in ops.weights.fragments():
            sums.close(acc, phase, key)


@dataclass(frozen=True, slots=True)
class Sums:
    """Results of a piece of work: accumulators, and what those of each group of tokens and of each
    block of weight rows still lack. It is applied where a result is used: accumulators may lie
    where only the MFMA reads and writes. ``places``: the rows that they go to."""

    acc: dict
    factors: list
    channels: dict
    places: Places

    def of(self, half: int, block: int, group: int) -> fx.Vector:
        """Four rows of a lane's token."""
        value = self.acc[half, block, group].load()
        value = value * self.factors[group] if self.factors else value
        return value * self.channels[half, block] if self.channels else value


def multiply_all(cfg: Gemm, place: Place, lds, sources: Sources, rows: Rows, ids: Ids,
                 first) -> Sums:
    """The results of a piece of work; with K shared out those of part 0 hold the sum. ``first``:
    the wave's first block."""
    ops = Operands(
        Weights(cfg, place, sources.codes, sources.scales, first),
        Tokens(cfg, place, lds, sources.tokens),
        scales_of(cfg, place, lds, sources, first),
        ChannelScales(cfg, place, lds, sources.scales, first),
        Places(cfg, lds),
    )
    acc = make_accumulators(cfg)
    run(cfg, ops, rows, ids, acc)
    gather(cfg, place, lds, acc)
    return Sums(acc, ops.fill.factors(), ops.channels.factors(), ops.places)


def scales_of(cfg: Gemm, place, lds, sources: Sources, first):
    """Whichever the tokens have."""
    if cfg.period:
        return BlockScales(cfg, place, lds, sources.token_scales, sources.scales, first)
    return (ScaleFill if cfg.token.block else RowScales)(cfg, place, lds, sources.token_scales)


@one_origin
def begin(cfg: Gemm, ops: Operands, rows: Rows, ids: Ids) -> None:
    """The rings filled, tile 0 in place, its first phases read. The first step's weights need no
    token's id: they are asked for while the ids are on their way. Then what the first MFMA waits
    for, then all that lies further ahead."""
    weights, filled = first_weights(cfg, ops.weights), min(cfg.stages - 1, cfg.part_tiles)
    fx.rocdl.sched_barrier(0)
    start_all(weights[0])
    ops.tokens.find(ids, rows)
    ops.fill.start(ids, rows)
    ops.channels.start()
    fx.rocdl.sched_barrier(0)
    for kt in range(filled):
        start_all(ops.tokens.copies(kt))
        fx.rocdl.asyncmark()
        fx.rocdl.sched_barrier(0)
        start_all([start for step in weights[1:] for start in step] if kt == 0 else [])
    ops.places.publish(ids, rows)
    ops.fill.publish()
    ops.channels.publish()
    fx.rocdl.wait_asyncmark(filled - 1)
    fx.gpu.barrier()
    for group in range(cfg.groups):
        ops.tokens.read_scale(0, group)
    for phase in range(min(AHEAD, cfg_phases(cfg, 0))):
        ops.read(0, phase, phase)


def first_weights(cfg: Gemm, weights: Weights) -> list[list]:
    """Starts of what the ring holds before the first step, by step."""
    last, out = cfg.ring // cfg.steps - 1, []
    for kt in range(min(last + 1, cfg.part_tiles)):
        for step in range(cfg.steps_of(kt) if kt < last else 1):
            scales = weights.scale_loads(kt, kt) if step == 0 and kt < last else []
            out.append(scales + weights.loads(kt, kt, step))
    return out


@one_origin
def start_all(starts) -> None:
    """Start loads and MFMAs, in order: the scheduler leaves them where they are."""
    for start in starts:
        start()
    fx.rocdl.sched_barrier(0)


def shared_sums(cfg: Cut, place: Place, lds, fragments: int):
    """LDS in the place of the codes: a lane's sums, ``(4, fragments, other parts)``."""
    shape = (4, WAVE, cfg.team, fragments, cfg.k_waves - 1)
    order = fx.make_ordered_layout(shape, (0, 1, 2, 3, 4))
    shared = fx.recast_iter(fx.Float32, lds.codes.ptr).view(order)
    return shared[None, place.tid % WAVE, place.wave % cfg.team, None, None]


def write_sums(cfg: Cut, place: Place, lds, acc) -> None:
    """The sums of a part other than the first."""
    shared = shared_sums(cfg, place, lds, len(acc))
    piece = fx.make_copy_atom(fx.UniversalCopy128b(), fx.Float32)
    for i, frag in enumerate(acc.values()):
        fx.copy(piece, frag, shared[None, i, place.part - 1])


def add_sums(cfg: Cut, place: Place, lds, acc) -> None:
    """Those of the others, in order, to the first part's."""
    shared = shared_sums(cfg, place, lds, len(acc))
    piece = fx.make_copy_atom(fx.UniversalCopy128b(), fx.Float32)
    more = fx.make_rmem_tensor(4, fx.Float32)
    for i, frag in enumerate(acc.values()):
        for part in range(1, cfg.k_waves):
            fx.copy(piece, shared[None, i, part - 1], more)
            frag.store(frag.load() + more.load())


@flyc.jit
def gather(cfg: Cut, place: Place, lds, acc) -> None:
    """Sums of the waves that share K, in the order of the parts, into those of part 0."""
    if const_expr(cfg.k_waves > 1):
        fx.gpu.barrier()
        if place.part > 0:
            write_sums(cfg, place, lds, acc)
        fx.gpu.barrier()
        if place.part == 0:
            add_sums(cfg, place, lds, acc)


def stand(cfg: Cut, work: Work) -> Place:
    """The calling thread's place; what addresses hang on is made uniform."""
    tid = fx.Int32(fx.thread_idx.x)
    wave, expert = uniform(tid // WAVE), uniform(work.expert)
    part = wave // cfg.team if cfg.k_waves > 1 else 0
    first = 0
    if cfg.parts > 1:
        first = (work.split * cfg.k_waves + part) * cfg.part_tiles
    mate = tid % (cfg.team * WAVE)
    return Place(tid, wave, tid % 16, tid % WAVE // 16, expert, part, mate, first)


def uniform(value) -> fx.Int32:
    """A value that all lanes share, as a scalar."""
    return fx.Int32(fx.rocdl.readfirstlane(fx.Int32.ir_type, value))


def first_block(cfg: Cut, place: Place, work: Work):
    """The wave's first 16-row block of each half."""
    return (work.rows * cfg.team + place.wave % cfg.team) * cfg.blocks


def inside(cfg: Gemm, column):
    """Whether a column is one of the weights': of course, where they fill every tile."""
    return True if cfg.rows % cfg.tile_rows == 0 else column < cfg.rows


def held(cfg: Gemm, column):
    """A 16-column block that exists: beyond the last it is the last, see :class:`Weights`."""
    return column if inside(cfg, column) is True else fx.min(column, cfg.rows - MFMA_ROWS)


def of_groups(cfg: Cut, work: Work, place: Place, column: fx.Tensor):
    """A lane's item of every group of tokens: all loaded before any store, which might alias."""
    return [column[work.routes + group * MFMA_ROWS + place.r] for group in range(cfg.groups)]


def row_bias(bias: fx.Tensor, offset) -> fx.Vector:
    """Four consecutive float32 from ``offset``."""
    frag = fx.make_rmem_tensor(4, fx.Float32)
    source = fx.get_iter(bias) + offset
    quad = fx.make_copy_atom(fx.UniversalCopy128b(), fx.Float32)
    fx.copy(quad, source.view(fx.make_layout(4, 1)), frag)
    return frag.load()
