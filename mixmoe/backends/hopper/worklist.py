"""Work lists of the prefill kernels, made on the device from expert counts: no host knows them.

tiles     (room, 4) int32: expert, first sorted position, routes, one that is not written. An
          expert's routes are cut into tiles of MAIN, the last of which may be EXTRA larger, so that
          an expert with 270 routes makes one tile of 256 + 32 and not two. Beside them (2,) int32:
          how many there are, and a zero from which one kernel counts the items it has drawn. Those
          of stage 1 are sorted, largest first. Those of stage 2 (`others`) go by expert, whose
          weights then come from memory once (H200, 2026-11-28, T 8192: 437 us, 450 with the largest
          first).
segments  (CTAs, ROOM + 1, 4) int32: expert (-1 ends a list), first sorted block, blocks,
          routes (the last block is padded). What each CTA of `gemm2_ring` keeps in shared memory
          (`segments.py`).

Both follow from the counts alone, so a captured graph replays with any routing.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mixmoe.backends.hopper.launch import options, pow2, start_dependents
from mixmoe.backends.hopper.mainloop import (
    UNIT_COLUMNS,
    UNIT_SCALES,
    UNIT_WORDS,
    weight_descriptors,
)
from mixmoe.backends.hopper.segments import write_segments
from mixmoe.preshuffle import Packed
from mixmoe.spec import Routed

ROUTE_BLOCK = 32  # routes of one block of the sorted lists, and the unit of all work
# Programs that write tiles. One takes 29 us where an expert has most of the routes and so 60 tiles
# (H200, 2026-11-28, Kimi-K2 TP8, T 8192, Zipf).
TILERS = tl.constexpr(16)


@triton.jit
def by_size(whole, rest, MAIN: tl.constexpr, EXTRA: tl.constexpr, EP: tl.constexpr):
    """Ranks of each expert's first whole tile and of its last tile, and how many tiles there are;
    larger tiles first. A tile's rank is the number of larger ones plus the number of equal ones
    before it, counted per size, so nothing is compared pairwise."""
    larger = 0
    last = tl.zeros((EP,), tl.int32)
    first = tl.zeros((EP,), tl.int32)
    for smaller in tl.static_range(MAIN + EXTRA):
        size = MAIN + EXTRA - smaller
        mine = (rest == size).to(tl.int32)
        if size == MAIN:
            mine += whole
        before = larger + tl.cumsum(mine, 0) - mine
        if size == MAIN:
            first = before
            last = tl.where(rest == size, before + whole, last)
        else:
            last = tl.where(rest == size, before, last)
        larger += tl.sum(mine, 0)
    return first, last, larger


@triton.jit
def by_expert(whole, rest, MAIN: tl.constexpr, EXTRA: tl.constexpr, EP: tl.constexpr):
    """The same ranks, the tiles of an expert following one another: whole ones, then the last."""
    mine = whole + (rest > 0).to(tl.int32)
    first = tl.cumsum(mine, 0) - mine
    return first, first + whole, tl.sum(mine, 0)


@triton.jit
def write_tiles(
    routes, start, e, tiles_ptr, count_ptr, share, MAIN: tl.constexpr, EXTRA: tl.constexpr,
    EP: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """MAIN and EXTRA in blocks of 32; RANKS: `by_size` or `by_expert`. Share number 0 of TILERS has
    the last tile of each expert."""
    blocks = (routes + 31) // 32
    whole = tl.where(blocks > MAIN + EXTRA, (blocks - EXTRA - 1) // MAIN, 0)  # before the last
    most = tl.max(whole, 0)
    if (share == 0) | (share < most):
        rest = blocks - whole * MAIN
        first_whole, rank, count = RANKS(whole, rest, MAIN, EXTRA, EP)
        tl.store(count_ptr, count, mask=share == 0)
        tl.store(count_ptr + 1, 0, mask=share == 0)
        last = tiles_ptr + rank * 4
        has = (rest > 0) & (share == 0)
        tl.store(last, e, mask=has)
        tl.store(last + 1, start + whole * (MAIN * 32), mask=has)
        tl.store(last + 2, routes - whole * (MAIN * 32), mask=has)
        for j in range(share, most, TILERS):
            at = tiles_ptr + (first_whole + j) * 4
            tl.store(at, e, mask=j < whole)
            tl.store(at + 1, start + j * (MAIN * 32), mask=j < whole)
            tl.store(at + 2, tl.full((EP,), MAIN * 32, tl.int32), mask=j < whole)


@triton.jit
def clear_counters(counters_ptr, counters, worker, workers):
    """A worker's share of zeros."""
    for first in range(worker * 256, counters, workers * 256):
        c = first + tl.arange(0, 256)
        tl.store(counters_ptr + c, tl.zeros((256,), tl.int32), mask=c < counters)


