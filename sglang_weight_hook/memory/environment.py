"""Variables that an engine's library reads once, when it is loaded or opened."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping


@contextlib.contextmanager
def defaults(wanted: Mapping[str, str]) -> Iterator[None]:
    """Set those that are not set; no child of ours inherits them."""
    ours = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)
