"""Metrics by the real prometheus_client, in processes of their own as SGLang has them.

That SGLang serves them is shown in ``tests/real_sglang/test_metrics.py``.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_sglang import FakeRunner, load, settle, stream, update
from published_files import a_model

import sglang_weight_hook
from sglang_weight_hook.publisher import metrics, once, recorder, settings
from sglang_weight_hook.publisher.events import UNANNOUNCED
from sglang_weight_hook.publisher.metrics import PREFIX

ROOT = Path(__file__).resolve().parents[2]

Run = Callable[..., subprocess.CompletedProcess[str]]

# A process of SGLang's: updates are asked for on its command line as JSON.
PROCESS = """
import json, sys
from types import SimpleNamespace
if {client!r} == "before":
    import prometheus_client
from sglang_weight_hook.publisher import metrics
class MadeUp: pass
runner = SimpleNamespace(
    server_args=SimpleNamespace(enable_metrics={enabled!r}, tp_size=2),
    model_config=SimpleNamespace(model_path="/models/m", quantization=None),
    model=MadeUp(), device="cpu", gpu_id=0, tp_rank=1)
for number, more in enumerate(json.loads(sys.argv[1])):
    if {client!r} == "late" and number == 1:
        import prometheus_client
    if "waited" in more:
        metrics.waited("0", "target", more.pop("waited"))
    if "checked" in more:
        metrics.checked("0", "target", more.pop("checked"))
        continue
    if more.pop("moves_model", False):
        runner.model_config.model_path = "/models/updated"
    metrics.update(runner, more.pop("slot", "0"), more.pop("role", "target"), metrics.Ended(**{{
        "state": "ready", "layout_generation": 1, "content_generation": number,
        "physical_epoch": 0, "success": True, "started_at": 100.0, "finished_at": 102.5,
        "kv_physical_epoch": 3, "checked_at": 102.0, "kind": "update_weights_from_disk",
        "weights_bytes": 4096, "capture_seconds": 0.25, **more}}))
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
        variables = {
            "PROMETHEUS_MULTIPROC_DIR": str(folder),
            "SGLANG_WEIGHT_HOOK_CHECK_SECONDS": "7",
        }
        if updates:
            code = PROCESS.format(client=client, enabled=enabled)
            run_python("-c", code, json.dumps(updates), **variables)
        text = run_python("-c", SCRAPE, **variables).stdout
        found = re.findall(r"^(sglang_weight_hook_\S+|sglang:\S+) (\S+)$", text, re.MULTILINE)
        return {name: float(value) for name, value in found}

    return samples


TARGET = '{role="target",slot="0"}'
DISK = "update_weights_from_disk"


def named(found: dict[str, float], name: str) -> dict[str, float]:
    """The samples of one metric."""
    return {key: value for key, value in found.items() if key.partition("{")[0] == PREFIX + name}


def histogram(name: str, limits: dict[str, int], total: float, kind: str = "") -> dict[str, float]:
    """A histogram's samples; ``limits``: how many were observed up to each."""
    before = f'kind="{kind}",' if kind else ""
    after = 'role="target",slot="0"}'
    buckets = {f'{{{before}le="{limit}",{after}': number for limit, number in limits.items()}
    return {
        **{f"{PREFIX}{name}_bucket{labels}": number for labels, number in buckets.items()},
        f"{PREFIX}{name}_count{{{before}{after}": limits["+Inf"],
        f"{PREFIX}{name}_sum{{{before}{after}": total,
    }


