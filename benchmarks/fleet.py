"""One directory with many slots: the reader's commands over 8 nodes of 8 GPUs."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator

from sglang_weight_hook import reader
from sglang_weight_hook.commands.render import page
from sglang_weight_hook.layout import files
from sglang_weight_hook.publisher import publish
from sglang_weight_hook.reader import totals, verify, watch

from . import table
from .capturing import Load, published
from .measure import Sample, fit, side_by_side
from .models import make_model
from .table import Line, Section

TENSORS = 1342
NODES, GPUS = 8, 8
SLOTS = NODES * GPUS
STEPS = (8, 16, 32, SLOTS)
RESIDUAL = 0.25


def measure(quick: bool) -> Section:
    with directory() as place:
        names = sorted(slot.name for slot in reader.open_directory(place).slots())
        assert len(names) == SLOTS

        def report(count: int) -> None:
            documents = [reader.open_slot(place, name).read() for name in names[:count]]
            totals.together(totals.per_gpu(documents))

        def check(count: int) -> None:
            for name in names[:count]:
                verify.verify_slot(reader.open_slot(place, name))

        lines = []
        for what, work in (("report", report), ("verify", check)):
            subjects = {str(n): (lambda n=n, work=work: work(n)) for n in STEPS}
            found = side_by_side(subjects, 2 if quick else 5)
            line = fit([(n, found[str(n)].median) for n in STEPS])
            lines.append(
                Line(
                    f"{what}, {SLOTS} slots of {table.number(TENSORS)} tensors",
                    table.timing(found[str(SLOTS)]),
                    f"{table.seconds(line.slope)} a slot",
                    f"{line.residual:.0%} off a straight line at most",
                    f"≤ {RESIDUAL:.0%}",
                    line.residual <= RESIDUAL,
                )
            )
        lines.append(_watch(place, names, quick))
        lines.append(_page(place, names, quick))
        return Section(f"A directory with {SLOTS} slots", lines, HOW, LIMITS)


def _watch(place: str, names: list[str], quick: bool) -> Line:
    """From the replacement of one state file among all to the watcher's wake-up."""
    waits = []
    with watch.DirectoryWatch(place) as watcher:
        for number in range(20 if quick else 200):
            path = os.path.join(place, files.STATE.format(names[number % SLOTS]))
            with open(path, "rb") as file:
                data = file.read()
            while watcher.wait(0.0):
                pass
            started = time.perf_counter()
            publish.write_whole(path, data)
            assert watcher.wait(1.0)
            waits.append(time.perf_counter() - started)
    sample = Sample(waits)
    return Line(
        f"watch, {SLOTS} slots: a replaced file until the wake-up, wall",
        f"{table.seconds(sample.median)} n={sample.n}",
        "the replacement itself is in it",
        f"99 % {table.seconds(sample.quantile(0.99))}",
    )


def _page(place: str, names: list[str], quick: bool) -> Line:
    """From read documents to the finished HTML, in memory."""
    documents = [reader.open_slot(place, name).read().raw for name in names]
    waits, size = [], 0
    for _ in range(2 if quick else 5):
        started = time.perf_counter()
        size = len(page.page(documents).encode())
        waits.append(time.perf_counter() - started)
    sample = Sample(waits)
    return Line(
        f"plot, {SLOTS} slots of {table.number(TENSORS)} tensors: the page",
        f"{table.seconds(sample.median)} n={sample.n}",
        f"{size / 1e6:.1f} MB of HTML",
        "the documents were read before",
    )


@contextlib.contextmanager
def directory() -> Iterator[str]:
    """64 slots as 8 nodes publish them into one shared directory."""
    with published() as place:
        load = Load(make_model(TENSORS))
        load()
        documents = {}
        for name in files.DOCUMENTS:
            path = os.path.join(place, name.format("0"))
            if os.path.exists(path):
                with open(path, "rb") as file:
                    documents[name] = json.loads(file.read())
        for node in range(NODES):
            for gpu in range(GPUS):
                slot = f"{gpu}.node{node}"
                for name, content in documents.items():
                    if name in (files.LAYOUT, files.STATE):
                        content = _as_of(content, f"node{node}", gpu, slot)
                    path = os.path.join(place, name.format(slot))
                    publish.write_whole(path, publish.encode(content, name != files.LAYOUT))
        for name in (*files.DOCUMENTS, files.OWNER_LOCK, files.SAVING_LOCK):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(place, name.format("0")))
        yield place


def _as_of(content: dict[str, object], host: str, gpu: int, slot: str) -> dict[str, object]:
    changed = json.loads(json.dumps(content))
    if "identity" in changed:
        changed["identity"].update(hostname=host, gpu_id=gpu)
    else:
        changed.update(hostname=host, slot=slot)
    return dict(changed)


HOW = """\
The documents of one real publication, written 64 times under the names of 8 hosts with 8 GPUs
each. `report` reads all and sums them (`totals.per_gpu`), `verify` runs every check of
`verify_slot`; each over 8, 16, 32 and 64 slots for the straight line. `watch` is the time from a
replaced file to the wake-up."""
LIMITS = """\
`report` is the parse of the JSON (64 files) and one object for each tensor. `verify` looks at
every field of every tensor against its schema and adjacent tensors, in Python. Neither keeps
anything from one slot to the next, hence the straight line."""
