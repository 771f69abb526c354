"""The checksums against plain Python that follows only their documentation.

``wsum64``: bytes in logical (row-major) order, padded with zeros to 32-bit little-endian words;
``A`` their sum, ``B`` their sum weighted by position from 1, both modulo 2**64.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from fake_sglang import FakeRunner, event, load, settle, stream, update
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from sglang_weight_hook.layout import files, variables
from sglang_weight_hook.publisher import checksum

torch = pytest.importorskip("torch")
nn = torch.nn

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e8m0fnu,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int64,
    torch.bool,
    torch.complex64,
]


def documented(data: bytes) -> str:
    """The checksum of a tensor whose bytes in logical order are ``data``."""
    padded = data + bytes(-len(data) % 4)
    words = [int.from_bytes(padded[at : at + 4], "little") for at in range(0, len(padded), 4)]
    a = sum(words) % 2**64
    b = sum(word * place for place, word in enumerate(words, start=1)) % 2**64
    return f"{a:016x}{b:016x}"


def logical_bytes(tensor: Any) -> bytes:
    """The bytes of each element in row-major order, one element at a time from its storage."""
    size = tensor.element_size()
    storage = bytes(tensor.untyped_storage())
    found = bytearray()
    for place in itertools.product(*(range(length) for length in tensor.shape)):
        at = tensor.storage_offset() + sum(i * step for i, step in zip(place, tensor.stride()))
        found += storage[at * size : (at + 1) * size]
    return bytes(found)


def checksum_of(tensor: Any) -> str:
    return checksum.checksums([("it", tensor)])["it"]


@st.composite
def tensors(draw: st.DrawFn) -> Any:
    """Every kind of view of random bytes, in every dtype."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 7), max_size=3))
    count = 1
    for length in shape:
        count *= length
    count += draw(st.integers(0, 3))  # a view need not cover its storage
    size = torch.empty(0, dtype=dtype).element_size()
    data = bytearray(draw(st.binary(min_size=count * size, max_size=count * size)))
    if dtype == torch.bool:
        data = bytearray(byte & 1 for byte in data)
    whole = torch.empty(0, dtype=dtype)
    if data:
        whole = torch.frombuffer(data, dtype=torch.uint8).view(dtype)
    offset = draw(st.integers(0, 3))
    count = 1
    for length in shape:
        count *= length
    offset = min(offset, whole.numel() - count)
    tensor = whole[offset : offset + count].view(shape)
    for _ in range(draw(st.integers(0, 2))):
        how = draw(st.sampled_from(["transpose", "step", "narrow", "expand", "select", "whole"]))
        if how == "transpose" and tensor.dim() > 1:
            tensor = tensor.transpose(0, -1)
        elif how == "step" and tensor.dim():
            tensor = tensor[::2]
        elif how == "narrow" and tensor.dim() and tensor.shape[-1]:
            tensor = tensor[..., 1:]
        elif how == "expand":
            tensor = tensor.expand(draw(st.integers(1, 3)), *tensor.shape)
        elif how == "select" and tensor.dim() and tensor.shape[0]:
            tensor = tensor[-1]
    return tensor


