"""The documents' formats, computed here a second time and compared."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from fake_sglang import FakeRunner, load, settle, update, walk_json
from hypothesis import given
from hypothesis import strategies as st

from sglang_weight_hook.layout import files
from sglang_weight_hook.publisher import capture as capture_module
from sglang_weight_hook.publisher import document, publish, recorder

torch = pytest.importorskip("torch")
nn = torch.nn


@pytest.fixture
def runner() -> FakeRunner:
    model = nn.Module()
    model.embed_tokens, model.norm = nn.Embedding(7, 4), nn.BatchNorm1d(4)
    model.lm_head = nn.Linear(4, 7, bias=False)
    model.lm_head.weight = model.embed_tokens.weight
    model.w_kc = torch.zeros(3, 4).t()
    return FakeRunner(model)


def published(maps: Path, name: str) -> Any:
    return json.loads((maps / name.format(0)).read_bytes())


# --- the legacy format --------------------------------------------------------------


def seeds_own(model: Any, updated: bool) -> dict[str, Any]:
    """The legacy format, made its own way: named_parameters(), on the device alone."""
    meta = {}
    for name, tensor in model.named_parameters():
        meta[name] = {
            "ptr": tensor.data_ptr(),
            "size": tensor.numel() * tensor.element_size(),
            "device": str(tensor.device),
            "dtype": str(tensor.dtype),
            "shape": list(tensor.shape),
        }
        if updated:
            meta[name]["updated"] = True
    return meta


@pytest.mark.parametrize("updated", [False, True])
def test_weights_meta_is_byte_for_byte_the_legacy_format(
    updated: bool, runner: FakeRunner, maps: Path
) -> None:
    load(runner)
    if updated:
        update(runner)
    text = (maps / "weights_meta_0.json").read_text()
    assert text == json.dumps(seeds_own(runner.model, updated), indent=2)


def test_weights_meta_has_every_name_of_named_parameters_also_over_one_memory(
    runner: FakeRunner, maps: Path
) -> None:
    # A draft's head may be a new Parameter over the target's memory: named_parameters()
    # names both, and so does the legacy format.
    runner.model.head2 = nn.Linear(4, 7, bias=False)
    runner.model.head2.weight = nn.Parameter(runner.model.lm_head.weight.data)
    load(runner)
    assert published(maps, files.WEIGHTS_META) == seeds_own(runner.model, False)
    assert list(published(maps, files.WEIGHTS_META)) == list(seeds_own(runner.model, False))


def test_total_weight_meta_is_gib_per_device(runner: FakeRunner, maps: Path) -> None:
    load(runner)
    size = sum(p.numel() * p.element_size() for p in runner.model.parameters())
    assert published(maps, files.TOTAL_META) == {"cpu": size / 1024**3}


def test_the_update_summary_has_the_fields_of_the_legacy_format(
    runner: FakeRunner, maps: Path
) -> None:
    load(runner)
    before = time.time()
    update(runner)
    summary = published(maps, files.SUMMARY)
    stamp = summary["update_timestamp"]
    assert before <= stamp <= time.time()
    totals = published(maps, files.TOTAL_META)
    assert list(summary.items()) == [
        ("update_timestamp", stamp),
        (
            "update_time_readable",
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(stamp)),
        ),
        ("gpu_id", 0),
        ("total_weights", 3),
        ("total_devices", 1),
        ("device_weight_summary", totals),
        ("memory_usage_gb", totals["cpu"]),
    ]


def test_merged_weights_are_the_regions_with_their_names(runner: FakeRunner, maps: Path) -> None:
    load(runner)
    merged = published(maps, files.MERGED)
    assert {tuple(entry) for entry in merged} == {("ptr", "size", "device", "weights")}
    assert [(e["ptr"], e["size"], e["device"], e["weights"]) for e in merged] == [
        (r["ptr"], r["size"], r["device"], r["tensors"])
        for r in published(maps, files.LAYOUT)["regions"]
    ]
    assert sorted(name for entry in merged for name in entry["weights"]) == sorted(
        name for name, entry in published(maps, files.LAYOUT)["tensors"].items() if entry["size"]
    )


# --- the layout ---------------------------------------------------------------------------

TENSOR_FIELDS = {
    "ptr",
    "size",
    "device",
    "dtype",
    "shape",
    "stride",
    "storage_offset",
    "storage_ptr",
    "storage_size",
    "kind",
    "aliases",
}
IDENTITY_FIELDS = {
    "hostname",
    "boot_id",
    "pid",
    "process_start_ticks",
    "gpu_id",
    "gpu_uuid",
    "pci_bus_id",
    "cuda_visible_devices",
    "role",
    "draft_index",
    "tp_rank",
    "tp_size",
    "pp_rank",
    "pp_size",
    "dp_rank",
    "dp_size",
    "ep_rank",
    "ep_size",
    "node_rank",
    "model_path",
    "model_class",
    "quantization",
    "sglang_version",
    "torch_version",
    "hook_version",
}
EVENT_FIELDS = {
    "kind",
    "success",
    "message",
    "started_at",
    "finished_at",
    "moved",
    "added",
    "removed",
}


def test_the_layout_has_every_field_of_the_contract(runner: FakeRunner, maps: Path) -> None:
    load(runner)
    settle()
    layout = published(maps, files.LAYOUT)
    assert (layout["schema"], layout["schema_version"]) == ("sglang-weight-layout", 1)
    assert (layout["layout_generation"], layout["content_generation"]) == (1, 1)
    assert layout["state"] == "ready"
    assert set(layout["identity"]) >= IDENTITY_FIELDS
    assert set(layout["event"]) >= EVENT_FIELDS
    for entry in layout["tensors"].values():
        assert set(entry) >= TENSOR_FIELDS
    for region in layout["regions"]:
        assert set(region) >= {"ptr", "size", "device", "allocation_ptr", "allocation_size"}
    assert set(layout["totals"]) == {"cpu"}
    assert set(layout["memory"]) >= {
        "weights_bytes",
        "kv_cache_bytes",
        "kv_cache",
        "device_total_bytes",
        "device_free_bytes",
    }
    assert set(layout["validation"]) >= {"expected", "captured", "left_out"}


def test_the_validation_counts_what_the_model_holds(runner: FakeRunner, maps: Path) -> None:
    runner.model.sparse = torch.eye(2).to_sparse()
    load(runner)
    assert published(maps, files.LAYOUT)["validation"]["named_parameters"] is None
    settle()
    validation = published(maps, files.LAYOUT)["validation"]
    assert validation["expected"] == {"parameter": 4, "buffer": 3, "attribute": 2, "lora": 0}
    assert validation["captured"] == {"parameter": 3, "buffer": 3, "attribute": 1}
    assert (validation["aliases"], validation["named_parameters"]) == (1, 3)
    assert list(validation["left_out"]) == ["sparse"]


def test_the_kinds_and_the_aliases_are_in_the_layout(runner: FakeRunner, maps: Path) -> None:
    load(runner)
    tensors = published(maps, files.LAYOUT)["tensors"]
    assert tensors["embed_tokens.weight"]["aliases"] == ["lm_head.weight"]
    assert tensors["w_kc"]["kind"] == "attribute"
    assert tensors["w_kc"]["stride"] == [1, 4]
    assert tensors["norm.running_mean"]["kind"] == "buffer"


# --- changes ------------------------------------------------------------------------------


def test_changes_count_moved_added_and_removed_names(runner: FakeRunner) -> None:
    before = capture_module.capture(runner)
    assert document.changes(None, before) == (0, 7, 0, ())
    assert document.changes(before, before) == (0, 0, 0, ())
    runner.model.w_kc = runner.model.w_kc.t()
    runner.model.late = torch.zeros(1)
    runner.model.norm.bias = None
    after = capture_module.capture(runner)
    assert document.changes(before, after) == (1, 1, 1, ("w_kc", "late", "norm.bias"))


def test_a_new_alias_is_a_new_layout(runner: FakeRunner) -> None:
    before = capture_module.capture(runner)
    runner.model.also = runner.model.w_kc
    after = capture_module.capture(runner)
    assert before.tensors == after.tensors
    assert not document.same_layout(before, after)


# --- the state ----------------------------------------------------------------------------

HOSTILE = ["x" * 10_000, "\U0001f40d" * 5000, "\udc80" * 5000, "\x00" * 5000, '"\\\n' * 4000, ""]
PROCESS = {
    "pid": 2**22,
    "process_start_ticks": 2**40,
    "boot_id": "01234567-89ab-cdef-0123-456789abcdef",
    "hostname": "h" * 255,
}


def state(
    message: str,
    problem: str,
    missing: list[str],
    slot: str,
    subscribers: dict[str, str | None] | None = None,
) -> dict[str, Any]:
    event = document.event(
        "update_weights_from_distributed",
        False,
        message,
        time.time(),
        time.time(),
        document.Changes(10**6, 10**6, 10**6, ()),
        10**9,
        {"update_weights_from_distributed": 10**9, "update_weights_from_tensor": 10**9},
        10**3 + 0.123456,
        False,
    )
    residency = dict.fromkeys(("weights", "kv_cache", "cuda_graph"), "resident")
    return document.state(
        document.Standing("ab" * 8, "updating", 10**9, 10**9, 10**9, 10**9, residency, time.time()),
        event,
        PROCESS,
        slot,
        "unavailable: Too many levels of symbolic links",
        missing,
        problem,
        "weight_hook_4194304.sock",
        time.time(),
        subscribers,
    )


@pytest.mark.parametrize("orjson", [True, False])
@pytest.mark.parametrize("text", HOSTILE, ids=["ascii", "wide", "surrogate", "nul", "quotes", ""])
def test_the_state_file_stays_below_2_kb_whatever_is_said(
    text: str, orjson: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not orjson:
        monkeypatch.setitem(__import__("sys").modules, "orjson", None)
    longest = max((f"{e}: {e}" for e in ("expert_location_update" * 3,)), key=len)
    data = publish.encode(state(text, text, [longest] * 30, "0_draft." + "n" * 255))
    assert len(data) < 2048
    assert json.loads(data)["missing_count"] == 30


@pytest.mark.parametrize("text", HOSTILE, ids=["ascii", "wide", "surrogate", "nul", "quotes", ""])
def test_the_state_file_stays_below_2_kb_whatever_the_names_are(text: str) -> None:
    data = publish.encode(state(text, text, [text] * 30, "0"))
    assert len(data) < 2048


@pytest.mark.parametrize("text", HOSTILE, ids=["ascii", "wide", "surrogate", "nul", "quotes", ""])
def test_the_state_of_an_unannounced_change_stays_below_2_kb(text: str) -> None:
    made = state("", text, [text] * 30, "0_draft." + "n" * 255)
    made["event"] = document.event(
        "unannounced_change",
        True,
        None,
        time.time(),
        time.time(),
        document.Changes(10**6, 10**6, 10**6, ()),
        0,
        names=[text] * 5,
    )
    assert len(publish.encode(made)) < 2048


@pytest.mark.parametrize("text", HOSTILE, ids=["ascii", "wide", "surrogate", "nul", "quotes", ""])
@pytest.mark.parametrize(
    "message", HOSTILE[:5], ids=["ascii", "wide", "surrogate", "nul", "quotes"]
)
def test_the_state_stays_below_2_kb_whatever_subscribers_say(text: str, message: str) -> None:
    names = [text + str(i) for i in range(9)]
    longest = "expert_location_update: expert_location_update"
    made = state(
        message, message, [longest] * 30, "0_draft." + "n" * 255, dict.fromkeys(names, text)
    )
    assert len(publish.encode(made)) < 2048
    assert len(made["subscribers"]) == 3


def test_of_a_long_name_the_end_is_kept() -> None:
    name = "model.layers.0.self_attn.rotary_emb.cos_sin_cache"
    made = document.event("unannounced_change", True, None, 0.0, 1.0, None, 0, names=[name, "x"])
    assert made["tensors"][1] == "x"
    assert made["tensors"][0].startswith("...")
    assert name.endswith(made["tensors"][0][3:])
    assert made["tensors"][0].endswith("rotary_emb.cos_sin_cache")


@given(st.text(), st.text())
def test_a_message_is_kept_whole_or_cut_visibly(message: str, problem: str) -> None:
    made = state(message, problem, [], "0")
    for kept, given_text in ((made["event"]["message"], message), (made["problem"], problem)):
        assert kept == given_text or (kept.endswith("...") and given_text.startswith(kept[:-3]))


def test_a_published_state_with_a_hostile_message_is_small_and_whole(
    runner: FakeRunner, maps: Path
) -> None:
    load(runner)
    for text in HOSTILE:
        event = recorder.begin("update_weights_from_disk", "update", [runner])
        assert event is not None
        recorder.finish(event, (False, text), None)
        data = (maps / "weight_state_0.json").read_bytes()
        assert len(data) < 2048
        state = json.loads(data)
        assert set(state) >= {
            "state",
            "layout_generation",
            "content_generation",
            "event",
            "pid",
            "updated_at",
        }
        assert (state["event"]["message"] == text) == (len(text) < 100)


def test_no_document_holds_a_number_that_json_does_not_have(runner: FakeRunner, maps: Path) -> None:
    load(runner)
    settle()
    update(runner)
    for path in maps.glob("*.json"):
        text = path.read_text()
        assert "NaN" not in text
        assert "Infinity" not in text
        for item in walk_json(json.loads(text)):
            assert item is None or isinstance(item, (str, int, float, list, dict))
