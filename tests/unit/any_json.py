"""Any JSON value, and every place in a document where one may be put."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st


def json_values(*, nan: bool = True) -> st.SearchStrategy[Any]:
    """Any small JSON value; with ``nan=False`` none that is not equal to itself."""
    return st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=nan) | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
        max_leaves=8,
    )


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside a document, its own first."""
    found = [path]
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            found += places(item, (*path, key))
    return found


def replace_at(document: Any, path: tuple[Any, ...], value: Any) -> None:
    """Put ``value`` in the place of what stands at ``path``."""
    for key in path[:-1]:
        document = document[key]
    document[path[-1]] = value
