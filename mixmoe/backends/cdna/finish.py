"""The end of a stage 1 whose K was split over workgroups: ``h[route] = quantise(act(sum of
parts))``.

The float32 sums of the parts are added in their order, so the result is the same on every run;
bias and routing weight are applied here, for any I. A thread takes eight columns of one sorted
position, four neighbours share a block of 32.
"""

from functools import cache

import flydsl.compiler as flyc
import flydsl.expr as fx

from mixmoe.activations import ActivationKind
from mixmoe.backends.cdna import mainloop
from mixmoe.backends.cdna.activate import Scalars, activate
from mixmoe.backends.cdna.atoms import SCALE_BLOCK
from mixmoe.backends.cdna.config import THREADS, Gemm
from mixmoe.backends.cdna.prebuilt import launcher
from mixmoe.backends.cdna.quantise import MANTISSA, VALUES, scale_bits, store_codes
from mixmoe.backends.cdna.tokens import TOKEN_MASK
from mixmoe.formats import Rounding


def summed(cfg: Gemm, sums: fx.Tensor, positions, position, column):
    """Eight columns of a position, as two vectors of four, over all parts."""
    totals = [fx.Vector.filled(4, 0.0, fx.Float32) for _ in range(2)]
    for part in range(cfg.split_k):
        row = (fx.Int64(positions) * part + position) * (2 * cfg.rows) + column
        for i in range(2):
            totals[i] = totals[i] + mainloop.row_bias(sums, row + 4 * i)
    return totals


@cache
def build(cfg: Gemm, kind: ActivationKind, rounding: Rounding, bias: bool, weighted: bool,
          limited: bool):
    """The launcher for one split GEMM, activation and rounding."""
    variant = f"finish_{cfg.name}_{kind.value}_{rounding.value}_{bias:d}{weighted:d}{limited:d}"

    @flyc.kernel(name=variant)
    def finish_kernel(
        h: fx.Tensor,  # (R, I) codes as words
        h_scales: fx.Tensor,  # (R, I / 32)
        sums: fx.Tensor,  # (split_k, P, 2 I) f32
        bias_rows: fx.Tensor,  # (E, 2 I) f32, gate then up
        sorted_ids: fx.Tensor,
        sorted_weights: fx.Tensor,
        expert_ids: fx.Tensor,
        positions: fx.Int32,
        tokens: fx.Int32,
        topk: fx.Int32,
        limit: fx.Float32,
        alpha: fx.Float32,
        beta: fx.Float32,
        beta2: fx.Float32,
    ):
        index = fx.Int32(fx.block_idx.x) * THREADS + fx.Int32(fx.thread_idx.x)
        per_row = cfg.rows // VALUES
        position, part = index // per_row, index % per_row
        if position < positions:
            packed = fx.Int32(sorted_ids[position])
            token = packed & TOKEN_MASK
            if token < tokens:
                # 1. Sum the parts, gate and up
                column = part * VALUES
                halves = [
                    summed(cfg, sums, positions, position, column + half * cfg.rows)
                    for half in range(2)
                ]

                # 2. Bias, activation, routing weight
                scalars = Scalars(limit, alpha, beta, beta2)
                expert = fx.Int32(expert_ids[position // (cfg.tokens * cfg.sort_tiles)])
                values = []
                for i in fx.range_constexpr(2):
                    gate, up = halves[0][i], halves[1][i]
                    if fx.const_expr(bias):
                        row = expert * 2 * cfg.rows + column + 4 * i
                        gate = gate + mainloop.row_bias(bias_rows, row)
                        up = up + mainloop.row_bias(bias_rows, row + cfg.rows)
                    value = activate(kind, scalars, gate, up, limited)
                    if fx.const_expr(weighted):
                        value = value * fx.Float32(sorted_weights[position])
                    values.append(value)

                # 3. Scale of the block, codes
                top = fx.max(*(abs(value).reduce(fx.ReductionOp.MAX) for value in values))
                for distance in (1, 2):
                    top = fx.max(top, fx.gpu.shuffle_xor(top, distance, 64))
                bits = scale_bits(cfg.token, top, rounding)
                route = fx.Int64(token * topk + (packed >> 24))
                eight = values[0].shuffle(values[1], list(range(VALUES)))
                store_codes(cfg.token, h, eight, bits, route * per_row + part)
                if part % 4 == 0:
                    at = route * (cfg.rows // SCALE_BLOCK) + part // 4
                    (fx.get_iter(h_scales) + at).store((bits >> MANTISSA).to(fx.Uint8))

    @flyc.jit
    def launch(
        h: fx.Tensor,
        h_scales: fx.Tensor,
        sums: fx.Tensor,
        bias_rows: fx.Tensor,
        sorted_ids: fx.Tensor,
        sorted_weights: fx.Tensor,
        expert_ids: fx.Tensor,
        positions: fx.Int32,
        tokens: fx.Int32,
        topk: fx.Int32,
        limit: fx.Float32,
        alpha: fx.Float32,
        beta: fx.Float32,
        beta2: fx.Float32,
        groups: fx.Int32,
        name: fx.Constexpr[str],
        stream: fx.Stream,
    ):
        finish_kernel(
            h, h_scales, sums, bias_rows, sorted_ids, sorted_weights, expert_ids, positions,
            tokens, topk, limit, alpha, beta, beta2,
        ).launch(grid=(groups, 1, 1), block=(THREADS, 1, 1), stream=stream)

    return launcher(variant, launch)
