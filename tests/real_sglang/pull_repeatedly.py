"""Pulls all weights of live slots through an engine, again and again, while somebody updates them.

``pull_repeatedly.py ENGINE DIRECTORY PULLS SECONDS``: until so many pulls of each slot have come
through, or the time is over.  One JSON object a slot and line: how often each content came, by the
SHA-256 over all its bytes, and how often what was raised instead.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
import warnings
from collections import Counter

import sglang_weight_hook as hook
from sglang_weight_hook.memory.errors import TransferWarning
from sglang_weight_hook.memory.pull import Pulled, pull


def digest(pulled: Pulled) -> str:
    """Over the names and the bytes of all tensors."""
    whole = hashlib.sha256()
    for name in sorted(pulled):
        whole.update(name.encode() + b"\0" + pulled.read(name))
    return whole.hexdigest()[:16]


def main(engine: str, directory: str, pulls: int, seconds: float) -> None:
    warnings.simplefilter("ignore", TransferWarning)  # a namespace is no other machine
    slots = hook.open_directory(directory).slots()
    contents: dict[str, Counter[str]] = {slot.name: Counter() for slot in slots}
    raised: dict[str, Counter[str]] = {slot.name: Counter() for slot in slots}
    messages: dict[str, str] = {}
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for slot in slots:
            try:
                contents[slot.name][digest(pull(slot, attempts=1, via=engine))] += 1
            except hook.HookError as error:
                raised[slot.name][type(error).__name__] += 1
                messages[type(error).__name__] = str(error)
        if all(sum(found.values()) >= pulls for found in contents.values()):
            break
    for slot in slots:
        said = {"slot": slot.name, "contents": contents[slot.name], "raised": raised[slot.name]}
        sys.stdout.write(json.dumps({**said, "messages": messages}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
