"""Stage 1 without scaled MFMAs: ``h[route] = act(x Wg^T + bg, x Wu^T + bu)``, a row per route.

h is written in its 16-bit format, or in float32 where ``quantise`` makes its codes from it: the
scale of a whole row is known only when every workgroup of the row is done.
"""

from functools import cache

import flydsl.compiler as flyc
import flydsl.expr as fx

from mixmoe.activations import ActivationKind
from mixmoe.backends.cdna.activate import Scalars, activate
from mixmoe.backends.cdna.atoms import MFMA_ROWS
from mixmoe.backends.cdna.config import THREADS, WAVES
from mixmoe.backends.cdna.mainloop import TOKEN_MASK, row_bias
from mixmoe.backends.cdna.plain import mainloop
from mixmoe.backends.cdna.plain.config import Gemm
from mixmoe.backends.cdna.plain.epilogue import Extras, row_scales, store_four, token_scale
from mixmoe.backends.cdna.plain.place import stand, work_of
from mixmoe.backends.cdna.prebuilt import launcher


def gate_up(cfg: Gemm, sums, block: int, group: int, scales) -> list[fx.Vector]:
    """Four columns of gate and of up of one token."""
    (gate, up), of_token = scales
    return [
        mainloop.results(cfg, sums, half, block, group, (of_rows, of_token))
        for half, of_rows in enumerate((gate, up))
    ]


@cache
def build(cfg: Gemm, kind: ActivationKind, out: type[fx.Numeric], extras: Extras):
    """The launcher for one GEMM shape, activation, type of h, and what is added on the way."""
    variant = f"gemm1_{cfg.name}_{kind.value}_{out.__name__}_{extras.name}"

    @flyc.kernel(name=variant)
    def gemm1_kernel(
        h: fx.Tensor,  # (R, I)
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
    ):
        work = work_of(cfg, sorted_ids, expert_ids, tokens)
        if work.used:
            place = stand(work)
            lds = fx.SharedAllocator().allocate(mainloop.shared_storage(cfg)).peek()
            scalars = Scalars(limit, alpha, beta, beta2)

            # 1. Which rows of x: padding reads row 0 and writes nothing
            def row_of(t):
                packed = fx.Int32(sorted_ids[work.routes + t])
                token = packed & TOKEN_MASK
                row = token * topk + (packed >> 24) if extras.per_route else token
                return (token < tokens).select(row, 0)

            # 2. Multiply
            first = (work.rows * WAVES + place.wave) * cfg.blocks
            sources = mainloop.Sources(codes, scales, x, x_scales)
            loads = mainloop.Loads(cfg, place, sources, row_of, first, lds)
            sums = mainloop.Sums(cfg, loads.keys)
            mainloop.run(cfg, loads, sums)

            # 3. Scale, activate, store four columns of one route
            for group in fx.range_constexpr(cfg.tokens // MFMA_ROWS):
                at = work.routes + group * MFMA_ROWS + place.r
                packed = fx.Int32(sorted_ids[at])
                token, slot = packed & TOKEN_MASK, packed >> 24
                of_token = token_scale(cfg, x_scales, row_of(group * MFMA_ROWS + place.r))
                route = fx.Int64(token * topk + slot)
                for block in fx.range_constexpr(cfg.blocks):
                    column = (first + block) * MFMA_ROWS + place.g * 4
                    if (token < tokens) & (column < cfg.rows):
                        row = place.expert * 2 * cfg.rows + column
                        both = [row_scales(cfg, of_rows, row + i * cfg.rows) for i in range(2)]
                        values = gate_up(cfg, sums, block, group, (both, of_token))
                        if fx.const_expr(extras.bias):
                            values = [
                                v + row_bias(bias_rows, row + i * cfg.rows)
                                for i, v in enumerate(values)
                            ]
                        value = activate(kind, scalars, *values)
                        if fx.const_expr(extras.weighted):
                            value = value * fx.Float32(sorted_weights[at])
                        if fx.const_expr(extras.smooth):
                            row = place.expert * cfg.rows + column
                            value = value * row_bias(smooth, row)
                        store_four(h, route * cfg.rows + column, value.to(out), out)

    @flyc.jit
    def launch(
        h: fx.Tensor,
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
        name: fx.Constexpr[str],
        stream: fx.Stream,
    ):
        gemm1_kernel(
            h, x, x_scales, codes, scales, of_rows, bias_rows, smooth, sorted_ids, sorted_weights,
            expert_ids, tokens, topk, limit, alpha, beta, beta2,
        ).launch(grid=(cfg.row_tiles * token_tiles, 1, 1), block=(THREADS, 1, 1), stream=stream)

    return launcher(variant, launch)
