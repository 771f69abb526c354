"""Metrics by the real prometheus_client, in processes of their own as SGLang has them.

That SGLang serves them is shown in ``tests/real_sglang/test_metrics.py``.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_weight_hook.publisher import metrics, once

ROOT = Path(__file__).resolve().parents[2]

Run = Callable[..., subprocess.CompletedProcess[str]]

# A process of SGLang's: updates are asked for on its command line as JSON.
PROCESS = """
import json, sys
from types import SimpleNamespace
if {client!r} == "before":
    import prometheus_client
from sglang_weight_hook.publisher import metrics
runner = SimpleNamespace(server_args=SimpleNamespace(enable_metrics={enabled!r}))
for number, more in enumerate(json.loads(sys.argv[1])):
    if {client!r} == "late" and number == 1:
        import prometheus_client
    metrics.update(runner, more.pop("slot", "0"), more.pop("role", "target"), **{{
        "state": "ready", "layout_generation": 1, "content_generation": number,
        "physical_epoch": 0, "success": True, "started_at": 100.0, "finished_at": 102.5,
        "weights_bytes": 4096, "capture_seconds": 0.25, **more}})
print(sorted(name for name in sys.modules if name == "prometheus_client"))
"""
SCRAPE = """
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""


@pytest.fixture
def samples(run_python: Run, tmp_path: Path) -> Callable[..., dict[str, float]]:
    """Run a process with updates, then scrape as SGLang's HTTP process does."""
    pytest.importorskip("prometheus_client")
    folder = tmp_path / "multiprocess"
    folder.mkdir()

    def samples(
        *updates: dict[str, Any], enabled: object = True, client: str = "before"
    ) -> dict[str, float]:
        variables = {"PROMETHEUS_MULTIPROC_DIR": str(folder)}
        if updates:
            code = PROCESS.format(client=client, enabled=enabled)
            run_python("-c", code, json.dumps(updates), **variables)
        text = run_python("-c", SCRAPE, **variables).stdout
        found = re.findall(r"^(sglang_weight_hook_\S+|sglang:\S+) (\S+)$", text, re.MULTILINE)
        return {name: float(value) for name, value in found}

    return samples


TARGET = '{role="target",slot="0"}'


def test_an_update_in_one_process_is_scraped_in_another(
    samples: Callable[..., dict[str, float]],
) -> None:
    found = samples({}, {"success": False, "state": "failed", "lock_status": "timeout"})
    prefix = metrics.PREFIX
    assert found == {
        f"{prefix}weights_bytes{TARGET}": 4096,
        f"{prefix}layout_generation{TARGET}": 1,
        f"{prefix}content_generation{TARGET}": 1,
        f"{prefix}physical_epoch{TARGET}": 0,
        f"{prefix}last_event_success{TARGET}": 0,
        f"{prefix}last_event_seconds{TARGET}": 2.5,
        f"{prefix}last_event_timestamp_seconds{TARGET}": 102.5,
        f"{prefix}capture_seconds{TARGET}": 0.25,
        f"{prefix}events_total{TARGET}": 2,
        f"{prefix}event_failures_total{TARGET}": 1,
        f"{prefix}lock_timeouts_total{TARGET}": 1,
        f"{prefix}unannounced_changes_total{TARGET}": 0,
        **{
            f'{prefix}state{{role="target",slot="0",state="{state}"}}': float(state == "failed")
            for state in metrics.STATES
        },
    }


def test_slots_and_drafts_have_series_of_their_own(
    samples: Callable[..., dict[str, float]],
) -> None:
    found = samples({}, {"slot": "0_draft", "role": "draft", "weights_bytes": 7}, {"slot": "1"})
    names = [name for name in found if "weights_bytes" in name]
    assert len(names) == 3
    assert found[metrics.PREFIX + 'weights_bytes{role="draft",slot="0_draft"}'] == 7


def test_a_process_that_was_started_again_replaces_its_predecessor(
    samples: Callable[..., dict[str, float]],
) -> None:
    samples({"weights_bytes": 1})
    found = samples({"weights_bytes": 2})
    assert found[f"{metrics.PREFIX}weights_bytes{TARGET}"] == 2
    assert found[f"{metrics.PREFIX}events_total{TARGET}"] == 2
    assert not [name for name in found if "pid" in name]


def test_the_samples_of_a_process_marked_as_dead_vanish(
    samples: Callable[..., dict[str, float]], run_python: Run, tmp_path: Path
) -> None:
    samples({})
    folder = tmp_path / "multiprocess"
    (file,) = folder.glob("gauge_*.db")
    pid = file.stem.rpartition("_")[2]
    code = f"from prometheus_client import multiprocess as m; m.mark_process_dead({pid})"
    run_python("-c", code, PROMETHEUS_MULTIPROC_DIR=str(folder))
    assert {name.partition("{")[0] for name in samples()} == {
        f"{metrics.PREFIX}{name}_total" for name in metrics.COUNTERS
    }


def test_events_before_the_client_is_imported_are_counted_later(
    samples: Callable[..., dict[str, float]],
) -> None:
    found = samples({"success": False}, {}, client="late")
    assert found[f"{metrics.PREFIX}events_total{TARGET}"] == 2
    assert found[f"{metrics.PREFIX}event_failures_total{TARGET}"] == 1


@pytest.mark.parametrize("enabled", [False, None, "yes"])
def test_nothing_happens_unless_sglang_has_metrics_on(
    enabled: object, samples: Callable[..., dict[str, float]]
) -> None:
    assert samples({}, enabled=enabled) == {}


def test_the_client_is_never_imported_by_us(run_python: Run) -> None:
    code = PROCESS.format(client="never", enabled=True)
    assert run_python("-c", code, "[{}]").stdout == "[]\n"


def test_a_broken_client_is_said_once_and_never_raised(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*arguments: object, **more: object) -> None:
        raise ValueError("Duplicated timeseries")

    monkeypatch.setattr(metrics, "_metrics", None)
    monkeypatch.setattr(metrics, "_due", {})
    client = SimpleNamespace(Gauge=broken, Counter=broken)
    monkeypatch.setitem(__import__("sys").modules, "prometheus_client", client)
    runner = SimpleNamespace(server_args=SimpleNamespace(enable_metrics=True))
    once._said.clear()
    for _ in range(3):
        metrics.update(
            runner,
            "0",
            "target",
            state="ready",
            layout_generation=1,
            content_generation=1,
            physical_epoch=0,
            success=True,
            started_at=0.0,
            finished_at=1.0,
        )
        metrics.forget("0", "target")
    assert len([line for line in caplog.messages if "no metrics" in line]) == 1


def test_the_dashboard_and_the_page_name_every_metric_and_no_other() -> None:
    names = {metrics.PREFIX + name for name in (*metrics.GAUGES, "state")}
    names |= {f"{metrics.PREFIX}{name}_total" for name in metrics.COUNTERS}
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert {name for name in names if f"`{name}`" not in page} == set()
    dashboard = json.loads((ROOT / "docs" / "grafana.json").read_bytes())
    asked = set()
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            asked |= set(re.findall(r"sglang_weight_hook_\w+", target["expr"]))
    assert asked == names
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
