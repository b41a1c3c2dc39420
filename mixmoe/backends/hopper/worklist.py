"""Work lists of the prefill kernels, made on the device from expert counts: no host knows them.

tiles     (room, 4) int32, largest first: expert, first sorted position, routes, 0. An expert's
          routes are cut into tiles of MAIN, the last of which may be EXTRA larger, so that an
          expert with 270 routes makes one tile of 256 + 32 and not two.
segments  (CTAs, ROOM + 1, 4) int32: expert (-1 ends a list), first sorted block, blocks, 0. What
          each CTA of `gemm2_ring` keeps in shared memory: whole experts where there are CTAs
          enough, else equal cuts of the line of all blocks.

Both follow from the counts alone, so a captured graph replays with any routing.
"""

from dataclasses import dataclass
from typing import Any

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
from mixmoe.preshuffle import Packed
from mixmoe.spec import Problem, Routed

EXTRA = 32  # routes that the last tile of an expert may have beyond the others
ROUTE_BLOCK = 32  # routes of one block of the sorted lists, and the unit of all work
PER_PROGRAM = 16  # CTAs whose segments one program writes


@triton.jit
def list_tiles(
    counts_ptr, offsets_ptr, tiles_ptr, count_ptr, E, MAIN: tl.constexpr, EXTRA: tl.constexpr,
    EP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program. MAIN and EXTRA in blocks of 32. A tile's rank is the number of larger tiles
    plus the number of equal ones before it, counted per size, so nothing is compared pairwise.
    """
    start_dependents(PDL)
    e = tl.arange(0, EP)
    routes = tl.load(counts_ptr + e, mask=e < E, other=0)
    start = tl.load(offsets_ptr + e, mask=e < E, other=0)
    blocks = (routes + 31) // 32
    whole = tl.where(blocks > MAIN + EXTRA, (blocks - EXTRA - 1) // MAIN, 0)  # before the last
    rest = blocks - whole * MAIN
    larger = 0
    rank = tl.zeros((EP,), tl.int32)  # of the last tile
    first_whole = tl.zeros((EP,), tl.int32)
    for smaller in tl.static_range(MAIN + EXTRA):
        size = MAIN + EXTRA - smaller
        mine = (rest == size).to(tl.int32)
        if size == MAIN:
            mine += whole
        before = larger + tl.cumsum(mine, 0) - mine
        if size == MAIN:
            first_whole = before
            rank = tl.where(rest == size, before + whole, rank)
        else:
            rank = tl.where(rest == size, before, rank)
        larger += tl.sum(mine, 0)
    tl.store(count_ptr, larger)
    last = tiles_ptr + rank * 4
    has = rest > 0
    tl.store(last, e, mask=has)
    tl.store(last + 1, start + whole * (MAIN * 32), mask=has)
    tl.store(last + 2, routes - whole * (MAIN * 32), mask=has)
    for j in range(0, tl.max(whole, 0)):
        at = tiles_ptr + (first_whole + j) * 4
        tl.store(at, e, mask=j < whole)
        tl.store(at + 1, start + j * (MAIN * 32), mask=j < whole)
        tl.store(at + 2, tl.full((EP,), MAIN * 32, tl.int32), mask=j < whole)


@triton.jit
def list_segments(
    counts_ptr, offsets_ptr, segments_ptr, counters_ptr, counters, E, ctas,
    ROOM: tl.constexpr, EP: tl.constexpr, N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program p: the lists of CTAs p * N .. p * N + N - 1, and its share of zeroed counters."""
    start_dependents(PDL)
    for first in range(tl.program_id(0) * 256, counters, tl.num_programs(0) * 256):
        c = first + tl.arange(0, 256)
        tl.store(counters_ptr + c, tl.zeros((256,), tl.int32), mask=c < counters)
    e = tl.arange(0, EP)
    routes = tl.load(counts_ptr + e, mask=e < E, other=0)
    begin = tl.load(offsets_ptr + e, mask=e < E, other=0) // 32
    blocks = (routes + 31) // 32
    end = begin + blocks
    parts = (blocks + ROOM - 1) // ROOM
    part_end = tl.cumsum(parts, 0)
    total_parts = tl.sum(parts, 0)
    total = tl.sum(blocks, 0)
    cta = tl.program_id(0) * N + tl.arange(0, N)
    owner = (part_end - parts)[None, :] <= cta[:, None]
    owner = owner & (cta[:, None] < part_end[None, :])
    pick = owner.to(tl.int32)
    part = cta - tl.sum(pick * (part_end - parts)[None, :], 1)
    size = tl.sum(pick * blocks[None, :], 1)
    pieces = tl.maximum(tl.sum(pick * parts[None, :], 1), 1)
    origin = tl.sum(pick * begin[None, :], 1)
    low = origin + part * size // pieces
    high = origin + (part + 1) * size // pieces
    high = tl.where(cta < total_parts, high, low)
    crowded = total_parts > ctas
    low = tl.where(crowded, (cta.to(tl.int64) * total // ctas).to(tl.int32), low)
    high = tl.where(crowded, ((cta + 1).to(tl.int64) * total // ctas).to(tl.int32), high)
    at = segments_ptr + cta * (4 * (ROOM + 1))
    ok = cta < ctas
    for s in range(ROOM + 1):
        inside = (begin[None, :] <= low[:, None]) & (low[:, None] < end[None, :])
        inside = inside & (low < high)[:, None]
        expert = tl.sum(inside.to(tl.int32) * (e + 1)[None, :], 1) - 1
        stop = tl.minimum(tl.sum(inside.to(tl.int32) * end[None, :], 1), high)
        tl.store(at + s * 4, expert, mask=ok)
        tl.store(at + s * 4 + 1, low, mask=ok)
        tl.store(at + s * 4 + 2, stop - low, mask=ok)
        low = tl.where(expert >= 0, stop, low)


@dataclass(frozen=True, slots=True, eq=False)
class Tiles:
    """Tiles of `list_tiles`: records, how many there are (on the device), and the bound on them."""

    records: Tensor
    count: Tensor
    room: int


def tile_room(routed: Routed, main: int) -> int:
    """No routing makes more tiles than this."""
    p = routed.problem
    return min(p.experts, p.routes) + routed.sorted_token_ids.shape[0] // main


def tiles(routed: Routed, main: int, extra: int) -> Tiles:
    """Tiles of `main` routes, the last of an expert up to `main + extra`."""
    device = routed.expert_counts.device
    room = tile_room(routed, main)
    records = torch.empty((room, 4), dtype=torch.int32, device=device)
    count = torch.empty(1, dtype=torch.int32, device=device)
    experts = routed.problem.experts
    list_tiles[(1,)](
        routed.expert_counts, routed.expert_offsets, records, count, experts,
        MAIN=main // ROUTE_BLOCK, EXTRA=extra // ROUTE_BLOCK, EP=pow2(experts),
        num_warps=8, **options(device),
    )  # fmt: skip
    return Tiles(records, count, room)


def segments(routed: Routed, ctas: int, room: int, clear: Tensor) -> Tensor:
    """Lists of at most `room` blocks for each of `ctas` CTAs; zeroes `clear` (int32) as well.

    They hold all routes if `routed` has no more than ctas * room blocks.
    """
    device = routed.expert_counts.device
    out = torch.empty((ctas, room + 1, 4), dtype=torch.int32, device=device)
    experts = routed.problem.experts
    list_segments[(-(-ctas // PER_PROGRAM),)](
        routed.expert_counts, routed.expert_offsets, out, clear, clear.numel(), experts, ctas,
        ROOM=room, EP=pow2(experts), N=PER_PROGRAM, num_warps=8, **options(device),
    )  # fmt: skip
    return out


def weight_boxes(
    packed: Packed, row_units: int, k_units: int
) -> tuple[TensorDescriptor, TensorDescriptor]:
    """TMA boxes of packed weights: words and scales."""
    assert packed.scales is not None
    units = -(-packed.shape[2] // UNIT_COLUMNS)
    words = packed.codes.view(-1, units, UNIT_WORDS)
    scales = packed.scales.view(torch.int32).view(-1, units * UNIT_SCALES // 4)
    return weight_descriptors(words, scales, row_units, k_units)


@dataclass(frozen=True, slots=True)
class Cut:
    """How a problem is cut: tiles of up to main + 32 routes, `small` where so few suffice.

    registers: a thread's, of the second team and of the gathering warps; the first team has the
    rest of 65536. precise: every 128 of K is added in float32.
    """

    main: int
    small: int
    stages: int
    registers: tuple[int, int]
    precise: bool

    @classmethod
    def of(cls, problem: Problem, precise: bool) -> "Cut":
        """The widest tile that an expert's mean share of the routes fills."""
        mean = problem.routes / problem.experts
        main = 256 if mean > 144 else 128 if mean > 72 else 64
        registers = (224, 64) if precise else (208, 88)
        stages = {256: 4, 128: 6, 64: 8}[main]
        return cls(main, max(32, main // 4), stages, registers, precise)

    def options(self, k: int) -> dict[str, Any]:
        """Keywords of `prefill.grouped_prefill`'s launch for rows of k columns."""
        stages = min(self.stages, -(-k // 128))  # the kernel's double buffers rely on it
        return {
            "MAIN": self.main, "SMALL": self.small, "STAGES": stages, "TEAMS": 2,
            "PRECISE": self.precise, "TEAM_REGISTERS": self.registers[0],
            "GATHER_REGISTERS": self.registers[1], "PDL": True, "num_warps": 4, "launch_pdl": True,
        }  # fmt: skip
