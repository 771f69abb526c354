"""Walk a model runner and note where each of its tensors lies.

Only addresses and shapes are read: no CUDA call that synchronises, no allocation on a device,
no copy of weight data, and no tensor is kept alive once the walk is over.  What is inside
here raises freely; the recorder stands between it and SGLang.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterable, Iterator
from itertools import chain, islice, repeat
from operator import attrgetter, is_, is_not, itemgetter
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


# The plain attributes of a module that hold tensors: the attribute's name, and a key inside it
# where it is a list, tuple or dict.
Keys = tuple[tuple[str, Any], ...]
# Of all tensors, in one order: names, addresses, shapes, strides and dtypes.
Places = tuple[list[str], list[int], list[Any], list[Any], list[Any]]


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
    """What `moved` compares: cheap to take again, because it knows where tensors are held.

    Modules are held weakly and told by their position in ``modules``: nothing of the model lives
    on because of us.
    """

    modules: list[weakref.ref[Any]]  # that hold tensors or other modules; the model is the first
    owners: list[int]  # those among them with parameters
    buffered: list[int]  # those with buffers
    # Under which name a module is found in which other: three lists of one length.
    parents: list[int]
    names: list[str]
    children: list[int]
    attributes: list[tuple[int, Keys]]  # those with attributes that hold tensors
    places: Places


class Capture(NamedTuple):
    """Everything one walk found."""

    device_type: str  # of the runner: "cuda", "cpu", ...
    tensors: dict[str, Row]  # by canonical name, parameters first, in the model's order
    aliases: dict[str, list[str]]  # canonical name -> its other names
    left_out: dict[str, str]  # name -> why it has no row
    expected: dict[str, int]  # names the model holds, by kind
    # (storage_ptr, storage_size) -> the driver allocations (base, size) under it.  One as a rule;
    # several where the caching allocator maps expandable segments piece by piece.
    allocations: dict[tuple[int, int], list[tuple[int, int]]]
    allocation_kinds: dict[int, str]  # allocation base -> cuda_driver.CUDA_MALLOC or VMM
    kv_cache: list[dict[str, Any]]
    # Names under which torch lists a parameter -> the canonical name of its row.
    torch_names: dict[str, str]
    footprint: Optional[Footprint]


def capture(runner: Any, footprint: bool = True) -> Capture:
    """Walk ``runner.model``, its LoRA pool and its KV cache.

    ``footprint``: whether `moved` is going to be asked about it.
    """
    model = getattr(runner, "model", None)
    if model is None:
        raise LookupError("the runner has no model")
    device_type = _device_type(runner)
    walk = _walk_model(model)
    kinds = {**walk.tensors, LORA: list(_lora_pool(runner))}

    tensors: dict[str, Row] = {}
    aliases: dict[str, list[str]] = {}
    left_out: dict[str, str] = {}
    torch_names: dict[str, str] = {}
    by_identity: dict[int, str] = {}
    by_address: dict[int, str] = {}  # the first row at an address
    further: dict[int, list[str]] = {}  # and others that begin there
    wrappers = _Wrappers()
    for kind, named in kinds.items():
        for outer_name, outer in named:
            canonical = by_identity.get(id(outer))
            if canonical is not None:
                if canonical != outer_name:
                    aliases.setdefault(canonical, []).append(outer_name)
                continue
            try:
                rows = (
                    [
                        (name, _row(kind, tensor, device_type))
                        for name, tensor in _plain_tensors(outer_name, outer)
                    ]
                    if wrappers[type(outer)]
                    else [(outer_name, _row(kind, outer, device_type))]
                )
            except Exception as error:
                left_out[outer_name] = f"{type(error).__name__}: {error}"[:200]
                continue
            for name, row in rows:
                # A second tensor object over the very same elements (a re-bound draft head, a
                # parameter and a plain attribute holding its .data) is one tensor to a reader.
                canonical = by_address.get(row.ptr)
                if canonical is not None and not _same_elements(tensors[canonical], row):
                    canonical = next(
                        (
                            other
                            for other in further.get(row.ptr, ())
                            if _same_elements(tensors[other], row)
                        ),
                        None,
                    )
                if canonical is not None:
                    aliases.setdefault(canonical, []).append(name)
                elif name in tensors:
                    # "a.b" can be b of module a, or an attribute of that very name.
                    left_out[f"{name} ({kind})"] = "another tensor has this name"
                    continue
                else:
                    tensors[name] = row
                    if row.ptr and by_address.setdefault(row.ptr, name) is not name:
                        further.setdefault(row.ptr, []).append(name)
                by_identity.setdefault(id(outer), canonical or name)
                if kind == PARAMETER:
                    torch_names[name] = canonical or name
    allocations = _allocations(tensors.values())
    return Capture(
        device_type=device_type,
        tensors=tensors,
        aliases=aliases,
        left_out=left_out,
        expected={kind: len(named) for kind, named in kinds.items()},
        allocations=allocations,
        allocation_kinds=_allocation_kinds(allocations),
        kv_cache=_kv_cache(runner),
        torch_names=torch_names,
        footprint=_footprint(model, walk) if footprint else None,
    )


def _same_elements(one: Row, other: Row) -> bool:
    return (one.device, one.dtype, one.shape, one.stride) == (
        other.device,
        other.dtype,
        other.shape,
        other.stride,
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


class _Walk(NamedTuple):
    """Every tensor of every module under every name it has."""

    tensors: dict[str, list[tuple[str, Any]]]  # by kind
    # id of a module's __dict__ -> its attributes that hold tensors.
    attributes: dict[int, Keys]


def _walk_model(model: Any) -> _Walk:
    """Our own walk, since ``named_parameters`` drops tied names, and with
    ``remove_duplicate=False`` would never end on a module that contains itself.
    """
    import torch

    tensor_type = torch.Tensor
    found: dict[str, list[tuple[str, Any]]] = {PARAMETER: [], BUFFER: [], ATTRIBUTE: []}
    parameters, buffers, attributes = found[PARAMETER], found[BUFFER], found[ATTRIBUTE]
    keys_of: dict[int, Keys] = {}
    # A module's __dict__ begins with torch's own bookkeeping, unless its class sets something
    # before Module.__init__: thousands of times the same entries to step over.
    bookkeeping = list(vars(torch.nn.Module()))
    skipped = len(bookkeeping) if _MODULE_INTERNALS.issuperset(bookkeeping) else 0
    first, last, before_last = bookkeeping[0], bookkeeping[-1], len(bookkeeping) - 1
    # Types of a module's attributes -> names and types of those that are or may hold tensors.
    # Most modules have the attributes of some other one, and can be passed over by types alone.
    telling: dict[tuple[type, ...], list[tuple[str, type]]] = {}
    # Types, as they are met in containers, that are not tensors.
    dull: set[type] = set()
    # (prefix, module, ids of the modules above it); the children are pushed in reverse, so
    # that modules come off in the order in which named_modules() gives them.
    stack: list[tuple[str, Any, frozenset[int]]] = [("", model, frozenset())]
    while stack:
        prefix, module, above = stack.pop()
        if id(module) in above:
            continue
        state = module.__dict__
        group = state.get("_parameters")
        if group:
            for name, parameter in group.items():
                if parameter is not None:
                    parameters.append((prefix + name, parameter))
        group = state.get("_buffers")
        if group:
            for name, buffer in group.items():
                if buffer is not None:
                    buffers.append((prefix + name, buffer))
        usual = (
            next(iter(state), None) == first
            and next(islice(state, before_last, None), None) == last
        )
        start = skipped if usual else 0
        types = tuple(map(type, islice(state.values(), start, None)))
        holders = telling.get(types)
        if holders is None or (
            holders and not all(type(state.get(name)) is kind for name, kind in holders)
        ):
            # Also where these types go by other names than they did before.
            holders = telling[types] = [
                (name, kind)
                for name, kind in zip(islice(state, start, None), types)
                if issubclass(kind, (tensor_type, list, tuple, dict))
            ]
        keys: list[tuple[str, Any]] = []
        for name, kind in holders:
            value = state[name]
            if issubclass(kind, tensor_type):
                attributes.append((prefix + name, value))
                keys.append((name, None))
            elif value and name not in _MODULE_INTERNALS:
                inside = value.values() if isinstance(value, dict) else value
                if dull.issuperset(map(type, inside)):
                    continue
                for item in inside:
                    if not isinstance(item, tensor_type):
                        dull.add(type(item))
                for key in _keys_inside(value, tensor_type):
                    attributes.append((f"{prefix}{name}.{key}", value[key]))
                    keys.append((name, key))
        if keys:
            keys_of[id(state)] = tuple(keys)
        children = state.get("_modules")
        if children:
            below = above | {id(module)}
            for name, child in reversed(list(children.items())):
                if child is not None:
                    stack.append((prefix + name + ".", child, below))
    return _Walk(found, keys_of)


def _keys_inside(value: Any, tensor_type: type) -> list[Any]:
    """Where tensors are held one level deep in a list, tuple or dict."""
    items: Iterable[tuple[Any, Any]]
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return [key for key, item in items if isinstance(item, tensor_type)]


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


class _Wrappers(dict[type, bool]):
    """Whether tensors of a type wrap others: `_is_wrapper`, asked once for each type."""

    def __missing__(self, kind: type) -> bool:
        answer = self[kind] = hasattr(kind, "__tensor_flatten__")
        return answer


# --- one tensor ---------------------------------------------------------------------------


class _Texts(dict[Any, str]):
    """``str`` of devices, dtypes and layouts: few objects, and torch builds each text anew."""

    def __missing__(self, value: Any) -> str:
        text = self[value] = str(value)
        return text


_text = _Texts()


def _row(kind: str, tensor: Any, device_type: str) -> Row:
    if _text[tensor.layout] != "torch.strided":
        raise TypeError(f"layout {tensor.layout} has no strides")
    device, dtype = _text[tensor.device], _text[tensor.dtype]
    shape, stride, size = list(tensor.shape), list(tensor.stride()), tensor.nbytes
    if device == "meta":
        return Row(kind, 0, size, size, device, dtype, shape, stride, 0, 0, 0, False)
    contiguous = tensor.is_contiguous()
    storage = tensor.untyped_storage()
    resident = device == device_type or device.partition(":")[0] == device_type
    # In the order of Row's fields: naming each would cost more than reading it.
    return Row._make(
        (
            kind,
            # The address of an offloaded weight is one of the host's, and nobody must take it
            # for one of the device's.
            tensor.data_ptr() if resident else 0,
            size,
            size if contiguous else touched_bytes(shape, stride, tensor.element_size()),
            device,
            dtype,
            shape,
            stride,
            tensor.storage_offset(),
            storage.data_ptr() if resident else 0,
            storage.nbytes(),
            resident,
        )
    )


def _allocations(rows: Iterable[Row]) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """The driver allocations under each storage; empty where there is no CUDA."""
    if not cuda_driver.is_initialised():
        return {}
    allocations: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for row in rows:
        storage = (row.storage_ptr, row.storage_size)
        if row.storage_ptr and storage not in allocations and row.device.startswith("cuda"):
            found = cuda_driver.allocations_under(*storage)
            if found:
                allocations[storage] = found
    return allocations


def _allocation_kinds(allocations: dict[tuple[int, int], list[tuple[int, int]]]) -> dict[int, str]:
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
    storages = {(row.storage_ptr, row.storage_size) for row in after.tensors.values()}
    kept = {key: before.allocations[key] for key in storages & before.allocations.keys()}
    return after._replace(
        allocations={**kept, **after.allocations},
        allocation_kinds={**before.allocation_kinds, **after.allocation_kinds},
    )


def live_tensors(runner: Any, captured: Capture) -> list[tuple[str, Any]]:
    """The captured resident tensors themselves, for as long as the caller looks at them."""
    walk = _walk_model(runner.model)
    named = [pair for kind in walk.tensors.values() for pair in kind] + list(_lora_pool(runner))
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
    ``w_vc`` with each bucket).  An attribute that holds one for the first time, and a module
    without any that is replaced by one with some, wait for the next full capture: those have no
    address yet that could be out of date.
    """
    footprint = before.footprint if before is not None else None
    return footprint is None or _places(footprint, runner.model) != footprint.places


