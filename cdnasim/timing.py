"""Issue-cycle model of one CU: how long the recorded workgroup takes with as many copies resident
as fit. *Simulated.*

Every wave walks its recorded path in order. An instruction issues when its wave is ready and its
pipe is free:
  VALU     its SIMD's vector pipe: 4 cycles, 8 for f64 and wide integer multiplies, 16 for
           transcendentals
  MFMA     its SIMD's matrix core for the instruction's duration; the wave goes on after 4 cycles
  LDS      the CU's LDS for the access's bank cycles (banks.py); data after `lds_latency`
  VMEM     the CU's texture path, `lines` cycles per access; data after `memory_latency`, at
           `memory_bytes` per cycle and CU
  SMEM     data after `scalar_latency`
  scalar   4 cycles; s_nop N: 4 (N + 1); s_waitcnt and s_barrier wait
The constants are assumptions (below, with their source); none was fitted to a measurement. Use the
result to compare kernels.
"""

from __future__ import annotations

import heapq
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from .counters import QUARTER_RATE, TRANSCENDENTAL, klass
from .effects import Effects, effects
from .isa.control import wait_counts

if TYPE_CHECKING:
    from .report import Report


@dataclass(frozen=True, slots=True)
class Assumptions:
    """Figures of the model.

    clock_ghz, cus, hbm_bytes_per_s: AMD data sheets of MI300X (gfx942) and MI355X (gfx950).
    memory_bytes: L2 to CU, 64 B per cycle (CDNA3 white paper). Latencies: round figures of public
    microbenchmarks (chipsandcheese, MI300X: LDS about 55 ns at 2.1 GHz, L2 about 110 ns, Infinity
    Cache and HBM 220 to 350 ns).
    """

    clock_ghz: float
    cus: int
    hbm_bytes_per_s: float
    issue: int = 4
    lds_latency: int = 110
    memory_latency: int = 600
    scalar_latency: int = 200
    memory_bytes: float = 64.0


DEVICE = {'gfx942': Assumptions(2.1, 304, 5.3e12), 'gfx950': Assumptions(2.4, 256, 8.0e12)}
LINE_CYCLES = 2  # cycles of the texture path per 128-byte line: 64 B per cycle


@dataclass(slots=True)
class Span:
    """One instruction, or one stall, of one wave."""

    wave: int
    kind: str
    start: float
    end: float


@dataclass(slots=True)
class Timing:
    """`cycles` for `resident` workgroups on one CU; busy fractions of the four matrix cores and
    vector pipes, of LDS and the memory path; `waits`: share of wave time in s_waitcnt and
    s_barrier."""

    cycles: float
    resident: int
    assumptions: Assumptions
    busy: dict[str, float]
    waits: dict[str, float]
    spans: list[Span] = field(default_factory=list)

    def launch_seconds(self, workgroups: int, hbm_bytes: float = 0.0) -> float:
        """The whole grid: rounds of resident workgroups over all CUs, no faster than `hbm_bytes`
        (the bytes that must come from memory once, which the caller knows) stream at the data
        sheet's rate."""
        a = self.assumptions
        rounds = max(1.0, workgroups / (a.cus * self.resident))
        return max(rounds * self.cycles / (a.clock_ghz * 1e9), hbm_bytes / a.hbm_bytes_per_s)

    def as_dict(self) -> dict[str, Any]:
        return {
            'label': 'simulated, not measured',
            'cycles': round(self.cycles),
            'resident_workgroups': self.resident,
            'busy': {k: round(v, 4) for k, v in self.busy.items()},
            'waits': {k: round(v, 4) for k, v in self.waits.items()},
            'assumptions': asdict(self.assumptions),
        }


@dataclass(slots=True)
class Static:
    """What the model needs to know of one instruction."""

    kind: str
    cost: float  # cycles of the pipe
    effects: Effects
    loads: bool = False
    nop: int = 0
    vm: int | None = None
    lgkm: int | None = None


class Lane:
    """Progress of one wave."""

    def __init__(self, number: int, group: int, path: list[int]):
        self.number, self.group, self.path = number, group, path
        self.at = 0
        self.vm: list[float] = []
        self.lgkm: list[float] = []
        self.ready: dict[int, float] = {}  # matrix results: register -> time


