"""Kernels and launches: the public objects of cdnasim."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import index
from pathlib import Path
from typing import Any

import numpy as np

from .arguments import pack_args
from .asm import AGPR_BASE, GOT_BASE, Argument, Instr, KernelText, Module, Operand, parse_asm
from .batch import Batch, norm
from .checks import Findings, StateChecker, Uninitialised
from .counters import Counters
from .effects import effects
from .errors import AsmError, LaunchError, UnsupportedError
from .group import Group, make_banks
from .isa import control, lds, mfma, salu, smem, valu, vmem
from .legality import refuse_foreign, refuse_too_large
from .memory import Memory
from .numerics import Array, u8, u32, u64
from .parallel import Outcome, run_forked
from .paths import Paths
from .races import Races
from .report import Report
from .runner import Runner, Schedule

ARCHS = {'gfx942': 'gfx942', 'gfx940': 'gfx942', 'gfx941': 'gfx942', 'gfx950': 'gfx950'}
MAX_WORKGROUPS = 1 << 24
LDS_LIMIT = {'gfx942': 64 << 10, 'gfx950': 160 << 10}
FAMILIES = (salu, control, smem, mfma, valu, lds, vmem)
LEAST = {'quantum': 0, 'seed': 0, 'budget': 1, 'batch_waves': 1, 'processes': 1}
USER_SGPRS = (
    ('private_segment_buffer', 4),
    ('dispatch_ptr', 2),
    ('queue_ptr', 2),
    ('kernarg_segment_ptr', 2),
    ('dispatch_id', 2),
    ('flat_scratch_init', 2),
    ('private_segment_size', 1),
)
Size = int | Sequence[int]


@dataclass(frozen=True, slots=True)
class Options:
    """How to run a launch.

    hazard         memory results land only at the s_waitcnt that forces them, until then registers
                   hold NaN and reads are reported; wait states between dependent instructions are
                   checked
    races          report two waves that touch the same LDS or global bytes, one writing, with no
                   barrier between
    uninitialised  report reads of registers, LDS and fresh buffers that nothing wrote
    schedule       'lockstep', 'serial', 'reverse' or 'random' (runner.py), with `quantum` and
                   `seed`
    budget         instructions a wave may execute
    batch_waves    waves that run as one array
    processes      share the workgroups of a plain run (no check on) among this many processes
    trace          record the path of the first workgroup (timing model, timeline picture)

    Raises LaunchError for a number below what makes sense (LEAST).
    """

    hazard: bool = False
    races: bool = False
    uninitialised: bool = False
    schedule: str = 'lockstep'
    quantum: int = 0
    seed: int = 0
    budget: int = 20_000_000
    batch_waves: int = 128
    processes: int = 1
    trace: bool = True

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            value = getattr(self, name)
            if not isinstance(value, (int, np.integer)) or value < least:
                raise LaunchError(f'{name} {value!r}: a whole number from {least} on is expected')


class Kernel:
    """One kernel of a module, decoded for execution. Make it with `cdnasim.load`."""

    def __init__(self, module: Module, text: KernelText, arch: str | None = None):
        target = arch or module.target
        if target not in ARCHS:
            raise UnsupportedError(
                f'{text.name} is for {target}: cdnasim runs '
                f'{", ".join(sorted(set(ARCHS.values())))}'
            )
        self.arch, self.module, self.name = ARCHS[target], module, text.name
        self.text, self.hsa, self.meta, self.args = text, text.hsa, text.meta, text.args
        self.entry = text.entry
        self.banks = make_banks(self.arch)
        self.private_bytes = max(
            self.meta.get('private_segment_fixed_size', 0),
            self.hsa.get('private_segment_fixed_size', 0),
        )
        self.indexed = gpr_index_regions(module)
        self.reads_atomics = any(
            '_atomic_' in i.op and i.flags & {'sc0', 'glc'} for i in module.instrs
        )
        self.code: list[Callable[[Batch], Any]] = []
        self.decode()
        self.effects = [effects(i) for i in module.instrs]
        self.ends = run_ends(module.instrs)
        self.paths = Paths(self)
        self.registers = 1 + max(
            [AGPR_BASE if self.uses_agprs() else 0, 1]
            + [o.idx + o.n - 1 for i in module.instrs for o in i.ops if o.kind == 'v']
        )

    def uses_agprs(self) -> bool:
        return any(o.kind == 'v' and o.idx >= AGPR_BASE for i in self.module.instrs for o in i.ops)

    def decode(self) -> None:
        """Closures of this kernel and of every function it might call. An unknown instruction is an
        error that names it.
        """
        others = {n for n in self.module.kernels if n != self.name}
        foreign = [self.module.functions[n] for n in others if n in self.module.functions]
        unknown: dict[str, Instr] = {}
        for ins in self.module.instrs:
            if any(lo <= ins.pc < hi for lo, hi in foreign):
                self.code.append(not_here)
                continue
            f = decode_one(ins, self)
            if f is None:
                unknown.setdefault(ins.op, ins)
            self.code.append(f or not_here)
        if unknown:
            where = '; '.join(f'`{i.text}` (line {i.line})' for i in list(unknown.values())[:5])
            raise UnsupportedError(
                f'{self.name}: {len(unknown)} instructions are not implemented: {where}'
            )
        own = [i for i in self.module.instrs if not any(a <= i.pc < b for a, b in foreign)]
        refuse_foreign(own, self.arch, self.name)
        refuse_too_large(own)

    def label(self, o: Operand, ins: Instr) -> int:
        if o.kind == 'imm':  # disassembly without symbols: dwords from the next instruction
            raise AsmError(f'line {ins.line}: branch `{ins.text}` has no label')
        if o.val not in self.module.labels:
            raise AsmError(f'line {ins.line}: label {o.val!r} of `{ins.text}` is not defined')
        return self.module.labels[o.val]

    @property
    def visible_args(self) -> list[Argument]:
        return [a for a in self.args if not a.hidden]

    def pack(self, args: Sequence[Any] | bytes, grid: Size, block: Size, memory: Memory) -> bytes:
        """The argument segment as bytes, buffers mapped into `memory`."""
        return pack_args(self, args, triple(grid, 'grid'), triple(block, 'block'), memory).tobytes()

    def launch(
        self,
        grid: Size,
        block: Size,
        args: Sequence[Any] | bytes,
        *,
        memory: Memory | None = None,
        dynamic_lds: int = 0,
        workgroups: Sequence[int] | None = None,
        options: Options | None = None,
        **changes: Any,
    ) -> Report:
        """Run the kernel and return a `Report`.

        grid: workgroups per axis; block: work-items per axis; args: in order of the kernel's
        arguments, NumPy arrays or torch CPU tensors for pointers, numbers or bytes for values, or
        the packed bytes of the whole argument segment. workgroups: run only these linear ids.
        `changes` are fields of `Options`, e.g. hazard=True. Raises LaunchError, MemFault,
        BudgetError, DeadlockError, ExecError; findings of the checks are in the report.
        """
        opts = replace(options or Options(), **changes)
        return Launch(
            self, triple(grid, 'grid'), triple(block, 'block'), memory or Memory(), opts
        ).run(args, dynamic_lds, workgroups)


def run_ends(instrs: list[Instr]) -> list[int]:
    """Per instruction, the end of the run it belongs to: one past the next that may branch."""
    ends, end = [0] * len(instrs), len(instrs)
    for ins in reversed(instrs):
        if control.may_branch(ins.op):
            end = ins.pc + 1
        ends[ins.pc] = end
    return ends


def not_here(w: Batch) -> None:
    raise UnsupportedError('execution ran into the code of another kernel')


def decode_one(ins: Instr, kernel: Any) -> Callable[[Batch], Any] | None:
    """The closure of one instruction; None when its name is unknown, UnsupportedError when a
    modifier is.
    """
    try:
        for family in FAMILIES:
            if f := family.decode(ins, kernel):
                return f
    except (KeyError, IndexError, ValueError, TypeError, AttributeError) as e:
        raise UnsupportedError(
            f'line {ins.line}: cannot decode `{ins.text}`: {type(e).__name__}: {e}'
        ) from e
    return None


def gpr_index_regions(module: Module) -> dict[int, set[str]]:
    """Instructions between s_set_gpr_idx_on and _off, with the operands that are indexed (LLVM
    emits only v_mov there).
    """
    regions: dict[int, set[str]] = {}
    current: set[str] | None = None
    for ins in module.instrs:
        if ins.op == 's_set_gpr_idx_on':
            text = ins.text
            current = {k for k in ('SRC0', 'SRC1', 'SRC2', 'DST') if k in text}
        elif ins.op == 's_set_gpr_idx_off':
            current = None
        elif current is not None:
            regions[ins.pc] = current
    return regions


def triple(x: Size, what: str) -> tuple[int, int, int]:
    try:
        values = tuple(index(v) for v in (x if isinstance(x, Iterable) else (x,)))
    except TypeError:
        values = ()
    if not 1 <= len(values) <= 3 or any(v < 1 for v in values):
        raise LaunchError(f'{what} {x!r}: one to three positive whole numbers are expected')
    padded = (*values, 1, 1)
    return padded[0], padded[1], padded[2]


class Launch:
    """One launch: argument segment, registers at wave start, checks, and the loop over groups of
    workgroups.
    """

    def __init__(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        memory: Memory,
        options: Options,
    ):
        self.kernel, self.grid, self.block, self.memory, self.options = (
            kernel,
            grid,
            block,
            memory,
            options,
        )
        threads = block[0] * block[1] * block[2]
        limit = kernel.meta.get('max_flat_workgroup_size', 1024) or 1024
        if threads > limit:
            raise LaunchError(
                f'{kernel.name}: a block of {block} has {threads} work-items, the kernel was '
                f'compiled for {limit}'
            )
        self.waves = (threads + 63) // 64
        self.lds_bytes = 0
        self.findings = Findings(kernel)
        self.races = Races(self.findings) if options.races else None
        self.uninitialised: Any = Uninitialised(self.findings) if options.uninitialised else None
        self.checker = (
            StateChecker(kernel, self.findings, options)
            if options.hazard or options.uninitialised
            else None
        )
        self.traced: set[int] = set()
        self.paths: dict[int, list[list[int]]] = {}
        self.schedule = Schedule.named(options.schedule, options.quantum, options.seed)

    def run(self, args: Any, dynamic_lds: int, workgroups: Sequence[int] | None) -> Report:
        start = time.perf_counter()
        k = self.kernel
        self.lds_bytes = (
            max(k.hsa.get('group_segment_fixed_size', 0), k.meta.get('group_segment_fixed_size', 0))
            + dynamic_lds
        )
        if self.lds_bytes > LDS_LIMIT[k.arch]:
            raise LaunchError(
                f'{k.name}: {self.lds_bytes} bytes of LDS, {k.arch} has {LDS_LIMIT[k.arch]}'
            )
        self.kernarg = pack_args(k, args, self.grid, self.block, self.memory)
        self.kernarg_at = self.memory.alloc(self.kernarg, 'kernarg')
        self.dispatch_at = self.memory.alloc(
            dispatch_packet(self.grid, self.block), 'dispatch packet'
        )
        if k.module.got:
            table = np.array(
                [k.module.address(k.module.labels[name]) for name in k.module.got], u64
            )
            self.memory.map(GOT_BASE, table, 'global offset table')
        total = self.grid[0] * self.grid[1] * self.grid[2]
        if workgroups is None and total > MAX_WORKGROUPS:
            raise LaunchError(
                f'{k.name}: grid {self.grid} has {total} workgroups; more than {MAX_WORKGROUPS} '
                'would run for days here: pass workgroups=range(...) to run a part'
            )
        ids = np.arange(total) if workgroups is None else np.asarray(list(workgroups), np.int64)
        if len(ids) and (ids.min() < 0 or ids.max() >= total):
            raise LaunchError(
                f'{k.name}: workgroups {workgroups!r} are outside the grid of {total}'
            )
        counters, counts = Counters(), np.zeros(len(k.module.instrs), np.int64)
        per = max(1, self.options.batch_waves // self.waves)
        parts = [ids[at : at + per] for at in range(0, len(ids), per)]
        self.traced = {int(ids[0])} if len(ids) else set()
        previous, self.memory.watch = self.memory.watch, self.uninitialised
        try:
            for outcome in self.outcomes(parts):
                counters.absorb(outcome.counters)
                counts += outcome.counts
                self.paths.update(outcome.paths)
        finally:
            self.memory.watch = previous
        return Report(self, counters, counts, len(ids), time.perf_counter() - start)

    def outcomes(self, parts: list[Array]) -> Iterator[Outcome]:
        """Run groups of workgroups, in order, or in several processes (see parallel.py for when
        that is possible).
        """
        n = min(self.options.processes, len(parts))
        if n > 1 and not (
            self.checker or self.races or self.memory.lenient or self.kernel.reads_atomics
        ):
            yield from run_forked(self.memory, [partial(self.run_group, part) for part in parts], n)
        else:
            yield from (self.run_group(part) for part in parts)

    def run_group(self, part: Array) -> Outcome:
        group = Group(self.kernel, self, part)
        with np.errstate(all='ignore'):
            runner = Runner(group, self.schedule)
            runner.run()
        for slot in runner.slots:
            for b in slot.batches:
                self.finished(b)
        counts = np.cumsum(np.array(group.entered, np.int64))[:-1]
        return Outcome(group.counters, counts, self.paths)

    def finished(self, b: Batch) -> None:
        """Keep the paths of the traced workgroup."""
        for k in range(b.n):
            if self.options.trace and int(b.group.linear[b.wg[k]]) in self.traced:
                self.paths.setdefault(int(b.wave[k]), [*b.history[k], b.trace])

    def init_sgprs(self, w: Batch) -> None:
        """User and system SGPRs in the order of the kernel descriptor (LLVM AMDGPUUsage, initial
        kernel execution state).
        """
        h, i = self.kernel.hsa, 0
        pointers = {'kernarg_segment_ptr': self.kernarg_at, 'dispatch_ptr': self.dispatch_at}
        for key, n in USER_SGPRS:
            if h.get('user_sgpr_' + key):
                if key in pointers:
                    w.s[i], w.s[i + 1] = pointers[key] & 0xFFFFFFFF, pointers[key] >> 32
                i += n
        pre, off = (
            h.get('user_sgpr_kernarg_preload_length', 0),
            h.get('user_sgpr_kernarg_preload_offset', 0),
        )
        words = np.zeros(off + pre, u32)
        have = self.kernarg[: 4 * len(words)].view(u32) if pre else words
        words[: len(have)] = have
        w.s[i : i + pre] = words[off : off + pre].tolist()
        i = max(i + pre, h.get('user_sgpr_count', 0))
        linear = w.group.linear[w.wg].astype(np.int64)
        ids = (
            linear % self.grid[0],
            linear // self.grid[0] % self.grid[1],
            linear // (self.grid[0] * self.grid[1]),
        )
        for axis, key in enumerate('xyz'):
            if h.get('system_sgpr_workgroup_id_' + key, 1 if axis == 0 else 0):
                w.s[i] = norm(ids[axis].astype(u64))
                i += 1


def dispatch_packet(grid: tuple[int, int, int], block: tuple[int, int, int]) -> Array:
    packet = np.zeros(64, u8)
    packet[4:10].view(np.uint16)[:] = block
    packet[12:24].view(u32)[:] = [g * b for g, b in zip(grid, block, strict=True)]
    return packet


def load(source: str | Path, name: str | None = None, arch: str | None = None) -> Kernel:
    """A kernel from assembly text, a `.s` file or an ELF code object.

    source: path or the text itself; name: which kernel, needed when there are several; arch: gfx942
    or gfx950, by default what the text says. Raises AsmError, UnsupportedError (other architecture,
    unknown instruction), ToolError (no llvm-objdump).
    """
    module = load_module(source)
    if name is None and len(module.kernels) > 1:
        raise AsmError(
            f'the file holds {len(module.kernels)} kernels: name one of {", ".join(module.kernels)}'
        )
    wanted = name or next(iter(module.kernels))
    if wanted not in module.kernels:
        raise AsmError(f'no kernel {wanted!r}; there are: {", ".join(module.kernels)}')
    return Kernel(module, module.kernels[wanted], arch)


def load_module(source: str | Path) -> Module:
    text = str(source)
    if '\n' in text:
        return parse_asm(text)
    path = Path(source)
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise AsmError(f'{path} does not exist') from None
    except (OSError, ValueError) as e:
        why = getattr(e, 'strerror', None) or e
        raise AsmError(f'{text[:80]!r} is no file that can be read ({why})') from None
    if raw[:4] == b'\x7fELF':
        from .elf import disassemble

        return parse_asm(disassemble(path))
    try:
        return parse_asm(raw.decode())
    except UnicodeDecodeError:
        raise AsmError(f'{path} is neither assembly text (UTF-8) nor a code object') from None
