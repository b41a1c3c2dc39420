"""Stage 2 for many rows per expert and a short K: y[t] = sum_k w[t, k] (h W2^T + b), one kernel.

With K = I of a few hundred the product is cheap and its (T * topk, H) result is the cost: 940 MB at
T 8192, topk 8, H 7168. It never leaves the L2 here. Every CTA keeps the rows of h of its own routes
in shared memory for the whole kernel and walks the columns of H in slices of 64; slice s of the
result goes to slot s % RING of a ring (9 MB a slot at 73,000 routes) and, while later slices are
computed, other warps of all CTAs add up the topk rows of each token in float32, in slot order. So
the bits do not depend on timing, y needs no zeroing, and the scratch is a few percent of the rows.

Roles of a CTA (two CTAs on an SM): 4 matrix warps, a TMA producer warp, a warp that stores tiles
and announces slices, 2 warps that reduce. All CTAs must be resident, because they wait for each
other: the grid is never larger than the device holds.

Flow between CTAs, per slice: `written[s]` counts CTAs whose rows of slice s are visible,
`reduced[s]` CTAs that have read it; a slot is written again when the slice RING before is reduced.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mixmoe.backends.hopper.decode import barriers, multiprocessors
from mixmoe.backends.hopper.mainloop import (
    advance,
    cta_barrier,
    half_fragment,
    halves,
    load_units,
    smem_cast,
    tma_load,
    tma_store,
)
from mixmoe.backends.hopper.route import Placed
from mixmoe.backends.hopper.signals import announce, await_count, glance, proxy_fence
from mixmoe.backends.hopper.slots import SlotRows
from mixmoe.backends.hopper.worklist import Segments, Split, segments, weight_boxes
from mixmoe.fold import Fold
from mixmoe.preshuffle import Packed
from mixmoe.spec import Problem, Recipe

COLUMNS = 64  # columns of a slice: 128 B of bf16, one line of the L2


@gluon.jit
def segment(at):
    """A record of the work list: expert (-1 ends the list), first sorted block, blocks."""
    return gl.load(at), gl.load(at + 1), gl.load(at + 2)


@gluon.jit
def produce(
    w_desc, s_desc, h_desc, list_ptr, words, scales, rows, w_full, w_empty, h_full,
    units, slices,
    STEPS: gl.constexpr, STAGES: gl.constexpr, ROOM: gl.constexpr,
):
    """Role of the producer warp: the rows of h once, then the weights of every slice."""
    mine = list_ptr + gl.program_id(0) * (4 * (ROOM + 1))
    at = mine
    used = 0
    expert, block, blocks = segment(at)
    while expert >= 0:
        for b in range(blocks):
            mbarrier.expect(h_full, STEPS * h_desc.block_type.nbytes)
            for k in gl.static_range(STEPS):
                tma_load(h_desc, [(block + b) * 32, k * 128], h_full, rows.index(k * ROOM + used))
            used += 1
        at += 4
        expert, block, blocks = segment(at)
    for _ in range(used, ROOM):
        mbarrier.arrive(h_full, count=1)
    stage, phase = 0, 1
    for s in range(slices):
        at = mine
        expert = gl.load(at)
        while expert >= 0:
            unit = expert * units + s * 4
            at += 4
            expert = gl.load(at)
            full = w_full.index(stage)
            mbarrier.wait(w_empty.index(stage), phase)
            mbarrier.expect(
                full, STEPS * (w_desc.block_type.nbytes + s_desc.block_type.nbytes)
            )
            for k in gl.static_range(STEPS):
                tma_load(w_desc, [unit, k, 0], full, words.index(stage * STEPS + k))
                tma_load(s_desc, [unit, 16 * k], full, scales.index(stage * STEPS + k))
            stage, phase = advance(stage, phase, STAGES)


@gluon.jit
def piece(
    low, high, rows, out, out_full, out_empty, w_empty, release, put, put_phase, first, scale, bias,
    h_scale_ptr, at, N: gl.constexpr, STEPS: gl.constexpr, ROOM: gl.constexpr,
):
    """64 columns x N rows: the product over all of K, scaled, as bf16 in buffer `put` of `out`.

    The first piece gives the weights' stage back, and only after its product: a barrier does not
    wait for a warp's loads from shared memory, and behind the reducing warps' loads they can take
    longer than the refill (H200, 2026-11-24: a stale 16 bytes of scales in 3 of 120,000 tiles).
    """
    L: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 32]
    )
    A: gl.constexpr = gl.DotOperandLayout(0, L, 4)
    acc = gl.zeros([64, N], gl.float32, L)
    for k in gl.static_range(STEPS):
        x = smem_cast(
            rows.index(k * ROOM + first), gl.float8e4nv, [N, 128], gl.NVMMASharedLayout(128, 8, 2)
        )
        low0, low1 = halves(low[k])
        high0, high1 = halves(high[k])
        acc = warpgroup_mma(
            half_fragment(low0, high0, A, 1, 4), x.slice(0, 64, dim=1).permute((1, 0)), acc,
            use_acc=k > 0, is_async=True,
        )
        acc = warpgroup_mma(
            half_fragment(low1, high1, A, 1, 4), x.slice(64, 64, dim=1).permute((1, 0)), acc,
            is_async=True,
        )
    acc = warpgroup_mma_wait(0, deps=[acc])
    if release:
        mbarrier.arrive(w_empty, count=1)
    value = acc * gl.convert_layout(scale, gl.SliceLayout(1, L), assert_trivial=True)[:, None]
    if bias is not None:
        n = gl.arange(0, N, layout=gl.SliceLayout(0, L))
        value *= gl.load(h_scale_ptr + at + n)[None, :]
        value += gl.convert_layout(bias, gl.SliceLayout(1, L), assert_trivial=True)[:, None]
    mbarrier.wait(out_empty.index(put), put_phase)
    out.index(put).slice(0, N, dim=0).permute((1, 0)).store(value.to(gl.bfloat16))
    fence_async_shared()
    mbarrier.arrive(out_full.index(put), count=1)
    return advance(put, put_phase, out.shape[0])


@gluon.jit
def multiply(
    words, scales, rows, out, w_full, w_empty, h_full, out_full, out_empty, list_ptr,
    row_scale_ptr, bias_ptr, h_scale_ptr, H, slices,
    STEPS: gl.constexpr, STAGES: gl.constexpr, ROOM: gl.constexpr, WIDE: gl.constexpr,
):
    """Role of the matrix warps: 64 x K weights dequantised once, times all rows of a segment."""
    PIECE: gl.constexpr = out.shape[1]
    L: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, PIECE, 32]
    )
    mine = list_ptr + gl.program_id(0) * (4 * (ROOM + 1))
    m = gl.arange(0, 64, layout=gl.SliceLayout(1, L))
    stage, phase, put, put_phase = 0, 0, 0, 1
    mbarrier.wait(h_full, 0)
    for s in range(slices):
        at = mine
        first = 0
        expert, block, blocks = segment(at)
        column = s * 64 + m
        while expert >= 0:
            row = expert.to(gl.int64) * H + column
            scale = gl.load(row_scale_ptr + row, mask=column < H, other=0.0)
            bias = None
            if bias_ptr is not None:
                bias = gl.load(bias_ptr + row, mask=column < H, other=0.0)
            mbarrier.wait(w_full.index(stage), phase)
            low, high = (), ()
            for k in gl.static_range(STEPS):
                lo, hi = load_units(
                    words.index(stage * STEPS + k), scales.index(stage * STEPS + k), 1, 4, WIDE
                )
                low = low + (lo,)  # type: ignore[assignment]
                high = high + (hi,)  # type: ignore[assignment]
            b = 0
            while blocks - b > PIECE // 64:
                put, put_phase = piece(
                    low, high, rows, out, out_full, out_empty, w_empty.index(stage), b == 0,
                    put, put_phase, first + b, scale, bias, h_scale_ptr, (block + b) * 32,
                    PIECE, STEPS, ROOM,
                )
                b += PIECE // 32
            if PIECE > 64:  # noqa: SIM102 (the first is a constant, the second is not)
                if blocks - b == 2:
                    put, put_phase = piece(
                        low, high, rows, out, out_full, out_empty, w_empty.index(stage), b == 0,
                        put, put_phase, first + b, scale, bias, h_scale_ptr, (block + b) * 32,
                        64, STEPS, ROOM,
                    )
            if blocks - b == 1:
                put, put_phase = piece(
                    low, high, rows, out, out_full, out_empty, w_empty.index(stage), b == 0,
                    put, put_phase, first + b, scale, bias, h_scale_ptr, (block + b) * 32,
                    32, STEPS, ROOM,
                )
            stage, phase = advance(stage, phase, STAGES)
            first += blocks
            at += 4
            expert, block, blocks = segment(at)


@gluon.jit
def store_piece(whole_desc, ring_desc, out, row, blocks, WHOLE: gl.constexpr):
    """A finished piece of `blocks` blocks of 32 rows to the ring; WHOLE: a full one in one box."""
    BLOCKS: gl.constexpr = out.shape[0] // 32
    if WHOLE and blocks == BLOCKS:
        tma_store(whole_desc, [row, 0], out)
    else:
        for i in gl.static_range(BLOCKS):
            if i < blocks:
                tma_store(ring_desc, [row + i * 32, 0], out.slice(32 * i, 32, dim=0))


@gluon.jit
def store(
    whole_desc, ring_desc, out, out_full, out_empty, list_ptr, written_ptr, reduced_ptr, slot_rows,
    slices, ROOM: gl.constexpr, RING: gl.constexpr, RELAXED: gl.constexpr, LEAN: gl.constexpr,
    WHOLE: gl.constexpr,
):
    """Role of the storing warp: pieces in `out` to the ring, slices announced, slots awaited.

    Each wait (for a slice's stores to land, for a slot to be free) comes right after a buffer was
    given back, so that it falls into the time of the next piece. Of several buffers the one before
    is given back: its stores have been read when the newest ones are all that is pending.
    """
    OUTS: gl.constexpr = out.shape[0]
    BLOCKS: gl.constexpr = out.shape[1] // 32
    mine = list_ptr + gl.program_id(0) * (4 * (ROOM + 1))
    take, phase, stored = 0, 0, 0
    for s in range(slices):
        at = mine
        expert, block, blocks = segment(at)
        base = s % RING * slot_rows
        b = 0
        owed = gl.minimum(s, 1)
        while expert >= 0:
            mbarrier.wait(out_full.index(take), phase)
            left = gl.minimum(blocks - b, BLOCKS)
            store_piece(
                whole_desc, ring_desc, out.index(take), base + (block + b) * 32, left, WHOLE
            )
            tma.store_wait(OUTS - 1)
            if OUTS == 1:
                mbarrier.arrive(out_empty.index(take), count=1)
            else:
                if stored >= OUTS - 1:
                    mbarrier.arrive(out_empty.index((take + 1) % OUTS), count=1)
                stored += 1
            take, phase = advance(take, phase, OUTS)
            if owed == 1:
                announce(written_ptr, s - 1, LEAN)
            owed = 0
            b += BLOCKS
            if b >= blocks:
                at += 4
                expert, block, blocks = segment(at)
                b = 0
        if owed == 1:
            announce(written_ptr, s - 1, LEAN)
        if s + 1 >= RING:
            free = reduced_ptr + s + 1 - RING
            await_count(free, gl.num_programs(0), glance(free, RELAXED), RELAXED)
            proxy_fence(s)
    announce(written_ptr, slices - 1, LEAN)


@gluon.jit
def reduce(
    ring_ptr, y_ptr, position_ptr, h_scale_ptr, weight_ptr, positions, factors,
    written_ptr, reduced_ptr, slot_rows, T, H, y_stride, slices,
    TOPK: gl.constexpr, RING: gl.constexpr, TURNS: gl.constexpr, SCALED: gl.constexpr,
    RELAXED: gl.constexpr,
):
    """Role of the reducing warps: y = sum over the slots, float32, of ring rows x their factors."""
    N: gl.constexpr = positions.shape[1]
    L: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    n = gl.arange(0, N, layout=gl.SliceLayout(1, L))
    c = gl.arange(0, 64, layout=gl.SliceLayout(0, L))
    grid = gl.num_programs(0)
    t0 = (gl.program_id(0).to(gl.int64) * T // grid).to(gl.int32)
    t1 = ((gl.program_id(0) + 1).to(gl.int64) * T // grid).to(gl.int32)
    for i in range(TURNS):
        t = t0 + i * N + n
        for k in gl.static_range(TOPK):
            p = gl.load(position_ptr + t * TOPK + k, mask=t < t1, other=-1)
            f = gl.where(p >= 0, 1.0, 0.0)
            if weight_ptr is not None:
                f *= gl.load(weight_ptr + p, mask=p >= 0, other=0.0)
            if SCALED:
                f *= gl.load(h_scale_ptr + p, mask=p >= 0, other=0.0)
            positions.index(i * TOPK + k).store(p)
            factors.index(i * TOPK + k).store(f)
    seen = grid * 0
    for s in range(slices):
        await_count(written_ptr + s, grid, seen, RELAXED)
        base = ring_ptr + (s % RING * slot_rows).to(gl.int64) * 64
        for turn in gl.static_range(TURNS):
            total = gl.zeros([N, 64], gl.float32, L)
            for k in gl.static_range(TOPK):
                p = positions.index(turn * TOPK + k).load(gl.SliceLayout(1, L))
                f = factors.index(turn * TOPK + k).load(gl.SliceLayout(1, L))
                row = gl.load(
                    base + p[:, None] * 64 + c[None, :], mask=(p >= 0)[:, None], other=0.0,
                    cache_modifier=".cg",
                )
                total += row.to(gl.float32) * f[:, None]
            if turn + 1 == TURNS:
                seen = glance(written_ptr + gl.minimum(s + 1, slices - 1), RELAXED)
            t = t0 + turn * N + n
            column = s * 64 + c
            gl.store(
                y_ptr + t.to(gl.int64)[:, None] * y_stride + column[None, :],
                total.to(y_ptr.dtype.element_ty), mask=(t < t1)[:, None] & (column < H)[None, :],
            )
        # Relaxed: a store above was issued only when the loads it needs had returned, which is all
        # that a later write to the slot has to wait for.
        cta_barrier()
        gl.atomic_add(reduced_ptr + s, 1, sem="relaxed")


@gluon.jit
def gemm2_ring(
    w_desc, s_desc, h_desc, whole_desc, ring_desc, ring_ptr, y_ptr, position_ptr, h_scale_ptr,
    weight_ptr, row_scale_ptr, bias_ptr, list_ptr, written_ptr, reduced_ptr,
    T, H, y_stride, units, slices, slot_rows,
    TOPK: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr, ROOM: gl.constexpr,
    RING: gl.constexpr, TURNS: gl.constexpr, SPAN: gl.constexpr, WIDE: gl.constexpr,
    OUTS: gl.constexpr, RELAXED: gl.constexpr, LEAN: gl.constexpr, WHOLE: gl.constexpr,
    REDUCE_REGISTERS: gl.constexpr,
    PDL: gl.constexpr,
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
    out = gl.allocate_shared_memory(
        gl.bfloat16, [OUTS] + whole_desc.block_type.shape, whole_desc.layout
    )
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    positions = gl.allocate_shared_memory(gl.int32, [TURNS * TOPK, SPAN], flat)
    factors = gl.allocate_shared_memory(gl.float32, [TURNS * TOPK, SPAN], flat)
    w_full = barriers(STAGES, 1)
    w_empty = barriers(STAGES, 1)
    h_full = barriers(1, ROOM).index(0)
    out_full, out_empty = barriers(OUTS, 1), barriers(OUTS, 1)
    fence_async_shared()
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    gl.warp_specialize(
        [
            (multiply, (words, scales, rows, out, w_full, w_empty, h_full, out_full, out_empty,
                        list_ptr, row_scale_ptr, bias_ptr, h_scale_ptr, H, slices,
                        STEPS, STAGES, ROOM, WIDE)),
            (reduce, (ring_ptr, y_ptr, position_ptr, h_scale_ptr, weight_ptr, positions, factors,
                      written_ptr, reduced_ptr, slot_rows, T, H, y_stride, slices,
                      TOPK, RING, TURNS, bias_ptr is None, RELAXED)),
            (produce, (w_desc, s_desc, h_desc, list_ptr, words, scales, rows, w_full, w_empty,
                       h_full, units, slices, STEPS, STAGES, ROOM)),
            (store, (whole_desc, ring_desc, out, out_full, out_empty, list_ptr, written_ptr,
                     reduced_ptr, slot_rows, slices, ROOM, RING, RELAXED, LEAN, WHOLE)),
        ],
        [2, 1, 1],
        [REDUCE_REGISTERS, REDUCE_REGISTERS, REDUCE_REGISTERS],
    )


@dataclass(frozen=True, slots=True)
class Ring:
    """How gemm2_ring is cut for a problem.

    steps: K / 128; room: 32-route blocks of h a CTA holds; stages: weight tiles in flight; slots:
    of the ring; registers: of a helper warp's thread (a matrix warp's has 256 less that); ctas: of
    the grid, all resident. piece: routes multiplied at a time, outs: finished pieces that wait for
    the storing warp; relaxed: counters are polled without acquiring; lean: one fence less before a
    slice is announced; whole: full pieces go out in one box; equal: CTAs get equal shares of the
    blocks even where each expert could have a CTA of its own.
    """

    steps: int
    room: int
    stages: int
    slots: int
    registers: int
    ctas: int
    piece: int = 128
    outs: int = 1
    relaxed: bool = False
    lean: bool = False
    whole: bool = False
    equal: bool = False

    @classmethod
    def of(cls, problem: Problem, device: torch.device, slots: int = 4) -> "Ring | None":
        """None where h does not fit: K over 384, or more routes than all CTAs hold."""
        steps = -(-problem.intermediate // 128)
        cuts = {1: (20, 2, 120), 2: (10, 1, 120), 3: (6, 1, 104)}
        if steps not in cuts:
            return None
        room, stages, registers = cuts[steps]
        ring = cls(steps, room, stages, slots, registers, 2 * multiprocessors(device))
        return ring if problem.padded_routes(32) <= ring.ctas * room * 32 else None

    def split(self, problem: Problem) -> Split:
        """The segments it works on, and two counters a slice."""
        return Split(self.ctas, self.room, 2 * -(-problem.hidden // COLUMNS), self.equal)


def slot_boxes(scratch: Tensor, rows: int) -> TensorDescriptor:
    """TMA boxes of a slice's rows in the ring."""
    return TensorDescriptor.from_tensor(
        scratch, [rows, COLUMNS], gl.NVMMASharedLayout(128, 16, 2)
    )


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
    scratch = torch.empty((ring.slots * slot_rows, COLUMNS), dtype=torch.bfloat16, device=device)
    work = segments(routed, ring.split(p)) if work is None else work
    counters = work.counters
    span = 16
    words, scales = weight_boxes(weights, 4, 1)
    weight = routed.sorted_weights if recipe.weight_on == 2 else None
    gemm2_ring[(ring.ctas,)](
        words, scales,
        TensorDescriptor.from_tensor(h.codes, [32, 128], gl.NVMMASharedLayout(128, 8, 2)),
        slot_boxes(scratch, ring.piece), slot_boxes(scratch, 32),
        scratch, out, routed.position, h.scales, weight, weights.row_scale, bias,
        work.records, counters, counters[slices:],
        p.tokens, p.hidden, out.stride(0), -(-p.hidden // 16), slices, slot_rows,
        p.topk, ring.steps, ring.stages, ring.room, ring.slots, -(-p.tokens // (ring.ctas * span)),
        span, weights.order.fold is Fold.WIDE, ring.outs, ring.relaxed,
        ring.lean, ring.whole, ring.registers, True,
        num_warps=4, maxnreg=128, launch_pdl=True,
    )  # fmt: skip
    return out
