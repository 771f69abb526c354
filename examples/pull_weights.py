#!/usr/bin/env python3
"""Pull a live server's weights into a fresh torch model of the same shape, on another machine.

    python pull_weights.py /copies/weights_metadata 0 --via mooncake
    python pull_weights.py /copies/weights_metadata 0 --via nixl --save model.pt

The server runs with SGLANG_WEIGHT_HOOK_SUBSCRIBERS=mooncake (or nixl) and
SGLANG_WEIGHT_HOOK_TRANSFER_HOST set to its address.  The directory is the server's own on a shared
file system, or a copy of its files.  All weights are of one generation: where an update comes
between, they are pulled again.

`load_into` is what to take: it fills any model whose tensors have the server's names.  Here the
model is made of the map itself, modules and all, with nothing in it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

try:
    import sglang_weight_hook as hook
except ImportError:  # run from a checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import sglang_weight_hook as hook

from sglang_weight_hook.memory.pull import Pulled, pull


def load_into(model: torch.nn.Module, pulled: Pulled) -> tuple[list[str], list[str]]:
    """Copy each tensor by its name; which names only the server has, and which only the model."""
    mine = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    theirs = set()
    with torch.no_grad():
        for name, tensor in pulled.tensors.items():
            names = [each for each in (name, *tensor.aliases) if each in mine]
            if not names:
                continue
            values = pulled.tensor(name)
            if mine[names[0]].shape != values.shape:
                raise hook.HookError(
                    f"{name} is {list(values.shape)} on the server and "
                    f"{list(mine[names[0]].shape)} here; give a model of the same shape"
                )
            for each in names:
                mine[each].copy_(values)  # tied ones are the same memory here, too, or should be
            theirs.update((name, *names))
    return sorted(pulled.tensors.keys() - theirs), sorted(mine.keys() - theirs)


def fresh_model(document: hook.Document) -> torch.nn.Module:
    """Modules as the names say, with parameters and buffers of the right shapes, all zero."""
    model = torch.nn.Module()
    for tensor in document.iter_tensors():
        if tensor.kind not in ("parameter", "buffer") or tensor.volatile:
            continue
        kind = getattr(torch, tensor.dtype.removeprefix("torch."))
        empty = torch.zeros(tensor.shape, dtype=kind)
        parameter = torch.nn.Parameter(empty, requires_grad=False)
        for name in (tensor.name, *tensor.aliases):
            *modules, last = name.split(".")
            owner = model
            for part in modules:
                if part not in owner._modules:
                    owner.add_module(part, torch.nn.Module())
                owner = owner._modules[part]
            if tensor.kind == "parameter":
                owner.register_parameter(last, parameter)
            else:
                owner.register_buffer(last, empty)
    return model


def main() -> int:
    parser = argparse.ArgumentParser(description="Pull a live server's weights into a torch model.")
    parser.add_argument("directory", help="the server's output directory, or a copy of it")
    parser.add_argument("slot", nargs="?", default="0")
    parser.add_argument("--via", help="mooncake, nixl, …; default: the first way that works")
    parser.add_argument("--address", help="HOST[:PORT] of the server's mooncake")
    parser.add_argument("--attempts", type=int, default=5)
    parser.add_argument("--save", metavar="FILE", help="write the model's state dictionary")
    options = parser.parse_args()
    began = time.perf_counter()
    try:
        slot = hook.open_slot(options.directory, options.slot)
        pulled = pull(slot, attempts=options.attempts, via=options.via, address=options.address)
        seconds = time.perf_counter() - began
        model = fresh_model(pulled.document)
        only_theirs, only_mine = load_into(model, pulled)
    except hook.HookError as error:
        print(f"pull_weights: {error}", file=sys.stderr)
        return 1
    if options.save:
        torch.save(model.state_dict(), options.save)
    print(
        json.dumps(
            {
                "content_generation": pulled.document.content_generation,
                "tensors": len(pulled),
                "bytes": pulled.size,
                "seconds": round(seconds, 3),
                "attempts": pulled.attempts,
                "only_on_the_server": only_theirs,
                "only_in_the_model": only_mine,
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
