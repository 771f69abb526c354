"""Sends a checkpoint to a running server in buckets, in a session or call by call, when told to.

Runs in the venv with SGLang: ``python tests/stress/soak_sender.py PORT``.  One JSON object a line
on stdin, a list of the server's answers on stdout:

    {"checkpoint": "/path", "flattened": true, "session": false, "end_is_told": true}

Without a session the buckets are calls in a row, of which the server knows the last only where that
asks it to flush its cache (``end_is_told``).
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from cpu_sglang.online_updates import (
    _load_checkpoint,
    _serialise,
    _share_memory_with_strangers,
    _split,
)
from tests.real_sglang.truth.bucket_sender import _content, _post

BUCKETS = 3


def main() -> None:
    port = int(sys.argv[1])
    _share_memory_with_strangers()
    # What flattened buckets need takes half a minute to import: not in the middle of an update.
    importlib.import_module("sglang.srt.weight_sync.tensor_bucket")
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(_send(port, **json.loads(line))), flush=True)


def _send(
    port: int, checkpoint: str, *, flattened: bool, session: bool, end_is_told: bool
) -> list[Any]:
    answers = [_post(port, "/begin_weight_update", {})] if session else []
    parts = _split(_load_checkpoint(Path(checkpoint)), BUCKETS)
    for number, part in enumerate(parts, 1):
        # Kept until the answer is here: the server opens our memory.
        content = _content([(name, tensor.clone()) for name, tensor in part], flattened)
        body = {
            "serialized_named_tensors": [_serialise(content)],
            "load_format": "flattened_bucket" if flattened else None,
            "flush_cache": end_is_told and number == len(parts),
        }
        answers.append(_post(port, "/update_weights_from_tensor", body))
    if session:
        answers.append(_post(port, "/end_weight_update", {}))
    return answers


if __name__ == "__main__":
    main()
