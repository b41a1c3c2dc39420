"""Stage 2: ``rows[route] = h[route] Wd^T + bd``, a row per route, the same bits on every run."""

from functools import cache

import flydsl.compiler as flyc
import flydsl.expr as fx

from mixmoe.backends.cdna import mainloop
from mixmoe.backends.cdna.atoms import MFMA_ROWS
from mixmoe.backends.cdna.config import THREADS, WAVES, Gemm
from mixmoe.backends.cdna.mainloop import TOKEN_MASK
from mixmoe.backends.cdna.prebuilt import launcher
from mixmoe.backends.cdna.tokens import ScaleFill, Tokens, shared_storage
from mixmoe.backends.cdna.weights import Weights


@cache
def build(cfg: Gemm, out: type[fx.Numeric], bias: bool):
    """The launcher for one GEMM shape, output type, with or without a bias."""
    variant = f"gemm2_{cfg.name}_{out.__name__}_{bias:d}"

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
    ):
        work = mainloop.work_of(cfg, sorted_ids, expert_ids, tokens)
        if work.used:
            place = mainloop.stand(work)
            lds = fx.SharedAllocator().allocate(shared_storage(cfg)).peek()

            # 1. Which routes: padding reads row 0 and writes nothing
            def route_of(t):
                packed = fx.Int32(sorted_ids[work.routes + t])
                token = packed & TOKEN_MASK
                return (token < tokens).select(token * topk + (packed >> 24), 0)

            # 2. Multiply
            first = (work.rows * WAVES + place.wave) * cfg.blocks
            ops = mainloop.Operands(
                Weights(cfg, place, codes, scales, first),
                Tokens(cfg, place, lds, h, route_of),
                ScaleFill(cfg, place, lds, h_scales, route_of),
            )
            acc = mainloop.make_accumulators(cfg)
            mainloop.run(cfg, ops, acc)

            # 3. Bias, store four columns of one route at a time
            quad = fx.make_copy_atom(fx.UniversalCopy(4 * out.width), out)
            for group in fx.range_constexpr(cfg.tokens // MFMA_ROWS):
                at = work.routes + group * MFMA_ROWS + place.r
                packed = fx.Int32(sorted_ids[at])
                token = packed & TOKEN_MASK
                for b in fx.range_constexpr(cfg.blocks):
                    column = (first + b) * MFMA_ROWS + place.g * 4
                    if (token < tokens) & (column < cfg.rows):
                        value = acc[0, b, group].load()
                        if fx.const_expr(bias):
                            value = value + mainloop.row_bias(
                                bias_rows, place.expert * cfg.rows + column
                            )
                        route = fx.Int64(token * topk + (packed >> 24))
                        frag = fx.make_rmem_tensor(4, out)
                        frag.store(value.to(out))
                        dest = fx.get_iter(rows) + route * cfg.rows + column
                        fx.copy(quad, frag, dest.view(fx.make_layout(4, 1)))

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
        name: fx.Constexpr[str],
        stream: fx.Stream,
    ):
        gemm2_kernel(
            rows, h, h_scales, codes, scales, bias_rows, sorted_ids, expert_ids, tokens, topk
        ).launch(grid=(cfg.row_tiles * token_tiles, 1, 1), block=(THREADS, 1, 1), stream=stream)

    return launcher(variant, launch)
