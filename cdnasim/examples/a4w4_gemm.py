"""MXFP4 x MXFP4 GEMM with scaled matrix instructions: C = (A * sA) (B * sB)^T, f32 out. A FlyDSL
program to simulate.

    cdnasim run cdnasim/examples/a4w4_gemm.py [--rows 64 --cols 128 --depth 1024]

A (M, K) and B (N, K) hold e2m1 codes, two per byte, low nibble first; the scales are E8M0, one byte
per 32 values along K. A workgroup of 4 waves makes a 32 x 64 tile; A goes through LDS (two buffers,
16-byte blocks swizzled by the row), B straight to registers. Lane maps: docs/cdnasim.md.
"""

import argparse
from typing import Any

import flydsl.compiler as flyc
import flydsl.expr as fx
import torch
from flydsl.expr import const_expr, gpu, range_constexpr

BLOCK_M, BLOCK_N, BLOCK_K = 32, 64, 256
THREADS = 256
DEFAULT_STREAM = fx.Stream(None)
ROW_DWORDS = BLOCK_K // 8  # 8 codes a dword
BLOCKS_PER_ROW = ROW_DWORDS // 4  # 16-byte blocks
STEPS = BLOCK_K // 128  # matrix instructions along K


@flyc.jit
def a4w4_gemm(
    C: fx.Tensor,
    A: fx.Tensor,
    B: fx.Tensor,
    sA: fx.Tensor,
    sB: fx.Tensor,
    m_tiles: fx.Constexpr[int],
    n_tiles: fx.Constexpr[int],
    depth: fx.Constexpr[int],
    stream: fx.Stream = DEFAULT_STREAM,
) -> None:
    """C (M, N) f32; A (M, K/8), B (N, K/8) i32 words of codes; sA (M, K/128), sB (N, K/128) i32
    words of scale bytes.
    """
    k_tiles = depth // BLOCK_K

    @fx.struct
    class Shared:
        a0: fx.Array[fx.Int32, BLOCK_M * ROW_DWORDS, 16]
        a1: fx.Array[fx.Int32, BLOCK_M * ROW_DWORDS, 16]

    @flyc.kernel
    def kernel(C: fx.Tensor, A: fx.Tensor, B: fx.Tensor, sA: fx.Tensor, sB: fx.Tensor) -> None:
        tid = fx.Int32(fx.thread_idx.x)
        bm, bn = fx.block_idx.x, fx.block_idx.y
        wave, lane = tid // 64, tid % 64
        group, line = lane // 16, lane % 16
        fp4 = fx.Float4E2M1FN
        atom = fx.make_mma_atom(
            fx.rocdl.cdna4.MFMA_Scale(16, 16, 128, fp4, fp4, opsel_a=0, opsel_b=0)
        )
        wide, word = (
            fx.make_copy_atom(fx.rocdl.BufferCopy128b(), fx.Int32),
            fx.make_copy_atom(fx.rocdl.BufferCopy32b(), fx.Int32),
        )
        shared = fx.make_copy_atom(fx.UniversalCopy128b(), fx.Int32)
        lds = fx.SharedAllocator().allocate(Shared).peek()
        buffers = (lds.a0.ptr, lds.a1.ptr)

        def row_of(tensor: Any, row: Any, width: Any) -> Any:
            return fx.logical_divide(
                fx.slice(fx.rocdl.make_buffer_tensor(tensor, max_size=False), (row, None)),
                fx.make_layout(width, 1),
            )

        def fetch(tensor: Any, row: Any, block: Any) -> Any:
            """16 bytes of one row -> registers."""
            r = fx.make_rmem_tensor(4, fx.Int32)
            fx.copy(wide, fx.slice(row_of(tensor, row, 4), (None, block)), r)
            return r

        def scale(tensor: Any, row: Any, step: Any) -> Any:
            """The four scale bytes of 128 k; a lane's own block is byte `group`, moved to byte 0
            where the atom reads it.
            """
            r = fx.make_rmem_tensor(1, fx.Int32)
            fx.copy(word, fx.slice(row_of(tensor, row, 1), (None, step)), r)
            return fx.memref_load(r, 0).shrui(group * 8)

        def place(row: Any, block: Any) -> Any:
            return row * ROW_DWORDS + (block ^ (row % BLOCKS_PER_ROW)) * 4

        def view(buffer: Any, offset: Any) -> Any:
            return fx.make_view(fx.add_offset(buffer, offset), fx.make_layout(4, 1))

        row, block = tid // BLOCKS_PER_ROW, tid % BLOCKS_PER_ROW
        n = bn * BLOCK_N + wave * 16 + line
        acc = [fx.make_rmem_tensor(4, fx.Float32) for _ in range_constexpr(BLOCK_M // 16)]
        for a in acc:
            a.fill(0)

        # 1. first tile of A -> LDS
        fx.copy(shared, fetch(A, bm * BLOCK_M + row, block), view(buffers[0], place(row, block)))
        gpu.barrier()
        for kt in range_constexpr(k_tiles):
            # 2. next tile of A on its way while this one is used
            if const_expr(kt + 1 < k_tiles):
                coming = fetch(A, bm * BLOCK_M + row, (kt + 1) * BLOCKS_PER_ROW + block)
            for step in range_constexpr(STEPS):
                k = kt * STEPS + step
                b, b_scale = fetch(B, n, k * 4 + group), scale(sB, n, k)
                for i in range_constexpr(BLOCK_M // 16):
                    m = i * 16 + line
                    a = fx.make_rmem_tensor(4, fx.Int32)
                    fx.copy(shared, view(buffers[kt % 2], place(m, step * 4 + group)), a)
                    fx.gemm(
                        atom,
                        acc[i],
                        a,
                        b,
                        acc[i],
                        scale_a=scale(sA, bm * BLOCK_M + m, k),
                        scale_b=b_scale,
                    )
            # 3. store it into the other buffer
            if const_expr(kt + 1 < k_tiles):
                fx.copy(shared, coming, view(buffers[(kt + 1) % 2], place(row, block)))
                gpu.barrier()

        # 4. D register r of a lane is row 4 * group + r, column line
        out = fx.make_copy_atom(fx.rocdl.BufferCopy32b(), fx.Float32)
        for i in range_constexpr(BLOCK_M // 16):
            for r in range_constexpr(4):
                value = fx.make_rmem_tensor(1, fx.Float32)
                fx.memref_store(fx.memref_load(acc[i], r), value, 0)
                fx.copy(
                    out,
                    value,
                    fx.slice(row_of(C, bm * BLOCK_M + i * 16 + group * 4 + r, 1), (None, n)),
                )

    kernel(C, A, B, sA, sB).launch(grid=(m_tiles, n_tiles, 1), block=(THREADS, 1, 1), stream=stream)


E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def dequantise(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """codes (R, K/2) uint8, scales (R, K/32) uint8 -> (R, K) float64."""
    nibbles = torch.stack([codes & 15, codes >> 4], -1).reshape(len(codes), -1)
    value = E2M1[(nibbles & 7).long()] * torch.where(nibbles > 7, -1.0, 1.0)
    return value.double() * torch.exp2(scales.double() - 127).repeat_interleave(32, 1)


def main() -> None:
    p = argparse.ArgumentParser()
    for name, value in (('rows', 64), ('cols', 128), ('depth', 1024)):
        p.add_argument(f'--{name}', type=int, default=value)
    arg = p.parse_args()
    for name, size, unit in (
        ('rows', arg.rows, BLOCK_M),
        ('cols', arg.cols, BLOCK_N),
        ('depth', arg.depth, BLOCK_K),
    ):
        if size % unit:
            p.error(f'--{name} {size}: a multiple of {unit} is needed')
    arch = torch.cuda.get_device_properties(0).gcnArchName.split(':')[0]
    if arch != 'gfx950':
        raise SystemExit(f'a4w4_gemm needs the scaled matrix instruction of gfx950, not {arch}')
    torch.manual_seed(0)
    a, b = (
        torch.randint(0, 256, (r, arg.depth // 2), dtype=torch.uint8) for r in (arg.rows, arg.cols)
    )
    sa, sb = (
        torch.randint(120, 134, (r, arg.depth // 32), dtype=torch.uint8)
        for r in (arg.rows, arg.cols)
    )
    c = torch.zeros(arg.rows, arg.cols)
    a4w4_gemm(
        c,
        *(t.view(torch.int32) for t in (a, b, sa, sb)),
        arg.rows // BLOCK_M,
        arg.cols // BLOCK_N,
        arg.depth,
    )
    want = dequantise(a, sa) @ dequantise(b, sb).T
    error = ((c.double() - want).norm(dim=1) / want.norm(dim=1)).max().item()
    print(f'worst row, relative error against float64: {error:.2e}')
    assert error < 1e-6, 'the result is wrong'


if __name__ == '__main__':
    main()
