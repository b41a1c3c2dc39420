"""Stage 2: ``rows[route] = h[route] Wd^T + bd``.

A row per route is the same bits on every run; sums per token, added atomically, are not, and spare
the combine; rows as e4m3 codes halve what the combine reads.
"""

from dataclasses import dataclass
from functools import cache, partial

import flydsl.compiler as flyc
import flydsl.expr as fx

from mixmoe.backends.cdna import grid, mainloop
from mixmoe.backends.cdna.atoms import E4M3, MFMA_ROWS, PIECE, SCALE_BLOCK, WAVE
from mixmoe.backends.cdna.config import THREADS, Gemm, RowsOut
from mixmoe.backends.cdna.mainloop import TOKEN_MASK
from mixmoe.backends.cdna.prebuilt import launcher
from mixmoe.backends.cdna.quantise import block_max, encode, scale_byte
from mixmoe.backends.cdna.tokens import shared_storage
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
class Arguments:
    """A launch's tensors and scalars."""

    rows: fx.Tensor
    row_scales: fx.Tensor
    h: fx.Tensor
    h_scales: fx.Tensor
    codes: fx.Tensor
    scales: fx.Tensor
    bias_rows: fx.Tensor
    sorted_ids: fx.Tensor
    sorted_weights: fx.Tensor
    expert_ids: fx.Tensor
    tokens: fx.Int32
    topk: fx.Int32
    token_tiles: fx.Int32


@flyc.jit
def compute(spec: Stage2, args: Arguments, lds, number) -> None:
    """One piece of work."""
    cfg, tokens = spec.cfg, args.tokens
    work = mainloop.work_of(
        cfg, number, args.token_tiles, args.sorted_ids, args.expert_ids, tokens
    )
    if work.used:
        place = mainloop.stand(cfg, work)

        # 1. Which routes: padding reads row 0 and writes nothing
        rows = mainloop.Rows(args.sorted_ids, work.routes, tokens, args.topk)

        # 2. Multiply
        first = mainloop.first_block(cfg, place, work)
        operands = (args.codes, args.scales, args.h, args.h_scales, rows, first)
        sums = mainloop.multiply_all(cfg, place, lds, operands)

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
        value = value + mainloop.row_bias(args.bias_rows, at)
    return value


@flyc.jit
def add_rows(spec: Stage2, args: Arguments, lds, work, place, sums, first) -> None:
    """Weight, then add four columns to the token's sums: float32, in any order."""
    cfg = spec.cfg
    ids = mainloop.of_groups(cfg, work, place, args.sorted_ids)
    if fx.const_expr(spec.weighted):
        weights = mainloop.of_groups(cfg, work, place, args.sorted_weights)
    for group in fx.range_constexpr(cfg.groups):
        token = fx.Int32(ids[group]) & TOKEN_MASK
        for b in fx.range_constexpr(cfg.blocks):
            column = (first + b) * MFMA_ROWS + place.g * 4
            if (token < args.tokens) & (column < cfg.rows):
                value = columns_of(spec, args, place, sums, b, group, column)
                if fx.const_expr(spec.weighted):
                    value = value * fx.Float32(weights[group])
                dest = fx.get_iter(args.rows) + fx.Int64(token) * cfg.rows + column
                for i in fx.range_constexpr(4):
                    fx.atomic_add(dest + i, value[i], syncscope=fx.rocdl.SyncScope.Agent)


