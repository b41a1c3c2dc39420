"""Stage 2: ``rows[route] = h[route] Wd^T + bd``.

A row per route is the same bits on every run; sums per token, added atomically, are not, and spare
the combine; rows as e4m3 codes halve what the combine reads.
"""

from dataclasses import dataclass, replace
from functools import cache, partial

import flydsl.compiler as flyc
import flydsl.expr as fx

from mixmoe.backends.cdna import arguments, grid, mainloop, results
from mixmoe.backends.cdna.arguments import Routes, Sources
from mixmoe.backends.cdna.atoms import E4M3, MFMA_ROWS, PIECE, WAVE
from mixmoe.backends.cdna.config import THREADS, Gemm, RowsOut, swizzled
from mixmoe.backends.cdna.mainloop import held, inside
from mixmoe.backends.cdna.origin import one_origin
from mixmoe.backends.cdna.prebuilt import launcher
from mixmoe.backends.cdna.quantise import MANTISSA, block_max, encode, scale_bits, stagger
from mixmoe.backends.cdna.results import QUAD, Quads, Target
from mixmoe.backends.cdna.tokens import Ids, shared_storage
from mixmoe.backends.cdna.work import at_hand, tiles_of, work_of
from mixmoe.formats import Rounding


@dataclass(frozen=True, slots=True)
class Stage2:
    """What a kernel is compiled for."""

    cfg: Gemm
    out: type[fx.Numeric]
    bias: bool
    kind: RowsOut
    weighted: bool

    @property
    def name(self) -> str:
        """The kernel's name."""
        flags = f"{self.bias:d}{self.weighted:d}"
        return f"gemm2_{self.cfg.name}_{self.out.__name__}_{self.kind.value}_{flags}"


@dataclass(frozen=True, slots=True)
class Arguments(arguments.Arguments):
    """``out`` are rows, codes or sums; scales of codes."""

    row_scales: fx.Tensor


@flyc.jit
def compute(spec: Stage2, args: Arguments, lds, number) -> None:
    """One piece of work."""
    cfg, routes = spec.cfg, args.routes
    work = work_of(cfg, number, routes)
    # 1. Which routes: padding reads row 0 and writes nothing
    rows = mainloop.Rows(routes.ids, work.routes, routes.tokens, routes.topk)
    if fx.const_expr(spec.kind is not RowsOut.SUMS):
        bits = spec.out.width if fx.const_expr(spec.kind is RowsOut.ROWS) else E4M3.bits
        rows = replace(rows, spread=routes.topk, **results.places(cfg, bits))
    ids = Ids(cfg, rows)
    if work.used & at_hand(args):
        # 2. Multiply
        place = mainloop.stand(cfg, work)
        first = mainloop.first_block(cfg, place, work)
        sums = mainloop.multiply_all(cfg, place, lds, args.sources, rows, ids, first)

        # 3. What comes of it
        if fx.const_expr(cfg.k_waves > 1):
            if place.part == 0:
                store(spec, args, lds, work, place, sums, first)
        else:
            store(spec, args, lds, work, place, sums, first)


@flyc.jit
def store(spec: Stage2, args: Arguments, lds, work, place, sums, first) -> None:
    """In the way that the kernel is compiled for."""
    STORES[spec.kind](spec, args, lds, work, place, sums, first)


def columns_of(spec: Stage2, args: Arguments, place, sums, block: int, group: int, column):
    """Four columns of one token, bias added."""
    value = sums.of(0, block, group)
    if fx.const_expr(spec.bias):
        at = place.expert * spec.cfg.rows + column
        value = value + mainloop.row_bias(args.bias, at)
    return value


@flyc.jit
def add_rows(spec: Stage2, args: Arguments, lds, work, place, sums, first) -> None:
    """Weight, then add four columns to the token's sums: float32, in any order."""
    cfg = spec.cfg
    rows = sums.places.of_groups(place)
    if fx.const_expr(spec.weighted):
        weights = mainloop.of_groups(cfg, work, place, args.routes.weights)
    for group in fx.range_constexpr(cfg.groups):
        if rows[group] >= 0:
            row = fx.get_iter(args.out) + fx.Int64(rows[group]) * cfg.rows
            for b in fx.range_constexpr(cfg.blocks):
                if inside(cfg, (first + b) * MFMA_ROWS):
                    column = (first + b) * MFMA_ROWS + place.g * 4
                    value = columns_of(spec, args, place, sums, b, group, column)
                    if fx.const_expr(spec.weighted):
                        value = value * fx.Float32(weights[group])
                    for i in fx.range_constexpr(4):
                        at = row + (column + i)
                        fx.atomic_add(at, value[i], syncscope=fx.rocdl.SyncScope.Agent)


