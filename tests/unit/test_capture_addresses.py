"""Where each tensor lies, and which have no address.

Models and tensors are real torch's; the runner around them is a fake (`fake_sglang`).
Where only a GPU has the real thing, a runner of another device stands in for it: ``tests/gpu``
has the real one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from captured_model import capture, parameter

from sglang_weight_hook.layout.documents import PARAMETER
from sglang_weight_hook.publisher import document, legacy

torch = pytest.importorskip("torch")
nn = torch.nn


STRIDED: dict[str, tuple[Callable[[], Any], int]] = {
    "contiguous": (lambda: torch.zeros(3, 4), 48),
    "transposed": (lambda: torch.zeros(3, 4).t(), 48),
    "padded": (lambda: torch.zeros(3, 8)[:, :4], 80),
    "expanded": (lambda: torch.zeros(1, 4).expand(3, 4), 16),
    "offset": (lambda: torch.zeros(6, 4)[2:5], 48),
    "every other": (lambda: torch.zeros(12)[::2], 44),
    "a scalar": (lambda: torch.zeros(()), 4),
    "half": (lambda: torch.zeros(3, dtype=torch.float16), 6),
    "fp8": (lambda: torch.zeros(5, dtype=torch.float8_e4m3fn), 5),
}


@pytest.mark.parametrize(("make", "span"), STRIDED.values(), ids=list(STRIDED))
def test_a_strided_tensor_has_the_span_that_its_elements_touch(
    make: Callable[[], Any], span: int
) -> None:
    model, tensor = nn.Module(), make()
    model.w = tensor
    (row,) = capture(model).tensors.values()
    assert row.ptr == tensor.data_ptr()
    assert row.size == tensor.numel() * tensor.element_size()
    assert row.span == span
    assert row.shape == list(tensor.shape)
    assert row.stride == list(tensor.stride())
    assert row.storage_offset == tensor.storage_offset()
    assert row.ptr == row.storage_ptr + row.storage_offset * tensor.element_size()
    assert row.ptr + row.span <= row.storage_ptr + row.storage_size
    assert (row.dtype, row.device, row.resident) == (str(tensor.dtype), "cpu", True)


def test_a_zero_size_tensor_has_a_row_and_no_region() -> None:
    model = nn.Module()
    model.none, model.slice = parameter(0, 4), torch.zeros(4)[2:2]
    captured = capture(model)
    assert [(row.size, row.span) for row in captured.tensors.values()] == [(0, 0), (0, 0)]
    assert document.regions_of(captured) == []


def test_what_lies_on_another_device_is_listed_without_an_address() -> None:
    model = nn.Linear(3, 2)
    model.register_buffer("scale", torch.zeros(2))
    captured = capture(model, device="cuda:0")
    assert captured.device_type == "cuda"
    for row in captured.tensors.values():
        assert (row.ptr, row.storage_ptr, row.resident, row.device) == (0, 0, False, "cpu")
        assert row.size > 0
    assert legacy.weights_meta(captured, False) == {}
    assert document.regions_of(captured) == []
    assert document.validation(captured, 2, None)["not_resident"] == ["weight", "bias", "scale"]


def test_a_meta_tensor_is_listed_without_an_address() -> None:
    model = nn.Linear(3, 2, device="meta")
    row = capture(model).tensors["weight"]
    assert (row.ptr, row.size, row.device, row.resident) == (0, 24, "meta", False)


def test_two_tensors_without_an_address_are_not_taken_for_one() -> None:
    model = nn.ModuleList([nn.Linear(3, 2, bias=False) for _ in range(2)]).to("meta")
    captured = capture(model)
    assert list(captured.tensors) == ["0.weight", "1.weight"]
    assert captured.aliases == {}


@pytest.mark.parametrize(
    ("device", "kind"),
    [("cpu", "cpu"), ("cuda", "cuda"), ("cuda:3", "cuda"), ("", "cpu"), (None, "cpu")],
)
def test_the_device_of_a_runner_is_a_kind_of_device(device: str | None, kind: str) -> None:
    # A runner that names none has the GPU where this process uses one, else the CPU.
    assert capture(nn.Module(), device=device).device_type == kind


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_an_uninitialised_parameter_is_left_out_with_the_reason() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3))
    captured = capture(model)
    assert list(captured.tensors) == ["0.weight", "0.bias"]
    assert set(captured.left_out) == {"1.weight", "1.bias"}
    assert all("uninitialized" in reason.lower() for reason in captured.left_out.values())
    assert captured.expected[PARAMETER] == 4


def test_a_sparse_tensor_is_left_out_with_the_reason() -> None:
    model = nn.Module()
    model.plain, model.sparse = torch.zeros(2), torch.eye(3).to_sparse()
    captured = capture(model)
    assert list(captured.tensors) == ["plain"]
    assert "torch.sparse_coo" in captured.left_out["sparse"]


class Packed(torch.Tensor):  # type: ignore[misc, name-defined]
    """A wrapper subclass, as torchao's and DTensor are: no storage of its own."""

    @staticmethod
    def __new__(cls, data: Any, scale: Any) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.float32)

    def __init__(self, data: Any, scale: Any) -> None:
        self.packed, self.scale = data, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["packed", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(func)


class Broken(Packed):
    def __tensor_flatten__(self) -> tuple[list[str], None]:
        raise RuntimeError("not laid out yet")


def test_a_wrapper_subclass_is_published_as_the_tensors_it_wraps() -> None:
    data, scale = torch.zeros(4, 4, dtype=torch.int8), torch.zeros(4)
    model = nn.Module()
    model._buffers["w"] = Packed(data, scale)
    captured = capture(model)
    assert {name: row.ptr for name, row in captured.tensors.items()} == {
        "w.packed": data.data_ptr(),
        "w.scale": scale.data_ptr(),
    }
    assert captured.left_out == {}


def test_a_wrapper_subclass_that_cannot_be_opened_is_left_out_with_the_reason() -> None:
    model = nn.Linear(2, 2)
    model._buffers["w"] = Broken(torch.zeros(2, 2), torch.zeros(2))
    captured = capture(model)
    assert list(captured.tensors) == ["weight", "bias"]
    assert "not laid out yet" in captured.left_out["w"]
