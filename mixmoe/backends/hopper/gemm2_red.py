"""Stage 2 for many rows per expert and a short K, summed by atomics: not the same bits every run.

The product is that of `gemm2_prefill`, but the rows of a token are added up in
the L2 by `red` of 8 bf16 at a time, into a y that an earlier kernel has zeroed. An item is a tile
of one expert's routes x SPAN column tiles of 64; items run column group by column group, so that
the live columns of y stay in the L2 (H200, 2026-11-22: `red` of all rows in that order 305-318 us
at T 8192, topk 8, H 7168; with whole rows first 560-580).

Roles of a CTA (two CTAs on an SM): 4 matrix warps; 2 warps that add finished tiles to y; a producer
warp that draws items from a counter and loads what they need: rows of h (resident for the item),
weights through a ring, factors and token numbers of the routes. Matrix warps and adders learn of an
item from a ring of records in shared memory, so no other warp waits for global memory.
`gemm2_red_sum` has the same product and another way to the sum.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mixmoe.backends.hopper.decode import (
    SENTINEL_MASK,
    Columns,
    barriers,
    multiprocessors,
)
from mixmoe.backends.hopper.mainloop import (
    advance,
    half_fragment,
    halves,
    load_units,
    read_record,
    tma_load,
)
from mixmoe.backends.hopper.prefill import Work
from mixmoe.backends.hopper.route import Placed
from mixmoe.backends.hopper.slots import SlotRows
from mixmoe.backends.hopper.worklist import Tiles, weight_boxes
from mixmoe.fold import Fold
from mixmoe.preshuffle import Packed
from mixmoe.spec import Problem, Recipe

COLUMNS = 64  # weight rows of a column tile
RECORDS = gl.constexpr(4)  # adders lag behind the producer by two items at most


class Boxes(NamedTuple):
    """TMA descriptors: words and scales of weights, rows of h."""

    words: Any
    scales: Any
    rows: Any


class Routes(NamedTuple):
    """By sorted position: token | slot << 24 or None, scales of h, routing weights or None."""

    ids: Any
    scales: Any
    weights: Any


class Sizes(NamedTuple):
    """Weight units of an expert; column tiles of an item, of H."""

    units: Any
    span: Any
    columns: Any


class Result(NamedTuple):
    """y, its row pitch, H."""

    rows: Any
    pitch: Any
    columns: Any


class Weights(NamedTuple):
    """Stages of a column tile's weights; `full` and `empty` guard each."""

    words: Any
    scales: Any
    full: Any
    empty: Any


class Held(NamedTuple):
    """Items whose rows of h are resident, with the factors of the product and (every second) of the
    bias; `full` and `empty` guard each."""

    rows: Any
    factors: Any
    full: Any
    empty: Any


class Outs(NamedTuple):
    """Finished tiles for the adding warps; `full` and `empty` guard each."""

    tiles: Any
    full: Any
    empty: Any


class Items(NamedTuple):
    """What all warps know of an item: its record (`announce`), the rows of y it adds to."""

    records: Any
    targets: Any


@gluon.jit
def announce(records, slot, expert, first, routes, count):
    """Write an item's record: expert (-1: no more), first column tile, routes, column tiles."""
    L: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    field = gl.arange(0, 4, layout=L)
    low = gl.where(field == 0, expert, first)
    high = gl.where(field == 2, routes, count)
    records.index(slot).store(gl.where(field < 2, low, high))


@gluon.jit
def draw(work, groups, tiles):
    """The next item in the order column group, tile: its record's address, its group, if any."""
    index = gl.atomic_add(work.count + 1, 1, sem="relaxed")
    return work.records + index % tiles * 4, index // tiles, index < tiles * groups


