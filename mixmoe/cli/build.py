"""``mixmoe build``: the kernels of a layer, compiled ahead of time into a folder."""

import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mixmoe.backends.cdna import prebuilt
from mixmoe.cli.simulated import known_target
from mixmoe.cli.survey import Kernel, Layer, survey
from mixmoe.errors import MixMoEError
from mixmoe.shapes import TABLE_TOKENS, counts, recipes_of, shape_named
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
    recipes = [Recipe.named(name, act=chosen.act) for name in recipes_of(recipe)]
    tokens_of = counts(tokens)
    known_target(target)
    make(out)
    with Console(stderr=True).status("compiling") as status:
        for chosen_recipe, free in product(recipes, (False, True)):
            layer = Layer(chosen, chosen_recipe, deterministic=not free)
            for kernel in survey(target, layer, tokens_of, False, status.update):
                variants = found.setdefault(kernel.name, (kernel, []))[1]
                asked: dict[str, Any] = {"shape": asdict(chosen), "recipe": chosen_recipe.key}
                asked |= {"tokens": kernel.tokens}
                variants += [asked] * (asked not in variants)
    with writing_into(out):
        write(out, target, list(found.values()))
    size = sum((out / file_of(name)).stat().st_size for name in found)
    Console().print(f"{len(found)} kernels for {target}, {size / 1e3:.0f} KB: {out}")


def file_of(name: str) -> str:
    """A kernel's code object."""
    return f"{name}.hsaco"


@contextmanager
def writing_into(folder: Path) -> Iterator[None]:
    """What the file system refuses, as a MixMoEError."""
    try:
        yield
    except OSError as error:
        reason = f"{folder} ({error.strerror})"
        raise MixMoEError("-o is a folder to write into", reason, "a new folder") from None


def make(folder: Path) -> None:
    """The folder, tried with a file that is gone again: a compilation later would be lost."""
    with writing_into(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def write(folder: Path, target: str, kernels: list[Built]) -> None:
    """The code objects, then the manifest."""
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
