"""A program with two of SGLang's engines in one process, each with a model of its own.

Run by the hooked interpreter:  two_engines.py MODEL OTHER_MODEL

Says when both serve, updates the first from the other's checkpoint, says so, and so on; one JSON
line each time, after which it waits for a line.
"""

from __future__ import annotations

import json
import sys
from typing import Any

SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "disable_cuda_graph": True,
    "disable_overlap_schedule": True,
    "max_total_tokens": 2048,
}


def main() -> None:
    answers = sys.stdout
    sys.stdout = sys.stderr
    model, other = sys.argv[1:]

    import sglang  # type: ignore[import-not-found, import-untyped, unused-ignore]

    def tell(what: str) -> None:
        print(json.dumps(what), file=answers, flush=True)
        sys.stdin.readline()

    engines = [sglang.Engine(model_path=path, **SETTINGS) for path in (model, other)]
    tell("serving")
    updated = engines[0].update_weights_from_disk(other)
    assert updated[0], updated
    tell("updated")
    engines[0].shutdown()
    # What is left of the other is ended with the program.
    tell("one shut down")


# SGLang spawns its schedulers, and each of them imports this file anew.
if __name__ == "__main__":
    main()
