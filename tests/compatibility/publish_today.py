"""Publishes with today's recorder, one step a line of standard input, and says what is true.

Run with the repository and ``tests/unit`` on the path.  After each step one line of JSON: torch's
own word for every tensor of the model, by name.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from fake_sglang import FakeRunner, event, load, settle, stream, update
from small_model import Model, Pool, torch

MEMORY = {"tags": ["weights"], "physical": True}


def move(runner: Any) -> None:
    weight = runner.model.layers[0].mlp.weight
    kept.append(weight.data)  # so that its address is not used again
    update(runner, during=lambda: setattr(weight, "data", torch.ones(6, 6)))


def fail(runner: Any) -> None:
    event("update_weights_from_disk", "update", [runner], result=(False, "no such directory"))


def session(runner: Any) -> None:
    event("weight_update_session", "open", [runner])
    stream(runner)
    event("weight_update_session", "close", [runner])


STEPS = {
    "load": load,
    "settle": lambda runner: settle(),
    "update": update,
    "move": move,
    "stream": stream,
    "session": session,
    "fail": fail,
    "release": lambda runner: event("release_memory_occupation", "release", details=MEMORY),
    "resume": lambda runner: event("resume_memory_occupation", "resume", details=MEMORY),
}
kept: list[Any] = []


def truth(model: Any) -> dict[str, Any]:
    found = dict(model.named_parameters())
    for number, layer in enumerate(model.layers):
        for name in ("w_kc", "w_vc"):
            found[f"layers.{number}.self_attn.{name}"] = getattr(layer.self_attn, name)
    return {
        name: {
            "ptr": 0 if tensor.is_meta else tensor.data_ptr(),
            "size": tensor.numel() * tensor.element_size(),
            "dtype": str(tensor.dtype),
            "shape": list(tensor.shape),
            "stride": list(tensor.stride()),
            "resident": not tensor.is_meta,
        }
        for name, tensor in found.items()
    }


def main() -> None:
    runner = FakeRunner(Model())
    runner.token_to_kv_pool = Pool()  # type: ignore[attr-defined]
    for line in sys.stdin:
        STEPS[line.strip()](runner)
        print(json.dumps(truth(runner.model)), flush=True)


if __name__ == "__main__":
    main()
