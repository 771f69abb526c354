"""Values as torch tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..reader import HookError, Tensor
from .errors import NotReadable

if TYPE_CHECKING:
    import torch


def empty(tensor: Tensor) -> tuple[torch.Tensor, memoryview]:
    """A tensor in host memory for the values of ``tensor``, and its bytes.  Raises HookError."""
    module = _torch()
    kind = getattr(module, tensor.dtype.removeprefix("torch."), None)
    if not isinstance(kind, module.dtype):
        raise NotReadable(
            f"this torch ({module.__version__}) has no {tensor.dtype}; take the bytes with "
            f"memory.read()"
        )
    found: torch.Tensor = module.empty(tensor.shape, dtype=kind)
    if found.numel() * found.element_size() != tensor.size:
        raise HookError(
            f"{tensor.name} takes {tensor.size} bytes, which {tensor.dtype} does not; take the "
            f"bytes with memory.read()"
        )
    if not tensor.size:
        return found, memoryview(bytearray())
    return found, memoryview(found.view(-1).view(module.uint8).numpy().data)


def over(tensor: Tensor, data: memoryview) -> torch.Tensor:
    """A tensor over bytes that lie as the owner's do, with its strides: no copy.

    Raises NotReadable.
    """
    module = _torch()
    kind = getattr(module, tensor.dtype.removeprefix("torch."), None)
    if not isinstance(kind, module.dtype):
        raise NotReadable(
            f"this torch ({module.__version__}) has no {tensor.dtype}; take the bytes with read()"
        )
    flat = module.frombuffer(data, dtype=kind)
    return flat.as_strided(tensor.shape, tensor.stride)  # type: ignore[no-any-return]


def from_dlpack(view: Any) -> torch.Tensor:
    """A tensor over ``view``, an object with ``__dlpack__``: no copy.  Raises NotReadable.

    Of the type that its ``torch_dtype`` names, if it does: bytes stand for types that DLPack lacks.
    """
    module = _torch()
    found: torch.Tensor = module.from_dlpack(view)
    dtype = getattr(view, "torch_dtype", None)
    if dtype is None:
        return found
    kind = getattr(module, dtype.removeprefix("torch."), None)
    if not isinstance(kind, module.dtype):
        raise NotReadable(
            f"this torch ({module.__version__}) has no {dtype}; take the bytes with memory.read()"
        )
    return found.view(kind)


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        raise NotReadable(
            "tensors need torch, which is not installed here; install it, or take memory.array() "
            "or memory.read()"
        ) from None
    return torch
