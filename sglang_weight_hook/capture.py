"""Walk a model runner and note where each of its tensors lies.

Only addresses and shapes are read: no CUDA call that synchronises, no allocation on a device,
no copy of weight data, and no tensor is kept alive once the walk is over.  What is inside
here raises freely; the recorder stands between it and SGLang.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Optional

from . import cuda_driver
from .geometry import touched_bytes

PARAMETER = "parameter"
BUFFER = "buffer"
ATTRIBUTE = "attribute"
LORA = "lora"

# What torch.nn.Module keeps in every instance's __dict__ (torch/nn/modules/module.py): its
# own bookkeeping, not the model's attributes.
_MODULE_INTERNALS = frozenset(
    (
        "_parameters",
        "_buffers",
        "_modules",
        "_non_persistent_buffers_set",
        "_backward_pre_hooks",
        "_backward_hooks",
        "_is_full_backward_hook",
        "_forward_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called",
        "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs",
        "_state_dict_hooks",
        "_state_dict_pre_hooks",
        "_load_state_dict_pre_hooks",
        "_load_state_dict_post_hooks",
        "training",
    )
)


class Row(NamedTuple):
    """One tensor under its canonical name.  Addresses and sizes in bytes, strides in elements."""

    kind: str
    ptr: int
    size: int  # numel * itemsize: what the values take
    span: int  # from the first to behind the last byte touched: what a reader must cover
    device: str
    dtype: str
    shape: list[int]
    stride: list[int]
    storage_offset: int
    storage_ptr: int
    storage_size: int
    resident: bool


class Capture(NamedTuple):
    """Everything one walk found."""

    device_type: str  # of the runner: "cuda", "cpu", ...
    tensors: dict[str, Row]  # by canonical name, parameters first, in the model's order
    aliases: dict[str, list[str]]  # canonical name -> its other names
    left_out: dict[str, str]  # name -> why it has no row
    expected: dict[str, int]  # names the model holds, by kind
    allocations: dict[int, tuple[int, int]]  # storage_ptr -> driver allocation (base, size)
    kv_cache: list[dict[str, Any]]
    addresses: Optional[dict[str, int]]  # what `moved` compares with


def capture(runner: Any) -> Capture:
    """Walk ``runner.model``, its LoRA pool and its KV cache."""
    model = getattr(runner, "model", None)
    if model is None:
        raise LookupError("the runner has no model")
    device_type = _device_type(runner)
    named: list[tuple[str, str, Any]] = []
    walked = _walk_model(model)
    for kind, names in walked.items():
        named.extend((kind, name, tensor) for name, tensor in names)
    named.extend((LORA, name, tensor) for name, tensor in _lora_pool(runner))

    tensors: dict[str, Row] = {}
    aliases: dict[str, list[str]] = {}
    left_out: dict[str, str] = {}
    expected = dict.fromkeys((PARAMETER, BUFFER, ATTRIBUTE, LORA), 0)
    by_identity: dict[int, str] = {}
    by_place: dict[tuple[Any, ...], str] = {}
    for kind, outer_name, outer in named:
        expected[kind] += 1
        canonical = by_identity.get(id(outer))
        if canonical is not None:
            if canonical != outer_name:
                aliases.setdefault(canonical, []).append(outer_name)
            continue
        for name, tensor in _plain_tensors(outer_name, outer):
            try:
                row = _row(kind, tensor, device_type)
            except Exception as error:
                left_out[name] = f"{type(error).__name__}: {error}"[:200]
                continue
            # A second tensor object over the very same elements (a re-bound draft head, a
            # parameter and a plain attribute holding its .data) is one tensor to a reader.
            place = (row.ptr, row.device, row.dtype, tuple(row.shape), tuple(row.stride))
            canonical = by_place.get(place) if row.ptr else None
            if canonical is not None:
                aliases.setdefault(canonical, []).append(name)
            else:
                tensors[name] = row
                if row.ptr:
                    by_place[place] = name
            by_identity.setdefault(id(outer), canonical or name)
    return Capture(
        device_type=device_type,
        tensors=tensors,
        aliases=aliases,
        left_out=left_out,
        expected=expected,
        allocations=_allocations(tensors.values()),
        kv_cache=_kv_cache(runner),
        addresses=_addresses(walked, device_type),
    )


def parameters_as_torch_names_them(runner: Any) -> list[str]:
    """``named_parameters()``'s own names: an independent count to hold our walk against."""
    return [name for name, _ in runner.model.named_parameters()]