class Model:
    """Event loop over the waves of `resident` workgroups."""

    def __init__(self, report: Report, resident: int, keep_spans: bool = True):
        self.report, self.a = report, DEVICE[report.kernel.arch]
        self.static: dict[int, Static] = {}
        paths = [[pc for part in report.paths[w] for pc in part] for w in sorted(report.paths)]
        self.lanes = [Lane(k, g, p) for g in range(resident) for k, p in enumerate(paths)]
        self.waves, self.resident, self.keep = len(paths), resident, keep_spans
        self.free: dict[Any, float] = {}
        self.busy: dict[str, float] = dict.fromkeys(('mfma', 'valu', 'lds', 'vmem'), 0.0)
        self.waits: dict[str, float] = {'wait': 0.0, 'barrier': 0.0}
        self.spans: list[Span] = []
        self.arrived: dict[int, list[tuple[float, Lane]]] = {}
        self.alive = {g: len(paths) for g in range(resident)}

    def instruction(self, pc: int) -> Static:
        if pc not in self.static:
            ins, c = self.report.kernel.module.instrs[pc], self.report.counters
            kind = klass(ins.op)
            s = Static(kind, float(self.a.issue), effects(ins))
            if kind == 'mfma':
                s.cost = ins.cycles
            elif kind == 'valu':
                s.cost = (
                    16
                    if TRANSCENDENTAL.match(ins.op)
                    else 8
                    if QUARTER_RATE.match(ins.op) or '_f64' in ins.op
                    else 4
                )
            elif kind == 'lds':
                s.cost = c.pc_cycles[pc] / max(1, c.pc_waves[pc])
                s.loads = bool(s.effects.writes)
            elif kind == 'vmem':
                s.cost = LINE_CYCLES * c.pc_lines[pc] / max(1, c.pc_line_samples[pc])
            elif kind == 'wait':
                s.vm, s.lgkm = wait_counts(ins.mods['arg'])
            elif ins.op == 's_nop':
                s.nop = int(ins.ops[0].val)
            self.static[pc] = s
        return self.static[pc]

    def run(self) -> Timing:
        heap = [(0.0, k, lane) for k, lane in enumerate(self.lanes)]
        heapq.heapify(heap)
        end = 0.0
        while heap:
            now, k, lane = heapq.heappop(heap)
            if lane.at >= len(lane.path):
                end = max(end, now)
                self.alive[lane.group] -= 1
                self.open(lane.group, heap)
                continue
            s = self.instruction(lane.path[lane.at])
            lane.at += 1
            if s.kind == 'barrier':
                self.arrived.setdefault(lane.group, []).append((now, lane))
                self.open(lane.group, heap)
                continue
            after = self.step(lane, s, now)
            heapq.heappush(heap, (after, k, lane))
        total = max(end, 1.0)
        share = {'mfma': 4, 'valu': 4, 'lds': 1, 'vmem': 1}
        wave_time = total * len(self.lanes)
        return Timing(
            total,
            self.resident,
            self.a,
            {k: v / total / share[k] for k, v in self.busy.items()},
            {k: v / wave_time for k, v in self.waits.items()},
            self.spans,
        )

    def open(self, group: int, heap: list[tuple[float, int, Lane]]) -> None:
        """Release a barrier when every live wave of the workgroup has arrived."""
        here = self.arrived.get(group, [])
        if not here or len(here) < self.alive[group]:
            return
        at = max(t for t, _ in here) + self.a.issue
        for t, lane in here:
            self.waits['barrier'] += at - t
            self.note(lane, 'barrier', t, at)
            heapq.heappush(heap, (at, lane.group * self.waves + lane.number, lane))
        self.arrived[group] = []

    def note(self, lane: Lane, kind: str, start: float, end: float) -> None:
        if self.keep and lane.group == 0 and end > start:
            self.spans.append(Span(lane.number, kind, start, end))

    def pipe(self, key: Any, now: float, cost: float) -> float:
        """Start time on a pipe that is busy for `cost` from then on."""
        start = max(now, self.free.get(key, 0.0))
        self.free[key] = start + cost
        return start

    def step(self, lane: Lane, s: Static, now: float) -> float:
        """Issue one instruction -> when the wave can issue the next."""
        if s.kind == 'wait':
            return self.wait(lane, s, now)
        if lane.ready and s.kind != 'mfma':
            now = max([now] + [lane.ready.pop(r) for r in s.effects.reads if r in lane.ready])
        simd = lane.number % 4
        if s.kind in ('mfma', 'valu'):
            start = self.pipe((s.kind, simd), now, s.cost)
            self.busy[s.kind] += s.cost
            self.note(lane, s.kind, start, start + s.cost)
            if s.kind == 'mfma':
                lane.ready.update(dict.fromkeys(s.effects.writes, start + s.cost))
                return start + self.a.issue
            return start + s.cost
        if s.kind in ('lds', 'vmem'):
            return self.memory(lane, s, now)
        if s.kind == 'smem':
            lane.lgkm.append(now + self.a.scalar_latency)
        after = now + self.a.issue * (1 + s.nop)
        self.note(lane, 'scalar', now, after)
        return after

    def memory(self, lane: Lane, s: Static, now: float) -> float:
        start = self.pipe(s.kind, now, s.cost)
        self.busy[s.kind] += s.cost
        latency = self.a.lds_latency if s.kind == 'lds' else self.a.memory_latency
        queue = lane.lgkm if s.kind == 'lds' else lane.vm
        queue.append(max(start + s.cost + latency, queue[-1] if queue else 0.0))
        self.note(lane, s.kind, start, start + max(s.cost, self.a.issue))
        return start + self.a.issue

    def wait(self, lane: Lane, s: Static, now: float) -> float:
        after = now
        for queue, left in ((lane.vm, s.vm), (lane.lgkm, s.lgkm)):
            if left is not None:
                while len(queue) > left:
                    after = max(after, queue.pop(0))
        self.waits['wait'] += after - now
        self.note(lane, 'wait', now, after)
        return after + self.a.issue


def simulate(report: Report, resident: int | None = None) -> Timing:
    """Timing of the recorded workgroup. `resident`: copies on the CU, by default what occupancy and
    the grid allow.

    Raises ValueError when the launch recorded no path (`trace=False`).
    """
    if not report.paths:
        raise ValueError('no path was recorded: launch with trace=True')
    if resident is None:
        cus = DEVICE[report.kernel.arch].cus
        total = report.grid[0] * report.grid[1] * report.grid[2]
        resident = min(report.occupancy.workgroups_per_cu, -(-total // cus))
    return Model(report, max(1, resident)).run()
