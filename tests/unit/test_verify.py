"""What `verify` finds: nothing in what the recorder publishes, and every fault that is put in."""

from __future__ import annotations

import copy
import doctest
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from any_json import json_values, places
from fake_sglang import FakeRunner, event, stream, update
from hypothesis import given, settings
from hypothesis import strategies as st
from small_model import a_runner, torch

from sglang_weight_hook.layout import files
from sglang_weight_hook.reader import (
    json_schema,
    open_file,
    open_slot,
    schema_checker,
    verify,
)
from sglang_weight_hook.reader.verify import ERROR, WARNING

SCHEMAS = {
    name: json.loads(
        (Path(files.__file__).parent / "schema" / f"weight_{name}.schema.json").read_bytes()
    )
    for name in ("layout", "state")
}


@pytest.fixture
def runner() -> FakeRunner:
    return a_runner()


def findings(maps: Path, timeout: float = 1.0) -> list[tuple[str, str]]:
    verdict = verify.verify_slot(open_slot(str(maps), "0"), timeout)
    return [(finding.level, finding.check) for finding in verdict.findings]


Spoil = Callable[[str, Callable[[Any], Any]], None]


@pytest.fixture
def spoil(runner: FakeRunner, maps: Path) -> Spoil:
    def spoil(name: str, change: Callable[[Any], Any]) -> None:
        path = maps / name.format(0)
        content = json.loads(path.read_bytes())
        changed = change(content)
        path.write_text(json.dumps(content if changed is None else changed))

    return spoil


# --- nothing to find ------------------------------------------------------------------------


def test_what_the_recorder_publishes_has_no_findings(runner: FakeRunner, maps: Path) -> None:
    assert findings(maps) == []
    runner.model.layers[0].mlp.weight.data = torch.zeros(6, 6)
    update(runner)
    assert findings(maps) == []
    stream(runner)
    assert findings(maps) == []


def test_a_saved_copy_is_checked_by_itself(runner: FakeRunner, maps: Path) -> None:
    verdict = verify.verify_file(open_file(str(maps / files.LAYOUT.format(0))))
    assert verdict.good
    assert verdict.findings == []


# --- the state ------------------------------------------------------------------------------


def test_a_failed_update_is_a_warning(runner: FakeRunner, maps: Path) -> None:
    event("update_weights_from_disk", "update", [runner], result=(False, "no such directory"))
    assert findings(maps) == [(WARNING, "state")]


def test_released_weights_are_a_warning(runner: FakeRunner, maps: Path) -> None:
    event("release_memory_occupation", "release", details={"tags": [], "physical": True})
    assert findings(maps) == [(WARNING, "state")]


def test_during_an_update_the_other_files_are_not_compared(runner: FakeRunner, maps: Path) -> None:
    during: list[Any] = []
    update(runner, during=lambda: during.append(findings(maps, timeout=0)))
    assert during == [[(WARNING, "state")]]


def test_an_invalidated_map_is_an_error(runner: FakeRunner, maps: Path) -> None:
    kept = runner.model
    runner.model = None
    update(runner)
    assert (ERROR, "problem") in findings(maps)
    runner.model = kept


def test_missing_entry_points_and_a_lock_not_had_are_warnings(spoil: Spoil, maps: Path) -> None:
    spoil(
        files.STATE,
        lambda state: state.update(missing=["x: Class.method"], missing_count=1, lock="timeout"),
    )
    assert findings(maps) == [(WARNING, "missing"), (WARNING, "lock")]


def test_a_dead_owner_is_an_error(maps: Path, run_python: Any) -> None:
    run_python("-c", "from small_model import a_runner; import os; kept = a_runner(); os._exit(0)")
    assert findings(maps) == [(ERROR, "owner")]


def test_an_absent_slot_is_an_error(maps: Path) -> None:
    assert findings(maps, timeout=0) == [(ERROR, "readable")]


# --- faults put in --------------------------------------------------------------------------


def of(name: str, **fields: Any) -> Callable[[Any], None]:
    return lambda layout: layout["tensors"][name].update(fields)


MLP = "layers.0.mlp.weight"

