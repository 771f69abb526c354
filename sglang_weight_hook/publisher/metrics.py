"""Our figures on SGLang's own ``/metrics``, when SGLang runs with ``--enable-metrics``.

SGLang makes ``PROMETHEUS_MULTIPROC_DIR`` before it starts its processes, each of which writes
its samples to files there, and the HTTP process serves the sum of them (SGLang,
srt/utils/common.py, set_prometheus_multiproc_dir and add_prometheus_middleware).  So a sample
set in a scheduler process appears without a port, a thread or a flag of ours.

Nothing happens here unless SGLang asked for metrics and has imported prometheus_client itself:
the client decides at its import whether it writes files, and that is SGLang's to time.
What is public here raises nothing.  `METRICS` is the one source of names and texts;
docs/metrics.md repeats them, and a test compares.
"""

from __future__ import annotations

import _thread
import os
import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple, Optional, Union

from ..layout import process
from . import identity, once, settings
from .events import UNANNOUNCED

PREFIX = "sglang_weight_hook_"
# Those that outlast an event; while one lasts the old ones stand.
STATES = ("loading", "ready", "failed", "released")
LABELS = ("slot", "role")

# Figures of the layout's `memory`, without their ending `_bytes`.
MEMORY = (
    *("weights", "kv_cache", "lora", "siblings", "other_live", "reserved_free", "other"),
    *("unbacked", "device_free", "device_total", "shared", "shared_kv_cache", "off_device"),
)
# Of the layout's `identity`.  A label that has no value is empty, which Prometheus takes for
# absent.  Not the pid: a scheduler that is started again continues the series.
INFO = (
    *("model", "model_class", "gpu_uuid", "pci_bus_id"),
    *("tp_rank", "tp_size", "pp_rank", "pp_size", "dp_rank", "dp_size", "ep_rank", "ep_size"),
    *("sglang_version", "hook_version", "hostname"),
)

# One value a slot, the newest of all processes': a scheduler that was started again replaces
# its predecessor's.  The samples of a process that is gone vanish when it is marked as dead
# (prometheus_client.multiprocess.mark_process_dead).  No pid label, so series stay the same.
_MODE = "livemostrecent"

# Kinds of events with a histogram of their own, a slot; further ones share `OTHER`, so that the
# number of series has a bound.
NAMED_KINDS = 4
START = "start"
OTHER = "other"

# Observations kept for a client that SGLang has not imported yet, a slot.
_KEPT = 100


class Metric(NamedTuple):
    """One metric, as `METRICS` declares it."""

    type: str  # gauge, counter, histogram
    help: str  # Prometheus shows it without anything around it
    labels: tuple[str, ...] = ()  # besides `LABELS`
    buckets: tuple[float, ...] = ()  # upper limits, in seconds


