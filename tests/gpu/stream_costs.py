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


class Publisher:
    """A model on the GPU, published by the real recorder in this process."""

    def __init__(self, place: Path) -> None:
        os.environ["SGLANG_WEIGHT_HOOK_DIR"] = str(place)
        import torch

        from benchmarks.models import make_model
        from sglang_weight_hook.publisher import recorder
        from tests.unit.fake_sglang import FakeRunner, load, settle

        with torch.device("cuda"):
            self.model = make_model(COUNT)
        self._place, self._recorder = place, recorder
        self._runner = FakeRunner(self.model, gpu_id=0, device="cuda")
        load(self._runner)
        settle()

    def state(self) -> Any:
        return json.loads((self._place / "weight_state_0.json").read_bytes())

    def layout(self) -> Any:
        return json.loads((self._place / "weight_layout_0.json").read_bytes())

    def bucket(self) -> None:
        begun = self._recorder.begin("update_weights_from_tensor", "stream", [self._runner])
        self._recorder.finish(begun, (True, "Succeeded."), None)

    def ended(self) -> float:
        """When the state was ready again (time.perf_counter)."""
        while True:
            if self.state()["state"] == "ready":
                return time.perf_counter()
            time.sleep(0.0005)


def main() -> None:
    publisher = Publisher(Path(tempfile.mkdtemp(prefix="hook-streams-")))
    import torch

    from sglang_weight_hook.publisher import background

    time.sleep(9)  # the looks after the load are over: the next is 10 s after the last
    found: dict[str, Any] = {
        "tensors": len(publisher.layout()["tensors"]),
        "device": torch.cuda.get_device_name(0),
        **single_buckets(publisher),
    }
    for buckets in (100, 1000):
        found.update(streams(publisher, buckets))
    found["end_of_a_stream_that_moved_a_tensor"] = moving_streams(publisher)
    layout = publisher.layout()
    assert layout["tensors"]["lm_head.weight"]["ptr"] == publisher.model.lm_head.weight.data_ptr()
    assert {region["allocation_source"] for region in layout["regions"]} == {"driver"}
    background.stop()
    print(json.dumps(found))


def single_buckets(publisher: Publisher) -> dict[str, float]:
    """What the first bucket of a stream costs, and each further one."""
    first, further = [], []
    for _ in range(20):
        started = time.perf_counter()
        publisher.bucket()
        first.append(time.perf_counter() - started)
        for _ in range(20):
            started = time.perf_counter()
            publisher.bucket()
            further.append(time.perf_counter() - started)
        publisher.ended()
    return {"first_bucket_us": _us(first), "further_bucket_us": _us(further)}


def streams(publisher: Publisher, buckets: int) -> dict[str, Any]:
    """What a stream of so many buckets costs, with its end and without."""
    walls, cpus, ends, generations = [], [], [], []
    for _ in range(7):
        before = publisher.state()["content_generation"]
        cpu, started = time.process_time(), time.perf_counter()
        for _ in range(buckets):
            publisher.bucket()
        last = time.perf_counter()
        walls.append(last - started)
        time.sleep(QUIET * 0.8)
        ends.append(publisher.ended() - last - QUIET)
        cpus.append(time.process_time() - cpu)
        generations.append(publisher.state()["content_generation"] - before)
    return {
        f"{buckets}_buckets": _ms(walls),
        f"{buckets}_buckets_cpu_with_the_end": _ms(cpus),
        f"{buckets}_buckets_end_beyond_quiet": _ms(ends),
        f"generations_of_{buckets}_buckets": max(generations),
    }


def moving_streams(publisher: Publisher) -> Any:
    """A bucket that moves something: the thread captures and publishes all, as on any GPU."""
    import torch

    ends = []
    for _ in range(7):
        publisher.bucket()
        weight = publisher.model.lm_head.weight
        weight.data = torch.empty_like(weight)
        last = time.perf_counter()
        time.sleep(QUIET)
        ends.append(publisher.ended() - last - QUIET)
    return _ms(ends)


def _us(seconds: list[float]) -> float:
    return round(statistics.median(seconds) * 1e6, 1)


def _ms(seconds: list[float]) -> float:
    return round(statistics.median(seconds) * 1e3, 3)


if __name__ == "__main__":
    main()
