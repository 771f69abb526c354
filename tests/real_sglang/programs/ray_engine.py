"""A program whose scheduler is an actor of Ray, on a machine without a GPU.

Run by the hooked interpreter:  ray_engine.py MODEL OTHER_MODEL

Ray is told of a GPU that is not there, or it would not place the actor.  Says when the engine
serves, then updates from the other checkpoint, says so, and ends.
"""

from __future__ import annotations

import json
import os
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

    # Ray holds what it is told of GPUs against this.
    os.environ["CUDA_VISIBLE_DEVICES"] = "0"
    import ray  # type: ignore[import-not-found, import-untyped, unused-ignore]

    def tell(what: str) -> None:
        print(json.dumps(what), file=answers, flush=True)
        sys.stdin.readline()

    ray.init(
        num_cpus=2,
        num_gpus=1,
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        object_store_memory=100 * 2**20,
    )
    from sglang.srt.ray.engine import (  # type: ignore[import-not-found, import-untyped, unused-ignore]
        RayEngine,
    )

    group = ray.util.placement_group([{"CPU": 1, "GPU": 1}])
    ray.get(group.ready())
    engine = RayEngine(model_path=model, placement_group=group, **SETTINGS)
    tell("serving")
    updated = engine.update_weights_from_disk(other)
    assert updated[0], updated
    tell("updated")
    ray.shutdown()


if __name__ == "__main__":
    main()
