"""The map that checks itself: what a check costs, whom it keeps waiting, how soon it finds."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from typing import Any

from sglang_weight_hook.layout import files
from sglang_weight_hook.layout.variables import DEFAULT_CHECK_SECONDS
from sglang_weight_hook.publisher import background, recorder
from sglang_weight_hook.publisher.background import THOROUGH_SECONDS
from sglang_weight_hook.reader import open_slot

from . import table
from .capturing import published
from .measure import Sample, side_by_side
from .models import make_model
from .streaming import COUNT, Bucket, _distribution
from .table import Line, Section

LARGEST = 3118
#: Of a core, with the default period; and the longest pause of another thread, in wall seconds.
SHARE, PAUSE = 0.001, 5e-3
#: Wall seconds until an unannounced move is published shortly after an event; of a check on demand.
SOON, ON_DEMAND = 0.5, 50e-3


def measure(quick: bool) -> Section:
    lines: list[Line] = []
    lines += _cost(quick)
    lines += _pauses(quick)
    lines += _finding(quick)
    return Section("Checking the map against memory", lines, HOW, LIMITS)


def _tracked(bucket: Bucket) -> Any:
    return recorder._tracked[id(bucket.runner)]


def _cost(quick: bool) -> list[Line]:
    with published():
        tracked = _tracked(bucket := Bucket(make_model(LARGEST)))
        found = side_by_side(
            {
                "quick": lambda: tracked.still_holds(False),
                "thorough": lambda: tracked.still_holds(True),
            },
            7 if quick else 31,
            clock=time.thread_time,
        )
        del bucket
    each, thorough = found["quick"], found["thorough"]
    often = each.median / DEFAULT_CHECK_SECONDS
    share = often + (thorough.median - each.median) / THOROUGH_SECONDS
    number = table.number(LARGEST)
    return [
        Line(f"a check, {number} tensors", table.timing(each), "", ""),
        Line("… that also looks for new tensors", table.timing(thorough), "", ""),
        Line(
            f"checking every {DEFAULT_CHECK_SECONDS:g} s, thoroughly every {THOROUGH_SECONDS:g} s",
            "",
            "one core",
            f"{share:.3%}",
            f"≤ {SHARE:.1%}",
            share <= SHARE,
        ),
    ]


class _Spinner(threading.Thread):
    """A thread that wants the interpreter all the time, and notes how long it did not have it."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.stopping = False
        self.gaps: list[float] = []

    def run(self) -> None:
        last = time.perf_counter()
        while not self.stopping:
            now = time.perf_counter()
            if now - last > 1e-3:
                self.gaps.append(now - last)
            last = now


def _pauses(quick: bool) -> list[Line]:
    """The longest pauses of a busy thread, with one check after the other and without."""
    lines = []
    with published():
        tracked = _tracked(bucket := Bucket(make_model(LARGEST)))
        worst: dict[str, list[float]] = {"with": [], "without": []}
        for _ in range(5 if quick else 21):
            for name in worst:
                spinner = _Spinner()
                spinner.start()
                end = time.perf_counter() + 0.4
                while time.perf_counter() < end:
                    if name == "with":
                        tracked.still_holds(True)
                    time.sleep(0.02)
                spinner.stopping = True
                spinner.join()
                worst[name].append(max(spinner.gaps, default=0.0))
        del bucket
    found = {name: Sample(values) for name, values in worst.items()}
    pause = found["with"].median
    lines.append(
        Line(
            "the longest pause of another thread while checks run, wall",
            table.seconds(pause),
            f"without checks {table.seconds(found['without'].median)}",
            f"worst {table.seconds(max(found['with'].values))}, "
            f"without {table.seconds(max(found['without'].values))}",
            f"≤ {table.seconds(PAUSE)}",
            pause <= PAUSE,
        )
    )
    return lines


def _finding(quick: bool) -> list[Line]:
    import torch

    soon, asked, later = [], [], []
    random_ = random.Random(1)
    with published(check_seconds=1.0, quiet_ms=50) as place:
        bucket = Bucket(make_model(COUNT))
        slot = open_slot(place, "0")
        weight = next(iter(bucket.runner.model.parameters()))

        def move() -> float:
            weight.data = torch.empty_like(weight.data)
            return time.monotonic()

        def published_at() -> float:
            while True:
                with open(os.path.join(place, files.LAYOUT.format("0")), "rb") as file:
                    layout = json.loads(file.read())
                if any(t["ptr"] == weight.data_ptr() for t in layout["tensors"].values()):
                    return time.monotonic()
                time.sleep(0.01)

        for _ in range(3 if quick else 20):
            bucket.session(1)
            time.sleep(random_.uniform(0.0, 0.4))
            moved = move()
            soon.append(published_at() - moved)
        for _ in range(3 if quick else 10):
            time.sleep(random_.uniform(0.0, 1.0))
            moved = move()
            later.append(published_at() - moved)
        for _ in range(20 if quick else 200):
            started = time.monotonic()
            slot.check()
            asked.append(time.monotonic() - started)
        assert background.is_running()
    return [
        _distribution(
            "from an unannounced move until the map says so, after an event, wall",
            Sample(soon),
            SOON,
        ),
        _distribution("… later, with a period of 1 s, wall", Sample(later), 1.0 + 0.1),
        _distribution(f"`check()`, {table.number(COUNT)} tensors, wall", Sample(asked), ON_DEMAND),
    ]


HOW = """\
A check is what the background thread does: in CPU time of the thread that does it. The share is
computed from the two kinds of checks and how often each comes by default. The pause is that of a
second thread that runs Python code without a break, while checks follow each other at once, which
they never do in a server. A move is another storage bound to a parameter without a call."""
LIMITS = """\
Every known tensor is asked for its address, shape, stride and type, in C without a loop in Python;
between these the thread offers the interpreter to others. A thread that has the interpreter is
asked to give it up after 5 ms (sys.getswitchinterval), so that is the longest anybody waits for
pure Python code, and a single pass in C over all tensors is shorter."""
