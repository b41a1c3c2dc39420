"""Stage 1: ``h[route] = quantise(act(x Wg^T + bg, x Wu^T + bu))``, a row per route.

A wave owns 32 columns of h: two 16-row blocks of gate and the two of up that belong to them. So a
lane holds gate and up of the same four columns of one token, and the 32 values of an MX block lie
in the four lanes that share a token: its maximum is two lane exchanges away. Codes and scales go
where stage 2 reads them, in plain rows.
"""

from functools import cache

import flydsl.compiler as flyc
import flydsl.expr as fx

from mixmoe.activations import ActivationKind
from mixmoe.backends.cdna import mainloop
from mixmoe.backends.cdna.activate import Scalars, activate
from mixmoe.backends.cdna.atoms import MFMA_ROWS, SCALE_BLOCK, WAVE
from mixmoe.backends.cdna.config import THREADS, WAVES, Gemm
from mixmoe.backends.cdna.mainloop import TOKEN_MASK
from mixmoe.backends.cdna.prebuilt import launcher
from mixmoe.backends.cdna.quantise import encode, scale_byte
from mixmoe.backends.cdna.tokens import ScaleFill, Tokens, shared_storage
from mixmoe.backends.cdna.weights import Weights
from mixmoe.formats import Rounding


def block_max(values: list[fx.Vector]) -> fx.Float32:
    """Largest magnitude of a block of 32: a lane's eight values, then the lanes 16 and 32 on."""
    top = fx.Float32(0.0)
    for vector in values:
        for i in range(4):
            top = fx.max(top, abs(vector[i]))
    for distance in (16, 32):
        top = fx.max(top, fx.gpu.shuffle_xor(top, distance, WAVE))
    return top


def gate_up(acc, block: int, group: int) -> list[fx.Vector]:
    """Four columns of gate and of up of one token."""
    return [acc[half, block, group].load() for half in range(2)]


def add_bias(values: list[fx.Vector], bias: fx.Tensor, gate_at, rows: int) -> list[fx.Vector]:
    """Gate and up with their biases; the up bias lies ``rows`` after the gate's."""
    return [v + mainloop.row_bias(bias, gate_at + i * rows) for i, v in enumerate(values)]


@cache
def build(cfg: Gemm, kind: ActivationKind, rounding: Rounding, bias: bool, weighted: bool):
    """The launcher for one GEMM shape, activation and rounding; ``weighted`` multiplies h by the
    routing weight. h takes the tokens' format."""
    variant = f"gemm1_{cfg.name}_{kind.value}_{rounding.value}_{bias:d}{weighted:d}"
    code = fx.Int16 if cfg.token.bits == 4 else fx.Int32  # four codes

    @flyc.kernel(name=variant)
    def gemm1_kernel(
        h: fx.Tensor,  # (R, I) codes, four an item
        h_scales: fx.Tensor,  # (R, I / 32)
        x: fx.Tensor,  # (T, H) codes as words
        x_scales: fx.Tensor,  # (T, H / 32)
        codes: fx.Tensor,  # (E, ...) words
        scales: fx.Tensor,  # (E, ...) words
        bias_rows: fx.Tensor,  # (E, 2 I) f32, gate then up
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
        work = mainloop.work_of(cfg, sorted_ids, expert_ids, tokens)
        if work.used:
            place = mainloop.stand(work)
            lds = fx.SharedAllocator().allocate(shared_storage(cfg)).peek()
            scalars = Scalars(limit, alpha, beta, beta2)

            # 1. Which tokens: padding reads row 0 and writes nothing
            def token_of(t):
                token = fx.Int32(sorted_ids[work.routes + t]) & TOKEN_MASK
                return (token < tokens).select(token, 0)

            # 2. Multiply
            first = (work.rows * WAVES + place.wave) * cfg.blocks
            ops = mainloop.Operands(
                Weights(cfg, place, codes, scales, first),
                Tokens(cfg, place, lds, x, token_of),
                ScaleFill(cfg, place, lds, x_scales, token_of),
            )
            acc = mainloop.make_accumulators(cfg)
            mainloop.run(cfg, ops, acc)

            # 3. Activate, quantise and store blocks of 32 columns of one route
            for group in fx.range_constexpr(cfg.tokens // MFMA_ROWS):
                at = work.routes + group * MFMA_ROWS + place.r
                packed = fx.Int32(sorted_ids[at])
                token, slot = packed & TOKEN_MASK, packed >> 24
                route = fx.Int64(token * topk + slot)
                for pair in fx.range_constexpr(cfg.blocks // 2):
                    column = (first + 2 * pair) * MFMA_ROWS
                    if column < cfg.rows:
                        both = []
                        for b in fx.range_constexpr(2):
                            values = gate_up(acc, 2 * pair + b, group)
                            if fx.const_expr(bias):
                                row = place.expert * 2 * cfg.rows + column + b * MFMA_ROWS
                                values = add_bias(values, bias_rows, row + place.g * 4, cfg.rows)
                            both.append(activate(kind, scalars, *values))
                        if fx.const_expr(weighted):
                            weight = fx.Float32(sorted_weights[at])
                            both = [value * weight for value in both]
                        byte = scale_byte(cfg.token, block_max(both), rounding)
                        if token < tokens:
                            for b in fx.range_constexpr(2):
                                four = (column + b * MFMA_ROWS) // 4 + place.g
                                out = route * (cfg.rows // 4) + four
                                word = encode(cfg.token, both[b], byte).to(code)
                                (fx.get_iter(h) + out).store(word)
                            if place.g == 0:
                                out = route * (cfg.rows // SCALE_BLOCK) + column // SCALE_BLOCK
                                (fx.get_iter(h_scales) + out).store(byte.to(fx.Uint8))

    @flyc.jit
    def launch(
        h: fx.Tensor,
        h_scales: fx.Tensor,
        x: fx.Tensor,
        x_scales: fx.Tensor,
        codes: fx.Tensor,
        scales: fx.Tensor,
        bias_rows: fx.Tensor,
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
            h, h_scales, x, x_scales, codes, scales, bias_rows, sorted_ids, sorted_weights,
            expert_ids, tokens, topk, limit, alpha, beta, beta2,
        ).launch(grid=(cfg.row_tiles * token_tiles, 1, 1), block=(THREADS, 1, 1), stream=stream)

    return launcher(variant, launch)