def test_an_update_in_one_process_is_scraped_in_another(
    samples: Callable[..., dict[str, float]],
) -> None:
    memory = {"weights_bytes": 4096, "kv_cache_bytes": 0, "device_total_bytes": None}
    found = samples(
        {"memory": memory},
        {"success": False, "state": "failed", "lock_status": "timeout", "waited": 0.5},
    )
    (info,) = named(found, "info")
    assert found.pop(info) == 1
    assert found.pop(f"{PREFIX}owner_start_time_seconds{TARGET}") == pytest.approx(
        time.time(), abs=60
    )
    assert found == {
        f"{PREFIX}weights_bytes{TARGET}": 4096,
        f"{PREFIX}layout_generation{TARGET}": 1,
        f"{PREFIX}content_generation{TARGET}": 1,
        f"{PREFIX}physical_epoch{TARGET}": 0,
        f"{PREFIX}kv_physical_epoch{TARGET}": 3,
        f"{PREFIX}checked_timestamp_seconds{TARGET}": 102,
        f"{PREFIX}check_period_seconds{TARGET}": 7,
        f"{PREFIX}last_event_success{TARGET}": 0,
        f"{PREFIX}last_event_seconds{TARGET}": 2.5,
        f"{PREFIX}last_event_timestamp_seconds{TARGET}": 102.5,
        f"{PREFIX}capture_seconds{TARGET}": 0.25,
        f"{PREFIX}events_total{TARGET}": 2,
        f"{PREFIX}event_failures_total{TARGET}": 1,
        f"{PREFIX}lock_timeouts_total{TARGET}": 1,
        f"{PREFIX}unannounced_changes_total{TARGET}": 0,
        f'{PREFIX}memory_bytes{{kind="weights",role="target",slot="0"}}': 4096,
        f'{PREFIX}memory_bytes{{kind="kv_cache",role="target",slot="0"}}': 0,
        **{
            f'{PREFIX}state{{role="target",slot="0",state="{state}"}}': float(state == "failed")
            for state in metrics.STATES
        },
        **histogram(
            "event_duration_seconds",
            {"0.1": 0, "1.0": 0, "10.0": 2, "60.0": 2, "+Inf": 2},
            5.0,
            DISK,
        ),
        **histogram("capture_duration_seconds", {"0.01": 0, "0.1": 0, "1.0": 2, "+Inf": 2}, 0.5),
        **histogram("lock_wait_seconds", {"0.01": 0, "1.0": 1, "+Inf": 1}, 0.5),
    }


def test_info_says_which_model_gpu_ranks_and_versions(
    samples: Callable[..., dict[str, float]],
) -> None:
    (info,) = named(samples({}), "info")
    labels = dict(re.findall(r'(\w+)="([^"]*)"', info))
    assert labels == {
        "slot": "0",
        "role": "target",
        "model": "/models/m",
        "model_class": "MadeUp",
        "gpu_uuid": "",
        "pci_bus_id": "",
        "tp_rank": "1",
        "tp_size": "2",
        **dict.fromkeys(("pp_rank", "pp_size", "dp_rank", "dp_size", "ep_rank", "ep_size"), ""),
        "sglang_version": "",
        "hook_version": sglang_weight_hook.__version__,
        "hostname": socket.gethostname(),
    }


def test_an_update_from_another_checkpoint_adds_no_series(
    samples: Callable[..., dict[str, float]],
) -> None:
    (info,) = named(samples({}, {"moves_model": True}), "info")
    assert 'model="/models/m"' in info


def test_another_runner_in_the_slot_has_an_info_of_its_own_and_the_old_one_is_zero(
    samples: Callable[..., dict[str, float]],
) -> None:
    found = named(samples({}, {"moves_model": True, "instance": "another"}), "info")
    by_model = {re.findall('model="([^"]*)"', name)[0]: value for name, value in found.items()}
    assert by_model == {"/models/m": 0, "/models/updated": 1}


def test_a_pci_bus_id_is_written_as_nvml_does() -> None:
    assert metrics._as_nvml("0000:3b:00.0") == "00000000:3B:00.0"
    assert metrics._as_nvml("00000000:3B:00.0") == "00000000:3B:00.0"
    assert metrics._as_nvml(None) is None


def test_a_check_between_events_moves_the_time_and_nothing_else(
    samples: Callable[..., dict[str, float]],
) -> None:
    found = samples({}, {"checked": 200.0})
    assert found[f"{PREFIX}checked_timestamp_seconds{TARGET}"] == 200
    assert found[f"{PREFIX}events_total{TARGET}"] == 1


def test_a_check_before_the_first_event_is_no_sample(
    samples: Callable[..., dict[str, float]],
) -> None:
    found = samples({"checked": 200.0}, {"checked_at": None})
    assert found[f"{PREFIX}events_total{TARGET}"] == 1
    assert named(found, "checked_timestamp_seconds") == {}


