"""vllm's compiled operators: imported by older SGLang, never called on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(name)

    def operator(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"vllm's operator {name} is compiled and absent here")

    return operator
