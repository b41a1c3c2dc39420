"""What a workgroup computes, of which launch."""

from dataclasses import dataclass
from typing import Any

import flydsl.expr as fx

from mixmoe.backends.cdna.arguments import Arguments, Routes
from mixmoe.backends.cdna.grid import Cut
from mixmoe.backends.cdna.tokens import TOKEN_MASK


@dataclass(frozen=True, slots=True)
class Work:
    """Which rows and which sorted routes a workgroup computes, for which expert and part of K."""

    rows: fx.Int32  # in tiles
    routes: fx.Int32  # first sorted position
    expert: fx.Int32
    used: fx.Boolean
    split: Any  # which of split_k


def work_of(cfg: Cut, number, routes: Routes) -> Work:
    """The work of a tile's number. Row tiles count fastest, but for a band's token tiles: with
    round-robin dispatch over 8 XCDs an L2 then holds every eighth row tile of an expert and reuses
    it for all of the expert's tokens."""
    split = 0
    if cfg.split_k > 1:
        split, number = number % cfg.split_k, number // cfg.split_k
    rows, block = cfg.walk.tile(number, cfg.row_tiles, fx.Uint32(routes.tiles), fx.min)
    expert = fx.Int32(routes.experts[fx.Int32(block // cfg.sort_tiles)])
    first = fx.Int32(block * cfg.tokens)
    opener = fx.Int32(routes.ids[first])
    fx.rocdl.sched_barrier(0)  # both are on their way before either is waited for
    # Padding closes a sorted block: a tile that begins with it holds nothing else.
    used = (expert >= 0) & ((opener & TOKEN_MASK) < routes.tokens)
    return Work(fx.Int32(rows), first, expert, used, fx.Int32(split))


def at_hand(args: Arguments) -> fx.Boolean:
    """True, as no tensor lies at address 0. A branch on it needs every address, so all come with
    one wait at the kernel's start; the compiler else sinks each load to where it is used first,
    and each then costs a wave two hundred cycles of its own."""
    of, together = args.sources, fx.Int64(0)
    for tensor in (of.codes, of.scales, of.tokens, of.token_scales, args.out):
        together = together | fx.Int64(fx.ptrtoint(fx.get_iter(tensor)))
    return together != 0


def tiles_of(cfg: Cut, token_tiles):
    """Pieces of work of a launch."""
    return token_tiles * (cfg.row_tiles * cfg.split_k)
