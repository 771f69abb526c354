"""Prometheus metrics of all slots that the agent sees, also where SGLang's own are off.

Their names differ from those on SGLang's own `/metrics` (`sglang_weight_hook_…`), so that who
scrapes both adds nothing up twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Optional

from ..layout.states import STATES
from .entry import Entry, checked_at
from .view import Views

PREFIX = "sglang_weight_agent_"
MEDIA_TYPE = "text/plain; version=0.0.4"

INFO = (
    *("model_path", "model_class", "role", "device", "gpu_id", "gpu_uuid", "pci_bus_id"),
    *("tp_rank", "tp_size", "pp_rank", "pp_size", "dp_rank", "dp_size", "ep_rank", "ep_size"),
    *("sglang_version", "hook_version", "hostname"),
)
MEMORY = (
    *("weights", "kv_cache", "lora", "siblings", "other_live", "reserved_free", "other"),
    *("unbacked", "device_free", "device_total", "shared", "shared_kv_cache", "off_device"),
)


class Metric(NamedTuple):
    type: str
    help: str  # Prometheus shows it without anything around it


METRICS = {
    "slot_info": Metric(
        "gauge",
        "1 for each published slot (one model runner of an SGLang process), with its model, GPU, "
        "ranks and versions as labels.",
    ),
    "slot_owner_alive": Metric(
        "gauge", "1 if the SGLang process that publishes the slot lives, 0 if it has exited."
    ),
    "slot_readable": Metric("gauge", "1 if the slot's published files can be read, 0 if not."),
    "slot_state": Metric(
        "gauge",
        "1 for the state of the slot's weights as published last (loading, ready, updating, failed "
        "or released), 0 for the other states.",
    ),
    "slot_layout_generation": Metric(
        "gauge",
        "Rises when the address, size or name of one of the slot's weights has changed, so that "
        "what was registered has to be registered again.",
    ),
    "slot_content_generation": Metric(
        "gauge", "Rises when values of the slot's weights have changed, or may have changed."
    ),
    "slot_physical_epoch": Metric(
        "gauge",
        "Rises when other physical pages were put behind unchanged addresses of the slot's "
        "weights, so that all of them have to be registered again.",
    ),
    "slot_kv_physical_epoch": Metric(
        "gauge",
        "Rises when other physical pages were put behind unchanged addresses of the slot's KV "
        "cache, so that it has to be registered again.",
    ),
    "slot_checked_timestamp_seconds": Metric(
        "gauge",
        "When the slot's published map and the memory of the SGLang process were last found "
        "equal, in seconds since 1970-01-01 UTC.",
    ),
    "slot_memory_bytes": Metric(
        "gauge",
        "Bytes of memory by kind, as of the slot's last publication: what the slot itself has "
        "(weights, kv_cache, lora, and shared, shared_kv_cache, off_device of them) and what else "
        "takes up its GPU.",
    ),
    "slot_last_event_success": Metric(
        "gauge",
        "1 if the last call of SGLang's that changes the slot's weights succeeded, 0 if it failed; "
        "absent while one lasts.",
    ),
    "slot_last_event_seconds": Metric(
        "gauge",
        "Duration of the last call of SGLang's that changes the slot's weights, in seconds; absent "
        "while one lasts.",
    ),
    "slot_last_event_timestamp_seconds": Metric(
        "gauge",
        "When the last call of SGLang's that changes the slot's weights had returned, in seconds "
        "since 1970-01-01 UTC; absent while one lasts.",
    ),
    "directory_readable": Metric(
        "gauge", "1 if the output directory is there and can be read by the agent, 0 if not."
    ),
    "event_streams": Metric("gauge", "Clients that follow the agent's stream of events now."),
    "registered_slots": Metric(
        "gauge", "Slots that the agent has registered in etcd under a lease of its own."
    ),
    "registry_failures_total": Metric(
        "counter", "Requests to etcd that were not answered, or were refused."
    ),
    "registry_contested_slots": Metric(
        "gauge", "Live slots that another agent has registered in etcd, so that this one waits."
    ),
}

_Sample = tuple[str, Mapping[str, str], float]


def text(views: Views, agent: Mapping[str, float]) -> str:
    """In Prometheus' text format.  ``agent``: figures of the agent itself, by metric."""
    samples: list[_Sample] = []
    for entry in views.entries():
        samples += _of_slot(entry)
    for view in views.directories:
        labels = {"directory": view.directory.path}
        samples.append(("directory_readable", labels, float(view.problem is None)))
    samples += [(name, {}, value) for name, value in agent.items()]
    lines: list[str] = []
    for name, metric in METRICS.items():
        mine = [sample for sample in samples if sample[0] == name]
        if mine:
            lines.append(f"# HELP {PREFIX}{name} {metric.help}")
            lines.append(f"# TYPE {PREFIX}{name} {metric.type}")
            lines += [
                f"{PREFIX}{name}{_labels(labels)} {_value(value)}" for _, labels, value in mine
            ]
    return "\n".join(lines) + "\n"


def _of_slot(entry: Entry) -> list[_Sample]:
    state = entry.content["state"] or {}
    summary = entry.content["summary"]
    labels = {"slot": entry.id}
    info = {name: "" if summary.get(name) is None else str(summary[name]) for name in INFO}
    found: list[_Sample] = [
        ("slot_info", {**labels, "directory": entry.slot.directory, **info}, 1.0),
        ("slot_owner_alive", labels, float(entry.content["owner_alive"])),
        ("slot_readable", labels, float(entry.content["problem"] is None)),
        *(("slot_state", {**labels, "state": s}, float(state.get("state") == s)) for s in STATES),
    ]
    event = state.get("event")
    event = event if isinstance(event, dict) else {}
    started, finished = _figure(event.get("started_at")), _figure(event.get("finished_at"))
    success = event.get("success")
    figures = {
        "layout_generation": _figure(state.get("layout_generation")),
        "content_generation": _figure(state.get("content_generation")),
        "physical_epoch": _figure(state.get("physical_epoch")),
        "kv_physical_epoch": _figure(state.get("kv_physical_epoch")),
        "checked_timestamp_seconds": checked_at(entry),
        "last_event_success": float(success) if isinstance(success, bool) else None,
        "last_event_seconds": None
        if started is None or finished is None
        else max(finished - started, 0.0),
        "last_event_timestamp_seconds": finished,
    }
    found += [("slot_" + n, labels, value) for n, value in figures.items() if value is not None]
    for kind in MEMORY:
        size = _figure(summary.get(kind + "_bytes"))
        if size is not None:
            found.append(("slot_memory_bytes", {**labels, "kind": kind}, size))
    return found


def _figure(value: Any) -> Optional[float]:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) < 1 << 64 else None


def _labels(labels: Mapping[str, str]) -> str:
    """
    >>> _labels({"slot": 'a"b', "path": "c:" + chr(92) + chr(10)})
    '{slot="a\\\\"b",path="c:\\\\\\\\\\\\n"}'
    """
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items()) + "}"


def _escaped(value: str) -> str:
    value = value.encode("utf-8", "replace").decode("utf-8")  # also lone surrogates
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _value(value: float) -> str:
    return str(int(value)) if value.is_integer() else repr(value)
