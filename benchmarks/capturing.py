"""Capture and publication after a load."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cpu_sglang.environment import ensure_environment
from sglang_weight_hook.layout import location, variables
from sglang_weight_hook.publisher import background, recorder, settings

from . import baselines, table
from .measure import Sample, fit, ratios, side_by_side
from .models import COUNTS, Runner, make_model
from .table import Line, Section

ROOT = Path(__file__).resolve().parents[1]

#: Of the floor and one orjson dump of it.
TARGET = 1.5
#: At least so many times faster than the prototype, at this many tensors.
FASTER, FASTER_AT = 5.0, 3118
#: How far a point may lie from the straight line through all.
RESIDUAL = 0.25


@contextlib.contextmanager
def published(check_seconds: float = 0.0, quiet_ms: float = 0.0) -> Iterator[str]:
    """An output directory, where both the hook and the prototype write; the current one.

    ``check_seconds``, ``quiet_ms``: as in the environment; by default without the thread.
    """
    before = os.getcwd()
    names = (location.DIRECTORY, variables.CHECK_SECONDS, variables.QUIET_MS)
    kept = {name: os.environ.get(name) for name in names}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as place:
        os.chdir(place)
        os.environ[location.DIRECTORY] = os.path.join(place, "maps")
        os.environ[variables.CHECK_SECONDS] = str(check_seconds)
        os.environ[variables.QUIET_MS] = str(quiet_ms)
        settings._base = settings._settings = None
        try:
            yield os.environ[location.DIRECTORY]
        finally:
            background.stop()
            recorder._after_fork_in_child()  # forget every runner, let go of every lock
            os.chdir(before)
            for name, value in kept.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value
            settings._base = settings._settings = None


class Load:
    """``load_model`` of one runner after another, all with the same model."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._runner = Runner(model)

    def renew(self) -> None:
        """Another runner; the last one's slot is given up."""
        self._runner = Runner(self._model)

    def __call__(self) -> None:
        event = recorder.begin("load_model", "load", [self._runner])
        recorder.finish(event, None, None)


def rounds_for(count: int, quick: bool) -> int:
    if quick:
        return 5 if count <= 10_000 else 2
    return 25 if count <= 10_000 else 5


def measure(quick: bool) -> Section:
    prototype = baselines.prototype()
    lines: list[Line] = []
    points: list[tuple[float, float]] = []
    for count in COUNTS:
        model = make_model(count)
        with published() as place:
            os.makedirs(place)
            load = Load(model)

            def floor(model: Any = model) -> object:
                return baselines.dump(baselines.floor(model))

            subjects: dict[str, Callable[[], object]] = {"hook": load, "floor": floor}
            if prototype is not None:
                subjects["prototype"] = prototype.runner(model)._register_weight_hooks
            found = side_by_side(subjects, rounds_for(count, quick), between=load.renew)
        points.append((count, found["hook"].median))
        lines += _lines(count, found)
    line = fit(points)
    lines.append(
        Line(
            "linear?",
            f"{table.seconds(line.fixed)} + {table.seconds(line.slope)} a tensor",
            "a straight line",
            f"{line.residual:.0%} off at most",
            f"≤ {RESIDUAL:.0%}",
            line.residual <= RESIDUAL,
        )
    )
    lines += _beside_sglang(quick)
    return Section("Capture and publish after a load", lines, HOW, LIMITS)


def _beside_sglang(quick: bool) -> list[Line]:
    """SGLang's own register-and-publish code, in SGLang's environment."""
    environment = ensure_environment()
    counts = [str(count) for count in COUNTS if count <= 10_000]
    done = subprocess.run(
        [str(environment.python), "-m", "benchmarks.sglang_own", "5" if quick else "25", *counts],
        cwd=ROOT,
        env=environment.env(python_path=[str(ROOT)]),
        stdout=subprocess.PIPE,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    lines = []
    for count in counts:
        hook, own = (Sample(found[count][name]) for name in ("hook", "sglang"))
        lines.append(
            Line(
                f"{table.number(int(count))} tensors",
                table.timing(hook),
                f"SGLang's register_memory_region_v1 + dump {table.timing(own)}",
                table.times(ratios(hook, own)),
            )
        )
    return lines


def _lines(count: int, found: dict[str, Sample]) -> list[Line]:
    what = f"{table.number(count)} tensors"
    hook = table.timing(found["hook"])
    over_floor = ratios(found["hook"], found["floor"])
    lines = [
        Line(
            what,
            hook,
            f"floor + dump {table.timing(found['floor'])}",
            table.times(over_floor),
            f"≤ {TARGET} x",
            over_floor.median <= TARGET,
        )
    ]
    if "prototype" not in found:
        lines.append(Line(what, hook, baselines.NOT_GIVEN, ""))
        return lines
    faster = ratios(found["prototype"], found["hook"])
    due = count == FASTER_AT
    lines.append(
        Line(
            what,
            hook,
            f"prototype {table.timing(found['prototype'])}",
            _faster_or_slower(faster),
            f"≥ {FASTER:g} x faster" if due else "",
            faster.median >= FASTER if due else None,
        )
    )
    return lines


def _faster_or_slower(times: Sample) -> str:
    figure, word = (times.median, "faster") if times.median >= 1 else (1 / times.median, "slower")
    return f"{figure:.1f} x {word} ±{times.spread:.0%}"


HOW = """\
A `load` event of a new runner: the slot is claimed, the state written, the model walked, and
`weight_layout`, `weights_meta`, `total_weight_meta`, `merged_weights_meta` and the state again are
written. The floor reads the prototype's five fields of `named_parameters()` and dumps them with
orjson once, without writing. SGLang's own code runs in SGLang's environment, beside the hook in
that same process; its transfer engine does nothing."""
LIMITS = """\
None of these is within reach of the floor, because the floor does less: it sees parameters only and
writes nothing. Of the time at 3 118 tensors about a third is the walk over every attribute of 7 800
modules, which finds what `named_parameters` does not (MLA's `w_kc` and `w_vc`, scales); a sixth is
noting where tensors are held, so that later buckets can be checked cheaply; a seventh is asking
each tensor for twelve properties instead of five; a third is making and writing five documents,
three of them in the legacy format. On a CPU every tensor is a region of its own, which doubles the
last; a GPU's allocator puts many into one. The prototype takes twice the floor itself: five times
faster than that would be faster than the floor, by more than a factor of two. The fixed part is the
claim of the slot and six files.
A load takes tens of seconds; this is a thousandth of it."""