@pytest.fixture(params=[1, 3, 16, 60, checksum.PIECE], ids="in pieces of {}".format)
def piece(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(checksum, "PIECE", request.param)
    size: int = request.param
    return size


@examples(
    deadline=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(tensor=tensors())
def test_a_checksum_is_what_the_documentation_says(piece: int, tensor: Any) -> None:
    assert checksum_of(tensor) == documented(logical_bytes(tensor))


def test_the_checksum_of_nothing_is_zero() -> None:
    assert checksum_of(torch.empty(0, 5)) == "0" * 32
    assert checksum.checksums([]) == {}


def test_the_example_of_the_documentation_by_hand() -> None:
    # Words 0x04030201 and 0x00000005: five bytes, padded with three.
    tensor = torch.tensor([1, 2, 3, 4, 5], dtype=torch.uint8)
    a, b = 0x04030201 + 5, 0x04030201 + 2 * 5
    assert checksum_of(tensor) == f"{a:016x}{b:016x}"


def test_sums_beyond_64_bits_wrap_around() -> None:
    # B is (2**32 - 1) * n(n+1)/2, which is beyond 2**64 from n = 92682 on.
    count = 100_000
    tensor = torch.full((count * 4,), 255, dtype=torch.uint8)
    a, b = (2**32 - 1) * count, (2**32 - 1) * (count * (count + 1) // 2)
    assert b >= 2**64
    assert checksum_of(tensor) == f"{a:016x}{b % 2**64:016x}"


@pytest.mark.parametrize("size", range(1, 14))
def test_every_single_flipped_bit_changes_both_sums(size: int, piece: int) -> None:
    data = torch.randint(0, 256, (size,), dtype=torch.uint8)
    before = checksum_of(data)
    for bit in range(8 * size):
        data[bit // 8] ^= 1 << bit % 8
        after = checksum_of(data)
        assert after[:16] != before[:16], bit
        assert after[16:] != before[16:], bit
        data[bit // 8] ^= 1 << bit % 8
    assert checksum_of(data) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float32])
def test_every_flipped_bit_of_a_strided_weight_changes_the_sums(dtype: Any, piece: int) -> None:
    raw = torch.randint(0, 256, (12 * 9 * dtype.itemsize,), dtype=torch.uint8)
    weight = raw.view(dtype).view(12, 9).t()[1:, ::2]
    inside = {
        at * dtype.itemsize + byte
        for place in itertools.product(*(range(length) for length in weight.shape))
        for at in [weight[place].storage_offset()]
        for byte in range(dtype.itemsize)
    }
    before = checksum_of(weight)
    for byte in range(raw.numel()):
        raw[byte] ^= 0x10
        assert (checksum_of(weight) != before) == (byte in inside), byte
        raw[byte] ^= 0x10


def test_exchanged_words_change_the_second_sum_alone() -> None:
    one = checksum_of(torch.tensor([7, 8, 9], dtype=torch.int32))
    other = checksum_of(torch.tensor([8, 7, 9], dtype=torch.int32))
    assert one[:16] == other[:16]
    assert one[16:] != other[16:]


def test_a_tensor_and_its_contiguous_copy_have_one_checksum() -> None:
    tensor = torch.randn(33, 17).t()
    assert checksum_of(tensor) == checksum_of(tensor.contiguous())
    assert checksum_of(tensor) == checksum_of(nn.Parameter(tensor))
    assert checksum_of(tensor) != checksum_of(tensor.t())


def test_one_element_of_a_strided_tensor_has_its_checksum() -> None:
    # contiguous() gives back such a tensor as it is, with a stride that no byte view accepts.
    scales = torch.arange(4.0)[1::2][1:]
    assert scales.stride() == (2,)
    assert checksum_of(scales) == documented(logical_bytes(scales))


def test_many_tensors_are_named_as_they_were_given() -> None:
    given_ones = [(f"t{number}", torch.full((3,), float(number))) for number in range(20)]
    assert checksum.checksums(given_ones) == {name: checksum_of(t) for name, t in given_ones}


# --- how much memory it takes -------------------------------------------------------------


Mode: Any = torch.utils._python_dispatch.TorchDispatchMode


class Meter(Mode):  # type: ignore[misc]
    """Notes the bytes of the largest storage that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        mine = {
            argument.untyped_storage().data_ptr()
            for argument in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(argument, torch.Tensor)
        }
        for made in torch.utils._pytree.tree_leaves(result):
            if isinstance(made, torch.Tensor):
                storage = made.untyped_storage()
                if storage.data_ptr() not in mine:
                    self.largest = max(self.largest, storage.nbytes())
        return result


LARGE = {
    "flat": lambda: torch.zeros(1 << 20, dtype=torch.uint8),
    "transposed": lambda: torch.zeros(1024, 512, dtype=torch.bfloat16).t(),
    "expanded": lambda: torch.zeros(1, 256, dtype=torch.float32).expand(1024, 256),
    "three dimensions": lambda: torch.zeros(4, 64, 2048, dtype=torch.float16).transpose(0, 2),
    "one long row": lambda: torch.zeros(1, 1 << 20, dtype=torch.int8),
    "odd rows": lambda: torch.zeros(1021, 1027, dtype=torch.float8_e5m2),
}


@pytest.mark.parametrize("what", sorted(LARGE))
def test_no_temporary_is_larger_than_a_few_pieces(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checksum, "PIECE", 16 << 10)
    tensor = LARGE[what]()
    with Meter() as meter:
        checksum.checksums([("it", tensor)])
    # A byte becomes an int64: eight pieces, and the three bytes left over from the last one.
    assert 0 < meter.largest <= 8 * (checksum.PIECE + 4), meter.largest


def test_the_table_of_sums_grows_with_the_tensors_and_not_with_their_bytes() -> None:
    with Meter() as meter:
        checksum.checksums([(str(number), torch.zeros(4)) for number in range(500)])
    assert meter.largest <= 500 * 16


# --- in the documents ---------------------------------------------------------------------


def layout_of(maps: Path) -> Any:
    return json.loads((maps / files.LAYOUT.format("0")).read_bytes())


def a_model() -> Any:
    model = nn.Linear(5, 3)
    model.register_buffer("mask", torch.tensor([True, False, True]))
    model.w_kc = torch.randn(4, 6).t()
    model.offloaded = torch.zeros(3, device="meta")
    model.tied = model.weight
    return model


@pytest.fixture
def summed(monkeypatch: pytest.MonkeyPatch) -> FakeRunner:
    """A settled runner in a process where checksums are asked for."""
    monkeypatch.setenv(variables.CHECKSUM, "1")
    runner = FakeRunner(a_model())
    load(runner)
    settle()
    return runner


def expected_of(model: Any) -> dict[str, str]:
    named = {"weight": model.weight, "bias": model.bias, "mask": model.mask, "w_kc": model.w_kc}
    return {name: documented(logical_bytes(tensor.detach())) for name, tensor in named.items()}


def published(maps: Path) -> dict[str, str]:
    tensors = layout_of(maps)["tensors"]
    return {name: tensor["checksum"] for name, tensor in tensors.items() if "checksum" in tensor}


@pytest.mark.parametrize("value", [None, "", "0", "yes"])
def test_nobody_who_did_not_ask_gets_checksums(
    value: str | None, maps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is not None:
        monkeypatch.setenv(variables.CHECKSUM, value)
    monkeypatch.setattr(checksum, "checksums", lambda named: pytest.fail("they were computed"))
    runner = FakeRunner(a_model())
    load(runner)
    settle()
    update(runner)
    assert layout_of(maps)["checksums"] is None
    assert published(maps) == {}


def test_every_resident_tensor_has_its_checksum_in_the_layout(
    summed: FakeRunner, maps: Path
) -> None:
    layout = layout_of(maps)
    assert published(maps) == expected_of(summed.model)
    assert set(layout["checksums"]) == {"algorithm", "content_generation", "seconds"}
    assert layout["checksums"]["algorithm"] == "wsum64"
    assert layout["checksums"]["content_generation"] == layout["content_generation"] == 1
    assert layout["checksums"]["seconds"] >= 0


def test_checksums_are_those_of_the_contents_that_they_name(summed: FakeRunner, maps: Path) -> None:
    before = published(maps)
    update(summed, during=lambda: summed.model.weight.data.add_(1))
    layout = layout_of(maps)
    assert layout["checksums"]["content_generation"] == layout["content_generation"] == 2
    after = published(maps)
    assert after == expected_of(summed.model)
    assert {name for name in after if after[name] != before[name]} == {"weight"}


def test_checksums_from_before_a_bucket_do_not_pass_for_those_after_it(
    summed: FakeRunner, maps: Path
) -> None:
    # A bucket writes only the state; its content generation is the newer one.
    stream(summed, during=lambda: summed.model.weight.data.add_(1))
    state = json.loads((maps / files.STATE.format("0")).read_bytes())
    assert layout_of(maps)["checksums"]["content_generation"] < state["content_generation"]


def test_memory_that_was_released_is_not_read(
    summed: FakeRunner, maps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    compute = checksum.checksums

    def note(named: Any) -> dict[str, str]:
        read.append(len(named))
        return compute(named)

    monkeypatch.setattr(checksum, "checksums", note)
    details = {"tags": ["weights"], "physical": True}
    event("release_memory_occupation", "release", details=details)
    assert layout_of(maps)["checksums"] is None
    assert published(maps) == {}
    update(summed)
    assert layout_of(maps)["checksums"] is None
    assert read == []
    event("resume_memory_occupation", "resume", details=details)
    assert read == [4]
    assert published(maps) == expected_of(summed.model)


def test_a_released_kv_cache_keeps_no_weight_from_being_read(
    summed: FakeRunner, maps: Path
) -> None:
    details = {"tags": ["kv_cache"], "physical": True}
    event("release_memory_occupation", "release", details=details)
    assert published(maps) == expected_of(summed.model)


def test_checksums_that_fail_leave_the_map_as_it_is_without_them(
    summed: FakeRunner, maps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(named: Any) -> Any:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(checksum, "checksums", fail)
    update(summed)
    layout = layout_of(maps)
    assert layout["checksums"] is None
    assert published(maps) == {}
    assert layout["state"] == "ready"
    assert layout["tensors"]["weight"]["ptr"] == summed.model.weight.data_ptr()