def _device_type(runner: Any) -> str:
    """The runner's own device: weights anywhere else are not resident on it."""
    device = str(getattr(runner, "device", "") or "cuda")
    return device.split(":")[0]


# --- finding the tensors ------------------------------------------------------------------


def _walk_model(model: Any) -> dict[str, list[tuple[str, Any]]]:
    """Every tensor of every module under every name it has, by kind.

    Our own walk, since ``named_parameters`` drops tied names, and with
    ``remove_duplicate=False`` would never end on a module that contains itself.
    """
    found: dict[str, list[tuple[str, Any]]] = {PARAMETER: [], BUFFER: [], ATTRIBUTE: []}
    parameters, buffers, attributes = found[PARAMETER], found[BUFFER], found[ATTRIBUTE]
    import torch

    tensor_type = torch.Tensor
    # (prefix, module, ids of the modules above it); the children are pushed in reverse, so
    # that modules come off in the order in which named_modules() gives them.
    stack: list[tuple[str, Any, frozenset[int]]] = [("", model, frozenset())]
    while stack:
        prefix, module, above = stack.pop()
        if id(module) in above:
            continue
        state = module.__dict__
        for name, parameter in state.get("_parameters", {}).items():
            if parameter is not None:
                parameters.append((prefix + name, parameter))
        for name, buffer in state.get("_buffers", {}).items():
            if buffer is not None:
                buffers.append((prefix + name, buffer))
        for name, value in state.items():
            if isinstance(value, tensor_type):
                attributes.append((prefix + name, value))
            elif isinstance(value, (list, tuple, dict)) and value and name not in _MODULE_INTERNALS:
                attributes.extend(_tensors_inside(prefix + name, value, tensor_type))
        children = state.get("_modules")
        if children:
            below = above | {id(module)}
            stack.extend(
                (prefix + name + ".", child, below)
                for name, child in reversed(list(children.items()))
                if child is not None
            )
    return found


def _tensors_inside(name: str, value: Any, tensor_type: type) -> Iterator[tuple[str, Any]]:
    """Tensors held one level deep in a list, tuple or dict: ``name.0``, ``name.key``."""
    items: Iterable[tuple[Any, Any]]
    items = list(value.items()) if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        if isinstance(item, tensor_type):
            yield f"{name}.{key}", item


def _lora_pool(runner: Any) -> Iterator[tuple[str, Any]]:
    """Tensors of the LoRA pool (SGLang, lora/mem_pool.py, LoRAMemoryPool)."""
    pool = getattr(getattr(runner, "lora_manager", None), "memory_pool", None)
    if pool is not None:
        yield from _tensors_of_object("lora_pool", pool, depth=3)


def _kv_cache(runner: Any) -> list[dict[str, Any]]:
    """Where the KV cache lies: SGLang, mem_cache/memory_pool.py, its pools' buffers."""
    pool = getattr(runner, "token_to_kv_pool", None)
    if pool is None:
        return []
    ranges = []
    seen: set[int] = set()
    for name, tensor in _tensors_of_object("", pool, depth=3):
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if tensor.dim() < 2:
            continue  # the pools' own books: vectors of addresses and strides
        try:
            row = _row("kv_cache", tensor, tensor.device.type)
        except Exception:
            continue
        if row.ptr and row.size:
            ranges.append(
                {
                    "name": name,
                    "ptr": row.ptr,
                    "size": row.span,
                    "device": row.device,
                    "dtype": row.dtype,
                    "shape": row.shape,
                    "storage_ptr": row.storage_ptr,
                    "storage_size": row.storage_size,
                }
            )
    return ranges


