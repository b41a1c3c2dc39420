"""``mixmoe build``: the kernels of a layer, compiled ahead of time into a folder."""

import hashlib
import json
from dataclasses import asdict
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mixmoe.backends.cdna import prebuilt
from mixmoe.cli.survey import Kernel, Layer, survey
from mixmoe.shapes import TABLE_TOKENS, counts, listed, shape_named
from mixmoe.spec import Recipe

PACKAGES = ("mixmoe", "flydsl")
Built = tuple[Kernel, list[dict[str, Any]]]  # a kernel and what it was built for


def build(
    out: Annotated[Path, typer.Option("-o", "--out", help="the folder; made where it is missing")],
    target: Annotated[str, typer.Option(help="gfx950 or gfx942")] = "gfx950",
    shape: Annotated[str, typer.Option(help="dsv3_tp8, gptoss120b, ...")] = "dsv3_tp8",
    recipe: Annotated[str, typer.Option(help="names, comma-separated")] = "a4w4",
    tokens: Annotated[
        str, typer.Option(help="T, comma-separated; the tile chooser sees each")
    ] = ",".join(map(str, TABLE_TOKENS)),
) -> None:
    """Compile every kernel of a layer into code objects (ELF) and a manifest. No GPU is needed.

    Both for deterministic calls and for those that leave the order of sums free.

    On a machine with ROCm, mixmoe.backends.cdna.prebuilt.use(DIR) then launches them through HIP
    and compiles nothing.
    """
    chosen, found = shape_named(shape), dict[str, Built]()
    with Console(stderr=True).status("compiling") as status:
        for name, free in product(listed(recipe), (False, True)):
            chosen_recipe = Recipe.named(name, act=chosen.act)
            layer = Layer(chosen, chosen_recipe, deterministic=not free)
            for kernel in survey(target, layer, counts(tokens), False, status.update):
                variants = found.setdefault(kernel.name, (kernel, []))[1]
                asked: dict[str, Any] = {"shape": asdict(chosen), "recipe": chosen_recipe.key}
                asked |= {"tokens": kernel.tokens}
                variants += [asked] * (asked not in variants)
    write(out, target, list(found.values()))
    size = sum((out / file_of(name)).stat().st_size for name in found)
    Console().print(f"{len(found)} kernels for {target}, {size / 1e3:.0f} KB: {out}")


def file_of(name: str) -> str:
    """A kernel's code object."""
    return f"{name}.hsaco"


def write(folder: Path, target: str, kernels: list[Built]) -> None:
    """The code objects, then the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    for kernel, _ in kernels:
        (folder / file_of(kernel.name)).write_bytes(kernel.compiled.code)
    held = {
        "format": prebuilt.FORMAT,
        "target": target,
        "sources": prebuilt.source_hash(),
        "versions": {name: version(name) for name in PACKAGES},
        "kernels": [asdict(entry(*built)) for built in kernels],
    }
    (folder / prebuilt.MANIFEST).write_text(json.dumps(held, indent=1) + "\n")


def entry(kernel: Kernel, variants: list[dict[str, Any]]) -> prebuilt.Entry:
    """A kernel's line of the manifest."""
    rule, code, of = kernel.compiled.rule, kernel.compiled.code, kernel.launch.kernel
    places = zip(rule.kernel, of.visible_args, strict=True)
    meta = ("vgpr_count", "agpr_count", "sgpr_count", "vgpr_spill_count", "sgpr_spill_count")
    return prebuilt.Entry(
        name=kernel.name,
        stage=kernel.stage,
        file=file_of(kernel.name),
        sha256=hashlib.sha256(code).hexdigest(),
        parameters=rule.parameters,
        arguments=tuple((parameter, part, arg.offset) for (parameter, part), arg in places),
        kernarg_bytes=of.meta["kernarg_segment_size"],
        grid=rule.grid,
        block=rule.block,
        lds=rule.lds,
        static_lds=of.meta.get("group_segment_fixed_size", 0),
        variants=variants,
        resources={name: of.meta.get(name, 0) for name in meta},
    )
