"""Which element lies at an offset, whatever the strides: exact, or said to be unknown."""

from __future__ import annotations

import json
import random
import time
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_weight_hook.layout import files
from sglang_weight_hook.reader import Document, HookError, Slot, Tensor
from sglang_weight_hook.reader.indices import Undecided, index_at


def offset_of(index: tuple[int, ...], stride: tuple[int, ...]) -> int:
    return sum(number * step for number, step in zip(index, stride))


def offsets(shape: tuple[int, ...], stride: tuple[int, ...]) -> set[int]:
    return {offset_of(index, stride) for index in product(*map(range, shape))}


def assert_found(shape: tuple[int, ...], stride: tuple[int, ...], element: int) -> None:
    index = index_at(shape, stride, element)
    assert index is not None
    assert len(index) == len(shape)
    assert all(0 <= number < length for number, length in zip(index, shape))
    assert offset_of(index, stride) == element


@st.composite
def strided(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Contiguous, expanded (0), overlapping, with a common divisor, and far apart."""
    dimensions = draw(st.integers(0, 6))
    most = {0: 9, 1: 9, 2: 9, 3: 7, 4: 5, 5: 3, 6: 3}[dimensions]
    shape = tuple(draw(st.integers(1, most)) for _ in range(dimensions))
    step = st.one_of(st.integers(0, 12), st.integers(0, 40), st.integers(100, 130))
    scale = draw(st.sampled_from([1, 1, 2, 6, 2**33]))
    return shape, tuple(draw(step) * scale for _ in range(dimensions))


@settings(max_examples=300, deadline=None)
@given(strided())
def test_every_offset_is_told_as_by_writing_them_all_down(
    made: tuple[tuple[int, ...], tuple[int, ...]],
) -> None:
    shape, stride = made
    held = offsets(shape, stride)
    for element in held:
        assert_found(shape, stride, element)
    around = {at + more for at in held for more in (-1, 1, 2, 3, 6)}
    for element in {*range(150), max(held) + 1, 2**63, *around} - held:
        if element >= 0:
            assert index_at(shape, stride, element) is None, (shape, stride, element)


# A search that is given up after 10,000 tries calls the first and the last of these padding.
HARD: list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = [
    # 40 pairs that lie nearly the same number of elements apart.
    ((2,) * 40, tuple(range(10**6, 10**6 + 40)), (0, 1, 1, 0) * 10),
    # Windows of windows of a signal.
    ((1000, 1000, 1000), (997, 991, 983), (999, 0, 1)),
    ((50_000, 50_000, 3), (99_991, 99_989, 1), (1, 49_999, 2)),
    # unfold in both directions of a picture, twice.
    ((60, 60, 5, 5, 5, 5), (1024, 1, 1024, 1, 1024, 1), (59, 59, 4, 4, 4, 4)),
    ((300, 300, 300, 300), (10007, 10009, 10037, 10039), (299, 1, 298, 2)),
]


@pytest.mark.parametrize(("shape", "stride", "index"), HARD)
def test_a_held_byte_is_not_called_padding(
    shape: tuple[int, ...], stride: tuple[int, ...], index: tuple[int, ...]
) -> None:
    started = time.monotonic()
    assert_found(shape, stride, offset_of(index, stride))
    assert time.monotonic() - started < 3


def test_no_divisor_is_tried_in_vain() -> None:
    shape, stride = (2,) * 40, tuple(2 * n for n in range(10**6, 10**6 + 40))
    started = time.monotonic()
    assert index_at(shape, stride, 41 * 10**6 + 1) is None
    assert time.monotonic() - started < 0.1


def test_what_trying_does_not_decide_listing_does(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang_weight_hook.reader import indices

    monkeypatch.setattr(indices, "_TRIES", 3)
    for seed in range(40):
        chance = random.Random(seed)
        shape = tuple(chance.randint(1, 5) for _ in range(5))
        stride = tuple(chance.randint(0, 60) for _ in range(5))
        held = offsets(shape, stride)
        for element in range(max(held) + 3):
            if element in held:
                assert_found(shape, stride, element)
            else:
                assert index_at(shape, stride, element) is None


# Subset sums of random numbers of 60 bits: as hard as it gets.
chance = random.Random(1)
DENSE = tuple(chance.getrandbits(56) | 1 for _ in range(100))


def a_document(**changes: Any) -> Document:
    raw = {
        "ptr": 4096,
        "size": 2**100,
        "device": "cpu",
        "dtype": "torch.uint8",
        "shape": [2] * len(DENSE),
        "stride": list(DENSE),
        "kind": "parameter",
        **changes,
    }
    return Document(Slot("/nowhere", "0"), {"tensors": {"w": raw}, "regions": []}, {})


def test_what_cannot_be_decided_in_bounded_time_is_unknown_and_not_padding() -> None:
    target = sum(DENSE[::2]) + 1
    started = time.monotonic()
    with pytest.raises(Undecided):
        index_at((2,) * len(DENSE), DENSE, target)
    assert time.monotonic() - started < 5
    # A size of 64 bits has no room for 2**100 elements: such a tensor is 0 bytes by its shape.
    document = a_document(size=2**20, span=2**63)
    (hit,) = document.lookup(4096 + target)
    assert (hit.holds, hit.element, hit.byte, hit.is_unknown) == (None, None, None, True)
    with pytest.raises(HookError, match="cannot be told"):
        hit.tensor.index_of(4096 + target)


def test_the_number_of_dimensions_that_a_document_may_have_is_no_problem() -> None:
    stride = tuple(2**n for n in range(60))
    element = 2**60 - 1
    assert_found((2,) * 60, stride[::-1], element)
    assert_found((2,) * 60, stride, element)
    assert_found((2,) * 128, (1,) * 128, 128)
    assert index_at((2,) * 128, (1,) * 128, 129) is None
    assert_found((2**63, 2**63), (2**63, 2**63 - 1), 2**63 * (2**63 - 1) + 5 * (2**63 - 1))


def test_overlapping_views_of_torch_are_looked_up_as_torch_reads_them() -> None:
    torch = pytest.importorskip("torch")
    base = torch.arange(400, dtype=torch.int32)
    views = {
        "unfold": base.view(20, 20).unfold(0, 5, 2).unfold(1, 4, 1),
        "as_strided": base.as_strided((4, 5, 6), (7, 3, 5)),
        "expand": base[:6].view(2, 1, 3).expand(2, 7, 3),
        "permute": base.view(4, 10, 10).permute(2, 0, 1)[::3],
    }
    for name, view in views.items():
        shape, stride = tuple(view.shape), tuple(view.stride())
        tensor = Tensor.from_raw(
            name,
            {
                "ptr": view.data_ptr(),
                "size": view.numel() * 4,
                "device": "cpu",
                "dtype": "torch.int32",
                "shape": list(shape),
                "stride": list(stride),
                "kind": "attribute",
            },
        )
        held = offsets(shape, stride)
        for place in range(max(held) + 1):
            index = tensor.index_of(view.data_ptr() + 4 * place + 1)
            assert (index is not None) == (place in held)
            if index is not None:
                assert int(view[index]) == int(base[view.storage_offset() + place])


@pytest.mark.usefixtures("runner")
def test_lookup_says_that_it_is_unknown(maps: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("typer")
    pytest.importorskip("rich")
    from sglang_weight_hook.commands import entry

    path = maps / files.LAYOUT.format(0)
    layout = json.loads(path.read_bytes())
    name = next(name for name, tensor in layout["tensors"].items() if tensor["ptr"])
    layout["tensors"][name].update(shape=[3, 7], stride=[7, 1])  # its size is of another shape
    layout["tensors"][name].update(size=layout["tensors"][name]["size"] * 21 + 1)
    path.write_text(json.dumps(layout))
    address = str(layout["tensors"][name]["ptr"] + 5)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("sys.argv", ["sglang-weight-hook", "lookup", address])
        entry.main()
        out = capsys.readouterr().out
        assert "  element  unknown" in out
        assert "padding" not in out
        patched.setattr("sys.argv", ["sglang-weight-hook", "lookup", address, "--json"])
        entry.main()
        hits = {hit["name"]: hit for hit in json.loads(capsys.readouterr().out)["tensors"]}
    assert hits[name]["holds"] is None
