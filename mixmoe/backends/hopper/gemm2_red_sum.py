"""Stage 2 for some rows per expert and a short K, summed in the same kernel, in slot order.

The product is that of `gemm2_red`, items in the order column tiles, routes. An item has a few
groups of column tiles. The rows of a group go to a slot of a scratch, and while later groups are
multiplied, a warp of every CTA adds up the topk rows of its share of the tokens in float32. So the
bits do not depend on timing, y needs no zeroing, and the scratch is a few column tiles wide.

Between CTAs `written[g]` counts the items whose rows of group g are visible, `reduced[g]` the CTAs
that have read their part of it; a slot is written again when the group `slots` before is reduced.
Items are drawn in order and slots are at least the groups of an item, so who waits for a slot waits
for items that were drawn before its own: no deadlock, as long as all CTAs are resident. The grid is
never larger than the device holds, and starts as a whole.

The summing warp copies rows to shared memory and adds them up there: loads to registers would be
too few under way (one warp has 112 of them a lane; 16 loads spill), and a copy costs no register.

Slots (H200, 2026-11-28, DeepSeek-V3 TP8, T 1024, us): few enough that rows are read before they
leave the L2, enough that no CTA waits. One group an item, 7 tiles wide: two slots 126, three 132,
all sixteen 134; 4 wide: two 165, three 127. Items of three groups 4 wide, four slots: 123. Where
items of two groups are under way at once, as there are more CTAs than experts, slots are twice as
many (Qwen3 TP8, T 512: two 57, five of half the width 46; T 1024: three 69, five 64).
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mixmoe.backends.hopper.decode import Columns, multiprocessors
from mixmoe.backends.hopper.gemm2_prefill_sum import Counters, Result
from mixmoe.backends.hopper.gemm2_red import (
    COLUMNS,
    RECORDS,
    Boxes,
    Red,
    Routes,
    Sizes,
    memory,
    multiply,
    produce,
)
from mixmoe.backends.hopper.launch import TOGETHER, pow2
from mixmoe.backends.hopper.mainloop import advance, cp_async, cta_barrier, read_record
from mixmoe.backends.hopper.prefill import Work
from mixmoe.backends.hopper.route import Placed
from mixmoe.backends.hopper.signals import LINE, PITCH, glance, observe
from mixmoe.backends.hopper.slots import SlotRows
from mixmoe.backends.hopper.worklist import Tiles, weight_boxes
from mixmoe.fold import Fold
from mixmoe.preshuffle import Packed
from mixmoe.spec import Problem, Recipe

SHARED = 228 * 1024 // 2 - 1024  # bytes of shared memory of each of two CTAs
KEPT = 640  # bytes of it, at most, for barriers and what Triton hands to the roles
GROUP = 4  # column tiles of a group
DEPTH = 6  # pieces that a summing warp has under way, where they fit
TOKENS = gl.constexpr(4)  # that a summing warp takes at a time: eight lanes read a line of each


class Scratch(NamedTuple):
    """Rows (slots, P, group x 64) bf16, rows of a slot (P), slots."""

    rows: Any
    room: Any
    slots: Any


@gluon.jit
def slot_of(scratch, group, GROUP: gl.constexpr):
    """The first row of a group's slot."""
    return scratch.rows + (group % scratch.slots * scratch.room).to(gl.int64) * (GROUP * 64)


@gluon.jit
def store_rows(value, at, target, GROUP: gl.constexpr):
    """A row of 64 columns of each target, but -1."""
    c = gl.arange(0, 64, layout=gl.SliceLayout(0, value.type.layout))
    gl.store(
        at + (target[:, None] * (GROUP * 64) + c[None, :]), value, mask=(target >= 0)[:, None]
    )