@gluon.jit
def load_rows(h_desc, held, hold, start, blocks, STEPS: gl.constexpr):
    """Rows of h in boxes of 32."""
    full = held.full.index(hold)
    for b in gl.static_range(held.rows.shape[1] // 32):
        if b < blocks:
            mbarrier.expect(full, STEPS * h_desc.block_type.nbytes)
            for k in gl.static_range(STEPS):
                box = held.rows.index(hold * STEPS + k).slice(b * 32, 32, dim=0)
                tma_load(h_desc, [start + b * 32, k * 128], full, box)
        else:
            mbarrier.arrive(full, count=1)


@gluon.jit
def load_weights(boxes, weights, stage, phase, unit, count):
    """The weights of `count` column tiles."""
    STAGES: gl.constexpr = weights.full.shape[0]
    STEPS: gl.constexpr = weights.words.shape[0] // STAGES
    BYTES: gl.constexpr = boxes.words.block_type.nbytes + boxes.scales.block_type.nbytes
    for c in range(count):
        full = weights.full.index(stage)
        mbarrier.wait(weights.empty.index(stage), phase)
        mbarrier.expect(full, STEPS * BYTES)
        for k in gl.static_range(STEPS):
            slot = stage * STEPS + k
            tma_load(boxes.words, [unit + c * 4, k, 0], full, weights.words.index(slot))
            tma_load(boxes.scales, [unit + c * 4, 16 * k], full, weights.scales.index(slot))
        stage, phase = advance(stage, phase, STAGES)
    return stage, phase


@gluon.jit
def produce(boxes, work, routes, weights, held, items, sizes, BIASED: gl.constexpr):
    """Role of the producer warp. Targets are the routes' tokens, or without them their own rows."""
    STEPS: gl.constexpr = weights.words.shape[0] // weights.full.shape[0]
    MAIN: gl.constexpr = held.rows.shape[1]
    n = gl.arange(0, MAIN, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    tiles = gl.load(work.count)
    groups = (sizes.columns + sizes.span - 1) // sizes.span
    stage, phase, hold, h_phase, slot = 0, 1, 0, 1, 0
    at, group, more = draw(work, groups, tiles)
    while more:
        expert, start, count = gl.load(at), gl.load(at + 1), gl.load(at + 2)
        live = n < count
        target = start + n
        if routes.ids is not None:
            target = gl.load(routes.ids + start + n, mask=live, other=0) & SENTINEL_MASK
        factor = gl.load(routes.scales + start + n, mask=live, other=0.0)
        weight = gl.full([MAIN], 1.0, gl.float32, n.type.layout)
        if routes.weights is not None:
            weight = gl.load(routes.weights + start + n, mask=live, other=0.0)
        first = group * sizes.span
        columns = gl.minimum(sizes.span, sizes.columns - first)
        mbarrier.wait(held.empty.index(hold), h_phase)
        held.factors.index(2 * hold).store(factor * weight)
        if BIASED:
            held.factors.index(2 * hold + 1).store(weight)
        items.targets.index(slot).store(gl.where(live, target, -1))
        announce(items.records, slot, expert, first, count, columns)
        mbarrier.arrive(held.full.index(hold), count=1)
        load_rows(boxes.rows, held, hold, start, (count + 31) // 32, STEPS)
        stage, phase = load_weights(
            boxes, weights, stage, phase, expert * sizes.units + first * 4, columns
        )
        hold, h_phase = advance(hold, h_phase, held.full.shape[0])
        slot = (slot + 1) % RECORDS
        at, group, more = draw(work, groups, tiles)
    mbarrier.wait(held.empty.index(hold), h_phase)
    announce(items.records, slot, -1, 0, 0, 0)
    for _ in gl.static_range(MAIN // 32 + 1):
        mbarrier.arrive(held.full.index(hold), count=1)


@gluon.jit
def product(weights, rows, hold, stage, N: gl.constexpr, WIDE: gl.constexpr):
    """64 columns x N rows over all of K, complete."""
    STEPS: gl.constexpr = weights.words.shape[0] // weights.full.shape[0]
    L: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 32]
    )
    A: gl.constexpr = gl.DotOperandLayout(0, L, 4)
    acc = gl.zeros([64, N], gl.float32, L)
    for k in gl.static_range(STEPS):
        slot = stage * STEPS + k
        lo, hi = load_units(weights.words.index(slot), weights.scales.index(slot), 1, 4, WIDE)
        low, high = halves(lo), halves(hi)
        x = rows.index(hold * STEPS + k).slice(0, N, dim=0)
        for h in gl.static_range(2):
            acc = warpgroup_mma(
                half_fragment(low[h], high[h], A, 1, 4),
                x.slice(h * 64, 64, dim=1).permute((1, 0)), acc, use_acc=k + h > 0, is_async=True,
            )  # fmt: skip
    return warpgroup_mma_wait(0, deps=[acc])


@gluon.jit
def scale_of(ptr, row, column, H):
    """A value per column of the result, zeros past H."""
    return gl.load(ptr + row + column, mask=column < H, other=0.0)


@gluon.jit
def multiply_item(
    weights, held, outs, of_columns, hold, stage, phase, put, put_phase, row, first, count, H,
    N: gl.constexpr, WIDE: gl.constexpr,
):
    """All column tiles of an item with at most N routes. Row scales are loaded a tile ahead."""
    L: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 32]
    )
    m = first * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, L))
    ahead = scale_of(of_columns.scale, row, m, H)
    for _ in range(count):
        scale = ahead
        if of_columns.bias is not None:
            bias = scale_of(of_columns.bias, row, m, H)
        m += 64
        ahead = scale_of(of_columns.scale, row, m, H)
        mbarrier.wait(weights.full.index(stage), phase)
        acc = product(weights, held.rows, hold, stage, N, WIDE)
        # Only now: a barrier does not wait for loads from shared memory, the product does.
        mbarrier.arrive(weights.empty.index(stage), count=1)
        stage, phase = advance(stage, phase, weights.full.shape[0])
        factor = held.factors.index(2 * hold).slice(0, N).load(gl.SliceLayout(0, L))
        value = acc * scale[:, None] * factor[None, :]
        if of_columns.bias is not None:
            weight = held.factors.index(2 * hold + 1).slice(0, N).load(gl.SliceLayout(0, L))
            value += bias[:, None] * weight[None, :]
        mbarrier.wait(outs.empty.index(put), put_phase)
        outs.tiles.index(put).slice(0, N, dim=0).permute((1, 0)).store(value.to(outs.tiles.dtype))
        mbarrier.arrive(outs.full.index(put), count=1)
        put, put_phase = advance(put, put_phase, outs.full.shape[0])
    return stage, phase, put, put_phase


