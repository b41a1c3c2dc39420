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

from mixmoe.backends.hopper.decode import multiprocessors
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
from mixmoe.backends.hopper.slots import SlotRows
from mixmoe.backends.hopper.worklist import segments, weight_boxes
from mixmoe.fold import Fold
from mixmoe.preshuffle import Packed
from mixmoe.spec import Problem, Recipe

COLUMNS = 64  # columns of a slice: 128 B of bf16, one line of the L2


@gluon.jit
def observe(ptr):
    """The counter at `ptr`, with everything that happened before its last increment."""
    return gl.inline_asm_elementwise(
        "ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [ptr.to(gl.uint64)],
        dtype=gl.int32, is_pure=False, pack=1,
    )


@gluon.jit
def await_count(ptr, count):
    seen = observe(ptr)
    while seen < count:
        seen = observe(ptr)


@gluon.jit
def bulk_stores_done(zero):
    """All TMA stores of this warp are visible to it (`tma.store_wait`: only read)."""
    return gl.inline_asm_elementwise(
        "cp.async.bulk.wait_group 0; fence.proxy.async; mov.b32 $0, $1;", "=r,r", [zero],
        dtype=gl.int32, is_pure=False, pack=1,
    )


@gluon.jit
def proxy_fence(zero):
    """Orders what this thread observed before TMA stores that follow from it."""
    return gl.inline_asm_elementwise(
        "fence.proxy.async; mov.b32 $0, $1;", "=r,r", [zero],
        dtype=gl.int32, is_pure=False, pack=1,
    )


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
    low, high, rows, out, out_full, out_empty, w_empty, release, out_phase, first, scale, bias,
    h_scale_ptr, at, N: gl.constexpr, STEPS: gl.constexpr, ROOM: gl.constexpr,
):
    """64 columns x N rows: the product over all of K, scaled, as bf16 in `out`.

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
    mbarrier.wait(out_empty, out_phase)
    out.slice(0, N, dim=0).permute((1, 0)).store(value.to(gl.bfloat16))
    fence_async_shared()
    mbarrier.arrive(out_full, count=1)
    return out_phase ^ 1


@gluon.jit
def multiply(
    words, scales, rows, out, w_full, w_empty, h_full, out_full, out_empty, list_ptr,
    row_scale_ptr, bias_ptr, h_scale_ptr, H, slices,
    STEPS: gl.constexpr, STAGES: gl.constexpr, ROOM: gl.constexpr, WIDE: gl.constexpr,
):
    """Role of the matrix warps: 64 x K weights dequantised once, times all rows of a segment."""
    L: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32]
    )
    mine = list_ptr + gl.program_id(0) * (4 * (ROOM + 1))
    m = gl.arange(0, 64, layout=gl.SliceLayout(1, L))
    stage, phase, out_phase = 0, 0, 1
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
            while blocks - b > 2:
                out_phase = piece(
                    low, high, rows, out, out_full, out_empty, w_empty.index(stage), b == 0,
                    out_phase, first + b, scale, bias, h_scale_ptr, (block + b) * 32,
                    128, STEPS, ROOM,
                )
                b += 4
            if blocks - b == 2:
                out_phase = piece(
                    low, high, rows, out, out_full, out_empty, w_empty.index(stage), b == 0,
                    out_phase, first + b, scale, bias, h_scale_ptr, (block + b) * 32,
                    64, STEPS, ROOM,
                )
            elif blocks - b == 1:
                out_phase = piece(
                    low, high, rows, out, out_full, out_empty, w_empty.index(stage), b == 0,
                    out_phase, first + b, scale, bias, h_scale_ptr, (block + b) * 32,
                    32, STEPS, ROOM,
                )
            stage, phase = advance(stage, phase, STAGES)
            first += blocks
            at += 4
            expert, block, blocks = segment(at)


@gluon.jit
def announce(written_ptr, s):
    """Make the stores of slice s visible, then count this CTA."""
    bulk_stores_done(s)
    gl.atomic_add(written_ptr + s, 1, sem="release")


@gluon.jit
def store(
    ring_desc, out, out_full, out_empty, list_ptr, written_ptr, reduced_ptr, slot_rows, slices,
    ROOM: gl.constexpr, RING: gl.constexpr,
):
    """Role of the storing warp: tiles of `out` to the ring, slices announced, slots awaited.

    Each wait (for a slice's stores to land, for a slot to be free) comes right after `out` was
    given back, so that it falls into the time of the next tile.
    """
    mine = list_ptr + gl.program_id(0) * (4 * (ROOM + 1))
    phase = 0
    for s in range(slices):
        at = mine
        expert, block, blocks = segment(at)
        base = s % RING * slot_rows
        b = 0
        owed = gl.minimum(s, 1)
        while expert >= 0:
            mbarrier.wait(out_full, phase)
            phase ^= 1
            left = gl.minimum(blocks - b, 4)
            for i in gl.static_range(4):
                if i < left:
                    tma_store(
                        ring_desc, [base + (block + b + i) * 32, 0], out.slice(32 * i, 32, dim=0)
                    )
            tma.store_wait(0)
            mbarrier.arrive(out_empty, count=1)
            if owed == 1:
                announce(written_ptr, s - 1)
            owed = 0
            b += 4
            if b >= blocks:
                at += 4
                expert, block, blocks = segment(at)
                b = 0
        if owed == 1:
            announce(written_ptr, s - 1)
        if s + 1 >= RING:
            await_count(reduced_ptr + s + 1 - RING, gl.num_programs(0))
            proxy_fence(s)
    announce(written_ptr, slices - 1)


@gluon.jit
def reduce(
    ring_ptr, y_ptr, position_ptr, h_scale_ptr, weight_ptr, positions, factors,
    written_ptr, reduced_ptr, slot_rows, T, H, y_stride, slices,
    TOPK: gl.constexpr, RING: gl.constexpr, TURNS: gl.constexpr, SCALED: gl.constexpr,
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
        while seen < grid:
            seen = observe(written_ptr + s)
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
                seen = observe(written_ptr + gl.minimum(s + 1, slices - 1))
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
def barriers(count: gl.constexpr, arrivals: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [count, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(count):
        mbarrier.init(bars.index(i), count=arrivals)
    return bars


@gluon.jit
def gemm2_ring(
    w_desc, s_desc, h_desc, ring_desc, ring_ptr, y_ptr, position_ptr, h_scale_ptr, weight_ptr,
    row_scale_ptr, bias_ptr, list_ptr, written_ptr, reduced_ptr,
    T, H, y_stride, units, slices, slot_rows,
    TOPK: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr, ROOM: gl.constexpr,
    RING: gl.constexpr, TURNS: gl.constexpr, SPAN: gl.constexpr, WIDE: gl.constexpr,
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
    out = gl.allocate_shared_memory(gl.bfloat16, [128, 64], gl.NVMMASharedLayout(128, 16, 2))
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    positions = gl.allocate_shared_memory(gl.int32, [TURNS * TOPK, SPAN], flat)
    factors = gl.allocate_shared_memory(gl.float32, [TURNS * TOPK, SPAN], flat)
    w_full = barriers(STAGES, 1)
    w_empty = barriers(STAGES, 1)
    h_full = barriers(1, ROOM).index(0)
    out_full = barriers(1, 1).index(0)
    out_empty = barriers(1, 1).index(0)
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
                      TOPK, RING, TURNS, bias_ptr is None)),
            (produce, (w_desc, s_desc, h_desc, list_ptr, words, scales, rows, w_full, w_empty,
                       h_full, units, slices, STEPS, STAGES, ROOM)),
            (store, (ring_desc, out, out_full, out_empty, list_ptr, written_ptr, reduced_ptr,
                     slot_rows, slices, ROOM, RING)),
        ],
        [2, 1, 1],
        [REDUCE_REGISTERS, REDUCE_REGISTERS, REDUCE_REGISTERS],
    )


@dataclass(frozen=True, slots=True)
class Ring:
    """How gemm2_ring is cut for a problem.

    steps: K / 128; room: 32-route blocks of h a CTA holds; stages: weight tiles in flight; slots:
    of the ring; registers: of a helper warp's thread (a matrix warp's has 256 less that); ctas: of
    the grid, all resident.
    """

    steps: int
    room: int
    stages: int
    slots: int
    registers: int
    ctas: int

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


def launch(
    h: SlotRows, weights: Packed, bias: Tensor | None, routed: Placed, recipe: Recipe,
    ring: Ring, out: Tensor,
) -> Tensor:
    """Run stage 2 and the sum over a token's routes: out (T, H).

    h: rows in sorted order, one per sorted position; weights: w2 in the order hopper_fp4q_w1 (or
    _wide); routed.block == 32.
    """
    p = routed.problem
    device = out.device
    slices = -(-p.hidden // COLUMNS)
    slot_rows = h.codes.shape[0]
    scratch = torch.empty((ring.slots * slot_rows, COLUMNS), dtype=torch.bfloat16, device=device)
    counters = torch.empty(2 * slices, dtype=torch.int32, device=device)
    lists = segments(routed, ring.ctas, ring.room, counters)
    span = 16
    words, scales = weight_boxes(weights, 4, 1)
    weight = routed.sorted_weights if recipe.weight_on == 2 else None
    gemm2_ring[(ring.ctas,)](
        words, scales,
        TensorDescriptor.from_tensor(h.codes, [32, 128], gl.NVMMASharedLayout(128, 8, 2)),
        TensorDescriptor.from_tensor(scratch, [32, COLUMNS], gl.NVMMASharedLayout(128, 16, 2)),
        scratch, out, routed.position, h.scales, weight, weights.row_scale, bias,
        lists, counters, counters[slices:],
        p.tokens, p.hidden, out.stride(0), -(-p.hidden // 16), slices, slot_rows,
        p.topk, ring.steps, ring.stages, ring.room, ring.slots, -(-p.tokens // (ring.ctas * span)),
        span, weights.order.fold is Fold.WIDE, ring.registers, True,
        num_warps=4, maxnreg=128, launch_pdl=True,
    )  # fmt: skip
    return out
