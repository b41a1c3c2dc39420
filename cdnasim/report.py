"""What a launch did: counts, findings, occupancy, simulated cycles; as a rich table, as JSON, as
plain attributes.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from .counters import Counters, klass
from .errors import CheckError
from .occupancy import Occupancy, occupancy

if TYPE_CHECKING:
    from .machine import Launch
    from .numerics import Array
    from .timing import Timing


class Report:
    """Result of `Kernel.launch`. `counters` holds bytes and LDS cycles, `counts` executions per
    instruction (in waves).
    """

    def __init__(
        self, launch: Launch, counters: Counters, counts: Array, workgroups: int, seconds: float
    ):
        self.kernel, self.grid, self.block = launch.kernel, launch.grid, launch.block
        self.counters, self.counts, self.workgroups, self.seconds = (
            counters,
            counts,
            workgroups,
            seconds,
        )
        self.waves = workgroups * launch.waves
        self.waves_per_workgroup = launch.waves
        self.lds_bytes = launch.lds_bytes
        self.options = launch.options
        self.findings = launch.findings.lines()
        self.kinds = Counter(f.kind for f in launch.findings.seen)
        self.stray_loads = list(launch.memory.violations)
        self.paths = launch.paths
        self.cached_timing: Timing | None = None

    # ---- counts
    @property
    def instructions(self) -> int:
        """Wave-instructions executed."""
        return int(self.counts.sum())

    @property
    def by_class(self) -> dict[str, int]:
        out: Counter[str] = Counter()
        for ins, n in zip(self.kernel.module.instrs, self.counts.tolist(), strict=True):
            if n:
                out[klass(ins.op)] += n
        return dict(out.most_common())

    @property
    def by_op(self) -> dict[str, int]:
        out: Counter[str] = Counter()
        for ins, n in zip(self.kernel.module.instrs, self.counts.tolist(), strict=True):
            if n:
                out[ins.op] += n
        return dict(out.most_common())

    @property
    def mfma_flops(self) -> int:
        return sum(
            ins.flops * n
            for ins, n in zip(self.kernel.module.instrs, self.counts.tolist(), strict=True)
        )

    @property
    def occupancy(self) -> Occupancy:
        return occupancy(self.kernel, self.lds_bytes, self.waves_per_workgroup)

    @property
    def timing(self) -> Timing:
        """Simulated cycles of one workgroup, from the recorded path of the first (see timing.py for
        the assumptions).
        """
        if self.cached_timing is None:
            from .timing import simulate

            self.cached_timing = simulate(self)
        return self.cached_timing

    # ---- verdict
    @property
    def ok(self) -> bool:
        """No race, hazard, uninitialised read or stray load was found (among those the options
        looked for).
        """
        return not self.findings and not self.stray_loads

    def check(self) -> Report:
        """Raise CheckError with the findings, if there are any."""
        if not self.ok:
            raise CheckError(
                '\n'.join(
                    [
                        f'{self.kernel.name}: {len(self.findings)} findings',
                        *self.findings,
                        *self.stray_loads,
                    ]
                )
            )
        return self

    # ---- output
    def to_dict(self) -> dict[str, Any]:
        c = self.counters
        lines = {
            self.kernel.module.instrs[pc].text: round(c.pc_lines[pc] / n, 2)
            for pc, n in c.pc_line_samples.items()
        }
        out: dict[str, Any] = {
            'kernel': self.kernel.name,
            'arch': self.kernel.arch,
            'grid': list(self.grid),
            'block': list(self.block),
            'workgroups': self.workgroups,
            'waves': self.waves,
            'instructions': self.instructions,
            'by_class': self.by_class,
            'mfma_flops': self.mfma_flops,
            **c.as_dict(),
            'cache_lines_per_access': lines,
            'lds_bytes': self.lds_bytes,
            'occupancy': self.occupancy.as_dict(),
            'findings': self.findings,
            'stray_loads': self.stray_loads,
            'host_seconds': round(self.seconds, 4),
        }
        if self.paths:
            out['simulated'] = self.timing.as_dict()
        return out

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    def __repr__(self) -> str:
        rate = self.instructions / max(self.seconds, 1e-9)
        verdict = (
            'no findings'
            if self.ok
            else f'{len(self.findings)} findings, {len(self.stray_loads)} stray loads'
        )
        return (
            f'<Report {self.kernel.name}: {self.workgroups} workgroups, {self.waves} waves, '
            f'{self.instructions} '
            f'wave-instructions in {self.seconds:.2f} s ({rate / 1e3:.0f} k/s), {verdict}>'
        )

    def __rich__(self) -> Any:
        from .show import table

        return table(self)
