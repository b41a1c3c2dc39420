"""Stage 2 for many rows per expert and a short K: y[t] = sum_k w[t, k] (h W2^T + b), one kernel.

With K = I of a few hundred the product is cheap and its (T * topk, H) result is the cost: 940 MB at
T 8192, topk 8, H 7168. It is read back from the L2 here. Every CTA keeps the rows of h of its own
routes in shared memory for the whole kernel and walks the columns of H in slices of 64. A group of
GROUP slices goes to slot `group % RING` of a ring (9 MB a slice at 73,000 routes) and, while later
groups are computed, other warps of all CTAs add up the topk rows of each token in float32, in slot
order. So the bits do not depend on timing, y needs no zeroing, and the scratch is a few percent of
the rows.

Roles of a CTA (two CTAs on an SM): 4 matrix warps, which store their products to the ring, by way
of shared memory as whole lines of the L2; 2 warps that reduce; a warp that loads weights and
announces groups; a warp that watches the other CTAs. All CTAs must be resident, because they wait
for each other: the grid is never larger than the device holds, and starts as a whole.

Between CTAs `written[g]` counts those whose rows of group g are visible, `reduced[g]` those that
have read it; a slot is written again when the group RING before is reduced. Within a CTA nothing
but the watching warp polls, and nobody else waits for another CTA's memory:

    granted  watching -> matrix warps: the slot may be written    (reduced[g - RING] is complete)
    done     matrix warps -> loading warp: all stores are issued  (it makes them visible, counts)
    ready    watching -> reducing warps: the group can be read    (written[g] is complete)

Each is a barrier per slot: the next phase of one cannot complete before the last was waited for,
because a slot is granted again only after this CTA, too, has announced and reduced what was in it.

Nothing that the matrix warps need in a slice may come from global memory when they need it: the
scales of the weights' rows come with the weights, the work list lies in shared memory.

What the L2 is asked for is what holds many tokens (docs/measured-prefill.md). A row of the ring is
64 columns of a route, one line, and a warp stores four whole lines at once (H200, 2026-11-28, T
8192: 504 us, 561 where lanes stored eight bytes each of eight lines). Rows of padding, which nobody
reads, are not stored (538 of 561; both: 494).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
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

from mixmoe.backends.hopper.decode import barriers, multiprocessors
from mixmoe.backends.hopper.gemm2_decode import Vectors, row_box, vector, vector_ring
from mixmoe.backends.hopper.gemm2_prefill_load import (
    Boxes,
    Held,
    Sizes,
    Weights,
    count_of,
    keep_list,
    produce,
)
from mixmoe.backends.hopper.gemm2_prefill_sum import (
    Counters,
    Places,
    Result,
    Routes,
    Slots,
    reduce,
    watch,
)
from mixmoe.backends.hopper.launch import TOGETHER
from mixmoe.backends.hopper.mainloop import (
    advance,
    cta_barrier,
    half_fragment,
    halves,
    load_units,
    read_record,
    smem_cast,
)
from mixmoe.backends.hopper.route import Placed
from mixmoe.backends.hopper.signals import LINE
from mixmoe.backends.hopper.slots import SlotRows
from mixmoe.backends.hopper.worklist import Segments, Split, segments, weight_boxes
from mixmoe.fold import Fold
from mixmoe.preshuffle import Packed
from mixmoe.spec import Problem, Recipe

# From Triton 3.9 on a view of shared memory cannot be cast to a longer one, as `piece` does.
COMPILES = tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 6)
COLUMNS = 64  # columns of a slice: 128 B of bf16, one line of the L2
# Steps of K -> room, stages, registers; the first that holds the routes and fits. Nine blocks a
# CTA: an expert of ten is split over CTAs that have none (H200, T 8192: 613 us against 630).
CUTS = {1: ((20, 4, 120),), 2: ((9, 3, 120), (10, 2, 120)), 3: ((6, 2, 104),)}
SHARED = 228 * 1024 // 2 - 1024  # bytes of shared memory of each of two CTAs
KEPT = 576  # bytes of it, at most, for barriers and what Triton hands to the roles
BUDGET = 24 << 20  # bytes of the L2 that a ring of four slots may take; else it has three


class Staging(NamedTuple):
    """Two buffers of 32 rows x 64 columns on their way to the ring."""

    low: Any
    high: Any


class Slice(NamedTuple):
    """64 weight rows, decoded: (lo, hi) of each step of K, scales and biases (or None)."""

    low: Any
    high: Any
    scale: Any
    bias: Any


@gluon.jit
def fragments(weights, stage, WIDE: gl.constexpr):
    """A stage's weights, decoded: for each step of K (lo, hi) of `load_units`."""
    STEPS: gl.constexpr = weights.words.shape[0] // weights.full.shape[0]
    low, high = (), ()
    for k in gl.static_range(STEPS):
        at = stage * STEPS + k
        lo, hi = load_units(weights.words.index(at), weights.scales.index(at), 1, 4, WIDE)
        low = low + (lo,)  # type: ignore[assignment]
        high = high + (hi,)  # type: ignore[assignment]
    return low, high


