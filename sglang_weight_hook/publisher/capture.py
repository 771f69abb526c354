"""Walk a model runner and note where each of its tensors lies.

Only addresses and shapes are read: no CUDA call that synchronises, no allocation on a device,
no copy of weight data, and no tensor is kept alive once the walk is over.  What is inside
here raises freely; the recorder stands between it and SGLang.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple, Optional

from ..layout.documents import ATTRIBUTE, LORA, PARAMETER
from . import devices, identity
from .diffusion import at_home
from .footprint import Footprint, footprint_of, places_of
from .kv_cache import kv_cache
from .rows import Row, allocations_of, row_of
from .volatile import lora_attributes, volatile_names
from .walk import Wrappers, lora_pool, no_pause, plain_tensors, walk_model

_RESTLESS = "forwards bind it anew again and again, so no address of it stays true"


class Capture(NamedTuple):
    """Everything one walk found."""

    device_type: str  # of the runner: "cuda", "cpu", ...
    tensors: dict[str, Row]  # by canonical name, parameters first, in the model's order
    aliases: dict[str, list[str]]  # canonical name -> its other names
    left_out: dict[str, str]  # name -> why it has no row
    expected: dict[str, int]  # names the model holds, by kind
    allocations: dict[tuple[int, int], list[tuple[int, int]]]  # as in `rows.Allocations`
    allocation_kinds: dict[int, str]
    exports: dict[int, devices.Export]
    export_otherwise: devices.Export  # of memory whose allocation is not known
    kv_cache: list[dict[str, Any]]
    # Names under which torch lists a parameter -> the canonical name of its row.
    torch_names: dict[str, str]
    # Canonical names of tensors whose bytes SGLang rewrites or swaps in a forward.
    volatile: frozenset[str]
    # Storages on other devices, where weights are offloaded to: address there -> bytes.
    off_device: dict[int, int]
    device_index: Optional[int]  # the device's ordinal; None: on the host
    without: frozenset[str]  # names of plain attributes that are left out
    footprint: Optional[Footprint]


def capture(runner: Any, footprint: bool = True, without: Collection[str] = ()) -> Capture:
    """Walk ``runner.model``, its LoRA pool and its KV cache.

    ``footprint``: whether `moved` is going to be asked about it.  ``without``: plain attributes to
    leave out, because forwards bind them anew again and again.
    """
    model = getattr(runner, "model", None)
    if model is None:
        raise LookupError("the runner has no model")
    device_type = identity.device_type(runner)
    walk = at_home(runner, walk_model(model, without=without))
    # The pool before the attributes: LoRA layers hold the pool's tensors as attributes of theirs.
    attributes = walk.tensors.pop(ATTRIBUTE)
    kinds = {**walk.tensors, LORA: list(lora_pool(runner)), ATTRIBUTE: attributes}
    table = _Table(device_type, {**walk.left_out, **dict.fromkeys(without, _RESTLESS)})
    for kind, named in kinds.items():
        for name, tensor in named:
            table.add(kind, name, tensor)
    tensors = table.tensors
    lora_attributes(tensors)
    allocations = allocations_of(tensors.values())
    return Capture(
        device_type=device_type,
        tensors=tensors,
        aliases=table.aliases,
        left_out=table.left_out,
        expected={kind: len(named) for kind, named in kinds.items()},
        allocations=allocations.under,
        allocation_kinds=allocations.kinds,
        exports=allocations.exports,
        export_otherwise=devices.of(device_type).export_otherwise,
        kv_cache=kv_cache(runner),
        torch_names=table.torch_names,
        volatile=volatile_names(tensors, walk),
        off_device=table.off_device,
        without=frozenset(without),
        device_index=None if device_type == "cpu" else identity.gpu_id(runner),
        footprint=footprint_of(model, walk, device_type) if footprint else None,
    )


class _Table:
    """Rows by canonical name: the first of the names that the model has for a tensor."""

    def __init__(self, device_type: str, left_out: dict[str, str]) -> None:
        self.tensors: dict[str, Row] = {}
        self.aliases: dict[str, list[str]] = {}
        self.left_out = left_out
        self.torch_names: dict[str, str] = {}
        self.off_device: dict[int, int] = {}
        self._device_type = device_type
        self._by_identity: dict[int, str] = {}
        self._by_address: dict[int, str] = {}  # the first row at an address
        self._further: dict[int, list[str]] = {}  # and others that begin there
        self._wrappers = Wrappers()

    def add(self, kind: str, outer_name: str, outer: Any) -> None:
        """A tensor, or a wrapper and the tensors in it, under one of its names."""
        canonical = self._by_identity.get(id(outer))
        if canonical is not None:
            if canonical != outer_name:
                self.aliases.setdefault(canonical, []).append(outer_name)
            return
        is_wrapper = self._wrappers[type(outer)]
        try:
            plain = plain_tensors(outer_name, outer) if is_wrapper else [(outer_name, outer)]
            rows = [
                (name, row_of(kind, tensor, self._device_type), tensor) for name, tensor in plain
            ]
        except Exception as error:
            self.left_out[outer_name] = f"{type(error).__name__}: {error}"[:200]
            return
        for name, row, tensor in rows:
            found = self._enter(kind, name, row)
            if found is None:
                continue
            self._by_identity.setdefault(id(outer), found)
            if kind == PARAMETER:
                self.torch_names[name] = found
            if not row.resident and row.device != "meta":
                # Its address is none of the device's, so it is not published; its bytes count.
                self.off_device[tensor.untyped_storage().data_ptr()] = row.storage_size

    def _enter(self, kind: str, name: str, row: Row) -> Optional[str]:
        """The canonical name under which the row is now; None where the name is another's."""
        # A second tensor object over the very same elements (a re-bound draft head, a parameter
        # and a plain attribute holding its .data) is one tensor to a reader.
        canonical = self._by_address.get(row.ptr)
        if canonical is not None and not _same_elements(self.tensors[canonical], row):
            canonical = next(
                (
                    other
                    for other in self._further.get(row.ptr, ())
                    if _same_elements(self.tensors[other], row)
                ),
                None,
            )
        if canonical is not None:
            self.aliases.setdefault(canonical, []).append(name)
            return canonical
        if name in self.tensors:
            # "a.b" can be b of module a, or an attribute of that very name.
            self.left_out[f"{name} ({kind})"] = "another tensor has this name"
            return None
        self.tensors[name] = row
        if row.ptr and self._by_address.setdefault(row.ptr, name) is not name:
            self._further.setdefault(row.ptr, []).append(name)
        return name


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
        exports={**before.exports, **after.exports},
    )


