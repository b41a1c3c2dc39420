"""What `gemm2_prefill.gemm2_ring` loads: a CTA's work list and rows of h once, then weights."""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from mixmoe.backends.hopper.mainloop import advance, read_record, smem_cast, tma_load
from mixmoe.backends.hopper.signals import PITCH


class Boxes(NamedTuple):
    """TMA descriptors: weights' words and scales, scales and biases (or None) of their rows; h."""

    words: Any
    scales: Any
    row_scales: Any
    biases: Any
    rows: Any


class Weights(NamedTuple):
    """Stages of weights, with the `Vectors` of their rows; `full` and `empty` guard each."""

    words: Any
    scales: Any
    vectors: Any
    full: Any
    empty: Any


class Held(NamedTuple):
    """The rows of h of this CTA, which stay, by step of K and block, and the barrier that says that
    they are there."""

    rows: Any
    full: Any


class Sizes(NamedTuple):
    """Weight units of an expert, slices of 64 columns, rows of a slice in the ring."""

    units: Any
    slices: Any
    slot_rows: Any


@gluon.jit
def keep_list(list_ptr, ROOM: gl.constexpr):
    """This CTA's work list in shared memory, where a record is near: in every slice a load of one
    from global memory would be waited for."""
    N: gl.constexpr = 4 * (ROOM + 1)
    FIELDS: gl.constexpr = 64 if N <= 64 else 128
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    i = gl.arange(0, FIELDS, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    fields = gl.load(list_ptr + gl.program_id(0) * N + i, mask=i < N, other=-1)
    memory = gl.allocate_shared_memory(gl.int32, [FIELDS], flat)
    memory.store(fields)
    return smem_cast(memory, gl.int32, [FIELDS // 4, 4], flat)


@gluon.jit
def count_of(records):
    """How many segments a list has; expert -1 ends it."""
    count = gl.program_id(0) * 0
    expert, block, blocks, routes = read_record(records, count)
    while expert >= 0:
        count += 1
        expert, block, blocks, routes = read_record(records, count)
    return count


@gluon.jit
def load_rows(h_desc, records, count, held, STEPS: gl.constexpr):
    """The rows of h of all segments, which stay."""
    ROOM: gl.constexpr = held.rows.shape[0] // STEPS
    used = count * 0
    for i in range(count):
        expert, block, blocks, routes = read_record(records, i)
        for b in range(blocks):
            mbarrier.expect(held.full, STEPS * h_desc.block_type.nbytes)
            for k in gl.static_range(STEPS):
                box = held.rows.index(k * ROOM + used)
                tma_load(h_desc, [(block + b) * 32, k * 128], held.full, box)
            used += 1
    for _ in range(used, ROOM):
        mbarrier.arrive(held.full, count=1)


@gluon.jit
def announce(written_ptr, done, group):
    """Count this CTA for a group when all of its stores are issued. The matrix warps' stores happen
    before their arrival, so the one release orders them all before the count."""
    RING: gl.constexpr = done.shape[0]
    mbarrier.wait(done.index(group % RING), (group // RING) & 1)
    gl.atomic_add(written_ptr + group * PITCH, 1, sem="release")


@gluon.jit
def load_slice(boxes, weights, stage, unit, expert, s):
    """Weights of 64 columns of an expert from `unit` on, their scales and biases, by TMA."""
    STEPS: gl.constexpr = weights.words.shape[0] // weights.full.shape[0]
    BOXES: gl.constexpr = boxes.words.block_type.nbytes + boxes.scales.block_type.nbytes
    VECTORS: gl.constexpr = boxes.row_scales.block_type.nbytes * (1 if boxes.biases is None else 2)
    full = weights.full.index(stage)
    mbarrier.expect(full, STEPS * BOXES + VECTORS)
    tma_load(boxes.row_scales, [expert, s * 64], full, weights.vectors.scale.index(stage))
    if boxes.biases is not None:
        tma_load(boxes.biases, [expert, s * 64], full, weights.vectors.bias.index(stage))
    for k in gl.static_range(STEPS):
        tma_load(boxes.words, [unit, k, 0], full, weights.words.index(stage * STEPS + k))
        tma_load(boxes.scales, [unit, 16 * k], full, weights.scales.index(stage * STEPS + k))


@gluon.jit
def produce(
    boxes, records, written_ptr, weights, held, done, sizes, groups, GROUP: gl.constexpr
):
    """Role of the loading warp: rows of h once, then the weights of every slice with their scales
    and biases; and the groups that are done. A group is waited for when all weights that the matrix
    warps can ask for before its end are under way: STAGES segments beyond its last."""
    STAGES: gl.constexpr = weights.full.shape[0]
    count = count_of(records)
    load_rows(boxes.rows, records, count, held, weights.words.shape[0] // STAGES)
    stage, phase = 0, 1
    item, announced = 0, 0
    due = GROUP * count - 1 + STAGES
    for s in range(sizes.slices):
        for i in range(count):
            expert, block, blocks, routes = read_record(records, i)
            unit = expert * sizes.units + s * 4
            mbarrier.wait(weights.empty.index(stage), phase)
            load_slice(boxes, weights, stage, unit, expert, s)
            stage, phase = advance(stage, phase, STAGES)
            if item == due:
                announce(written_ptr, done, announced)
                announced += 1
                due += GROUP * count
            item += 1
    for group in range(announced, groups):
        announce(written_ptr, done, group)
