"""Buckets of an update: one call, a whole sync, and how soon a reader knows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sglang_weight_hook.layout import files
from sglang_weight_hook.publisher import recorder

from . import baselines, table
from .capturing import Load, published
from .measure import Sample, ratios, side_by_side
from .models import Runner, make_model
from .table import Line, Section

COUNT = 1342
#: The prototype's update call against ours, and ours in CPU seconds.
CHEAPER, LIMIT = 20.0, 0.5e-3
#: CPU of the hook in a sync that takes a second, at this many buckets.
SYNC_SHARE, SYNC_SECONDS, SYNC_BUCKETS = 0.01, 1.0, 100
#: Wall seconds from the publication until a reader that waits has the new state.
WAKE = 10e-3


class Bucket:
    """``update_weights_from_tensor`` of a settled runner, without the writing itself."""

    def __init__(self, model: Any) -> None:
        self.runner = Runner(model)
        load = Load(model)
        load._runner = self.runner
        load()
        settle = recorder.begin("scheduler_ready", "settle")
        recorder.finish(settle, None, None)

    def __call__(self) -> None:
        event = recorder.begin("update_weights_from_tensor", "stream", [self.runner])
        recorder.finish(event, (True, "Succeeded."), None)

    def session(self, buckets: int) -> None:
        """``begin_weight_update``, the buckets, ``end_weight_update`` (SGLang >= 0.5.21)."""
        for effect, calls in (("open", 1), ("stream", buckets), ("close", 1)):
            for _ in range(calls):
                event = recorder.begin("weight_update_session", effect, [self.runner])
                recorder.finish(event, (True, "Succeeded."), None)


def replace_two_files(place: str) -> None:
    """What the kernel takes for the two state files, when Python does nothing else."""
    target, temporary = os.path.join(place, "state"), os.path.join(place, ".state")
    for _ in range(2):
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        descriptor = os.open(temporary, flags, 0o644)
        os.write(descriptor, b" " * 900)
        os.close(descriptor)
        os.rename(temporary, target)


def look_at(tensors: list[Any]) -> list[int]:
    """The addresses of a given list of tensors."""
    return [tensor.data_ptr() for tensor in tensors]


def measure(quick: bool) -> Section:
    lines: list[Line] = []
    model = make_model(COUNT)
    prototype = baselines.prototype()
    with published() as place:
        bucket = Bucket(model)
        tensors = list(model.parameters())
        subjects: dict[str, Callable[[], object]] = {
            "hook": bucket,
            "addresses": lambda: look_at(tensors),
            "files": lambda: replace_two_files(place),
        }
        if prototype is not None:
            subjects["prototype"] = prototype.runner(model).update_weights_metadata
        rounds = 7 if quick else 41
        found = side_by_side(subjects, rounds, each=5)
        lines += _one_call(found)
        lines += _sync(bucket, quick)
        ready, woken = _readable(bucket, place, quick)
        lines += [
            _distribution("from the update's return until its state is readable, wall", ready),
            _distribution("… until `wait_for_change` has it in another process", woken, WAKE),
        ]
    return Section("Buckets of an update, when nothing moves", lines, HOW, LIMITS)


def _one_call(found: dict[str, Sample]) -> list[Line]:
    hook = found["hook"]
    what = f"an update call, {table.number(COUNT)} tensors"
    floor = Sample([a + b for a, b in zip(found["addresses"].values, found["files"].values)])
    above = ratios(hook, floor)
    lines = [
        Line(
            what,
            table.timing(hook),
            f"addresses alone {table.seconds(found['addresses'].median)} + two files replaced "
            f"{table.seconds(found['files'].median)}",
            f"{table.seconds(hook.median)}; {table.times(above)}",
            f"≤ {table.seconds(LIMIT)}",
            hook.median <= LIMIT,
        )
    ]
    if "prototype" not in found:
        return [*lines, Line(what, table.timing(hook), baselines.NOT_GIVEN, "")]
    cheaper = ratios(found["prototype"], hook)
    return [
        *lines,
        Line(
            what,
            table.timing(hook),
            f"prototype {table.timing(found['prototype'])}",
            f"{cheaper.median:.1f} x cheaper ±{cheaper.spread:.0%}",
            f"≥ {CHEAPER:g} x cheaper",
            cheaper.median >= CHEAPER,
        ),
    ]


def _sync(bucket: Bucket, quick: bool) -> list[Line]:
    lines = []
    for buckets in (SYNC_BUCKETS, 10 * SYNC_BUCKETS):

        def one_by_one(buckets: int = buckets) -> None:
            for _ in range(buckets):
                bucket()

        def in_a_session(buckets: int = buckets) -> None:
            bucket.session(buckets)

        rounds = 3 if quick else 11 if buckets == SYNC_BUCKETS else 5
        found = side_by_side({"calls": one_by_one, "session": in_a_session}, rounds)
        for name, how in (("calls", "call by call"), ("session", "in one session")):
            share = found[name].median / SYNC_SECONDS
            due = buckets == SYNC_BUCKETS
            lines.append(
                Line(
                    f"a sync of {table.number(buckets)} buckets, {how}",
                    table.timing(found[name]),
                    f"a sync of {SYNC_SECONDS:g} s",
                    f"{share:.2%}",
                    f"≤ {SYNC_SHARE:.0%}" if due else "",
                    share <= SYNC_SHARE if due else None,
                )
            )
    return lines


# The reader is another process, as readers are; both clocks are the machine's monotonic one.
_READER = """
import sys, time
import sglang_weight_hook as hook
slot = hook.open_slot(sys.argv[1], "0")
state = slot.read_state()
print("ready", flush=True)
while True:
    found = slot.wait_for_change(state, 20.0)
    if found["state"] == "ready" and found != state:
        print(found["content_generation"], time.monotonic(), flush=True)
    state = found