# Without the prefix, and without the ending `_total` that the client gives a counter.
METRICS = {
    "info": Metric(
        "gauge",
        "1 for each published slot (one model runner of an SGLang process), with the model that it "
        "was started with, its GPU, ranks and versions as labels; 0 for what a slot no longer is.",
        INFO,
    ),
    "owner_start_time_seconds": Metric(
        "gauge",
        "When the SGLang process that publishes the slot started, in seconds since 1970-01-01 UTC.",
    ),
    "state": Metric(
        "gauge",
        "1 for the state in which the last event left the slot's weights (loading, ready, failed "
        "or released), 0 for the other states.",
        ("state",),
    ),
    "layout_generation": Metric(
        "gauge",
        "Layout generation of the slot: rises when the address, size or name of a weight has "
        "changed, so that memory registered for RDMA or IPC has to be registered again.",
    ),
    "content_generation": Metric(
        "gauge",
        "Content generation of the slot: rises when values of its weights have changed, or may "
        "have changed.",
    ),
    "physical_epoch": Metric(
        "gauge",
        "Physical epoch of the slot's weights: rises when other physical pages were put behind "
        "unchanged addresses, so that memory registered for RDMA or IPC has to be registered "
        "again.",
    ),
    "kv_physical_epoch": Metric(
        "gauge",
        "Physical epoch of the slot's KV cache: rises when other physical pages were put behind "
        "unchanged addresses, so that memory registered for RDMA or IPC has to be registered "
        "again.",
    ),
    "checked_timestamp_seconds": Metric(
        "gauge",
        "When the slot's published map and the memory of the SGLang process were last found "
        "equal, in seconds since 1970-01-01 UTC.",
    ),
    "check_period_seconds": Metric(
        "gauge",
        "Seconds between two comparisons of the slot's published map with the memory of the "
        "SGLang process; 0 where it is not compared.",
    ),
    "weights_bytes": Metric(
        "gauge",
        "Bytes of the storages of the slot's weights, each storage counted once.",
    ),
    "memory_bytes": Metric(
        "gauge",
        "Bytes of memory by kind: what the slot itself has (weights, kv_cache, lora, and shared, "
        "shared_kv_cache, off_device of them) and what else takes up its GPU.",
        ("kind",),
    ),
    "last_event_success": Metric(
        "gauge",
        "1 if the last call of SGLang's that changes the slot's weights succeeded, 0 if it failed.",
    ),
    "last_event_seconds": Metric(
        "gauge",
        "Duration of the last call of SGLang's that changes the slot's weights, in seconds, "
        "including the wait for readers that hold the weights.",
    ),
    "last_event_timestamp_seconds": Metric(
        "gauge",
        "When the last call of SGLang's that changes the slot's weights had returned, in seconds "
        "since 1970-01-01 UTC.",
    ),
    "capture_seconds": Metric(
        "gauge",
        "Duration of the last capture of the slot's model (finding where each tensor is), in "
        "seconds; SGLang waits for it.",
    ),
    "events": Metric(
        "counter",
        "Calls of SGLang's that change the slot's weights; a session and a stream of buckets "
        "count once.",
    ),
    "event_failures": Metric(
        "counter", "Calls of SGLang's that change the slot's weights and that failed."
    ),
    "lock_timeouts": Metric(
        "counter",
        "Changes of the slot's weights that went on without the lock, because a reader held it "
        "longer than the server waits.",
    ),
    "unannounced_changes": Metric(
        "counter",
        "Times that weights of the slot were found at other addresses although SGLang had made no "
        "call that is known to move them.",
    ),
    "event_duration_seconds": Metric(
        "histogram",
        "Duration of SGLang's calls that change the slot's weights, in seconds, by kind of call, "
        "including the wait for readers that hold the weights.",
        ("kind",),
        (0.1, 1.0, 10.0, 60.0),
    ),
    "capture_duration_seconds": Metric(
        "histogram",
        "Duration of the captures of the slot's model (finding where each tensor is), in seconds; "
        "SGLang waits for them.",
        (),
        (0.01, 0.1, 1.0),
    ),
    "lock_wait_seconds": Metric(
        "histogram",
        "How long SGLang waited for readers that hold the slot's weights before it changed them, "
        "in seconds.",
        (),
        (0.01, 1.0),
    ),
}
COUNTERS = tuple(name for name, metric in METRICS.items() if metric.type == "counter")


class Ended(NamedTuple):
    """An event that is over, and how the slot stands after it.  Times are in seconds since 1970."""

    state: str
    layout_generation: int
    content_generation: int
    physical_epoch: int
    success: bool
    started_at: float
    finished_at: float
    kv_physical_epoch: int = 0
    instance: str = ""
    kind: str = ""
    starts: bool = False  # whether it belongs to the engine's start
    checked_at: Optional[float] = None
    weights_bytes: Optional[int] = None  # None where nothing was captured
    memory: Optional[Mapping[str, Any]] = None  # the layout's; None where none was published
    capture_seconds: Optional[float] = None
    lock_status: str = "held"  # the slot's, from while the event lasted

    @property
    def announced(self) -> bool:
        return self.kind != UNANNOUNCED

    @property
    def duration(self) -> float:
        return max(self.finished_at - self.started_at, 0.0)


