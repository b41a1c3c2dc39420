"""Programs outside this package: LLVM's tools. Found on PATH, in /usr/lib/llvm-*/bin, or under
ROCM_PATH.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from .errors import ToolError

PACKAGE = {
    'ld.lld': 'lld-22',
    'llvm-objdump': 'llvm-22',
    'llvm-readelf': 'llvm-22',
    'llvm-mc': 'llvm-22',
    'llc': 'llvm-22',
    'cc': 'gcc',
}


def candidates(name: str) -> list[str]:
    """Every installed copy of a tool, the newest LLVM first."""
    found = glob.glob(f'/usr/lib/llvm-*/bin/{name}') + glob.glob(f'/opt/rocm*/llvm/bin/{name}')
    found.sort(key=lambda p: [int(x) for x in re.findall(r'\d+', p)], reverse=True)
    rocm = os.environ.get('ROCM_PATH')
    if rocm and os.path.exists(os.path.join(rocm, 'llvm', 'bin', name)):
        found.insert(0, os.path.join(rocm, 'llvm', 'bin', name))
    plain = shutil.which(name)
    return found + ([plain] if plain else [])


@cache
def find_tool(name: str) -> str:
    """Path of an LLVM tool that knows gfx950 (LLVM 19 or later). Raises ToolError that says what to
    install.
    """
    for path in candidates(name):
        if not name.startswith(('llvm-', 'llc')) or llvm_version(path) >= 19:
            return path
    hint = f'apt-get install {PACKAGE.get(name, name)}'
    raise ToolError(
        f'{name} was not found (or is older than LLVM 19). Install it, e.g. `{hint}`, and put '
        f'it on PATH.'
    )


def llvm_version(path: str) -> int:
    out = subprocess.run([path, '--version'], capture_output=True, text=True, check=False).stdout
    m = re.search(r'version (\d+)', out)
    return int(m.group(1)) if m else 0


@cache
def rocm_folder() -> str:
    """A folder that looks like ROCm to FlyDSL's compiler, which only wants `llvm/bin/ld.lld` in
    it.
    """
    lld = find_tool('ld.lld')
    root = Path(tempfile.mkdtemp(prefix='cdnasim-rocm-'))
    (root / 'llvm' / 'bin').mkdir(parents=True)
    (root / 'llvm' / 'bin' / 'ld.lld').symlink_to(lld)
    return str(root)


def run_tool(name: str, *args: str, text_in: str | None = None) -> str:
    """Standard output of an LLVM tool; ToolError with its message when it fails."""
    done = subprocess.run(
        [find_tool(name), *args], input=text_in, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ToolError(f'{name} {" ".join(args)} failed: {done.stderr.strip()[:2000]}')
    return done.stdout
