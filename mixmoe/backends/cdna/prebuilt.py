"""Kernels compiled ahead of time (``mixmoe build``): a folder of code objects and a manifest.

    prebuilt.use("kernels")            # from then on the cdna backend compiles nothing

The manifest says, for each kernel, how a launcher's arguments become a launch: sizes of the grid
as expressions of them, and which goes where in the argument segment. A folder is refused whole
where it was built for another architecture, by another version, or from other sources than these:
a kernel's name does not say what its code expects.
"""

import hashlib
import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixmoe.backends.cdna.hip import Hip, Size
from mixmoe.errors import MixMoEError

MANIFEST = "manifest.json"
FORMAT = 1
HERE = Path(__file__).parent
# What a kernel's code or its arguments follow from, beside this folder's own files.
SOURCES = ("activations.py", "formats.py", "layout.py", "preshuffle.py", "arrangement.py")
PACK = {"i32": "<i", "i64": "<q", "f32": "<f"}
OPS: dict[str, Callable[[int, int], int]] = {
    "mul": lambda a, b: a * b,
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "div": lambda a, b: a // b,
}


@cache
def source_hash() -> str:
    """SHA-256 over every source that a kernel follows from."""
    root = HERE.parents[1]
    files = sorted([*HERE.rglob("*.py"), *(root / name for name in SOURCES)])
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Entry:
    """One kernel. ``parameters``: (name, kind) of what its launcher takes; ``arguments``:
    (parameter, part, offset) of each kernel argument, part ``address``, ``size`` or ``value``;
    ``grid``, ``block``, ``lds`` (dynamic): ints or expressions, see :func:`value_of`;
    ``variants``: the shapes, recipes and token counts it was built for."""

    name: str
    stage: str
    file: str
    sha256: str
    parameters: tuple[tuple[str, str], ...]
    arguments: tuple[tuple[int, str, int], ...]
    kernarg_bytes: int
    grid: tuple[Any, Any, Any]
    block: tuple[Any, Any, Any]
    lds: Any
    static_lds: int
    variants: list[dict[str, Any]]
    resources: dict[str, int]

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> "Entry":
        """What ``asdict`` wrote: JSON has lists where a record holds tuples."""
        pairs = {name: tuple(map(tuple, entry[name])) for name in ("parameters", "arguments")}
        sizes = {name: tuple(entry[name]) for name in ("grid", "block")}
        return cls(**(entry | pairs | sizes))

    def sizes(self, args: Sequence[Any]) -> tuple[Size, Size, int]:
        """(grid, block, dynamic LDS) for these arguments."""
        grid, block = (tuple(value_of(e, args) for e in part) for part in (self.grid, self.block))
        return grid, block, value_of(self.lds, args)  # type: ignore[return-value]

    def kernarg(self, args: Sequence[Any]) -> bytes:
        """The argument segment. Raises MixMoEError for another number or kind of arguments."""
        if len(args) != len(self.parameters):
            names = ", ".join(name for name, _ in self.parameters)
            raise MixMoEError(f"{self.name} takes {names}", f"{len(args)} arguments")
        packed = bytearray(self.kernarg_bytes)
        for parameter, part, offset in self.arguments:
            (name, kind), value = self.parameters[parameter], args[parameter]
            if (kind == "tensor") != isinstance(value, Tensor):
                raise MixMoEError(f"{name} is of kind", type(value).__name__, kind)
            if part == "address":
                struct.pack_into("<Q", packed, offset, value.data_ptr())
            elif part == "size":
                struct.pack_into("<i", packed, offset, value.numel())
            else:
                struct.pack_into(PACK[kind], packed, offset, value)
        return bytes(packed)


def value_of(expression: Any, args: Sequence[Any]) -> int:
    """An int; ``["arg", n]``, the n-th argument; ``[op, left, right]`` with an op of ``OPS``."""
    if isinstance(expression, int):
        return expression
    op, *rest = expression
    if op == "arg":
        return int(args[rest[0]])
    return OPS[op](*(value_of(part, args) for part in rest))


