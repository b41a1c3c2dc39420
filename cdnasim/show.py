"""A report for human eyes: rich table, timeline picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .report import Report

COLOURS = {
    'mfma': '#c1272d',
    'valu': '#0071bc',
    'lds': '#f7931e',
    'vmem': '#22903f',
    'scalar': '#93a1a1',
    'wait': '#d9d9d9',
    'barrier': '#333333',
}


def human(n: float, unit: str = '') -> str:
    for step, prefix in ((1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
        if n >= step:
            return f'{n / step:.2f} {prefix}{unit}'
    return f'{n:.0f} {unit}'.strip()


def rows(r: Report) -> list[tuple[str, str]]:
    c, o = r.counters, r.occupancy
    classes = ', '.join(f'{k} {human(v)}' for k, v in r.by_class.items())
    share = 100 * c.lds_conflict_cycles / max(1, c.lds_cycles)
    out = [
        ('launch', f'grid {r.grid}, block {r.block}: {r.workgroups} workgroups, {r.waves} waves'),
        ('wave-instructions', f'{human(r.instructions)} ({classes})'),
        ('matrix work', human(r.mfma_flops, 'FLOP')),
        (
            'global memory',
            f'load {human(c.global_load_bytes, "B")}, store {human(c.global_store_bytes, "B")}, '
            f'atomic {human(c.global_atomic_bytes, "B")}',
        ),
        (
            'cache lines',
            (
                f'{sum(c.pc_lines.values()) / max(1, sum(c.pc_line_samples.values())):.1f} per '
                f'access (sampled)'
            ),
        ),
        (
            'LDS',
            f'read {human(c.lds_read_bytes, "B")}, write {human(c.lds_write_bytes, "B")}, DMA '
            f'{human(c.lds_dma_bytes, "B")}; '
            f'{human(c.lds_cycles)} cycles, {share:.0f} % bank conflicts',
        ),
        (
            'registers',
            f'{o.vgprs} VGPR, {o.agprs} AGPR, {o.lds} B LDS: {o.workgroups_per_cu} workgroups '
            f'a CU, '
            f'{o.waves_per_simd} waves a SIMD ({o.limit} limit)',
        ),
    ]
    if r.paths:
        t = r.timing
        busy = ', '.join(f'{k} {100 * v:.0f} %' for k, v in t.busy.items())
        waits = ', '.join(f'{k} {100 * v:.0f} %' for k, v in t.waits.items())
        out.append(
            (
                'simulated cycles',
                (
                    f'{t.cycles:.0f} for {t.resident} workgroups on a CU; busy {busy}; wave time '
                    f'in {waits}'
                ),
            )
        )
    out.append(
        (
            'host',
            f'{r.seconds:.2f} s, {human(r.instructions / max(r.seconds, 1e-9))} wave-instr./s',
        )
    )
    return out


def table(r: Report) -> Any:
    """rich renderable: counts, then findings."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    grid = Table(
        title=f'{r.kernel.name} ({r.kernel.arch}, simulated)',
        show_header=False,
        title_justify='left',
    )
    grid.add_column(style='bold')
    grid.add_column()
    for name, value in rows(r):
        grid.add_row(name, value)
    found = [*r.findings, *r.stray_loads]
    verdict = (
        Text('no findings', style='green') if not found else Text('\n'.join(found), style='red')
    )
    return Group(grid, verdict)


def timeline(r: Report, path: str | Path) -> Path:
    """Draw the first workgroup: one row per wave, one colour per kind of work. Returns the path of
    the PNG.
    """
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    t = r.timing
    waves = 1 + max((s.wave for s in t.spans), default=0)
    fig, ax = plt.subplots(figsize=(14, 1.2 + 0.55 * waves), layout='constrained')
    for kind, colour in COLOURS.items():
        for wave in range(waves):
            bars = [
                (s.start, s.end - s.start) for s in t.spans if s.kind == kind and s.wave == wave
            ]
            low, height = (wave - 0.4, 0.8) if kind not in ('mfma',) else (wave - 0.4, 0.36)
            ax.broken_barh(
                bars, (low, height), facecolors=colour, label=kind if wave == 0 else None
            )
    ax.set_yticks(range(waves), [f'wave {k} (SIMD {k % 4})' for k in range(waves)])
    ax.invert_yaxis()
    ax.set_xlabel(f'cycles, simulated ({t.resident} workgroups on the CU)')
    ax.set_title(f'{r.kernel.name}: matrix cores {100 * t.busy["mfma"]:.0f} % busy', loc='left')
    ax.legend(ncols=len(COLOURS), loc='upper center', bbox_to_anchor=(0.5, -0.25), frameon=False)
    fig.savefig(path, dpi=110)
    plt.close(fig)
    return Path(path)
