"""SGLang's own register-and-publish code over the same models; runs in SGLang's environment.

    python -m benchmarks.sglang_own ROUNDS COUNT [COUNT ...]

``register_memory_region_v1`` (srt/model_loader/remote_instance_weight_loader_utils.py) walks
the parameters, registers each with a transfer engine (which here does nothing) and returns the
dictionary that SGLang then publishes as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from . import baselines
from .capturing import Load, published
from .measure import side_by_side
from .models import make_model


class Engine:
    """A stand-in for the transfer engine, which needs an RDMA device."""

    def register_memory(self, address: int, size: int) -> int:
        return 0


def main() -> None:
    from sglang.srt.model_loader import remote_instance_weight_loader_utils as sglang_own

    rounds, counts = int(sys.argv[1]), list(map(int, sys.argv[2:]))
    found: dict[str, Any] = {}
    for count in counts:
        model = make_model(count)
        with published() as place:
            os.makedirs(place)
            load = Load(model)

            def own(model: Any = model) -> object:
                return baselines.dump(sglang_own.register_memory_region_v1(model, Engine()))

            samples = side_by_side({"hook": load, "sglang": own}, rounds, between=load.renew)
        found[str(count)] = {name: sample.values for name, sample in samples.items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
