"""Which rows and which sorted routes a workgroup multiplies, and where a thread stands in it."""

from dataclasses import dataclass

import flydsl.expr as fx

from mixmoe.backends.cdna.atoms import WAVE
from mixmoe.backends.cdna.mainloop import TOKEN_MASK
from mixmoe.backends.cdna.plain.config import Gemm


@dataclass(frozen=True, slots=True)
class Place:
    """Where a thread stands: wave, lane's row ``r`` of 16 and K group ``g`` of 4; the expert."""

    tid: fx.Int32
    wave: fx.Int32
    r: fx.Int32
    g: fx.Int32
    expert: fx.Int32


@dataclass(frozen=True, slots=True)
class Work:
    """Which rows and which sorted routes a workgroup multiplies, for which expert."""

    rows: fx.Int32  # in tiles
    routes: fx.Int32  # first sorted position
    expert: fx.Int32
    used: fx.Boolean


def work_of(cfg: Gemm, sorted_ids, expert_ids, tokens) -> Work:
    """The workgroup's tile. Row tiles count fastest: with round-robin dispatch over 8 XCDs an L2
    then holds every eighth row tile of an expert and reuses it for all of the expert's tokens."""
    index = fx.Int32(fx.block_idx.x)
    rows, block = index % cfg.row_tiles, index // cfg.row_tiles
    expert = fx.Int32(expert_ids[block // cfg.sort_tiles])
    first = block * cfg.tokens
    # Padding closes a sorted block: a tile that begins with it holds nothing else.
    used = (expert >= 0) & ((fx.Int32(sorted_ids[first]) & TOKEN_MASK) < tokens)
    return Work(rows, first, expert, used)


def stand(work: Work) -> Place:
    """The calling thread's place; the expert is made uniform, as addresses hang on it."""
    tid = fx.Int32(fx.thread_idx.x)
    wave = fx.Int32(fx.rocdl.readfirstlane(fx.Int32.ir_type, tid // WAVE))
    expert = fx.Int32(fx.rocdl.readfirstlane(fx.Int32.ir_type, work.expert))
    return Place(tid, wave, tid % 16, tid % WAVE // 16, expert)