@flyc.jit
def store_codes_of_rows(spec: Stage2, args: Arguments, lds, work, place, sums, first) -> None:
    """Blocks of 32 columns of one route as e4m3 codes and a scale."""
    cfg = spec.cfg
    ids = mainloop.of_groups(cfg, work, place, args.sorted_ids)
    for group in fx.range_constexpr(cfg.groups):
        packed = fx.Int32(ids[group])
        token = packed & TOKEN_MASK
        route = fx.Int64(token * args.topk + (packed >> 24))
        for pair in fx.range_constexpr(cfg.blocks // 2):
            column = (first + 2 * pair) * MFMA_ROWS
            if column < cfg.rows:
                both = [
                    columns_of(spec, args, place, sums, 2 * pair + b, group,
                               column + b * MFMA_ROWS + place.g * 4)
                    for b in range(2)
                ]
                byte = scale_byte(E4M3, block_max(both), Rounding.CEIL)
                if token < args.tokens:
                    for b in fx.range_constexpr(2):
                        four = (column + b * MFMA_ROWS) // 4 + place.g
                        out = route * (cfg.rows // 4) + four
                        (fx.get_iter(args.rows) + out).store(encode(E4M3, both[b], byte))
                    if place.g == 0:
                        out = route * (cfg.rows // SCALE_BLOCK) + column // SCALE_BLOCK
                        (fx.get_iter(args.row_scales) + out).store(byte.to(fx.Uint8))


@flyc.jit
def store_rows(spec: Stage2, args: Arguments, lds, work, place, sums, first) -> None:
    """Rows in the output's type."""
    if fx.const_expr(spec.cfg.stages_rows(spec.out.width // 8)):
        store_lines(spec, args, lds, work, place, sums, first)
    else:
        store_quads(spec, args, work, place, sums, first)


@flyc.jit
def store_quads(spec: Stage2, args: Arguments, work, place, sums, first) -> None:
    """Four columns of one route at a time, from where the MFMA left them."""
    cfg, out = spec.cfg, spec.out
    quad = fx.make_copy_atom(fx.UniversalCopy(4 * out.width), out)
    ids = mainloop.of_groups(cfg, work, place, args.sorted_ids)
    for group in fx.range_constexpr(cfg.groups):
        packed = fx.Int32(ids[group])
        token = packed & TOKEN_MASK
        route = fx.Int64(token * args.topk + (packed >> 24))
        for b in fx.range_constexpr(cfg.blocks):
            column = (first + b) * MFMA_ROWS + place.g * 4
            if (token < args.tokens) & (column < cfg.rows):
                value = columns_of(spec, args, place, sums, b, group, column)
                frag = fx.make_rmem_tensor(4, out)
                frag.store(value.to(out))
                dest = fx.get_iter(args.rows) + route * cfg.rows + column
                fx.copy(quad, frag, dest.view(fx.make_layout(4, 1)))


class Staging:
    """Twice 16 rows of a wave's columns in LDS, in the place of the codes: written as the MFMA
    leaves them, read in 16-byte pieces along the row. No other wave touches them."""

    def __init__(self, spec: Stage2, place, lds):
        cfg, self.out, self.place = spec.cfg, spec.out, place
        item = self.out.width // 8
        self.items = PIECE // item
        self.stride = cfg.staging_stride(item)
        self.pieces = cfg.blocks * MFMA_ROWS // self.items
        self.rows = WAVE // self.pieces  # that one read covers
        base = fx.recast_iter(self.out, lds.codes.ptr)
        self.base = base + place.wave * (2 * MFMA_ROWS * self.stride)
        self.lane = place.tid % WAVE

    def _at(self, group: int, row):
        """Start of a row of a group; groups take turns in the two places."""
        return self.base + (row + group % 2 * MFMA_ROWS) * self.stride

    def write(self, group: int, block: int, values: fx.Vector) -> None:
        """Four columns of a block."""
        frag = fx.make_rmem_tensor(4, self.out)
        frag.store(values.to(self.out))
        at = self._at(group, self.place.r) + (block * MFMA_ROWS + self.place.g * 4)
        quad = fx.make_copy_atom(fx.UniversalCopy(4 * self.out.width), self.out)
        fx.copy(quad, frag, at.view(fx.make_layout(4, 1)))

    def row(self, turn: int):
        """The row that a lane reads in its turn."""
        return self.lane // self.pieces + turn * self.rows

    def column(self):
        """First column of a lane's piece."""
        return self.lane % self.pieces * self.items

    def read(self, group: int, turn: int):
        """A piece of a row."""
        frag = fx.make_rmem_tensor(self.items, self.out)
        at = self._at(group, self.row(turn)) + self.column()
        piece = fx.make_copy_atom(fx.UniversalCopy128b(), self.out)
        fx.copy(piece, at.view(fx.make_layout(self.items, 1)), frag)
        return frag


@flyc.jit
def store_piece(spec: Stage2, args: Arguments, packed, column, frag) -> None:
    """16 bytes of a route's row."""
    token = packed & TOKEN_MASK
    piece = fx.make_copy_atom(fx.UniversalCopy128b(), spec.out)
    if (token < args.tokens) & (column < spec.cfg.rows):
        route = fx.Int64(token * args.topk + (packed >> 24))
        dest = fx.get_iter(args.rows) + route * spec.cfg.rows + column
        fx.copy(piece, frag, dest.view(fx.make_layout(PIECE * 8 // spec.out.width, 1)))


def store_lines(spec: Stage2, args: Arguments, lds, work, place, sums, first) -> None:
    """Whole lines of memory: a store takes 16 bytes a lane along the rows. What is read from LDS
    is stored after the next group was written, so that nothing waits for it."""
    cfg, staging = spec.cfg, Staging(spec, place, lds)
    turns = range(MFMA_ROWS // staging.rows)
    ids = [  # of all that a lane stores: loaded before any store, which might alias
        [fx.Int32(args.sorted_ids[work.routes + group * MFMA_ROWS + staging.row(turn)])
         for turn in turns]
        for group in range(cfg.groups)
    ]
    column = first * MFMA_ROWS + staging.column()
    fx.gpu.barrier()  # the last tokens are read
    pending: list[tuple] = []
    for group in range(cfg.groups):
        for b in range(cfg.blocks):
            at = fx.min((first + b) * MFMA_ROWS, cfg.rows - MFMA_ROWS) + place.g * 4
            staging.write(group, b, columns_of(spec, args, place, sums, b, group, at))
        for packed, frag in pending:
            store_piece(spec, args, packed, column, frag)
        pending = [(ids[group][turn], staging.read(group, turn)) for turn in turns]
    for packed, frag in pending:
        store_piece(spec, args, packed, column, frag)


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
        scales: fx.Tensor,  # (E, ...) words
        bias_rows: fx.Tensor,  # (E, H) f32
        sorted_ids: fx.Tensor,
        sorted_weights: fx.Tensor,
        expert_ids: fx.Tensor,
        tokens: fx.Int32,
        topk: fx.Int32,
        token_tiles: fx.Int32,
    ):
        lds = fx.SharedAllocator().allocate(shared_storage(cfg)).peek()
        args = Arguments(
            rows, row_scales, h, h_scales, codes, scales, bias_rows, sorted_ids, sorted_weights,
            expert_ids, tokens, topk, token_tiles,
        )
        each = partial(compute, spec, args, lds)
        grid.over(cfg.walk, mainloop.tiles_of(cfg, token_tiles), each)

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
