"""What FlyDSL compiled: the code object, how long it took, how its host code launches it.

The host function that FlyDSL lowers is a straight line: constants, arithmetic on arguments, one
``gpu.launch_func``. It is read here into a :class:`Rule`, so that a code object can be launched
without FlyDSL. Tested with FlyDSL 0.4.2, whose internals this module names.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mixmoe.errors import MixMoEError

DUMP, DEPTH = "FLYDSL_DEBUG_DUMP_ASM", "FLYDSL_DEBUG_MAX_LOC_DEPTH"
OPS = {"llvm.mul": "mul", "llvm.add": "add", "llvm.sub": "sub", "llvm.sdiv": "div"}
VECTOR = "!llvm.struct<packed (struct<packed (i32)>)>"  # the size of a tensor of one dimension
SAME = ("llvm.sext", "llvm.trunc", "llvm.zext", "builtin.unrealized_conversion_cast")


@dataclass(frozen=True, slots=True)
class Rule:
    """How a launcher's arguments become a launch.

    ``parameters``: (name, kind) of each argument, kind ``tensor``, ``i32``, ``f32`` ... in order;
    ``kernel``: (parameter, part) of each kernel argument, part ``address``, ``size`` (elements) or
    ``value``; ``grid``, ``block``: three expressions each: an int, ``["arg", parameter]``, or
    ``[op, left, right]`` with op mul, add, sub or div; ``lds``: bytes of dynamic LDS.
    """

    parameters: tuple[tuple[str, str], ...]
    kernel: tuple[tuple[int, str], ...]
    grid: tuple[Any, Any, Any]
    block: tuple[Any, Any, Any]
    lds: Any


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel: its code object, CPU seconds that a user's trace and compilation take, lines of
    the IR before lowering."""

    name: str
    code: bytes
    seconds: float
    ir_lines: int
    rule: Rule


@contextmanager
def as_a_user_compiles() -> Iterator[None]:
    """Inside, without the simulator's dump, for which FlyDSL prints the IR after every pass and
    runs LLVM once more, and with call sites as deep as FlyDSL notes them by default."""
    held = {name: os.environ.pop(name, None) for name in (DUMP, DEPTH)}
    try:
        yield
    finally:
        os.environ.update({name: value for name, value in held.items() if value is not None})


@contextmanager
def recorded() -> Iterator[dict[str, Compiled]]:
    """Kernels by name that FlyDSL compiles inside; what it holds from before is compiled anew."""
    forget()
    from flydsl.compiler import jit_function

    found: dict[str, Compiled] = {}
    owner = jit_function.JitFunction
    real = owner._trace_and_compile

    def trace_and_compile(self: Any, *args: Any, **kwargs: Any) -> Any:
        with as_a_user_compiles():
            start = time.process_time()  # of the work, however busy the machine is
            traced = real(self, *args, **kwargs)
            seconds = time.process_time() - start
        if os.environ.get(DUMP) == "1":
            traced = real(self, *args, **kwargs)
        made = read(traced, seconds)
        found[made.name] = made
        return traced

    owner._trace_and_compile = trace_and_compile
    try:
        yield found
    finally:
        owner._trace_and_compile = real


def forget() -> None:
    """Drop every launcher that the backend's modules keep."""
    for name, module in list(sys.modules.items()):
        if name.startswith("mixmoe.backends.cdna."):
            for value in vars(module).values():
                getattr(value, "cache_clear", lambda: None)()


def read(traced: Any, seconds: float) -> Compiled:
    """The one kernel of what FlyDSL traced and lowered."""
    from flydsl._mlir import ir
    from flydsl._mlir.dialects import gpu

    binaries: list[bytes] = []
    launches: list[Any] = []

    def visit(op: Any) -> Any:
        if op.name == "gpu.binary":
            objects = ir.ArrayAttr(op.attributes["objects"])
            binaries.append(bytes(gpu.ObjectAttr(objects[0]).object))
        elif op.name == "gpu.launch_func":
            launches.append(op)
        return ir.WalkResult.ADVANCE

    traced.compiled_module.operation.walk(visit)
    if len(binaries) != 1 or len(launches) != 1:
        raise MixMoEError("a launcher launches one kernel", f"{len(launches)} launches", 1)
    (launch,) = launches
    name = ir.SymbolRefAttr(launch.attributes["kernel"]).value[-1]
    lines = traced.original_ir.count("\n")
    return Compiled(name, binaries[0], seconds, lines, rule_of(launch, list(traced.param_names)))


def rule_of(launch: Any, names: list[str]) -> Rule:
    """The launch as a function of the launcher's arguments."""
    parameters, slots = parameters_of(launch, names)
    view = launch.opview

    def term(value: Any) -> Any:
        return expression(value, slots)

    sizes = [term(getattr(view, f"{kind}Size{x}")) for kind in ("grid", "block") for x in "XYZ"]
    lds = view.dynamicSharedMemorySize
    kernel = tuple(slots[argument_number(operand)] for operand in view.kernelOperands)
    grid, block = tuple(sizes[:3]), tuple(sizes[3:])
    return Rule(parameters, kernel, grid, block, 0 if lds is None else term(lds))


def parameters_of(
    launch: Any, names: list[str]
) -> tuple[tuple[tuple[str, str], ...], list[tuple[int, str]]]:
    """(name, kind) of each parameter; (parameter, part) of each argument of the host function."""
    types = [str(a.type) for a in launch.parent.regions[0].blocks[0].arguments]
    parameters: list[tuple[str, str]] = []
    slots: list[tuple[int, str]] = []
    for name in names:
        number, lowered = len(parameters), types[len(slots)]
        if lowered == "!llvm.ptr<1>" and types[len(slots) + 1] == VECTOR:
            parameters.append((name, "tensor"))
            slots += [(number, "address"), (number, "size")]
        elif lowered == "!llvm.ptr":
            slots.append((-1, "stream"))
        elif lowered in ("i32", "i64", "f32"):
            parameters.append((name, lowered))
            slots.append((number, "value"))
        else:
            rule = "a launcher takes tensors of one dimension, numbers and a stream"
            raise MixMoEError(rule, f"{name}: {lowered}")
    return tuple(parameters), slots


def argument_number(value: Any) -> int:
    """Which argument of the host function a value is."""
    from flydsl._mlir import ir

    return int(ir.BlockArgument(value).arg_number)


def expression(value: Any, slots: list[Any]) -> Any:
    """A size as an expression of parameters. Raises MixMoEError for an operation not listed."""
    from flydsl._mlir import ir

    if isinstance(value.owner, ir.Block):
        return ["arg", slots[argument_number(value)][0]]
    op = value.owner
    if op.name == "llvm.mlir.constant":
        return int(ir.IntegerAttr(op.attributes["value"]).value)
    if op.name in SAME:
        return expression(op.operands[0], slots)
    if op.name in OPS:
        return [OPS[op.name], *(expression(x, slots) for x in op.operands)]
    raise MixMoEError("a grid is computed with", op.name, ", ".join(OPS))
