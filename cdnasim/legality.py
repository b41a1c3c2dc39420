"""What the assembler would refuse and the simulator must not run: instructions of another GPU and
numbers too large for their field.

`data/<gpu>.txt` holds LLVM's own list of each GPU (isa_list.py). The flag `lds` is no part of a
mnemonic, so such loads are a list of their own: gfx950 added 12 and 16 bytes.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from pathlib import Path

from .asm import Instr
from .errors import AsmError, UnsupportedError

DATA = Path(__file__).with_name('data')
SUFFIXES = ('_e64_dpp', '_e64', '_e32', '_sdwa', '_dpp')
SHOWN = 5
VGPR = re.compile(r'(?<![\w.@$])[va](?:(\d+)|\[\d+:(\d+)\])(?![\w.@$])')
COUNT = re.compile(r'(vmcnt|lgkmcnt|expcnt)\((\d+)\)')
MOST = {'vmcnt': 63, 'lgkmcnt': 15, 'expcnt': 7}
LDS_OFFSET = {'offset': 65535, 'offset0': 255, 'offset1': 255}


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


def refuse_too_large(instrs: Iterable[Instr]) -> None:
    """Raises AsmError for a register, wait count or LDS offset that no encoding holds."""
    for ins in instrs:
        for what, value, most in fields(ins):
            if value > most:
                raise AsmError(
                    f'line {ins.line}: `{ins.text}`: {what} {value} is more than {most}'
                )


def fields(ins: Instr) -> Iterable[tuple[str, int, int]]:
    """(name, value, largest legal value)."""
    if ins.op == 's_waitcnt':
        yield from ((k, int(v), MOST[k]) for k, v in COUNT.findall(ins.text))
    elif ins.op.startswith(('v_', 'ds_', 'buffer_', 'global_', 'flat_', 'scratch_')):
        yield from (('register', int(a or b), 255) for a, b in VGPR.findall(ins.text))
        if ins.op.startswith('ds_'):
            for key, most in LDS_OFFSET.items():
                if isinstance(value := ins.mods.get(key), int):
                    yield key, value, most
