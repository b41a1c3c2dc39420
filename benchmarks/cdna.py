"""The CDNA kernels' simulated figures: a list of options, a command, a comparison.

    python -m benchmarks.cdna                  # writes benchmarks/results/cdna-simulated.json
    python -m benchmarks.cdna --only tile      # those options again, the others kept

Every option of the kernels is a line of ``OPTIONS`` (or of ``recipes``, where one is made of each
recipe an architecture has), compiled at true size and simulated for one workgroup. Nothing here is
measured. ``worse`` says where figures got worse than stored ones: what the tests ask.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from mixmoe.activations import gelu, situv2, swiglu
from mixmoe.cli.simulated import TARGETS, refusals
from mixmoe.cli.survey import Layer, survey
from mixmoe.formats import Rounding
from mixmoe.shapes import SHAPES, Shape
from mixmoe.spec import CELLS, Recipe

RESULTS = Path(__file__).parent / "results" / "cdna-simulated.json"
DOCUMENT = RESULTS.parents[2] / "docs" / "cdna-figures.md"
UNIT = Shape("unit", 4096, 512, 8, 2)  # the layer whose options are set side by side


@dataclass(frozen=True, slots=True)
class Option:
    """One thing the kernels can do: how to ask for it. ``cheap``: looked at on every commit."""

    name: str
    recipe: str = "a4w4"
    shape: Shape = UNIT
    tokens: int = 8
    changes: dict[str, Any] = field(default_factory=dict)  # fields of Recipe
    target: str = "gfx950"
    bias: bool | None = None
    orders: tuple[str, str] | None = None
    block: int | None = None
    tiles: dict[str, dict[str, Any]] = field(default_factory=dict)  # fields of each stage's Gemm
    rows: str | None = None  # what stage 2 leaves
    cheap: bool = False

    @property
    def layer(self) -> Layer:
        """What the backend is asked."""
        changes = {"act": self.shape.act} | self.changes
        recipe = replace(Recipe.named(self.recipe), **changes)
        forced = (self.block, self.tiles, self.rows)
        return Layer(self.shape, recipe, self.bias, self.orders, *forced)




def both(**changes: Any) -> dict[str, dict[str, Any]]:
    """The same fields changed in both stages."""
    return {"gemm1": changes, "gemm2": changes}


SHORT = Shape("short", 4096, 128, 8, 2)  # one row tile, and loops all the same
OPTIONS = (
    # Tiles, of each pair of formats that the scaled MFMA takes.
    *(
        Option(f"{recipe}, tile of {block}", recipe, tokens=4 * block, block=block)
        for recipe in ("a4w4", "a8w4", "a8w4_mx", "a8w8_mx", "a8w8")
        for block in (16, 32, 64, 128)
    ),
    *(Option(f"a8w8_block, tile of {block}", "a8w8_block", tokens=4 * block, block=block)
      for block in (16, 32, 64)),
    Option("sort block of several tiles", tokens=1024, block=256),
    # Who takes which tiles, and who shares K.
    Option("three tiles a workgroup", tokens=512, block=128, tiles=both(walk={"each": 3})),
    Option("persistent grid", tokens=512, block=128, tiles=both(walk={"groups": 16})),
    Option("persistent grid, XCD neighbours, bands of 2", tokens=512, block=128,
           tiles=both(walk={"groups": 16, "together": True, "band": 2})),
    Option("workgroups in turn over the XCDs", tokens=512, block=128, tiles=both(walk={})),
    Option("K shared by two waves", block=16, tiles=both(k_waves=2)),
    Option("K shared by four waves", block=16, tiles=both(k_waves=4)),
    Option("K shared by two workgroups", block=16, tiles={"gemm1": {"split_k": 2}}),
    Option("K shared by four workgroups, bias", block=16, bias=True,
           tiles={"gemm1": {"split_k": 4}}),
    # How operands are held.
    Option("weights kept in L2", block=16, tiles=both(streaming=False)),
    Option("streaming weights", tokens=512, block=128, tiles=both(streaming=True)),
    Option("a ring of four steps of weights", block=16, tiles=both(ring=4)),
    Option("two blocks a wave", tokens=256, block=64, tiles=both(blocks=2)),
    Option("one workgroup a CU", tokens=256, block=64, tiles=both(waves_per_eu=1)),
    # What stage 2 leaves.
    Option("atomic sums", block=16, rows="sums"),
    Option("rows in e4m3", tokens=512, block=128, rows="codes"),
    # Weights as they lie in memory.
    Option("gate above up", orders=("cdna_n16", "cdna_n16")),
    Option("k-major", orders=("cdna_k_major", "cdna_k_major")),
    Option("k-major, gate and up interleaved", orders=("cdna_k_major_gui", "cdna_k_major")),
    # Epilogues.
    Option("bias", bias=True),
    Option("swiglu", changes={"act": swiglu()}),
    Option("gelu", changes={"act": gelu()}),
    Option("situv2", changes={"act": situv2()}),
    Option("routing weight on stage 1", changes={"weight_on": 1}),
    Option("E8M0 rounding EVEN", changes={"rounding": Rounding.EVEN}),
    Option("E8M0 rounding FLOOR", changes={"rounding": Rounding.FLOOR}),
    Option("results in fp16", changes={"out_dtype": torch.float16}),
    Option("results in f32", changes={"out_dtype": torch.float32}),
    # Tails of K in both stages, of rows in both.
    Option("tails", shape=Shape("tails", 4160, 352, 8, 2)),
    # Whole layers.
    *(
        Option(f"{name}, T {tokens}", recipe, SHAPES[name], tokens)
        for name, recipe in (("dsv3_tp8", "a4w4"), ("gptoss120b", "a8w4_mx"))
        for tokens in (1, 64, 8192)
    ),
    Option("dsv3_ep, T 4096", shape=SHAPES["dsv3_ep"], tokens=4096),
    # What a commit is compared by.
    Option("short, tile of 16", shape=SHORT, cheap=True),
    Option("short, tile of 64", "a8w4_mx", SHORT, tokens=256, block=64, cheap=True),
)


def recipes() -> Iterator[Option]:
    """Every cell of the matrix that an architecture has kernels for, in tiles of 64 tokens."""
    for target in TARGETS:
        for name, refused in refusals(target, list(CELLS)).items():
            if refused is None:
                label = f"{target}, {name}"
                yield Option(label, name, SHORT, tokens=256, block=64, target=target)


def options() -> list[Option]:
    """All of them."""
    return [*OPTIONS, *recipes()]


def figures(option: Option) -> list[dict[str, Any]]:
    """The kernels of an option: stage, name and figures."""
    found = survey(option.target, option.layer, (option.tokens,))
    return [
        {"stage": kernel.stage, "kernel": kernel.name} | kernel.figures for kernel in found
    ]


# Figure -> (worse by a factor, plus so much): a change within is no regression.
MARGINS = {
    "cycles": (1.03, 50),
    "global_load_bytes": (1.01, 0),
    "global_store_bytes": (1.01, 0),
    "lds_cycles": (1.02, 8),
    "lds_conflict_cycles": (1.02, 8),
    "vgpr": (1.0, 8),
    "agpr": (1.0, 8),
    "lds_bytes": (1.0, 0),
    "ir_lines": (1.05, 100),
    "code_bytes": (1.05, 512),
    "mfma": (1.0, 0),
    "vgpr_spills": (0.0, 0),  # none, whatever is stored
    "sgpr_spills": (0.0, 0),
    "scratch_bytes": (0.0, 0),
}
VALU_PER_MFMA = 0.05  # more of them in the main loop
BUSY = 0.02  # less of the matrix cores' time in it


def worse(stored: list[dict[str, Any]], found: list[dict[str, Any]]) -> list[str]:
    """Where figures are worse than stored ones by more than their margin, a line each."""
    stages = [[kernel["stage"] for kernel in kernels] for kernels in (stored, found)]
    if stages[0] != stages[1]:
        return [f"other kernels than stored: {', '.join(k['kernel'] for k in found)}"]
    lines = []
    for old, new in zip(stored, found, strict=True):
        limits = {n: factor * old[n] + plus for n, (factor, plus) in MARGINS.items()}
        over = [(n, old[n], new[n]) for n, limit in limits.items() if new[n] > limit]
        over += loop_worse(old["loop"], new["loop"])
        lines += [f"{new['kernel']}: {n} {now}, stored {then}" for n, then, now in over]
    return lines


def loop_worse(
    old: dict[str, Any] | None, new: dict[str, Any] | None
) -> list[tuple[str, Any, Any]]:
    """(figure, stored, found) of a main loop that got worse, or is no loop any more."""
    if old is None or new is None:
        return [("main loop", old, None)] if old is not None else []
    found = []
    then, now = (loop["per_mfma"]["valu"] for loop in (old, new))
    if now > then + VALU_PER_MFMA:
        found.append(("VALU per MFMA", then, now))
    then, now = (loop["mfma_busy"] for loop in (old, new))
    if then is not None and (now is None or now < then - BUSY):
        found.append(("main loop's MFMA busy share", then, now))
    return found


def read() -> dict[str, Any]:
    """The stored figures."""
    return json.loads(RESULTS.read_text())


def markdown(held: dict[str, Any]) -> str:
    """docs/cdna-figures.md: a line for each GEMM of each option."""
    lines = [HEAD.format(**held), row_of(COLUMNS), "|---|---" + "|---:" * 15 + "|"]
    for name, option in held["options"].items():
        for kernel in option["kernels"]:
            if kernel["stage"] in ("gemm1", "gemm2"):
                lines.append(row_of((name, *cells(kernel))))
    return "\n".join(lines) + "\n"


def row_of(cells: Iterable[str]) -> str:
    """A line of a table."""
    return "| " + " | ".join(cells) + " |"


HEAD = """# Simulated figures of the CDNA kernels