"""


def _readable(bucket: Bucket, place: str, quick: bool) -> tuple[Sample, Sample]:
    """Buckets at a leisurely pace, seen by a reader that waits for each."""
    root = str(Path(__file__).resolve().parents[1])
    reader = subprocess.Popen(
        [sys.executable, "-c", _READER, place],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert reader.stdout is not None
    ready, woken = [], []
    try:
        reader.stdout.readline()
        for _ in range(30 if quick else 300):
            time.sleep(0.05)
            event = recorder.begin("update_weights_from_tensor", "stream", [bucket.runner])
            returned = time.monotonic()
            recorder.finish(event, (True, "Succeeded."), None)
            done = time.monotonic()
            with open(os.path.join(place, files.STATE.format("0")), "rb") as file:
                generation = json.loads(file.read())["content_generation"]
            seen, at = reader.stdout.readline().split()
            while int(seen) != generation:
                seen, at = reader.stdout.readline().split()
            ready.append(done - returned)
            woken.append(float(at) - returned)
    finally:
        reader.kill()
        reader.communicate()
    return Sample(ready), Sample(woken)


def _distribution(what: str, sample: Sample, limit: float = 0.0) -> Line:
    typical = sample.quantile(0.9)
    return Line(
        what,
        f"{table.seconds(sample.median)} n={sample.n}",
        "",
        f"90 % {table.seconds(typical)}, 99 % {table.seconds(sample.quantile(0.99))}, "
        f"worst {table.seconds(max(sample.values))}",
        f"90 % ≤ {table.seconds(limit)}" if limit else "",
        typical <= limit if limit else None,
    )


HOW = """\
The recorder's `begin` and `finish` around an update that writes nothing, so that only the hook is
measured: the lock, the state file twice, and the check whether anything has moved. The prototype's
part is its `update_weights_metadata`. The floor asks a given list of the model's tensors for their
addresses and replaces two files of 900 bytes. A session is `begin_weight_update` …
`end_weight_update` (SGLang ≥ 0.5.21). The reader of the last rows is another process; times are
wall, from the return of SGLang's method."""
LIMITS = """\
No tensor may be kept alive, and none may be missed that was bound anew: so each bucket asks every
module that holds something (by weak reference) for its dictionaries, and every tensor for its
address, shape, stride and type, all in C without a loop in Python. The bare addresses are a twelfth
of that check, the other properties of a tensor two fifths, the dictionaries half; the two renames
are a tenth of the call. The 0.5 ms and the twentieth of the prototype would need a check that skips
tensors, and so misses changes in them. What does help is a session: buckets inside it cost nothing
but their two calls. Its end walks every attribute of every module once, 3 355 of them here and some
2 µs each, in case SGLang has made tensors that no bucket had; that is why a hundred buckets and a
thousand differ so little.
On ext4 a rename over an existing file starts its write-back, which a state file waits for, up to
milliseconds on a busy disk; on a tmpfs one takes 20 µs, so that is the place for the directory.
The wall times are those of a process that has just slept, with cold caches and a machine shared
with others."""
