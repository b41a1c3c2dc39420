"""Which instructions of LLVM's tables the simulator implements. The lists in `data/` come from LLVM
itself (isa_list.py).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from .asm import Module, parse_instr
from .errors import CdnaSimError, UnsupportedError
from .legality import bare
from .machine import decode_one

DATA = Path(__file__).with_name('data')
GPUS = ('gfx942', 'gfx950')
# instructions that LLVM can assemble and that no compiler emits for compute kernels, with the
# reason they are left out
LEFT_OUT = {
    's_atomic_': 'scalar atomics: in the encoding table, not emitted by LLVM',
    's_buffer_atomic_': 'scalar atomics: in the encoding table, not emitted by LLVM',
    's_scratch_': 'scalar scratch: removed from the hardware manual of CDNA3',
    's_cbranch_g_fork': 'fork/join: removed from the hardware manual of CDNA3',
    's_cbranch_i_fork': 'fork/join: removed from the hardware manual of CDNA3',
    's_cbranch_join': 'fork/join: removed from the hardware manual of CDNA3',
    's_rfe': 'return from trap handler',
    'buffer_load_format': 'typed buffers: graphics formats',
    'buffer_store_format': 'typed buffers: graphics formats',
    'tbuffer_': 'typed buffers: graphics formats',
    'ds_gws': 'global wave sync: needs a driver allocation',
    'ds_append': 'append counters: need a driver allocation',
    'ds_consume': 'append counters: need a driver allocation',
    'ds_ordered_count': 'ordered count: graphics pipelines',
    'scratch_load_lds': 'scratch straight into LDS: not emitted by LLVM',
    'v_screen_partition': 'screen space partition: graphics',
}


@dataclass(slots=True)
class Coverage:
    """`missing` and `left_out`: mnemonic -> reason; `forms` counts encodings (e32, e64, sdwa, dpp)
    of the implemented ones.
    """

    gpu: str
    implemented: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    forms: int = 0
    forms_missing: dict[str, str] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return len(self.implemented) + len(self.missing) + len(self.left_out)

    def families(self) -> dict[str, tuple[int, int]]:
        """family -> (implemented, all)."""
        out: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for names, done in ((self.implemented, 1), (self.missing, 0), (self.left_out, 0)):
            for name in names:
                out[family(name)][0] += done
                out[family(name)][1] += 1
        return {k: (a, b) for k, (a, b) in sorted(out.items())}


def family(name: str) -> str:
    for prefix in (
        'v_mfma',
        'v_smfmac',
        'v_cmp',
        'v_cvt',
        'v_pk',
        'v_',
        's_cmp',
        's_load',
        's_buffer',
        's_atomic',
        's_',
        'ds_',
        'buffer_',
        'tbuffer_',
        'global_',
        'flat_',
        'scratch_',
    ):
        if name.startswith(prefix):
            return prefix.rstrip('_')
    return 'other'


def try_decode(text: str, gpu: str) -> str:
    """'' when the instruction is implemented, else the reason."""
    ins = parse_instr(text)
    module = Module(gpu, [ins], {o.val: 0 for o in ins.ops if o.kind == 'sym'})
    kernel = SimpleNamespace(arch=gpu, module=module, indexed={}, label=lambda o, i: 0)
    try:
        return '' if decode_one(ins, kernel) else 'unknown name'
    except CdnaSimError as e:
        return str(e)


def coverage(gpu: str) -> Coverage:
    """Decode LLVM's example of every form; a mnemonic counts when one of its forms does.
    UnsupportedError for a GPU without tables.
    """
    if gpu not in GPUS:
        raise UnsupportedError(f'{gpu!r} has no instruction table here: {" or ".join(GPUS)}')
    out = Coverage(gpu)
    reasons: dict[str, list[str]] = defaultdict(list)
    for text in (DATA / f'{gpu}.txt').read_text().splitlines():
        reason = try_decode(text, gpu)
        name = bare(text.split()[0])
        reasons[name].append(reason)
        if reason:
            out.forms_missing[text] = reason
        else:
            out.forms += 1
    for name, why in sorted(reasons.items()):
        left = next((r for p, r in LEFT_OUT.items() if name.startswith(p)), '')
        if '' in why:
            out.implemented.append(name)
        elif left:
            out.left_out[name] = left
        else:
            out.missing[name] = why[0]
    out.forms_missing = {
        t: r
        for t, r in out.forms_missing.items()
        if not any(bare(t.split()[0]).startswith(p) for p in LEFT_OUT)
    }
    return out