@gluon.jit
def store_block(value, memory, target, left, first: gl.constexpr):
    """bf16 (64 columns, 32 rows) -> rows first .. first + 31 at `target`, but for those from `left`
    on."""
    L: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    n = gl.arange(0, 32, layout=gl.SliceLayout(1, L)) + first
    c = gl.arange(0, 64, layout=gl.SliceLayout(0, L))
    memory.permute((1, 0)).store(value)
    at = target + (n[:, None] * 64 + c[None, :])
    gl.store(at, memory.load(L), mask=(n < left)[:, None])


@gluon.jit
def store_rows(value, staging, target, left):
    """bf16 (64 columns, N) -> the first `left` of N rows at `target`, each a whole line.

    The buffers take turns, so the barrier between the stores to one and its loads also lies between
    the loads from the other and the next stores to it.
    """
    N: gl.constexpr = value.shape[1]
    if N == 64:
        low, high = value.reshape([64, 2, 32]).permute((0, 2, 1)).split()
        store_block(low, staging.low, target, left, 0)
        store_block(high, staging.high, target, left, 32)
    else:
        store_block(value, staging.low, target, left, 0)


@gluon.jit
def piece(
    w, rows, first, left, h_scale_ptr, target, staging, N: gl.constexpr, STEPS: gl.constexpr
):
    """64 columns x N rows from block `first` on: the product over all of K, scaled, as bf16 rows at
    `target`, but for those from `left` on."""
    ROOM: gl.constexpr = rows.shape[0] // STEPS
    L: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 32]
    )
    A: gl.constexpr = gl.DotOperandLayout(0, L, 4)
    acc = gl.zeros([64, N], gl.float32, L)
    for k in gl.static_range(STEPS):
        x = smem_cast(
            rows.index(k * ROOM + first), gl.float8e4nv, [N, 128], gl.NVMMASharedLayout(128, 8, 2)
        )
        lows, highs = halves(w.low[k]), halves(w.high[k])
        for h in gl.static_range(2):
            acc = warpgroup_mma(
                half_fragment(lows[h], highs[h], A, 1, 4),
                x.slice(h * 64, 64, dim=1).permute((1, 0)), acc, use_acc=k + h > 0, is_async=True,
            )  # fmt: skip
    acc = warpgroup_mma_wait(0, deps=[acc])
    value = acc * gl.convert_layout(w.scale, gl.SliceLayout(1, L), assert_trivial=True)[:, None]
    if w.bias is not None:
        n = gl.arange(0, N, layout=gl.SliceLayout(0, L))
        value *= gl.load(h_scale_ptr + n)[None, :]
        value += gl.convert_layout(w.bias, gl.SliceLayout(1, L), assert_trivial=True)[:, None]
    store_rows(value.to(gl.bfloat16), staging, target, left)


