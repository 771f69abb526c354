"""Reading as typed objects: by name, by address, by element; and what is no document.

The documents are published by the real recorder over a real torch model, unless a test is about
documents that no recorder makes.
"""

from __future__ import annotations

import contextlib
import doctest
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_sglang import FakeRunner, update
from hypothesis import given, settings
from hypothesis import strategies as st
from small_model import a_runner, torch

from sglang_weight_hook import reader
from sglang_weight_hook.layout import files
from sglang_weight_hook.reader import (
    Document,
    HookError,
    Region,
    Slot,
    SpanIndex,
    Tensor,
    names,
    open_file,
    open_slot,
    spans,
    tensors,
)


@pytest.fixture
def runner() -> FakeRunner:
    return a_runner()


@pytest.fixture
def document(runner: FakeRunner, maps: Path) -> Document:
    return open_slot(str(maps), "0").read()


# --- typed objects --------------------------------------------------------------------------


def test_every_tensor_is_what_torch_says(runner: FakeRunner, document: Document) -> None:
    found = {tensor.name: tensor for tensor in document.iter_tensors()}
    assert found.keys() == document.tensors.keys()
    for name, parameter in runner.model.named_parameters():
        if name == "offloaded":
            continue
        tensor = found[name]
        assert tensor.ptr == parameter.data_ptr()
        assert tensor.shape == tuple(parameter.shape)
        assert tensor.stride == parameter.stride()
        assert tensor.itemsize == parameter.element_size()
        assert tensor.raw is document.tensors[name]
    assert not found["offloaded"].resident
    assert found["offloaded"].ptr == 0


def test_a_tensor_answers_to_its_aliases(document: Document) -> None:
    assert document.tensor("lm_head.weight") is document.tensor("embed_tokens.weight")
    with pytest.raises(HookError, match="no tensor 'nothing'; the names are those of"):
        document.tensor("nothing")


def test_layer_and_role_come_from_the_name(document: Document) -> None:
    tensor = document.tensor("layers.1.self_attn.w_kc")
    assert (tensor.layer, tensor.role) == (1, "attention")
    assert document.tensor("layers.0.input_layernorm.weight").role == "norm"
    assert document.tensor("embed_tokens.weight").layer is None


@pytest.mark.parametrize(
    ("name", "layer", "role"),
    [
        ("model.embed_tokens.weight", None, "embedding"),
        ("transformer.wte.weight", None, "embedding"),
        ("transformer.h.11.attn.c_attn.weight", 11, "attention"),
        ("transformer.h.11.ln_1.weight", 11, "norm"),
        ("transformer.ln_f.weight", None, "norm"),
        ("model.layers.17.self_attn.qkv_proj.weight", 17, "attention"),
        ("model.layers.3.self_attn.kv_a_layernorm.weight", 3, "norm"),
        ("model.layers.3.self_attn.w_kc", 3, "attention"),
        ("model.layers.61.mlp.experts.w13_weight_scale_inv", 61, "moe_expert"),
        ("model.layers.4.mlp.experts.7.down_proj.weight", 4, "moe_expert"),
        ("model.layers.4.mlp.shared_experts.down_proj.weight", 4, "moe_expert"),
        ("model.layers.4.mlp.gate.weight", 4, "mlp"),
        ("model.layers.0.feed_forward.w1.weight", 0, "mlp"),
        ("model.norm.weight", None, "norm"),
        ("lm_head.weight", None, "lm_head"),
        ("model.layers.0.self_attn.rotary_emb.cos_sin_cache", 0, "rotary"),
        ("visual.blocks.5.mlp.fc1.weight", 5, "mlp"),
        ("lora_pool.A_buffer.qkv_proj.0", None, "lora"),
        ("model.layers.2.mixer.A_log", 2, "other"),
        ("model.layers.99999999999999999999.x", None, "other"),
        ("", None, "other"),
    ],
)
def test_the_names_of_real_models_are_understood(name: str, layer: Any, role: str) -> None:
    assert (reader.layer_of(name), reader.role_of(name)) == (layer, role)
    assert role in reader.ROLES


@given(st.text())
def test_any_name_has_a_role(name: str) -> None:
    assert reader.role_of(name) in reader.ROLES
    layer = reader.layer_of(name)
    assert layer is None or layer >= 0


def test_regions_and_kv_cache_are_typed(runner: FakeRunner, document: Document) -> None:
    regions = list(document.iter_regions())
    assert [region.raw for region in regions] == document.regions
    assert all(region.ptr < region.end for region in regions)
    buffers = list(document.iter_kv_cache())
    pool = runner.token_to_kv_pool
    assert {b.ptr for b in buffers} == {pool.k_buffer[0].data_ptr(), pool.v_buffer[0].data_ptr()}


