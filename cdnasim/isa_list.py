"""Make `data/<gpu>.txt`: one assembled example of every instruction that LLVM knows for a GPU.

How: every opcode field of every encoding family (CDNA3 ISA chapter 13) is enumerated, operand
fields are set to a few harmless registers, and `llvm-mc --disassemble -mcpu=<gpu>` says which words
are instructions and how they are written. So the list is LLVM's own table, seen through its
disassembler. `python -m cdnasim.isa_list gfx942 gfx950` rewrites the files.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from .legality import bare
from .toolchain import find_tool

DATA = Path(__file__).with_name('data')
# directives, words the disassembler marks as illegal, matrix operands that are constants, the first
# half of v_mfma_scale
NO_EXAMPLE = re.compile(r'^\.|/\*|^v_s?mf\w+ \S+ 0, |^v_mfma_ld_scale')
SEGMENTS = (0, 1, 2)  # flat, scratch, global


def vop3_words() -> Iterator[tuple[int, ...]]:
    """Second words: registers aligned to 16 so that any operand width is legal; VGPR-only, mixed
    and SGPR forms.
    """
    for src0, src1, src2 in (
        (0x110, 0x120, 0x130),
        (0x110, 0x120, 0x1A0),
        (0x110, 0x120, 8),
        (0x110, 0x80, 0x80),
        (0x110, 8, 0x130),
        (8, 0x120, 0x130),
        (0x80, 0x80, 0x80),
        (0x110, 0x120, 0),
    ):
        yield (src0 | src1 << 9 | src2 << 18,)


def families() -> Iterator[tuple[int, ...]]:
    for op in range(128):
        yield (0x80000000 | op << 23 | 20 << 16 | 8 << 8 | 12,)  # SOP2
        yield (0xBF000000 | op << 16 | 8 << 8 | 12,)  # SOPC
        yield (0xBF800000 | op << 16 | 0,)  # SOPP
    for op in range(256):
        yield (0xBE800000 | 20 << 16 | op << 8 | 12,)  # SOP1
        yield (0x7E000000 | 0x40 << 17 | op << 9 | 0x110,)  # VOP1
        yield (0x7E000000 | 20 << 17 | op << 9 | 0x110,)  # VOP1 with SGPR result
        yield (0x7C000000 | op << 17 | 0x20 << 9 | 0x110,)  # VOPC
        for tail in (0x06068610, 0x06060610):
            yield (0x7E000000 | 0x40 << 17 | op << 9 | 0xF9, tail)  # SDWA
            yield (0x7C000000 | op << 17 | 0x20 << 9 | 0xF9, tail)
        for tail in (0xFF00E410, 0xFF015010):  # quad_perm, row_newbcast
            yield (0x7E000000 | 0x40 << 17 | op << 9 | 0xFA, tail)
        yield (0xC0000000 | op << 18 | 20 << 6 | 4, 0)  # SMEM
        yield (0xC0020000 | op << 18 | 20 << 6 | 4, 0x10)
    for op in range(64):
        yield (op << 25 | 0x40 << 17 | 0x20 << 9 | 0x110,)  # VOP2
        yield (op << 25 | 0x40 << 17 | 0x20 << 9 | 0x110, 0x3F8CCCCD)  # with a literal
        yield (op << 25 | 0x40 << 17 | 0x20 << 9 | 0xF9, 0x06068610)
        yield (op << 25 | 0x40 << 17 | 0x20 << 9 | 0xFA, 0xFF00E410)
    for op in range(32):
        yield (0xB0000000 | op << 23 | 20 << 16 | 1,)  # SOPK
        yield (0xB0000000 | op << 23 | 20 << 16 | 1, 7)
    for op in range(1024):
        for regs in vop3_words():
            yield (0xD0000000 | op << 16 | 0x40, *regs)  # VOP3
            yield (0xD0000000 | op << 16 | 20 << 8 | 0x40, *regs)  # VOP3b
            yield (0xD0000000 | op << 16 | 20, *regs)  # VOP3 with SGPR result
    for op in range(128):
        for regs in vop3_words():
            yield (0xD3800000 | op << 16 | 0x4040, regs[0] | 3 << 27)  # VOP3P
            yield (0xD3800000 | op << 16 | 0x0040, regs[0])  # VOP3P-MAI
    for regs in vop3_words():
        for mfma in (0x2D, 0x2E):  # scaled: ld_scale + MFMA
            yield (0xD3AC0000, 0x150 | 0x160 << 9, 0xD3800000 | mfma << 16 | 0x840, regs[0])
    for op in range(256):
        for tail in (
            0x40302010,
            0x40002010,
            0x40000010,
            0x00302010,
            0x00002010,
            0x00000010,
            0x40000000,
            0,
        ):
            yield (0xD8000000 | op << 17, tail)  # DS: unused fields must be 0
    for op in range(128):
        for lds in (0, 1 << 16):
            yield (0xE0000000 | op << 18 | 1 << 12 | lds, 0x80014010)  # MUBUF
        for seg in SEGMENTS:
            yield (0xDC000000 | op << 18 | seg << 14, 0x407F2010)  # FLAT, saddr off
            yield (0xDC000000 | op << 18 | seg << 14, 0x40002010)
            yield (0xDC000000 | op << 18 | seg << 14 | 1 << 13, 0x407F2010)  # to LDS
    for op in range(16):
        yield (0xE8000000 | op << 15 | 1 << 12 | 4 << 19 | 7 << 23, 0x80014010)  # MTBUF


def disassemble(gpu: str) -> list[str]:
    lines = []
    for words in families():
        data = b''.join(w.to_bytes(4, 'little') for w in words)
        lines.append(','.join(f'0x{b:02x}' for b in data))
    out = subprocess.run(
        [find_tool('llvm-mc'), '--disassemble', '--triple=amdgcn-amd-amdhsa', f'--mcpu={gpu}'],
        input='\n'.join(lines),
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    return [s.split('//')[0].strip() for s in out.splitlines()]


def examples(gpu: str) -> dict[str, str]:
    """mnemonic with encoding suffix -> shortest example text."""
    best: dict[str, str] = {}
    for text in disassemble(gpu):
        if text and not NO_EXAMPLE.search(text):
            name = text.split()[0]
            if 'lds' in text.split()[1:]:
                name += ' lds'
            if name not in best or len(text) < len(best[name]):
                best[name] = text
    return best


if __name__ == '__main__':
    for name in sys.argv[1:] or ('gfx942', 'gfx950'):
        found = examples(name)
        DATA.mkdir(exist_ok=True)
        (DATA / f'{name}.txt').write_text('\n'.join(found[k] for k in sorted(found)) + '\n')
        print(
            name, len(found), 'forms,', len({bare(k.split()[0]) for k in found}), 'mnemonics'
        )
