"""FlyDSL's names on a machine without FlyDSL, for kernels that were built ahead of time.

The kernels' modules name FlyDSL's types and use its decorators when they are imported; the stages
need those modules for the names of the kernels and no more. So a name of FlyDSL that is not there
is a :class:`Name`, and what it decorates refuses to be called: nothing is computed in silence.
"""

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import FunctionType, ModuleType
from typing import Any

from mixmoe.errors import MixMoEError

ROOT = "flydsl"


class Name:
    """A name of FlyDSL: its attributes, results and what is computed of it are names too. Equal
    where the path is."""

    def __init__(self, path: str) -> None:
        self.path, self.__name__ = path, path.rpartition(".")[2]

    def __getattr__(self, name: str) -> "Name":
        if name.startswith("__"):
            raise AttributeError(name)
        return Name(f"{self.path}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        decorates = len(args) == 1 and isinstance(args[0], FunctionType) and not kwargs
        return Refusal(args[0].__name__) if decorates else self

    def __getitem__(self, key: Any) -> "Name":
        return self

    def _combined(self, other: Any) -> "Name":
        return self

    __or__ = __ror__ = __add__ = __radd__ = __sub__ = __rsub__ = _combined
    __mul__ = __rmul__ = __floordiv__ = __rfloordiv__ = __mod__ = _combined

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Name) and other.path == self.path

    def __hash__(self) -> int:
        return hash(self.path)


class Refusal:
    """What stands for a function that FlyDSL would compile."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        rule = "what is not built ahead of time is compiled by FlyDSL"
        got = f"{self.name}, and flydsl is not installed"
        raise MixMoEError(rule, got, "pip install '.[cdna]'")


class Module(ModuleType):
    """A module of names."""

    def __getattr__(self, name: str) -> Name:
        if name.startswith("__"):
            raise AttributeError(name)
        return Name(f"{self.__name__}.{name}")


class Finder(MetaPathFinder, Loader):
    """Finds ``flydsl`` and every module below it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """A package of names for a name of FlyDSL's, None for others."""
        ours = name.partition(".")[0] == ROOT
        return ModuleSpec(name, self, is_package=True) if ours else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module of names."""
        return Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing runs."""


def is_absent() -> bool:
    """Whether FlyDSL is not installed."""
    spec = find_spec(ROOT)
    return spec is None or isinstance(spec.loader, Finder)


def stand_in() -> None:
    """Let FlyDSL's names be imported where it is not installed."""
    if find_spec(ROOT) is None:
        sys.meta_path.append(Finder())
