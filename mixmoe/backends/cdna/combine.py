"""``y[t] = sum_k weight[t, k] rows[t topk + k]`` in slot order, float32, rounded once."""

from functools import cache

import flydsl.compiler as flyc
import flydsl.expr as fx

from mixmoe.backends.cdna.config import THREADS
from mixmoe.backends.cdna.prebuilt import launcher

COLUMNS = 4  # of a thread


@cache
def build(source: type[fx.Numeric], out: type[fx.Numeric], topk: int, weighted: bool):
    """The launcher for the types of rows and y; ``weighted`` multiplies by the routing weight."""
    variant = f"combine_{source.__name__}_{out.__name__}_{topk}_{weighted:d}"

    @flyc.kernel(name=variant)
    def combine_kernel(
        y: fx.Tensor,  # (T, H), rows row_stride apart
        rows: fx.Tensor,  # (T topk, H)
        weights: fx.Tensor,  # (T topk) f32
        tokens: fx.Int32,
        hidden: fx.Int32,
        row_stride: fx.Int32,
    ):
        index = fx.Int32(fx.block_idx.x) * THREADS + fx.Int32(fx.thread_idx.x)
        per_row = hidden // COLUMNS
        token, column = index // per_row, index % per_row * COLUMNS
        if token < tokens:
            four = fx.make_layout(COLUMNS, 1)
            load = fx.make_copy_atom(fx.UniversalCopy(COLUMNS * source.width), source)
            store = fx.make_copy_atom(fx.UniversalCopy(COLUMNS * out.width), out)
            frags = [fx.make_rmem_tensor(COLUMNS, source) for _ in range(topk)]

            # 1. All slots at once
            for slot in fx.range_constexpr(topk):
                route = fx.Int64(token) * topk + slot
                at = fx.get_iter(rows) + (route * hidden + column)
                fx.copy(load, at.view(four), frags[slot])

            # 2. Sum in order
            total = fx.Vector.filled(COLUMNS, 0.0, fx.Float32)
            for slot in fx.range_constexpr(topk):
                value = frags[slot].load().to(fx.Float32)
                if fx.const_expr(weighted):
                    route = fx.Int64(token) * topk + slot
                    value = value * (fx.get_iter(weights) + route).load()
                total = total + value

            result = fx.make_rmem_tensor(COLUMNS, out)
            result.store(total.to(out))
            at = fx.get_iter(y) + (fx.Int64(token) * row_stride + column)
            fx.copy(store, result, at.view(four))

    @flyc.jit
    def launch(
        y: fx.Tensor,
        rows: fx.Tensor,
        weights: fx.Tensor,
        tokens: fx.Int32,
        hidden: fx.Int32,
        row_stride: fx.Int32,
        grid: fx.Int32,
        name: fx.Constexpr[str],
        stream: fx.Stream,
    ):
        combine_kernel(y, rows, weights, tokens, hidden, row_stride).launch(
            grid=(grid, 1, 1), block=(THREADS, 1, 1), stream=stream
        )

    return launcher(variant, launch)
