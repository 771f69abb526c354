"""A layout document as a table for 80 columns, in a terminal or a pipe."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

_SHORT_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}
_SHORT_KINDS = {"parameter": "param", "attribute": "attr"}
_HEADINGS = ("name", "address", "bytes", "type", "shape", "kind")
_RIGHT_ALIGNED = {"bytes"}


def table(tensors: dict[str, dict[str, Any]]) -> Iterator[str]:
    """One row per tensor; what the names of a layer share is said once, above them."""
    rows: list[tuple[str, ...]] = []
    prefix = ""
    for name in sorted(tensors, key=_natural_order):
        tensor = tensors[name]
        its_prefix, suffix = _split_at_layer(name)
        if its_prefix and its_prefix != prefix:
            rows.append((its_prefix,))
        prefix = its_prefix
        rows.append(("  " + suffix if its_prefix else suffix, *_columns(tensor)))

    full = [row for row in rows if len(row) > 1]
    widths = [max(map(len, column)) for column in zip(_HEADINGS, *full)]
    yield _line(_HEADINGS, widths)
    yield " ".join("-" * width for width in widths)
    for row in rows:
        yield _line(row, widths)


def totals(layout: dict[str, Any]) -> Iterator[str]:
    tensors = layout["tensors"].values()
    kinds: dict[str, int] = {}
    for tensor in tensors:
        kinds[tensor["kind"]] = kinds.get(tensor["kind"], 0) + 1
    listed = ", ".join(f"{count} {_plural(kind, count)}" for kind, count in sorted(kinds.items()))
    aliases = sum(len(tensor["aliases"]) for tensor in tensors)
    further = f"; {aliases} more {_plural('name', aliases)} for the same memory" if aliases else ""
    yield f"{listed}{further}"
    for device, amounts in layout["totals"].items():
        sizes = ", ".join(f"{key.replace('_', ' ')} {value:,}" for key, value in amounts.items())
        yield f"{device}: {sizes}"
    yield f"{len(layout['regions'])} regions to register, each of adjacent weights"


def _columns(tensor: dict[str, Any]) -> tuple[str, ...]:
    dtype = tensor["dtype"].removeprefix("torch.")
    return (
        f"{tensor['ptr']:#x}",
        f"{tensor['size']:,}",
        _SHORT_DTYPES.get(dtype, dtype),
        "x".join(map(str, tensor["shape"])) or "scalar",
        _SHORT_KINDS.get(tensor["kind"], tensor["kind"]),
    )


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    if len(cells) == 1:
        return cells[0]
    aligned = (
        cell.rjust(width) if heading in _RIGHT_ALIGNED else cell.ljust(width)
        for cell, width, heading in zip(cells, widths, _HEADINGS)
    )
    return " ".join(aligned).rstrip()


def _split_at_layer(name: str) -> tuple[str, str]:
    found = re.match(r"(.*\.\d+)\.(.+)", name)
    return (found[1], found[2]) if found else ("", name)


def _natural_order(name: str) -> list[tuple[int, str]]:
    """layers.2 before layers.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"
