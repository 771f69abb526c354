"""Sends a checkpoint to a running server in a session of buckets, as a trainer does, when told to.

Runs in the venv.  One JSON object a line on stdin, the server's answers on stdout:

    {"checkpoint": "/path", "flattened": true, "buckets": 3}
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from cpu_sglang.online_updates import (
    _load_checkpoint,
    _serialise,
    _share_memory_with_strangers,
    _split,
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    # How many processes open each payload: a handle to shared memory is used up by the first,
    # so there is one payload a tensor-parallel rank, and replicas need further references.
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--replicas", type=int, default=1)
    options = parser.parse_args()
    _share_memory_with_strangers()
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(_send(options, **order)), flush=True)


def _send(options: Any, checkpoint: str, *, flattened: bool, buckets: int) -> list[Any]:
    answers = [_post(options.port, "/begin_weight_update", {})]
    parts = _split(_load_checkpoint(Path(checkpoint)), buckets)
    for number, part in enumerate(parts, 1):
        kept: list[Any] = []  # until the answer is here: the server opens our memory
        payloads = []
        for _ in range(options.tp):
            content = _content([(name, tensor.clone()) for name, tensor in part], flattened)
            payloads.append(_serialise(content))
            # Each further one is a further reference to the same memory.
            kept += [content, *(_serialise(content) for _ in range(options.replicas - 1))]
        body = {
            "serialized_named_tensors": payloads,
            "load_format": "flattened_bucket" if flattened else None,
            "flush_cache": number == len(parts),
        }
        answers.append(_post(options.port, "/update_weights_from_tensor", body))
        del kept
    answers.append(_post(options.port, "/end_weight_update", {}))
    return answers


def _content(named: list[tuple[str, Any]], flattened: bool) -> Any:
    if not flattened:
        return named
    from sglang.srt.weight_sync.tensor_bucket import (  # type: ignore[import-not-found, import-untyped, unused-ignore]
        FlattenedTensorBucket,
    )

    bucket = FlattenedTensorBucket(named_tensors=named)
    return {"flattened_tensor": bucket.get_flattened_tensor(), "metadata": bucket.get_metadata()}


def _post(port: int, route: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{route}",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=120) as response:
            answer = json.loads(response.read())
    except urllib.error.HTTPError as refusal:
        with refusal:
            return {"success": False, "route": route, "message": refusal.read().decode()[:500]}
    return answer if isinstance(answer, dict) else {"success": True, "message": str(answer)}


if __name__ == "__main__":
    main()