def nothing_new(before: Optional[Capture], runner: Any) -> bool:
    """Whether the model holds no more tensors than in ``before``; of one that has not `moved`.

    Slower than `moved`, faster than a capture: all modules are walked, no tensor is asked.
    """
    found = _walk_model(runner.model).tensors
    return before is not None and all(
        before.expected.get(kind) == len(named) for kind, named in found.items()
    )


_dtype_of = attrgetter("dtype")
_state_of = attrgetter("__dict__")
_parameters_of = itemgetter("_parameters")
_buffers_of = itemgetter("_buffers")
_modules_of = itemgetter("_modules")


def _footprint(model: Any, walk: _Walk) -> Optional[Footprint]:
    keys_of = walk.attributes
    footprint = Footprint([], [], [], [], [], [], [], ([], [], [], [], []))
    modules = [model]
    known = {id(model): 0}
    try:
        for position, module in enumerate(modules):  # which grows meanwhile
            state = module.__dict__
            if state["_parameters"]:
                footprint.owners.append(position)
            if state["_buffers"]:
                footprint.buffered.append(position)
            if id(state) in keys_of:
                footprint.attributes.append((position, keys_of[id(state)]))
            for name, child in state["_modules"].items():
                inner = None if child is None else child.__dict__
                if inner is None or not (
                    inner["_parameters"]
                    or inner["_modules"]
                    or inner["_buffers"]
                    or id(inner) in keys_of
                ):
                    continue
                below = known.setdefault(id(child), len(modules))
                if below == len(modules):
                    modules.append(child)
                footprint.parents.append(position)
                footprint.names.append(name)
                footprint.children.append(below)
        footprint.modules.extend(map(weakref.ref, modules))
    except Exception:  # what is no module of torch's making
        return None
    places = _places(footprint, model)
    return None if places is None else footprint._replace(places=places)


