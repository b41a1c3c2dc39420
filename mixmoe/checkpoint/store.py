"""The files of a checkpoint folder: safetensors headers, the index, and tensors as mapped views.

Format of a file (huggingface/safetensors README): a little-endian u64 header length, a JSON header
``{name: {dtype, shape, data_offsets}}``, then the data, row-major and little-endian. The header is
read here so that a truncated file or a bad entry is reported under the tensor's own name, and so
that a tensor is a strided view of the mapped file: a slice of it reads only the pages it touches.
"""

import json
import mmap
import struct
import warnings
from dataclasses import dataclass
from difflib import get_close_matches
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from mixmoe.errors import MixMoEError

INDEX = "model.safetensors.index.json"
MAX_HEADER = 100_000_000  # the format's own limit, bytes

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file: its dtype as the header spells it, shape, and bytes ``start:stop``."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_json(path: Path) -> dict:
    """A JSON object from a file; MixMoEError names the file when there is none."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise MixMoEError(f"the folder must hold {path.name}", f"none in {path.parent}") from None
    except (OSError, ValueError) as error:
        raise MixMoEError(f"{path.name} must be readable JSON", error) from None
    if not isinstance(value, dict):
        raise MixMoEError(f"{path.name} must hold a JSON object", type(value).__name__)
    return value


class Store:
    """Every tensor of a checkpoint folder by name; files are opened and mapped when first needed.

    ``names`` is the set of all tensor names. Raises MixMoEError for a folder without safetensors,
    an index that names an absent file, and for whatever is wrong with a tensor that is asked for.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._headers: dict[Path, dict[str, Entry]] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        self._places = self._find()

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._places)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def _find(self) -> dict[str, Path]:
        index = self.folder / INDEX
        if index.exists():
            places = read_json(index).get("weight_map")
            if not isinstance(places, dict):
                raise MixMoEError(f"{INDEX} must hold a weight_map", type(places).__name__)
            return {name: self.folder / file for name, file in places.items()}
        files = sorted(self.folder.glob("*.safetensors"))
        if not files:
            raise MixMoEError(
                "a checkpoint folder must hold *.safetensors files", f"none in {self.folder}"
            )
        return {name: file for file in files for name in self._header(file)}

    def entry(self, name: str) -> Entry:
        """Where a tensor lies; refuses an unknown name and a file that does not hold its bytes."""
        file = self._places.get(name)
        if file is None:
            near = get_close_matches(name, self._siblings(name), n=1)
            raise MixMoEError(f"the checkpoint must hold the tensor {name}", "none", *near)
        if not file.exists():
            raise MixMoEError(f"{name}: the index names a file that must exist", file.name)
        entry = self._header(file, name).get(name)
        if entry is None:
            raise MixMoEError(f"{name}: {file.name}, where the index puts it, must hold it", "none")
        size = file.stat().st_size
        if entry.stop > size:
            raise MixMoEError(
                f"{name}: {file.name} is truncated, the tensor ends at byte {entry.stop}", size
            )
        dtype = DTYPES.get(entry.dtype)
        if dtype is None:
            raise MixMoEError(f"{name}: unknown dtype", entry.dtype, ", ".join(DTYPES))
        if entry.stop - entry.start != prod(entry.shape) * dtype.itemsize:
            raise MixMoEError(
                f"{name}: {entry.dtype} of {entry.shape} takes {prod(entry.shape) * dtype.itemsize}"
                " bytes",
                entry.stop - entry.start,
            )
        return entry

    def _siblings(self, name: str) -> list[str]:
        """Names worth suggesting: difflib over the 90,000 of a large checkpoint takes minutes."""
        stem = name.rsplit(".", 2)[0]
        return sorted(n for n in self._places if n.startswith(stem))[:1000]

    def tensor(self, name: str) -> Tensor:
        """The tensor as a read-only view of the mapped file. Copy it; never write to it."""
        entry = self.entry(name)
        dtype = DTYPES[entry.dtype]
        if prod(entry.shape) == 0:
            return torch.empty(entry.shape, dtype=dtype)
        with warnings.catch_warnings():  # torch warns that the mapping cannot be written to
            warnings.simplefilter("ignore", UserWarning)
            flat = torch.frombuffer(
                self._map(entry.file), dtype=dtype, count=prod(entry.shape), offset=entry.start
            )
        return flat.view(entry.shape)

    def _map(self, file: Path) -> mmap.mmap:
        if file not in self._maps:
            with file.open("rb") as handle:
                self._maps[file] = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[file]

    def release(self) -> None:
        """Drop the pages read so far from this process; the system may keep them cached."""
        for mapped in self._maps.values():
            if hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)

    def _header(self, file: Path, name: str = "") -> dict[str, Entry]:
        if file not in self._headers:
            self._headers[file] = _read_header(file, f"{name}: {file.name}" if name else file.name)
        return self._headers[file]


def _read_header(file: Path, what: str) -> dict[str, Entry]:
    size = file.stat().st_size
    with file.open("rb") as handle:
        prefix = handle.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise MixMoEError(
                f"{what} must start with a safetensors header that fits in it (truncated?)",
                f"a header of {length} bytes in a file of {size}",
            )
        raw = handle.read(length)
    try:
        fields = json.loads(raw)
        fields.pop("__metadata__", None)
        return {
            name: Entry(name, file, f["dtype"], tuple(f["shape"]), *_span(f, 8 + length))
            for name, f in fields.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MixMoEError(f"{what} must have a safetensors header", repr(error)) from None


def _span(fields: dict, base: int) -> tuple[int, int]:
    start, stop = fields["data_offsets"]
    return base + start, base + stop
