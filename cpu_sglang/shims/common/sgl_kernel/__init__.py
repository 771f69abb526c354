"""Stands in for SGLang's compiled kernels, of which no CPU build is published.

SGLang imports dozens of names from here at module level and calls none of them on
this path: it asks ``torch.ops.sgl_kernel`` whether the CPU kernels are registered,
hears no, and takes the pure-torch form of every layer.  So each name must exist, and
must say plainly what happened should it ever be called.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn

__version__ = "0.0.0+absent"

# SGLang brings its own replacement for this one, and uses it when the import fails.
_REALLY_ABSENT = {"sgl_kernel.scalar_type"}


def _absent_kernel(module: str, name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):  # the import system and inspect look for many of these
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    def kernel(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"{module}.{name} is a compiled kernel and this machine runs without them"
        )

    kernel.__module__, kernel.__name__, kernel.__qualname__ = module, name, name
    return kernel


class _AbsentModule(ModuleType):
    def __getattr__(self, name: str) -> Any:
        return _absent_kernel(self.__name__, name)


class _SubmodulesOfThis:
    """Answers ``import sgl_kernel.anything``; last in line, so a real file would win."""

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if not name.startswith("sgl_kernel.") or name in _REALLY_ABSENT:
            return None
        return ModuleSpec(name, cls, is_package=True)  # type: ignore[arg-type]

    @staticmethod
    def create_module(spec: ModuleSpec) -> ModuleType:
        return _AbsentModule(spec.name)

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        pass


def __getattr__(name: str) -> Any:
    return _absent_kernel(__name__, name)


sys.meta_path.append(_SubmodulesOfThis)
