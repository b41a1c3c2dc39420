"""cdnasim: run AMD CDNA3 and CDNA4 kernels (gfx942, gfx950) on the CPU, instruction by instruction,
with no AMD GPU.

    kernel = cdnasim.load('kernel.s')
    report = kernel.launch(grid=(4,), block=(256,), args=[x, y, n], hazard=True, races=True)
    report.check()

Everything that comes out is *simulated*: results follow the published instruction semantics, cycles
follow a stated model.
"""

from .asm import Module, parse_asm
from .errors import (
    AsmError,
    BudgetError,
    CdnaSimError,
    CheckError,
    DeadlockError,
    ExecError,
    LaunchError,
    MemFault,
    ToolError,
    UnsupportedError,
)
from .machine import Kernel, Options, load
from .memory import Memory
from .report import Report
from .schedules import Difference, compare_schedules

__all__ = [
    'AsmError',
    'BudgetError',
    'CdnaSimError',
    'CheckError',
    'DeadlockError',
    'Difference',
    'ExecError',
    'Kernel',
    'LaunchError',
    'MemFault',
    'Memory',
    'Module',
    'Options',
    'Report',
    'ToolError',
    'UnsupportedError',
    'compare_schedules',
    'load',
    'parse_asm',
]