@gluon.jit
def multiply(
    weights, held, outs, records, of_columns, H, SMALL: gl.constexpr, WIDE: gl.constexpr
):
    """Role of the matrix warps: weights dequantised, times the item's rows, scaled, into `outs`."""
    MAIN: gl.constexpr = held.rows.shape[1]
    stage, phase, put, put_phase, hold, h_phase, slot = 0, 0, 0, 1, 0, 0, 0
    mbarrier.wait(held.full.index(hold), h_phase)
    expert, first, routes, count = read_record(records, slot)
    while expert >= 0:
        row = expert.to(gl.int64) * H
        if routes > SMALL:
            stage, phase, put, put_phase = multiply_item(
                weights, held, outs, of_columns, hold, stage, phase, put, put_phase, row, first,
                count, H, MAIN, WIDE,
            )  # fmt: skip
        else:
            stage, phase, put, put_phase = multiply_item(
                weights, held, outs, of_columns, hold, stage, phase, put, put_phase, row, first,
                count, H, SMALL, WIDE,
            )  # fmt: skip
        mbarrier.arrive(held.empty.index(hold), count=1)
        hold, h_phase = advance(hold, h_phase, held.full.shape[0])
        slot = (slot + 1) % RECORDS
        mbarrier.wait(held.full.index(hold), h_phase)
        expert, first, routes, count = read_record(records, slot)
    mbarrier.wait(outs.empty.index(put), put_phase)
    mbarrier.arrive(outs.full.index(put), count=1)  # nothing in it: the record says the end


