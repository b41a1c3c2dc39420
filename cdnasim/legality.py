"""What the assembler would refuse and the simulator must not run: instructions of another GPU.

`data/<gpu>.txt` holds LLVM's own list of each GPU (isa_list.py). The flag `lds` is no part of a
mnemonic, so such loads are a list of their own: gfx950 added 12 and 16 bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path

from .asm import Instr
from .errors import UnsupportedError

DATA = Path(__file__).with_name('data')
SUFFIXES = ('_e64_dpp', '_e64', '_e32', '_sdwa', '_dpp')
SHOWN = 5


def bare(mnemonic: str) -> str:
    """Mnemonic without the encoding suffix."""
    for suffix in SUFFIXES:
        mnemonic = mnemonic.removesuffix(suffix)
    return mnemonic


def spelling(name: str) -> str:
    """LLVM also reads matrix instructions as gfx908 wrote them: 16x16x16f16 for 16x16x16_f16."""
    return name.replace('_', '') if name.startswith(('v_mfma', 'v_smfmac')) else name


@functools.cache
def known(gpu: str) -> frozenset[str]:
    """Mnemonics of a GPU; a buffer load into LDS as `<mnemonic> lds`."""
    names = set()
    for text in (DATA / f'{gpu}.txt').read_text().splitlines():
        words = text.split()
        names.add(spelling(bare(words[0])))
        if words[-1] == 'lds':
            names.add(f'{bare(words[0])} lds')
    return frozenset(names)


def refuse_foreign(instrs: Iterable[Instr], gpu: str, kernel: str) -> None:
    """Raises UnsupportedError that names the instructions `gpu` does not have."""
    names = known(gpu)
    bad: dict[str, Instr] = {}
    for ins in instrs:
        name = spelling(bare(ins.op)) + (' lds' if 'lds' in ins.flags else '')
        if name not in names:
            bad.setdefault(name, ins)
    if bad:
        where = '; '.join(f'`{i.text}` (line {i.line})' for i in list(bad.values())[:SHOWN])
        raise UnsupportedError(f'{kernel}: {gpu} has no such instruction: {where}')
