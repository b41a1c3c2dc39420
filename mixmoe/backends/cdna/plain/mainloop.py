"""The main loop without scaled MFMAs: weights through registers, tokens through two LDS stages.

As the scaled loop (``mixmoe.backends.cdna.mainloop``): a workgroup multiplies ``tokens`` sorted
routes of one expert by ``4 x blocks x 16`` weight rows of each half (``k_waves`` of its waves may
share K instead), and every wave reads all tokens of its part of K from LDS.

Order. A K tile is a row of units, the steps that share a sum; a unit is multiplied 16 tokens after
16, each a phase. So sums that are scaled along K live for a phase: while the next one is multiplied
they are closed onto the float32 total, ``total += sum * (weight scale of the row * token scale)``.
Scales of whole rows wait for the epilogue. All that is not an MFMA is spread between MFMAs: loads
of the tile ahead, operands of the unit ahead, tokens on their way through LDS.

Tails as in the scaled loop: weights and tokens beyond K are zero codes, blocks beyond the last row
repeat it and are not stored, no load leaves its tensor.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import flydsl.compiler as flyc
import flydsl.expr as fx
from flydsl.expr import const_expr

from mixmoe.backends.cdna import mainloop as scaled
from mixmoe.backends.cdna.arguments import Sources
from mixmoe.backends.cdna.mainloop import spread, start_all
from mixmoe.backends.cdna.origin import one_origin
from mixmoe.backends.cdna.plain.config import FRAGMENTS, Gemm
from mixmoe.backends.cdna.plain.factors import TokenFactors, WeightFactors
from mixmoe.backends.cdna.plain.tokens import Tokens
from mixmoe.backends.cdna.plain.weights import Weights

# An int32 sum that begins here is, as float32 bits, 1.5 * 2^23 plus the sum, while the sum has
# fewer than 23 bits: a subtraction makes it a float32, which two of a packed instruction do.
MAGIC = 0x4B400000
MAGIC_FLOAT = 12582912.0


class Operands:
    """What the main loop multiplies."""

    def __init__(self, cfg: Gemm, place, lds, sources: Sources, rows, first_block):
        self.factors = WeightFactors(cfg, place, sources.scales, first_block)
        self.weights = Weights(cfg, place, sources.codes, self.factors, first_block)
        self.tokens = Tokens(cfg, place, lds, sources.tokens, rows)
        self.token_factors = TokenFactors(cfg, place, lds, sources.token_scales, rows)

    def decodes(self, slot: int, unit: int, steps: int):
        """What makes operands and factors of a unit of stored weights."""
        return [*self.weights.decodes(slot, unit, steps), *self.factors.decodes(slot, unit)]

    def token_loads(self, kt):
        """Loads of codes and scales of the tokens of K tile ``kt``."""
        return [*self.tokens.loads(kt), *self.token_factors.loads(kt)]

    def token_writes(self, kt):
        """Writes of them to their LDS stage."""
        return [*self.tokens.writes(kt), *self.token_factors.writes(kt)]

    def read(self, kt, unit: int, group: int, slot: int) -> None:
        """Tokens of a phase, from LDS."""
        self.tokens.read(kt, unit, group, slot)
        self.token_factors.read(kt, unit, group, slot)


class Sums:
    """Results of a wave: ``(half, block, group)`` -> four rows of one token."""

    def __init__(self, cfg: Gemm, keys):
        self.cfg, self.keys = cfg, keys
        kind = fx.Float32 if cfg.period else cfg.mma.sum
        self.total = {
            (*key, group): fx.make_rmem_tensor(4, kind)
            for key in keys
            for group in range(cfg.groups)
        }
        for frag in self.total.values():
            frag.fill(kind(0))
        # Two phases: one is closed while the next is multiplied.
        open_sums = ((key, turn) for key in keys for turn in range(2 if cfg.period else 0))
        self.open = {key: fx.make_rmem_tensor(4, cfg.mma.sum) for key in open_sums}

    def of(self, key, group: int, turn: int) -> fx.Tensor:
        """What the MFMAs of a phase add to."""
        return self.open[key, turn] if self.cfg.period else self.total[(*key, group)]

    def begin(self, key, turn: int) -> None:
        """A sum that has a scale of its own starts from zero."""
        if self.cfg.period:
            kind = self.cfg.mma.sum
            self.open[key, turn].fill(kind(MAGIC if kind is fx.Int32 else 0))

    def close(self, ops: Operands, key, phase: "Phase") -> None:
        """Scale the sum of a phase and add it to the total."""
        cfg = self.cfg
        scale: Any = None
        if cfg.token_period:
            scale = fx.Float32(ops.token_factors.ring[phase.slot].load()[0])
        if ops.factors.decoded:
            of_rows = ops.factors.of_unit(key, phase.unit)
            scale = of_rows if scale is None else of_rows * scale
        part = self.open[key, phase.turn].load()
        if cfg.mma.sum is fx.Int32:
            part = part.bitcast(fx.Float32) - fx.Float32(MAGIC_FLOAT)
        total = self.total[(*key, phase.group)]
        with fx.fastmath("contract"):
            total.store(total.load() + part * scale)


@dataclass(frozen=True, slots=True)
class Phase:
    """16 tokens of a unit of a tile: ``number`` in the tile, ``slot`` of their fragments."""

    cfg: Gemm
    number: int
    slot: int

    @property
    def unit(self) -> int:
        """Number of the unit."""
        return self.number // self.cfg.groups

    @property
    def group(self) -> int:
        """Number of the 16 tokens."""
        return self.number % self.cfg.groups

    @property
    def turn(self) -> int:
        """Which of the two open sums."""
        return self.number % 2


@dataclass(frozen=True, slots=True)
class Tile:
    """One K tile of the unrolled loop: ``kt`` is its number, ``slot`` that modulo the ring of
    weights; ``last`` the number of the last K tile where ``kt`` is known, None inside the loop,
    where everything ahead exists."""

    cfg: Gemm
    ops: Operands
    sums: Sums
    kt: Any  # int, or Int32 inside the loop
    slot: int
    last: int | None

    def steps_of(self, ahead: int) -> int:
        """Steps of the tile so many on; 0 where there is none."""
        return self.cfg.steps if self.last is None else self.cfg.steps_of(self.kt + ahead)

    @property
    def phases(self) -> int:
        """Phases of the tile."""
        return self.cfg.units_of(self.steps_of(0)) * self.cfg.groups

    def phase(self, number: int, ahead: int = 0) -> Phase:
        """A phase of the tile, or of one ahead. Fragments are taken in turn: those of a whole tile
        come out even."""
        cfg = self.cfg
        slot = ((self.slot + ahead) % cfg.ring * cfg.phases + number) % FRAGMENTS
        return Phase(cfg, number, slot)

    def run(self) -> None:
        """All phases."""
        for unit in range(self.cfg.units_of(self.steps_of(0))):
            self.run_unit(unit)
        if self.cfg.period:  # the last phase's sums
            for close in self.closes(self.phases):
                close()

    def run_unit(self, unit: int) -> None:
        """The MFMAs of a unit, each followed by its share of all else."""
        cfg = self.cfg
        first = unit * cfg.groups
        phases = [self.phase(first + group) for group in range(cfg.groups)]
        mfmas = [self.multiplies(phase) for phase in phases]
        size = len(mfmas[0])
        loads, decodes = self.weight_loads(unit), self.decodes(unit)
        count = size * cfg.groups
        sides = spread(decodes, count)
        early = max(1, int(cfg.load_share(cfg.ring) * count))
        for place, starts in enumerate(spread(loads, early)):
            sides[place] = [*starts, *sides[place]]
        for group, phase in enumerate(phases):
            own = spread(self.closes(phase.number), size)
            moves = spread(self.moves(phase.number), size)
            if phase.number == self.barrier and self.steps_of(1):
                meet()
            for i, mfma in enumerate(mfmas[group]):
                here = self.reads(phase.number) if i == 0 else []
                start_all([mfma, *here, *moves[i], *own[i], *sides[group * size + i]])

    def weight_loads(self, unit: int):
        """Loads into what is free in a unit: what belonged to it and is decoded, or to the unit
        before."""
        cfg, ops = self.cfg, self.ops
        args = (self.kt + cfg.ring, self.slot, self.steps_of(cfg.ring))
        factors = ops.factors.loads(*args, unit)
        if not cfg.keeps:
            return factors + ops.weights.loads(*args, unit)
        if unit == 0:
            before = (self.slot - 1) % cfg.ring
            args = (self.kt + cfg.ring - 1, before, self.steps_of(cfg.ring - 1))
            unit = cfg.units_of(cfg.steps)
        return factors + ops.weights.loads(*args, unit - 1)

    @property
    def barrier(self) -> int:
        """The phase before which all waves meet: its reads are the next tile's first."""
        return self.phases - self.cfg.ahead

    def multiplies(self, phase: Phase):
        """The MFMAs of a phase, each to be issued. Those of one sum do not follow each other."""
        cfg = self.cfg
        first = phase.unit * cfg.unit
        steps = range(first, min(first + cfg.unit, self.steps_of(0)))
        return [
            partial(self._multiply, phase, step, mma, key)
            for step in steps
            for mma in range(cfg.mmas)
            for key in self.sums.keys
        ]

    def _multiply(self, phase: Phase, step: int, mma: int, key) -> None:
        cfg, inside = self.cfg, step - phase.unit * self.cfg.unit
        if inside == 0 and mma == 0:
            self.sums.begin(key, phase.turn)
        frag = self.sums.of(key, phase.group, phase.turn)
        weight = self.ops.weights.operand(self.slot, key, step, mma)
        token = self.ops.tokens.operand(phase.slot, inside, mma)
        fx.gemm(cfg.mma.atom(cfg.mma_k), frag, weight, token, frag)

    def closes(self, number: int):
        """Functions that close the sums of the phase before."""
        if not self.cfg.period or number == 0:
            return []
        phase = self.phase(number - 1)
        return [partial(self.sums.close, self.ops, key, phase) for key in self.sums.keys]

    def decodes(self, unit: int):
        """Operands of the unit after this one, which may be the next tile's first."""
        steps, following = self.steps_of(0), unit + 1
        slot = self.slot
        if following == self.cfg.units_of(steps):
            steps, following, slot = self.steps_of(1), 0, (slot + 1) % self.cfg.ring
        return self.ops.decodes(slot, following, steps) if steps else []

    def moves(self, number: int):
        """Tokens of the next tile: writes to LDS before the barrier. Where a tile takes little
        more than a load they come early, and the tile after it is loaded behind them; else loads
        come first."""
        if not self.steps_of(1):
            return []
        ops, early = self.ops, self.cfg.ring > 1
        first = 0 if early else max(0, min(self.phases * 5 // 8, self.barrier - 1))
        mine = []
        if first <= number < self.barrier:
            pairs = [[write] for write in ops.token_writes(self.kt + 1)]
            if early and self.steps_of(2):
                for pair, load in zip(pairs, ops.token_loads(self.kt + 2), strict=True):
                    pair.append(load)
            mine = spread(pairs, self.barrier - first)[number - first]
        loads = ops.token_loads(self.kt + 1) if not early and number == 0 else []
        return loads + [start for pair in mine for start in pair]

    def reads(self, number: int):
        """The tokens of a later phase, if there is one."""
        later = number + self.cfg.ahead
        if later < self.phases:
            kt, phase = self.kt, self.phase(later)
        else:
            kt, phase = self.kt + 1, self.phase(later - self.phases, 1)
            if phase.number >= self.cfg.units_of(self.steps_of(1)) * self.cfg.groups:
                return []
        return [partial(self.ops.read, kt, phase.unit, phase.group, phase.slot)]


def trips(cfg: Gemm) -> int:
    """How often the loop of ``ring`` tiles runs: while all that it loads ahead exists, and is a
    whole tile."""
    whole = cfg.k // cfg.tile_k if cfg.parts == 1 else cfg.part_tiles
    return max(0, (whole - cfg.ring) // cfg.ring)


@flyc.jit
def run(cfg: Gemm, ops: Operands, sums: Sums) -> None:
    """All K tiles."""
    begin(cfg, ops)
    looped = trips(cfg)
    if const_expr(looped > 0):
        for i in range(0, looped, 1, unroll=1):  # type: ignore[call-overload]  # FlyDSL reads it
            for slot in fx.range_constexpr(cfg.ring):
                Tile(cfg, ops, sums, fx.Int32(i) * cfg.ring + slot, slot, None).run()
    for kt in fx.range_constexpr(looped * cfg.ring, cfg.part_tiles):
        Tile(cfg, ops, sums, kt, kt % cfg.ring, cfg.part_tiles - 1).run()


@one_origin
def begin(cfg: Gemm, ops: Operands) -> None:
    """The ring filled, tile 0 in place, its first unit decoded, its first phases read. Weights
    need no token's id: they are asked for while the ids are on their way."""
    fx.rocdl.sched_barrier(0)
    last = cfg.units_of(cfg.steps) - 1
    for kt in range(min(cfg.ring, cfg.part_tiles)):
        starts = ops.factors.loads(kt, kt, cfg.steps_of(kt))
        for unit in range(last if cfg.keeps and kt == cfg.ring - 1 else last + 1):
            starts += ops.weights.loads(kt, kt, cfg.steps_of(kt), unit)
        for start in starts:
            start()
    fx.rocdl.sched_barrier(0)
    ops.tokens.find()
    ops.token_factors.find()
    for start in ops.token_loads(0):
        start()
    fx.rocdl.sched_barrier(0)
    for write in ops.token_writes(0):
        write()
    if cfg.ring > 1 and cfg.part_tiles > 1:
        for start in ops.token_loads(1):
            start()
    fx.gpu.barrier()
    for number in range(min(cfg.ahead, cfg.units_of(cfg.steps_of(0)) * cfg.groups)):
        unit, group = divmod(number, cfg.groups)
        ops.read(0, unit, group, number)
    for decode in ops.decodes(0, 0, cfg.steps_of(0)):
        decode()


def meet() -> None:
    """All waves: what they wrote to LDS is there, what they read has arrived."""
    fx.gpu.barrier()


SAME_LANE, ALL = 0xE4, 0xF  # quad_perm [0, 1, 2, 3], every row and bank


@one_origin
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


def multiply_all(cfg: Gemm, place, lds, sources: Sources, rows, first_block) -> dict:
    """The float32 sums of a piece of work; with K shared out those of part 0 hold them all."""
    ops = Operands(cfg, place, lds, sources, rows, first_block)
    sums = Sums(cfg, ops.weights.keys)
    run(cfg, ops, sums)
    hold(sums)
    if cfg.k_waves == 1:
        return sums.total
    totals = {key: fx.make_rmem_tensor(4, fx.Float32) for key in sums.total}
    for key, frag in sums.total.items():
        totals[key].store(frag.load().to(fx.Float32))
    scaled.gather(cfg, place, lds, totals)
    return totals


def results(cfg: Gemm, totals: dict, half: int, block: int, group: int, scales) -> fx.Vector:
    """Four rows of one token in float32. ``scales``: the rows' and the token's, or None."""
    of_rows, of_token = scales
    value = totals[half, block, group].load().to(fx.Float32)
    if cfg.factor != 1:
        value = value * fx.Float32(cfg.factor)
    if const_expr(of_token is not None):
        value = value * of_token
    return value if of_rows is None else value * of_rows
