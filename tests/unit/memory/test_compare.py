"""What differs between two sets of weights is told with its place and its size."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from bytes_owner import BytesOwner
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_weight_hook import HookError
from sglang_weight_hook.memory import compare, sources
from sglang_weight_hook.memory.compare import compare_sources
from sglang_weight_hook.memory.save import save
from sglang_weight_hook.memory.sources import SlotSource, saved_source

safetensors = pytest.importorskip("safetensors.torch")
torch = pytest.importorskip("torch")


def findings(one: Any, other: Any) -> dict[str, Any]:
    return {finding.name: finding for finding in compare_sources(one, other)}


def files(tmp_path: Path, one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    for name, tensors in (("one", one), ("other", other)):
        safetensors.save_file(tensors, tmp_path / f"{name}.safetensors")
    a, b = (saved_source(str(tmp_path / f"{name}.safetensors")) for name in ("one", "other"))
    found = findings(a, b)
    a.close()
    b.close()
    return found


def test_a_slot_is_equal_to_what_was_saved_of_it_until_it_is_updated(
    owner: BytesOwner, tmp_path: Path
) -> None:
    for shard_bytes in (10**9, 100_000):
        path = tmp_path / f"model{shard_bytes}.safetensors"
        save(owner.slot, str(path), shard_bytes=shard_bytes)
        slot, saved = SlotSource(owner.slot), saved_source(str(path))
        found = findings(slot, saved)
        assert len(found) == len(owner.read().tensors)
        assert all(finding.is_equal for finding in found.values())
        slot.close()
        saved.close()
    owner.tell("fill")
    slot, saved = SlotSource(owner.slot), saved_source(str(path))
    found = findings(slot, saved)
    assert found["empty"].is_equal
    different = [finding for finding in found.values() if not finding.is_equal]
    assert len(different) >= len(found) - 3
    slot.close()
    saved.close()


def test_the_first_and_the_largest_difference_are_told(tmp_path: Path) -> None:
    one = {"w": torch.zeros(40, 30), "same": torch.ones(3)}
    other = {"w": one["w"].clone(), "same": one["same"].clone()}
    one["w"][7, 5] = 4.0
    other["w"][7, 5] = 4.5
    other["w"][39, 29] = -2.0
    found = files(tmp_path, one, other)
    assert found["same"].is_equal
    assert found["w"] == compare.Finding(
        "w", compare.DIFFERENT, 2, 1200, (7, 5), largest=2.0, largest_relative=0.125
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float16", "int8", "int64", "bool"])
def test_each_dtype_is_compared_by_its_bits_and_its_values(tmp_path: Path, dtype: str) -> None:
    kind = getattr(torch, dtype)
    one, other = torch.zeros(5, 4).to(kind), torch.zeros(5, 4).to(kind)
    other[3, 2] = 1
    finding = files(tmp_path, {"w": one}, {"w": other})["w"]
    assert (finding.elements, finding.first) == (1, (3, 2))
    assert finding.largest == (None if dtype == "bool" else 1.0)


def test_nan_is_equal_to_the_same_nan(tmp_path: Path) -> None:
    one, other = torch.full((4,), float("nan")), torch.full((4,), float("nan"))
    assert files(tmp_path, {"w": one}, {"w": other})["w"].is_equal
    other[2] = 1.0
    finding = files(tmp_path, {"w": one}, {"w": other})["w"]
    assert (finding.elements, finding.first, finding.largest) == (1, (2,), None)


def test_other_types_shapes_and_names_are_told(tmp_path: Path) -> None:
    found = files(
        tmp_path,
        {"type": torch.zeros(4), "shape": torch.zeros(2, 3), "mine": torch.zeros(1)},
        {"type": torch.zeros(4).half(), "shape": torch.zeros(3, 2), "yours": torch.zeros(1)},
    )
    assert {name: finding.verdict for name, finding in found.items()} == {
        "type": compare.OTHER_TYPE,
        "shape": compare.OTHER_SHAPE,
        "mine": compare.ONLY_ONE,
        "yours": compare.ONLY_OTHER,
    }


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(1, 5000),
    flips=st.sets(st.integers(0, 4999), max_size=5),
    limits=st.tuples(st.integers(2, 999), st.integers(2, 999)),
)
def test_differences_are_counted_whatever_the_pieces(
    size: int, flips: set[int], limits: tuple[int, int]
) -> None:
    class InMemory:
        label, aliases, left_out = "", {}, {}

        def __init__(self, values: bytes, limit: int) -> None:
            self._values, self._limit = values, limit // 2 * 2
            self.entries = {"w": sources.Entry("w", "I16", (size,), 2 * size)}

        def pieces(self, name: str) -> Any:
            for start in range(0, len(self._values), self._limit):
                yield memoryview(self._values)[start : start + self._limit]

        def close(self) -> None: ...

    mine, yours = bytearray(2 * size), bytearray(2 * size)
    where = {flip % size for flip in flips}
    for flip in where:
        yours[2 * flip] = 1
    (finding,) = compare_sources(
        InMemory(bytes(mine), limits[0]), InMemory(bytes(yours), limits[1])
    )
    assert finding.elements == len(where)
    assert finding.first == ((min(where),) if where else None)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x08\0\0\0\0\0\0\0{}      more",
        b"\xff\xff\xff\xff\xff\xff\xff\x7f{}",
        (100).to_bytes(8, "little")
        + json.dumps({"w": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}})
        .encode()
        .ljust(100)
        + bytes(4),
    ],
    ids=["nothing", "too long", "a huge header", "a size that is not its shape's"],
)
def test_what_is_no_such_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "odd.safetensors"
    path.write_bytes(content)
    with pytest.raises(HookError, match="no safetensors file"):
        saved_source(str(path))


def test_a_file_that_is_cut_off_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    safetensors.save_file({"w": torch.zeros(100_000)}, path)
    source = saved_source(str(path))
    with path.open("r+b") as file:
        file.truncate(50_000)
    with pytest.raises(HookError, match="cut off"):
        list(source.pieces("w"))
    source.close()


def test_a_tensor_is_chosen_by_any_of_its_names(owner: BytesOwner, tmp_path: Path) -> None:
    slot = SlotSource(owner.slot)
    names = [each.name for each in compare_sources(slot, slot, lambda name: "embed" in name)]
    assert names == ["lm_head.weight"]
    slot.close()


def test_large_differences_take_no_multiple_of_a_piece(tmp_path: Path) -> None:
    """Two tensors of 64 MiB of which every byte differs, decoded as float64."""
    one, other = torch.zeros(64 << 20, dtype=torch.uint8), torch.ones(64 << 20, dtype=torch.uint8)
    for name, tensor in (("one", one), ("other", other)):
        safetensors.save_file({"w": tensor}, tmp_path / f"{name}.safetensors")
    a, b = (saved_source(str(tmp_path / f"{name}.safetensors")) for name in ("one", "other"))
    tracemalloc.start()
    try:
        (finding,) = compare_sources(a, b)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        a.close()
        b.close()
    assert (finding.elements, finding.largest) == (64 << 20, 1.0)
    assert peak < 96 << 20


def test_an_index_leads_nowhere_else(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"w": "../../etc/passwd"}}))
    with pytest.raises(HookError, match="outside of its folder"):
        saved_source(str(path))
