"""Walk a model runner and note where each of its tensors lies.

Only addresses and shapes are read: no CUDA call that synchronises, no allocation on a device,
no copy of weight data, and no tensor is kept alive once the walk is over.  What is inside
here raises freely; the recorder stands between it and SGLang.
"""

from __future__ import annotations

import re
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


class Footprint(NamedTuple):
    """What `moved` compares: cheap to take again, because it knows where tensors are held."""

    # For each module in the order of the walk, its attributes that hold tensors: the
    # attribute's name, and a key inside it where it is a list, tuple or dict.
    held: list[tuple[tuple[str, Any], ...]]
    places: list[Any]


class Capture(NamedTuple):
    """Everything one walk found."""

    device_type: str  # of the runner: "cuda", "cpu", ...
    tensors: dict[str, Row]  # by canonical name, parameters first, in the model's order
    aliases: dict[str, list[str]]  # canonical name -> its other names
    left_out: dict[str, str]  # name -> why it has no row
    expected: dict[str, int]  # names the model holds, by kind
    # storage_ptr -> the driver allocations (base, size) under it, ascending.  One as a rule;
    # several where the caching allocator maps expandable segments piece by piece.
    allocations: dict[int, list[tuple[int, int]]]
    allocation_kinds: dict[int, str]  # allocation base -> cuda_driver.CUDA_MALLOC or VMM
    kv_cache: list[dict[str, Any]]
    # Names under which torch lists a parameter -> the canonical name of its row.
    torch_names: dict[str, str]
    footprint: Optional[Footprint]


def capture(runner: Any) -> Capture:
    """Walk ``runner.model``, its LoRA pool and its KV cache."""
    model = getattr(runner, "model", None)
    if model is None:
        raise LookupError("the runner has no model")
    device_type = _device_type(runner)
    named: list[tuple[str, str, Any]] = []
    for kind, names in _walk_model(model).items():
        named.extend((kind, name, tensor) for name, tensor in names)
    named.extend((LORA, name, tensor) for name, tensor in _lora_pool(runner))

    tensors: dict[str, Row] = {}
    aliases: dict[str, list[str]] = {}
    left_out: dict[str, str] = {}
    expected = dict.fromkeys((PARAMETER, BUFFER, ATTRIBUTE, LORA), 0)
    by_identity: dict[int, str] = {}
    by_place: dict[tuple[Any, ...], str] = {}
    torch_names: dict[str, str] = {}
    for kind, outer_name, outer in named:
        expected[kind] += 1
        canonical = by_identity.get(id(outer))
        if canonical is not None:
            if canonical != outer_name:
                aliases.setdefault(canonical, []).append(outer_name)
            continue
        try:
            rows = [
                (name, _row(kind, tensor, device_type))
                for name, tensor in _plain_tensors(outer_name, outer)
            ]
        except Exception as error:
            left_out[outer_name] = f"{type(error).__name__}: {error}"[:200]
            continue
        for name, row in rows:
            # A second tensor object over the very same elements (a re-bound draft head, a
            # parameter and a plain attribute holding its .data) is one tensor to a reader.
            place = (row.ptr, row.device, row.dtype, tuple(row.shape), tuple(row.stride))
            canonical = by_place.get(place) if row.ptr else None
            if canonical is not None:
                aliases.setdefault(canonical, []).append(name)
            elif name in tensors:
                # "a.b" can be b of module a, or an attribute of that very name.
                left_out[f"{name} ({kind})"] = "another tensor has this name"
                continue
            else:
                tensors[name] = row
                if row.ptr:
                    by_place[place] = name
            by_identity.setdefault(id(outer), canonical or name)
            if kind == PARAMETER:
                torch_names[name] = canonical or name
    allocations = _allocations(tensors.values())
    return Capture(
        device_type=device_type,
        tensors=tensors,
        aliases=aliases,
        left_out=left_out,
        expected=expected,
        allocations=allocations,
        allocation_kinds=_allocation_kinds(allocations),
        kv_cache=_kv_cache(runner),
        torch_names=torch_names,
        footprint=_footprint(model),
    )


def parameter_count(runner: Any) -> int:
    """How many parameters torch itself counts: what our own walk is held against."""
    return sum(1 for _ in runner.model.named_parameters())


