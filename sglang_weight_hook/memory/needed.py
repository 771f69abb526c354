"""What of this room needs a library that the command alone does not bring (extra ``memory``)."""

from __future__ import annotations

import importlib

from .errors import NotReadable


def need_numpy(what: str) -> None:
    """``what`` begins a sentence.  Raises NotReadable where numpy is missing."""
    try:
        importlib.import_module("numpy")
    except ImportError:
        raise NotReadable(
            f"{what} needs numpy, which is not installed here; pip install numpy ml_dtypes "
            f"safetensors"
        ) from None