# --- by address -----------------------------------------------------------------------------


def test_every_element_of_every_tensor_is_found_at_its_address(
    runner: FakeRunner, document: Document
) -> None:
    parameter = runner.model.layers[1].mlp.weight
    for i in range(6):
        for j in range(6):
            address = parameter[i, j].data_ptr() + 3
            (hit,) = document.lookup(address)
            assert hit.tensor.name == "layers.1.mlp.weight"
            assert (hit.element, hit.byte) == ((i, j), 3)
            assert hit.offset == address - parameter.data_ptr()


def test_the_view_that_holds_the_byte_comes_before_one_that_only_spans_it(
    runner: FakeRunner, document: Document
) -> None:
    attention = runner.model.layers[0].self_attn
    hits = document.lookup(attention.w_vc[1, 2, 0].data_ptr())
    names = [hit.tensor.name.rpartition("self_attn.")[2] for hit in hits if hit.holds]
    assert set(names) == {"kv_b_proj.weight", "w_vc"}
    by_name = {hit.tensor.name.rpartition(".")[2]: hit for hit in hits}
    assert by_name["w_vc"].element == (1, 2, 0)
    between = document.lookup(attention.w_vc[0, 0, 0].data_ptr())
    assert [hit.holds for hit in between] == [True, True, False]
    assert between[-1].tensor.name.endswith("w_kc")
    assert between[-1].element is None


def test_nothing_lies_where_nothing_is(document: Document) -> None:
    for address in (0, 1, 2**64 - 1, -1):
        assert document.lookup(address) == []
        assert document.region_at(address) is None


def test_the_region_of_an_address_names_the_tensor_there(document: Document) -> None:
    tensor = document.tensor("layers.0.mlp.weight")
    region = document.region_at(tensor.end - 1)
    assert region is not None
    assert tensor.name in region.tensors


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 20)), max_size=40),
    st.integers(-2, 62),
)
def test_the_index_finds_the_spans_that_brute_force_finds(
    spans: list[tuple[int, int]], address: int
) -> None:
    triples = [(start, start + length, number) for number, (start, length) in enumerate(spans)]
    found = SpanIndex(triples).at(address)
    assert sorted(found) == [n for start, end, n in triples if start <= address < end]
    assert [spans[n][0] for n in found] == sorted(spans[n][0] for n in found)


def test_a_look_up_costs_its_hits_and_not_the_number_of_spans() -> None:
    """One span around 100,000 others: going back through them all would be found out."""
    count = 100_000
    spans = [(0, 16 * count, -1)] + [(16 * n, 16 * n + 8, n) for n in range(count)]
    index = SpanIndex(spans)
    looked = 0
    later = index._later

    def counting(one: int, other: int) -> int:
        nonlocal looked
        looked += 1
        return later(one, other)

    index._later = counting  # type: ignore[method-assign]
    assert index.at(16 * (count - 1) + 12) == [-1]
    assert index.at(16 * (count - 1)) == [-1, count - 1]
    assert looked < 20


