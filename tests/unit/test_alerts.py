"""The alert rules and the queries of docs/metrics.md, by Prometheus's own promtool.

That a real server's metrics answer them is shown in ``tests/real_sglang/test_prometheus.py``.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from sglang_weight_hook.publisher import metrics

DOCS = Path(__file__).resolve().parents[2] / "docs"
RULES = DOCS / "alerts.yml"
PAGE = DOCS / "metrics.md"


@pytest.fixture
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("needs promtool (Debian package prometheus)")
    return found


def ran(promtool: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [promtool, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def alerts() -> list[str]:
    return re.findall(r"^      - alert: (\w+)$", RULES.read_text(encoding="utf-8"), re.MULTILINE)


def test_prometheus_accepts_the_rules(promtool: str) -> None:
    finished = ran(promtool, "check", "rules", RULES)
    assert finished.returncode == 0, finished.stdout
    assert f"{len(alerts())} rules found" in finished.stdout


def test_each_alert_fires_when_it_should_and_only_then(promtool: str) -> None:
    finished = ran(promtool, "test", "rules", DOCS / "alerts_test.yml")
    assert finished.returncode == 0, finished.stdout


@pytest.mark.parametrize("alert", alerts())
@pytest.mark.parametrize("broken", ["vector(1)", "vector(1) > 2"])
def test_a_rule_that_always_or_never_fires_is_found(
    alert: str, broken: str, promtool: str, tmp_path: Path
) -> None:
    text = RULES.read_text(encoding="utf-8")
    head, name, tail = text.partition(f"- alert: {alert}\n")
    expression = r"^        expr: \|\n(?:          .*\n)+"
    tail, replaced = re.subn(expression, f"        expr: {broken}\n", tail, count=1, flags=re.M)
    assert replaced == 1
    changed = head + name + tail
    (tmp_path / "alerts.yml").write_text(changed, encoding="utf-8")
    tests = tmp_path / "alerts_test.yml"
    tests.write_bytes((DOCS / "alerts_test.yml").read_bytes())
    assert ran(promtool, "check", "rules", tmp_path / "alerts.yml").returncode == 0
    finished = ran(promtool, "test", "rules", tests)
    assert finished.returncode == 1
    assert alert in finished.stdout


def test_the_rules_ask_for_metrics_that_exist() -> None:
    known = {
        metrics.PREFIX + name + ("_total" if metric.type == "counter" else "")
        for name, metric in metrics.METRICS.items()
    }
    asked = re.findall(r"\bsglang_weight_hook_\w+", RULES.read_text(encoding="utf-8"))
    assert asked
    assert set(asked) <= known


def test_every_alert_is_on_the_page_and_its_texts_stand_alone() -> None:
    page = PAGE.read_text(encoding="utf-8")
    rules = RULES.read_text(encoding="utf-8").split("- alert: ")[1:]
    assert re.findall(r"^\| `(SGLang\w+)` \|", page, re.MULTILINE) == alerts()
    for rule in rules:
        alert = rule.partition("\n")[0]
        (severity,) = re.findall(r"severity: (\w+)", rule)
        assert severity in ("critical", "warning", "info"), alert
        (summary,) = re.findall(r'summary: "(.*)"', rule)
        (description,) = re.findall(r'description: "(.*)"', rule)
        for text in (summary, description):
            assert "SGLang" in text, alert
            assert "{{ $labels.instance }}" in text, alert
        assert description.endswith((".", "?")), alert
        if "(up == 0)" not in rule:
            assert "{{ $labels.slot }}" in summary, alert


# --- the queries of the page ------------------------------------------------------------------

# A server with a target and a draft on one GPU, and a second one on another; what NVIDIA's DCGM
# exporter says of the machine.  In the form of alerts_test.yml, which is YAML and so takes JSON.
WHO = 'job="sglang",instance="gpu1:30000",slot="{slot}",role="{role}"'
GPU = (
    'gpu="{gpu}",UUID="GPU-{gpu}",pci_bus_id="00000000:{gpu}B:00.0",Hostname="gpu1",'
    'job="dcgm",instance="gpu1:9400"'
)


def made_up_series() -> dict[str, str]:
    found = {}
    for slot, role, gpu, size in (
        ("0", "target", 0, 70),
        ("0_draft", "draft", 0, 7),
        ("1", "target", 1, 70),
    ):
        who = WHO.format(slot=slot, role=role)
        own = f'gpu_uuid="GPU-{gpu}",pci_bus_id="00000000:{gpu}B:00.0",hostname="gpu1"'
        info = f'{who},model="/m/{role}",tp_rank="{gpu}",{own}'
        found[f"sglang_weight_hook_info{{{info}}}"] = "1x100"
        was = info.replace("/m/", "/was/")
        found[f"sglang_weight_hook_info{{{was}}}"] = "0x100"
        found[f"sglang_weight_hook_weights_bytes{{{who}}}"] = f"{size}x100"
        for kind, bytes_ in (
            ("weights", size),
            ("shared", 5 if role == "draft" else 0),
            ("kv_cache", 20),
            ("device_total", 100),
        ):
            found[f'sglang_weight_hook_memory_bytes{{{who},kind="{kind}"}}'] = f"{bytes_}x100"
        duration = "sglang_weight_hook_event_duration_seconds"
        for part, values in ((f'bucket{{le="10.0",{who}', "0x100"), (f"count{{{who}", "0+1x100")):
            found[f'{duration}_{part},kind="update_weights_from_disk"}}'] = values
    for gpu, load in ((0, 30), (1, 90)):
        found[f"DCGM_FI_DEV_GPU_UTIL{{{GPU.format(gpu=gpu)}}}"] = f"{load}x100"
    return found


def of_model(slot: str, role: str, gpu: int) -> str:
    own = f'gpu_uuid="GPU-{gpu}",pci_bus_id="00000000:{gpu}B:00.0",hostname="gpu1"'
    return f'{{{WHO.format(slot=slot, role=role)},model="/m/{role}",tp_rank="{gpu}",{own}}}'


def slots(more: str = "") -> list[str]:
    pairs = (("0", "target"), ("0_draft", "draft"), ("1", "target"))
    return [f'{{instance="gpu1:30000",slot="{slot}",role="{role}"{more}}}' for slot, role in pairs]


USED = [(of_model("0", "target", 0), 30.0), (of_model("1", "target", 1), 90.0)]
WEIGHTS = [
    (f'{{{WHO.format(slot=slot, role=role)},model="/m/{role}",tp_rank="{gpu}"}}', value)
    for slot, role, gpu, value in (
        ("0", "target", 0, 70.0),
        ("0_draft", "draft", 0, 7.0),
        ("1", "target", 1, 70.0),
    )
]
ANSWERS: list[list[tuple[str, float]]] = [
    [("{}", 142.0)],
    [(labels, 0.2) for labels in slots()],
    [
        (f'{{instance="gpu1:30000",slot="{slot}",kind="update_weights_from_disk"}}', 96.0)
        for slot in ("0", "0_draft", "1")
    ],
    WEIGHTS,
    USED,
    USED,
]


def page_queries() -> list[str]:
    page = PAGE.read_text(encoding="utf-8")
    return re.findall(r"^```promql\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def test_every_query_of_the_page_has_an_answer_here() -> None:
    assert len(page_queries()) == len(ANSWERS)


@pytest.mark.parametrize("number", range(len(ANSWERS)))
def test_a_query_of_the_page_answers_what_it_says(
    number: int, promtool: str, tmp_path: Path
) -> None:
    tests = tmp_path / "queries_test.yml"
    asked = {
        "expr": page_queries()[number],
        "eval_time": "24m",
        "exp_samples": [{"labels": labels, "value": value} for labels, value in ANSWERS[number]],
    }
    series = [{"series": name, "values": values} for name, values in made_up_series().items()]
    one = {"interval": "15s", "input_series": series, "promql_expr_test": [asked]}
    tests.write_text(json.dumps({"rule_files": [], "tests": [one]}), encoding="utf-8")
    finished = ran(promtool, "test", "rules", tests)
    assert finished.returncode == 0, finished.stdout