@triton.jit(do_not_specialize=["counters", "E", "ctas"])
def list_work(
    counts_ptr, offsets_ptr, tiles_ptr, others_ptr, segments_ptr, counters_ptr, counters, E, ctas,
    MAIN: tl.constexpr, EXTRA: tl.constexpr, OTHER: tl.constexpr, ROOM: tl.constexpr,
    EP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The first TILERS programs: tiles of MAIN; the others, which are `ctas` or TILERS: segments,
    or tiles of OTHER, and zeroed counters. 0: none."""
    start_dependents(PDL)
    e = tl.arange(0, EP)
    routes = tl.load(counts_ptr + e, mask=e < E, other=0)
    start = tl.load(offsets_ptr + e, mask=e < E, other=0)
    worker = tl.program_id(0) - TILERS
    if worker < 0:
        if MAIN > 0:
            share = worker + TILERS
            write_tiles(
                routes, start, e, tiles_ptr + 4, tiles_ptr, share, MAIN, EXTRA, EP, by_size
            )
    else:
        clear_counters(counters_ptr, counters, worker, tl.num_programs(0) - TILERS)
        if OTHER > 0:
            write_tiles(
                routes, start, e, others_ptr + 4, others_ptr, worker, OTHER, 0, EP, by_expert
            )
        if ROOM > 0:
            write_segments(routes, start, e, worker, ctas, segments_ptr, ROOM)


@dataclass(frozen=True, slots=True, eq=False)
class Tiles:
    """Tiles: records, (how many, drawn) on the device, the bound on them, zeroed counters."""

    records: Tensor
    count: Tensor
    room: int
    counters: Tensor

    @classmethod
    def empty(cls, routed: Routed, main: int, counters: int = 0) -> "Tiles":
        """Room for as many tiles as any routing makes, and for counters beside them."""
        p = routed.problem
        room = min(p.experts, p.routes) + routed.sorted_token_ids.shape[0] // main
        ints = 4 * (room + 1)
        memory = torch.empty(ints + counters, dtype=torch.int32, device=routed.expert_counts.device)
        return cls(memory[4:ints].view(room, 4), memory[:4], room, memory[ints:])


@dataclass(frozen=True, slots=True)
class Split:
    """How segments are asked for: so many CTAs with room for so many blocks each, and beside them
    `counters` ints to zero."""

    ctas: int
    room: int
    counters: int


@dataclass(frozen=True, slots=True, eq=False)
class Segments:
    """Segments of `ctas * room` blocks at most, and zeroed counters."""

    records: Tensor
    counters: Tensor

    @classmethod
    def empty(cls, split: Split, device: torch.device) -> "Segments":
        """Memory for them."""
        records = torch.empty((split.ctas, split.room + 1, 4), dtype=torch.int32, device=device)
        return cls(records, torch.empty(split.counters, dtype=torch.int32, device=device))


@dataclass(frozen=True, slots=True, eq=False)
class Lists:
    """Tiles of both stages, or of one with the segments of the other."""

    tiles: Tiles | None
    others: Tiles | None
    segments: Segments | None


def work_lists(
    routed: Routed, main: int, extra: int, other: int = 0, split: Split | None = None,
    counters: int = 0,
) -> Lists:
    """One launch: tiles of `main` routes, the last of an expert up to `main + extra`; tiles of
    `other` routes, by expert, with `counters` zeros; segments. 0 and None leave a list out."""
    device, experts = routed.expert_counts.device, routed.problem.experts
    nothing = routed.expert_counts
    first = Tiles.empty(routed, main) if main else None
    second = Tiles.empty(routed, other, counters) if other else None
    segments = Segments.empty(split, device) if split else None
    workers, zeros = 0, nothing[:0]
    if segments:
        workers, zeros = segments.records.shape[0], segments.counters
    elif second:
        workers, zeros = TILERS.value, second.counters
    list_work[(TILERS.value + workers,)](
        routed.expert_counts, routed.expert_offsets,
        first.count if first else nothing, second.count if second else nothing,
        segments.records if segments else nothing, zeros, zeros.shape[0], experts,
        split.ctas if split else 0,
        MAIN=main // ROUTE_BLOCK, EXTRA=extra // ROUTE_BLOCK, OTHER=other // ROUTE_BLOCK,
        ROOM=split.room if split else 0, EP=pow2(experts), num_warps=1 if split else 8,
        **options(device),
    )  # fmt: skip
    return Lists(first, second, segments)


def tiles(routed: Routed, main: int, extra: int) -> Tiles:
    """Tiles of stage 1 alone."""
    made = work_lists(routed, main, extra).tiles
    assert made is not None
    return made


def tiles_by_expert(routed: Routed, main: int, counters: int = 0) -> Tiles:
    """Tiles of stage 2 alone."""
    made = work_lists(routed, 0, 0, main, None, counters).others
    assert made is not None
    return made


def segments(routed: Routed, split: Split) -> Segments:
    """Segments alone. They hold all routes if there are no more than ctas * room blocks."""
    made = work_lists(routed, 0, 0, 0, split).segments
    assert made is not None
    return made


def weight_boxes(
    packed: Packed, row_units: int, k_units: int
) -> tuple[TensorDescriptor, TensorDescriptor]:
    """TMA boxes of packed weights: words and scales."""
    assert packed.scales is not None
    units = -(-packed.shape[2] // UNIT_COLUMNS)
    words = packed.codes.view(-1, units, UNIT_WORDS)
    scales = packed.scales.view(torch.int32).view(-1, units * UNIT_SCALES // 4)
    return weight_descriptors(words, scales, row_units, k_units)
