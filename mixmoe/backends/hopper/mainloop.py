"""What the Hopper matrix kernels share: the order of packed weights and their way into wgmma.

Fragment order (weights, swapped to wgmma's A operand). A unit is 16 weight rows x 128 K:

    words   int32 (E * R/16, K128, 256)  K128 = ceil(K / 128), unit = [r8 2][g 8][q 4][j 4] words
    scales  uint8 (E * R/16, K128 * 64)  unit = [r8 2][g 8][q 4] bytes

Lane 4g + q of a warp owns rows 8 * r8 + g and of each the 32-block q of the 128 columns, all of it:
word j holds its columns 8j .. 8j + 7 and is what wgmma m64k32 takes in step j (PTX ISA, wgmma A
fragment), codes 0-3 as slots 32j + 4q .. + 3 and codes 4-7 as slots 32j + 16 + 4q .. + 3. So four
words share one scale byte and its tables, and the rows of B (x, h) lie in the order
`mixmoe.preshuffle.HOPPER_SLOTS`: slot 16i + 4q + b of 128 holds column 32q + 4i + b (`column_of`).
In a word the magnitude of code i lies at bits 4i .. 4i + 2, the sign of codes 0-3 at bits 7, 15,
23, 31 and of codes 4-7 at bits 3, 11, 19, 27.
In gate/up weights rows 0-7 of a unit are gate rows and rows 8-15 the up rows of the same columns.
A block is worth 2^k relative to its row. Its scale byte is 8 * (k + 5), k in [-5, 6]; for kernels
compiled with WIDE it is k + 8, k in [-8, 6]. Columns past K are zero words and zero bytes.

One order serves every tile: a TMA box (rows/16, K/128, 256) is any block of 16 x 128 units.
"""

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import _unwrap_if_constexpr, builtin
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mixmoe.activations import Activation, ActivationKind

# Names that moved between Triton 3.6 and 3.9; both are builtins, usable inside a kernel.
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
cta_barrier = getattr(gl, "thread_barrier", None) or gl.barrier
cp_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared

# Activation kinds as kernels take them; scalars stay run-time values, an absent limit is None.
SILU = gl.constexpr(0)
SWIGLU = gl.constexpr(1)
GELU_TANH = gl.constexpr(2)
SITUV2 = gl.constexpr(3)
KINDS = {
    ActivationKind.SILU: 0,
    ActivationKind.SWIGLU: 1,
    ActivationKind.GELU_TANH: 2,
    ActivationKind.SITUV2: 3,
}

UNIT_ROWS, UNIT_COLUMNS, UNIT_WORDS, UNIT_SCALES = 16, 128, 256, 64


@builtin
def smem_cast(
    memory: Any, dtype: Any, shape: Any, layout: Any, _semantic: Any = None
) -> Any:  # a method of another name in 3.6 and in 3.9
    shape = [_unwrap_if_constexpr(extent) for extent in shape]
    return _semantic.memdesc_reinterpret(
        memory, _unwrap_if_constexpr(dtype), shape, _unwrap_if_constexpr(layout)
    )


