"""Where every weight of a running SGLang lies in GPU memory, and whether that is still true.

Two halves that meet only in the published files:

* writing, inside SGLang's process: `recorder` (events and states) calls `capture` (walk the
  model), `document` (make the JSON) and `publish` (slots, locks, whole files by rename);
* reading, anywhere, with the standard library alone: `reader`.

The reading names are importable from here; nothing is imported until one is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "Change",
    "Directory",
    "Document",
    "Hit",
    "HookError",
    "Region",
    "Slot",
    "Tensor",
    "__version__",
    "compare",
    "open_directory",
    "open_file",
    "open_slot",
]

if TYPE_CHECKING:
    from .reader import (
        Change,
        Directory,
        Document,
        Hit,
        HookError,
        Region,
        Slot,
        Tensor,
        compare,
        open_directory,
        open_file,
        open_slot,
    )


def __getattr__(name: str) -> Any:
    if name in __all__:
        from . import reader

        return getattr(reader, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
