"""route: expert ids of the tokens -> Routed, on the device, in one kernel (few routes) or three.

Stable counting sort. A route's place is ``start[e] + (routes before it with the same e)``; both
are sums over compares, so no order of arrival enters and a graph replay gives the same bits.

========  ===============================================================================
few       up to ``FEW`` routes: every CTA counts all ids, and those before its own chunk, then
          places its chunk; further CTAs quantise the rows of x, which needs no routing
many      ``count`` (rank in a chunk of 256, histogram of the chunk), ``scan`` (prefix over
          chunks per expert), ``scatter``; the rows of x are quantised beside them, by a kernel
          that starts when they have started
========  ===============================================================================
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixmoe.backends.hopper.launch import options, pow2, start_dependents, wait_for_all
from mixmoe.backends.hopper.quantise import launch_rows, load_rows
from mixmoe.spec import Problem, Routed

FEW = 8192  # routes; above, reading all ids in every CTA costs more than two more launches
# Routes up to which a CTA places so many (H200, 2026-11-28, with x, us: 2048 routes 32 / 64 / 128
# 6.6 / 6.6 / 7.5, 4096 12.0 / 9.4 / 10.1, 8192 25.0 / 20.1 / 14.7).
FEW_CHUNKS = ((2048, 32), (4096, 64), (FEW, 128))
CHUNK = 256  # routes ranked by one CTA where they are many: 65,536 compares
PIECE = 1024  # ids counted at a time
SCAN_COLUMNS = 8  # experts one CTA scans over all chunks
SCAN_ROWS = 256
RIDDEN = 8192  # values of x that a CTA quantises beside the routing, unless a row has more
TWO_CTAS = 2 * 132  # riders before they take several rows each: two an SM
FILL = tl.constexpr(512)  # sentinels a CTA writes at a time
SIZES = ["R", "T", "P", "E", "known", "TOPK", "workers"]  # one binary for every count of tokens
PAIRS = tl.constexpr(32)  # ids that routes are compared with at a time


@dataclass(frozen=True, slots=True, eq=False)
class Placed(Routed):
    """Routed plus where each route went, and what it was made from.

    ``position[r]`` is route r's place in sorted order, -1 when skipped; ``topk_ids``,
    ``topk_weights`` (T, topk) and ``expert_map`` are the caller's, None if not known.
    """

    position: Tensor
    topk_ids: Tensor | None = None
    topk_weights: Tensor | None = None
    expert_map: Tensor | None = None


@triton.jit
def expert_of(ids_ptr, map_ptr, r, R, E, known):
    """Local expert of routes ``r``; -1 for masked, negative, foreign or unknown ids."""
    e = tl.load(ids_ptr + r, mask=r < R, other=-1).to(tl.int32)
    if map_ptr is not None:
        e = tl.load(map_ptr + e, mask=(e >= 0) & (e < known), other=-1).to(tl.int32)
    return tl.where((e >= 0) & (e < E), e, -1)


@triton.jit
def rank_among(ids_ptr, map_ptr, r, e, first, N, R, E, known, ROUTES: tl.constexpr):
    """How many routes of ``first .. first + N`` stand before ``r`` and go to the same expert."""
    found = tl.zeros((ROUTES, PAIRS), tl.int32)
    for at in tl.range(first, first + N, PAIRS, num_stages=4):
        i = at + tl.arange(0, PAIRS)
        other = expert_of(ids_ptr, map_ptr, i, R, E, known)
        found += ((other[None, :] == e[:, None]) & (i[None, :] < r[:, None])).to(tl.int32)
    return tl.sum(found, 1)


@triton.jit
def write_lists(
    ids_out, weights_out, experts_out, valid_ptr, offsets_ptr, counts_ptr, counts, T, P, E, TOPK,
    workers, BLOCK: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    """All but the routes themselves: counts, offsets, the sentinels, the expert of each block.

    Returns the padded start of each expert, ``(EP,)``. ``counts`` is the histogram ``(EP,)``; of
    ``workers`` CTAs number ``program_id(0)`` does its share. Loops over vectors of experts keep the
    code short: after a flush of the L2 fetching it takes longer than running it.
    """
    pid = tl.program_id(0)
    sentinel = T | (TOPK << 24)
    e = tl.arange(0, EP)
    padded = (counts + BLOCK - 1) // BLOCK * BLOCK
    ends = tl.cumsum(padded, 0)
    starts = ends - padded
    total = tl.sum(padded, 0)
    if pid == 0:
        tl.store(counts_ptr + e, counts, mask=e < E)
        tl.store(offsets_ptr + e, starts, mask=e < E)
        tl.store(offsets_ptr + E, total)
        tl.store(valid_ptr, total)
        tl.store(valid_ptr + 1, T)
    for i in range(pid, BLOCK - 1, workers):  # an expert has at most BLOCK - 1 padding places
        pad = counts + i < padded
        tl.store(ids_out + starts + counts + i, sentinel, mask=pad)
        tl.store(weights_out + starts + counts + i, 0.0, mask=pad)
    for i in range(pid, tl.max(padded, 0) // BLOCK, workers):
        tl.store(experts_out + starts // BLOCK + i, e, mask=i * BLOCK < padded)
    for at in range(pid * FILL, P, workers * FILL):  # beyond the last used block
        p = at + tl.arange(0, FILL)
        spare = (p >= total) & (p < P)
        tl.store(ids_out + p, sentinel, mask=spare)
        tl.store(weights_out + p, 0.0, mask=spare)
        tl.store(experts_out + p // BLOCK, -1, mask=spare & (p % BLOCK == 0))
    return starts


@triton.jit
def place(
    ids_out, weights_out, position_ptr, topk_weights_ptr, r, e, rank, starts, R, TOPK,
):  # fmt: skip
    """Write routes ``r`` of experts ``e`` at ``starts[e] + rank``; skipped ones get position -1."""
    real = (r < R) & (e >= 0)
    at = tl.gather(starts, tl.maximum(e, 0), 0) + rank
    token = r // TOPK
    tl.store(ids_out + at, token | ((r - token * TOPK) << 24), mask=real)
    weight = tl.load(topk_weights_ptr + r, mask=real, other=0.0).to(tl.float32)
    tl.store(weights_out + at, weight, mask=real)
    tl.store(position_ptr + r, tl.where(real, at, -1), mask=r < R)


@triton.jit
def histograms(
    ids_ptr, map_ptr, first, R, E, known, EP: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """How many routes go to each expert, ``(EP,)``, and how many of those before ``first``."""
    counts = tl.zeros((EP,), tl.int32)
    before = tl.zeros((EP,), tl.int32)
    for at in tl.range(0, R, PIECE, num_stages=4):
        i = at + tl.arange(0, PIECE)
        e = expert_of(ids_ptr, map_ptr, i, R, E, known)
        found = tl.histogram(tl.maximum(e, 0), EP, mask=e >= 0)
        counts += found
        if at + PIECE <= first:
            before += found
        elif at < first:
            before += tl.histogram(tl.maximum(e, 0), EP, mask=(e >= 0) & (i < first))
    return counts, before


@triton.jit(do_not_specialize=SIZES)
def route_once(
    ids_ptr, topk_weights_ptr, map_ptr, ids_out, weights_out, experts_out, valid_ptr, offsets_ptr,
    counts_ptr, position_ptr, R, T, P, E, known, TOPK, workers,
    x_ptr, codes_ptr, scales_ptr, K, x_stride, pitch,
    BLOCK: tl.constexpr, PIECE: tl.constexpr, EP: tl.constexpr,
    ROUTES: tl.constexpr, WRITE: tl.constexpr, QB: tl.constexpr,
    KP: tl.constexpr, UP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """CTAs below ``workers`` route, ROUTES routes each; the others quantise QB rows of x each."""
    start_dependents(PDL)
    pid = tl.program_id(0)
    if pid < workers:
        first = pid * ROUTES
        counts, before = histograms(ids_ptr, map_ptr, first, R, E, known, EP, PIECE)
        starts = write_lists(
            ids_out, weights_out, experts_out, valid_ptr, offsets_ptr, counts_ptr, counts,
            T, P, E, TOPK, workers, BLOCK, EP,
        )  # fmt: skip
        r = first + tl.arange(0, ROUTES)
        e = expert_of(ids_ptr, map_ptr, r, R, E, known)
        rank = rank_among(ids_ptr, map_ptr, r, e, first, ROUTES, R, E, known, ROUTES)
        rank += tl.gather(before, tl.maximum(e, 0), 0)
        place(ids_out, weights_out, position_ptr, topk_weights_ptr, r, e, rank, starts, R, TOPK)
    else:
        if WRITE is not None:
            row = (pid - workers) * QB + tl.arange(0, QB)
            x = load_rows(x_ptr, row, row < T, K, x_stride, KP, 1)
            WRITE(x, codes_ptr, scales_ptr, row, row < T, pitch, QB, KP, UP)


@triton.jit(do_not_specialize=SIZES)
def count(
    ids_ptr, map_ptr, chunk_counts_ptr, rank_ptr, R, E, known,
    CHUNK: tl.constexpr, EP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Chunk ``program_id(0)``: its histogram, and each route's rank among the chunk's own."""
    wait_for_all(PDL)  # whatever starts from here on may read x
    chunk = tl.program_id(0)
    r = chunk * CHUNK + tl.arange(0, CHUNK)
    e = expert_of(ids_ptr, map_ptr, r, R, E, known)
    counts = tl.histogram(tl.maximum(e, 0), EP, mask=e >= 0)
    k = tl.arange(0, EP)
    tl.store(chunk_counts_ptr + chunk.to(tl.int64) * E + k, counts, mask=k < E)
    rank = rank_among(ids_ptr, map_ptr, r, e, chunk * CHUNK, CHUNK, R, E, known, CHUNK)
    tl.store(rank_ptr + r, rank, mask=r < R)


