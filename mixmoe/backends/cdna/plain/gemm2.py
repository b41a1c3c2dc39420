"""Stage 2 without scaled MFMAs: ``rows[route] = h[route] Wd^T + bd``, a row per route."""

from functools import cache

import flydsl.compiler as flyc
import flydsl.expr as fx

from mixmoe.backends.cdna.atoms import MFMA_ROWS
from mixmoe.backends.cdna.config import THREADS, WAVES
from mixmoe.backends.cdna.mainloop import TOKEN_MASK, row_bias
from mixmoe.backends.cdna.plain import mainloop
from mixmoe.backends.cdna.plain.config import Gemm
from mixmoe.backends.cdna.plain.epilogue import row_scales, store_four, token_scale
from mixmoe.backends.cdna.plain.place import stand, work_of
from mixmoe.backends.cdna.prebuilt import launcher


@cache
def build(cfg: Gemm, out: type[fx.Numeric], bias: bool):
    """The launcher for one GEMM shape, output type, with or without a bias."""
    variant = f"gemm2_{cfg.name}_{out.__name__}_{bias:d}"

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
    ):
        work = work_of(cfg, sorted_ids, expert_ids, tokens)
        if work.used:
            place = stand(work)
            lds = fx.SharedAllocator().allocate(mainloop.shared_storage(cfg)).peek()

            # 1. Which routes: padding reads row 0 and writes nothing
            def route_of(t):
                packed = fx.Int32(sorted_ids[work.routes + t])
                token = packed & TOKEN_MASK
                return (token < tokens).select(token * topk + (packed >> 24), 0)

            # 2. Multiply
            first = (work.rows * WAVES + place.wave) * cfg.blocks
            sources = mainloop.Sources(codes, scales, h, h_scales)
            loads = mainloop.Loads(cfg, place, sources, route_of, first, lds)
            sums = mainloop.Sums(cfg, loads.keys)
            mainloop.run(cfg, loads, sums)

            # 3. Scale, bias, store four columns of one route
            for group in fx.range_constexpr(cfg.tokens // MFMA_ROWS):
                at = work.routes + group * MFMA_ROWS + place.r
                packed = fx.Int32(sorted_ids[at])
                token = packed & TOKEN_MASK
                of_token = token_scale(cfg, h_scales, route_of(group * MFMA_ROWS + place.r))
                route = fx.Int64(token * topk + (packed >> 24))
                for block in fx.range_constexpr(cfg.blocks):
                    column = (first + block) * MFMA_ROWS + place.g * 4
                    if (token < tokens) & (column < cfg.rows):
                        row = place.expert * cfg.rows + column
                        factors = (row_scales(cfg, of_rows, row), of_token)
                        value = mainloop.results(cfg, sums, 0, block, group, factors)
                        if fx.const_expr(bias):
                            value = value + row_bias(bias_rows, row)
                        store_four(rows, route * cfg.rows + column, value.to(out), out)

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
        name: fx.Constexpr[str],
        stream: fx.Stream,
    ):
        gemm2_kernel(
            rows, h, h_scales, codes, scales, of_rows, bias_rows, sorted_ids, expert_ids, tokens,
            topk,
        ).launch(grid=(cfg.row_tiles * token_tiles, 1, 1), block=(THREADS, 1, 1), stream=stream)

    return launcher(variant, launch)
