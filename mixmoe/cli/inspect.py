"""``mixmoe inspect``: the picture of a memory order; the kernels of a layer on a CDNA GPU."""

import json
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from mixmoe.cli.options import refuse_given
from mixmoe.cli.survey import Kernel, Layer, survey
from mixmoe.errors import MixMoEError
from mixmoe.preshuffle import ORDERS, order_named
from mixmoe.shapes import TABLE_TOKENS, counts, recipes_of, shape_named
from mixmoe.spec import Recipe

WITH_BACKEND = ("target", "shape", "recipe", "tokens", "as_json")
Flag = Annotated[bool, typer.Option("--json", help="with --backend: JSON on standard output")]


def inspect(
    ctx: typer.Context,
    order: Annotated[str | None, typer.Argument(help="an order's name; none lists them")] = None,
    element: Annotated[str | None, typer.Option(help="an element it holds: e2m1, e4m3fn")] = None,
    backend: Annotated[
        str | None, typer.Option(help="cdna: the kernels of a layer, compiled and simulated")
    ] = None,
    target: Annotated[str, typer.Option(help="with --backend: gfx950 or gfx942")] = "gfx950",
    shape: Annotated[str, typer.Option(help="with --backend: dsv3_tp8, gptoss120b")] = "dsv3_tp8",
    recipe: Annotated[str, typer.Option(help="with --backend: names, comma-separated")] = "a4w4",
    tokens: Annotated[
        str, typer.Option(help="with --backend: T, comma-separated; the tile chooser sees each")
    ] = ",".join(map(str, TABLE_TOKENS)),
    as_json: Flag = False,
) -> None:
    """Show which row and column of a weight matrix lies where in memory; or, with --backend cdna,
    each kernel that a layer launches: registers, LDS, occupancy, instructions, simulated cycles.
    """
    if backend is not None:
        if backend != "cdna":
            raise MixMoEError("inspect compiles the kernels of", backend, "cdna")
        rule = "with --backend no memory order is shown"
        refuse_given(ctx, ("order", "element"), rule, "one or the other")
        kernels = {name: inspected(target, shape, name, tokens) for name in recipes_of(recipe)}
        if as_json:
            print(json.dumps({n: [as_dict(k) for k in ks] for n, ks in kernels.items()}, indent=1))
            return
        for name, found in kernels.items():
            show(found, f"{shape}, {name} on {target}, simulated")
        return
    refuse_given(ctx, WITH_BACKEND, "only kernels have this option", "--backend cdna beside it")
    if order is None:
        refuse_given(ctx, ("element",), "an element is shown of an order", "an order before it")
        table = Table(title="memory orders", title_justify="left")
        for column in ("order", "elements"):
            table.add_column(column)
        for name, known in ORDERS.items():
            table.add_row(name, ", ".join(e.name for e in known.elements))
        Console().print(table)
        return
    chosen = order_named(order)
    held = {e.name: e for e in chosen.elements}
    if element is not None and element not in held:
        raise MixMoEError(f"{order} holds other elements", element, ", ".join(held))
    print(chosen.picture(None if element is None else held[element]), end="")


def inspected(target: str, shape: str, recipe: str, tokens: str) -> list[Kernel]:
    """The kernels of a layer, with what is going on shown on standard error."""
    chosen = shape_named(shape)
    layer = Layer(chosen, Recipe.named(recipe, act=chosen.act))
    with Console(stderr=True).status(f"compiling {shape}, {recipe}") as status:
        return survey(target, layer, counts(tokens), progress=status.update)


def as_dict(kernel: Kernel) -> dict[str, Any]:
    """One kernel for JSON."""
    named = {"stage": kernel.stage, "kernel": kernel.name, "tokens": list(kernel.tokens)}
    return named | kernel.figures


def show(kernels: list[Kernel], title: str) -> None:
    """Two tables: what a kernel takes; what one workgroup of it does."""
    console = Console()
    console.print(f"[bold]{title}[/]: one workgroup of each kernel; cycles are the model's")
    for number, kernel in enumerate(kernels, 1):
        counts_of = ", ".join(map(str, kernel.tokens))
        console.print(f"{number} {kernel.name} [dim](T {counts_of})", soft_wrap=True)
    for title, columns in (("takes", TAKES), ("does", DOES)):
        console.print(f"[dim]{CAPTION[title]}")
        for table in fitting(console, kernels, columns):
            console.print(table)


def fitting(console: Console, kernels: list[Kernel], columns: dict[str, Any]) -> Iterator[Table]:
    """A row per kernel: one table, or two of half the columns where the console is narrower than
    it, so that no figure is cut."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), collapse_padding=True)
    for name in ("", *columns):
        table.add_column(name, justify="right", no_wrap=True)
    for number, kernel in enumerate(kernels, 1):
        table.add_row(str(number), *(str(cell(kernel.figures)) for cell in columns.values()))
    free = console.options.update(width=1000)
    if len(columns) == 1 or console.measure(table, options=free).maximum <= console.width:
        yield table
        return
    names, half = list(columns), len(columns) // 2
    for part in (names[:half], names[half:]):
        yield from fitting(console, kernels, {name: columns[name] for name in part})


def spills(f: dict[str, Any]) -> str:
    """Registers spilled, red where any."""
    n = f["vgpr_spills"] + f["sgpr_spills"]
    return f"[red]{n}" if n or f["scratch_bytes"] else "0"


def of_loop(key: str) -> Any:
    """A figure of the main loop, a dash where there is none."""
    return lambda f: "-" if not f["loop"] or f["loop"][key] is None else f["loop"][key]


def per_mfma(unit: str) -> Any:
    """Instructions of a unit for each matrix instruction of the main loop."""
    return lambda f: f"{f['loop']['per_mfma'][unit]:.2f}" if f["loop"] else "-"


CAPTION = {
    "takes": "groups: workgroups that fit a CU; waves: a SIMD; IR: lines of it; code: bytes; "
    "seconds: of a CPU, to compile",
    "does": "VALU SALU LDS memory: instructions per MFMA of the main loop; loop: cycles an "
    "iteration; busy: of the matrix cores in it; lost: LDS cycles to bank conflicts",
}
TAKES: dict[str, Any] = {
    "VGPR": lambda f: f["vgpr"],
    "AGPR": lambda f: f["agpr"],
    "SGPR": lambda f: f["sgpr"],
    "spills": spills,
    "LDS": lambda f: f["lds_bytes"],
    "groups": lambda f: f["workgroups_per_cu"],
    "waves": lambda f: f["waves_per_simd"],
    "limit": lambda f: {"registers": "regs", "wave slots": "slots"}.get(f["limit"], f["limit"]),
    "IR": lambda f: f["ir_lines"],
    "instr.": lambda f: f["code_instructions"],
    "code": lambda f: f["code_bytes"],
    "seconds": lambda f: f["compile_seconds"],
}
DOES: dict[str, Any] = {
    "MFMA": lambda f: f["mfma"],
    "VALU": per_mfma("valu"),
    "SALU": per_mfma("salu"),
    "LDS": per_mfma("lds"),
    "memory": per_mfma("global"),
    "loop": of_loop("cycles"),
    "busy": of_loop("mfma_busy"),
    "cycles": lambda f: f["cycles"],
    "MB in": lambda f: f"{f['global_load_bytes'] / 1e6:.3f}",
    "KB out": lambda f: f"{f['global_store_bytes'] / 1e3:.1f}",
    "lost": lambda f: f"{100 * f['lds_conflict_cycles'] // max(1, f['lds_cycles'])} %",
}
