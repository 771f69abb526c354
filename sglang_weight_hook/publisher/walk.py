"""Finding a runner's tensors: in its modules, its LoRA pool and its KV cache.

No tensor is asked for anything here but its type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

from ..layout.documents import ATTRIBUTE, BUFFER, PARAMETER

# Modules walked between two pauses: some 2 µs each.
_BETWEEN_PAUSES = 250

# SGLang's package of --enable-paged-experts (since 0.5.23).
_PAGED_EXPERTS = "sglang.srt.layers.moe.paged_experts"

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


class Walk(NamedTuple):
    """Every tensor of every module under every name it has."""

    tensors: dict[str, list[tuple[str, Any]]]  # by kind
    # id of a module's __dict__ -> its attributes that hold tensors.
    attributes: dict[int, Keys]
    paged: set[str]  # names of parameters that are caches of experts kept on the host


def no_pause() -> None:
    pass


def walk_model(model: Any, pause: Callable[[], None] = no_pause) -> Walk:
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
    paged: set[str] = set()
    visited = 0
    while stack:
        prefix, module, above = stack.pop()
        if id(module) in above:
            continue
        visited += 1
        if not visited % _BETWEEN_PAUSES:
            pause()
        if type(module).__module__.startswith(_PAGED_EXPERTS):
            paged.update(_paged_names(prefix, module))
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
    return Walk(found, keys_of, paged)


def _paged_names(prefix: str, method: Any) -> list[str]:
    """The caches that a paged experts' method refills: parameters of the module that holds it."""
    owner = prefix.rstrip(".").rpartition(".")[0]
    host = getattr(getattr(method, "store", None), "host", None)
    names = list(host) if isinstance(host, dict) else []
    return [f"{owner}.{name}" if owner else name for name in names]


def _keys_inside(value: Any, tensor_type: type) -> list[Any]:
    """Where tensors are held one level deep in a list, tuple or dict."""
    items: Iterable[tuple[Any, Any]]
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return [key for key, item in items if isinstance(item, tensor_type)]


def lora_pool(runner: Any) -> Iterator[tuple[str, Any]]:
    """Tensors of the LoRA pool (SGLang, lora/mem_pool.py, LoRAMemoryPool)."""
    pool = getattr(getattr(runner, "lora_manager", None), "memory_pool", None)
    if pool is not None:
        yield from tensors_of_object("lora_pool", pool, depth=3)


def tensors_of_object(prefix: str, owner: Any, depth: int) -> Iterator[tuple[str, Any]]:
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


def plain_tensors(name: str, tensor: Any) -> list[tuple[str, Any]]:
    """The tensors with memory of their own behind ``tensor``: itself, or what it wraps.

    DTensor (``--enable-torch-tp``) and torchao's quantised tensors are wrapper subclasses:
    they have no storage, and ``__tensor_flatten__`` names the tensors that have
    (torch/utils/_python_dispatch.py).  A single one goes by the wrapper's own name.
    """
    if not is_wrapper(tensor):
        return [(name, tensor)]
    inner = [
        (attribute, getattr(tensor, attribute)) for attribute in tensor.__tensor_flatten__()[0]
    ]
    if len(inner) == 1:
        return plain_tensors(name, inner[0][1])
    return [
        found for attribute, held in inner for found in plain_tensors(f"{name}.{attribute}", held)
    ]


def is_wrapper(tensor: Any) -> bool:
    return hasattr(type(tensor), "__tensor_flatten__")


class Wrappers(dict[type, bool]):
    """Whether tensors of a type wrap others: `is_wrapper`, asked once for each type."""

    def __missing__(self, kind: type) -> bool:
        answer = self[kind] = hasattr(kind, "__tensor_flatten__")
        return answer
