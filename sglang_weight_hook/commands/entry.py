"""Registers every command, in the order in which `--help` lists them."""

from __future__ import annotations

from . import diff, doctor, history, lookup, plot, regions, report, show, verify, watch  # noqa: F401
from .app import main

__all__ = ["main"]
