"""Memory: what the serving process grows by, and what is kept alive."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

from . import table
from .measure import resident
from .table import Line, Section

COUNTS = (3118, 100_000)
#: Bytes that one tensor may cost for good.
TARGET = 4096


def measure(quick: bool) -> Section:
    lines: list[Line] = []
    for count in COUNTS:
        # A process of its own: what an earlier one has freed would hide what this one takes.
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.residence", str(count)],
            cwd=Path(__file__).resolve().parents[1],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        found = json.loads(done.stdout)
        each = found["grown"] / count
        lines += [
            Line(
                f"resident memory added, {table.number(count)} tensors",
                table.size(found["grown"]),
                f"the model's module tree {table.size(found['model'])}",
                f"{each:.0f} B a tensor; {found['peak'] / count:.0f} at the peak of a publication",
                f"≤ {TARGET} B a tensor",
                each <= TARGET,
            ),
            Line(
                f"objects kept for {table.number(count)} tensors",
                f"{table.number(found['objects'])} that the collector walks",
                f"the model {table.number(found['model_objects'])}",
                f"{found['objects'] / count:.2f} a tensor; tensors kept alive: {found['kept']}",
                "0 tensors",
                found["kept"] == 0,
            ),
        ]
    return Section("Memory of the serving process", lines, HOW, LIMITS)


def _inside(count: int) -> dict[str, Any]:
    from .capturing import Load, published
    from .models import make_model

    with published():
        Load(make_model(10))()  # imports, buffers
        gc.collect()
        before, objects = resident(), len(gc.get_objects())
        model = make_model(count)
        gc.collect()
        with_model, model_objects = resident(), len(gc.get_objects())
        load = Load(model)
        load()
        peak = _peak()
        gc.collect()
        after, all_objects = resident(), len(gc.get_objects())
        # No tensor outlives its model for us, and no runner does.
        names = [name for name, _ in model.named_parameters()]
        watched = [weakref.ref(tensor) for tensor in model.parameters()]
        del model
        load._model = None
        load._runner.model = None
        gc.collect()
        kept = sum(reference() is not None for reference in watched)
        assert names
    return {
        "model": with_model - before,
        "grown": after - with_model,
        "peak": peak - with_model,
        "model_objects": model_objects - objects,
        "objects": all_objects - model_objects,
        "kept": kept,
    }


def _peak() -> int:
    """The most that was ever resident in this process, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


HOW = """\
In a process of its own: resident memory (`/proc/self/statm`) and the collector's objects before
and after one load of the model, and how many of the model's parameters are alive after the model
is dropped while the hook still tracks the runner. The peak is the process's, while the
documents were made."""
LIMITS = """\
Kept for each tensor: its name, one row of twelve fields, two lists and the integers in them;
that is what the next comparison needs, and about twice the bytes of the layout file. The peak
adds the documents and their JSON. The allocator keeps part of the peak, which counts as grown."""

if __name__ == "__main__":
    print(json.dumps(_inside(int(sys.argv[1]))))
