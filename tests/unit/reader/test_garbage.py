"""What is no document: one error type, whatever stands in the files."""

from __future__ import annotations

import contextlib
import doctest
import json
import os
from pathlib import Path
from typing import Any

import pytest
from any_json import json_values, places, replace_at
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_weight_hook import reader
from sglang_weight_hook.layout import files
from sglang_weight_hook.reader import (
    Document,
    HookError,
    Region,
    Tensor,
    names,
    open_file,
    open_slot,
    spans,
    tensors,
)

JSON = json_values()


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
        replace_at(documents, path, data.draw(JSON))
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