def _tensors_of_object(prefix: str, owner: Any, depth: int) -> Iterator[tuple[str, Any]]:
    """Tensors among an object's attributes, inside lists and dicts and SGLang's own objects."""
    import torch

    pending: list[tuple[str, Any, int]] = [(prefix, owner, depth)]
    seen: set[int] = set()
    while pending:
        name, value, left = pending.pop(0)
        if isinstance(value, torch.Tensor):
            yield name, value
            continue
        if left < 0 or id(value) in seen:
            continue
        seen.add(id(value))
        children: Iterable[tuple[Any, Any]]
        if isinstance(value, dict):
            children = list(value.items())
        elif isinstance(value, (list, tuple)):
            children = enumerate(value)
        elif value is owner or type(value).__module__.startswith("sglang.srt.mem_cache"):
            children = list(getattr(value, "__dict__", {}).items())
        else:
            continue
        dot = "." if name else ""
        pending.extend((f"{name}{dot}{key}", item, left - 1) for key, item in children)


def _plain_tensors(name: str, tensor: Any) -> Iterator[tuple[str, Any]]:
    """The tensors with memory of their own behind ``tensor``: itself, or what it wraps.

    DTensor (``--enable-torch-tp``) and torchao's quantised tensors are wrapper subclasses:
    they have no storage, and ``__tensor_flatten__`` names the tensors that have
    (torch/utils/_python_dispatch.py).
    """
    flatten = getattr(type(tensor), "__tensor_flatten__", None)
    if flatten is None:
        yield name, tensor
        return
    for attribute in flatten(tensor)[0]:
        yield from _plain_tensors(f"{name}.{attribute}", getattr(tensor, attribute))


# --- one tensor ---------------------------------------------------------------------------


def _row(kind: str, tensor: Any, device_type: str) -> Row:
    device = tensor.device
    shape, itemsize = list(tensor.shape), tensor.element_size()
    size = tensor.numel() * itemsize
    if device.type == "meta":
        stride = list(tensor.stride())
        return Row(kind, 0, size, size, "meta", str(tensor.dtype), shape, stride, 0, 0, 0, False)
    if str(tensor.layout) != "torch.strided":
        raise TypeError(f"layout {tensor.layout} has no strides")
    stride = list(tensor.stride())
    storage = tensor.untyped_storage()
    resident = device.type == device_type
    return Row(
        kind=kind,
        # The address of an offloaded weight is one of the host's, and nobody must take it
        # for one of the device's.
        ptr=tensor.data_ptr() if resident else 0,
        size=size,
        span=touched_bytes(shape, stride, itemsize),
        device=str(device),
        dtype=str(tensor.dtype),
        shape=shape,
        stride=stride,
        storage_offset=tensor.storage_offset(),
        storage_ptr=storage.data_ptr() if resident else 0,
        storage_size=storage.nbytes(),
        resident=resident,
    )


def _allocations(rows: Iterable[Row]) -> dict[int, tuple[int, int]]:
    """The driver allocation behind each storage; empty where there is no CUDA."""
    if not cuda_driver.is_initialised():
        return {}
    allocations: dict[int, tuple[int, int]] = {}
    for row in rows:
        if row.storage_ptr and row.storage_ptr not in allocations and row.device.startswith("cuda"):
            found = cuda_driver.allocation_of(row.storage_ptr)
            if found is not None:
                allocations[row.storage_ptr] = found
    return allocations


def moved(before: Optional[Capture], runner: Any) -> bool:
    """Whether any parameter or buffer lies elsewhere than in ``before``, or has come or gone.

    The quick question asked after each bucket of a long update: one address per name, no
    rows.  Attributes and the LoRA pool are not asked about: nothing rebinds them between
    buckets, and the capture that ends a session sees them anyway.
    """
    if before is None or before.addresses is None:
        return True
    return _addresses(_walk_model(runner.model), before.device_type) != before.addresses


def _addresses(
    walked: dict[str, list[tuple[str, Any]]], device_type: str
) -> Optional[dict[str, int]]:
    """The address under each parameter's and buffer's name; None if some have no plain one."""
    try:
        return {
            name: tensor.data_ptr() if tensor.device.type == device_type else 0
            for kind in (PARAMETER, BUFFER)
            for name, tensor in walked[kind]
        }
    except Exception:  # uninitialised parameters and wrapper subclasses have no address
        return None
