"""The voice of the CDNA kernels: the DSL's own types and layouts, nothing below them.

Held on the syntax tree of every source in the backend's folder, so that prose may name what code
may not: no raw ``ir`` and no dialect, no pointers made of integers, no offsets in bytes.
"""

import ast
from pathlib import Path

import pytest

import mixmoe

FOLDER = Path(mixmoe.__file__).parent / "backends" / "cdna"
SOURCES = sorted(FOLDER.rglob("*.py"))
# Modules and functions below the DSL: its dialects, its builders, addresses made of integers.
BELOW = {
    "_mlir", "ir", "arith", "llvm", "memref", "buffer_ops", "inline_asm",
    "inttoptr", "int_to_ptr", "ptr_to_int", "getelementptr", "SmemAllocator",
    "raw_ptr_buffer_load", "raw_ptr_buffer_store", "raw_buffer_load", "raw_buffer_store",
}  # fmt: skip
POINTERS = {"get_iter", "recast_iter", "make_ptr"}  # what gives a pointer
BYTE_TYPES = {"Uint8", "Int8"}


def is_bytes(node):
    """Whether an expression has a size in bytes in it: WORD, PIECE, x.row_bytes(), x.itemsize."""
    names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    names |= {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
    return any(n in ("WORD", "PIECE", "itemsize") or n.endswith("bytes") for n in names)


def is_pointer(node):
    """Whether an expression is a pointer, advanced or not."""
    if isinstance(node, ast.BinOp):
        return is_pointer(node.left)
    return isinstance(node, ast.Call) and called(node) in POINTERS


def called(node):
    """Name of what a call calls, without its module."""
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def lapses(text):
    """(line, what) of everything below the DSL's level."""
    found = []
    for node in ast.walk(ast.parse(text)):
        words = set()
        if isinstance(node, ast.Name):
            words = {node.id}
        elif isinstance(node, ast.Attribute):
            words = {node.attr}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            words = {part for alias in node.names for part in alias.name.split(".")}
            words |= set((getattr(node, "module", None) or "").split("."))
        found += [(node.lineno, word) for word in words & BELOW]
        advanced = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub)
        if advanced and is_pointer(node.left) and is_bytes(node.right):
            found.append((node.lineno, "a pointer advanced by bytes"))
        if isinstance(node, ast.Call) and called(node) == "recast_iter":
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Attribute) and first.attr in BYTE_TYPES:
                found.append((node.lineno, "a pointer to bytes"))
    return sorted(set(found))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(FOLDER)))
def test_style(path):
    text = path.read_text()
    assert lapses(text) == []
    assert text.count("\n") < 500 and max(map(len, text.splitlines()), default=0) <= 100


@pytest.mark.parametrize("line", [
    "from flydsl._mlir import ir", "import flydsl._mlir.dialects.llvm", "x = arith.constant(1)",
    "from flydsl.expr import arith", "p = fx.inttoptr(t, a)", "t = ir.IntegerType.get(32)",
    "x = fx.buffer_ops.load(a)", "at = fx.get_iter(x) + row * WORD",
    "at = fx.get_iter(x) + i + cfg.row_bytes(k)", "b = fx.recast_iter(fx.Uint8, p)",
])  # fmt: skip
def test_style_sees(line):
    assert len(lapses(f'"""No arith.constant, no ir."""\n{line}\n')) >= 1


@pytest.mark.parametrize("line", [
    "'arith.constant'", "w = fx.rocdl.readfirstlane(fx.Int32.ir_type, tid)",
    "at = fx.get_iter(x) + (row * stride + column)", "w = fx.recast_iter(fx.Int32, p)",
    "n = cfg.code_bytes // WORD",
])  # fmt: skip
def test_style_lets_pass(line):
    assert lapses(f"{line}\n") == []


def test_every_kernel_can_be_prebuilt():
    """What defines a kernel launches it through prebuilt.launcher, so that none is compiled where
    a folder of kernels is in use."""
    for path in SOURCES:
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        kernels = sum(called(n) == "kernel" for n in calls)
        assert sum(called(n) == "launcher" for n in calls) >= kernels, path
