"""Dynamic counts of a launch."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

FIELDS = (
    'global_load_bytes',
    'global_store_bytes',
    'global_atomic_bytes',
    'atomics',
    'smem_bytes',
    'lds_dma_bytes',
    'lds_read_bytes',
    'lds_write_bytes',
    'lds_cycles',
    'lds_conflict_cycles',
    'scratch_bytes',
    'barriers',
)
TRANSCENDENTAL = re.compile(r'^v_(exp|log|rcp|rsq|sqrt|sin|cos)_')
QUARTER_RATE = re.compile(r'^v_(mul_lo|mul_hi|mad_u64|mad_i64)')


def klass(op: str) -> str:
    """Instruction class by mnemonic."""
    if op.startswith(('v_mfma', 'v_smfmac')):
        return 'mfma'
    for prefix, name in (
        ('v_', 'valu'),
        ('ds_', 'lds'),
        ('s_load', 'smem'),
        ('s_buffer_', 'smem'),
        ('s_store', 'smem'),
        ('s_waitcnt', 'wait'),
        ('s_barrier', 'barrier'),
        ('s_cbranch', 'branch'),
        ('s_branch', 'branch'),
    ):
        if op.startswith(prefix):
            return name
    return 'vmem' if op.startswith(('buffer_', 'global_', 'flat_', 'scratch_')) else 'salu'


class Counters:
    """Bytes, LDS cycles and samples; instruction counts are kept per program counter by the
    group.
    """

    def __init__(self) -> None:
        self.global_load_bytes = self.global_store_bytes = self.global_atomic_bytes = (
            self.atomics
        ) = 0
        self.smem_bytes = self.lds_dma_bytes = self.lds_read_bytes = self.lds_write_bytes = 0
        self.lds_cycles = self.lds_conflict_cycles = self.scratch_bytes = self.barriers = 0
        self.pc_cycles: Counter[int] = (
            Counter()
        )  # LDS cycles and accesses (in waves) per instruction
        self.pc_waves: Counter[int] = Counter()
        self.pc_lines: Counter[int] = Counter()  # cache lines and samples per instruction
        self.pc_line_samples: Counter[int] = Counter()

    def add_pc_cycles(self, pc: int, cycles: int, waves: int) -> None:
        self.pc_cycles[pc] += cycles
        self.pc_waves[pc] += waves

    def line_sample(self, pc: int, lines: int) -> None:
        self.pc_lines[pc] += lines
        self.pc_line_samples[pc] += 1

    def absorb(self, other: Counters) -> None:
        for k in FIELDS:
            setattr(self, k, getattr(self, k) + getattr(other, k))
        for name in ('pc_cycles', 'pc_waves', 'pc_lines', 'pc_line_samples'):
            getattr(self, name).update(getattr(other, name))

    def as_dict(self) -> dict[str, Any]:
        return {k: getattr(self, k) for k in FIELDS}