@dataclass(slots=True, eq=False)
class Prebuilt:
    """The kernels of a folder; code is loaded on each device at its first launch there."""

    folder: Path
    target: str
    entries: dict[str, Entry]
    hip: Hip | None = None
    loaded: dict[tuple[int, str], Any] = field(default_factory=dict)

    def code(self, entry: Entry) -> bytes:
        """The code object. Raises MixMoEError where it is not there or another than was built."""
        try:
            code = (self.folder / entry.file).read_bytes()
        except OSError as error:
            rule = f"{self.folder} holds every code object of its manifest"
            raise MixMoEError(rule, f"{entry.file}: {error.strerror}", "mixmoe build") from None
        if hashlib.sha256(code).hexdigest() != entry.sha256:
            rule = f"{entry.file} is the code object that the manifest names"
            raise MixMoEError(rule, "another file", "mixmoe build")
        return code

    def launch(self, name: str, args: Sequence[Any], stream: Any) -> None:
        """Launch a kernel on torch's stream. Raises MixMoEError where it was not built."""
        if name not in self.entries:
            rule = f"{self.folder} holds every kernel that is used; build its shape and tokens too"
            raise MixMoEError(rule, f"none called {name}", "mixmoe build")
        entry, device = self.entries[name], torch.cuda.current_device()
        self.hip = self.hip or Hip()
        if (device, name) not in self.loaded:
            self.loaded[device, name] = self.hip.function(self.code(entry), name)
        grid, block, lds = entry.sizes(args)
        packed = entry.kernarg(args)
        self.hip.launch(self.loaded[device, name], grid, block, lds, stream.cuda_stream, packed)


def read(folder: str | Path, target: str | None = None, hip: Hip | None = None) -> Prebuilt:
    """The kernels of a folder. ``target``: the architecture they must be for.

    Raises MixMoEError for a folder without a manifest, a damaged manifest, another architecture,
    another format, kernels built from other sources, and code objects that are not there or not
    those that were built.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise MixMoEError(f"a folder of kernels holds {MANIFEST}", folder, "mixmoe build -o DIR")
    try:
        found = parse(path, target, hip)
        for entry in found.entries.values():
            found.code(entry)  # a launch would find the fault too late
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise damaged(path, f"{type(error).__name__}: {error}") from None
    return found


def damaged(path: Path, why: str) -> MixMoEError:
    """What a manifest that `mixmoe build` did not write raises."""
    return MixMoEError(f"{path} is a manifest as `mixmoe build` writes it", why, "mixmoe build")


def parse(path: Path, target: str | None, hip: Hip | None) -> Prebuilt:
    """The manifest alone; ``read`` says what is refused."""
    try:
        held = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise damaged(path, str(error)) from None
    if held.get("format") != FORMAT:
        raise MixMoEError("the manifest's format is", held.get("format"), FORMAT)
    if held["sources"] != source_hash():
        rule = "kernels are built from the sources that launch them; rebuild: sources are"
        raise MixMoEError(rule, held["sources"][:12], source_hash()[:12])
    if target is not None and held["target"] != target:
        raise MixMoEError(f"kernels for {target} are needed, these are for", held["target"], target)
    entries = {e["name"]: Entry.from_json(e) for e in held["kernels"]}
    return Prebuilt(path.parent, held["target"], entries, hip)


IN_USE: list[Prebuilt] = []


def use(folder: str | Path | None, hip: Hip | None = None) -> Prebuilt | None:
    """Launch the cdna backend's kernels from a folder from now on; None: compile again.

    Raises MixMoEError for a folder that does not fit this library and the current GPU.
    """
    from mixmoe.backends.cdna import architecture

    found = None if folder is None else read(folder, architecture(), hip)
    IN_USE[:] = [] if found is None else [found]
    return found


def launcher(
    variant: str, compiled: Any, hints: dict[str, Any] | None = None
) -> Callable[..., None]:
    """What launches a variant: the folder in use, or else what FlyDSL compiles, by these hints.

    ``compiled(*args, variant, stream=stream)`` is FlyDSL's launcher; its last argument names the
    kernel in FlyDSL's cache.
    """

    if hints:
        compiled.compile_hints = hints

    def launch(*args: Any, stream: Any) -> None:
        if IN_USE:
            IN_USE[0].launch(variant, args, stream)
        else:
            compiled(*args, variant, stream=stream)

    return launch
