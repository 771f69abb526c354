"""Programs and files of release 0.1 go on working: old documents here, and today's there.

``documents_0_1`` was saved from a real SGLang 0.5.23 that was hooked by 0.1; the wheel is the
released one, and its reader runs in a process of its own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sglang_weight_hook as hook
from sglang_weight_hook.layout import files
from sglang_weight_hook.reader import verify
from tests.compatibility.processes import HERE, STATES, Moment, ask_0_1

SAVED = HERE / "documents_0_1"
# State, layout generation and content generation of each.
DOCUMENTS = {
    "after_load": ("ready", 1, 1),
    "after_update": ("ready", 1, 2),
    "after_buckets": ("ready", 1, 6),
    "after_failure": ("failed", 1, 7),
}


def raw(folder: Path, name: str) -> Any:
    return json.loads((folder / name.format("0")).read_bytes())


# --- today's reader on 0.1's documents ----------------------------------------------------


def check_document(document: hook.Document, layout: Any) -> None:
    """Every tensor, region and address of a document is what its file says."""
    assert dict(document.tensors) == layout["tensors"]
    assert document.regions == layout["regions"]
    tensors = {tensor.name: tensor for tensor in document.iter_tensors()}
    assert tensors.keys() == layout["tensors"].keys()
    for name, tensor in tensors.items():
        published = layout["tensors"][name]
        for field, value in published.items():
            read = getattr(tensor, field)
            assert (list(read) if isinstance(value, list) else read) == value, (name, field)
        assert document.tensor(name) == tensor
        for alias in published["aliases"]:
            assert document.tensor(alias) == tensor
        for offset in (0, tensor.span // 2, tensor.span - 1):
            hits = document.lookup(tensor.ptr + offset)
            assert [hit.tensor for hit in hits if hit.tensor.name == name] == [tensor]
            region = document.region_at(tensor.ptr + offset)
            assert region is not None
            assert name in region.tensors
        assert document.lookup(tensor.ptr)[0].element == (0,) * len(tensor.shape)
    assert [region.ptr for region in document.iter_regions()] == [
        region["ptr"] for region in layout["regions"]
    ]
    assert len(list(document.iter_kv_cache())) == len(layout["memory"]["kv_cache"]) > 0


@pytest.mark.parametrize(("name", "expected"), DOCUMENTS.items())
def test_todays_reader_reads_a_directory_of_0_1(name: str, expected: tuple[Any, ...]) -> None:
    directory = hook.open_directory(str(SAVED / name))
    assert [slot.name for slot in directory.slots()] == ["0"]
    slot = directory.slot("0")
    assert not slot.owner_alive()
    document = slot.read(timeout=0)
    assert document.state == slot.read_state() == raw(SAVED / name, files.STATE)
    generations = (document.layout_generation, document.content_generation)
    assert (document.state["state"], *generations) == expected
    assert document.physical_epoch == 0
    check_document(document, raw(SAVED / name, files.LAYOUT))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_todays_reader_opens_a_saved_layout_of_0_1(name: str) -> None:
    document = hook.open_file(str(SAVED / name / files.LAYOUT.format("0")))
    assert not document.is_live
    check_document(document, raw(SAVED / name, files.LAYOUT))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_todays_verify_finds_nothing_wrong_in_what_0_1_saved(name: str) -> None:
    saved = hook.open_file(str(SAVED / name / files.LAYOUT.format("0")))
    assert verify.verify_file(saved).findings == []
    # Of a directory, that its owner has exited is the one error.
    found = verify.verify_slot(hook.open_slot(str(SAVED / name), "0"), timeout=0).findings
    assert [finding.check for finding in found if finding.level == verify.ERROR] == ["owner"]
    warned = {finding.check for finding in found if finding.level == verify.WARNING}
    assert warned == ({"state"} if name == "after_failure" else set())


def test_todays_comparison_understands_documents_of_0_1() -> None:
    layouts = {name: raw(SAVED / name, files.LAYOUT) for name in DOCUMENTS}
    changes = hook.compare(layouts["after_load"], layouts["after_update"])
    assert changes.content_changed
    assert not changes.must_register_again
    same = hook.compare(layouts["after_load"], layouts["after_load"])
    assert not same.content_changed
    assert not same.must_register_again
    (moved, *_) = layouts["after_buckets"]["tensors"]
    new = layouts["after_buckets"]
    for entry in (new["tensors"][moved], *(r for r in new["regions"] if moved in r["tensors"])):
        entry["ptr"] += 4096
    changes = hook.compare(layouts["after_load"], new)
    assert changes.moved == [moved]
    assert changes.must_register_again


def test_a_document_of_0_1_is_compared_with_one_of_today(life: dict[str, Moment]) -> None:
    today = hook.open_file(str(life["settled"].maps / files.LAYOUT.format("0")))
    old = hook.open_slot(str(SAVED / "after_load"), "0").read(timeout=0)
    changes = today.changes_since(old)
    assert changes.must_register_again
    assert set(changes.removed) == old.tensors.keys() - today.tensors.keys()
    assert set(changes.added) == today.tensors.keys() - old.tensors.keys()


# --- 0.1's reader on today's documents ----------------------------------------------------


@pytest.mark.parametrize(("name", "state"), STATES.items())
def test_the_reader_of_0_1_reads_what_is_published_today(
    name: str, state: str, life: dict[str, Moment]
) -> None:
    moment = life[name]
    told, truth, today = moment.read, moment.truth, moment.today
    assert (told["slot"], told["alive"]) == ("0", True)
    assert told["state"]["state"] == told["raw"]["state"] == state
    assert told["generations"] == [today.layout_generation, today.content_generation]
    assert told["raw"]["tensors"] == today.tensors
    assert told["raw"]["regions"] == today.regions
    # What it makes of them is what today's reader makes of them, and what torch says.
    # 0.1's fields come first in today's, in the same order.
    fields = 9
    assert told["regions"] == [
        json.loads(json.dumps(list(region)))[:fields] for region in today.iter_regions()
    ]
    assert [buffer[0] for buffer in told["kv_cache"]] == ["k_buffer.0", "v_buffer.0"]
    assert told["changed"]["must_register_again"] is False
    names = {alias: name for name, t in today.tensors.items() for alias in (name, *t["aliases"])}
    assert set(names) >= truth.keys()
    for name, tensor in truth.items():
        published = told["raw"]["tensors"][names[name]]
        assert {field: published[field] for field in tensor} == tensor, name
    typed = {tensor.name: tensor for tensor in today.iter_tensors()}
    for tensor in told["tensors"]:
        assert json.loads(json.dumps(list(typed[tensor[0]])))[: len(tensor)] == tensor
    for name, hits in told["found"].items():
        assert name in hits


@pytest.mark.parametrize(("name", "state"), STATES.items())
def test_verify_of_0_1_finds_no_error_in_what_is_published_today(
    name: str, state: str, life: dict[str, Moment]
) -> None:
    told = life[name].verified
    assert [found for found in told["slot"] if found[1] == "error"] == []
    # A warning that its schemas are not there would mean that nothing was held against them.
    assert [found[2] for found in told["slot"]] == ([] if state == "ready" else ["state"])
    assert told["file"] == []


@pytest.mark.parametrize(
    ("damage", "check"), [({"storage_size": "large"}, "schema"), ({"span": 10**9}, "tensors")]
)
def test_verify_of_0_1_finds_damage_in_what_is_published_today(
    damage: dict[str, Any],
    check: str,
    life: dict[str, Moment],
    release_0_1: Path,
    tmp_path: Path,
) -> None:
    maps = tmp_path / "maps"
    shutil.copytree(life["settled"].maps, maps)
    layout = raw(maps, files.LAYOUT)
    layout["tensors"]["embed_tokens.weight"].update(damage)
    (maps / files.LAYOUT.format("0")).write_text(json.dumps(layout))
    told = ask_0_1("verify", maps, release_0_1)
    for findings in (told["slot"], told["file"]):
        assert check in {found[2] for found in findings if found[1] == "error"}


# --- every field of 0.1 is still there ----------------------------------------------------

# Objects whose keys are names (of tensors, devices, kinds), not fields.
NAMED = {"tensors", "totals", "nested", "expected", "captured", "left_out"}


TYPES = {
    dict: "object",
    list: "array",
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    type(None): "null",
}


def fields_of(value: Any, named: bool = False, where: str = "") -> Iterator[tuple[str, str]]:
    """The place of every field of a document, and the JSON type of what stands there."""
    yield (
        where,
        {dict: "object", list: "array", str: "string", bool: "boolean"}.get(
            type(value), "null" if value is None else "number"
        ),
    )
    if isinstance(value, dict):
        for key, item in value.items():
            yield from fields_of(item, key in NAMED, f"{where}.{'*' if named else key}")
    elif isinstance(value, list):
        for item in value:
            yield from fields_of(item, False, f"{where}[]")


def types_of(documents: list[Any], named: bool) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for document in documents:
        for where, kind in fields_of(document, named):
            found.setdefault(where, set()).add(kind)
    return found


@pytest.mark.parametrize("file", files.DOCUMENTS)
def test_every_field_of_0_1_is_published_today_with_its_type(
    file: str, life: dict[str, Moment]
) -> None:
    by_name = file in (files.WEIGHTS_META, files.TOTAL_META)
    saved = [
        raw(SAVED / name, file) for name in DOCUMENTS if (SAVED / name / file.format("0")).exists()
    ]
    copies = (moment.maps / file.format("0") for moment in life.values())
    today = [json.loads(path.read_bytes()) for path in copies if path.exists()]
    old, new = types_of(saved, by_name), types_of(today, by_name)
    assert len(old) > 1
    assert sorted(old.keys() - new.keys()) == []
    changed = {
        where: (kinds, new[where])
        for where, kinds in old.items()
        # A fake runner has no value for some: null.  What 0.1 had there is of a type that today's
        # schema allows: see verify above.  A number may happen to be whole.
        if kinds != {"null"}
        and not new[where] <= kinds | {"null"} | ({"integer"} if "number" in kinds else set())
    }
    assert changed == {}