@gluon.jit
def multiply(
    weights, held, slots, ring_ptr, records, h_scale_ptr, staging, sizes, groups,
    GROUP: gl.constexpr, WIDE: gl.constexpr,
):
    """Role of the matrix warps: 64 x K weights dequantised once, times all rows of a segment, into
    the ring."""
    L: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 32]
    )
    STAGES: gl.constexpr = weights.full.shape[0]
    STEPS: gl.constexpr = weights.words.shape[0] // STAGES
    count = count_of(records)
    stage, phase, slot, turn = 0, 0, 0, 1
    mbarrier.wait(held.full, 0)
    for group in range(groups):
        for s in range(group * GROUP, gl.minimum(group * GROUP + GROUP, sizes.slices)):
            place = (slot * GROUP + s - group * GROUP) * sizes.slot_rows
            first = 0
            for i in range(count):
                expert, block, blocks, routes = read_record(records, i)
                mbarrier.wait(weights.full.index(stage), phase)
                scale = vector(weights.vectors.scale, stage, L)
                bias = None
                if weights.vectors.bias is not None:
                    bias = vector(weights.vectors.bias, stage, L)
                low, high = fragments(weights, stage, WIDE)
                w = Slice(low, high, scale, bias)
                mbarrier.wait(slots.granted.index(slot), turn)
                target = ring_ptr + (place + block * 32).to(gl.int64) * 64
                factor_ptr = h_scale_ptr + block * 32
                b = 0
                while blocks - b > 1:
                    piece(
                        w, held.rows, first + b, routes - b * 32, factor_ptr + b * 32,
                        target + b * (32 * 64), staging, 64, STEPS,
                    )  # fmt: skip
                    b += 2
                if blocks - b == 1:
                    piece(
                        w, held.rows, first + b, routes - b * 32, factor_ptr + b * 32,
                        target + b * (32 * 64), staging, 32, STEPS,
                    )  # fmt: skip
                # Only now: a barrier does not wait for a warp's loads from shared memory, and
                # behind the reducing warps' loads they can take longer than the refill (H200,
                # 2026-11-24: a stale 16 bytes of scales in 3 of 120,000 tiles). Products do.
                mbarrier.arrive(weights.empty.index(stage), count=1)
                stage, phase = advance(stage, phase, STAGES)
                first += blocks
        mbarrier.wait(slots.granted.index(slot), turn)  # for a CTA without segments, too
        cta_barrier()  # every warp's stores before one thread's arrival
        mbarrier.arrive(slots.done.index(slot), count=1)
        slot, turn = advance(slot, turn, slots.granted.shape[0])


@gluon.jit
def gemm2_ring(
    w_desc, s_desc, r_desc, b_desc, h_desc, ring_ptr, list_ptr, routes, counters, out, sizes,
    TOPK: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr, ROOM: gl.constexpr,
    RING: gl.constexpr, GROUP: gl.constexpr, TURNS: gl.constexpr, SPAN: gl.constexpr,
    AHEAD: gl.constexpr, WIDE: gl.constexpr, REGISTERS: gl.constexpr, PDL: gl.constexpr,
):
    words = gl.allocate_shared_memory(
        gl.int32, [STAGES * STEPS] + w_desc.block_type.shape, w_desc.layout
    )
    scales = gl.allocate_shared_memory(
        gl.int32, [STAGES * STEPS] + s_desc.block_type.shape, s_desc.layout
    )
    rows = gl.allocate_shared_memory(
        gl.float8e4nv, [STEPS * ROOM, 32, 128], gl.NVMMASharedLayout(128, 8, 2)
    )
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    places = Places(
        gl.allocate_shared_memory(gl.int32, [TURNS * TOPK, SPAN], flat),
        gl.allocate_shared_memory(gl.float32, [TURNS * TOPK, SPAN], flat),
    )
    full, empty = barriers(STAGES, 1), barriers(STAGES, 1)
    bias = None
    if b_desc is not None:
        bias = vector_ring(b_desc, STAGES)
    weights = Weights(words, scales, Vectors(vector_ring(r_desc, STAGES), bias), full, empty)
    held = Held(rows, barriers(1, ROOM).index(0))
    slots = Slots(barriers(RING, 1), barriers(RING, 1), barriers(RING, 1))
    boxes = Boxes(w_desc, s_desc, r_desc, b_desc, h_desc)
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    staging = Staging(
        gl.allocate_shared_memory(gl.bfloat16, [32, 64], swizzled),
        gl.allocate_shared_memory(gl.bfloat16, [32, 64], swizzled),
    )
    fence_async_shared()
    groups = (sizes.slices + GROUP - 1) // GROUP
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    records = keep_list(list_ptr, ROOM)
    gl.warp_specialize(
        [
            (multiply, (weights, held, slots, ring_ptr, records, routes.scales, staging, sizes,
                        groups, GROUP, WIDE)),
            (reduce, (ring_ptr, out, routes, places, slots.ready, counters.reduced,
                      sizes.slot_rows, groups, TOPK, GROUP, AHEAD, b_desc is None)),
            (produce, (boxes, records, counters.written, weights, held, slots.done, sizes, groups,
                       GROUP)),
            (watch, (counters, slots, groups)),
        ],
        [2, 1, 1],
        [REGISTERS, REGISTERS, REGISTERS],
    )


