"""Sends a component's weights to a running diffusion server as a trainer does: serialized tensors.

Runs in the venv, from the repository's root, in a process of its own:

    <venv python> -m tests.real_sglang.diffusion.tensor_sender URL WEIGHTS.safetensors COMPONENT

Prints SGLang's answer as one JSON line.
"""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request
from typing import Any


def main() -> None:
    import torch  # type: ignore[import-not-found, unused-ignore]
    from safetensors.torch import load_file  # type: ignore[import-not-found, unused-ignore]
    from sglang.srt.utils import (  # type: ignore[import-not-found, import-untyped, unused-ignore]
        MultiprocessingSerializer,
    )

    # By name: a file descriptor is handed to relatives alone, who share a key.
    multiprocessing: Any = torch.multiprocessing
    multiprocessing.set_sharing_strategy("file_system")
    url, file, component = sys.argv[1:]
    tensors = list(load_file(file).items())
    # They are shared, not copied: this process keeps them until SGLang has answered.
    payload = MultiprocessingSerializer.serialize(tensors, output_str=True)
    body = {"serialized_named_tensors": [payload], "target_modules": [component]}
    request = urllib.request.Request(
        url + "/update_weights_from_tensor",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=120) as response:
            print(response.read().decode())
    except urllib.error.HTTPError as refusal:
        print(refusal.read().decode())


if __name__ == "__main__":
    main()
