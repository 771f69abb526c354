"""What changed between two layout documents, and whether a registration is still good."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Optional

from .errors import HookError
from .ownership import same_instance
from .spans import SpanIndex

_PLACE = ("ptr", "device", "storage_ptr", "resident")
_EXTENT = ("size", "span", "shape", "stride", "dtype", "storage_size", "storage_offset")


class Diff(NamedTuple):
    """Names are canonical ones; each appears in one of the four lists."""

    moved: list[str]  # another address, device or storage
    resized: list[str]  # the same address, but another size, shape, stride or dtype
    added: list[str]
    removed: list[str]
    content_changed: bool  # values were (or may have been) rewritten
    repaged: bool  # other physical pages behind the same addresses
    regions_changed: bool
    other_process: bool  # the addresses belong to another process's address space
    other_instance: bool = False  # the slot's runner is another one, perhaps of the same process

    @property
    def must_register_again(self) -> bool:
        """Whether anything registered from the old document (RDMA, IPC) is stale."""
        return self.other_process or self.other_instance or self.repaged or self.regions_changed

    @property
    def content_only(self) -> bool:
        return self.content_changed and not (
            self.must_register_again or self.moved or self.resized or self.added or self.removed
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            **self._asdict(),
            "content_only": self.content_only,
            "must_register_again": self.must_register_again,
        }


def diff(old: Mapping[str, Any], new: Mapping[str, Any]) -> Diff:
    """Compare two layout documents (the ``raw`` of two `Document`), of one slot as a rule."""
    before, after = old["tensors"], new["tensors"]
    moved, resized = [], []
    for name, tensor in after.items():
        if name in before:
            if _differ(before[name], tensor, _PLACE):
                moved.append(name)
            elif _differ(before[name], tensor, _EXTENT):
                resized.append(name)
    other_process = _process(old) != _process(new)
    other_instance = not same_instance(old, new)
    epoch = "physical_epoch"
    return Diff(
        moved=moved,
        resized=resized,
        added=[name for name in after if name not in before],
        removed=[name for name in before if name not in after],
        content_changed=other_process
        or other_instance
        or old["content_generation"] != new["content_generation"],
        repaged=old.get(epoch, 0) != new.get(epoch, 0),
        regions_changed=_regions(old) != _regions(new),
        other_process=other_process,
        other_instance=other_instance,
    )


def _differ(one: Mapping[str, Any], other: Mapping[str, Any], fields: tuple[str, ...]) -> bool:
    return any(one.get(field) != other.get(field) for field in fields)


def _process(document: Mapping[str, Any]) -> tuple[Any, ...]:
    # Two hosts may have equal pids and start times, machines of one snapshot equal boot ids.
    fields = ("hostname", "boot_id", "pid_namespace", "pid", "process_start_ticks")
    return tuple(document["identity"].get(field) for field in fields)


def _regions(document: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    fields = ("ptr", "size", "device", "allocation_ptr", "allocation_size")
    return [tuple(region.get(field) for field in fields) for region in document["regions"]]


def outside_regions(document: Mapping[str, Any]) -> Optional[str]:
    """A resident tensor with memory that lies in no region, if there is one."""
    index = SpanIndex(
        (region["ptr"], region["ptr"] + region["size"], None) for region in document["regions"]
    )
    for name, tensor in document["tensors"].items():
        held = tensor.get("resident", True) and tensor["ptr"] and tensor["size"]
        if held and not index.at(tensor["ptr"]):
            return str(name)
    return None


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> Diff:
    """What changed between two layout documents.

    Raises HookError where one is none, or where one contradicts itself: a tensor outside of every
    region.
    """
    try:
        for document in (old, new):
            name = outside_regions(document)
            if name is not None:
                raise HookError(
                    f"the two cannot be compared: a layout has tensor {name} outside of every "
                    f"region, so it contradicts itself; `sglang-weight-hook verify` says more"
                )
        return diff(old, new)
    except (AttributeError, KeyError, TypeError) as error:
        raise HookError(
            f"the two cannot be compared ({type(error).__name__}: {error}): one of them is no "
            f"layout document; give two copies of a weight_layout_{{slot}}.json"
        ) from error
