"""Hand-made DLPack capsules, over memory of the host: what torch makes of them.

There is no GPU here; over one the same is tested in ``tests/gpu/test_cuda_sharing.py``.
"""

from __future__ import annotations

import gc
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from sglang_weight_hook.memory import dlpack, torch_tensors
from sglang_weight_hook.memory.dtypes import ELEMENT_TYPES
from sglang_weight_hook.reader import Tensor

torch = pytest.importorskip("torch")

HOST = (dlpack.CPU, 0)


def described(tensor: Any) -> Tensor:
    return Tensor.from_raw(
        "t",
        {
            "ptr": tensor.data_ptr(),
            "size": tensor.numel() * tensor.element_size(),
            "device": "cpu",
            "dtype": str(tensor.dtype),
            "shape": list(tensor.shape),
            "stride": list(tensor.stride()),
            "kind": "attribute",
        },
    )


def viewed(tensor: Any, views: dlpack.Views) -> Any:
    view = dlpack.View(described(tensor), tensor.data_ptr(), HOST, views)
    assert view.__dlpack_device__() == HOST
    return torch_tensors.from_dlpack(view)


def raw(tensor: Any) -> Any:
    return tensor.contiguous().view(-1).view(torch.uint8)


@pytest.mark.parametrize(
    "dtype", [name for name in ELEMENT_TYPES if hasattr(torch, name.removeprefix("torch."))]
)
def test_every_dtype_and_stride_comes_out_as_it_is(dtype: str) -> None:
    kind = getattr(torch, dtype.removeprefix("torch."))
    views = dlpack.Views()
    size = torch.empty(0, dtype=kind).element_size()
    bits = torch.randint(0, 2, (48 * size,), dtype=torch.uint8)
    base = bits.view(kind).view(6, 8)
    for tensor in (base, base.t(), base[:, :5], base[1::2, ::3], base[:1].expand(4, 8), base[2, 3]):
        found = viewed(tensor, views)
        assert found.dtype == kind
        assert (found.shape, found.stride()) == (tensor.shape, tensor.stride())
        assert found.data_ptr() == tensor.data_ptr()  # no copy
        expected = torch.empty(tensor.shape, dtype=kind).copy_(tensor)
        assert torch.equal(raw(torch.empty(tensor.shape, dtype=kind).copy_(found)), raw(expected))
    assert dlpack.can_view(described(base))


def test_a_view_counts_as_long_as_anything_uses_its_memory() -> None:
    views, base = dlpack.Views(), torch.arange(12).view(3, 4)
    found = viewed(base, views)
    row = found[1]
    assert (views.alive, views.made) == (1, 1)
    del found
    gc.collect()
    assert views.alive == 1
    assert row.tolist() == [4, 5, 6, 7]
    del row
    gc.collect()
    assert (views.alive, views.made) == (0, 1)
    capsule = dlpack.View(described(base), base.data_ptr(), HOST, views).__dlpack__()
    assert views.alive == 1
    del capsule  # nobody has taken it
    gc.collect()
    assert (views.alive, views.made) == (0, 2)
    assert not dlpack._alive


def test_an_empty_tensor_and_one_without_dimensions_have_views() -> None:
    views = dlpack.Views()
    assert viewed(torch.tensor(3.5), views).item() == 3.5
    empty = torch.empty(0, 4)
    found = torch_tensors.from_dlpack(dlpack.View(described(empty), 0, HOST, views))
    assert found.shape == (0, 4)


def test_a_copy_or_another_device_is_refused() -> None:
    tensor = torch.arange(3)
    view = dlpack.View(described(tensor), tensor.data_ptr(), HOST, dlpack.Views())
    for wish in ({"copy": True}, {"dl_device": (2, 0)}):
        with pytest.raises(BufferError, match="copy it afterwards"):
            view.__dlpack__(**wish)
    assert view.__dlpack__(copy=False, dl_device=HOST, max_version=(1, 0), stream=None)


def test_a_dtype_that_nothing_is_known_of_has_no_view() -> None:
    odd = described(torch.arange(3))._replace(dtype="torch.of_the_future")
    assert not dlpack.can_view(odd)


def test_numpy_takes_it_too() -> None:
    numpy = pytest.importorskip("numpy")
    tensor = torch.arange(12, dtype=torch.int16).view(3, 4).t()
    views = dlpack.Views()
    found = numpy.from_dlpack(dlpack.View(described(tensor), tensor.data_ptr(), HOST, views))
    assert found.tolist() == tensor.tolist()
    assert found.strides == (2, 8)
    del found
    gc.collect()
    assert views.alive == 0


@pytest.mark.parametrize("keeps", ["sys.kept = found", "kept = [found]; kept.append(kept)"])
def test_a_view_that_outlives_the_interpreter_does_no_harm(
    run_python: Callable[..., subprocess.CompletedProcess[str]], keeps: str
) -> None:
    code = f"""
import sys, threading
import torch
from sglang_weight_hook.memory import dlpack, torch_tensors
from sglang_weight_hook.reader import Tensor
base = torch.arange(10)
meta = Tensor.from_raw("t", {{"ptr": base.data_ptr(), "size": 80, "device": "cpu",
    "dtype": "torch.int64", "shape": [10], "stride": [1], "kind": "attribute"}})
found = torch_tensors.from_dlpack(dlpack.View(meta, base.data_ptr(), (1, 0), dlpack.Views()))
{keeps}
capsule = dlpack.View(meta, base.data_ptr(), (1, 0), dlpack.Views()).__dlpack__()
print("end")
"""
    assert run_python("-W", "error", "-c", code).stdout == "end\n"
