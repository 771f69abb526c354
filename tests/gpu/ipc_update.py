"""Sends a checkpoint to a running server with checkpoint-engine, over CUDA IPC.

Moonshot's own `checkpoint_engine.ParameterServer`, as one rank on the server's GPU: it pins the
files, copies them into buckets on the device, and hands SGLang's `/update_weights_from_ipc` the
ZMQ socket over which bucket after bucket is announced (SGLang's
srt/checkpoint_engine/checkpoint_engine_worker.py is the other end).

    PY tests/gpu/ipc_update.py --port PORT CHECKPOINT

Prints the server's answer as one line of JSON; exit status 1 unless it says success.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import socket
import sys
import urllib.request
from pathlib import Path
from typing import Any


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        store_port = probe.getsockname()[1]
    os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
    engine: Any = importlib.import_module("checkpoint_engine.ps")
    arguments = {"master_port": store_port, "mem_fraction": 0.05}
    if arguments.keys() <= inspect.signature(engine.ParameterServer.__init__).parameters.keys():
        # Small buckets, so that a tiny model takes several.
        os.environ.setdefault("PS_MAX_BUCKET_SIZE_GB", "0.0005")
    else:  # 0.1: the port in a variable (it takes the next one), whole gigabytes, no group made
        os.environ.update(MASTER_PORT=str(store_port - 1), PS_MAX_BUCKET_SIZE_GB="1")
        arguments = {"auto_pg": True}
    answers: list[Any] = []

    def ask(sockets: list[tuple[str, str]]) -> None:
        request = urllib.request.Request(
            f"http://127.0.0.1:{options.port}/update_weights_from_ipc",
            data=json.dumps({"zmq_handles": dict(sockets), "flush_cache": True}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            answers.append(json.loads(response.read()))

    server = engine.ParameterServer(**arguments)
    name = options.checkpoint.name
    files = [str(path) for path in sorted(options.checkpoint.glob("*.safetensors"))]
    server.register_checkpoint(name, files=files)
    server.gather_metas(name)
    server.update(name, ask)
    server.unregister_checkpoint(name)
    print(json.dumps(answers[0]), flush=True)
    return 0 if answers[0]["success"] else 1


if __name__ == "__main__":
    sys.exit(main())
