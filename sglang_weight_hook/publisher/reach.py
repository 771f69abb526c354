"""Tensors that a module holds deeper than in its attributes.

In lists, tuples and dictionaries within each other, in SGLang's own objects that are no modules
(quantisation methods, kernels, stores of experts), in modules that are registered nowhere, and as
attributes of a parameter (the split halves of a weight, kernels/ops/gemm/bf16_fp32.py).  Bounded in
depth and number; what is beyond the bounds is named, not passed over in silence.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import Any, NamedTuple

# Steps from one object to the next.
DEPTH = 6
# Objects and containers looked at in one walk of a model.
OBJECTS = 100_000

# Packages of SGLang's whose plain objects hold weights.  Others hold what belongs to a request, to
# the KV cache or to communication: batches, attention metadata, buffers of collectives.
_OWN = (
    "sglang.srt.layers.quantization",
    "sglang.srt.layers.moe",
    "sglang.srt.layers.linear",
    "sglang.srt.layers.parameter",
    "sglang.srt.models",
    "sglang.kernels",
)
_NOT_OWN = (
    "sglang.srt.layers.moe.token_dispatcher",
    "sglang.srt.layers.moe.topk",
    "sglang.srt.layers.moe.ep_moe.kernels",
)

# One step: whether it is an item of a container (else an attribute), and which.
Step = tuple[bool, Any]
# A module's attribute, and the steps from there to a tensor.
Path = tuple[str, tuple[Step, ...]]


class Holds(enum.Enum):
    """What an object of a type can be to us."""

    NOTHING = 0
    TENSOR = 1
    CONTAINER = 2
    OBJECT = 3
    MODULE = 4


class Kinds(dict[type, Holds]):
    """What objects of each type hold, found out once a type."""

    def __init__(self) -> None:
        super().__init__()
        self._dull: set[type] = set()  # the types that hold nothing

    def __missing__(self, kind: type) -> Holds:
        import torch

        name = getattr(kind, "__module__", None)
        if issubclass(kind, torch.Tensor):
            holds = Holds.TENSOR
        elif issubclass(kind, (list, tuple, dict)):
            holds = Holds.CONTAINER
        elif issubclass(kind, torch.nn.Module):
            holds = Holds.MODULE
        elif isinstance(name, str) and name.startswith(_OWN) and not name.startswith(_NOT_OWN):
            holds = Holds.OBJECT
        else:
            holds = Holds.NOTHING
            self._dull.add(kind)
        self[kind] = holds
        return holds

    def any_inside(self, values: Any) -> bool:
        """Whether any of ``values`` can be or hold a tensor."""
        if self._dull.issuperset(map(type, values)):  # nearly always, and without a loop in Python
            return False
        return any(self[kind] is not Holds.NOTHING for kind in set(map(type, values)))


class Found(NamedTuple):
    name: str
    path: Path
    tensor: Any


class Reach:
    """One walk's look into what modules hold.

    An object is looked at once, under the first name that it is found by; a container once for each
    attribute that leads to it, for a module may be found under several names.
    """

    def __init__(self, kinds: Kinds, known: set[int]) -> None:
        """``known``: ids of objects that are walked elsewhere: the modules of the model."""
        self._kinds = kinds
        self._seen = known
        self._left = OBJECTS
        self.left_out: dict[str, str] = {}

    def into(self, name: str, attribute: str, value: Any) -> Iterator[Found]:
        """The tensors in ``value``, which a module holds as ``attribute``; not itself."""
        pending: list[tuple[str, tuple[Step, ...], Any]] = [(name, (), value)]
        containers: set[int] = set()
        while pending:
            place, steps, holder = pending.pop(0)
            is_container = isinstance(holder, (dict, list, tuple))
            seen = containers if is_container else self._seen
            # A tensor with attributes of its own may be held under several names, too.
            if id(holder) in seen and holder is not value:
                continue
            seen.add(id(holder))
            if self._left <= 0:
                self.left_out.setdefault(place, f"one of more than {OBJECTS} objects")
                continue
            self._left -= 1
            for step, label, item in self._children(holder):
                kind = self._kinds[type(item)]
                if kind is Holds.NOTHING:
                    continue
                below = f"{place}.{label}" if label else place
                path = (*steps, step)
                if kind is Holds.TENSOR:
                    yield Found(below, (attribute, path), item)
                elif len(path) < DEPTH:
                    pending.append((below, path, item))
                elif self._can_hold(item):
                    self.left_out[below] = f"held more than {DEPTH} objects deep"

    def _can_hold(self, holder: Any) -> bool:
        return any(
            self._kinds[type(item)] is not Holds.NOTHING for _, _, item in self._children(holder)
        )

    def _children(self, holder: Any) -> Iterator[tuple[Step, str, Any]]:
        """What ``holder`` holds: the step there, how it is called, and itself."""
        if isinstance(holder, dict):
            if self._kinds.any_inside(holder.values()):
                for key, item in list(holder.items()):
                    yield (True, key), str(key), item
        elif isinstance(holder, (list, tuple)):
            if self._kinds.any_inside(holder):
                for index, item in enumerate(holder):
                    yield (True, index), str(index), item
        else:
            attributes = getattr(holder, "__dict__", None)
            if isinstance(attributes, dict) and self._kinds.any_inside(attributes.values()):
                for key, item in list(attributes.items()):
                    # torch's own bookkeeping of a module that is registered nowhere.
                    hidden = key in ("_parameters", "_buffers", "_modules")
                    yield (False, key), "" if hidden else key, item
            for key in _slots(type(holder)):
                item = getattr(holder, key, None)
                if item is not None:
                    yield (False, key), key, item


def follow(state: dict[str, Any], path: Path) -> Any:
    """The tensor at the end of ``path`` in a module's ``__dict__``.  Raises where it is gone."""
    attribute, steps = path
    value = state[attribute]
    for is_item, key in steps:
        value = value[key] if is_item else getattr(value, key)
    return value


def _slots(kind: type) -> list[str]:
    found: list[str] = []
    for base in kind.__mro__:
        names = base.__dict__.get("__slots__", ())
        found += [names] if isinstance(names, str) else list(names)
    return [name for name in found if not name.startswith("__")]