class _Slot:
    """The samples of one slot, and what is to be told once there is a client."""

    def __init__(self, slot: str, role: str) -> None:
        self.labels = (slot, role)
        self.instance: Optional[str] = None
        self.info: tuple[str, ...] = ()
        self.kinds: set[str] = set()
        # Counted since the start: the client may be imported after the first events.
        self.due = dict.fromkeys(COUNTERS, 0)
        self.observed: deque[tuple[str, tuple[str, ...], float]] = deque(maxlen=_KEPT)
        # The client's objects by metric and further labels: to look one up there takes a lock.
        self._samples: dict[tuple[str, tuple[str, ...]], Any] = {}

    def sample(self, name: str, *labels: str) -> Any:
        found = self._samples.get((name, labels))
        if found is None:
            found = (_metrics or {})[name].labels(*self.labels, *labels)
            self._samples[name, labels] = found
        return found

    def kind(self, kind: str, starts: bool) -> str:
        """Under which label an event counts."""
        kind = START if starts else kind or OTHER
        if kind not in self.kinds and len(self.kinds) >= NAMED_KINDS:
            return OTHER
        self.kinds.add(kind)
        return kind

    def count(self, ended: Ended, waited_for: Optional[float]) -> None:
        self.due["unannounced_changes"] += not ended.announced
        self.due["events"] += ended.announced
        self.due["event_failures"] += not ended.success
        self.due["lock_timeouts"] += ended.lock_status == "timeout"
        if ended.announced:
            kind = self.kind(ended.kind, ended.starts)
            self.observed.append(("event_duration_seconds", (kind,), ended.duration))
        if waited_for is not None:
            self.observed.append(("lock_wait_seconds", (), waited_for))
        if ended.capture_seconds is not None:
            self.observed.append(("capture_duration_seconds", (), ended.capture_seconds))

    def tell_what_is_due(self) -> None:
        for name, number in self.due.items():
            # Also by zero: a series that begins at 1 hides its first failure from rate().
            self.sample(name).inc(number)
            self.due[name] = 0
        while self.observed:
            name, labels, seconds = self.observed.popleft()
            self.sample(name, *labels).observe(seconds)


_metrics: Optional[dict[str, Any]] = None
_failed = False  # the client refused once, and what it has registered it refuses again
_slots: dict[tuple[str, str], _Slot] = {}
_waits: dict[tuple[str, str], float] = {}


def update(runner: Any, slot: str, role: str, ended: Ended) -> None:
    """An event of ``slot`` is over and published.  Call it once an event, after publishing.

    ``role``: ``target`` or ``draft``.
    """
    try:
        waited_for = _waits.pop((slot, role), None)
        if _failed or not wanted(runner):
            return
        mine = _slots.get((slot, role))
        if mine is None:
            mine = _slots[slot, role] = _Slot(slot, role)
        mine.count(ended, waited_for)
        if not _make():
            return
        if mine.instance != ended.instance:
            mine.instance = ended.instance
            _introduce(mine, runner)
        _set_gauges(mine, ended)
        mine.tell_what_is_due()
    except Exception as error:
        _give_up(error)


def waited(slot: str, role: str, seconds: float) -> None:
    """So long the event of ``slot`` that now begins has waited for readers; kept until it ends."""
    _waits[slot, role] = max(seconds, 0.0)


def checked(slot: str, role: str, now: float) -> None:
    """Map and memory of ``slot`` were found equal, between two events."""
    try:
        mine = _slots.get((slot, role))
        if mine is not None and _metrics is not None:
            mine.sample("checked_timestamp_seconds").set(now)
    except Exception as error:
        _give_up(error)


def forget(slot: str, role: str) -> None:
    """The runner of ``slot`` is gone, its process goes on: no weights are there any more.

    The garbage collector may call this while this very thread is inside the client, whose lock
    is not reentrant.  So another thread does it, and nobody waits for it.
    """
    try:
        mine = _slots.pop((slot, role), None)
        _waits.pop((slot, role), None)
        if mine is not None and _metrics is not None:
            _thread.start_new_thread(_clear, (mine,))
    except Exception as error:
        _give_up(error)


def wanted(runner: Any) -> bool:
    """Whether the runner's SGLang was started with ``--enable-metrics``."""
    return getattr(getattr(runner, "server_args", None), "enable_metrics", False) is True


