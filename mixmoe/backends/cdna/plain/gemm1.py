"""Stage 1 without scaled MFMAs: ``h[route] = act(x Wg^T + bg, x Wu^T + bu)``, a row per route.

h is written in its 16-bit format, or as codes where a block of its scales lies in a workgroup's
tile, else in float32, of which ``quantise`` makes codes: the scale of a whole row is known only
when every workgroup of the row is done.
"""

from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import flydsl.compiler as flyc
import flydsl.expr as fx

from mixmoe.activations import ActivationKind
from mixmoe.backends.cdna import arguments, grid
from mixmoe.backends.cdna import mainloop as scaled
from mixmoe.backends.cdna.activate import Scalars, activate
from mixmoe.backends.cdna.arguments import Routes, Sources
from mixmoe.backends.cdna.atoms import MFMA_ROWS
from mixmoe.backends.cdna.config import THREADS
from mixmoe.backends.cdna.mainloop import row_bias
from mixmoe.backends.cdna.origin import one_origin
from mixmoe.backends.cdna.plain import mainloop
from mixmoe.backends.cdna.plain.config import Gemm
from mixmoe.backends.cdna.plain.epilogue import Extras, row_scales, store_four, token_scale
from mixmoe.backends.cdna.plain.requantise import Target, store_codes
from mixmoe.backends.cdna.plain.tokens import shared_storage
from mixmoe.backends.cdna.prebuilt import launcher
from mixmoe.backends.cdna.tokens import TOKEN_MASK, Rows
from mixmoe.backends.cdna.work import tiles_of, work_of


def gate_up(cfg: Gemm, totals, block: int, group: int, scales) -> list[fx.Vector]:
    """Four columns of gate and of up of one token."""
    (gate, up), of_token = scales
    return [
        mainloop.results(cfg, totals, half, block, group, (of_rows, of_token))
        for half, of_rows in enumerate((gate, up))
    ]


@dataclass(frozen=True, slots=True)
class Stage1:
    """What a kernel is compiled for: the GEMM, activation, type or codes of h, what is added on the
    way."""

    cfg: Gemm
    kind: ActivationKind
    out: type[fx.Numeric] | Target
    extras: Extras

    @property
    def name(self) -> str:
        """The kernel's name."""
        act = self.kind.value
        out = self.out.name if isinstance(self.out, Target) else self.out.__name__
        return f"gemm1_{self.cfg.name}_{act}_{out}_{self.extras.name}"


@dataclass(frozen=True, slots=True)
class Arguments(arguments.Arguments):
    """``out`` is h; its scales, scales of weight rows, smooth factors, the activation's scalars."""

    h_scales: fx.Tensor
    of_rows: fx.Tensor
    smooth: fx.Tensor
    scalars: Scalars


@flyc.jit
def compute(spec: Stage1, args: Arguments, lds, number) -> None:
    """One piece of work."""
    cfg, routes = spec.cfg, args.routes
    work = work_of(cfg, number, routes)
    if work.used:
        place = scaled.stand(cfg, work)

        # 1. Which rows of x: padding reads row 0 and writes nothing
        topk = routes.topk if spec.extras.per_route else None
        rows = Rows(routes.ids, work.routes, routes.tokens, topk)

        # 2. Multiply
        first = scaled.first_block(cfg, place, work)
        totals = mainloop.multiply_all(cfg, place, lds, args.sources, rows, first)

        # 3. Scale, activate, store
        if fx.const_expr(cfg.k_waves > 1):
            if place.part == 0:
                store(spec, args, lds, work, place, rows, totals, first)
        else:
            store(spec, args, lds, work, place, rows, totals, first)


@flyc.jit
def store(spec: Stage1, args: Arguments, lds, work, place, rows, totals, first) -> None:
    """In the way that the kernel is compiled for."""
    cfg = spec.cfg
    kind: Any = spec.out
    ids = scaled.of_groups(cfg, work, place, args.routes.ids)
    of_tokens = [token_scale(cfg, args.sources.token_scales, rows.row(i)) for i in ids]
    weights = [None] * cfg.groups
    if fx.const_expr(spec.extras.weighted):
        weights = scaled.of_groups(cfg, work, place, args.routes.weights)
    four = partial(four_columns, spec, args, place, totals, first)
    if fx.const_expr(isinstance(kind, Target)):
        out = (args.out, args.h_scales)
        if fx.const_expr(kind.meets):
            fx.gpu.barrier()  # the last tokens are read
        for group in fx.range_constexpr(cfg.groups):
            both = [
                inside(cfg, first + b, four(b, group, of_tokens[group], weights[group]))
                for b in range(2)
            ]
            at = (*route_of(args.routes, ids[group]), first)
            store_codes(kind, cfg, place, lds, out, at, group, both)
    else:
        for group in fx.range_constexpr(cfg.groups):
            route, used = route_of(args.routes, ids[group])
            for block in fx.range_constexpr(cfg.blocks):
                column = (first + block) * MFMA_ROWS + place.g * 4
                if used & (column < cfg.rows):
                    value = four(block, group, of_tokens[group], weights[group]).to(kind)
                    store_four(args.out, route * cfg.rows + column, value, kind)


