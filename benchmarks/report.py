"""Rich tables: ours beside the best rival and the roof, and every provider beside every other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .registry import OURS
from .results import Row, best_rival

HEADLINE = "a8w4"
WIDTH = 300  # columns, where the output is a file: no cell is cut
STAGES = ("stage1", "stage2", "layer")


@dataclass(frozen=True, slots=True)
class Ours:
    """Our row as a user gets it with no option, our fastest one, and the deterministic one that
    adds precisely; a run from before "auto" has that as the first."""

    default: Row
    fastest: Row
    precise: Row | None = None

    @property
    def extra(self) -> str:
        """The fastest row where it gains more than a per cent, the precise one where it is not the
        default, and how they are had."""
        found = []
        if self.fastest.us <= 0.99 * self.default.us:
            how = ["fast"] if self.fastest.accumulate == "fast" else []
            how += [] if self.fastest.deterministic else ["atomics"]
            found.append(f"{self.fastest.us:.1f} {' '.join(how)}")
        if self.precise and self.precise is not self.default:
            found.append(f"{self.precise.us:.1f} precise")
        return ", ".join(found)


def ours_of(rows: Iterable[Row]) -> dict[tuple[Any, ...], Ours]:
    """Our rows for every (shape, tokens, stage, routing, flush), of one recipe: HEADLINE where it
    was measured. Where the default is missing the fastest stands for it."""
    mine = [row for row in rows if row.provider == OURS]
    if any(row.recipe == HEADLINE for row in mine):
        mine = [row for row in mine if row.recipe == HEADLINE]
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in mine:
        at = (row.shape, row.tokens, row.stage, row.routing, row.flush)
        groups.setdefault(at, []).append(row)
    found = {}
    for at, group in groups.items():
        fastest = min(group, key=lambda row: row.us)
        plain = {row.accumulate: row for row in group if row.deterministic}
        precise = plain.get("precise")
        found[at] = Ours(plain.get("auto") or precise or fastest, fastest, precise)
    return found


def print_all(
    about: dict[str, Any],
    rows: Sequence[Row],
    *,
    detail: bool = False,
    console: Console | None = None,
) -> None:
    """Everything that a results file holds."""
    out = console or Console(width=None if Console().is_terminal else WIDTH)
    versions = ", ".join(f"{k} {v}" for k, v in about.get("rivals", {}).items())
    out.print(
        f"[bold]{about['device']}[/bold], torch {about['torch']}, triton {about['triton']}, "
        f"{versions}; commit {about['commit'][:12]}, {about['date']}"
    )
    groups = list(dict.fromkeys((row.shape, row.routing, row.flush) for row in rows))
    for shape, routing, flush in groups:
        here = [r for r in rows if (r.shape, r.routing, r.flush) == (shape, routing, flush)]
        print_summary(out, f"{shape}, {routing} routing, {flush} L2", here)
        if detail:
            for stage in STAGES:
                if any(row.stage == stage for row in here):
                    out.print(provider_table(f"{shape} {stage}, {flush} L2, us", here, stage))
    out.print(error_table(rows))
    for line in dict.fromkeys(left_out_lines(rows)):
        out.print(f"  {escape(line)}")
    for line in about.get("not_reached", []):
        out.print(f"  [yellow]out of time before[/yellow] {escape(line)}")
    for item in failures(about.get("left_out", [])):
        out.print(f"  [yellow]left out[/yellow] {escape(item)}")


def print_summary(out: Console, title: str, rows: Sequence[Row]) -> None:
    """One table, or one of each stage where the console is too narrow for that."""
    whole = summary_table(title, rows)
    free = out.options.update(width=1000)
    if out.measure(whole, options=free).maximum <= out.width:
        out.print(whole)
        return
    for stage in STAGES:
        out.print(summary_table(title, rows, (stage,)))


def summary_table(title: str, rows: Sequence[Row], stages: Sequence[str] = STAGES) -> Table:
    """Tokens down; for each stage the roof, the best rival, ours, and how they compare."""
    table = Table(title=title, title_justify="left", header_style="bold")
    table.add_column("T", justify="right", no_wrap=True)
    table.add_column("experts", justify="right", no_wrap=True)
    for stage in stages:
        for head in (f"{stage}: roof", "best rival", OURS, "faster"):
            table.add_column(head, justify="right", no_wrap=True)
    rivals, ours = best_rival(rows), ours_of(rows)
    for tokens in sorted({row.tokens for row in rows}):
        here = [row for row in rows if row.tokens == tokens]
        cells = [str(tokens), str(here[0].active_experts)]
        for stage in stages:
            at = (here[0].shape, tokens, stage, here[0].routing, here[0].flush)
            cells += summary_cells(ours.get(at), rivals.get(at))
        table.add_row(*cells)
    return table


def summary_cells(ours: Ours | None, rival: Row | None) -> list[str]:
    """roof, best rival, ours with its fraction of the roof, rival / ours."""
    roof = ours.default if ours else rival
    theirs = f"{rival.us:.1f} {rival.provider}" if rival else "-"
    if ours is None:
        return [f"{roof.roof_us:.1f}" if roof else "-", theirs, "-", "-"]
    gain = "-"
    if rival:
        ratio = rival.us / ours.default.us
        gain = f"[{'green' if ratio > 1 else 'red'}]{ratio:.2f}x[/]"
    extra = f"; {ours.extra}" if ours.extra else ""
    mine = f"[bold]{ours.default.us:.1f}[/bold] ({ours.default.of_roof:.0%}){extra}"
    return [f"{ours.default.roof_us:.1f}", theirs, mine, gain]


def provider_table(title: str, rows: Sequence[Row], stage: str) -> Table:
    """Tokens down, a column per provider: time, spread, rate."""
    of_stage = [row for row in rows if row.stage == stage]
    columns = list(dict.fromkeys(column_of(row) for row in of_stage))
    table = Table(title=title, title_justify="left", header_style="bold")
    table.add_column("T", justify="right", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    for tokens in sorted({row.tokens for row in of_stage}):
        cells = {column_of(row): row for row in of_stage if row.tokens == tokens}
        fastest = min(row.us for row in cells.values())
        table.add_row(str(tokens), *(time_cell(cells.get(column), fastest) for column in columns))
    return table


def column_of(row: Row) -> str:
    """Provider, recipe and, for ours, how it adds."""
    how = (
        ""
        if row.provider != OURS
        else f" {row.accumulate}{'' if row.deterministic else ' atomics'}"
    )
    return f"{row.provider} {row.recipe}{how}"


def time_cell(row: Row | None, fastest: float) -> str:
    """ "12.3 ±0.1, 3.9 TB/s"; the fastest of the line is bold."""
    if row is None:
        return "-"
    text = f"{row.us:.1f} ±{row.spread / 2:.1f}, {row.rate}"
    return f"[bold green]{text}[/]" if row.us == fastest else text


def error_table(rows: Sequence[Row]) -> Table:
    """The worst row of each provider over all cases, against float64 on its own operands."""
    table = Table(
        title="worst row error against float64 on the same quantised operands",
        title_justify="left",
        header_style="bold",
    )
    for head in ("provider", "stage", "worst", "at", "rows compared"):
        table.add_column(head)
    worst: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        at = (column_of(row), row.stage, row.compared)
        if at not in worst or row.worst_row_error > worst[at].worst_row_error:
            worst[at] = row
    for (column, stage, compared), row in sorted(worst.items(), key=lambda item: item[0]):
        place = f"{row.shape} T {row.tokens}"
        table.add_row(column, stage, f"{row.worst_row_error:.1e}", place, compared)
    return table


def left_out_lines(rows: Sequence[Row]) -> list[str]:
    """What each rival's time does not include, always in the rival's favour."""
    return [
        f"{row.provider} {row.stage} leaves out: {row.leaves_out}"
        for row in rows
        if row.provider != OURS and row.leaves_out
    ]


def failures(left_out: Iterable[dict[str, Any]]) -> list[str]:
    """One line per reason: who, which stages, where."""
    found: dict[str, dict[str, list[str]]] = {}
    for item in left_out:
        lists = found.setdefault(item["reason"], {"provider": [], "stage": [], "place": []})
        place = item["shape"] + (f" T {item['tokens']}" if item["tokens"] else " shapes")
        for name, value in (
            ("provider", item["provider"]),
            ("stage", item["stage"]),
            ("place", place),
        ):
            if value not in lists[name]:
                lists[name].append(value)
    return [
        f"{few(lists['provider'])}; {few(lists['stage'])}; {few(lists['place'])}: {reason}"
        for reason, lists in found.items()
    ]


def few(words: Sequence[str], most: int = 6) -> str:
    """The words, or the first of them and how many more there are."""
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more
