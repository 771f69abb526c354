"""What an agent remembers of layouts rules out addresses, and never one at which something is."""

from __future__ import annotations

import random
from typing import Any

import pytest

from sglang_weight_hook.fleet import occupied
from sglang_weight_hook.fleet.occupied import Occupied
from sglang_weight_hook.reader import Document, Slot


def a_document(seed: int) -> Document:
    chance = random.Random(seed)
    tensors: dict[str, Any] = {}
    for number in range(chance.randrange(12)):
        size = chance.randrange(1, 40)
        tensors[f"t{number}"] = {
            "ptr": chance.randrange(1, 400),
            "size": size,
            "span": size,
            "shape": [size],
            "stride": [1],
            "dtype": "torch.uint8",
            "itemsize": 1,
            "kind": "parameter",
            "device": "cpu",
        }
    cache = [
        {"name": "k", "ptr": chance.randrange(1, 400), "size": 30, "device": "cpu", "shape": [30]}
        for _ in range(chance.randrange(3))
    ]
    raw = {"tensors": tensors, "regions": [], "memory": {"kv_cache": cache}}
    return Document(Slot("/nowhere", "0"), raw, {})


@pytest.mark.parametrize("seed", range(40))
def test_what_is_ruled_out_is_what_no_tensor_and_no_buffer_covers(seed: int) -> None:
    document = a_document(seed)
    known = Occupied()
    known.learn("etag", document)
    covered = {address for start, end in document.occupied() for address in range(start, end)}
    assert {address for address in range(500) if not known.excludes("etag", address)} == covered
    for address in range(500):
        if known.excludes("etag", address):
            assert document.lookup(address) == []


def test_of_a_layout_that_was_not_read_nothing_is_ruled_out() -> None:
    known = Occupied()
    known.learn("one", a_document(1))
    assert not known.excludes("another", 0)
    assert not known.excludes(None, 0)
    known.learn(None, a_document(1))
    assert not known.excludes(None, 0)


def test_the_layouts_read_first_are_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(occupied, "_KEPT", 2)
    known = Occupied()
    for etag in "abc":
        known.learn(etag, a_document(1))
    assert [known.excludes(etag, 0) for etag in "abc"] == [False, True, True]
