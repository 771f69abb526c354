"""A real Prometheus that scrapes a real server: the dashboard's queries, and alerts that fire.

Grafana itself is not run: a panel is what its queries answer.  How each alert behaves over hours,
and those that a CPU server cannot bring about, is in ``tests/unit/test_alerts.py``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cpu_sglang.environment import Environment
from cpu_sglang.server import HOST, free_port
from tests.real_sglang.hooked import HookedServer, pid_of, weights_held

pytestmark = pytest.mark.real_sglang

DOCS = Path(__file__).resolve().parents[2] / "docs"
DASHBOARD = json.loads((DOCS / "grafana.json").read_text(encoding="utf-8"))

# What a server without a GPU has no figure of.
NEEDS_A_GPU = 'kind="device_total"'

CONFIGURATION = """
global: {{scrape_interval: 500ms, scrape_timeout: 500ms, evaluation_interval: 500ms}}
rule_files: [{rules}]
scrape_configs:
  - job_name: sglang
    static_configs: [{{targets: ["{target}"]}}]
"""


class Prometheus:
    """A running Prometheus on a free port of 127.0.0.1."""

    def __init__(self, port: int) -> None:
        self._url = f"http://{HOST}:{port}"
        # A proxy has no business between a test and its own server.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(self, path: str, **parameters: str) -> Any:
        """The data of an answer of its HTTP API."""
        query = urllib.parse.urlencode(parameters)
        with self._opener.open(f"{self._url}{path}?{query}", timeout=10) as answer:
            found = json.load(answer)
        assert found["status"] == "success"
        assert not found.get("warnings")
        return found["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        result: list[dict[str, Any]] = self.ask("/api/v1/query", query=expression)["result"]
        return result

    def firing(self) -> set[str]:
        alerts = self.ask("/api/v1/alerts")["alerts"]
        return {one["labels"]["alertname"] for one in alerts if one["state"] == "firing"}

    def is_ready(self) -> bool:
        try:
            with self._opener.open(f"{self._url}/-/ready", timeout=10) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


def wait_until(holds: Callable[[], object], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.2)


@contextmanager
def running_prometheus(folder: Path, target: str) -> Iterator[Prometheus]:
    program = shutil.which("prometheus")
    assert program is not None
    folder.mkdir()
    # The rules as they are, but for how long they wait.
    rules = (DOCS / "alerts.yml").read_text(encoding="utf-8")
    (folder / "alerts.yml").write_text(re.sub(r"for: \w+", "for: 1s", rules), encoding="utf-8")
    settings = CONFIGURATION.format(rules=folder / "alerts.yml", target=target)
    (folder / "prometheus.yml").write_text(settings, encoding="utf-8")
    port = free_port()
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            [
                program,
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={HOST}:{port}",
                "--log.level=warn",
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        prometheus = Prometheus(port)
        wait_until(
            lambda: prometheus.is_ready() or process.poll() is not None, "Prometheus is ready"
        )
        assert process.poll() is None, (folder / "log").read_text(encoding="utf-8")
        yield prometheus
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prometheus")


@pytest.fixture(scope="module")
def server(
    environment: Environment,
    hooked_python: Path,
    checkpoint: Callable[..., Path],
    folder: Path,
) -> Iterator[HookedServer]:
    if shutil.which("prometheus") is None:
        pytest.skip("needs prometheus (Debian package prometheus)")
    variables = {
        "SGLANG_WEIGHT_HOOK_CHECK_SECONDS": "1",
        "SGLANG_WEIGHT_HOOK_LOCK_TIMEOUT": "0.5",
    }
    server = HookedServer(
        environment, hooked_python, checkpoint(1), folder, ["--enable-metrics"], variables
    )
    with server:
        server.generate()  # SGLang serves no metrics before the first request
        yield server


@pytest.fixture(scope="module")
def prometheus(
    server: HookedServer, checkpoint: Callable[..., Path], folder: Path
) -> Iterator[Prometheus]:
    """After some scrapes before an update, and some after it."""
    with running_prometheus(folder / "prometheus", server.url.removeprefix("http://")) as found:
        scrapes = "count_over_time(sglang_weight_hook_info[1m])"
        wait_until(lambda: found.query(f"{scrapes} > 2"), "three scrapes")
        assert server.update_weights_from_disk(checkpoint(2))[1]["success"]
        wait_until(
            lambda: found.query("increase(sglang_weight_hook_events_total[1m]) > 0"),
            "an update is scraped",
        )
        yield found


def dashboard_queries() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


@pytest.mark.parametrize("query", dashboard_queries())
def test_a_query_of_the_dashboard_has_an_answer(query: str, prometheus: Prometheus) -> None:
    expression = query.replace("$instance", ".*").replace("$slot", ".*")
    assert "$" not in expression
    answers = prometheus.query(expression)
    if NEEDS_A_GPU in expression:
        assert answers == []
    else:
        assert answers
        assert all(answer["metric"]["slot"] == "0" for answer in answers)


def test_the_durations_of_the_dashboard_are_numbers(prometheus: Prometheus) -> None:
    (panel,) = [one for one in DASHBOARD["panels"] if one["title"].startswith("Duration of events")]
    expression = panel["targets"][0]["expr"].replace("$instance", ".*").replace("$slot", ".*")
    values = {
        answer["metric"]["kind"]: float(answer["value"][1])
        for answer in prometheus.query(expression)
    }
    assert 0 < values["update_weights_from_disk"] < 60


def test_the_choices_of_the_dashboard_are_there(
    prometheus: Prometheus, server: HookedServer
) -> None:
    expected = {"instance": [server.url.removeprefix("http://")], "slot": ["0"]}
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            metric, label = re.fullmatch(
                r"label_values\((\w+), (\w+)\)", variable["query"]["query"]
            ).groups()  # type: ignore[union-attr]
            found = prometheus.ask(f"/api/v1/label/{label}/values", **{"match[]": metric})
            assert found == expected[variable["name"]]


def test_every_rule_is_evaluated_and_what_it_asks_for_is_there(prometheus: Prometheus) -> None:
    def rules() -> list[dict[str, Any]]:
        (group,) = prometheus.ask("/api/v1/rules")["groups"]
        found: list[dict[str, Any]] = group["rules"]
        return found

    wait_until(lambda: all(rule["health"] != "unknown" for rule in rules()), "rules are evaluated")
    for rule in rules():
        assert rule["health"] == "ok", rule
        selectors = re.findall(r"(?:sglang_weight_hook_\w+|\bup\b)(?:\{[^}]*\})?", rule["query"])
        assert selectors
        for selector in selectors:
            assert prometheus.query(selector), (rule["name"], selector)


def test_a_healthy_server_fires_nothing(prometheus: Prometheus) -> None:
    time.sleep(3)
    # On a busy machine a scrape may once have come too late.
    wait_until(lambda: prometheus.firing() == set(), "no alert")


def test_a_failed_update_fires_until_one_succeeds(
    prometheus: Prometheus, server: HookedServer, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    assert not server.update_weights_from_disk(tmp_path / "nothing")[1]["success"]
    wait_until(lambda: prometheus.firing() == {"SGLangWeightUpdateFailed"}, "the alert fires")
    assert server.update_weights_from_disk(checkpoint(1))[1]["success"]
    wait_until(lambda: prometheus.firing() == set(), "the alert is over")


def test_a_scheduler_that_hangs_is_not_taken_for_one_whose_map_holds(
    prometheus: Prometheus, server: HookedServer
) -> None:
    (slot,) = server.maps.slots()
    scheduler = pid_of(slot)
    os.kill(scheduler, signal.SIGSTOP)
    try:
        wait_until(lambda: prometheus.firing() == {"SGLangWeightMapNotChecked"}, "the alert fires")
    finally:
        os.kill(scheduler, signal.SIGCONT)
    wait_until(lambda: prometheus.firing() == set(), "the alert is over")


# Their alerts last for 15 minutes, so these come last.


def test_a_reader_that_holds_the_lock_too_long_fires(
    prometheus: Prometheus, server: HookedServer, checkpoint: Callable[..., Path]
) -> None:
    (slot,) = server.maps.slots()
    with weights_held(slot):
        assert server.update_weights_from_disk(checkpoint(2))[1]["success"]
    wait_until(lambda: prometheus.firing() == {"SGLangWeightLockTimeout"}, "the alert fires")
    (waited,) = prometheus.query("sglang_weight_hook_lock_wait_seconds_sum")
    assert float(waited["value"][1]) >= 0.5


def test_a_server_that_exits_fires(prometheus: Prometheus, server: HookedServer) -> None:
    server.stop()
    wait_until(lambda: "SGLangWeightServerDown" in prometheus.firing(), "the alert fires")
    assert "SGLangWeightSlotGone" not in prometheus.firing()
