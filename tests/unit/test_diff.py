"""What `diff` says of two layout documents, and whether a registration is still good.

Of synthetic documents against an oracle, and of documents that the real recorder published
before and after a change of a real module.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_sglang import FakeRunner, event, load, settle, stream, update
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from sglang_weight_hook.layout import files
from sglang_weight_hook.publisher import recorder
from sglang_weight_hook.reader import open_slot
from sglang_weight_hook.reader.diff import Diff, diff

torch = pytest.importorskip("torch")
nn = torch.nn

NOTHING = Diff(
    moved=[],
    resized=[],
    added=[],
    removed=[],
    content_changed=False,
    repaged=False,
    regions_changed=False,
    other_process=False,
)


# --- synthetic documents ------------------------------------------------------------------


def a_tensor(ptr: int = 4096, size: int = 16) -> dict[str, Any]:
    return {
        "ptr": ptr,
        "size": size,
        "span": size,
        "device": "cuda:0",
        "dtype": "torch.float32",
        "shape": [size // 4],
        "stride": [1],
        "storage_offset": 0,
        "storage_ptr": ptr,
        "storage_size": size,
        "kind": "parameter",
        "resident": True,
        "aliases": [],
    }


def a_region(ptr: int = 4096, size: int = 16) -> dict[str, Any]:
    return {
        "ptr": ptr,
        "size": size,
        "device": "cuda:0",
        "allocation_ptr": 4096,
        "allocation_size": 1 << 20,
        "allocation_source": "driver",
        "allocation_kind": "cuda_malloc",
        "tensors": ["a"],
    }


@pytest.fixture
def old() -> dict[str, Any]:
    return {
        "layout_generation": 1,
        "content_generation": 5,
        "physical_epoch": 2,
        "identity": {"boot_id": "b", "pid": 10, "process_start_ticks": 77},
        "regions": [a_region()],
        "tensors": {"a": a_tensor(), "b": a_tensor(8192)},
    }


@pytest.fixture
def new(old: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(old)


def test_a_document_does_not_differ_from_itself(old: Any, new: Any) -> None:
    found = diff(old, new)
    assert found == NOTHING
    assert not found.must_register_again
    assert not found.content_only


@pytest.mark.parametrize(
    ("field", "value"), [("ptr", 0), ("device", "cuda:1"), ("storage_ptr", 1), ("resident", False)]
)
def test_another_place_is_moved(field: str, value: object, old: Any, new: Any) -> None:
    new["tensors"]["b"][field] = value
    assert diff(old, new) == NOTHING._replace(moved=["b"])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", 32),
        ("span", 20),
        ("shape", [2, 2]),
        ("stride", [2]),
        ("dtype", "torch.int32"),
        ("storage_size", 64),
        ("storage_offset", 1),
    ],
)
def test_another_extent_at_the_same_place_is_resized(
    field: str, value: object, old: Any, new: Any
) -> None:
    new["tensors"]["b"][field] = value
    assert diff(old, new) == NOTHING._replace(resized=["b"])


def test_what_moved_and_changed_its_size_is_moved_alone(old: Any, new: Any) -> None:
    new["tensors"]["b"].update(ptr=0, size=99)
    assert diff(old, new) == NOTHING._replace(moved=["b"])


@pytest.mark.parametrize(
    ("field", "value"), [("kind", "buffer"), ("aliases", ["c"]), ("checksum", "f" * 32)]
)
def test_another_kind_name_or_checksum_is_no_other_place(
    field: str, value: object, old: Any, new: Any
) -> None:
    new["tensors"]["b"][field] = value
    assert diff(old, new) == NOTHING


def test_added_and_removed_are_seen_from_the_old_one(old: Any, new: Any) -> None:
    new["tensors"]["c"] = new["tensors"].pop("b")
    assert diff(old, new) == NOTHING._replace(added=["c"], removed=["b"])
    assert diff(new, old) == NOTHING._replace(added=["b"], removed=["c"])


def test_another_content_generation_alone_is_content_only(old: Any, new: Any) -> None:
    new["content_generation"] = 6
    found = diff(old, new)
    assert found == NOTHING._replace(content_changed=True)
    assert found.content_only
    assert not found.must_register_again


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ptr", 4100),
        ("size", 12),
        ("device", "cuda:1"),
        ("allocation_ptr", 0),
        ("allocation_size", 1),
    ],
)
def test_another_region_must_be_registered_again(
    field: str, value: object, old: Any, new: Any
) -> None:
    new["regions"][0][field] = value
    new["content_generation"] = 6
    found = diff(old, new)
    assert found == NOTHING._replace(regions_changed=True, content_changed=True)
    assert found.must_register_again
    assert not found.content_only


@pytest.mark.parametrize("change", [lambda r: r.clear(), lambda r: r.append(a_region(9999))])
def test_a_region_that_came_or_went_must_be_registered_again(
    change: Callable[[Any], None], old: Any, new: Any
) -> None:
    change(new["regions"])
    assert diff(old, new).must_register_again


def test_other_names_in_the_same_region_need_no_new_registration(old: Any, new: Any) -> None:
    new["regions"][0]["tensors"] = ["a", "z"]
    assert not diff(old, new).must_register_again


def test_other_pages_behind_the_same_addresses_must_be_registered_again(old: Any, new: Any) -> None:
    new["physical_epoch"] = 3
    found = diff(old, new)
    assert found == NOTHING._replace(repaged=True)
    assert found.must_register_again


def test_documents_that_name_no_epoch_are_of_epoch_0(old: Any, new: Any) -> None:
    del old["physical_epoch"], new["physical_epoch"]
    assert not diff(old, new).repaged
    new["physical_epoch"] = 0
    assert not diff(old, new).repaged
    new["physical_epoch"] = 1
    assert diff(old, new).repaged


@pytest.mark.parametrize(
    ("field", "value"), [("pid", 11), ("boot_id", "c"), ("process_start_ticks", 78)]
)
def test_another_processs_addresses_mean_nothing_here(
    field: str, value: object, old: Any, new: Any
) -> None:
    new["identity"][field] = value
    found = diff(old, new)
    assert found == NOTHING._replace(other_process=True, content_changed=True)
    assert found.must_register_again
    assert not found.content_only


def test_as_dict_is_plain_json_with_every_answer(old: Any, new: Any) -> None:
    new["content_generation"] = 6
    found = diff(old, new)
    said = json.loads(json.dumps(found.as_dict()))
    assert said == {
        **found._asdict(),
        "content_only": True,
        "must_register_again": False,
    }
    assert list(said)[: len(Diff._fields)] == list(Diff._fields)


# --- random documents against an oracle ---------------------------------------------------

small = st.integers(0, 2)
some_tensors = st.dictionaries(
    st.sampled_from("abcde"),
    st.fixed_dictionaries({"ptr": small, "size": small, "stride": st.lists(small, max_size=2)}),
)
documents = st.fixed_dictionaries(
    {
        "content_generation": small,
        "physical_epoch": small,
        "identity": st.fixed_dictionaries({"boot_id": st.just("b"), "pid": st.integers(1, 2)}),
        "regions": st.lists(st.fixed_dictionaries({"ptr": small, "size": small}), max_size=2),
        "tensors": some_tensors,
    }
)


@given(documents, documents)
def test_a_diff_is_as_slow_and_plain_code_has_it(one: Any, other: Any) -> None:
    found = diff(one, other)
    both = one["tensors"].keys() & other["tensors"].keys()
    differ = {name for name in both if one["tensors"][name] != other["tensors"][name]}
    moved = {n for n in both if one["tensors"][n]["ptr"] != other["tensors"][n]["ptr"]}
    lists = (found.moved, found.resized, found.added, found.removed)
    assert set(found.moved) == moved
    assert set(found.resized) == differ - moved
    assert set(found.added) == other["tensors"].keys() - one["tensors"].keys()
    assert set(found.removed) == one["tensors"].keys() - other["tensors"].keys()
    assert sum(map(len, lists)) == len(set().union(*lists))  # each name once
    same_process = one["identity"] == other["identity"]
    same_content = one["content_generation"] == other["content_generation"]
    same_pages = one["physical_epoch"] == other["physical_epoch"]
    same_regions = one["regions"] == other["regions"]
    assert found.other_process is not same_process
    assert found.content_changed is not (same_process and same_content)
    assert found.must_register_again is not (same_process and same_pages and same_regions)
    assert not (found.content_only and (found.must_register_again or any(lists)))


@given(documents, documents)
def test_a_diff_backwards_has_added_and_removed_exchanged(one: Any, other: Any) -> None:
    there, back = diff(one, other), diff(other, one)
    assert (sorted(there.added), sorted(there.removed)) == (
        sorted(back.removed),
        sorted(back.added),
    )
    assert sorted(there.moved) == sorted(back.moved)
    assert sorted(there.resized) == sorted(back.resized)
    assert there.must_register_again == back.must_register_again


# --- published documents ------------------------------------------------------------------


def layout_of(maps: Path) -> Any:
    return json.loads((maps / files.LAYOUT.format("0")).read_bytes())


@pytest.fixture
def runner() -> FakeRunner:
    runner = FakeRunner(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)))
    load(runner)
    settle()
    return runner


def change(runner: FakeRunner, maps: Path, what: Callable[[Any], object]) -> Diff:
    """The diff of the documents from before and after an update that does ``what``."""
    before = layout_of(maps)
    update(runner, during=lambda: what(runner.model))
    return diff(before, layout_of(maps))


def test_an_update_in_place_is_content_only(runner: FakeRunner, maps: Path) -> None:
    found = change(runner, maps, lambda model: model[0].weight.data.copy_(torch.ones(3, 4)))
    assert found == NOTHING._replace(content_changed=True)
    assert found.content_only


def test_data_that_was_bound_anew_has_moved(runner: FakeRunner, maps: Path) -> None:
    kept = runner.model[0].weight.data  # so that its address is not given out again

    def rebind(model: Any) -> None:
        model[0].weight.data = kept.clone()

    found = change(runner, maps, rebind)
    assert found == NOTHING._replace(moved=["0.weight"], content_changed=True, regions_changed=True)
    assert found.must_register_again


def test_a_new_parameter_of_another_size_in_the_old_ones_place_has_moved(
    runner: FakeRunner, maps: Path
) -> None:
    kept = runner.model[0].weight.data

    def replace(model: Any) -> None:
        model[0].weight = nn.Parameter(torch.zeros(7, 7))

    found = change(runner, maps, replace)
    assert found.moved == ["0.weight"]
    assert found.resized == found.added == found.removed == []
    assert kept.shape == (3, 4)


def test_the_transpose_of_the_same_memory_is_resized_and_needs_no_registration(
    runner: FakeRunner, maps: Path
) -> None:
    def transpose(model: Any) -> None:
        model[0].weight.data = model[0].weight.data.t()

    found = change(runner, maps, transpose)
    assert found == NOTHING._replace(resized=["0.weight"], content_changed=True)
    assert not found.must_register_again
    assert not found.content_only


def test_a_view_further_into_the_same_storage_has_moved(runner: FakeRunner, maps: Path) -> None:
    def shift(model: Any) -> None:
        model[0].weight.data = model[0].weight.data[1:]

    found = change(runner, maps, shift)
    assert found.moved == ["0.weight"]
    assert found.must_register_again  # fewer bytes belong to weights now


def test_a_module_that_was_removed_takes_its_names_and_regions_with_it(
    runner: FakeRunner, maps: Path
) -> None:
    found = change(runner, maps, lambda model: model.__delitem__(1))
    assert found.removed == ["1.weight", "1.bias"]
    assert found.moved == found.resized == found.added == []
    assert found.must_register_again


def test_a_module_that_was_added_brings_its_names_and_regions(
    runner: FakeRunner, maps: Path
) -> None:
    found = change(runner, maps, lambda model: model.append(nn.Linear(2, 2)))
    assert found.added == ["2.weight", "2.bias"]
    assert found.moved == found.resized == found.removed == []
    assert found.must_register_again


def test_a_parameter_that_left_the_device_has_moved(runner: FakeRunner, maps: Path) -> None:
    def offload(model: Any) -> None:
        model[0].weight = nn.Parameter(model[0].weight.to("meta"))

    found = change(runner, maps, offload)
    assert found.moved == ["0.weight"]
    assert found.must_register_again


def test_released_and_resumed_weights_are_repaged_and_nothing_else(
    runner: FakeRunner, maps: Path
) -> None:
    before = layout_of(maps)
    details = {"tags": ["weights"], "physical": True}
    event("release_memory_occupation", "release", details=details)
    released = layout_of(maps)
    assert diff(before, released) == NOTHING
    event("resume_memory_occupation", "resume", details=details)
    found = diff(before, layout_of(maps))
    assert found == NOTHING._replace(repaged=True, content_changed=True)
    assert found.must_register_again


def test_an_event_that_changed_nothing_is_no_difference(runner: FakeRunner, maps: Path) -> None:
    before = layout_of(maps)
    settle()
    assert diff(before, layout_of(maps)) == NOTHING


def test_buckets_that_wrote_only_the_state_leave_the_documents_equal(
    runner: FakeRunner, maps: Path
) -> None:
    # The layout document stands as it is: the content generation is the state file's.
    before = layout_of(maps)
    stream(runner)
    assert diff(before, layout_of(maps)) == NOTHING


def test_an_invalidated_map_has_every_name_removed(runner: FakeRunner, maps: Path) -> None:
    before = layout_of(maps)
    model = runner.model
    update(runner, during=lambda: setattr(runner, "model", None))
    found = diff(before, layout_of(maps))
    assert found.removed == list(before["tensors"])
    assert found.must_register_again
    update(runner, during=lambda: setattr(runner, "model", model))
    assert diff(before, layout_of(maps)) == NOTHING._replace(content_changed=True)


def zero(model: Any, kept: list[Any]) -> None:
    model[0].weight.data.zero_()


def rebind(model: Any, kept: list[Any]) -> None:
    kept.append(model[0].weight.data)  # so that its address is not given out again
    model[0].weight.data = model[0].weight.data.clone()


def replace(model: Any, kept: list[Any]) -> None:
    kept.append(model[0].weight)
    model[0].weight = nn.Parameter(torch.zeros(2, 5))


def transpose(model: Any, kept: list[Any]) -> None:
    model[0].weight.data = model[0].weight.data.t()


def append(model: Any, kept: list[Any]) -> None:
    model.append(nn.Linear(2, 2))


def delete(model: Any, kept: list[Any]) -> None:
    if len(model) > 1:
        kept.append(model[-1])
        del model[-1]


@examples(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    st.lists(st.sampled_from([zero, rebind, replace, transpose, append, delete]), max_size=5),
    st.sampled_from([stream, update]),
)
def test_the_layout_generation_rises_exactly_when_a_diff_names_something(
    maps: Path, changes: list[Callable[[Any, list[Any]], None]], call: Callable[..., None]
) -> None:
    recorder._after_fork_in_child()  # every example begins with a fresh hook
    runner = FakeRunner(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)))
    load(runner)
    settle()
    kept: list[Any] = []
    for what in changes:
        before = layout_of(maps)
        call(runner, during=lambda what=what: what(runner.model, kept))
        after = layout_of(maps)
        found = diff(before, after)
        named = bool(found.moved or found.resized or found.added or found.removed)
        assert (after["layout_generation"] > before["layout_generation"]) == named
        assert found.content_changed == (call is update or named)
        assert not found.other_process


def test_documents_read_before_and_after_a_bucket_differ_in_their_contents(
    runner: FakeRunner, maps: Path
) -> None:
    slot = open_slot(str(maps), "0")
    before = slot.read()
    stream(runner, during=lambda: runner.model[0].weight.data.fill_(2.0))
    after = slot.read()
    assert after.content_generation == before.content_generation + 1
    found = after.changes_since(before)
    assert found == NOTHING._replace(content_changed=True)
    assert found.content_only