@dataclass(frozen=True, slots=True)
class Ring:
    """How gemm2_ring is cut for a problem.

    steps: K / 128; room: 32-route blocks of h a CTA holds; stages: weight tiles in flight;
    registers: of a helper warp's thread (a matrix warp's has 256 less that); ctas: of the grid, all
    resident; slots: of the ring, of `group` slices each; span: tokens reduced at a time; ahead: of
    their rows a lane has under way.
    """

    steps: int
    room: int
    stages: int
    registers: int
    ctas: int
    slots: int
    group: int
    span: int
    ahead: int

    @classmethod
    def of(cls, problem: Problem, device: torch.device, slots: int = 0) -> "Ring | None":
        """None where no cut fits: K over 384, more routes than all CTAs hold, a large topk."""
        rows, ctas = problem.padded_routes(32), 2 * multiprocessors(device)
        few = problem.tokens <= 8 * ctas
        group, span = (2, 8) if few else (1, 16)
        slots = slots or (4 if 4 * group * rows * COLUMNS * 2 <= BUDGET else 3)
        steps = -(-problem.intermediate // 128)
        cuts = (
            cls(steps, room, stages, registers, ctas, slots, group, span, 128 // span)
            for room, stages, registers in CUTS.get(steps, ())
        )
        return next((cut for cut in cuts if cut.holds(rows) and cut.fits(problem)), None)

    def holds(self, rows: int) -> bool:
        """Whether there is room for so many rows, however they lie."""
        return rows <= self.ctas * self.room * 32

    def fits(self, problem: Problem) -> bool:
        """Whether two CTAs share an SM; else they would wait for each other forever."""
        return self.shared(problem) <= SHARED

    def shared(self, problem: Problem) -> int:
        """Bytes of shared memory of a CTA, at most: weights with scales and biases of their rows,
        rows of h, positions and factors of the routes, staging, work list, and what is KEPT."""
        weights = self.stages * (self.steps * (4096 + 256) + 2 * COLUMNS * 4)
        rows = self.steps * self.room * 32 * 128
        places = self.turns(problem.tokens) * problem.topk * self.span * 8
        staging = 2 * 32 * COLUMNS * 2
        fields = 64 if 4 * (self.room + 1) <= 64 else 128
        return weights + rows + places + staging + 4 * fields + KEPT

    def turns(self, tokens: int) -> int:
        """How often `span` tokens go into a CTA's."""
        return -(-tokens // (self.ctas * self.span))

    def split(self, problem: Problem) -> Split:
        """The segments it works on, and two counters a slice."""
        return Split(self.ctas, self.room, 2 * LINE * -(-problem.hidden // COLUMNS))

    def options(self, tokens: int) -> dict[str, Any]:
        """Keywords of the launch but for topk and the weights' order."""
        return {
            "STEPS": self.steps, "STAGES": self.stages, "ROOM": self.room, "RING": self.slots,
            "GROUP": self.group, "TURNS": self.turns(tokens), "SPAN": self.span,
            "AHEAD": self.ahead, "REGISTERS": self.registers, "PDL": True,
            "num_warps": 4, "maxnreg": 128, "launch_pdl": True, **TOGETHER,
        }  # fmt: skip


def launch(
    h: SlotRows, weights: Packed, bias: Tensor | None, routed: Placed, recipe: Recipe,
    ring: Ring, out: Tensor, work: Segments | None = None,
) -> Tensor:
    """Run stage 2 and the sum over a token's routes: out (T, H).

    h: rows in sorted order, one per sorted position; weights: w2 in the order hopper_fp4q_w1 (or
    _wide); routed.block == 32; work: segments of `ring.split`, for one launch.
    """
    p = routed.problem
    device = out.device
    slices = -(-p.hidden // COLUMNS)
    slot_rows = h.codes.shape[0]
    shape = (ring.slots * ring.group * slot_rows, COLUMNS)
    scratch = torch.empty(shape, dtype=torch.bfloat16, device=device)
    work = segments(routed, ring.split(p)) if work is None else work
    counters = work.counters
    words, scales = weight_boxes(weights, 4, 1)
    weight = routed.sorted_weights if recipe.weight_on == 2 else None
    gemm2_ring[(ring.ctas,)](
        words, scales, row_box(weights.row_scale),  # type: ignore[arg-type]
        None if bias is None else row_box(bias),
        TensorDescriptor.from_tensor(h.codes, [32, 128], gl.NVMMASharedLayout(128, 8, 2)),
        scratch, work.records, Routes(routed.position, h.scales, weight),
        Counters(counters, counters[slices * LINE :]),
        Result(out, out.stride(0), p.tokens, p.hidden),
        Sizes(-(-p.hidden // 16), slices, slot_rows),
        TOPK=p.topk, WIDE=weights.order.fold is Fold.WIDE, **ring.options(p.tokens),
    )  # fmt: skip
    return out
