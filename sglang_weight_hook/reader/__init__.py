"""Read what a hooked SGLang publishes.  The standard library alone: no torch, no SGLang.

    >>> import sglang_weight_hook as hook
    >>> directory = hook.open_directory(EXAMPLE)   # a weights_metadata directory
    >>> [slot.name for slot in directory.slots()]
    ['0']
    >>> document = hook.open_slot(EXAMPLE, "0").read()
    >>> document.state["state"], len(document.tensors) > 0
    ('ready', True)

A document's ``tensors`` and ``regions`` are the published objects as they are;
`Document.iter_tensors`, `Document.iter_regions` and `Document.lookup` give the same as small
typed objects.  Addresses and sizes are in bytes; shapes, strides and indices in elements.

Every error is a `HookError` whose message says what to do.
"""

from __future__ import annotations

from ..layout.header import Header
from .control import Check
from .diff import Diff, compare
from .directory import Change, Directory, open_directory, open_file, open_slot
from .document import Document
from .errors import (
    Busy,
    ControlError,
    HookError,
    NoAnswer,
    NoSocket,
    NotAllowed,
    NotReady,
    OwnerGone,
    Stale,
    Unreachable,
)
from .header import HeaderReader
from .history import History, PastEvent
from .names import ROLES, layer_of, role_of
from .slot import Slot
from .spans import SpanIndex
from .tensors import CacheBuffer, Hit, Region, Tensor

__all__ = [
    "ROLES",
    "Busy",
    "CacheBuffer",
    "Change",
    "Check",
    "ControlError",
    "Diff",
    "Directory",
    "Document",
    "Header",
    "HeaderReader",
    "History",
    "Hit",
    "HookError",
    "NoAnswer",
    "NoSocket",
    "NotAllowed",
    "NotReady",
    "OwnerGone",
    "PastEvent",
    "Region",
    "Slot",
    "SpanIndex",
    "Stale",
    "Tensor",
    "Unreachable",
    "compare",
    "layer_of",
    "open_directory",
    "open_file",
    "open_slot",
    "role_of",
]
