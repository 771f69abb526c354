"""Where every weight of a running SGLang lies in GPU memory, and whether that is still true.

The published files separate two halves (`layout` defines the format for both):

* `publisher`, inside SGLang's process: events, capture, documents, files and locks;
* `reader`, anywhere, with the standard library alone; `commands` is the command line over it.

The reading names are importable from here; nothing is imported until one is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "Busy",
    "Change",
    "Changed",
    "Check",
    "ControlError",
    "Directory",
    "Document",
    "Header",
    "HeaderReader",
    "Hit",
    "HookError",
    "Memory",
    "NoAnswer",
    "NoSocket",
    "NotAllowed",
    "NotReadable",
    "NotReady",
    "OwnerGone",
    "PastEvent",
    "Region",
    "Slot",
    "Stale",
    "Tensor",
    "Unreachable",
    "__version__",
    "compare",
    "open_directory",
    "open_file",
    "open_slot",
]

if TYPE_CHECKING:
    from .memory import Changed, Memory, NotReadable
    from .reader import (
        Busy,
        Change,
        Check,
        ControlError,
        Directory,
        Document,
        Header,
        HeaderReader,
        Hit,
        HookError,
        NoAnswer,
        NoSocket,
        NotAllowed,
        NotReady,
        OwnerGone,
        PastEvent,
        Region,
        Slot,
        Stale,
        Tensor,
        Unreachable,
        compare,
        open_directory,
        open_file,
        open_slot,
    )


_OF_MEMORY = ("Changed", "Memory", "NotReadable")


def __getattr__(name: str) -> Any:
    if name in _OF_MEMORY:
        from . import memory

        return getattr(memory, name)
    if name in __all__:
        from . import reader

        return getattr(reader, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
