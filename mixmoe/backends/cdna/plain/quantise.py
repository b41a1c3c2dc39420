"""Codes of x, and of the float32 h of stage 1: one scale a row, or one for each block of K.

Bit for bit what ``Format.quantise`` does: ``scale = max(amax / element max, 2^-126)`` and
``code = rne(x / scale)`` by IEEE divisions, or an E8M0 scale by the bits of the maximum.
"""

from dataclasses import dataclass
from functools import cache

import flydsl.compiler as flyc
import flydsl.expr as fx

from mixmoe.backends.cdna.atoms import PIECE, WAVE, Atoms, Operand
from mixmoe.backends.cdna.config import THREADS, WAVES
from mixmoe.backends.cdna.plain.codes import encoder
from mixmoe.backends.cdna.prebuilt import launcher
from mixmoe.backends.cdna.quantise import MANTISSA, scale_byte
from mixmoe.backends.cdna.tokens import TOKEN_MASK
from mixmoe.formats import F32_TINY, Format, Rounding, ScaleKind

VALUES = 8  # of a thread at a time


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of ``columns`` values of ``source``, to ``fmt``; ``smoothed``: a row per route, times
    the factors of its expert."""

    atoms: Atoms
    fmt: Format
    source: type[fx.Numeric]
    columns: int
    rounding: Rounding = Rounding.CEIL
    smoothed: bool = False

    @property
    def name(self) -> str:
        """All of it as one identifier."""
        source = f"{self.atoms.arch}_{self.fmt}_{self.source.__name__}_{self.columns}"
        return f"quantise_{source}_{self.rounding.value}_{self.smoothed:d}"

    @property
    def lanes(self) -> int:
        """Threads of a row: a wave, or the workgroup where that would be over 32 values each."""
        return WAVE if self.columns <= 4 * WAVE * VALUES else THREADS

    @property
    def rounds(self) -> int:
        """Times a thread takes eight values of its row."""
        return -(-self.columns // (self.lanes * VALUES))

    @property
    def per_block(self) -> int:
        """Threads that share a block's scale."""
        return self.fmt.cols // VALUES

    @property
    def blocks(self) -> int:
        """Scales of a row."""
        return -(-self.columns // self.fmt.cols)


def load_eight(cfg: Rows, base, part) -> fx.Vector:
    """Values ``8 part ..`` of a row in float32; zeros beyond its end."""
    inside = part < cfg.columns // VALUES
    pieces = VALUES * cfg.source.width // (8 * PIECE)
    frag = fx.make_rmem_tensor(VALUES, cfg.source)
    piece = fx.make_copy_atom(fx.UniversalCopy128b(), cfg.source)
    width = fx.make_layout(VALUES // pieces, 1)
    at = base + inside.select(part, 0) * VALUES
    for p in range(pieces):
        source = (at + p * (VALUES // pieces)).view(width)
        fx.copy(piece, source, fx.logical_divide(frag, width)[None, p])
    zeros = fx.Vector.filled(VALUES, 0.0, fx.Float32)
    return inside.select(frag.load().to(fx.Float32), zeros)


def largest(values: fx.Vector, threads: int) -> fx.Float32:
    """Largest magnitude among so many neighbouring threads of a wave."""
    top = abs(values).reduce(fx.ReductionOp.MAX)
    distance = 1
    while distance < threads:
        top = fx.max(top, fx.gpu.shuffle_xor(top, distance, WAVE))
        distance *= 2
    return top


def float_scale(fmt: Format, top: fx.Float32) -> fx.Float32:
    """``max(amax / element max, 2^-126)``."""
    return fx.max(top / fx.Float32(fmt.element.max), fx.Float32(F32_TINY))


def store_codes(cfg: Rows, codes: fx.Tensor, values: fx.Vector, at) -> None:
    """Eight codes, of values already scaled, at the ``at``-th eight of the tensor."""
    encode = encoder(cfg.atoms, cfg.fmt.element)
    halves = [encode([values[4 * i + j] for j in range(4)]) for i in range(2)]
    if cfg.fmt.element.bits == 4:
        (fx.get_iter(codes) + at).store(halves[0] | (halves[1] << 16))
        return
    for i, word in enumerate(halves):
        (fx.get_iter(codes) + (at * 2 + i)).store(word)


def row_max(cfg: Rows, lds, tid, values: list[fx.Vector]) -> fx.Float32:
    """Largest magnitude of the thread's row."""
    top = fx.Float32(0.0)
    for eight in values:
        top = fx.max(top, abs(eight).reduce(fx.ReductionOp.MAX))
    for distance in (1, 2, 4, 8, 16, 32):
        top = fx.max(top, fx.gpu.shuffle_xor(top, distance, WAVE))
    if cfg.lanes == WAVE:
        return top
    return across_waves(lds, tid, top)


@flyc.jit
def across_waves(lds, tid, top) -> fx.Float32:
    """The largest of the four waves' maxima."""
    shared = lds.tops.view(fx.make_layout(WAVES, 1))
    if tid % WAVE == 0:
        shared[tid // WAVE] = top
    fx.gpu.barrier()
    for wave in fx.range_constexpr(WAVES):
        top = fx.max(top, fx.Float32(shared[wave]))
    return top


@cache
def build_rows(cfg: Rows):
    """The launcher of ``x (R, K) -> codes, scales (R)``."""
    variant = cfg.name
    per_group = THREADS // cfg.lanes

    @flyc.kernel(name=variant)
    def quantise_rows_kernel(
        codes: fx.Tensor,  # (R, K) as words
        scales: fx.Tensor,  # (R)
        x: fx.Tensor,  # rows, row_stride apart
        smooth: fx.Tensor,  # (E, K) f32
        sorted_ids: fx.Tensor,
        expert_ids: fx.Tensor,
        rows: fx.Int32,  # of x, or sorted positions
        tokens: fx.Int32,
        topk: fx.Int32,
        sort_block: fx.Int32,
        row_stride: fx.Int32,
    ):
        tid = fx.Int32(fx.thread_idx.x)
        lane = tid % cfg.lanes
        place = fx.Int32(fx.block_idx.x) * per_group + tid // cfg.lanes
        lds = fx.SharedAllocator().allocate(
            fx.Struct["tops" : fx.Array[fx.Float32, WAVES, PIECE]]
        ).peek()

        # 1. Which row is read and which is written
        used = place < rows
        at = used.select(place, 0)
        source, target, expert = at, at, fx.Int32(0)
        if fx.const_expr(cfg.smoothed):
            packed = fx.Int32(sorted_ids[at])
            token = packed & TOKEN_MASK
            used = used & (token < tokens)
            source = used.select(token, 0)
            target = used.select(token * topk + (packed >> 24), 0)
            expert = fx.max(fx.Int32(expert_ids[at // sort_block]), 0)

        # 2. Load, maximum, scale
        base = fx.get_iter(x) + fx.Int64(source) * row_stride
        values = []
        for i in fx.range_constexpr(cfg.rounds):
            part = lane + i * cfg.lanes
            eight = load_eight(cfg, base, part)
            if fx.const_expr(cfg.smoothed):
                eight = eight * smooth_eight(cfg, smooth, expert, part)
            values.append(eight)
        scale = float_scale(cfg.fmt, row_max(cfg, lds, tid, values))

        # 3. Codes, and the scale once
        for i in fx.range_constexpr(cfg.rounds):
            part = lane + i * cfg.lanes
            if used & (part < cfg.columns // VALUES):
                unit = fx.Int64(target) * (cfg.columns // VALUES) + part
                store_codes(cfg, codes, values[i] / scale, unit)
        if used & (lane == 0):
            (fx.get_iter(scales) + fx.Int64(target)).store(scale)

    @flyc.jit
    def launch(
        codes: fx.Tensor,
        scales: fx.Tensor,
        x: fx.Tensor,
        smooth: fx.Tensor,
        sorted_ids: fx.Tensor,
        expert_ids: fx.Tensor,
        rows: fx.Int32,
        tokens: fx.Int32,
        topk: fx.Int32,
        sort_block: fx.Int32,
        row_stride: fx.Int32,
        grid: fx.Int32,
        name: fx.Constexpr[str],
        stream: fx.Stream,
    ):
        quantise_rows_kernel(
            codes, scales, x, smooth, sorted_ids, expert_ids, rows, tokens, topk, sort_block,
            row_stride,
        ).launch(grid=(grid, 1, 1), block=(THREADS, 1, 1), stream=stream)

    return launcher(variant, launch)


def smooth_eight(cfg: Rows, smooth: fx.Tensor, expert, part) -> fx.Vector:
    """Eight factors of an expert's columns."""
    factors = Rows(cfg.atoms, cfg.fmt, fx.Float32, cfg.columns)
    return load_eight(factors, fx.get_iter(smooth) + fx.Int64(expert) * cfg.columns, part)


@cache
def build_blocks(cfg: Rows):
    """The launcher of ``x (R, K) -> codes, scales (R, K / cols)``."""
    variant, shared = cfg.name, cfg.per_block
    e8m0 = cfg.fmt.scale is ScaleKind.E8M0

    @flyc.kernel(name=variant)
    def quantise_blocks_kernel(
        codes: fx.Tensor,  # (R, K) as words
        scales: fx.Tensor,  # (R, blocks)
        x: fx.Tensor,  # rows, row_stride apart
        rows: fx.Int32,
        row_stride: fx.Int32,
    ):
        index = fx.Int32(fx.block_idx.x) * THREADS + fx.Int32(fx.thread_idx.x)
        threads = cfg.blocks * shared
        row, part = index // threads, index % threads
        used = row < rows
        at = used.select(row, 0)

        # 1. Load eight values, maximum of the block
        base = fx.get_iter(x) + fx.Int64(at) * row_stride
        values = load_eight(cfg, base, part)
        top = largest(values, shared)

        # 2. Scale
        if fx.const_expr(e8m0):
            element = cfg.fmt.element
            operand = Operand("", fx.Float32, element.bits, element.emax, element.mantissa,
                              element.max)
            byte = scale_byte(operand, top, cfg.rounding)
            values = values * ((254 - byte) << MANTISSA).bitcast(fx.Float32)
            scale = byte.to(fx.Uint8)
        else:
            scale = float_scale(cfg.fmt, top)
            values = values / scale

        # 3. Codes, and the scale once
        if used & (part < cfg.columns // VALUES):
            store_codes(cfg, codes, values, fx.Int64(row) * (cfg.columns // VALUES) + part)
        if used & (part % shared == 0):
            out = fx.Int64(row) * cfg.blocks + part // shared
            (fx.get_iter(scales) + out).store(scale)

    @flyc.jit
    def launch(
        codes: fx.Tensor,
        scales: fx.Tensor,
        x: fx.Tensor,
        rows: fx.Int32,
        row_stride: fx.Int32,
        grid: fx.Int32,
        name: fx.Constexpr[str],
        stream: fx.Stream,
    ):
        quantise_blocks_kernel(codes, scales, x, rows, row_stride).launch(
            grid=(grid, 1, 1), block=(THREADS, 1, 1), stream=stream
        )

    return launcher(variant, launch)
