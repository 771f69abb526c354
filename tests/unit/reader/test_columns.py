"""The quick answer about whole columns says yes only where the detailed checks find nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from any_json import json_values, places, replace_at
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_documents import a_document

from sglang_weight_hook.reader import Document, columns, verify


def remarks(document: Document, raw: dict[str, Any], quick: bool) -> list[verify.Remark]:
    with pytest.MonkeyPatch.context() as patch:
        if not quick:
            patch.setattr(columns, "are_sound", lambda *_: False)
        return verify.verify_document(Document(document.slot, raw, document.state))


def is_sound(document: Document, raw: dict[str, Any]) -> bool:
    cache = list(document.iter_kv_cache())
    return columns.are_sound(raw["tensors"], raw["regions"], cache)


def test_a_good_document_needs_no_detailed_check(document: Document) -> None:
    """Views, a tensor without memory and a padded one among them."""
    assert document.tensors["offloaded"]["ptr"] == 0
    assert is_sound(document, document.raw)
    assert remarks(document, document.raw, quick=True) == []


def test_a_document_of_a_gpu_needs_none_either(document: Document) -> None:
    raw = a_document()
    other = Document(document.slot, raw, document.state)
    found = remarks(other, raw, quick=False)
    assert [check for _, check, _ in found if check in ("tensors", "overlaps", "regions")] == []
    assert columns.are_sound(raw["tensors"], raw["regions"], list(other.iter_kv_cache()))


@pytest.mark.parametrize("has_schema", [True, False])
def test_it_finds_what_the_detailed_checks_find(
    document: Document, has_schema: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_schema:
        monkeypatch.setattr(verify, "_checker", lambda path: None)
    inside = [path for path in places(document.raw) if len(path) > 1]
    paths = [path for path in inside if path[0] in ("tensors", "regions")]

    @settings(deadline=None, max_examples=300)
    @given(st.data())
    def agree(data: st.DataObject) -> None:
        raw = copy.deepcopy(document.raw)
        for path in data.draw(st.lists(st.sampled_from(paths), min_size=1, max_size=2)):
            try:
                old: Any = raw
                for key in path:
                    old = old[key]
                replace_at(raw, path, data.draw(_instead_of(old)))
            except (IndexError, KeyError, TypeError):
                continue  # inside of what was replaced before
        assert remarks(document, raw, quick=True) == remarks(document, raw, quick=False)

    agree()


def _instead_of(old: Any) -> st.SearchStrategy[Any]:
    if type(old) is int:  # nearly right is what is hard to find
        near = st.sampled_from([old + 1, old - 1, old + 8, 2 * old, 0, float(old), 2**64, True])
        return near | json_values(nan=False)
    if type(old) is bool:
        return st.just(not old) | json_values(nan=False)
    return json_values(nan=False)
