"""``sglang-weight-hook doctor``."""

from __future__ import annotations

from typing import Annotated

import typer

from .app import ACT, command
from .options import DirOption, JsonOption
from .render.text import print_item, print_json, print_line, printable


@command(
    "doctor", "sglang-weight-hook doctor\n/path/to/venv/bin/python -m sglang_weight_hook doctor"
)
def doctor_(
    directory: DirOption = None,
    everything: Annotated[
        bool, typer.Option("--all", help="List every SGLang method that the hook wraps.")
    ] = False,
    as_json: JsonOption = False,
) -> int:
    """Check whether the hook is active in this Python.

    Its SGLang is searched for the methods that the hook wraps: parsed, not imported.
    Exit status 3 if a check fails.
    """
    from . import diagnosis as doctor  # a tenth of the time that `--help` has

    found = doctor.diagnose(directory)
    status = 0 if found.good else ACT
    if as_json:
        print_json(found.as_dict())
        return status
    words = {doctor.GOOD: ("ok    ", "green"), doctor.NOTE: ("note  ", "yellow")}
    for fact in found.facts:
        word = words.get(fact.level, ("BAD   ", "bold red"))
        print_item(word, f"{fact.topic:12}  ", printable(fact.text))
        if fact.topic == "Entry points" and fact.level != doctor.BAD and everything:
            for entry in found.entry_points:
                if entry.found or entry.expected:
                    mark = "found  " if entry.found else "MISSING"
                    print_line(f"      {mark}  {entry.event}: {entry.name}")
    return status