@st.composite
def strided(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Shape, stride and itemsize: also expanded, transposed, padded and self-overlapping."""
    dimensions = draw(st.integers(0, 3))
    shape = tuple(draw(st.integers(0, 4)) for _ in range(dimensions))
    stride = tuple(draw(st.integers(0, 9)) for _ in range(dimensions))
    return shape, stride, draw(st.sampled_from([1, 2, 4, 8]))


def elements(shape: tuple[int, ...], stride: tuple[int, ...]) -> dict[tuple[int, ...], int]:
    """Every index with its offset in elements."""
    found = {(): 0}
    for length, step in zip(shape, stride):
        found = {(*i, n): at + n * step for i, at in found.items() for n in range(length)}
    return found


@given(st.lists(st.tuples(strided(), st.integers(1, 60)), max_size=6), st.integers(0, 200))
def test_look_up_agrees_with_writing_every_byte_down(
    made: list[tuple[tuple[tuple[int, ...], tuple[int, ...], int], int]], address: int
) -> None:
    tensors: dict[str, Any] = {}
    for number, ((shape, stride, itemsize), ptr) in enumerate(made):
        tensors[str(number)] = {
            "ptr": ptr,
            "size": len(elements(shape, stride)) * itemsize,
            "device": "cuda:0",
            "dtype": "torch.uint8",
            "shape": list(shape),
            "stride": list(stride),
            "kind": "parameter",
        }
    document = Document(Slot("/nowhere", "0"), {"tensors": tensors, "regions": []}, {})
    hits = {hit.tensor.name: hit for hit in document.lookup(address)}
    for number, ((shape, stride, itemsize), ptr) in enumerate(made):
        places = elements(shape, stride)
        holders = {
            index
            for index, at in places.items()
            if ptr + at * itemsize <= address < ptr + (at + 1) * itemsize
        }
        end = ptr + (max(places.values()) + 1) * itemsize if places else ptr
        assert (str(number) in hits) == (ptr <= address < end)
        if str(number) in hits:
            hit = hits[str(number)]
            assert hit.holds == bool(holders)
            if holders:
                assert hit.element in holders
                assert hit.element is not None
                assert hit.byte == (address - ptr) % itemsize
    order = [hit.holds for hit in document.lookup(address)]
    assert order == sorted(order, reverse=True)


def test_an_index_that_would_take_for_ever_is_given_up() -> None:
    tensor = Tensor.from_raw(
        "w",
        {
            "ptr": 0,
            "size": 2**40,
            "device": "cpu",
            "dtype": "torch.uint8",
            "shape": [2] * 40,
            "stride": [2 * n for n in range(10**6, 10**6 + 40)],
            "kind": "parameter",
        },
    )
    started = time.monotonic()
    assert tensor.index_of(41 * 10**6 + 1) is None
    assert time.monotonic() - started < 2


# --- waiting --------------------------------------------------------------------------------


def test_a_change_is_seen_and_quiet_is_not(runner: FakeRunner, maps: Path) -> None:
    slot = open_slot(str(maps), "0")
    document = slot.read()
    assert slot.wait_for_change(document, timeout=0.05) is None
    assert slot.wait_for_change(timeout=0.05) is None
    update(runner)
    state = slot.wait_for_change(document, timeout=5)
    assert state is not None
    assert state["event"]["kind"] == "update_weights_from_disk"
    assert slot.wait_for_change(state, timeout=0.05) is None


WRITER = """
import sys
from fake_sglang import FakeRunner, load, settle, update
import torch
runner = FakeRunner(torch.nn.Linear(4, 4))
sys.stdin.readline()
load(runner)
settle()
print("loaded", flush=True)
while sys.stdin.readline() == "update\\n":
    runner.model.weight.data = torch.zeros(4, 4)
    update(runner)
"""


def test_a_slot_may_be_waited_for_before_there_is_one(
    maps: Path, start_python: Callable[..., Any]
) -> None:
    slot = open_slot(str(maps), "0")
    assert slot.wait_for_change(timeout=0.05) is None
    writer = start_python(WRITER)
    writer.stdin.write("\n")
    writer.stdin.flush()
    state = slot.wait_for_change(timeout=60)
    assert state is not None
    assert state["pid"] == writer.pid


def test_generations_go_on_until_the_process_is_gone(
    maps: Path, start_python: Callable[..., Any]
) -> None:
    writer = start_python(WRITER)
    writer.stdin.write("\n")
    writer.stdin.flush()
    assert writer.stdout.readline() == "loaded\n"
    seen = []
    for document in open_slot(str(maps), "0").generations(timeout=60):
        seen.append((document.layout_generation, document.content_generation))
        if len(seen) < 4:
            writer.stdin.write("update\n")
            writer.stdin.flush()
        else:
            writer.kill()
            writer.wait()
    assert len(seen) == 4
    assert seen == sorted(set(seen))
    assert seen[0] == (1, 1)


def test_generations_of_a_slot_that_is_not_there_are_an_error(maps: Path) -> None:
    maps.mkdir()
    with pytest.raises(HookError, match="no hooked SGLang publishes slot 0"):
        next(open_slot(str(maps), "0").generations())


def test_generations_end_after_a_time_of_quiet(runner: FakeRunner, maps: Path) -> None:
    assert len(list(open_slot(str(maps), "0").generations(timeout=0.05))) == 1


def test_a_directory_tells_what_happens_in_it(maps: Path, start_python: Callable[..., Any]) -> None:
    writer = start_python(WRITER)
    states = []
    writer.stdin.write("\n")
    writer.stdin.flush()
    for change in reader.open_directory(str(maps)).events(timeout=60):
        assert change.slot.name == "0"
        if not change.alive:
            assert change.state is not None
            assert change.state["pid"] == writer.pid
            break
        assert change.state is not None
        states.append(change.state["state"])
        if states[-1] == "ready":
            writer.kill()
            writer.wait()
    else:
        pytest.fail("the end of the process was not seen")
    assert states[-1] == "ready"


# --- saved copies and differences -----------------------------------------------------------


def test_a_saved_copy_is_a_document_that_is_not_live(
    document: Document, maps: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "before.json"
    copy.write_bytes((maps / files.LAYOUT.format(0)).read_bytes())
    saved = open_file(str(copy))
    assert saved.raw == document.raw
    assert saved.layout_generation == document.layout_generation
    assert saved.state["state"] == "ready"
    assert document.is_live
    assert not saved.is_live
    with pytest.raises(HookError, match="does not exist"):
        open_file(str(tmp_path / "nothing.json"))


def test_changes_since_a_saved_copy_are_told(
    runner: FakeRunner, document: Document, maps: Path
) -> None:
    runner.model.layers[0].mlp.weight.data = torch.zeros(6, 6)
    update(runner)
    new = open_slot(str(maps), "0").read()
    for old in (document, document.raw):
        changes = new.changes_since(old)
        assert changes.moved == ["layers.0.mlp.weight"]
        assert changes.must_register_again
    assert not new.changes_since(new).must_register_again


def test_comparing_what_is_no_layout_is_an_error(document: Document) -> None:
    with pytest.raises(HookError, match="one of them is no layout document"):
        document.changes_since({"tensors": [], "regions": 3})


# --- garbage --------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            found += places(item, (*path, key))
    return found


def use_everything(document: Document) -> None:
    """All that reads a document, for what it may raise."""
    list(document.iter_tensors())
    list(document.iter_regions())
    list(document.iter_kv_cache())
    for address in (0, 4096, 2**63):
        document.lookup(address)
        document.region_at(address)
    for tensor in document.iter_tensors():
        document.lookup(tensor.ptr)
        assert tensor.role
    repr(document)
    assert document.physical_epoch is None or isinstance(document.physical_epoch, int)
    document.changes_since(document)


@settings(deadline=None)
@given(data=st.data())
def test_whatever_stands_in_a_document_only_one_error_escapes(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("garbage")
    tensor = {
        "ptr": 4096,
        "size": 24,
        "span": 24,
        "device": "cpu",
        "dtype": "torch.float32",
        "shape": [2, 3],
        "stride": [3, 1],
        "storage_offset": 0,
        "storage_ptr": 4096,
        "storage_size": 24,
        "kind": "parameter",
        "resident": True,
        "aliases": ["b"],
    }
    region = {"ptr": 4096, "size": 24, "device": "cpu", "tensors": ["a"]}
    cache = {"name": "k", "ptr": 8192, "size": 8, "device": "cpu", "dtype": "x", "shape": [2]}
    who = {"pid": 1, "process_start_ticks": 2, "boot_id": "b"}
    layout: dict[str, Any] = {
        "schema": "sglang-weight-layout",
        "schema_version": 1,
        "layout_generation": 1,
        "content_generation": 1,
        "physical_epoch": 0,
        "identity": {**who, "hostname": "h"},
        "memory": {"kv_cache": [cache]},
        "regions": [region],
        "tensors": {"a": tensor},
    }
    state: dict[str, Any] = {
        "schema": "sglang-weight-state",
        "schema_version": 1,
        "state": "ready",
        "layout_generation": 1,
        "content_generation": 1,
        **who,
    }
    documents = {"layout": layout, "state": state}
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from([p for p in places(documents) if len(p) > 1]))
        inside: Any = documents
        for key in path[:-1]:
            inside = inside[key]
        inside[path[-1]] = data.draw(JSON)
    (folder / files.LAYOUT.format(0)).write_text(json.dumps(documents["layout"]))
    (folder / files.STATE.format(0)).write_text(json.dumps(documents["state"]))
    slot = open_slot(str(folder), "0")
    for read in (
        lambda: slot.read(timeout=0),
        lambda: open_file(str(folder / files.LAYOUT.format(0))),
    ):
        with contextlib.suppress(HookError):
            use_everything(read())
    with contextlib.suppress(HookError):
        slot.owner_alive()
        slot.wait_for_change(timeout=0)
        list(reader.open_directory(str(folder)).events(timeout=0))


@given(JSON)
def test_what_is_no_tensor_and_no_region_is_one_error(value: Any) -> None:
    for parse in (lambda: Tensor.from_raw("w", value), lambda: Region.from_raw(value)):
        with pytest.raises(HookError, match="it was not written by the hook"):
            parse()


def test_a_pipe_in_a_documents_place_does_not_keep_the_reader_waiting(maps: Path) -> None:
    maps.mkdir()
    os.mkfifo(maps / files.STATE.format(0))
    with pytest.raises(HookError, match="not JSON"):
        open_slot(str(maps), "0").read_state()


def test_the_examples_of_the_pieces_hold() -> None:
    tests = [
        test
        for module in (names, spans, tensors)
        for test in doctest.DocTestFinder().find(module)
        if test.examples
    ]
    assert len(tests) >= 4
    assert sum(doctest.DocTestRunner().run(test).failed for test in tests) == 0