def live_tensors(runner: Any, captured: Capture) -> list[tuple[str, Any]]:
    """The captured resident tensors themselves, for as long as the caller looks at them."""
    walk = at_home(runner, walk_model(runner.model, without=captured.without))
    named = [pair for kind in walk.tensors.values() for pair in kind] + list(lora_pool(runner))
    found: dict[str, Any] = {}
    for outer_name, outer in named:
        for name, tensor in plain_tensors(outer_name, outer):
            row = captured.tensors.get(name)
            if row is not None and row.resident and name not in found:
                found[name] = tensor
    return list(found.items())


def moved(before: Optional[Capture], runner: Any, pause: Callable[[], None] = no_pause) -> bool:
    """Whether a tensor of the model lies elsewhere than in ``before``, or has come or gone.

    The quick question after each bucket of a long update.  Parameters, buffers and every
    plain attribute that held a tensor are looked at (some models bind new ``w_kc`` and
    ``w_vc`` with each bucket).  An attribute that holds one for the first time, and a module
    without any that is replaced by one with some, wait for the next full capture: those have no
    address yet that could be out of date.
    """
    footprint = before.footprint if before is not None else None
    return footprint is None or places_of(footprint, runner.model, pause) != footprint.places


def nothing_new(
    before: Optional[Capture], runner: Any, pause: Callable[[], None] = no_pause
) -> bool:
    """Whether the model holds no more tensors than in ``before``; of one that has not `moved`.

    Slower than `moved`, faster than a capture: all modules are walked, no tensor is asked.
    ``pause``: called now and then, so that other threads need not wait for the interpreter.
    """
    if before is None:
        return False
    walk = walk_model(runner.model, pause, before.without)
    counts = {kind: len(named) for kind, named in walk.tensors.items()}
    counts[LORA] = sum(1 for _ in lora_pool(runner))
    return all(before.expected.get(kind) == count for kind, count in counts.items())
