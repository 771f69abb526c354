"""What buckets cost through the recorder, with as many CUDA tensors as DeepSeek-V3 has.

    PY -m tests.gpu.stream_costs

One process, no server; prints one line of JSON.  Milliseconds unless the name says otherwise;
``cpu`` is the whole process's, the hook's thread included.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

COUNT = 1342
QUIET = 0.05  # seconds: the default


def main() -> None:
    place = Path(tempfile.mkdtemp(prefix="hook-streams-"))
    os.environ["SGLANG_WEIGHT_HOOK_DIR"] = str(place)
    import torch

    from benchmarks.models import make_model
    from sglang_weight_hook.publisher import background, recorder
    from tests.unit.fake_sglang import FakeRunner, load, settle

    with torch.device("cuda"):
        model = make_model(COUNT)
    runner = FakeRunner(model, gpu_id=0, device="cuda")
    load(runner)
    settle()

    def state() -> Any:
        return json.loads((place / "weight_state_0.json").read_bytes())

    def bucket() -> None:
        begun = recorder.begin("update_weights_from_tensor", "stream", [runner])
        recorder.finish(begun, (True, "Succeeded."), None)

    def ended() -> float:
        """When the state was ready again (time.perf_counter)."""
        while True:
            if state()["state"] == "ready":
                return time.perf_counter()
            time.sleep(0.0005)

    time.sleep(9)  # the looks after the load are over: the next is 10 s after the last
    found: dict[str, Any] = {
        "tensors": len(json.loads((place / "weight_layout_0.json").read_bytes())["tensors"]),
        "device": torch.cuda.get_device_name(0),
    }
    first, further = [], []
    for _ in range(20):
        started = time.perf_counter()
        bucket()
        first.append(time.perf_counter() - started)
        for _ in range(20):
            started = time.perf_counter()
            bucket()
            further.append(time.perf_counter() - started)
        ended()
    found["first_bucket_us"] = _us(first)
    found["further_bucket_us"] = _us(further)
    for buckets in (100, 1000):
        walls, cpus, ends, generations = [], [], [], []
        for _ in range(7):
            before = state()["content_generation"]
            cpu, started = time.process_time(), time.perf_counter()
            for _ in range(buckets):
                bucket()
            last = time.perf_counter()
            walls.append(last - started)
            time.sleep(QUIET * 0.8)
            ends.append(ended() - last - QUIET)
            cpus.append(time.process_time() - cpu)
            generations.append(state()["content_generation"] - before)
        found[f"{buckets}_buckets"] = _ms(walls)
        found[f"{buckets}_buckets_cpu_with_the_end"] = _ms(cpus)
        found[f"{buckets}_buckets_end_beyond_quiet"] = _ms(ends)
        found[f"generations_of_{buckets}_buckets"] = max(generations)
    # A bucket that moves something: the thread captures and publishes all, in the device's terms.
    ends = []
    for _ in range(7):
        bucket()
        weight = model.lm_head.weight
        weight.data = torch.empty_like(weight)
        last = time.perf_counter()
        time.sleep(QUIET)
        ends.append(ended() - last - QUIET)
    found["end_of_a_stream_that_moved_a_tensor"] = _ms(ends)
    layout = json.loads((place / "weight_layout_0.json").read_bytes())
    assert layout["tensors"]["lm_head.weight"]["ptr"] == model.lm_head.weight.data_ptr()
    assert {region["allocation_source"] for region in layout["regions"]} == {"driver"}
    background.stop()
    print(json.dumps(found))


def _us(seconds: list[float]) -> float:
    return round(statistics.median(seconds) * 1e6, 1)


def _ms(seconds: list[float]) -> float:
    return round(statistics.median(seconds) * 1e3, 3)


if __name__ == "__main__":
    main()