def weight_descriptors(
    words: Any, scales: Any, row_units: int, k_units: int
) -> tuple[TensorDescriptor, TensorDescriptor]:
    """TMA boxes of row_units x k_units units: words (U, K128, 256), scales (U, K128 * 16), int32.

    `scales` is the uint8 tensor seen as int32. Both land dense in shared memory (no swizzle): a
    warp reads half a unit as 512 consecutive bytes, so there is no bank conflict to avoid.
    """
    return (
        TensorDescriptor.from_tensor(
            words, [row_units, k_units, UNIT_WORDS], gl.NVMMASharedLayout(0, 32, 3)
        ),
        TensorDescriptor.from_tensor(
            scales, [row_units, k_units * UNIT_SCALES // 4], gl.NVMMASharedLayout(0, 32, 2)
        ),
    )


def row_descriptor(codes: Any, rows: int, chunks: int) -> TensorDescriptor:
    """fp8 rows (R, pitch) seen as (R, pitch / 128, 128); a box is `rows` rows of `chunks` x 128.

    Rows and chunks outside read as zero. The pitch is a multiple of 128 and the padding finite.
    """
    pitch = codes.stride(0)
    return TensorDescriptor(
        codes, [codes.shape[0], -(-codes.shape[1] // 128), 128], [pitch, 128, 1],
        [rows, chunks, 128], gl.NVMMASharedLayout(128, 8, 3),
    )


def activation_scalars(act: Activation) -> tuple[float | None, float, float, float]:
    """(limit, alpha, beta, beta2) as `activate` takes them."""
    return (act.limit, act.alpha, act.beta, act.beta2)


@gluon.jit
def sigmoid(x):
    """1 / (1 + 2^(-x log2 e)) by the approximate instructions, each good to 2 ulp of its result.

    Without denormals there are no scalings around them: 4 instructions for 12.
    """
    return gl.inline_asm_elementwise(
        """{
        .reg .f32 e;
        mul.ftz.f32 e, $1, 0fBFB8AA3B;
        ex2.approx.ftz.f32 e, e;
        add.ftz.f32 e, e, 0f3F800000;
        rcp.approx.ftz.f32 $0, e;
        }""",
        "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1,
    )


@gluon.jit
def tanh(x):
    """The series below 1/4, where 2 sigmoid(2x) - 1 would cancel: relative error under 4e-7."""
    y = x * x
    small = x * (1.0 + y * (-1.0 / 3.0 + y * (2.0 / 15.0 - y * (17.0 / 315.0))))
    return gl.where(gl.abs(x) < 0.25, small, 2.0 * sigmoid(2.0 * x) - 1.0)


@gluon.jit
def activate(gate, up, limit, alpha, beta, beta2, KIND: gl.constexpr):
    """h = act(gate, up) in float32; see `mixmoe.activations.Activation` for the formulas."""
    if limit is not None:
        gate = gl.minimum(gate, limit)
        up = gl.minimum(gl.maximum(up, -limit), limit)
    if KIND == SILU:
        h = gate * sigmoid(gate) * up
    elif KIND == SWIGLU:
        h = gate * sigmoid(alpha * gate) * (up + 1.0)
    elif KIND == GELU_TANH:
        cubic = gate + 0.044715 * gate * gate * gate
        h = gate * sigmoid(1.5957691216057308 * cubic) * up  # 2 sqrt(2 / pi)
    else:
        h = beta * tanh(gate / beta) * sigmoid(gate) * (beta2 * tanh(up / beta2))
    return h


@gluon.jit
def advance(stage, phase, STAGES: gl.constexpr):
    """The next ring stage and its mbarrier phase."""
    stage += 1
    wrapped = stage // STAGES
    return stage - wrapped * STAGES, phase ^ wrapped


@gluon.jit
def read_record(records, i):
    """The four int32 of the i-th record in shared memory, for every thread."""
    return fields_of(records.index(i))


@gluon.jit
def fields_of(record):
    """The four int32 of a record in shared memory, for every thread."""
    L: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    field = gl.arange(0, 4, layout=L)
    value = record.load(L)
    return (
        gl.sum(gl.where(field == 0, value, 0), 0), gl.sum(gl.where(field == 1, value, 0), 0),
        gl.sum(gl.where(field == 2, value, 0), 0), gl.sum(gl.where(field == 3, value, 0), 0),
    )  # fmt: skip


@gluon.jit
def column_of(slot):
    """The column of a row of x or h that wgmma takes at `slot` (`mixmoe.preshuffle.HOPPER_SLOTS`).

    Four consecutive slots are four consecutive columns. The compiler sees that, and loads them at
    once, only where a remainder is the last step: it loses track of `slot % 16 // 4`.
    """
    return slot // 128 * 128 + slot // 4 % 4 * 32 + slot // 16 % 8 * 4 + slot % 4


@gluon.jit
def tables(scale):
    """Scale bytes 8 (k + 5) -> {0, .5, 1, 1.5, 2, 3, 4, 6} * 2^k as eight e4m3 bytes, k in [-5, 6].

    The table is linear in the byte: two mads build it, byte 0 stays 0.
    """
    return gl.inline_asm_elementwise(
        """{
        mad.lo.u32 $0, $2, 0x01010100, 0x14100800;
        mad.lo.u32 $1, $2, 0x01010101, 0x24201c18;
        }""",
        "=&r,=r,r", [scale], dtype=(gl.int32, gl.int32), is_pure=True, pack=1,
    )


@gluon.jit
def tables_wide(scale):
    """`tables` for scale bytes k + 8 and all 15 exponents, k in [-8, 6].

    The same two mads, shifted by three; the tables of k = -8, -7, -6 (e4m3 subnormals) are chosen.
    """
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 t0, t1;
        .reg .pred p0, p1, p2;
        setp.eq.u32 p0, $2, 0;
        setp.eq.u32 p1, $2, 1;
        setp.eq.u32 p2, $2, 2;
        mad.lo.u32 t0, $2, 0x08080800, 0xfbf7f000;
        mad.lo.u32 t1, $2, 0x08080808, 0x0c080400;
        selp.b32 t0, 0x03020100, t0, p0;
        selp.b32 t1, 0x0c080604, t1, p0;
        selp.b32 t0, 0x06040200, t0, p1;
        selp.b32 t1, 0x14100c08, t1, p1;
        selp.b32 $0, 0x0c080400, t0, p2;
        selp.b32 $1, 0x1c181410, t1, p2;
        }""",
        "=&r,=r,r", [scale], dtype=(gl.int32, gl.int32), is_pure=True, pack=1,
    )


@gluon.jit
def look_up(words, low, high):
    """8 e2m1 codes and the table of their block -> two int32 of four e4m3 each, 7 instructions.

    Two byte permutes index the table. The high selectors come by dp2a, which is word >> 16 on the
    multiplier pipe: the pipe of PRMT and LOP3 is the busier one.
    """
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 m, h, a, b, s;
        and.b32 m, $2, 0x77777777;
        dp2a.lo.u32.u32 h, m, 256, 0;
        prmt.b32 a, $3, $4, m;
        prmt.b32 b, $3, $4, h;
        shl.b32 s, $2, 4;
        lop3.b32 $0, $2, 0x80808080, a, 0xEA;
        lop3.b32 $1, s, 0x80808080, b, 0xEA;
        }""",
        "=&r,=r,r,r,r", [words, low, high], dtype=(gl.int32, gl.int32), is_pure=True, pack=1,
    )


@gluon.jit
def tables_of(raw, scale, WIDE: gl.constexpr):
    """Scale bytes (.., q) -> the two halves of the table of each word (.., q, j)."""
    if WIDE:
        low, high = tables_wide(scale)
    else:
        low, high = tables(scale)
    low, _ = gl.broadcast(low.expand_dims(5), raw)
    high, _ = gl.broadcast(high.expand_dims(5), raw)
    return low, high


@gluon.jit
def decode(raw, scale, WIDE: gl.constexpr):
    """Words (.., q, j) and scale bytes (.., q) -> (lo, hi), two int32 of four e4m3 each."""
    low, high = tables_of(raw, scale, WIDE)
    return look_up(raw, low, high)


@gluon.jit
def load_fragments(words, scales, SHAPE: gl.constexpr, L: gl.constexpr):
    """Words of a stage, int32 of SHAPE (.., .., r8, g, q, j), and their scale bytes as int32.

    int32 is what may be carried over a loop edge; an 8-bit tensor there becomes a phi per byte.
    """
    raw = smem_cast(
        words, gl.int32, SHAPE, gl.SwizzledSharedLayout(1, 1, 1, [5, 4, 3, 2, 1, 0])
    ).load(L)
    byte = smem_cast(
        scales, gl.uint8, SHAPE[:5], gl.SwizzledSharedLayout(1, 1, 1, [4, 3, 2, 1, 0])
    ).load(gl.SliceLayout(5, L))
    return raw, byte.to(gl.int32)


@gluon.jit
def load_raw(words, scales, REP: gl.constexpr, WARPS: gl.constexpr):
    """REP * WARPS * 16 rows x 128 columns of a stage in the order rep, warp.

    words: that many 16-row units of shared memory; scales: theirs. Returns (raw, scale).
    """
    L: gl.constexpr = gl.BlockedLayout(
        [REP, 1, 2, 1, 1, 4], [1, 1, 1, 8, 4, 1], [1, WARPS, 1, 1, 1, 1], [5, 4, 3, 2, 1, 0]
    )
    return load_fragments(words, scales, [REP, WARPS, 2, 8, 4, 4], L)


@gluon.jit
def load_units(words, scales, REP: gl.constexpr, WARPS: gl.constexpr, WIDE: gl.constexpr):
    """`load_raw`, decoded: (lo, hi) int32 (rep, warp, r8, g, q, j)."""
    raw, scale = load_raw(words, scales, REP, WARPS)
    return decode(raw, scale, WIDE)


@gluon.jit
def load_chunks(words, scales, CHUNKS: gl.constexpr, WARPS: gl.constexpr):
    """WARPS * 16 rows x CHUNKS * 128 columns of a stage, in the order warp, chunk.

    Returns raw int32 (warp, chunk, r8, g, q, j) and scale; `chunk_of` takes a chunk of the decoded.
    """
    L: gl.constexpr = gl.BlockedLayout(
        [1, CHUNKS, 2, 1, 1, 4], [1, 1, 1, 8, 4, 1], [WARPS, 1, 1, 1, 1, 1], [5, 4, 3, 2, 1, 0]
    )
    return load_fragments(words, scales, [WARPS, CHUNKS, 2, 8, 4, 4], L)


@gluon.jit
def chunk_of(x, CHUNK: gl.constexpr):
    """Chunk 0 or 1 of (warp, chunk, r8, g, q, j) as `fragment` takes it; no instruction."""
    if x.shape[1] == 1:
        return x.permute((1, 0, 2, 3, 4, 5))
    else:
        first, second = x.permute((0, 2, 3, 4, 5, 1)).split()
        if CHUNK == 0:
            return first.reshape([1, x.shape[0], 2, 8, 4, 4])
        else:
            return second.reshape([1, x.shape[0], 2, 8, 4, 4])


@gluon.jit
def as_e4m3(x):
    """int32 repeated four times along a register dimension -> its four e4m3; no instruction."""
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r,r,r,r", [x], dtype=gl.float8e4nv, is_pure=True, pack=4
    )