@triton.jit(do_not_specialize=SIZES)
def scan(
    chunk_counts_ptr, counts_ptr, workers, E,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Histograms -> exclusive prefix over the ``workers`` chunks, in place, and the totals."""
    start_dependents(PDL)
    e = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.int32)
    for first in range(0, workers, ROWS):
        c = first + tl.arange(0, ROWS)
        mask = (c < workers)[:, None] & (e < E)[None, :]
        at = chunk_counts_ptr + c.to(tl.int64)[:, None] * E + e[None, :]
        counts = tl.load(at, mask=mask, other=0)
        tl.store(at, total[None, :] + tl.cumsum(counts, 0) - counts, mask=mask)
        total += tl.sum(counts, 0)
    tl.store(counts_ptr + e, total, mask=e < E)


@triton.jit(do_not_specialize=SIZES)
def scatter(
    ids_ptr, topk_weights_ptr, map_ptr, chunk_counts_ptr, totals_ptr, ids_out, weights_out,
    experts_out, valid_ptr, offsets_ptr, counts_ptr, position_ptr, R, T, P, E, known, TOPK,
    workers, BLOCK: tl.constexpr, CHUNK: tl.constexpr, EP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Chunk ``program_id(0)``: place its routes; ``position`` holds their ranks on entry."""
    start_dependents(PDL)
    chunk = tl.program_id(0)
    k = tl.arange(0, EP)
    counts = tl.load(totals_ptr + k, mask=k < E, other=0)
    starts = write_lists(
        ids_out, weights_out, experts_out, valid_ptr, offsets_ptr, counts_ptr, counts,
        T, P, E, TOPK, workers, BLOCK, EP,
    )  # fmt: skip
    r = chunk * CHUNK + tl.arange(0, CHUNK)
    e = expert_of(ids_ptr, map_ptr, r, R, E, known)
    before = tl.load(chunk_counts_ptr + chunk.to(tl.int64) * E + e, mask=e >= 0, other=0)
    rank = tl.load(position_ptr + r, mask=r < R, other=0) + before
    place(ids_out, weights_out, position_ptr, topk_weights_ptr, r, e, rank, starts, R, TOPK)


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Rows of x that routing quantises in its first launch, and where the codes go.

    A row of codes holds ``pitch`` values, zeros beyond those of x.
    """

    x: Tensor
    codes: Tensor
    scales: Tensor
    pitch: int
    writer: object
    up: int

    def write(self) -> None:
        """Quantise them beside the kernels of `route_many`, and of what follows them."""
        launch_rows(
            self.x, self.codes, self.scales, self.pitch, self.writer, self.up, None, False,
            beside=True,
        )


def route(
    topk_ids: Tensor, topk_weights: Tensor, problem: Problem, block: int,
    expert_map: Tensor | None = None, rows: Rows | None = None,
) -> Placed:  # fmt: skip
    """Sort ``topk_ids (T, topk)`` into blocks of ``block`` routes; ``rows`` rides along.

    An id of -1, at least E, or mapped to -1 is skipped. Every byte of the result is written;
    nothing is read back.
    """
    topk_ids, topk_weights = topk_ids.contiguous(), topk_weights.contiguous()
    out = empty_routed(problem, block, topk_ids, topk_weights, expert_map)
    if problem.routes <= FEW:
        route_few(topk_ids, topk_weights, expert_map, out, rows)
        return out
    route_many(topk_ids, topk_weights, expert_map, out)
    if rows is not None:
        rows.write()
    return out


def empty_routed(
    problem: Problem, block: int, topk_ids: Tensor, topk_weights: Tensor, expert_map: Tensor | None
) -> Placed:  # fmt: skip
    """Uninitialised lists of the sizes that problem and block ask for."""
    device = topk_ids.device
    padded = problem.padded_routes(block)
    ints = [padded, padded // block, 2, problem.experts + 1, problem.experts, problem.routes]
    ids, experts, valid, offsets, counts, position = (
        torch.empty(n, dtype=torch.int32, device=device) for n in ints
    )
    weights = torch.empty(padded, dtype=torch.float32, device=device)
    return Placed(
        ids, weights, experts, valid, offsets, counts, block, problem, position,
        topk_ids, topk_weights, expert_map,
    )  # fmt: skip


def lists_of(out: Placed) -> tuple[Tensor, ...]:
    """The output pointers in the kernels' order."""
    return (
        out.sorted_token_ids, out.sorted_weights, out.sorted_expert_ids, out.num_valid_ids,
        out.expert_offsets, out.expert_counts, out.position,
    )  # fmt: skip


def sizes_of(out: Placed, expert_map: Tensor | None) -> tuple[int, ...]:
    """R, T, P, E, length of the map, topk."""
    p = out.problem
    known = 0 if expert_map is None else expert_map.shape[0]
    padded = out.sorted_token_ids.shape[0]
    return p.routes, p.tokens, padded, p.experts, known, p.topk


def route_few(
    ids: Tensor, weights: Tensor, expert_map: Tensor | None, out: Placed, rows: Rows | None
) -> None:
    """One launch: routing CTAs of a chunk each, and one CTA for a few rows of x."""
    p = out.problem
    chunk = next(routes for most, routes in FEW_CHUNKS if p.routes <= most)
    ep = pow2(p.experts)
    routers = max(1, -(-p.routes // chunk), min(ep // 32, 8))
    operands, shape, more = riders(rows, ids, p.tokens)
    route_once[(routers + more,)](
        ids, weights, expert_map, *lists_of(out), *sizes_of(out, expert_map), routers, *operands,
        BLOCK=out.block, PIECE=max(64, min(PIECE, pow2(p.routes))), EP=ep, ROUTES=chunk,
        num_warps=8, **shape, **options(ids.device),
    )  # fmt: skip


def riders(rows: Rows | None, ids: Tensor, tokens: int) -> tuple[tuple, dict[str, Any], int]:
    """For rows beside a routing kernel: operands, constants, and how many CTAs more."""
    if rows is None:
        nothing = {"QB": 1, "KP": 1, "WRITE": None, "UP": 0}
        return (ids, ids, ids, ids.shape[-1], ids.stride(0), 0), nothing, 0
    x, columns = rows.x, max(pow2(rows.pitch), 128)
    few = max(1, min(RIDDEN // columns, pow2(-(-tokens // TWO_CTAS))))  # rows of a CTA
    operands = (x, rows.codes, rows.scales, x.shape[-1], x.stride(0), rows.pitch)
    shape = {"QB": few, "KP": columns, "WRITE": rows.writer, "UP": rows.up}
    return operands, shape, -(-tokens // few)


def route_many(ids: Tensor, weights: Tensor, expert_map: Tensor | None, out: Placed) -> None:
    """Three launches: chunks counted, prefixes over the chunks, routes scattered."""
    p = out.problem
    chunks, ep = -(-p.routes // CHUNK), pow2(p.experts)
    chunk_counts = torch.empty((chunks, p.experts), dtype=torch.int32, device=ids.device)
    totals = torch.empty(p.experts, dtype=torch.int32, device=ids.device)
    R, T, P, E, known, topk = sizes_of(out, expert_map)
    go = options(ids.device)
    count[(chunks,)](
        ids, expert_map, chunk_counts, out.position, R, E, known,
        CHUNK=CHUNK, EP=ep, num_warps=16, **go,
    )  # fmt: skip
    scan[(-(-E // SCAN_COLUMNS),)](
        chunk_counts, totals, chunks, E, ROWS=SCAN_ROWS, COLUMNS=SCAN_COLUMNS, num_warps=8, **go
    )
    scatter[(chunks,)](
        ids, weights, expert_map, chunk_counts, totals, *lists_of(out), R, T, P, E, known, topk,
        chunks, BLOCK=out.block, CHUNK=CHUNK, EP=ep, num_warps=8, **go,
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def mark_positions(ids_ptr, position_ptr, P, T, TOPK, N: tl.constexpr, PDL: tl.constexpr):
    start_dependents(PDL)
    at = tl.program_id(0) * N + tl.arange(0, N)
    packed = tl.load(ids_ptr + at, mask=at < P, other=T)
    token = packed & 0xFFFFFF
    tl.store(position_ptr + token * TOPK + (packed >> 24), at, mask=token < T)


def placed(routed: Routed) -> Placed:
    """``routed`` with positions: made here where it came without (another backend, or by hand)."""
    if isinstance(routed, Placed):
        return routed
    p, ids = routed.problem, routed.sorted_token_ids
    position = torch.full((p.routes,), -1, dtype=torch.int32, device=ids.device)
    n = ids.shape[0]
    if n:
        mark_positions[(-(-n // 1024),)](
            ids, position, n, p.tokens, p.topk, N=1024, **options(ids.device)
        )
    return Placed(
        ids, routed.sorted_weights, routed.sorted_expert_ids, routed.num_valid_ids,
        routed.expert_offsets, routed.expert_counts, routed.block, p, position,
    )  # fmt: skip