def series() -> int:
    """The most series that one slot has."""
    number = NAMED_KINDS + 1
    several = {"state": len(STATES), "memory_bytes": len(MEMORY), "event_duration_seconds": number}
    # A histogram also has a bucket for what is above the last limit, a sum and a count.
    return sum(
        several.get(name, 1) * (len(metric.buckets) + 3 if metric.buckets else 1)
        for name, metric in METRICS.items()
    )


def _set_gauges(mine: _Slot, ended: Ended) -> None:
    figures = {
        "weights_bytes": ended.weights_bytes,
        "layout_generation": ended.layout_generation,
        "content_generation": ended.content_generation,
        "physical_epoch": ended.physical_epoch,
        "kv_physical_epoch": ended.kv_physical_epoch,
        "checked_timestamp_seconds": ended.checked_at,
        "last_event_success": int(ended.success),
        "last_event_seconds": ended.duration,
        "last_event_timestamp_seconds": ended.finished_at,
        "capture_seconds": ended.capture_seconds,
    }
    for name, value in figures.items():
        if value is not None:
            mine.sample(name).set(value)
    if ended.memory is not None:
        for name in MEMORY:
            size = ended.memory.get(name + "_bytes")
            if size is not None:
                mine.sample("memory_bytes", name).set(size)
    for each in STATES:
        mine.sample("state", each).set(int(each == ended.state))


def _introduce(mine: _Slot, runner: Any) -> None:
    """What stays the same as long as the runner is there."""
    mine.sample("check_period_seconds").set(settings.load().check_seconds)
    started_at = _started_at()
    if started_at is not None:
        mine.sample("owner_start_time_seconds").set(started_at)
    info = _info(runner)
    if mine.info and mine.info != info:
        # With several processes' files the client can't take a sample away.
        mine.sample("info", *mine.info).set(0)
    mine.info = info
    mine.sample("info", *info).set(1)


def _info(runner: Any) -> tuple[str, ...]:
    who = identity.identity(runner)
    # A later update from another checkpoint changes SGLang's path, not this label: each new value
    # would be one more series for good.
    who["model"] = who["model_path"]
    who["pci_bus_id"] = _as_nvml(who["pci_bus_id"])
    return tuple("" if who[name] is None else str(who[name]) for name in INFO)


def _as_nvml(bus_id: Optional[str]) -> Optional[str]:
    """A PCI bus id as NVML writes it: CUDA writes four digits of the domain, NVML eight."""
    domain, colon, rest = (bus_id or "").partition(":")
    return (domain.zfill(8) + colon + rest).upper() if colon else bus_id


def _started_at() -> Optional[float]:
    """When this process started, in seconds since 1970."""
    ticks = process.start_ticks(os.getpid())
    if ticks is None:
        return None
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - age


def _clear(mine: _Slot) -> None:
    try:
        if mine.labels in _slots:
            return  # another runner has the slot by now
        # Without a period nobody expects the map to be checked.
        for name in ("weights_bytes", "check_period_seconds"):
            mine.sample(name).set(0)
        for name in MEMORY:
            mine.sample("memory_bytes", name).set(0)
        for each in STATES:
            mine.sample("state", each).set(0)
        if mine.info:
            mine.sample("info", *mine.info).set(0)
    except Exception as error:
        _give_up(error)


def _give_up(error: Exception) -> None:
    once.warn("metrics", "no metrics, SGLang goes on without them: %r", error)


def _make() -> bool:
    """Make the metrics of this process; False as long as SGLang has not imported the client."""
    global _metrics, _failed
    if _metrics is None:
        client: Any = sys.modules.get("prometheus_client")
        if not all(hasattr(client, name) for name in ("Gauge", "Counter", "Histogram")):
            return False  # absent, or in the middle of its import
        _failed = True
        _metrics = {name: _made(client, name, metric) for name, metric in METRICS.items()}
        _failed = False
    return True


def _made(client: Any, name: str, metric: Metric) -> Any:
    arguments: tuple[Union[str, tuple[str, ...]], ...] = (
        PREFIX + name,
        metric.help,
        (*LABELS, *metric.labels),
    )
    if metric.type == "gauge":
        return client.Gauge(*arguments, multiprocess_mode=_MODE)
    if metric.type == "counter":
        return client.Counter(*arguments)
    return client.Histogram(*arguments, buckets=metric.buckets)