@gluon.jit
def add_rows(value, y, target, m):
    """y[target] += value, bf16; targets -1 and columns past H are left out."""
    at = y.rows + target.to(gl.int64)[:, None] * y.pitch + m[None, :]
    mask = (target >= 0)[:, None] & (m < y.columns)[None, :]
    gl.atomic_add(at, value, mask=mask, sem="relaxed")


@gluon.jit
def add(y, outs, items):
    """Role of the adding warps. A tile is taken in two halves, for want of registers, and given
    back when both have been added: a barrier does not wait for a warp's loads from shared memory,
    an addition waits for the loads it needs."""
    HALF: gl.constexpr = outs.tiles.shape[1] // 2
    L: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    c = gl.arange(0, 64, layout=gl.SliceLayout(0, L))
    stage, phase, slot = 0, 0, 0
    mbarrier.wait(outs.full.index(stage), phase)
    expert, first, routes, count = read_record(items.records, slot)
    while expert >= 0:
        mine = items.targets.index(slot)
        low = mine.slice(0, HALF).load(gl.SliceLayout(1, L))
        high = mine.slice(HALF, HALF).load(gl.SliceLayout(1, L))
        m = first * 64 + c
        for _ in range(count):
            mbarrier.wait(outs.full.index(stage), phase)
            tile = outs.tiles.index(stage)
            add_rows(tile.slice(0, HALF, dim=0).load(L), y, low, m)
            if routes > HALF:
                add_rows(tile.slice(HALF, HALF, dim=0).load(L), y, high, m)
            mbarrier.arrive(outs.empty.index(stage), count=1)
            m += 64
            stage, phase = advance(stage, phase, outs.full.shape[0])
        slot = (slot + 1) % RECORDS
        mbarrier.wait(outs.full.index(stage), phase)
        expert, first, routes, count = read_record(items.records, slot)


