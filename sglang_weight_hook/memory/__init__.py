"""The bytes behind a map: reading them, and what is built on that.

    >>> import sglang_weight_hook as hook
    >>> document = hook.open_slot(EXAMPLE, "0").read()
    >>> with document.open_memory() as memory:
    ...     values = memory.read(next(iter(document.tensors)))

A backend a file (`process`, `cuda`, `owner`; through a transfer engine in the server, also from
another machine, `mooncake` and `nixl`), and files of the formats and comparisons that need
bytes.  numpy, safetensors, ml_dtypes and torch are imported by what needs them, and only then.
"""

from __future__ import annotations

from .errors import Changed, NotReadable, TransferWarning
from .memory import PIECE, Memory

__all__ = ["PIECE", "Changed", "Memory", "NotReadable", "TransferWarning"]
