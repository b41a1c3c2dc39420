"""``mixmoe info``: devices, versions, backends and why one is unavailable."""

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import mixmoe
from mixmoe import backends
from mixmoe.spec import CELLS

PACKAGES = ("mixmoe", "torch", "triton", "flydsl", "transformers", "safetensors")


def info(
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Say what there is: devices, versions, backends and why one cannot run here, recipes."""
    found = gather()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    console = Console()
    for title, rows in found.items():
        table = Table(title=title, title_justify="left", show_header=False, box=None)
        for name, value in rows.items():
            table.add_row(f"[bold]{name}", colour(title, value))
        console.print(table)


def gather() -> dict[str, dict[str, Any]]:
    """Devices, versions, backends and recipes by name."""
    devices = {"cpu": f"{platform.processor() or platform.machine()}, {cores()} cores"}
    for index in range(torch.cuda.device_count()):
        got = torch.cuda.get_device_properties(index)
        arch = getattr(got, "gcnArchName", "") or f"sm_{got.major}{got.minor}"
        devices[f"cuda:{index}"] = (
            f"{got.name}, {arch}, {got.multi_processor_count} SMs, {got.total_memory >> 30} GiB"
        )
    return {
        "devices": devices,
        "versions": {"python": platform.python_version()}
        | {package: installed(package) for package in PACKAGES}
        | {"mixmoe": mixmoe.__version__, "torch": torch.__version__},
        "backends": {name: availability(name) for name in backends.REGISTRY},
        "recipes": {name: " x ".join(formats) for name, formats in CELLS.items()},
    }


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def installed(package: str) -> str:
    """Its version, or that it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def availability(name: str) -> str:
    """``available``, or why the backend cannot run here."""
    try:
        return backends.load(name).unavailable() or "available"
    except ImportError as error:
        return f"cannot be imported: {error}"


def colour(title: str, value: str) -> str:
    """Green for what runs, yellow for what does not."""
    if value == "available":
        return f"[green]{value}"
    return f"[yellow]{value}" if title == "backends" or value == "not installed" else value