@gluon.jit
def memory(
    w_desc, s_desc, MAIN: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr,
    HOLDS: gl.constexpr, OUTS: gl.constexpr,
):  # fmt: skip
    """Shared memory of a CTA: weights, rows of h, finished tiles, records of items."""
    words = gl.allocate_shared_memory(
        gl.int32, [STAGES * STEPS] + w_desc.block_type.shape, w_desc.layout
    )
    scales = gl.allocate_shared_memory(
        gl.int32, [STAGES * STEPS] + s_desc.block_type.shape, s_desc.layout
    )
    rows = gl.allocate_shared_memory(
        gl.float8e4nv, [HOLDS * STEPS, MAIN, 128], gl.NVMMASharedLayout(128, 8, 2)
    )
    tiles = gl.allocate_shared_memory(
        gl.bfloat16, [OUTS, MAIN, 64], gl.NVMMASharedLayout(128, 16, 2)
    )
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    factors = gl.allocate_shared_memory(gl.float32, [2 * HOLDS, MAIN], flat)
    targets = gl.allocate_shared_memory(gl.int32, [RECORDS, MAIN], flat)
    items = Items(gl.allocate_shared_memory(gl.int32, [RECORDS, 4], flat), targets)
    weights = Weights(words, scales, barriers(STAGES, 1), barriers(STAGES, 1))
    held = Held(rows, factors, barriers(HOLDS, MAIN // 32 + 1), barriers(HOLDS, 1))
    outs = Outs(tiles, barriers(OUTS, 1), barriers(OUTS, 1))
    return weights, held, outs, items


@gluon.jit
def gemm2_red(
    w_desc, s_desc, h_desc, work, routes, columns, y, sizes,
    MAIN: gl.constexpr, SMALL: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr,
    HOLDS: gl.constexpr, OUTS: gl.constexpr, WIDE: gl.constexpr, REGISTERS: gl.constexpr,
    PDL: gl.constexpr,
):
    """y (T, H) += by token. columns: scales and biases of the weights' rows."""
    weights, held, outs, items = memory(w_desc, s_desc, MAIN, STEPS, STAGES, HOLDS, OUTS)
    boxes = Boxes(w_desc, s_desc, h_desc)
    fence_async_shared()
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    gl.warp_specialize(
        [
            (multiply, (weights, held, outs, items.records, columns, y.columns, SMALL, WIDE)),
            (add, (y, outs, items)),
            (produce, (boxes, work, routes, weights, held, items, sizes,
                       columns.bias is not None)),
        ],
        [2, 1],
        [REGISTERS, REGISTERS],
    )


@dataclass(frozen=True, slots=True)
class Red:
    """How gemm2_red is cut for a problem.

    steps: K / 128; main: routes of a tile, small: of one that few routes fill; span: column tiles
    of 64 an item takes; stages: weight tiles in flight; holds: items whose rows of h are resident;
    outs: finished tiles that wait for the adding warps; registers: of a helper warp's thread.
    """

    steps: int
    main: int
    small: int
    span: int = 7
    stages: int = 3
    holds: int = 1
    outs: int = 2
    registers: int = 112

    @classmethod
    def of(cls, problem: Problem) -> "Red | None":
        """None where two CTAs do not fit on an SM: K over 384."""
        steps = -(-problem.intermediate // 128)
        if steps > 3:
            return None
        main = 128 if problem.routes > 72 * problem.experts else 64
        columns = -(-problem.hidden // COLUMNS)
        return cls(steps, main, 32, span_of(columns), stages=2 if steps == 3 else 3)

    def options(self) -> dict[str, Any]:
        """Keywords of the launch but for the weights' order."""
        return {
            "MAIN": self.main, "SMALL": self.small, "STEPS": self.steps, "STAGES": self.stages,
            "HOLDS": self.holds, "OUTS": self.outs, "REGISTERS": self.registers, "PDL": True,
            "num_warps": 4, "maxnreg": 128, "launch_pdl": True,
        }  # fmt: skip


def span_of(columns: int, least: int = 5, most: int = 9, wanted: int = 7) -> int:
    """Column tiles of an item: near `wanted`, and no short last group if that can be."""
    spans = range(least, most + 1)
    return min(spans, key=lambda span: (-columns % span, abs(span - wanted)))


def launch(
    h: SlotRows, weights: Packed, bias: Tensor | None, routed: Placed, tiles: Tiles,
    recipe: Recipe, red: Red, out: Tensor,
) -> Tensor:  # fmt: skip
    """Add stage 2 and the sum over a token's routes to out (T, H) bf16, which holds zeros.

    h: rows in sorted order, one per sorted position; weights: w2 in the order hopper_fp4q_w1 (or
    _wide); tiles: `worklist.tiles_by_expert(routed, red.main)`, drawn by one launch.
    """
    p = routed.problem
    words, scales = weight_boxes(weights, 4, 1)
    weight = routed.sorted_weights if recipe.weight_on == 2 else None
    gemm2_red[(2 * multiprocessors(out.device),)](
        words, scales,
        TensorDescriptor.from_tensor(h.codes, [32, 128], gl.NVMMASharedLayout(128, 8, 2)),
        Work(tiles.records, tiles.count), Routes(routed.sorted_token_ids, h.scales, weight),
        Columns(weights.row_scale, bias), Result(out, out.stride(0), p.hidden),
        Sizes(-(-p.hidden // 16), red.span, -(-p.hidden // COLUMNS)),
        WIDE=weights.order.fold is Fold.WIDE, **red.options(),
    )  # fmt: skip
    return out
