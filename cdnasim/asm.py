"""Reader of the text that LLVM's AMDGPU backend prints: one `.s` file -> a `Module` of kernels and
functions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from .errors import AsmError

SPECIAL_SGPR = {
    'flat_scratch_lo': 102,
    'flat_scratch_hi': 103,
    'xnack_mask_lo': 104,
    'xnack_mask_hi': 105,
    'vcc_lo': 106,
    'vcc_hi': 107,
    'm0': 124,
    'exec_lo': 126,
    'exec_hi': 127,
    'flat_scratch': 102,
    'xnack_mask': 104,
    'vcc': 106,
    'exec': 126,
}
SPECIAL_PAIR = {'vcc', 'exec', 'flat_scratch', 'xnack_mask'}
AGPR_BASE = 256  # AGPR n is row 256 + n of the unified register file (CDNA3 ISA 3.6.4)
TTMP_BASE = 108
SHARED_BASE, PRIVATE_BASE = (
    0x1_0000_0000_0000,
    0x2_0000_0000_0000,
)  # flat apertures, chosen by the simulator
GOT_BASE = 0x7A00_0000_0000 - (1 << 33)
CODE_BASE = 0x7A00_0000_0000 - (1 << 32)
INSTR_BYTES = 8  # bytes of an instruction in s_getpc arithmetic where the text carries no addresses

MODIFIER = re.compile(r'(?<=\s)([a-zA-Z_][a-zA-Z_0-9]*):(\[[^\]]*\]|swizzle\([^)]*\)|[^\s,]+)')
REG = re.compile(r'^(v|a|s|ttmp)(?:(\d+)|\[(\d+)(?::(\d+))?\])$')
INTEGER = re.compile(r'^-?(0x[0-9a-fA-F]+|\d+)$')
FLOAT = re.compile(r'^-?(\d+\.\d*|\.\d+|\d+)(e[-+]?\d+)?$')
WRAPPED = re.compile(r'^(neg|abs|sext)\((.*)\)$')
LABEL = re.compile(r'^([\w.$@]+):\s*(.*)$')


@dataclass(slots=True)
class Operand:
    """`kind`: v (VGPR or AGPR row), s (SGPR), imm, flt, scc, vccz, execz, off or sym."""

    kind: str
    idx: int = 0
    n: int = 1
    val: Any = None
    neg: bool = False
    abs: bool = False
    sext: bool = False
    text: str = ''


@dataclass
class Instr:
    """One instruction; `line` counts in the assembly, `source` is `file:line` from `.loc` where
    there is debug info.
    """

    op: str
    ops: list[Operand]
    mods: dict[str, Any]
    flags: set[str]
    text: str
    line: int
    source: str = ''
    pc: int = 0
    function: str = ''
    address: int = -1  # byte address, from the code object or INSTR_BYTES * pc
    base: str = ''  # mnemonic without the encoding suffix (vector ALU)
    sdwa: bool = False
    dpp: Any = None
    flops: int = 0
    cycles: int = 0


@dataclass
class Argument:
    """One kernel argument as the metadata describes it."""

    offset: int
    size: int
    kind: str = 'by_value'
    name: str = ''
    space: str = ''

    @property
    def hidden(self) -> bool:
        return self.kind.startswith('hidden')


@dataclass
class KernelText:
    """What the text says of one kernel: entry point, `.amdhsa_*` fields, metadata."""

    name: str
    entry: int
    hsa: dict[str, int] = field(default_factory=dict)
    args: list[Argument] = field(default_factory=list)
    meta: dict[str, int] = field(default_factory=dict)


@dataclass
class Module:
    """All code of one file. Labels map to indices of `instrs`; `functions` to (first, past
    last).
    """

    target: str
    instrs: list[Instr] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    functions: dict[str, tuple[int, int]] = field(default_factory=dict)
    kernels: dict[str, KernelText] = field(default_factory=dict)
    text: str = ''
    by_address: dict[int, int] = field(default_factory=dict)
    got: dict[str, int] = field(
        default_factory=dict
    )  # functions called through the global offset table -> slot

    def address(self, index: int) -> int:
        """Where code lies in the simulated address space; `index` may be one past the last
        instruction.
        """
        past = index - len(self.instrs) + 1
        return CODE_BASE + (
            self.instrs[index].address
            if past <= 0
            else self.instrs[-1].address + INSTR_BYTES * past
        )

    def index(self, address: int) -> int:
        """The instruction at a code address, -1 when there is none."""
        if not self.by_address:
            self.by_address.update((CODE_BASE + ins.address, ins.pc) for ins in self.instrs)
        return self.by_address.get(address, -1)


def parse_operand(text: str) -> Operand:
    t = full = text.strip()
    neg = ab = sext = False
    if re.match(r'^-(?![0-9.])', t):
        neg, t = True, t[1:]
    while m := WRAPPED.match(t):
        neg |= m.group(1) == 'neg'
        ab |= m.group(1) == 'abs'
        sext |= m.group(1) == 'sext'
        t = m.group(2)
    if len(t) > 1 and t.startswith('|') and t.endswith('|'):
        ab, t = True, t[1:-1]
    o = plain_operand(t)
    o.neg, o.abs, o.sext, o.text = neg, ab, sext, full
    return o


def plain_operand(t: str) -> Operand:
    if m := REG.match(t):
        lo = int(m.group(2) or m.group(3))
        n = int(m.group(4)) - lo + 1 if m.group(4) else 1
        kind, base = {
            'v': ('v', 0),
            'a': ('v', AGPR_BASE),
            's': ('s', 0),
            'ttmp': ('s', TTMP_BASE),
        }[m.group(1)]
        return Operand(kind, base + lo, n)
    if t in SPECIAL_SGPR:
        return Operand('s', SPECIAL_SGPR[t], 2 if t in SPECIAL_PAIR else 1)
    low = t.lower().removeprefix('src_')
    if low in ('scc', 'vccz', 'execz'):
        return Operand(low)
    if low in ('off', 'null'):
        return Operand('off')
    if low in ('shared_base', 'private_base'):
        return Operand('imm', val=SHARED_BASE if low == 'shared_base' else PRIVATE_BASE, n=2)
    if low in ('shared_limit', 'private_limit'):
        return Operand(
            'imm', val=(SHARED_BASE if low == 'shared_limit' else PRIVATE_BASE) + 0xFFFF_FFFF, n=2
        )
    if INTEGER.match(t):
        return Operand('imm', val=int(t, 0))
    if FLOAT.match(t):
        return Operand('flt', val=float(t))
    return Operand('sym', val=t)


def split_operands(s: str) -> list[str]:
    out, depth, cur = [], 0, ''
    for ch in s:
        depth += (ch in '([') - (ch in ')]')
        if ch == ',' and depth == 0:
            out.append(cur)
            cur = ''
        else:
            cur += ch
    if cur.strip():
        out.append(cur)
    return [o.strip() for o in out]


def parse_value(v: str) -> Any:
    if v.startswith('['):
        return [parse_value(x.strip()) for x in v[1:-1].split(',')]
    return int(v, 0) if INTEGER.match(v) else v


def parse_instr(text: str, line: int = 0) -> Instr:
    parts = text.split(None, 1)
    op, rest = parts[0], (' ' + parts[1] if len(parts) > 1 else '')
    if op in ('s_waitcnt', 's_sendmsg', 's_sendmsghalt'):
        return Instr(op, [], {'arg': rest.strip()}, set(), text, line)
    mods = {k: parse_value(v) for k, v in MODIFIER.findall(rest)}
    rest = MODIFIER.sub('', rest)
    ops, flags = split_operands(rest), set()
    if ops:
        tail = ops[-1].split() if '(' not in ops[-1] else [ops[-1]]
        ops[-1], flags = tail[0], set(tail[1:])
        if len(ops) == 1 and re.match(r'^(sc[01]|nt|glc)$', ops[0]):  # `buffer_inv sc1`
            flags.add(ops.pop())
    return Instr(op, [parse_operand(o) for o in ops], mods, flags, text, line)


META_FIELDS = (
    'group_segment_fixed_size',
    'private_segment_fixed_size',
    'kernarg_segment_size',
    'agpr_count',
    'vgpr_count',
    'sgpr_count',
    'max_flat_workgroup_size',
    'wavefront_size',
    'vgpr_spill_count',
    'sgpr_spill_count',
)


def parse_metadata(text: str, name: str) -> tuple[list[Argument], dict[str, int]]:
    """Arguments and sizes of kernel `name` from the amdhsa.kernels YAML (fixed shape, read line by
    line).
    """
    at = text.find('amdhsa.kernels:')
    for chunk in re.split(r'\n  - ', text[at:] if at >= 0 else '')[1:]:
        m = re.search(r'(?:^|\n    )\.name:\s+(\S+)', chunk)
        if not m or m.group(1).strip("'\"") != name:
            continue
        args = []
        am = re.search(r'\.args:\s*\n((?:      .*\n)*)', chunk)
        for a in re.split(r'(?:^|\n)      - ', '\n' + am.group(1))[1:] if am else []:
            d = dict(re.findall(r'\.(\w+):\s+(\S+)', a))
            args.append(
                Argument(
                    int(d['offset']),
                    int(d['size']),
                    d.get('value_kind', 'by_value'),
                    d.get('name', '').strip("'\""),
                    d.get('address_space', ''),
                )
            )
        meta = {
            k: int(v.group(1)) for k in META_FIELDS if (v := re.search(rf'\.{k}:\s+(\d+)', chunk))
        }
        return sorted(args, key=lambda a: a.offset), meta
    return [], {}


class Parser:
    """One pass over the lines; numeric labels (`1f`, `1b`) and symbols are resolved at the end."""

    def __init__(self, text: str):
        self.text = text
        m = re.search(r'\.amdgcn_target\s+"[^"]*?(gfx\w+)', text)
        self.module = Module(m.group(1) if m else 'gfx950', text=text)
        self.hsa = {}
        for m in re.finditer(r'\.amdhsa_kernel\s+(\S+)(.*?)\.end_amdhsa_kernel', text, re.S):
            vals = re.findall(r'\.amdhsa_(\w+)\s+(\S+)', m.group(2))
            self.hsa[m.group(1)] = {k: int(v, 0) for k, v in vals if INTEGER.match(v)}
        self.typed = set(re.findall(r'\.type\s+([\w.$]+),\s*@function', text))
        self.files: dict[str, str] = {}
        self.local: dict[str, list[int]] = {}
        self.current, self.source, self.address = '', '', -1

    def label(self, name: str) -> None:
        m = self.module
        here = len(m.instrs)
        if name.isdigit():
            self.local.setdefault(name, []).append(here)
            return
        starts = (
            name in self.hsa
            or name in self.typed
            or (not self.hsa and not self.typed and name[0] != '.')
        )
        if starts:
            self.close(here)
            self.current = name
            m.functions[name] = (here, here)
            if name in self.hsa or not self.hsa:
                m.kernels[name] = KernelText(name, here)
        elif name.startswith('.Lfunc_end'):
            self.close(here)
            self.current = ''
        m.labels[name] = here

    def close(self, here: int) -> None:
        if self.current:
            self.module.functions[self.current] = (self.module.functions[self.current][0], here)

    def directive(self, s: str) -> None:
        if m := re.match(r'^\.file\s+(\d+)\s+(.*)', s):
            names = re.findall(r'"([^"]*)"', m.group(2))
            self.files[m.group(1)] = names[-1] if names else ''
        elif s.startswith('.address '):  # written by elf.py
            self.address = int(s.split()[1], 0)
        elif m := re.match(r'^\.loc\s+(\d+)\s+(\d+)', s):
            self.source = f'{self.files.get(m.group(1), "?")}:{m.group(2)}'

    def run(self) -> Module:
        m, metadata = self.module, False
        for no, raw in enumerate(self.text.splitlines(), 1):
            s = re.split(r';|//', raw, maxsplit=1)[0].strip()
            metadata = (metadata or s == '.amdgpu_metadata') and s != '.end_amdgpu_metadata'
            if not s or metadata:
                continue
            if lab := LABEL.match(s):
                self.label(lab.group(1))
                s = lab.group(2)
                if not s:
                    continue
            if s[0] == '.':
                self.directive(s)
            elif self.current and '=' not in ''.join(s.split()[:2]):
                ins = parse_instr(s, no)
                ins.source, ins.pc, ins.function = self.source, len(m.instrs), self.current
                ins.address = self.address if self.address >= 0 else INSTR_BYTES * ins.pc
                m.instrs.append(ins)
        self.close(len(m.instrs))
        self.resolve()
        for name, k in m.kernels.items():
            k.hsa = self.hsa.get(name, {})
            k.args, k.meta = parse_metadata(self.text, name)
        return m

    def resolve(self) -> None:
        for ins in self.module.instrs:
            for o in ins.ops:
                if o.kind == 'sym' and re.match(r'^\d+[fb]$', o.val):
                    forward = o.val[-1] == 'f'
                    at = [p for p in self.local.get(o.val[:-1], []) if (p > ins.pc) == forward]
                    if not at:
                        raise AsmError(f'line {ins.line}: no label for `{o.val}` in `{ins.text}`')
                    name = f'{o.val}@{ins.pc}'
                    self.module.labels[name] = min(at) if forward else max(at)
                    o.val = name


def parse_asm(text: str) -> Module:
    """Read assembly text. Raises AsmError when it holds no kernel."""
    module = Parser(text).run()
    if not module.kernels:
        raise AsmError('no kernel found: the text has neither `.amdhsa_kernel` nor a plain label')
    return module
