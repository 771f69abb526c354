"""One event in one line, as `watch` and `history` print it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, Union

from .text import STYLES, printable

Parts = list[Union[str, tuple[str, str]]]


def event_parts(event: Mapping[str, Any], standing: Mapping[str, Any]) -> Parts:
    """The line after the time and the slot: what happened, and how it left the slot.

    ``standing``: the document that has ``state`` and the generations.  Neither is trusted to have
    its fields.
    """
    word = str(standing.get("state"))
    parts: Parts = [
        (f"{printable(word):8}", STYLES.get(word, "")),
        f"  {printable(event.get('kind'))}",
    ]
    if event.get("success") is not None:
        parts.append("  ok" if event.get("success") else "  failed")
    started, finished = event.get("started_at"), event.get("finished_at")
    if isinstance(started, (int, float)) and isinstance(finished, (int, float)):
        with contextlib.suppress(OverflowError):
            parts.append(f"  {max(finished - started, 0.0):.2f} s")
    generations = (standing.get(f"{name}_generation") for name in ("layout", "content"))
    layout, content = (printable(number) for number in generations)
    parts.append(f"  layout {layout} content {content}")
    for word in ("moved", "added", "removed"):
        if event.get(word):
            parts.append(f" {word} {printable(event[word])}")
    # SGLang refused, and the weights were written all the same.
    refused = event.get("answered") is False and event.get("success") is True
    if refused:
        parts.append((" answered: no", "yellow"))
    names = event.get("tensors")
    if isinstance(names, list) and names:
        parts.append(f": {', '.join(map(printable, names))}")
    elif (refused or event.get("success") is False) and event.get("message"):
        parts.append(f": {_one_end(printable(event['message']))}")
    return parts


def _one_end(message: str) -> str:
    """SGLang ends some messages with a full stop behind that of the error that it quotes.

    >>> _one_end("no such directory.."), _one_end("cut short...")
    ('no such directory.', 'cut short...')
    """
    return message[:-1] if message.endswith("..") and not message.endswith("...") else message