def store_codes_of_rows(spec: Stage2, args: Arguments, lds, work, place, sums, first) -> None:
    """Blocks of 32 columns of one route as e4m3 codes and a scale."""
    cfg, out = spec.cfg, Quads(spec.cfg, place, first, args.out, args.row_scales)
    out.open(sums.places)

    def steps(group: int, pair: int):
        both = [
            columns_of(spec, args, place, sums, block, group,
                       held(cfg, (first + block) * MFMA_ROWS) + place.g * QUAD)
            for block in (2 * pair, 2 * pair + 1)
        ]
        top = yield from block_max(both)
        bits = scale_bits(E4M3, top, Rounding.CEIL)
        for b, values in enumerate(both):
            out.write(group, 2 * pair + b, encode(E4M3, values, bits))
        out.write_scale(group, pair, (bits >> MANTISSA).to(fx.Uint8))

    stagger(steps(group, pair) for group in range(cfg.groups) for pair in range(cfg.blocks // 2))


@flyc.jit
def store_rows(spec: Stage2, args: Arguments, lds, work, place, sums, first) -> None:
    """Rows in the output's type."""
    if fx.const_expr(spec.cfg.stages_rows(spec.out.width // 8)):
        store_lines(spec, args, lds, work, place, sums, first)
    else:
        store_quads(spec, args, work, place, sums, first)


def store_quads(spec: Stage2, args: Arguments, work, place, sums, first) -> None:
    """Four columns of one route at a time, from where the MFMA left them."""
    cfg, rows = spec.cfg, Target(spec.cfg, args.out, columns=1, elements=QUAD)
    routes = sums.places.of_groups(place)
    for group in range(cfg.groups):
        for b in range(cfg.blocks):
            column, lane = (first + b) * MFMA_ROWS, place.g * QUAD
            value = columns_of(spec, args, place, sums, b, group, held(cfg, column) + lane)
            rows.put(routes[group], rows.within(column, lane), column, value.to(spec.out))


class Staging:
    """Twice 16 rows of a wave's columns in LDS, in the place of the codes: written as the MFMA
    leaves them, read in 16-byte pieces along the row, both without bank conflicts by the swizzle
    of codes. No other wave touches them."""

    def __init__(self, spec: Stage2, place, lds):
        cfg, self.out, self.place = spec.cfg, spec.out, place
        item = self.out.width // 8
        self.items = PIECE // item
        self.stride = cfg.blocks * MFMA_ROWS
        self.pieces = self.stride // self.items
        self.rows = WAVE // self.pieces  # that one read covers
        base = fx.recast_iter(self.out, lds.codes.ptr)
        self.base = base + place.wave * (2 * MFMA_ROWS * self.stride)
        self.lane = place.tid % WAVE

    def _at(self, group: int, row, piece):
        """A piece of a row of a group; groups take turns in the two places."""
        start = self.base + (row + group % 2 * MFMA_ROWS) * self.stride
        return start + swizzled(row, piece, self.pieces) * self.items

    @one_origin
    def write(self, group: int, block: int, values: fx.Vector) -> None:
        """Four columns of a block."""
        frag = fx.make_rmem_tensor(4, self.out)
        frag.store(values.to(self.out))
        of_piece = self.items // 4  # lanes
        piece = block * (MFMA_ROWS // self.items) + self.place.g // of_piece
        at = self._at(group, self.place.r, piece) + self.place.g % of_piece * 4
        quad = fx.make_copy_atom(fx.UniversalCopy(4 * self.out.width), self.out)
        fx.copy(quad, frag, at.view(fx.make_layout(4, 1)))

    def row(self, turn: int):
        """The row that a lane reads in its turn."""
        return self.lane // self.pieces + turn * self.rows

    def column(self):
        """First column of a lane's piece."""
        return self.lane % self.pieces * self.items

    @one_origin
    def read(self, group: int, turn: int):
        """A piece of a row."""
        frag = fx.make_rmem_tensor(self.items, self.out)
        at = self._at(group, self.row(turn), self.lane % self.pieces)
        piece = fx.make_copy_atom(fx.UniversalCopy128b(), self.out)
        fx.copy(piece, at.view(fx.make_layout(self.items, 1)), frag)
        return frag


def store_lines(spec: Stage2, args: Arguments, lds, work, place, sums, first) -> None:
    """Whole lines of memory: a store takes 16 bytes a lane along the rows. What is read from LDS
    is stored after the next group was written, so that nothing waits for it."""
    cfg, staging = spec.cfg, Staging(spec, place, lds)
    rows = Target(cfg, args.out, columns=1, elements=staging.items)
    turns = range(MFMA_ROWS // staging.rows)
    column, lane = first * MFMA_ROWS, staging.column()
    lane = rows.within(column + lane, lane)
    fx.gpu.barrier()  # the last tokens are read
    pending: list[tuple] = []
    for group in range(cfg.groups):
        for b in range(cfg.blocks):
            at = held(cfg, (first + b) * MFMA_ROWS) + place.g * QUAD
            staging.write(group, b, columns_of(spec, args, place, sums, b, group, at))
        for route, frag in pending:
            rows.put(route, lane, column, frag.load())
        pending = [
            (sums.places.of(group * MFMA_ROWS + staging.row(turn)), staging.read(group, turn))
            for turn in turns
        ]
        fx.rocdl.sched_barrier(0)  # or a read would be put off into the branch of its store
    for route, frag in pending:
        rows.put(route, lane, column, frag.load())


STORES = {
    RowsOut.ROWS: store_rows,
    RowsOut.SUMS: add_rows,
    RowsOut.CODES: store_codes_of_rows,
}


@cache
def build(cfg: Gemm, out: type[fx.Numeric], bias: bool, kind: RowsOut, weighted: bool):
    """The launcher for one GEMM shape, output type and kind, with or without a bias; ``weighted``
    multiplies by the routing weight, where rows are added up here."""
    spec = Stage2(cfg, out, bias, kind, weighted)
    variant = spec.name

    @flyc.kernel(name=variant)
    def gemm2_kernel(
        rows: fx.Tensor,  # (R, H) out, or words of codes; or (T, H) sums
        row_scales: fx.Tensor,  # (R, H / 32), of codes
        h: fx.Tensor,  # (R, I) codes as words
        h_scales: fx.Tensor,  # (R, I / 32), or (R) f32
        codes: fx.Tensor,  # (E, ...) words
        scales: fx.Tensor,  # (E, ...) words, or (E, H) f32
        bias_rows: fx.Tensor,  # (E, H) f32
        sorted_ids: fx.Tensor,
        sorted_weights: fx.Tensor,
        expert_ids: fx.Tensor,
        tokens: fx.Int32,
        topk: fx.Int32,
        token_tiles: fx.Int32,
    ):
        lds = fx.SharedAllocator().allocate(shared_storage(cfg)).peek()
        routes = Routes(sorted_ids, expert_ids, tokens, topk, token_tiles, sorted_weights)
        args = Arguments(
            rows, Sources(codes, scales, h, h_scales), bias_rows, routes, row_scales
        )
        each = partial(compute, spec, args, lds)
        grid.over(cfg.walk, tiles_of(cfg, token_tiles), each)

    @flyc.jit
    def launch(
        rows: fx.Tensor,
        row_scales: fx.Tensor,
        h: fx.Tensor,
        h_scales: fx.Tensor,
        codes: fx.Tensor,
        scales: fx.Tensor,
        bias_rows: fx.Tensor,
        sorted_ids: fx.Tensor,
        sorted_weights: fx.Tensor,
        expert_ids: fx.Tensor,
        tokens: fx.Int32,
        topk: fx.Int32,
        token_tiles: fx.Int32,
        groups: fx.Int32,
        name: fx.Constexpr[str],
        stream: fx.Stream,
    ):
        gemm2_kernel(
            rows, row_scales, h, h_scales, codes, scales, bias_rows, sorted_ids, sorted_weights,
            expert_ids, tokens, topk, token_tiles,
        ).launch(grid=(groups, 1, 1), block=(THREADS, 1, 1), stream=stream)

    return launcher(variant, launch, mainloop.hints(cfg))
