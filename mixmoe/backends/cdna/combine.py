"""``y[t] = sum_k weight[t, k] rows[t topk + k]`` in slot order, float32, rounded once."""

from functools import cache

import flydsl.compiler as flyc
import flydsl.expr as fx

from mixmoe.backends.cdna.atoms import SCALE_BLOCK
from mixmoe.backends.cdna.config import THREADS
from mixmoe.backends.cdna.prebuilt import launcher
from mixmoe.backends.cdna.quantise import decode

COLUMNS = 4  # of a thread


def scaled(frag, row_scales: fx.Tensor, at, coded: bool) -> fx.Vector:
    """float32 of four columns ``at`` (in fours): of a row, or of its e4m3 codes and their scale."""
    if not coded:
        return frag.load().to(fx.Float32)
    byte = fx.Int32((fx.get_iter(row_scales) + at // (SCALE_BLOCK // COLUMNS)).load()) & 0xFF
    return decode(frag.load()[0], byte)


@cache
def build(source: type[fx.Numeric], out: type[fx.Numeric], topk: int, weighted: bool,
          coded: bool = False):
    """The launcher for the types of rows and y; ``weighted`` multiplies by the routing weight;
    ``coded`` rows are words of four e4m3 codes with scales."""
    variant = f"combine_{source.__name__}_{out.__name__}_{topk}_{weighted:d}{coded:d}"
    items = 1 if coded else COLUMNS

    @flyc.kernel(name=variant)
    def combine_kernel(
        y: fx.Tensor,  # (T, H), rows row_stride apart
        rows: fx.Tensor,  # (T topk, H)
        row_scales: fx.Tensor,  # (T topk, H / 32), of codes
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
            load = fx.make_copy_atom(fx.UniversalCopy(items * source.width), source)
            store = fx.make_copy_atom(fx.UniversalCopy(COLUMNS * out.width), out)
            frags = [fx.make_rmem_tensor(items, source) for _ in range(topk)]

            # 1. All slots at once
            for slot in fx.range_constexpr(topk):
                route = fx.Int64(token) * topk + slot
                at = fx.get_iter(rows) + (route * hidden + column) // (COLUMNS // items)
                fx.copy(load, at.view(fx.make_layout(items, 1)), frags[slot])

            # 2. Sum in order
            total = fx.Vector.filled(COLUMNS, 0.0, fx.Float32)
            for slot in fx.range_constexpr(topk):
                route = fx.Int64(token) * topk + slot
                at = route * per_row + column // COLUMNS
                value = scaled(frags[slot], row_scales, at, coded)
                if fx.const_expr(weighted):
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
        row_scales: fx.Tensor,
        weights: fx.Tensor,
        tokens: fx.Int32,
        hidden: fx.Int32,
        row_stride: fx.Int32,
        grid: fx.Int32,
        name: fx.Constexpr[str],
        stream: fx.Stream,
    ):
        combine_kernel(y, rows, row_scales, weights, tokens, hidden, row_stride).launch(
            grid=(grid, 1, 1), block=(THREADS, 1, 1), stream=stream
        )

    return launcher(variant, launch)
