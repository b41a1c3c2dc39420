"""The results file: {"meta": {...}, "rows": [...]}, its journal, and what made it."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "triton", "humming-kernels", "triton_kernels", "deep_gemm")


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement. The first eleven fields are the published schema; the rest explain them.

    us, spread, roof_us: us. worst_row_error: max over sampled rows of |y - ref| / |ref| against
    float64 on the same quantised operands. nbytes, flops: the floor that roof_us comes from.
    """

    provider: str
    shape: str
    recipe: str
    tokens: int
    stage: str
    flush: str
    deterministic: bool
    us: float
    spread: float
    roof_us: float
    worst_row_error: float
    routing: str
    accumulate: str
    active_experts: int
    nbytes: int
    flops: int
    roof_by: str
    compared: str
    leaves_out: str

    @property
    def rate(self) -> str:
        """TFLOP/s where the dense GEMM is the roof, else TB/s."""
        if self.roof_by == "dense GEMM":
            return f"{self.flops / self.us * 1e-6:.0f} TFLOP/s"
        return f"{self.nbytes / self.us * 1e-6:.2f} TB/s"

    @property
    def of_roof(self) -> float:
        """roof_us / us."""
        return self.roof_us / self.us


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A provider that did not run, where, and why."""

    provider: str
    shape: str
    tokens: int
    stage: str
    reason: str


def meta(device: str, commit: str | None = None, now: datetime | None = None) -> dict[str, Any]:
    """Device, versions, commit and date of a run."""
    versions = {name: version_of(name) for name in PACKAGES}
    return {
        "device": device,
        "torch": versions.pop("torch"),
        "triton": versions.pop("triton"),
        "rivals": {name: v for name, v in versions.items() if v},
        "commit": commit or commit_of(Path(__file__).parent),
        "date": (now or datetime.now(UTC)).strftime("%Y-%m-%d %H:%M UTC"),
    }


def version_of(package: str) -> str | None:
    """The installed version, by metadata or by the module's own word."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        pass
    try:
        return str(getattr(importlib.import_module(package), "__version__", "vendored"))
    except Exception:  # not installed, or broken: the run names the reason elsewhere
        return None


def commit_of(folder: Path) -> str:
    """The commit of the checkout; "unknown" outside one. A dirty tree is marked."""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


class Journal:
    """One JSON line per row or failure, written as they come: what a killed run leaves behind."""

    def __init__(self, path: Path, *, resume: bool) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if not resume and path.exists():
            path.unlink()
        self.rows: list[Row] = []
        self.left_out: list[LeftOut] = []
        self.measured: set[tuple[str, str, int, str, str, str]] = set()
        self.roofs: dict[str, Any] = {}
        self.spent: dict[str, float] = {}
        if path.exists():
            self._read()

    def _read(self) -> None:
        trying: dict[str, Any] | None = None
        for line in self.path.read_text().splitlines():
            try:
                kind, body, label = json.loads(line)
            except json.JSONDecodeError:  # cut off by the kill
                continue
            trying = body if kind == "trying" else None
            if kind == "row":
                self._keep(Row(**body), label)
            elif kind == "left_out":
                self.left_out.append(LeftOut(**body))
            elif kind == "roofs":
                self.roofs = body
            elif kind == "spent":
                self._charge(body)
        if trying:  # the last thing that the last process wrote
            self.add(LeftOut(**trying))

    def add(self, item: Row | LeftOut, label: str = "") -> None:
        """Records a row, with the provider's label, or a failure."""
        if isinstance(item, Row):
            self._keep(item, label)
        else:
            self.left_out.append(item)
        self._write("row" if isinstance(item, Row) else "left_out", asdict(item), label)

    def note_roofs(self, roofs: dict[str, Any]) -> None:
        """Records the roofs measured so far; the last record holds."""
        self.roofs = roofs
        self._write("roofs", roofs, "")

    def note_spent(self, seconds: dict[str, float]) -> None:
        """Records where the time since the last record went; `spent` sums them up."""
        self._charge(seconds)
        self._write("spent", {name: round(took, 3) for name, took in seconds.items()}, "")

    def trying(self, item: LeftOut | None) -> None:
        """Notes what is about to be tried, None for nothing: if the process ends in it, the next
        one reads it as a failure."""
        self._write("trying", asdict(item) if item else {}, "")

    def _charge(self, seconds: dict[str, float]) -> None:
        for name, took in seconds.items():
            self.spent[name] = self.spent.get(name, 0.0) + took

    def _keep(self, row: Row, label: str) -> None:
        self.rows.append(row)
        self.measured.add((label, row.shape, row.tokens, row.stage, row.routing, row.flush))

    def _write(self, kind: str, body: dict[str, Any], label: str) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps([kind, body, label]) + "\n")


def save(path: Path, about: dict[str, Any], rows: Iterable[Row], **more: Any) -> None:
    """Writes the results file in one step, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    body = {"meta": about | more, "rows": [asdict(row) for row in rows]}
    text = json.dumps(body, indent=None, separators=(",", ":"), allow_nan=False)
    text = text.replace('},{"provider"', '},\n{"provider"').replace('"rows":[', '"rows":[\n')
    partial = path.with_suffix(".partial")
    partial.write_text(text + "\n")
    partial.replace(path)


def load(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """(meta, rows) of a results file. ValueError where it is none."""
    try:
        body = json.loads(path.read_bytes())
        return dict(body["meta"]), [Row(**row) for row in body["rows"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        rule = "must be a results file, {meta, rows} as `mixmoe bench` writes it"
        raise ValueError(f"{path} {rule}: got {error!r}") from error


def best_rival(rows: Iterable[Row]) -> dict[tuple[Any, ...], Row]:
    """The fastest rival for every (shape, tokens, stage, routing, flush)."""
    best: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if row.provider == "mixmoe":
            continue
        at = (row.shape, row.tokens, row.stage, row.routing, row.flush)
        if at not in best or row.us < best[at].us:
            best[at] = row
    return best