def route_of(routes: Routes, packed) -> tuple:
    """(route, whether it is one) of what is sorted at a place."""
    token = fx.Int32(packed) & TOKEN_MASK
    return fx.Int64(token * routes.topk + (fx.Int32(packed) >> 24)), token < routes.tokens


def inside(cfg: Gemm, block, values: fx.Vector) -> fx.Vector:
    """Zeros for a block beyond the last row."""
    return (block * MFMA_ROWS < cfg.rows).select(values, fx.Vector.filled(4, 0.0, fx.Float32))


@one_origin
def four_columns(
    spec: Stage1, args: Arguments, place, totals, first, block: int, group: int, of_token, weight
) -> fx.Vector:
    """Four columns of h of one token in float32; of the last rows where there are no others."""
    cfg, extras = spec.cfg, spec.extras
    column = fx.min((first + block) * MFMA_ROWS, cfg.rows - MFMA_ROWS) + place.g * 4
    row = place.expert * 2 * cfg.rows + column
    both = [row_scales(cfg, args.of_rows, row + i * cfg.rows) for i in range(2)]
    values = gate_up(cfg, totals, block, group, (both, of_token))
    if extras.bias:
        values = [v + row_bias(args.bias, row + i * cfg.rows) for i, v in enumerate(values)]
    value = activate(spec.kind, args.scalars, *values)
    if extras.weighted:
        value = value * fx.Float32(weight)
    if extras.smooth:
        value = value * row_bias(args.smooth, place.expert * cfg.rows + column)
    return value


@cache
def build(cfg: Gemm, kind: ActivationKind, out: type[fx.Numeric] | Target, extras: Extras):
    """The launcher for one GEMM shape, activation, h, and what is added on the way."""
    spec = Stage1(cfg, kind, out, extras)
    variant = spec.name

    @flyc.kernel(name=variant)
    def gemm1_kernel(
        h: fx.Tensor,  # (R, I), or codes, four an item
        h_scales: fx.Tensor,  # of codes
        x: fx.Tensor,  # (T or R, H) codes as words
        x_scales: fx.Tensor,
        codes: fx.Tensor,  # (E, ...) words
        scales: fx.Tensor,  # block scales as words
        of_rows: fx.Tensor,  # (E, 2 I) f32: scales of rows
        bias_rows: fx.Tensor,  # (E, 2 I) f32, gate then up
        smooth: fx.Tensor,  # (E, I) f32
        sorted_ids: fx.Tensor,
        sorted_weights: fx.Tensor,
        expert_ids: fx.Tensor,
        tokens: fx.Int32,
        topk: fx.Int32,
        limit: fx.Float32,
        alpha: fx.Float32,
        beta: fx.Float32,
        beta2: fx.Float32,
        token_tiles: fx.Int32,
    ):
        lds = fx.SharedAllocator().allocate(shared_storage(cfg)).peek()
        routes = Routes(sorted_ids, expert_ids, tokens, topk, token_tiles, sorted_weights)
        args = Arguments(
            h, Sources(codes, scales, x, x_scales), bias_rows, routes, h_scales, of_rows, smooth,
            Scalars(limit, alpha, beta, beta2),
        )
        each = partial(compute, spec, args, lds)
        grid.over(cfg.walk, tiles_of(cfg, token_tiles), each)

    @flyc.jit
    def launch(
        h: fx.Tensor,
        h_scales: fx.Tensor,
        x: fx.Tensor,
        x_scales: fx.Tensor,
        codes: fx.Tensor,
        scales: fx.Tensor,
        of_rows: fx.Tensor,
        bias_rows: fx.Tensor,
        smooth: fx.Tensor,
        sorted_ids: fx.Tensor,
        sorted_weights: fx.Tensor,
        expert_ids: fx.Tensor,
        tokens: fx.Int32,
        topk: fx.Int32,
        limit: fx.Float32,
        alpha: fx.Float32,
        beta: fx.Float32,
        beta2: fx.Float32,
        token_tiles: fx.Int32,
        groups: fx.Int32,
        name: fx.Constexpr[str],
        stream: fx.Stream,
    ):
        gemm1_kernel(
            h, h_scales, x, x_scales, codes, scales, of_rows, bias_rows, smooth, sorted_ids,
            sorted_weights, expert_ids, tokens, topk, limit, alpha, beta, beta2, token_tiles,
        ).launch(grid=(groups, 1, 1), block=(THREADS, 1, 1), stream=stream)

    return launcher(variant, launch)
