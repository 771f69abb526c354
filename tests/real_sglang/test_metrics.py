"""Our metrics on a real server's own ``/metrics``, with SGLang's own ``--enable-metrics``."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from cpu_sglang.environment import Environment
from sglang_weight_hook.publisher import metrics
from tests.real_sglang.hooked import HookedServer

pytestmark = pytest.mark.real_sglang

TARGET = '{role="target",slot="0"}'


def scrape(server: HookedServer) -> dict[str, float]:
    status, text = server.get("/metrics")
    assert status == 200
    assert "sglang:" in text  # SGLang's own are there, too
    found = re.findall(rf"^({metrics.PREFIX}\S+) (\S+)$", text, re.MULTILINE)
    return {name.removeprefix(metrics.PREFIX): float(value) for name, value in found}


def test_a_real_server_serves_our_metrics_without_a_flag_of_ours(
    environment: Environment,
    hooked_python: Path,
    checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    options = ["--enable-metrics"]
    with HookedServer(environment, hooked_python, checkpoint(1), tmp_path, options) as server:
        (slot,) = server.maps.slots()
        server.generate()  # SGLang's own samples begin with the first request
        before = scrape(server)
        document = slot.read()
        assert before[f"weights_bytes{TARGET}"] == document.raw["memory"]["weights_bytes"]
        assert before[f"layout_generation{TARGET}"] == document.layout_generation
        assert before[f"content_generation{TARGET}"] == document.content_generation
        assert before['state{role="target",slot="0",state="ready"}'] == 1
        assert before[f"event_failures_total{TARGET}"] == 0

        status, answer = server.update_weights_from_disk(checkpoint(2))
        assert (status, answer["success"]) == (200, True)
        after = scrape(server)
        assert after[f"content_generation{TARGET}"] == before[f"content_generation{TARGET}"] + 1
        assert after[f"events_total{TARGET}"] == before[f"events_total{TARGET}"] + 1
        assert after[f"last_event_success{TARGET}"] == 1
        assert after[f"last_event_seconds{TARGET}"] > 0
        assert after[f"capture_seconds{TARGET}"] > 0

        status, answer = server.update_weights_from_disk(tmp_path / "nothing")
        assert not answer["success"]
        failed = scrape(server)
        assert failed[f"event_failures_total{TARGET}"] == 1
        assert failed[f"last_event_success{TARGET}"] == 0
        assert failed['state{role="target",slot="0",state="failed"}'] == 1
        assert failed['state{role="target",slot="0",state="ready"}'] == 0
