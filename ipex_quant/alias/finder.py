"""Imports of ``intel_extension_for_pytorch`` and what is below it: modules that look names up in this package."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from .names import ELSEWHERE, MODULES, OBJECTS, PROGRAMS

IPEX = "intel_extension_for_pytorch"

OURS = __name__.partition(".")[0]


class AliasFinder(MetaPathFinder, Loader):
    """Finds IPEX's modules, and makes an `AliasModule` of each; the first one comes with the `effects` on torch."""

    def __init__(self) -> None:
        self._effects: ExitStack | None = None

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of an IPEX module; None for other names. An ImportError says what replaces a module not carried."""
        if fullname != IPEX and not fullname.startswith(f"{IPEX}."):
            return None
        below = _below(fullname)
        if below in PROGRAMS:
            program = importlib.util.find_spec(PROGRAMS[below])
            return importlib.util.spec_from_file_location(fullname, program.origin) if program else None
        if _is_module(below):
            return importlib.util.spec_from_loader(fullname, self, is_package=True)
        if below in ELSEWHERE:
            # Without the name, `from package import name` passes this error on, instead of one that says less.
            raise ModuleNotFoundError(_advice(below))
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """An `AliasModule`, of which nothing is loaded yet."""
        return AliasModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """An `AliasModule` is complete when it is made; the effects on torch come with the package's."""
        if module.__name__ == IPEX and self._effects is None:
            from .effects import effects  # loads torch

            with ExitStack() as stack:
                for effect in effects():
                    stack.enter_context(effect)
                self._effects = stack.pop_all()

    def undo_effects(self) -> None:
        """Take the effects on torch back."""
        if self._effects is not None:
            self._effects.close()
            self._effects = None


class AliasModule(ModuleType):
    """An IPEX module; its names are looked up in this package each time they are used."""

    def __getattr__(self, name: str) -> Any:
        below = _below(self.__name__)
        path = f"{below}.{name}" if below else name
        if path in OBJECTS:
            home, _, attribute = OBJECTS[path].partition(":")
            return getattr(importlib.import_module(home), attribute)
        if name.startswith("__") and name not in ("__all__", "__doc__", "__file__", "__version__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        try:
            found = getattr(_home(below), name)
        except AttributeError as error:
            if _is_module(path):
                return importlib.import_module(f"{IPEX}.{path}")
            text = _advice(path) if path in ELSEWHERE else f"module {self.__name__!r} has no attribute {name!r}"
            raise AttributeError(text) from error
        if isinstance(found, ModuleType) and _is_module(path):
            return importlib.import_module(f"{IPEX}.{path}")
        return found

    def __dir__(self) -> list[str]:
        below = _below(self.__name__)
        names = (path.removeprefix(f"{below}.") if below else path for path in (*MODULES, *OBJECTS))
        return sorted({*super().__dir__(), *dir(_home(below)), *(name for name in names if name and "." not in name)})


def _below(fullname: str) -> str:
    """The path below the package: "" for the package itself."""
    return fullname[len(IPEX) + 1 :]


def _home(below: str) -> ModuleType:
    """The module of this package in which the names of an IPEX module are looked up."""
    if below in MODULES:
        home = MODULES[below]
        return importlib.import_module(home) if home else ModuleType(below)
    return importlib.import_module(f"{OURS}.{below}")


def _is_module(below: str) -> bool:
    """Whether a path below the package is a module: one of the table, or one that has the same path here."""
    if below in MODULES:
        return True
    try:
        return importlib.util.find_spec(f"{OURS}.{below}") is not None
    except ModuleNotFoundError:  # its parent is no package
        return False


def _advice(path: str) -> str:
    return f"{IPEX}.{path} is not in {OURS}: {ELSEWHERE[path]}"
