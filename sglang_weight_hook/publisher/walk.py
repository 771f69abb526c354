"""Finding a runner's tensors: in its modules, its LoRA pool and its KV cache.

No tensor is asked for anything here but its type.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

from ..layout.documents import ATTRIBUTE, BUFFER, PARAMETER
from .reach import Holds, Kinds, Path, Reach, Step

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


class Walk(NamedTuple):
    """Every tensor of every module under every name it has."""

    tensors: dict[str, list[tuple[str, Any]]]  # by kind
    # id of a module's __dict__ -> its attributes that hold tensors.
    attributes: dict[int, tuple[Path, ...]]
    paged: set[str]  # names of parameters that are caches of experts kept on the host
    left_out: dict[str, str]  # name -> why it was not looked into


def no_pause() -> None:
    pass


def walk_model(
    model: Any, pause: Callable[[], None] = no_pause, without: Collection[str] = ()
) -> Walk:
    """Our own walk, since ``named_parameters`` drops tied names, and with
    ``remove_duplicate=False`` would never end on a module that contains itself.

    ``pause``: called now and then.  ``without``: names of plain attributes to leave out.
    """
    return _Walker(pause, without).walk(model)


class _PagedTypes(dict[type, bool]):
    """Whether modules of a type page experts in from the host, found out once a type."""

    def __missing__(self, kind: type) -> bool:
        answer = self[kind] = kind.__module__.startswith(_PAGED_EXPERTS)
        return answer


class _Walker:
    def __init__(self, pause: Callable[[], None], without: Collection[str]) -> None:
        import torch

        self._pause = pause
        self._without = without
        self._found: dict[str, list[tuple[str, Any]]] = {PARAMETER: [], BUFFER: [], ATTRIBUTE: []}
        self._parameters, self._buffers = self._found[PARAMETER], self._found[BUFFER]
        self._paths: dict[int, list[Path]] = {}
        self._paged: set[str] = set()
        self._kinds = Kinds()
        self._is_paged = _PagedTypes()
        # What modules hold that may hold tensors: name, attribute, it itself, the module's state.
        self._deeper: list[tuple[str, str, Any, dict[str, Any]]] = []
        # A module's __dict__ begins with torch's own bookkeeping, unless its class sets something
        # before Module.__init__: thousands of times the same entries to step over.
        bookkeeping = list(vars(torch.nn.Module()))
        self._skipped = len(bookkeeping) if _MODULE_INTERNALS.issuperset(bookkeeping) else 0
        self._first, self._last = bookkeeping[0], bookkeeping[-1]
        self._before_last = len(bookkeeping) - 1
        # Types of a module's attributes -> names and types of those that are or may hold tensors.
        # Most modules have the attributes of some other one, and can be passed over by types.
        self._telling: dict[tuple[type, ...], list[tuple[str, type]]] = {}

    def walk(self, model: Any) -> Walk:
        # (prefix, module, ids of the modules above it); the children are pushed in reverse, so
        # that modules come off in the order in which named_modules() gives them.
        stack: list[tuple[str, Any, frozenset[int]]] = [("", model, frozenset())]
        known: set[int] = set()
        visited = 0
        while stack:
            prefix, module, above = stack.pop()
            if id(module) in above:
                continue
            visited += 1
            if not visited % _BETWEEN_PAUSES:
                self._pause()
            known.add(id(module))
            self._module(prefix, module)
            children = module.__dict__.get("_modules")
            if children:
                below = above | {id(module)}
                for name, child in reversed(list(children.items())):
                    if child is not None:
                        stack.append((prefix + name + ".", child, below))
        left_out = self._look_deeper(known)
        paths = {state: tuple(found) for state, found in self._paths.items()}
        return Walk(self._found, paths, self._paged, left_out)

    def _module(self, prefix: str, module: Any) -> None:
        if self._is_paged[type(module)]:
            self._paged.update(_paged_names(prefix, module))
        state = module.__dict__
        held = state.get("_parameters")
        if held:
            self._registered(prefix, self._parameters, "_parameters", held, state)
        held = state.get("_buffers")
        if held:
            self._registered(prefix, self._buffers, "_buffers", held, state)
        for name, kind_ in self._holders(state):
            value = state[name]
            holds = self._kinds[kind_]
            if holds is Holds.TENSOR:
                if prefix + name not in self._without:
                    self._found[ATTRIBUTE].append((prefix + name, value))
                    self._paths.setdefault(id(state), []).append((name, ()))
            elif value and name not in _MODULE_INTERNALS:
                inside = value.values() if isinstance(value, dict) else value
                if holds is not Holds.CONTAINER or self._kinds.any_inside(inside):
                    self._deeper.append((prefix + name, name, value, state))

    def _registered(
        self,
        prefix: str,
        found: list[tuple[str, Any]],
        group: str,
        held: dict[str, Any],
        state: dict[str, Any],
    ) -> None:
        for name, tensor in held.items():
            if tensor is None:
                continue
            found.append((prefix + name, tensor))
            extra = tensor.__dict__
            # What a wrapper wraps is its own: `plain_tensors`.
            if extra and self._kinds.any_inside(extra.values()) and not is_wrapper(tensor):
                # As if the module held it: group[name], then its attributes.
                self._deeper.append((prefix + name, group, tensor, state))

    def _holders(self, state: dict[str, Any]) -> list[tuple[str, type]]:
        """Names and types of the attributes that are or may hold tensors."""
        usual = (
            next(iter(state), None) == self._first
            and next(islice(state, self._before_last, None), None) == self._last
        )
        start = self._skipped if usual else 0
        types = tuple(map(type, islice(state.values(), start, None)))
        holders = self._telling.get(types)
        if holders is None or (
            holders and not all(type(state.get(name)) is kind for name, kind in holders)
        ):
            # Also where these types go by other names than they did before.
            holders = self._telling[types] = [
                (name, kind)
                for name, kind in zip(islice(state, start, None), types)
                if self._kinds[kind] not in (Holds.NOTHING, Holds.MODULE)
            ]
        return holders

    def _look_deeper(self, known: set[int]) -> dict[str, str]:
        """``known``: the ids of the model's modules, which are not looked at again."""
        reach = Reach(self._kinds, known)
        for name, attribute, value, state in self._deeper:
            is_tensor = attribute in ("_parameters", "_buffers")
            lead: tuple[Step, ...] = ((True, name.rpartition(".")[2]),) if is_tensor else ()
            for found in reach.into(name, attribute, value):
                if found.name not in self._without:
                    self._found[ATTRIBUTE].append((found.name, found.tensor))
                    path = (attribute, lead + found.path[1])
                    self._paths.setdefault(id(state), []).append(path)
        return reach.left_out


def _paged_names(prefix: str, method: Any) -> list[str]:
    """The caches that a paged experts' method refills: parameters of the module that holds it."""
    owner = prefix.rstrip(".").rpartition(".")[0]
    host = getattr(getattr(method, "store", None), "host", None)
    names = list(host) if isinstance(host, dict) else []
    return [f"{owner}.{name}" if owner else name for name in names]


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
