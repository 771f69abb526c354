"""What a scrubber has found, as Prometheus metrics."""

from __future__ import annotations

import time
from collections.abc import Callable

from ...memory.scrub import Baseline, Corruption, Event, Pass, Read, Waiting
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
    read = prometheus.Counter(
        "sglang_weight_hook_scrub_read_bytes",
        "Bytes of weights that the scrubber has read.",
        registry=registry,
    )
    slot = ["slot"]
    found = prometheus.Counter(
        "sglang_weight_hook_scrub_corruptions",
        "Places in a slot's weights whose bytes have changed without an update.",
        slot,
        registry=registry,
    )
    passes = prometheus.Counter(
        "sglang_weight_hook_scrub_passes",
        "How often all weights of a slot were compared with their baseline.",
        slot,
        registry=registry,
    )
    last = prometheus.Gauge(
        "sglang_weight_hook_scrub_last_pass_timestamp_seconds",
        "When all weights of a slot were last compared with their baseline (Unix time).",
        slot,
        registry=registry,
    )
    took = prometheus.Gauge(
        "sglang_weight_hook_scrub_last_pass_seconds",
        "How long the last comparison of all weights of a slot with their baseline took.",
        slot,
        registry=registry,
    )
    waiting = prometheus.Gauge(
        "sglang_weight_hook_scrub_waiting",
        "1 while the scrubber cannot read a slot's weights: they are being updated or released, "
        "or the server has exited.",
        slot,
        registry=registry,
    )

    def count(event: Event) -> None:
        if isinstance(event, Read):
            read.inc(event.bytes)
            return
        waiting.labels(event.slot).set(isinstance(event, Waiting))
        if isinstance(event, Corruption):
            found.labels(event.slot).inc()
        elif isinstance(event, Baseline):
            found.labels(event.slot).inc(0)
            passes.labels(event.slot).inc(0)
        elif isinstance(event, Pass):
            passes.labels(event.slot).inc()
            last.labels(event.slot).set(time.time())
            took.labels(event.slot).set(event.seconds)

    try:
        prometheus.start_http_server(port, addr="127.0.0.1", registry=registry)
    except OSError as error:
        raise HookError(
            f"port {port} cannot be listened on ({error.strerror}); give another --metrics-port"
        ) from error
    return count