Written by `python -m benchmarks.cdna` at commit {commit}, FlyDSL {flydsl}; compared with the
kernels by `make test-sim`, some lines of it by `make test`. Nothing here is measured on a card.

One workgroup of each GEMM at true size. *a CU*: workgroups that fit one. *VALU*: vector
instructions for each MFMA of the main loop. *busy*: share of the matrix cores' time in the main
loop, with as many workgroups on the CU as the grid puts there; a dash: no loop of three rounds.
*cycles*: of the workgroups on one CU. *lost*: share of LDS cycles that bank conflicts take. *read*:
from global memory. *IR*: lines before lowering. *instr.*: instructions of the code object. *CPU*:
seconds of one core to trace and compile as a user does, without what the simulator has the compiler
print, on the machine that wrote this; all else is the kernel's.
No kernel spills a register.
"""
COLUMNS = ("option", "stage", "VGPR", "AGPR", "SGPR", "LDS, B", "a CU", "MFMA", "VALU", "busy",
           "cycles", "lost", "read, KB", "IR", "instr.", "code, KB", "CPU, s")  # fmt: skip


def cells(kernel: dict[str, Any]) -> list[str]:
    """A GEMM's cells."""
    loop = kernel["loop"] or {"per_mfma": {"valu": None}, "mfma_busy": None}
    valu, busy = loop["per_mfma"]["valu"], loop["mfma_busy"]
    lost = kernel["lds_conflict_cycles"] / max(1, kernel["lds_cycles"])
    names = ("vgpr", "agpr", "sgpr", "lds_bytes", "workgroups_per_cu", "mfma")
    shown = ["-" if v is None else f"{v:.2f}" for v in (valu, busy)]
    read_kb = f"{kernel['global_load_bytes'] / 1e3:.0f}"
    numbers, lost_share = [str(kernel[name]) for name in names], f"{100 * lost:.0f} %"
    code = [kernel["ir_lines"], kernel.get("code_instructions", "-"),
            f"{kernel['code_bytes'] / 1e3:.0f}", kernel.get("compile_seconds", "-")]
    done = [str(kernel["cycles"]), lost_share, read_kb]
    return [kernel["stage"], *numbers, *shown, *done, *map(str, code)]