def test_an_unannounced_change_is_no_call_of_sglangs(
    samples: Callable[..., dict[str, float]],
) -> None:
    found = samples({}, {"kind": UNANNOUNCED})
    assert found[f"{PREFIX}unannounced_changes_total{TARGET}"] == 1
    assert found[f"{PREFIX}events_total{TARGET}"] == 1
    counts = named(found, "event_duration_seconds_count")
    assert list(counts.values()) == [1]


def test_a_slot_never_has_more_series_than_the_page_says(
    samples: Callable[..., dict[str, float]],
) -> None:
    every = {name + "_bytes": 1 for name in metrics.MEMORY}
    updates: list[dict[str, Any]] = [
        {"kind": f"kind{number}", "memory": every, "waited": 0.1} for number in range(9)
    ]
    found = samples({"kind": "load_model", "starts": True, "memory": every}, *updates)
    counts = named(found, "event_duration_seconds_count")
    by_kind = {re.findall('kind="([^"]*)"', name)[0]: value for name, value in counts.items()}
    assert by_kind == {"start": 1, "kind0": 1, "kind1": 1, "kind2": 1, "other": 6}
    assert len(found) == metrics.series() <= 80
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert f"at most {metrics.series()} series" in page


def test_slots_and_drafts_have_series_of_their_own(
    samples: Callable[..., dict[str, float]],
) -> None:
    found = samples({}, {"slot": "0_draft", "role": "draft", "weights_bytes": 7}, {"slot": "1"})
    names = [name for name in found if "weights_bytes" in name]
    assert len(names) == 3
    assert len(named(found, "info")) == 3
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
    left = {name.partition("{")[0] for name in samples()}
    # What has been counted has been counted: histograms count, too.
    left = {name for name in left if not name.endswith(("_bucket", "_sum", "_count"))}
    assert left == {f"{metrics.PREFIX}{name}_total" for name in metrics.COUNTERS}


def test_events_before_the_client_is_imported_are_counted_later(
    samples: Callable[..., dict[str, float]],
) -> None:
    found = samples({"success": False}, {}, client="late")
    assert found[f"{metrics.PREFIX}events_total{TARGET}"] == 2
    assert found[f"{metrics.PREFIX}event_failures_total{TARGET}"] == 1
    assert list(named(found, "event_duration_seconds_count").values()) == [2]


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
    monkeypatch.setattr(metrics, "_failed", False)
    monkeypatch.setattr(metrics, "_slots", {})
    client = SimpleNamespace(Gauge=broken, Counter=broken, Histogram=broken)
    monkeypatch.setitem(__import__("sys").modules, "prometheus_client", client)
    runner = SimpleNamespace(server_args=SimpleNamespace(enable_metrics=True))
    once._said.clear()
    for _ in range(3):
        metrics.update(runner, "0", "target", metrics.Ended("ready", 1, 1, 0, True, 0.0, 1.0))
        metrics.checked("0", "target", 1.0)
        metrics.forget("0", "target")
    assert len([line for line in caplog.messages if "no metrics" in line]) == 1


# The collector takes a runner while this very thread is inside the client, which holds its lock.
FORGET = """
import json, sys, time
from types import SimpleNamespace
import prometheus_client
from prometheus_client import values
from sglang_weight_hook.publisher import metrics
runner = SimpleNamespace(server_args=SimpleNamespace(enable_metrics=True))
metrics.update(runner, "0", "target", metrics.Ended("ready", 1, 1, 0, True, 100.0, 102.5,
    weights_bytes=1))
sample = metrics._slots["0", "target"].sample("weights_bytes")._value
(lock,) = [cell.cell_contents for cell in type(sample).set.__closure__
    if hasattr(cell.cell_contents, "acquire")]
with lock:
    metrics.forget("0", "target")
deadline = time.monotonic() + 10
while sample.get() and time.monotonic() < deadline:
    time.sleep(0.01)
time.sleep(0.2)
"""


