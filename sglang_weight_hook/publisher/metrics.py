"""Our figures on SGLang's own ``/metrics``, when SGLang runs with ``--enable-metrics``.

SGLang makes ``PROMETHEUS_MULTIPROC_DIR`` before it starts its processes, each of which writes
its samples to files there, and the HTTP process serves the sum of them (SGLang,
srt/utils/common.py, set_prometheus_multiproc_dir and add_prometheus_middleware).  So a sample
set in a scheduler process appears without a port, a thread or a flag of ours.

Nothing happens here unless SGLang asked for metrics and has imported prometheus_client itself:
the client decides at its import whether it writes files, and that is SGLang's to time.
`update` raises nothing.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple, Optional

from . import once
from .events import UNANNOUNCED

PREFIX = "sglang_weight_hook_"
# Those that outlast an event; while one lasts the old ones stand.
STATES = ("loading", "ready", "failed", "released")
_LABELS = ("slot", "role")

# One value a slot, the newest of all processes': a scheduler that was started again replaces
# its predecessor's.  The samples of a process that is gone vanish when it is marked as dead
# (prometheus_client.multiprocess.mark_process_dead).  No pid label, so series stay the same.
_MODE = "livemostrecent"

# Name -> what it is; docs/metrics.md says the same at length.
GAUGES = {
    "weights_bytes": "Bytes of the storages of the slot's weights, each counted once.",
    "layout_generation": "Rises when an address, size or name of a weight has changed.",
    "content_generation": "Rises when values of weights have, or may have, changed.",
    "physical_epoch": "Rises when other physical pages are behind the same addresses.",
    "last_event_success": "Whether SGLang's last call that changes weights succeeded.",
    "last_event_seconds": "How long it took, from its beginning to its return.",
    "last_event_timestamp_seconds": "When it had returned, in seconds since 1970.",
    "capture_seconds": "How long looking at the model took after it.",
}
COUNTERS = {
    "events": "SGLang's calls that change weights; a session and a stream count once.",
    "event_failures": "SGLang's calls that change weights and that failed.",
    "lock_timeouts": "Weight updates that went on without the lock that a reader held too long.",
    "unannounced_changes": "Times that weights had moved without a call that is known to.",
}


class _Metrics(NamedTuple):
    gauges: dict[str, Any]
    counters: dict[str, Any]
    state: Any


_metrics: Optional[_Metrics] = None
# Counted since the start, by slot and role: the client may be imported after the first events.
_due: dict[tuple[str, str], dict[str, int]] = {}


def update(
    runner: Any,
    slot: str,
    role: str,
    *,
    kind: str = "",
    state: str,
    layout_generation: int,
    content_generation: int,
    physical_epoch: int,
    success: bool,
    started_at: float,
    finished_at: float,
    weights_bytes: Optional[int] = None,
    capture_seconds: Optional[float] = None,
    lock_status: str = "held",
) -> None:
    """An event of ``slot`` is over and published.  Call it once an event, after publishing.

    ``role``: ``target`` or ``draft``.  ``started_at``, ``finished_at``: seconds since 1970.
    ``weights_bytes``: as in the layout's ``memory``; None where nothing was captured.
    ``lock_status``: the slot's, from while the event lasted.
    """
    try:
        if not wanted(runner):
            return
        due = _due.setdefault((slot, role), dict.fromkeys(COUNTERS, 0))
        due["unannounced_changes"] += kind == UNANNOUNCED
        due["events"] += kind != UNANNOUNCED
        due["event_failures"] += not success
        due["lock_timeouts"] += lock_status == "timeout"
        metrics = _made()
        if metrics is None:
            return
        figures = {
            "weights_bytes": weights_bytes,
            "layout_generation": layout_generation,
            "content_generation": content_generation,
            "physical_epoch": physical_epoch,
            "last_event_success": int(success),
            "last_event_seconds": max(finished_at - started_at, 0.0),
            "last_event_timestamp_seconds": finished_at,
            "capture_seconds": capture_seconds,
        }
        for name, value in figures.items():
            if value is not None:
                metrics.gauges[name].labels(slot, role).set(value)
        for each in STATES:
            metrics.state.labels(slot, role, each).set(int(each == state))
        for name, number in due.items():
            # Also by zero: a series that begins at 1 hides its first failure from rate().
            metrics.counters[name].labels(slot, role).inc(number)
            due[name] = 0
    except Exception as error:
        once.warn("metrics", "no metrics, SGLang goes on without them: %r", error)


def forget(slot: str, role: str) -> None:
    """The runner of ``slot`` is gone, its process goes on: no weights are there any more."""
    try:
        if _metrics is not None:
            _metrics.gauges["weights_bytes"].labels(slot, role).set(0)
            for each in STATES:
                _metrics.state.labels(slot, role, each).set(0)
    except Exception as error:
        once.warn("metrics", "no metrics, SGLang goes on without them: %r", error)


def wanted(runner: Any) -> bool:
    """Whether the runner's SGLang was started with ``--enable-metrics``."""
    return getattr(getattr(runner, "server_args", None), "enable_metrics", False) is True


def _made() -> Optional[_Metrics]:
    """The metrics of this process; None as long as SGLang has not imported the client."""
    global _metrics
    if _metrics is None:
        client = sys.modules.get("prometheus_client")
        if not hasattr(client, "Gauge") or not hasattr(client, "Counter"):
            return None  # absent, or in the middle of its import
        client = sys.modules["prometheus_client"]

        def gauge(name: str, text: str, labels: tuple[str, ...]) -> Any:
            return client.Gauge(PREFIX + name, text, labels, multiprocess_mode=_MODE)

        _metrics = _Metrics(
            {name: gauge(name, text, _LABELS) for name, text in GAUGES.items()},
            {name: client.Counter(PREFIX + name, text, _LABELS) for name, text in COUNTERS.items()},
            gauge(
                "state",
                "1 for the state that the last event left, 0 for others.",
                (*_LABELS, "state"),
            ),
        )
    return _metrics
