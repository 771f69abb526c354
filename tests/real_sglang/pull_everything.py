"""Pulls all weights of copied documents through an engine: what a reader on another machine runs.

``pull_everything.py ENGINE DIRECTORY``: one JSON object a slot and line, with the start of each
tensor's SHA-256 as SGLang's weight checker has it; or what was raised instead.
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings

import sglang_weight_hook as hook
from sglang_weight_hook.memory.errors import TransferWarning
from sglang_weight_hook.memory.pull import pull


def main(engine: str, directory: str) -> None:
    warnings.simplefilter("ignore", TransferWarning)  # a namespace is no other machine
    for slot in hook.open_directory(directory).slots():
        said: dict[str, object] = {"slot": slot.name}
        try:
            pulled = pull(slot, attempts=1, via=engine)
        except hook.HookError as error:
            said.update(raised=type(error).__name__, message=str(error))
        else:
            said["content_generation"] = pulled.document.content_generation
            said["sums"] = {
                name: hashlib.sha256(pulled.read(name)).digest()[:8].hex() for name in pulled
            }
        sys.stdout.write(json.dumps(said) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