def test_a_runner_collected_inside_the_client_blocks_nothing_and_leaves_no_state(
    samples: Callable[..., dict[str, float]], run_python: Run, tmp_path: Path
) -> None:
    run_python("-c", FORGET, PROMETHEUS_MULTIPROC_DIR=str(tmp_path / "multiprocess"))
    found = samples()
    assert found[f"{PREFIX}weights_bytes{TARGET}"] == 0
    assert found[f"{PREFIX}check_period_seconds{TARGET}"] == 0
    assert set(named(found, "state").values()) == {0}
    assert set(named(found, "info").values()) == {0}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which functions of ours the recorder calls."""
    seen: list[str] = []
    for name in ("waited", "update", "checked", "forget"):
        real = getattr(metrics, name)

        def noted(*arguments: Any, name: str = name, real: Any = real) -> None:
            seen.append(name)
            real(*arguments)

        monkeypatch.setattr(metrics, name, noted)
    return seen


def test_further_buckets_of_a_stream_cost_nothing(
    asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    # The stream is ended here, not by the thread.
    monkeypatch.setenv("SGLANG_WEIGHT_HOOK_QUIET_MS", "60000")
    settings._settings = None
    runner = FakeRunner(a_model())
    load(runner)
    settle()
    asked.clear()
    for _ in range(20):
        stream(runner)
    assert asked == ["waited"]
    recorder._RECORDER.end_streams(time.monotonic(), everything=True)
    assert asked == ["waited", "update"]


def test_a_check_that_holds_says_so(asked: list[str], runner: FakeRunner) -> None:
    (tracked,) = recorder._RECORDER.runners()
    asked.clear()
    assert recorder._RECORDER.check(tracked, thoroughly=True)
    assert asked == ["checked"]


def test_a_failing_client_does_not_reach_sglang(
    runner: FakeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def __getattr__(self, name: str) -> Any:
            raise OSError(28, "No space left on device")

    runner.server_args = SimpleNamespace(enable_metrics=True)
    monkeypatch.setattr(metrics, "_metrics", dict.fromkeys(metrics.METRICS, Broken()))
    monkeypatch.setattr(metrics, "_slots", {})
    update(runner)
    (tracked,) = recorder._RECORDER.runners()
    assert recorder._RECORDER.check(tracked, thoroughly=True)
    assert metrics._slots  # so it was asked


def test_every_text_stands_alone() -> None:
    for name, metric in metrics.METRICS.items():
        first = metric.help.split()[0]
        assert first not in ("It", "This", "That", "Those", "They", "There", "Rises"), name
        assert "what was registered" not in metric.help, name  # for RDMA or IPC: say so
        assert "slot" in metric.help, name
        assert metric.help.endswith("."), name
        if name.endswith("_seconds"):
            assert "seconds" in metric.help.lower(), name
        for word in (" it took", "after it", " ours"):
            assert word not in metric.help, name


def rows() -> list[str]:
    """The table of docs/metrics.md."""
    lines = ["| name | type | labels besides `slot`, `role` | meaning |", "|---|---|---|---|"]
    for name, metric in metrics.METRICS.items():
        whole = PREFIX + name + ("_total" if metric.type == "counter" else "")
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        lines.append(f"| `{whole}` | {metric.type} | {labels} | {metric.help} |")
    return lines


def test_the_pages_table_is_the_codes() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"(?:^\| .*\n\|---.*\n)(?:^\| `sglang_.*\n)+", page, re.MULTILINE)
    assert table.splitlines() == rows()
    for kind in (*metrics.MEMORY, *metrics.STATES):
        assert f"`{kind}`" in page, kind


def test_the_dashboard_names_every_metric_and_no_other() -> None:
    names = set()
    for name, metric in metrics.METRICS.items():
        if metric.type == "histogram":
            names.add(f"{PREFIX}{name}_bucket")
        else:
            names.add(PREFIX + name + ("_total" if metric.type == "counter" else ""))
    dashboard = json.loads((ROOT / "docs" / "grafana.json").read_bytes())
    asked = set()
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            asked |= set(re.findall(r"sglang_weight_hook_\w+", target["expr"]))
    assert asked == names
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    assert all(panel["description"] for panel in dashboard["panels"])
