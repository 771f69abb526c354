"""Registers every command, in the order in which `--help` lists them."""

from __future__ import annotations

from . import (  # noqa: F401
    checksum,
    compare,
    diff,
    doctor,
    history,
    lookup,
    plot,
    regions,
    report,
    save,
    scrub,
    show,
    verify,
    watch,
)
from .app import main

__all__ = ["main"]
