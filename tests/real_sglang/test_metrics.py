"""Our metrics on a real server's own ``/metrics``, with SGLang's own ``--enable-metrics``."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sglang_weight_hook as hook
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


def scrape_after_check(server: HookedServer, checked: float) -> dict[str, float]:
    """What is scraped once the map has been checked after ``checked``."""
    deadline = time.monotonic() + 30
    while (found := scrape(server))[f"checked_timestamp_seconds{TARGET}"] <= checked:
        assert time.monotonic() < deadline, "the map is checked no more"
        time.sleep(0.2)
    return found


def started_at(identity: dict[str, Any]) -> float:
    """When a process of this machine started, in seconds since 1970 (proc(5))."""
    stat = Path("/proc/stat").read_text(encoding="ascii")
    (boot,) = re.findall(r"^btime (\d+)$", stat, re.MULTILINE)
    return int(boot) + int(identity["process_start_ticks"]) / os.sysconf("SC_CLK_TCK")


def info_of(samples: dict[str, float]) -> str:
    (info,) = [name for name in samples if name.startswith("info{")]
    return info


def assert_memory_and_identity(samples: dict[str, float], document: hook.Document) -> None:
    """The samples of what the layout says, too."""
    for kind in metrics.MEMORY:
        published = document.raw["memory"][kind + "_bytes"]
        sample = f'memory_bytes{{kind="{kind}",role="target",slot="0"}}'
        assert samples.get(sample) == published, kind
    assert samples[f"owner_start_time_seconds{TARGET}"] == pytest.approx(
        started_at(document.raw["identity"]), abs=1
    )
    info = info_of(samples)
    assert samples[info] == 1
    labels = dict(re.findall(r'(\w+)="([^"]*)"', info))
    identity = {**document.raw["identity"], "model": document.raw["identity"]["model_path"]}
    assert labels.keys() == {*metrics.LABELS, *metrics.INFO}
    for name in metrics.INFO:
        assert labels[name] == ("" if identity[name] is None else str(identity[name])), name


def test_a_real_server_serves_our_metrics_without_a_flag_of_ours(
    environment: Environment,
    hooked_python: Path,
    checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    options = ["--enable-metrics"]
    often = {"SGLANG_WEIGHT_HOOK_CHECK_SECONDS": "1"}
    with HookedServer(
        environment, hooked_python, checkpoint(1), tmp_path, options, often
    ) as server:
        (slot,) = server.maps.slots()
        server.generate()  # SGLang's own samples begin with the first request
        before = scrape(server)
        document = slot.read()
        assert before[f"weights_bytes{TARGET}"] == document.raw["memory"]["weights_bytes"]
        assert before[f"layout_generation{TARGET}"] == document.layout_generation
        assert before[f"content_generation{TARGET}"] == document.content_generation
        assert before['state{role="target",slot="0",state="ready"}'] == 1
        assert before[f"event_failures_total{TARGET}"] == 0
        assert_memory_and_identity(before, document)

        # While nothing happens, only the time of the last check moves.
        assert before[f"check_period_seconds{TARGET}"] == 1
        checked = before.pop(f"checked_timestamp_seconds{TARGET}")
        later = scrape_after_check(server, checked)
        assert time.time() - later.pop(f"checked_timestamp_seconds{TARGET}") < 60
        assert later == before

        status, answer = server.update_weights_from_disk(checkpoint(2))
        assert (status, answer["success"]) == (200, True)
        after = scrape(server)
        assert after[f"content_generation{TARGET}"] == before[f"content_generation{TARGET}"] + 1
        assert after[f"events_total{TARGET}"] == before[f"events_total{TARGET}"] + 1
        assert after[f"last_event_success{TARGET}"] == 1
        assert after[f"last_event_seconds{TARGET}"] > 0
        assert after[f"capture_seconds{TARGET}"] > 0
        of_kind = '{kind="update_weights_from_disk",role="target",slot="0"}'
        assert after[f"event_duration_seconds_count{of_kind}"] == 1
        assert after[f"event_duration_seconds_sum{of_kind}"] == after[f"last_event_seconds{TARGET}"]
        for name in ("capture_duration_seconds_count", "lock_wait_seconds_count"):
            assert after[f"{name}{TARGET}"] == before[f"{name}{TARGET}"] + 1
        # Another path is no other series.
        assert info_of(after) == info_of(before)

        status, answer = server.update_weights_from_disk(tmp_path / "nothing")
        assert not answer["success"]
        failed = scrape(server)
        assert failed[f"event_failures_total{TARGET}"] == 1
        assert failed[f"last_event_success{TARGET}"] == 0
        assert failed['state{role="target",slot="0",state="failed"}'] == 1
        assert failed['state{role="target",slot="0",state="ready"}'] == 0
        assert len(failed) <= metrics.series()
