"""Stands in for triton on a machine where none of its kernels could run.

SGLang decorates kernels, annotates them with ``tl.constexpr`` and subclasses a thing
or two while it is being imported, so every name must exist and tolerate that.
Whatever is asked for is either a class (capitalised names) or a placeholder that is
at once a module, a decorator and an empty collection.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from types import FunctionType, ModuleType
from typing import Any, NoReturn

__version__ = "3.6.0"  # some releases compare it; this is what they were built with


class _AnyClass:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__()


class _Placeholder(ModuleType):
    def __getattr__(self, name: str) -> Any:
        return _absent(self, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Used bare (@tl.something) it gets the function; used with options
        # (@triton.something(x=1)) it must give a decorator.
        decorated = FunctionType | JITFunction | type
        bare = len(args) == 1 and not kwargs and isinstance(args[0], decorated)
        return args[0] if bare else _return_unchanged

    def __getitem__(self, key: Any) -> _Placeholder:
        return self

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __len__(self) -> int:  # also makes it false
        return 0

    def __contains__(self, item: object) -> bool:
        return False

    def __or__(self, other: Any) -> Any:  # `tl.tensor | None` in annotations
        return object

    __ror__ = __or__


def _return_unchanged(function: Any = None, *args: Any, **kwargs: Any) -> Any:
    return function


def _absent(owner: ModuleType, name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"module {owner.__name__!r} has no attribute {name!r}")
    value: Any
    if name == "JITFunction":  # asked for under triton.runtime.jit
        value = JITFunction
    elif name[:1].isupper():
        value = type(name, (_AnyClass,), {"__module__": owner.__name__})
    else:
        # Through the import system, so that `triton.x` and `import triton.x` agree.
        value = importlib.import_module(f"{owner.__name__}.{name}")
    setattr(owner, name, value)
    return value


class _SubmodulesOfThis:
    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if not name.startswith("triton."):
            return None
        return ModuleSpec(name, cls, is_package=True)  # type: ignore[arg-type]

    @staticmethod
    def create_module(spec: ModuleSpec) -> ModuleType:
        return _Placeholder(spec.name)

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        module.__file__ = __file__  # inspect walks sys.modules and wants one


class JITFunction:
    """What ``@triton.jit`` gives: SGLang 0.5.3 insists on this very type."""

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self.fn = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.fn(*args, **kwargs)

    def __getitem__(self, grid: Any) -> NoReturn:
        raise NotImplementedError(f"{self.fn.__name__} is a triton kernel: it needs a GPU")


def jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    return JITFunction if function is None else JITFunction(function)


def heuristics(*args: Any, **options: Any) -> Callable[..., Any]:
    return _return_unchanged


autotune = heuristics


class Config(_AnyClass):
    pass


def cdiv(numerator: int, denominator: int) -> int:
    return -(numerator // -denominator)


def next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length() if number > 0 else 1


def __getattr__(name: str) -> Any:
    return _absent(sys.modules[__name__], name)


sys.meta_path.append(_SubmodulesOfThis)
