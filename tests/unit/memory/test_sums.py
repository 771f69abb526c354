"""Sums: the published checksum, and which word of a block has changed."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_weight_hook.memory import sums

numpy = pytest.importorskip("numpy")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_checksum_is_the_publishers_whatever_the_pieces(data: st.DataObject) -> None:
    torch = pytest.importorskip("torch")
    from sglang_weight_hook.publisher import checksum

    size = data.draw(st.integers(0, 3 * sums.BLOCK))
    values = random.Random(size).randbytes(size)
    tensor = torch.frombuffer(bytearray(values), dtype=torch.uint8) if size else torch.empty(0)
    cuts = sorted(data.draw(st.lists(st.integers(0, size), max_size=5)))
    pieces = [values[a:b] for a, b in zip([0, *cuts], [*cuts, size])]
    assert sums.checksum(pieces) == checksum.checksums([("t", tensor)])["t"]


@settings(max_examples=300, deadline=None)
@given(
    length=st.integers(1, 200),
    word=st.integers(0, 199),
    value=st.integers(0, 2**32 - 1),
    seed=st.integers(0, 99),
)
def test_one_changed_word_is_found_with_what_it_was(
    length: int, word: int, value: int, seed: int
) -> None:
    block = numpy.random.default_rng(seed).integers(0, 2**32, length, dtype=numpy.uint32)
    after = block.copy()
    word %= length
    after[word] = value
    old, new = sums.sums(block)[0], sums.sums(after)[0]
    found = sums.located(old, new, after)
    if block[word] == value:
        assert found is None
        assert list(sums.differing(old[None], new[None])) == []
    else:
        assert found == (word, int(block[word]), value)
        assert list(sums.differing(old[None], new[None])) == [0]


@settings(max_examples=300, deadline=None)
@given(flips=st.sets(st.integers(0, 64 * 32 - 1), min_size=2, max_size=6), seed=st.integers(0, 99))
def test_several_changed_words_are_never_told_as_one(flips: set[int], seed: int) -> None:
    block = numpy.random.default_rng(seed).integers(0, 2**32, 64, dtype=numpy.uint32)
    after = block.copy()
    for flip in flips:
        after[flip // 32] ^= numpy.uint32(1 << flip % 32)
    changed = {flip // 32 for flip in flips}
    found = sums.located(sums.sums(block)[0], sums.sums(after)[0], after)
    if len(changed) == 1:
        (word,) = changed
        assert found == (word, int(block[word]), int(after[word]))
    else:
        assert found is None
