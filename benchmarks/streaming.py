"""Buckets of an update: a further one, a whole sync, and how soon a reader knows."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Any

from sglang_weight_hook.layout import files
from sglang_weight_hook.layout.variables import DEFAULT_QUIET_MS
from sglang_weight_hook.publisher import recorder, settings

from . import baselines, table
from .capturing import Load, published
from .measure import Sample, ratios, side_by_side
from .models import Runner, make_model
from .table import Line, Section

COUNT = 1342
#: CPU seconds of SGLang's thread for a further bucket.
LIMIT = 30e-6
#: CPU of SGLang's thread in a sync that takes a second, by the number of its buckets.
SYNC_SECONDS = 1.0
SYNC_SHARES = {100: 0.005, 1000: 0.03}
#: Wall seconds from the last bucket's return until the state is ready, beyond the quiet time; and
#: where SGLang says which bucket is the last.
AFTER_QUIET, AFTER_LAST = 20e-3, 10e-3


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
        begun = recorder.begin("update_weights_from_tensor", "stream", [self.runner])
        recorder.finish(begun, (True, "Succeeded."), None)

    def requested(self, is_last: bool = False) -> None:
        """The same inside the scheduler's own method, as a server calls it."""
        request = recorder.begin_request({"is_last": is_last})
        self()
        recorder.finish_request(request, None, None)

    def session(self, buckets: int) -> None:
        """``begin_weight_update``, the buckets, ``end_weight_update`` (SGLang >= 0.5.21)."""
        for effect, calls in (("open", 1), ("stream", buckets), ("close", 1)):
            for _ in range(calls):
                begun = recorder.begin("weight_update_session", effect, [self.runner])
                recorder.finish(begun, (True, "Succeeded."), None)

    def wait(self, place: str) -> float:
        """Until the state is ready; the time of that (time.monotonic)."""
        while True:
            with open(os.path.join(place, files.STATE.format("0")), "rb") as file:
                if json.loads(file.read())["state"] == "ready":
                    return time.monotonic()
            time.sleep(0.0005)


def measure(quick: bool) -> Section:
    lines: list[Line] = []
    model = make_model(COUNT)
    prototype = baselines.prototype()
    with published(quiet_ms=60_000) as place:
        bucket = Bucket(model)
        bucket()
        subjects: dict[str, Callable[[], object]] = {
            "hook": bucket,
            "request": bucket.requested,
        }
        if prototype is not None:
            subjects["prototype"] = prototype.runner(model).update_weights_metadata
        rounds = 7 if quick else 41
        found = side_by_side(subjects, rounds, each=200, clock=time.thread_time)
        lines += _further(found)
    with published(quiet_ms=0) as place:
        single = Bucket(model)
        found = side_by_side({"hook": single}, rounds, each=5, clock=time.thread_time)
        what = "a bucket where each ends its own stream (QUIET_MS=0)"
        lines.append(Line(what, table.timing(found["hook"]), "", ""))
    with published(quiet_ms=DEFAULT_QUIET_MS) as place:
        bucket = Bucket(model)
        lines += _sync(bucket, place, quick)
        lines += _readable(bucket, place, quick)
    return Section("Buckets of an update, when nothing moves", lines, HOW, LIMITS)


def _further(found: dict[str, Sample]) -> list[Line]:
    lines = []
    for name, what in (
        ("hook", f"a further bucket of a stream, {table.number(COUNT)} tensors"),
        ("request", "… inside the scheduler's own method"),
    ):
        sample = found[name]
        against, figure = "", table.seconds(sample.median)
        if "prototype" in found:
            cheaper = ratios(found["prototype"], sample)
            against = f"prototype {table.timing(found['prototype'])}"
            figure += f"; {cheaper.median:.0f} x cheaper ±{cheaper.spread:.0%}"
        due = name == "hook"
        met = sample.median <= LIMIT if due else None
        limit = f"≤ {table.seconds(LIMIT)}" if due else ""
        lines.append(Line(what, table.timing(sample), against, figure, limit, met))
    return lines


def _sync(bucket: Bucket, place: str, quick: bool) -> list[Line]:
    lines = []
    for buckets, limit in SYNC_SHARES.items():

        def one_by_one(buckets: int = buckets) -> None:
            for _ in range(buckets):
                bucket()

        def in_a_session(buckets: int = buckets) -> None:
            bucket.session(buckets)

        def between() -> None:
            bucket.wait(place)

        rounds = 3 if quick else 11
        subjects = {"calls": one_by_one, "session": in_a_session}
        found = side_by_side(subjects, rounds, between=between, clock=time.thread_time)
        for name, how in (("calls", "call by call"), ("session", "in one session")):
            share = found[name].median / SYNC_SECONDS
            lines.append(
                Line(
                    f"a sync of {table.number(buckets)} buckets, {how}",
                    table.timing(found[name]),
                    f"a sync of {SYNC_SECONDS:g} s",
                    f"{share:.2%}",
                    f"≤ {limit:.1%}" if name == "calls" else "",
                    share <= limit if name == "calls" else None,
                )
            )
    return lines


def _readable(bucket: Bucket, place: str, quick: bool) -> list[Line]:
    """From the last bucket's return until the state file says ``ready``."""
    quiet = settings.load().quiet_seconds
    waits: dict[bool, list[float]] = {False: [], True: []}
    for number in range(40 if quick else 200):
        is_last = bool(number % 2)
        for _ in range(3):
            bucket.requested()
        bucket.requested(is_last)
        returned = time.monotonic()
        waits[is_last].append(bucket.wait(place) - returned)
        time.sleep(0.02)
    return [
        _distribution(
            f"from the last bucket's return until `ready`, {quiet * 1000:g} ms quiet time, wall",
            Sample(waits[False]),
            quiet + AFTER_QUIET,
        ),
        _distribution("… where SGLang says that it was the last", Sample(waits[True]), AFTER_LAST),
    ]


def _distribution(what: str, sample: Sample, limit: float) -> Line:
    typical = sample.quantile(0.9)
    return Line(
        what,
        f"{table.seconds(sample.median)} n={sample.n}",
        "",
        f"90 % {table.seconds(typical)}, 99 % {table.seconds(sample.quantile(0.99))}, "
        f"worst {table.seconds(max(sample.values))}",
        f"90 % ≤ {table.seconds(limit)}",
        typical <= limit,
    )


HOW = """\
The recorder's `begin` and `finish` around an update that writes nothing, so that only the hook is
measured, in CPU time of the thread that SGLang calls it on. The prototype's part is its
`update_weights_metadata`. A session is `begin_weight_update` … `end_weight_update`
(SGLang ≥ 0.5.21). The last rows are wall time, seen by polling the state file every half
millisecond."""
LIMITS = """\
A further bucket takes the recorder's mutex twice, finds its runner and counts: nothing is looked at
and nothing is written before the stream ends. What each bucket cost when it ended its own stream is
the row with QUIET_MS=0. A session's end walks every attribute of every module once, some 2 µs each,
in case SGLang has made tensors that no bucket had. On ext4 a rename over an existing file starts
its write-back, which a state file waits for, up to milliseconds on a busy disk; a tmpfs takes
20 µs, so that is the place for the directory."""