def _places(footprint: Footprint, model: Any) -> Optional[Places]:
    """What tensors there are and where, of which shape and type; None where one can't be asked.

    This is what each bucket of an update waits for: all modules and all tensors are asked for
    one thing after the other, without a loop over them in Python.
    """
    import torch

    modules = [reference() for reference in footprint.modules]
    if modules[0] is not model or not all(map(is_not, modules, repeat(None))):
        return None
    try:
        states = list(map(_state_of, modules))
        within = list(map(_modules_of, states))
        held = map(dict.get, map(within.__getitem__, footprint.parents), footprint.names)
        if not all(map(is_, held, map(modules.__getitem__, footprint.children))):
            return None  # a module was replaced, or has another name
        parameters = list(map(_parameters_of, states))
        buffers = list(map(_buffers_of, states))
        owners, buffered = footprint.owners, footprint.buffered
        # Whoever had none has none now.
        if sum(map(bool, parameters)) != len(owners) or sum(map(bool, buffers)) != len(buffered):
            return None
        groups = [*map(parameters.__getitem__, owners), *map(buffers.__getitem__, buffered)]
        entries = list(chain.from_iterable(map(dict.values, groups)))
        tensors = [t for t in entries if t is not None]
        names = list(chain.from_iterable(groups))
        if len(tensors) != len(entries):
            names = [name for name, t in zip(names, entries) if t is not None]
        for position, keys in footprint.attributes:
            state = states[position]
            for name, key in keys:
                tensors.append(state[name] if key is None else state[name][key])
        shapes: list[Any] = list(map(torch.Tensor.size, tensors))
        strides: list[Any] = list(map(torch.Tensor.stride, tensors))
        dtypes = list(map(_dtype_of, tensors))
        addresses = list(map(torch.Tensor.data_ptr, tensors))
    except Exception:  # a missing attribute, an uninitialised parameter
        return None
    # A wrapper subclass answers 0 for its address whatever it wraps, so it can't be asked.
    if 0 in addresses and any(_is_wrapper(t) for t, a in zip(tensors, addresses) if not a):
        return None
    return names, addresses, shapes, strides, dtypes
