"""ELF code objects -> the assembly text that asm.py reads, by way of LLVM's own tools."""

from __future__ import annotations

import re
from pathlib import Path

from .errors import AsmError
from .toolchain import run_tool

INSTRUCTION = re.compile(r'^\s+(\S.*?)\s*//\s*([0-9A-Fa-f]{8,}):')
SYMBOL = re.compile(r'^(?:[0-9a-f]{8,} )?<([^>]+)>:')


def disassemble(path: Path) -> str:
    """Target, code with labels and addresses, kernel descriptors and metadata of a code object.

    Raises AsmError for an ELF that is no AMDGPU code object, ToolError when llvm-objdump or
    llvm-readelf is missing.
    """
    header = run_tool('llvm-readelf', '-h', str(path))
    target = re.search(r'Flags:.*\b(gfx\w+)', header)
    if not target:
        raise AsmError(
            f'{path} is an ELF file, but no AMDGPU code object (bundles: unpack them with '
            f'clang-offload-bundler)'
        )
    out = [f'.amdgcn_target "amdgcn-amd-amdhsa--{target.group(1)}"']
    code = run_tool('llvm-objdump', '-d', '--symbolize-operands', str(path))
    descriptors = run_tool('llvm-objdump', '-D', '-j', '.rodata', str(path))
    blocks = re.findall(r'\.amdhsa_kernel.*?\.end_amdhsa_kernel', descriptors, re.S)
    for line in code.splitlines():
        if m := SYMBOL.match(line):
            name = m.group(1)
            out += (
                [f'{name}:']
                if re.fullmatch(r'L\d+', name)
                else [f'.type {name},@function', f'{name}:']
            )
        elif m := INSTRUCTION.match(line):
            out += [f'.address {int(m.group(2), 16):#x}', ' ' + m.group(1)]
    notes = run_tool('llvm-readelf', '--notes', str(path))
    return (
        '\n'.join(
            [
                *out,
                *blocks,
                '.amdgpu_metadata',
                notes[notes.find('amdhsa.kernels:') :],
                '.end_amdgpu_metadata',
            ]
        )
        + '\n'
    )
