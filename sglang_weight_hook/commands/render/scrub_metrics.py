"""What a scrubber has found, as Prometheus metrics."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ...memory.scrub import Corruption, Event, Pass, Read, Waiting
from ...reader import HookError


def serve(port: int) -> Callable[[Event], None]:
    """Serve metrics on 127.0.0.1:``port``; what is returned counts events.  Raises HookError."""
    try:
        import prometheus_client as prometheus
    except ImportError:
        raise HookError(
            "metrics need prometheus_client, which is not installed here; pip install "
            "prometheus_client"
        ) from None
    registry = prometheus.CollectorRegistry()
    count = _counting(prometheus, registry)
    try:
        prometheus.start_http_server(port, addr="127.0.0.1", registry=registry)
    except OSError as error:
        raise HookError(
            f"port {port} cannot be listened on ({error.strerror}); give another --metrics-port"
        ) from error
    return count


# Name (after the prefix) -> what it is.
PREFIX = "sglang_weight_hook_scrub_"
READ = "Bytes of weights that the scrubber has read."
COUNTERS = {
    "corruptions": "Places in a slot's weights whose bytes have changed without an update.",
    "passes": "How often all weights of a slot were compared with their baseline.",
}
GAUGES = {
    "last_pass_timestamp_seconds": "When all weights of a slot were last compared with their "
    "baseline, in seconds since 1970-01-01 UTC.",
    "last_pass_seconds": "Duration of the last comparison of all weights of a slot with their "
    "baseline, in seconds.",
    "waiting": "1 while the scrubber cannot read a slot's weights: they are being updated or "
    "released, or the server has exited.",
}


def _counting(prometheus: Any, registry: Any) -> Callable[[Event], None]:
    read = prometheus.Counter(PREFIX + "read_bytes", READ, registry=registry)
    made = {
        name: kind(PREFIX + name, text, ["slot"], registry=registry)
        for kind, texts in ((prometheus.Counter, COUNTERS), (prometheus.Gauge, GAUGES))
        for name, text in texts.items()
    }

    def count(event: Event) -> None:
        if isinstance(event, Read):
            read.inc(event.bytes)
            return
        for name in COUNTERS:  # a series that begins at 1 hides its first corruption from rate()
            made[name].labels(event.slot).inc(0)
        made["waiting"].labels(event.slot).set(isinstance(event, Waiting))
        if isinstance(event, Corruption):
            made["corruptions"].labels(event.slot).inc()
        elif isinstance(event, Pass):
            made["passes"].labels(event.slot).inc()
            made["last_pass_timestamp_seconds"].labels(event.slot).set(time.time())
            made["last_pass_seconds"].labels(event.slot).set(event.seconds)

    return count
