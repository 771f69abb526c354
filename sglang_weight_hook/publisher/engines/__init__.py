"""Subscribers of this project: transfer engines that let other machines read the weights.

Each is a `Subscriber` like any other; what they share is in `registration`.
"""

from __future__ import annotations

from typing import Any

from ...layout import transport_document
from ...layout.transport_document import MOONCAKE

NAMES = transport_document.ENGINES


def make(name: str) -> Any:
    """The subscriber of that name, one of `NAMES`.  Raises nothing: it says itself why it fails."""
    if name == MOONCAKE:
        from .mooncake import Mooncake

        return Mooncake()
    from .nixl import Nixl

    return Nixl()