@gluon.jit
def store(scratch, outs, items, counters, groups, GROUP: gl.constexpr):
    """Role of the storing warps, those that add in `gemm2_red`: a tile in two halves, given back
    when both are stored.

    An item has several groups. One release counts it for each: it orders the stores of both warps,
    which met in a barrier.
    """
    HALF: gl.constexpr = outs.tiles.shape[1] // 2
    L: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    grid = gl.num_programs(0)
    stage, phase, slot = 0, 0, 0
    free, seen = grid * 0, grid * 0  # groups that all have read; the count of the next
    mbarrier.wait(outs.full.index(stage), phase)
    expert, first, routes, count = read_record(items.records, slot)
    while expert >= 0:
        mine = items.targets.index(slot)
        low = mine.slice(0, HALF).load(gl.SliceLayout(1, L))
        high = mine.slice(HALF, HALF).load(gl.SliceLayout(1, L))
        for part in range((count + GROUP - 1) // GROUP):
            group = first // GROUP + part
            free += (seen == grid).to(gl.int32)
            # Needs no acquire: the loads had returned before they were counted.
            while free + scratch.slots <= group:
                seen = glance(counters.reduced + free * PITCH)
                free += (seen == grid).to(gl.int32)
            at = slot_of(scratch, group, GROUP)
            for _ in range(gl.minimum(count - part * GROUP, GROUP)):
                mbarrier.wait(outs.full.index(stage), phase)
                tile = outs.tiles.index(stage)
                store_rows(tile.slice(0, HALF, dim=0).load(L), at, low, GROUP)
                if routes > HALF:
                    store_rows(tile.slice(HALF, HALF, dim=0).load(L), at, high, GROUP)
                mbarrier.arrive(outs.empty.index(stage), count=1)
                at += 64
                stage, phase = advance(stage, phase, outs.full.shape[0])
            cta_barrier()
            gl.atomic_add(counters.written + group * PITCH, 1, sem="release")
            seen = glance(counters.reduced + gl.minimum(free, groups - 1) * PITCH)  # for the next
        slot = (slot + 1) % RECORDS
        mbarrier.wait(outs.full.index(stage), phase)
        expert, first, routes, count = read_record(items.records, slot)


@gluon.jit
def place(position_ptr, places, first, tokens, TOPK: gl.constexpr, L: gl.constexpr):
    """Where in a slot the rows of the tokens from `first` on lie (-1: nowhere)."""
    N: gl.constexpr = places.shape[1]
    n = gl.arange(0, N, layout=gl.SliceLayout(1, L))
    for i in range(places.shape[0] // TOPK):
        t = first + i * N + n
        for k in gl.static_range(TOPK):
            p = gl.load(position_ptr + t * TOPK + k, mask=t < tokens, other=-1)
            places.index(i * TOPK + k).store(p)


@gluon.jit
def ask(
    base, places, buffers, first, turn, tile, TOPK: gl.constexpr, GROUP: gl.constexpr,
    L: gl.constexpr,
):  # fmt: skip
    """Copy of each token of a turn its rows of a column tile to the buffers from `first` on; zeros
    where it has none."""
    c = tile * 64 + gl.arange(0, 64, layout=gl.SliceLayout(0, L))
    position = ()
    for k in gl.static_range(TOPK):
        p = places.index(turn * TOPK + k).load(gl.SliceLayout(1, L))
        position = position + (p,)  # type: ignore[assignment]
    for k in gl.static_range(TOPK):
        p = position[k]
        at = base + (p[:, None] * (GROUP * 64) + c[None, :])
        cp_async(buffers.index(first + k), at, mask=(p >= 0)[:, None])  # type: ignore[index]


@gluon.jit
def add_up(buffers, first, TOPK: gl.constexpr, L: gl.constexpr):
    """Slot 0 .. topk - 1 in float32. A lane reads what it has copied itself."""
    total = buffers.index(first).load(L).to(gl.float32)
    for k in gl.static_range(1, TOPK):
        total += buffers.index(first + k).load(L).to(gl.float32)
    return total


@gluon.jit
def await_count(ptr, wanted):
    """Until the counter is `wanted`; what was before its increments is seen."""
    while observe(ptr) < wanted:
        pass


@gluon.jit
def sum_groups(
    scratch, out, position_ptr, places, buffers, counters, count_ptr, groups, TOPK: gl.constexpr,
    GROUP: gl.constexpr,
):
    """Role of the summing warp: y, group by group.

    A piece is N tokens x a column tile. Of those of a group this CTA has a contiguous part, always
    the same one, DEPTH of them under way.
    """
    DEPTH: gl.constexpr = buffers.shape[0] // TOPK
    N: gl.constexpr = places.shape[1]
    L: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, gl.num_warps()], [1, 0])
    n = gl.arange(0, N, layout=gl.SliceLayout(1, L))
    c = gl.arange(0, 64, layout=gl.SliceLayout(0, L))
    grid = gl.num_programs(0)
    pieces = (out.tokens + N - 1) // N * GROUP
    low = gl.program_id(0) * pieces // grid
    own = (gl.program_id(0) + 1) * pieces // grid - low
    place(position_ptr, places, low // GROUP * N, out.tokens, TOPK, L)
    tiles = gl.load(count_ptr)
    cta_barrier()
    for group in range(groups):
        await_count(counters.written + group * PITCH, tiles)
        base = slot_of(scratch, group, GROUP)
        for i in range(own + DEPTH - 1):
            if i < own:
                turn = (low + i) // GROUP - low // GROUP
                first = i % DEPTH * TOPK
                ask(base, places, buffers, first, turn, (low + i) % GROUP, TOPK, GROUP, L)
            async_copy.commit_group()
            async_copy.wait_group(DEPTH - 1)
            done = i - (DEPTH - 1)
            if done >= 0:
                total = add_up(buffers, done % DEPTH * TOPK, TOPK, L)
                t = (low + done) // GROUP * N + n
                column = (group * GROUP + (low + done) % GROUP) * 64 + c
                gl.store(
                    out.rows + t.to(gl.int64)[:, None] * out.pitch + column[None, :],
                    total.to(out.rows.dtype.element_ty),
                    mask=(t < out.tokens)[:, None] & (column < out.columns)[None, :],
                    cache_modifier=".cs",
                )  # fmt: skip
        # Relaxed: the copies have ended, which is all that a later write to the slot waits for.
        cta_barrier()
        gl.atomic_add(counters.reduced + group * PITCH, 1, sem="relaxed")


@gluon.jit
def gemm2_red_sum(
    w_desc, s_desc, h_desc, work, routes, position_ptr, columns, scratch, counters, out, sizes,
    MAIN: gl.constexpr, SMALL: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr,
    HOLDS: gl.constexpr, OUTS: gl.constexpr, TOPK: gl.constexpr, GROUP: gl.constexpr,
    TURNS: gl.constexpr, DEPTH: gl.constexpr, WIDE: gl.constexpr, REGISTERS: gl.constexpr,
    PDL: gl.constexpr,
):
    """out (T, H). columns: scales and biases of the weights' rows."""
    weights, held, outs, items = memory(w_desc, s_desc, MAIN, STEPS, STAGES, HOLDS, OUTS)
    places = gl.allocate_shared_memory(
        gl.int32, [TURNS * TOPK, TOKENS], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    buffers = gl.allocate_shared_memory(
        gl.bfloat16, [DEPTH * TOPK, TOKENS, 64], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    )
    boxes = Boxes(w_desc, s_desc, h_desc)
    fence_async_shared()
    groups = (sizes.columns + GROUP - 1) // GROUP
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    gl.warp_specialize(
        [
            (multiply, (weights, held, outs, items.records, columns, out.columns, SMALL, WIDE)),
            (sum_groups, (scratch, out, position_ptr, places, buffers, counters, work.count, groups,
                          TOPK, GROUP)),
            (store, (scratch, outs, items, counters, groups, GROUP)),
            (produce, (boxes, work, routes, weights, held, items, sizes,
                       columns.bias is not None)),
        ],
        [1, 2, 1],
        [REGISTERS, REGISTERS, REGISTERS],
    )


@dataclass(frozen=True, slots=True)
class Sums:
    """How gemm2_red_sum is cut for a problem.

    red: the product; group: column tiles of a group, of which an item has several; ctas: of the
    grid, all resident; slots: groups whose rows are kept; depth: pieces that the summing warp has
    under way.
    """

    red: Red
    group: int
    ctas: int
    slots: int
    depth: int

    @classmethod
    def of(cls, problem: Problem, device: torch.device) -> "Sums | None":
        """None where two CTAs do not fit on an SM: K over 384, a large topk."""
        red = Red.of(problem)
        if red is None:
            return None
        ctas = 2 * multiprocessors(device)
        waves = max(1, round(ctas / problem.experts))  # items of a tile that are under way at once
        parts = 3 if waves == 1 else 2
        slots = waves * parts + (1 if problem.experts <= ctas else 2)
        cuts = (
            cls(replace(red, main=main, span=parts * GROUP), GROUP, ctas, slots, depth)
            for main in (red.main, 64) for depth in range(DEPTH, 1, -1)
        )  # fmt: skip
        return next((cut for cut in cuts if cut.shared(problem) <= SHARED), None)

    def groups(self, problem: Problem) -> int:
        """Of columns."""
        return -(-problem.hidden // (COLUMNS * self.group))

    def turns(self, problem: Problem) -> int:
        """Of how many times TOKENS tokens a CTA has a piece, at most."""
        pieces = -(-problem.tokens // TOKENS.value) * self.group
        own = -(-pieces // self.ctas)
        return pow2(-(-own // self.group) + 1)

    def shared(self, problem: Problem) -> int:
        """Bytes of shared memory of a CTA, at most: weights with their scales, rows of h, finished
        tiles, factors and targets, positions, copies of rows."""
        red = self.red
        weights = red.stages * red.steps * (4096 + 256)
        rows = red.main * 128 * (red.holds * red.steps + red.outs)
        items = red.main * 4 * (2 * red.holds + RECORDS.value)
        copies = problem.topk * TOKENS.value * (4 * self.turns(problem) + 128 * self.depth)
        return weights + rows + items + copies + KEPT

    def counters(self, problem: Problem) -> int:
        """Ints to zero: two counters a group."""
        return 2 * LINE * self.groups(problem)

    def options(self, problem: Problem) -> dict[str, Any]:
        """Keywords of the launch but for the weights' order."""
        return {
            **self.red.options(), "TOPK": problem.topk, "GROUP": self.group,
            "TURNS": self.turns(problem), "DEPTH": self.depth, **TOGETHER,
        }  # fmt: skip


def launch(
    h: SlotRows, weights: Packed, bias: Tensor | None, routed: Placed, tiles: Tiles,
    recipe: Recipe, sums: Sums, out: Tensor,
) -> Tensor:  # fmt: skip
    """Run stage 2 and the sum over a token's routes: out (T, H).

    h: rows in sorted order, one per sorted position; weights: w2 in the order hopper_fp4q_w1 (or
    _wide); tiles: `worklist.tiles_by_expert(routed, sums.red.main, sums.counters(..))`, drawn by
    one launch.
    """
    p, red, room = routed.problem, sums.red, h.codes.shape[0]
    assert sums.slots * sums.group >= red.span, "or the groups of an item wait for one another"
    slots = min(sums.slots, sums.groups(p))
    shape = (slots * room, sums.group * COLUMNS)
    rows = torch.empty(shape, dtype=torch.bfloat16, device=out.device)
    words, scales = weight_boxes(weights, 4, 1)
    weight = routed.sorted_weights if recipe.weight_on == 2 else None
    gemm2_red_sum[(sums.ctas,)](
        words, scales,
        TensorDescriptor.from_tensor(h.codes, [32, 128], gl.NVMMASharedLayout(128, 8, 2)),
        Work(tiles.records, tiles.count), Routes(None, h.scales, weight), routed.position,
        Columns(weights.row_scale, bias), Scratch(rows, room, slots),
        Counters(tiles.counters, tiles.counters[sums.groups(p) * LINE :]),
        Result(out, out.stride(0), p.tokens, p.hidden),
        Sizes(-(-p.hidden // 16), red.span, -(-p.hidden // COLUMNS)),
        WIDE=weights.order.fold is Fold.WIDE, **sums.options(p),
    )  # fmt: skip
    return out