FAULTS: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "an address that its storage does not have": (
        files.LAYOUT,
        lambda layout: layout["tensors"][MLP].update(ptr=layout["tensors"][MLP]["ptr"] + 4),
        "tensors",
    ),
    "a size that is no number of elements": (files.LAYOUT, of(MLP, size=145), "tensors"),
    "a span that is too short": (files.LAYOUT, of(MLP, span=8), "tensors"),
    "a storage that is too small": (files.LAYOUT, of(MLP, storage_size=8), "tensors"),
    "two storages that overlap": (
        files.LAYOUT,
        lambda layout: layout["tensors"][MLP].update(
            ptr=layout["tensors"]["embed_tokens.weight"]["ptr"] + 200,
            storage_ptr=layout["tensors"]["embed_tokens.weight"]["ptr"] + 200,
        ),
        "overlaps",
    ),
    "weights inside the KV cache": (
        files.LAYOUT,
        lambda layout: layout["memory"]["kv_cache"][0].update(
            storage_ptr=layout["tensors"][MLP]["ptr"] - 8
        ),
        "overlaps",
    ),
    "a region that is missing": (
        files.LAYOUT,
        lambda layout: layout["regions"].pop() and None,
        "regions",
    ),
    "a region beyond its allocation": (
        files.LAYOUT,
        lambda layout: layout["regions"][0].update(allocation_size=1),
        "regions",
    ),
    "a region twice": (
        files.LAYOUT,
        lambda layout: layout["regions"].insert(0, layout["regions"][0]),
        "regions",
    ),
    "a region with a name that is none": (
        files.LAYOUT,
        lambda layout: layout["regions"][0]["tensors"].append("nobody"),
        "regions",
    ),
    "totals that do not add up": (
        files.LAYOUT,
        lambda layout: layout["totals"]["cpu"].update(tensor_bytes=1),
        "totals",
    ),
    "a KV cache that does not add up": (
        files.LAYOUT,
        lambda layout: layout["memory"].update(kv_cache_bytes=1),
        "totals",
    ),
    "a device whose parts do not add up": (
        files.LAYOUT,
        lambda layout: layout["memory"].update(
            siblings_bytes=0,
            other_live_bytes=0,
            reserved_free_bytes=0,
            other_bytes=0,
            unbacked_bytes=0,
            device_free_bytes=0,
            device_total_bytes=1,
        ),
        "totals",
    ),
    "a field of another type": (files.LAYOUT, of(MLP, shape="6x6"), "schema"),
    "a kind that there is not": (files.LAYOUT, of(MLP, kind="weight"), "schema"),
    "a state with text for a number": (
        files.STATE,
        lambda state: state.update(updated_at="now"),
        "schema",
    ),
    "a state of more than 2 KB": (
        files.STATE,
        lambda state: state["event"].update(extra="x" * 2048),
        "state",
    ),
    "a state behind its layout": (
        files.LAYOUT,
        lambda layout: layout.update(content_generation=99),
        "generations",
    ),
    "another address in weights_meta": (
        files.WEIGHTS_META,
        lambda meta: meta[MLP].update(ptr=1),
        "files",
    ),
    "a tensor that weights_meta lacks": (
        files.WEIGHTS_META,
        lambda meta: meta.pop(MLP) and None,
        "files",
    ),
    "a tensor that only weights_meta has": (
        files.WEIGHTS_META,
        lambda meta: meta.update(ghost=meta[MLP]),
        "files",
    ),
    "another sum": (files.TOTAL_META, lambda meta: meta.update(cpu=1.0), "files"),
    "other merged spans": (files.MERGED, lambda merged: merged[0].update(size=1), "files"),
    "merged spans of no kind": (files.MERGED, lambda merged: {"no": "list"}, "files"),
}


@pytest.mark.parametrize(("file", "change", "check"), FAULTS.values(), ids=list(FAULTS))
def test_a_fault_is_found(
    file: str, change: Callable[[Any], Any], check: str, spoil: Spoil, maps: Path
) -> None:
    assert findings(maps) == []
    spoil(file, change)
    assert (ERROR, check) in findings(maps, timeout=0)


