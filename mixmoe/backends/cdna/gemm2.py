"""Stage 2: ``rows[route] = h[route] Wd^T + bd``, a row per route, the same bits on every run."""

from dataclasses import dataclass
from functools import cache, partial

import flydsl.compiler as flyc
import flydsl.expr as fx

from mixmoe.backends.cdna import grid, mainloop
from mixmoe.backends.cdna.atoms import MFMA_ROWS
from mixmoe.backends.cdna.config import THREADS, Gemm
from mixmoe.backends.cdna.mainloop import TOKEN_MASK
from mixmoe.backends.cdna.prebuilt import launcher
from mixmoe.backends.cdna.tokens import shared_storage


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
class Arguments:
    """A launch's tensors and scalars."""

    rows: fx.Tensor
    h: fx.Tensor
    h_scales: fx.Tensor
    codes: fx.Tensor
    scales: fx.Tensor
    bias_rows: fx.Tensor
    sorted_ids: fx.Tensor
    expert_ids: fx.Tensor
    tokens: fx.Int32
    topk: fx.Int32
    token_tiles: fx.Int32


@flyc.jit
def compute(spec: Stage2, args: Arguments, lds, number) -> None:
    """One piece of work."""
    cfg, tokens, topk = spec.cfg, args.tokens, args.topk
    work = mainloop.work_of(
        cfg, number, args.token_tiles, args.sorted_ids, args.expert_ids, tokens
    )
    if work.used:
        place = mainloop.stand(cfg, work)

        # 1. Which routes: padding reads row 0 and writes nothing
        def route_of(t):
            packed = fx.Int32(args.sorted_ids[work.routes + t])
            token = packed & TOKEN_MASK
            return (token < tokens).select(token * topk + (packed >> 24), 0)

        # 2. Multiply
        first = mainloop.first_block(cfg, place, work)
        operands = (args.codes, args.scales, args.h, args.h_scales, route_of, first)
        acc = mainloop.multiply_all(cfg, place, lds, operands)

        # 3. What comes of it
        if fx.const_expr(cfg.k_waves > 1):
            if place.part == 0:
                store_rows(spec, args, work, place, acc, first)
        else:
            store_rows(spec, args, work, place, acc, first)


@flyc.jit
def store_rows(spec: Stage2, args: Arguments, work, place, acc, first) -> None:
    """Bias, then four columns of one route at a time."""
    cfg, out = spec.cfg, spec.out
    quad = fx.make_copy_atom(fx.UniversalCopy(4 * out.width), out)
    for group in fx.range_constexpr(cfg.groups):
        at = work.routes + group * MFMA_ROWS + place.r
        packed = fx.Int32(args.sorted_ids[at])
        token = packed & TOKEN_MASK
        route = fx.Int64(token * args.topk + (packed >> 24))
        for b in fx.range_constexpr(cfg.blocks):
            column = (first + b) * MFMA_ROWS + place.g * 4
            if (token < args.tokens) & (column < cfg.rows):
                value = acc[0, b, group].load()
                if fx.const_expr(spec.bias):
                    value = value + mainloop.row_bias(
                        args.bias_rows, place.expert * cfg.rows + column
                    )
                frag = fx.make_rmem_tensor(4, out)
                frag.store(value.to(out))
                dest = fx.get_iter(args.rows) + route * cfg.rows + column
                fx.copy(quad, frag, dest.view(fx.make_layout(4, 1)))


@cache
def build(cfg: Gemm, out: type[fx.Numeric], bias: bool):
    """The launcher for one GEMM shape, output type, with or without a bias."""
    spec = Stage2(cfg, out, bias)
    variant = spec.name

    @flyc.kernel(name=variant)
    def gemm2_kernel(
        rows: fx.Tensor,  # (R, H) out
        h: fx.Tensor,  # (R, I) codes as words
        h_scales: fx.Tensor,  # (R, I / 32)
        codes: fx.Tensor,  # (E, ...) words
        scales: fx.Tensor,  # (E, ...) words
        bias_rows: fx.Tensor,  # (E, H) f32
        sorted_ids: fx.Tensor,
        expert_ids: fx.Tensor,
        tokens: fx.Int32,
        topk: fx.Int32,
        token_tiles: fx.Int32,
    ):
        lds = fx.SharedAllocator().allocate(shared_storage(cfg)).peek()
        args = Arguments(
            rows, h, h_scales, codes, scales, bias_rows, sorted_ids, expert_ids, tokens, topk,
            token_tiles,
        )
        each = partial(compute, spec, args, lds)
        grid.over(cfg.walk, mainloop.tiles_of(cfg, token_tiles), each)

    @flyc.jit
    def launch(
        rows: fx.Tensor,
        h: fx.Tensor,
        h_scales: fx.Tensor,
        codes: fx.Tensor,
        scales: fx.Tensor,
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
            rows, h, h_scales, codes, scales, bias_rows, sorted_ids, expert_ids, tokens, topk,
            token_tiles,
        ).launch(grid=(groups, 1, 1), block=(THREADS, 1, 1), stream=stream)

    return launcher(variant, launch)
