"""Runs Triton kernels on the CPU under Triton's interpreter, with its casts mended.

``triton.jit`` decides when a module is imported whether it compiles or interprets, so such tests
live in a process of their own (``TRITON_INTERPRET=1``). Triton 3.6.0's interpreter truncates where
the hardware rounds to nearest even (float32 to bf16 or e4m3), multiplies bf16 as bit patterns in
``dot``, casts e4m3 through a table that loses subnormals, and rounds inside ``fma``; ``mend``
replaces just these.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

TORCH = {
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float16: torch.float16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
}


def as_torch(data: np.ndarray, dtype: tl.dtype) -> torch.Tensor:
    """An interpreter array (bf16 and fp8 lie in it as raw integers) as a torch tensor."""
    kind = TORCH[dtype]
    raw = torch.from_numpy(np.ascontiguousarray(data))
    return raw.view(kind) if raw.dtype != kind else raw


def as_numpy(values: torch.Tensor, dtype: tl.dtype) -> np.ndarray:
    """The inverse of :func:`as_torch`."""
    raw = {tl.bfloat16: torch.uint16, tl.float8e4nv: torch.uint8}.get(dtype)
    return (values.view(raw) if raw is not None else values).numpy()


def mend() -> None:
    """Make casts round to nearest even and dots of bf16 and e4m3 multiply values."""
    builder = interpreter.InterpreterBuilder

    def cast(self: object, src: object, dst_type: object, rounding: object = None) -> object:
        come, to = src.dtype.scalar, dst_type.scalar  # type: ignore[attr-defined]
        if come in TORCH and to in TORCH:
            values = as_torch(src.data, come).to(torch.float32).to(TORCH[to])  # type: ignore[attr-defined]
            return interpreter.TensorHandle(as_numpy(values, to), to)
        if come in (tl.bfloat16, tl.float8e4nv):
            values = as_torch(src.data, come).to(torch.float32).numpy()  # type: ignore[attr-defined]
            return interpreter.TensorHandle(values.astype(interpreter._get_np_dtype(to)), to)
        if to in (tl.bfloat16, tl.float8e4nv):
            values = torch.from_numpy(src.data.astype(np.float32)).to(TORCH[to])  # type: ignore[attr-defined]
            return interpreter.TensorHandle(as_numpy(values, to), to)
        data = src.data.astype(interpreter._get_np_dtype(to))  # type: ignore[attr-defined]
        return interpreter.TensorHandle(data, to)

    def dot(self: object, a: object, b: object, d: object, *ignored: object) -> object:
        def values(x: object) -> np.ndarray:
            dtype = x.dtype.scalar  # type: ignore[attr-defined]
            if dtype in TORCH:
                return as_torch(x.data, dtype).to(torch.float32).numpy()  # type: ignore[attr-defined]
            return x.data.astype(d.data.dtype)  # type: ignore[attr-defined]

        product = np.matmul(values(a), values(b))
        return interpreter.TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)  # type: ignore[attr-defined]

    for name in (
        "cast_impl", "create_fp_to_fp", "create_fp_ext", "create_fp_trunc", "create_si_to_fp",
        "create_ui_to_fp", "create_fp_to_si", "create_fp_to_ui",
    ):  # fmt: skip
        setattr(builder, name, cast)
    def fma(self: object, x: object, y: object, z: object) -> object:
        exact = x.data.astype(np.float64) * y.data + z.data  # type: ignore[attr-defined]
        return interpreter.TensorHandle(exact.astype(x.data.dtype), z.dtype.scalar)  # type: ignore[attr-defined]

    binary = builder.binary_op

    def binary_op(self: object, lhs: object, rhs: object, op: object) -> object:
        if lhs.dtype.scalar != tl.bfloat16:  # type: ignore[attr-defined]
            return binary(self, lhs, rhs, op)
        wide = (as_torch(x.data, tl.bfloat16).float().numpy() for x in (lhs, rhs))  # type: ignore[attr-defined]
        result = torch.from_numpy(np.asarray(op(*wide))).to(torch.bfloat16)  # type: ignore[operator]
        return interpreter.TensorHandle(as_numpy(result, tl.bfloat16), tl.bfloat16)

    def get_bf16(self: object, value: float) -> object:
        data = as_numpy(torch.tensor([value], dtype=torch.bfloat16), tl.bfloat16)
        return interpreter.TensorHandle(data, tl.bfloat16)

    builder.get_bf16 = get_bf16
    builder.binary_op = binary_op
    builder.create_dot = dot
    builder.create_fma = fma
    patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor: object, scope: object) -> None:
        patch(tensor, scope)  # numpy 2.4 no longer takes int() of a one-element array
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))  # type: ignore[attr-defined]

    interpreter._patch_lang_tensor = patch_tensor
