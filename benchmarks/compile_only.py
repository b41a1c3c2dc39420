"""Triton kernels compiled and not launched, each by one of several processes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from triton import AsyncCompileMode


class CompileOnly(AsyncCompileMode):
    """While it is entered Triton compiles and never launches; what another process of `folder` has
    taken is not compiled again. Results hold whatever the memory held."""

    def __init__(self, folder: Path) -> None:
        super().__init__(None)
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def submit(
        self, key: str, compile_fn: Callable[[], object], finalize_fn: Callable[[Any], None]
    ) -> None:
        """Triton asks here for a kernel that it does not hold; given none, it does not launch."""
        if take(self.folder / hashlib.sha256(key.encode()).hexdigest()):
            compile_fn()


def take(path: Path) -> bool:
    """Whether this process is the first one to ask for `path`."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True
