#!/usr/bin/env python3
"""Run one linear layer of a live server, on the server's own weights.

    python run_layer.py weights_metadata 0 model.layers.0.mlp.down_proj.weight

On a GPU (a server started with SGLANG_WEIGHT_HOOK_SHARE=1, and this program on the same machine
with the same GPU visible) the tensor is the server's memory itself, without a copy; from a CPU
server it is a copy.  Either way it is valid while the lock is held: no update begins meanwhile,
and an update waits for the lock a few seconds at most, so keep it short.

Prints one JSON object: the tensor, how it was reached, and a few figures of the layer's output.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

try:
    import sglang_weight_hook as hook
except ImportError:  # run from a checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import sglang_weight_hook as hook


def main() -> int:
    parser = argparse.ArgumentParser(description="Run a linear layer on a live server's weights.")
    parser.add_argument("directory", help="the server's output directory")
    parser.add_argument("slot", help="0, 1, 0_draft, ...")
    parser.add_argument("name", help="a weight with two dimensions")
    options = parser.parse_args()
    try:
        print(json.dumps(run(hook.open_slot(options.directory, options.slot), options.name)))
    except hook.HookError as error:
        print(f"run_layer: {error}", file=sys.stderr)
        return 1
    return 0


def run(slot: hook.Slot, name: str) -> dict[str, object]:
    """The layer's output for an input of ones.  Raises HookError."""
    with slot.weights_held():  # no update begins in here
        document = slot.read()
        with document.open_memory() as memory:
            weight = memory.tensor(name)
            if weight.dim() != 2:
                raise hook.HookError(f"{name} has {weight.dim()} dimensions; give a matrix")
            ones = torch.ones(1, weight.shape[1], dtype=torch.float32, device=weight.device)
            output = torch.nn.functional.linear(ones, weight.to(torch.float32))
            # Still the document's weights?  A GPU view shows what is there now.
            memory.check()
            return {
                "name": name,
                "via": memory.via(name),
                "device": str(weight.device),
                "shape": list(weight.shape),
                "content_generation": document.content_generation,
                "sum": float(output.double().sum()),
                "largest": float(output.abs().max()),
            }


if __name__ == "__main__":
    sys.exit(main())
