"""Compiles Triton and Gluon kernels for sm_90a on a machine with no GPU, and reads what came out.

    resources = compile_gluon(kernel, Fake(torch.int32), descriptor, 8, STAGES=4, num_warps=8)
    assert not resources.spills and not resources.messages and resources.qgmma
"""

import collections
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import MockTensor, create_function_from_signature

TARGET = GPUTarget("cuda", 90, 32)
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
TUNED_FOR = triton.__version__.startswith("3.6")  # the version whose resources the tiles fit
# The assembler Triton itself uses for sm_90a: from 3.9 on PTX is too new for the plain one.
PTXAS = TOOLS / ("ptxas" if TUNED_FOR else "ptxas-blackwell")
SASS_LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][A-Z0-9_.]*)(.*);")


class Fake(MockTensor):
    """A 16-byte aligned device tensor that is never read: enough of one to compile with."""

    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...] = (1 << 20,)) -> None:
        self.dtype = dtype
        self.shape = list(shape)
        self.device = torch.device("cpu")

    def stride(self, dim: int | None = None) -> Any:
        strides, step = [], 1
        for extent in reversed(self.shape):
            strides.append(step)
            step *= extent
        strides.reverse()
        return tuple(strides) if dim is None else strides[dim]

    def data_ptr(self) -> int:  # type: ignore[override]
        return 0

    def ptr_range(self) -> int:  # type: ignore[override]
        return 0


@dataclass(frozen=True, slots=True)
class Resources:
    """What ptxas made of a kernel.

    registers: of the kernel's entry (a specialised role may hold another number); spills: bytes of
    spill stores and loads; messages: ptxas lines that name a (C75xx) or a warning, such as a
    serialised wgmma; shared: bytes of shared memory; instructions: SASS opcode -> count.
    """

    registers: int
    spills: int
    shared: int
    warps: int
    messages: tuple[str, ...]
    instructions: dict[str, int]
    sass: str
    ptx: str

    def count(self, prefix: str) -> int:
        """SASS instructions whose opcode starts with `prefix`."""
        return sum(n for name, n in self.instructions.items() if name.startswith(prefix))

    @property
    def qgmma(self) -> int:
        """FP8 tensor-core instructions."""
        return self.count("QGMMA")

    def clean(self) -> bool:
        """No spill, and no serialised wgmma or other ptxas complaint."""
        return self.spills == 0 and not self.messages

    def loops(self) -> list[tuple[int, dict[str, int]]]:
        """(instructions, opcode counts) of every loop that holds a QGMMA, the innermost first."""
        lines, labels, found = [], {}, []
        for line in self.sass.splitlines():
            if label := re.match(r"\s*(\.L_x_\d+):", line):
                labels[label.group(1)] = len(lines)
            elif op := SASS_LINE.search(line):
                lines.append(op.groups())
        for end, (name, arguments) in enumerate(lines):
            target = re.search(r"(\.L_x_\d+)", arguments) if name.startswith("BRA") else None
            start = labels.get(target.group(1), end + 1) if target else end + 1
            body = [opcode for opcode, _ in lines[start : end + 1]]
            role_switch = any(op.startswith(("BRX", "EXIT", "USETMAX")) for op in body)
            if any(op.startswith("QGMMA") for op in body) and not role_switch:
                found.append((len(body), dict(collections.Counter(body))))
        return sorted(found, key=lambda loop: loop[0])


def compile_gluon(kernel: Any, *args: Any, **meta: Any) -> Resources:
    """Compile a Gluon or Triton kernel for sm_90a as a launch with these arguments would.

    Tensors are `Fake`, TMA descriptors `TensorDescriptor.from_tensor(Fake(...), ...)`; `meta` holds
    constexprs and launch options (num_warps, maxnreg, launch_pdl). An instruction shape that the
    hardware lacks aborts the process inside MLIR: run doubtful shapes in a subprocess.
    """
    backend = make_backend(TARGET)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    meta = {"sanitize_overflow": False, "debug": False, **meta}
    bound, specialisation, options = binder(*args, **meta)
    options, signature, constants, attributes = kernel._pack_args(
        backend, meta, bound, specialisation, options
    )
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(
        kernel, signature, constants, attributes
    )
    compiled = triton.compile(source, target=TARGET, options=options.__dict__)
    return inspect(compiled.asm["ptx"], compiled.metadata.shared, compiled.metadata.num_warps)


def inspect(ptx: str, shared: int, warps: int) -> Resources:
    """Assemble PTX with the ptxas of Triton and read registers, spills, messages and SASS."""
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = os.path.join(folder, "k.ptx"), os.path.join(folder, "k.cubin")
        Path(source).write_text(ptx)
        log = subprocess.run(
            [PTXAS, "-v", "--gpu-name=sm_90a", source, "-o", cubin],
            capture_output=True, text=True, check=True,
        ).stderr
        sass = subprocess.run(
            [TOOLS / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True
        ).stdout
    opcodes = (match.group(1) for match in map(SASS_LINE.search, sass.splitlines()) if match)
    return Resources(
        registers=max(map(int, re.findall(r"Used (\d+) registers", log)), default=0),
        spills=sum(map(int, re.findall(r"(\d+) bytes spill", log))),
        shared=shared,
        warps=warps,
        messages=tuple(
            line.strip() for line in log.splitlines() if "(C7" in line or "arning" in line
        ),
        instructions=dict(collections.Counter(opcodes)),
        sass=sass,
        ptx=ptx,
    )
