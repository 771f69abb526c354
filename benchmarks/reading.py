"""The reader: open, parse, look an address up."""

from __future__ import annotations

import json
import math
import os
import random

from sglang_weight_hook import reader
from sglang_weight_hook.layout import files

from . import table
from .capturing import Load, published
from .measure import Sample, ratios, side_by_side
from .models import COUNTS, make_model
from .table import Line, Section

OPENED = 3118
#: Open, parse and the first look-up, against a bare orjson parse of the same file.
TARGET = 3.0
#: One look-up among 100 000 tensors, CPU seconds.
LOOKUP = 5e-6
LOOKUPS = 2000


def measure(quick: bool) -> Section:
    lines: list[Line] = []
    seconds: list[tuple[int, float]] = []
    for count in COUNTS:
        with published() as place:
            load = Load(make_model(count))
            load()
            path = os.path.join(place, files.LAYOUT.format("0"))
            document = reader.open_slot(place, "0").read()
            tensors = list(document.iter_tensors())
            address = tensors[len(tensors) // 2].ptr
            document.lookup(address)  # builds the index
            if count == OPENED:
                lines.append(_opening(place, path, address, count, quick))
            sample = _looking_up(document, count, quick)
            one = sample.median / LOOKUPS
            seconds.append((count, one))
            due = count == COUNTS[-1]
            lines.append(
                Line(
                    f"a look-up among {table.number(count)} tensors",
                    f"{table.seconds(one)} ±{sample.spread:.0%} n={sample.n * LOOKUPS}",
                    f"a file of {table.size(os.path.getsize(path))}",
                    table.seconds(one),
                    f"≤ {table.seconds(LOOKUP)}" if due else "",
                    one <= LOOKUP if due else None,
                )
            )
    lines.append(_growth(seconds))
    return Section("The reader", lines, HOW, LIMITS)


def _opening(place: str, path: str, address: int, count: int, quick: bool) -> Line:
    """From nothing to the first answer, beside parsing the file alone."""
    import orjson

    def open_and_find() -> object:
        return reader.open_slot(place, "0").read().lookup(address)

    def bare() -> object:
        with open(path, "rb") as file:
            return orjson.loads(file.read())

    def standard() -> object:
        with open(path, "rb") as file:
            return json.loads(file.read())

    found = side_by_side(
        {"hook": open_and_find, "orjson": bare, "json": standard}, 5 if quick else 25
    )
    over = ratios(found["hook"], found["orjson"])
    return Line(
        f"open, parse, first look-up, {table.number(count)} tensors",
        table.timing(found["hook"]),
        f"orjson.loads {table.timing(found['orjson'])}; "
        f"json.loads {table.seconds(found['json'].median)}",
        table.times(over),
        f"≤ {TARGET:g} x",
        over.median <= TARGET,
    )


def _looking_up(document: reader.Document, count: int, quick: bool) -> Sample:
    """Seconds of `LOOKUPS` look-ups, each of a random address in a random tensor."""
    generator = random.Random(count)
    tensors = list(document.iter_tensors())
    addresses = [
        tensor.ptr + generator.randrange(max(tensor.span, 1))
        for tensor in generator.choices(tensors, k=LOOKUPS)
    ]

    def look_up() -> None:
        for address in addresses:
            document.lookup(address)

    return side_by_side({"look-up": look_up}, 3 if quick else 9)["look-up"]


def _growth(seconds: list[tuple[int, float]]) -> Line:
    """Whether a look-up grows no faster than the logarithm of the number of tensors."""
    (few, fast), (many, slow) = seconds[0], seconds[-1]
    allowed = math.log2(many) / math.log2(few)
    return Line(
        "O(log n)?",
        f"{slow / fast:.2f} x from {table.number(few)} to {table.number(many)} tensors",
        f"log₂ n grows {allowed:.2f} x",
        f"{slow / fast / allowed:.2f}",
        "≤ 1.25",
        slow / fast <= 1.25 * allowed,
    )


HOW = """\
`open_slot(…).read()` and one `lookup`, against one `orjson.loads` of the layout file (the reader
uses the standard library alone, so `json.loads` stands beside it). Look-ups are of random
addresses inside random tensors, after the first."""
LIMITS = """\
Opening is the standard library's parse, 1.8 x orjson's, and the index, which the first look-up
builds from two numbers of each tensor; typed objects are made of those that are asked for. A
look-up is one bisection, the division of an offset by the strides, and the `Hit`: some 2 µs in a
small document. Among 100 000 tensors it waits for memory, because successive tensors are far
apart in it; the bare `bisect` takes 0.7 µs."""
