"""How many waves of a kernel fit a SIMD and a CU (CDNA3 ISA 3.6, LLVM AMDGPUUsage)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from .asm import AGPR_BASE

if TYPE_CHECKING:
    from .machine import Kernel

UNIFIED_VGPRS, VGPR_GRANULE, MAX_WAVES, SIMDS = 512, 8, 8, 4
LDS_BYTES = {'gfx942': 64 << 10, 'gfx950': 160 << 10}
LDS_GRANULE = {'gfx942': 512, 'gfx950': 1280}


@dataclass(frozen=True, slots=True)
class Occupancy:
    """`limit` names what stops one more workgroup: registers, LDS or the wave slots."""

    vgprs: int
    agprs: int
    sgprs: int
    lds: int
    waves_per_simd: int
    workgroups_per_cu: int
    limit: str

    def as_dict(self) -> dict[str, int | str]:
        return asdict(self)


def used(kernel: Kernel) -> tuple[int, int]:
    """Highest VGPR and AGPR in the code, plus one; the metadata's counts when it has them."""
    v = a = 0
    for ins in kernel.module.instrs:
        for o in ins.ops:
            if o.kind == 'v':
                if o.idx >= AGPR_BASE:
                    a = max(a, o.idx - AGPR_BASE + o.n)
                else:
                    v = max(v, o.idx + o.n)
    a = kernel.meta.get('agpr_count', a)
    return max(v, kernel.meta.get('vgpr_count', 0) - a), a


def occupancy(kernel: Kernel, lds: int, waves: int) -> Occupancy:
    v, a = used(kernel)
    total = ((v + 3) // 4 * 4 if a else v) + a
    total = (total + VGPR_GRANULE - 1) // VGPR_GRANULE * VGPR_GRANULE
    by_registers = min(MAX_WAVES, UNIFIED_VGPRS // max(total, 1))
    wg_registers = (
        by_registers * SIMDS // waves if waves >= SIMDS else by_registers * SIMDS // max(waves, 1)
    )
    granule = LDS_GRANULE[kernel.arch]
    wg_lds = (
        LDS_BYTES[kernel.arch] // ((lds + granule - 1) // granule * granule) if lds else 1 << 20
    )
    wg_slots = MAX_WAVES * SIMDS // waves
    fits = max(1, min(wg_registers, wg_lds, wg_slots))
    limit = (
        'LDS'
        if wg_lds == fits
        else 'registers'
        if wg_registers == fits and by_registers < MAX_WAVES
        else 'wave slots'
    )
    return Occupancy(
        v, a, kernel.meta.get('sgpr_count', 0), lds, max(1, fits * waves // SIMDS), fits, limit
    )