def commit() -> str:
    """The commit that is measured, with a plus where files differ from it."""
    words = ("git", "describe", "--always", "--dirty=+", "--abbrev=12")
    done = subprocess.run(words, capture_output=True, text=True, cwd=RESULTS.parent, check=False)
    return done.stdout.strip() or "unknown"


def write(
    only: Annotated[str, typer.Option(help="options whose name holds this; others are kept")] = "",
    out: Annotated[Path, typer.Option(help="the file")] = RESULTS,
) -> None:
    """Compile and simulate the options; store their figures after each."""
    chosen = [option for option in options() if only in option.name]
    kept = json.loads(out.read_text())["options"] if only and out.exists() else {}
    console = Console(stderr=True)
    for number, option in enumerate(chosen, 1):
        console.print(f"{number} of {len(chosen)}: {option.name}")
        kept[option.name] = {
            "target": option.target,
            "recipe": option.layer.recipe.key,
            "shape": option.shape.name,
            "tokens": option.tokens,
            "kernels": figures(option),
        }
        store(kept, out)
    console.print(f"wrote {len(chosen)} options: {out}")


def store(found: dict[str, Any], out: Path) -> None:
    """Write the figures, in the order of the list, and the document that shows them."""
    order = {option.name: place for place, option in enumerate(OPTIONS)}
    names = sorted(found, key=lambda name: (order.get(name, len(order)), name))
    held = {
        "label": "simulated, not measured",
        "commit": commit(),
        "flydsl": version("flydsl"),
        "options": {name: found[name] for name in names},
    }
    out.write_text(json.dumps(held, indent=1) + "\n")
    if out == RESULTS:
        DOCUMENT.write_text(markdown(held))


if __name__ == "__main__":
    typer.run(write)