def _device_type(runner: Any) -> str:
    """The runner's own device: weights anywhere else are not resident on it."""
    device = str(getattr(runner, "device", None) or "")
    if not device:
        device = "cuda" if cuda_driver.is_initialised() else "cpu"
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
            role, layer = _kv_place(name)
            first = getattr(pool, "start_layer", 0)
            ranges.append(
                {
                    "name": name,
                    "role": role,
                    "layer": None if layer is None else layer + (first or 0),
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


# k_buffer and v_buffer of an MHA pool, kv_buffer of an MLA pool, one tensor a layer
# (SGLang, mem_cache/memory_pool.py); pools of pools put their own name in front.
_KV_BUFFER = re.compile(r"(?:^|\.)(k|v|kv)_buffer\.(\d+)$")


def _kv_place(name: str) -> tuple[Optional[str], Optional[int]]:
    """Role and layer within its pool, from the name of a KV buffer."""
    match = _KV_BUFFER.search(name)
    return (match.group(1), int(match.group(2))) if match else (None, None)


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


def _plain_tensors(name: str, tensor: Any) -> list[tuple[str, Any]]:
    """The tensors with memory of their own behind ``tensor``: itself, or what it wraps.

    DTensor (``--enable-torch-tp``) and torchao's quantised tensors are wrapper subclasses:
    they have no storage, and ``__tensor_flatten__`` names the tensors that have
    (torch/utils/_python_dispatch.py).  A single one goes by the wrapper's own name.
    """
    if not _is_wrapper(tensor):
        return [(name, tensor)]
    inner = [
        (attribute, getattr(tensor, attribute)) for attribute in tensor.__tensor_flatten__()[0]
    ]
    if len(inner) == 1:
        return _plain_tensors(name, inner[0][1])
    return [
        found for attribute, held in inner for found in _plain_tensors(f"{name}.{attribute}", held)
    ]


def _is_wrapper(tensor: Any) -> bool:
    return hasattr(type(tensor), "__tensor_flatten__")


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


def _allocations(rows: Iterable[Row]) -> dict[int, list[tuple[int, int]]]:
    """The driver allocations under each storage; empty where there is no CUDA."""
    if not cuda_driver.is_initialised():
        return {}
    allocations: dict[int, list[tuple[int, int]]] = {}
    for row in rows:
        if row.storage_ptr and row.storage_ptr not in allocations and row.device.startswith("cuda"):
            found = cuda_driver.allocations_under(row.storage_ptr, row.storage_size)
            if found:
                allocations[row.storage_ptr] = found
    return allocations


def _allocation_kinds(allocations: dict[int, list[tuple[int, int]]]) -> dict[int, str]:
    kinds: dict[int, str] = {}
    for pieces in allocations.values():
        for base, _ in pieces:
            kind = kinds.get(base) or cuda_driver.allocation_kind(base)
            if kind is not None:
                kinds[base] = kind
    return kinds


def known_allocations(before: Optional[Capture], after: Capture) -> Capture:
    """``after`` with the allocations of ``before`` where the driver gave none for a storage.

    It gives none while the memory saver has unmapped the pages, nor in a thread without a
    CUDA context; the storage has not moved for that.
    """
    if before is None or not before.allocations:
        return after
    sizes = {row.storage_ptr: row.storage_size for row in before.tensors.values()}
    kept = {
        row.storage_ptr: before.allocations[row.storage_ptr]
        for row in after.tensors.values()
        if row.storage_ptr in before.allocations and sizes.get(row.storage_ptr) == row.storage_size
    }
    return after._replace(
        allocations={**kept, **after.allocations},
        allocation_kinds={**before.allocation_kinds, **after.allocation_kinds},
    )


def live_tensors(runner: Any, captured: Capture) -> list[tuple[str, Any]]:
    """The captured resident tensors themselves, for as long as the caller looks at them."""
    walked = _walk_model(runner.model)
    named = [pair for kind in walked.values() for pair in kind] + list(_lora_pool(runner))
    found: dict[str, Any] = {}
    for outer_name, outer in named:
        for name, tensor in _plain_tensors(outer_name, outer):
            row = captured.tensors.get(name)
            if row is not None and row.resident and name not in found:
                found[name] = tensor
    return list(found.items())


# --- has anything moved? ------------------------------------------------------------------


def moved(before: Optional[Capture], runner: Any) -> bool:
    """Whether a tensor of the model lies elsewhere than in ``before``, or has come or gone.

    The quick question after each bucket of a long update.  Parameters, buffers and every
    plain attribute that held a tensor are looked at (some models bind new ``w_kc`` and
    ``w_vc`` with each bucket); an attribute that holds one for the first time waits for the
    next full capture, for it has no address yet that could be out of date.
    """
    if before is None or before.footprint is None:
        return True
    held = before.footprint.held
    return _places(runner.model, held) != before.footprint.places


def _footprint(model: Any) -> Optional[Footprint]:
    import torch

    held = []
    for module in _modules(model):
        keys: list[tuple[str, Any]] = []
        for name, value in module.__dict__.items():
            if isinstance(value, torch.Tensor):
                keys.append((name, None))
            elif isinstance(value, (list, tuple, dict)) and value and name not in _MODULE_INTERNALS:
                items: Iterable[tuple[Any, Any]]
                items = value.items() if isinstance(value, dict) else enumerate(value)
                keys.extend((name, key) for key, item in items if isinstance(item, torch.Tensor))
        held.append(tuple(keys))
    places = _places(model, held)
    return None if places is None else Footprint(held, places)


def _modules(model: Any) -> Iterator[Any]:
    """Every module once, in a fixed order."""
    seen = set()
    stack = [model]
    while stack:
        module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield module
        children = module.__dict__.get("_modules")
        if children:
            stack.extend([child for child in children.values() if child is not None])


def _places(model: Any, held: list[tuple[tuple[str, Any], ...]]) -> Optional[list[Any]]:
    """Names, addresses and shapes of all tensors; None where one can't be asked.

    A wrapper subclass answers 0 for its address whatever it wraps, so it can't be asked.
    """
    places: list[Any] = []
    add = places.append
    try:
        keys = iter(held)
        for module in _modules(model):
            state = module.__dict__
            for group in (state["_parameters"], state["_buffers"]):
                for name, tensor in group.items():
                    if tensor is not None:
                        address = tensor.data_ptr()
                        if not address and _is_wrapper(tensor):
                            return None
                        add(name)
                        add(address)
                        add(tensor.shape)
            for name, key in next(keys):
                value = state[name]
                tensor = value if key is None else value[key]
                if _is_wrapper(tensor):
                    return None
                add(tensor.data_ptr())
                add(tensor.stride())
        if next(keys, None) is not None:
            return None
    except Exception:  # fewer modules, a missing attribute, an uninitialised parameter
        return None
    return places
