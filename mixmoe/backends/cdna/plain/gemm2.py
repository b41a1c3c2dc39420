"""Stage 2 without scaled MFMAs: ``rows[route] = h[route] Wd^T + bd``, a row per route."""

from dataclasses import dataclass
from functools import cache, partial

import flydsl.compiler as flyc
import flydsl.expr as fx

from mixmoe.backends.cdna import arguments, grid
from mixmoe.backends.cdna import mainloop as scaled
from mixmoe.backends.cdna.arguments import Routes, Sources
from mixmoe.backends.cdna.atoms import MFMA_ROWS
from mixmoe.backends.cdna.config import THREADS
from mixmoe.backends.cdna.mainloop import row_bias
from mixmoe.backends.cdna.plain import mainloop
from mixmoe.backends.cdna.plain.config import Gemm
from mixmoe.backends.cdna.plain.epilogue import row_scales, store_four, token_scale
from mixmoe.backends.cdna.plain.tokens import shared_storage
from mixmoe.backends.cdna.prebuilt import launcher
from mixmoe.backends.cdna.tokens import TOKEN_MASK, Rows
from mixmoe.backends.cdna.work import tiles_of, work_of


@dataclass(frozen=True, slots=True)
class Stage2:
    """What a kernel is compiled for."""

    cfg: Gemm
    out: type[fx.Numeric]
    bias: bool

    @property
    def name(self) -> str:
        """The kernel's name."""
        return f"gemm2_{self.cfg.name}_{self.out.__name__}_{self.bias:d}"


@dataclass(frozen=True, slots=True)
class Arguments(arguments.Arguments):
    """``out`` are rows; scales of weight rows."""

    of_rows: fx.Tensor


@flyc.jit
def compute(spec: Stage2, args: Arguments, lds, number) -> None:
    """One piece of work."""
    cfg, routes = spec.cfg, args.routes
    work = work_of(cfg, number, routes)
    if work.used:
        place = scaled.stand(cfg, work)
        rows = Rows(routes.ids, work.routes, routes.tokens, routes.topk)
        first = scaled.first_block(cfg, place, work)
        totals = mainloop.multiply_all(cfg, place, lds, args.sources, rows, first)
        if fx.const_expr(cfg.k_waves > 1):
            if place.part == 0:
                store(spec, args, work, place, rows, totals, first)
        else:
            store(spec, args, work, place, rows, totals, first)


@flyc.jit
def store(spec: Stage2, args: Arguments, work, place, rows, totals, first) -> None:
    """Scale, bias, store four columns of one route at a time."""
    cfg, out, routes = spec.cfg, spec.out, args.routes
    ids = scaled.of_groups(cfg, work, place, routes.ids)
    of_tokens = [token_scale(cfg, args.sources.token_scales, rows.row(i)) for i in ids]
    for group in fx.range_constexpr(cfg.groups):
        packed = fx.Int32(ids[group])
        token = packed & TOKEN_MASK
        route = fx.Int64(token * routes.topk + (packed >> 24))
        for block in fx.range_constexpr(cfg.blocks):
            column = (first + block) * MFMA_ROWS + place.g * 4
            if (token < routes.tokens) & (column < cfg.rows):
                row = place.expert * cfg.rows + column
                factors = (row_scales(cfg, args.of_rows, row), of_tokens[group])
                value = mainloop.results(cfg, totals, 0, block, group, factors)
                if fx.const_expr(spec.bias):
                    value = value + row_bias(args.bias, row)
                store_four(args.out, route * cfg.rows + column, value.to(out), out)


@cache
def build(cfg: Gemm, out: type[fx.Numeric], bias: bool):
    """The launcher for one GEMM shape, output type, with or without a bias."""
    spec = Stage2(cfg, out, bias)
    variant = spec.name

    @flyc.kernel(name=variant)
    def gemm2_kernel(
        rows: fx.Tensor,  # (R, H) out
        h: fx.Tensor,  # (R, I) codes as words
        h_scales: fx.Tensor,
        codes: fx.Tensor,  # (E, ...) words
        scales: fx.Tensor,  # block scales as words
        of_rows: fx.Tensor,  # (E, H) f32: scales of rows
        bias_rows: fx.Tensor,  # (E, H) f32
        sorted_ids: fx.Tensor,
        expert_ids: fx.Tensor,
        tokens: fx.Int32,
        topk: fx.Int32,
        token_tiles: fx.Int32,
    ):
        lds = fx.SharedAllocator().allocate(shared_storage(cfg)).peek()
        routes = Routes(sorted_ids, expert_ids, tokens, topk, token_tiles)
        args = Arguments(rows, Sources(codes, scales, h, h_scales), bias_rows, routes, of_rows)
        each = partial(compute, spec, args, lds)
        grid.over(cfg.walk, tiles_of(cfg, token_tiles), each)

    @flyc.jit
    def launch(
        rows: fx.Tensor,
        h: fx.Tensor,
        h_scales: fx.Tensor,
        codes: fx.Tensor,
        scales: fx.Tensor,
        of_rows: fx.Tensor,
        bias_rows: fx.Tensor,
        sorted_ids: fx.Tensor,
        expert_ids: fx.Tensor,
        tokens: fx.Int32,
        topk: fx.Int32,
        token_tiles: fx.Int32,
        groups: fx.Int32,
        name: fx.Constexpr[str],
        stream: fx.Stream,
    ):
        gemm2_kernel(
            rows, h, h_scales, codes, scales, of_rows, bias_rows, sorted_ids, expert_ids, tokens,
            topk, token_tiles,
        ).launch(grid=(groups, 1, 1), block=(THREADS, 1, 1), stream=stream)

    return launcher(variant, launch)