@gluon.jit
def fragment(lo, hi, A: gl.constexpr, REP: gl.constexpr, WARPS: gl.constexpr):
    """(lo, hi) of `load_units` -> e4m3 (REP * WARPS * 16, 128) in wgmma's register layout A.

    Only registers are renamed; `assert_trivial` fails the compilation if that ever changes.
    """
    L: gl.constexpr = gl.BlockedLayout(
        [REP, 1, 2, 1, 1, 4, 2, 4], [1, 1, 1, 8, 4, 1, 1, 1], [1, WARPS, 1, 1, 1, 1, 1, 1],
        [7, 6, 5, 4, 3, 2, 1, 0],
    )
    x = gl.convert_layout(gl.join(lo, hi), gl.SliceLayout(7, L), assert_trivial=True).expand_dims(7)
    x, _ = gl.broadcast(x, gl.full([REP, WARPS, 2, 8, 4, 4, 2, 4], 0, gl.int32, L))
    x = as_e4m3(x)  # rep w r8 g q j lohi byte
    x = x.permute((0, 1, 2, 3, 5, 6, 4, 7)).reshape([REP * WARPS * 16, 128])
    return gl.convert_layout(x, A, assert_trivial=True)


@gluon.jit
def halves(x):
    """(rep, warp, r8, g, q, j) -> its words j 0-1 and 2-3, 64 slots each; no instruction."""
    REP: gl.constexpr = x.shape[0]
    WARPS: gl.constexpr = x.shape[1]
    return x.reshape([REP, WARPS, 2, 8, 4, 2, 2]).permute((0, 1, 2, 3, 4, 6, 5)).split()


@gluon.jit
def half_fragment(lo, hi, A: gl.constexpr, REP: gl.constexpr, WARPS: gl.constexpr):
    """`fragment` of one half of the slots: e4m3 (REP * WARPS * 16, 64)."""
    L: gl.constexpr = gl.BlockedLayout(
        [REP, 1, 2, 1, 1, 2, 2, 4], [1, 1, 1, 8, 4, 1, 1, 1], [1, WARPS, 1, 1, 1, 1, 1, 1],
        [7, 6, 5, 4, 3, 2, 1, 0],
    )
    x = gl.convert_layout(gl.join(lo, hi), gl.SliceLayout(7, L), assert_trivial=True).expand_dims(7)
    x, _ = gl.broadcast(x, gl.full([REP, WARPS, 2, 8, 4, 2, 2, 4], 0, gl.int32, L))
    x = as_e4m3(x)
    x = x.permute((0, 1, 2, 3, 5, 6, 4, 7)).reshape([REP * WARPS * 16, 64])
    return gl.convert_layout(x, A, assert_trivial=True)