@pytest.mark.parametrize("name", [files.WEIGHTS_META, files.TOTAL_META, files.MERGED])
def test_a_file_that_is_missing_or_garbage_is_an_error(
    name: str, runner: FakeRunner, maps: Path
) -> None:
    path = maps / name.format(0)
    path.write_bytes(b"{")
    assert findings(maps) == [(ERROR, "files")]
    path.unlink()
    assert findings(maps) == [(ERROR, "files")]


def test_a_storage_inside_another_is_only_a_warning(spoil: Spoil, maps: Path) -> None:
    """A tensor made from a pointer into a larger one is odd, and possible."""

    def nest(layout: Any) -> None:
        outer = layout["tensors"]["embed_tokens.weight"]
        layout["tensors"][MLP].update(ptr=outer["ptr"] + 16, storage_ptr=outer["ptr"] + 16)

    spoil(files.LAYOUT, nest)
    assert (WARNING, "overlaps") in findings(maps)
    assert (ERROR, "overlaps") not in findings(maps)


def test_checksums_of_earlier_contents_are_a_warning(spoil: Spoil, maps: Path) -> None:
    checksums = {"algorithm": "wsum64", "content_generation": 0, "seconds": 0.1}
    spoil(files.LAYOUT, lambda layout: layout.update(checksums=checksums))
    assert findings(maps) == [(WARNING, "checksums")]


def test_many_findings_of_a_kind_are_cut_short(maps: Path) -> None:
    runner = a_runner(torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(10))))
    path = maps / files.LAYOUT.format(0)
    layout = json.loads(path.read_bytes())
    for tensor in layout["tensors"].values():
        tensor["span"] = 1
    path.write_text(json.dumps(layout))
    verdict = verify.verify_slot(open_slot(str(maps), "0"))
    spans = [finding for finding in verdict.findings if finding.check == "tensors"]
    assert len(spans) == 6
    assert spans[-1].message == "and 15 more of this kind"
    del runner


# --- the schema, without jsonschema ---------------------------------------------------------


def keywords(schema: Any) -> set[str]:
    if not isinstance(schema, dict):
        return set()
    found = set(schema)
    for name in ("properties", "$defs"):
        for inner in schema.get(name, {}).values():
            found |= keywords(inner)
    for name in ("items", "additionalProperties", "propertyNames", "if", "then", "else"):
        found |= keywords(schema.get(name))
    for inner in schema.get("anyOf", ()):
        found |= keywords(inner)
    return found


@pytest.mark.parametrize("name", list(SCHEMAS))
def test_every_keyword_of_the_schemas_is_understood(name: str) -> None:
    assert keywords(SCHEMAS[name]) <= set(json_schema.KEYWORDS)


JSON = json_values(nan=False)  # jsonschema compares values with ==


@pytest.fixture
def examples(runner: FakeRunner, maps: Path) -> dict[str, Any]:
    return {
        "layout": json.loads((maps / files.LAYOUT.format(0)).read_bytes()),
        "state": json.loads((maps / files.STATE.format(0)).read_bytes()),
    }


def test_it_agrees_with_jsonschema(examples: dict[str, Any]) -> None:
    judges = {name: jsonschema.Draft202012Validator(schema) for name, schema in SCHEMAS.items()}
    checkers = {name: schema_checker.Checker(schema) for name, schema in SCHEMAS.items()}
    # Written down as a function, the rules accept what is good without asking at length.
    assert all(checkers[name]._accepts(examples[name]) for name in SCHEMAS)

    @settings(deadline=None)
    @given(st.data())
    def agree(data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(SCHEMAS)))
        document = copy.deepcopy(examples[name])
        path = data.draw(st.sampled_from(places(document)[1:]))
        inside: Any = document
        for key in path[:-1]:
            inside = inside[key]
        if data.draw(st.booleans()) and isinstance(inside, dict):
            del inside[path[-1]]
        else:
            inside[path[-1]] = data.draw(JSON)
        ours = next(json_schema.violations(document, SCHEMAS[name]), None) is None
        assert ours == judges[name].is_valid(document)
        fast = next(checkers[name].violations(document), None) is None
        assert fast == ours

    agree()


def test_the_examples_of_the_module_hold() -> None:
    for module in (json_schema, schema_checker):
        result = doctest.testmod(module)
        assert result.attempted
        assert not result.failed
