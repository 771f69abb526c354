"""Reads a directory with the reader on the path, the released 0.1, and prints what it says.

Only names that 0.1 has are used, as a program written for it would use them.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import sglang_weight_hook as hook


def read(directory: str) -> dict[str, Any]:
    (slot,) = hook.open_directory(directory).slots()
    document = slot.read(timeout=10)
    with slot.weights_held(timeout=10):
        state = slot.read_state()
    return {
        "slot": slot.name,
        "alive": slot.owner_alive() and document.owner_alive(),
        "state": state,
        "generations": [document.layout_generation, document.content_generation],
        "raw": document.raw,
        "tensors": [list(tensor) for tensor in document.iter_tensors()],
        "regions": [list(region) for region in document.iter_regions()],
        "kv_cache": [list(buffer) for buffer in document.iter_kv_cache()],
        "found": {
            tensor.name: [hit.tensor.name for hit in document.lookup(tensor.end - 1)]
            for tensor in document.iter_tensors()
            if tensor.resident and tensor.span
        },
        "changed": document.changes_since(document).as_dict(),
    }


def verify(directory: str) -> dict[str, Any]:
    from sglang_weight_hook.verify import verify_file, verify_slot

    (slot,) = hook.open_directory(directory).slots()
    of_file = verify_file(hook.open_file(slot.path("weight_layout_{}.json")))
    verdicts = {"slot": verify_slot(slot), "file": of_file}
    return {name: [list(found) for found in verdict.findings] for name, verdict in verdicts.items()}


if __name__ == "__main__":
    told = {"read": read, "verify": verify}[sys.argv[1]](sys.argv[2])
    print(json.dumps({"reader": hook.__file__, "version": hook.__version__, **told}))
