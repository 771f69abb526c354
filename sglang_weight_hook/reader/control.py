"""Asking a slot's owner over its control socket whether the published map is still true."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from .conversation import Conversation, garbled
from .errors import Busy, ControlError, OwnerGone
from .fields import is_size

if TYPE_CHECKING:
    from .slot import Slot


class Check(NamedTuple):
    """What the owner found when it compared its map with memory."""

    equal: bool  # whether every tensor was where the published map said
    published: bool  # whether it was not, and the map that is true now has been published since
    checked_at: float  # when the owner answered, in seconds since 1970-01-01 UTC
    state: str  # of the slot, after the check: ``ready``, ...
    instance: str  # of the runner: another one means that everything known is stale
    layout_generation: int  # of the map that the answer is about
    content_generation: int
    tensors: tuple[str, ...]  # the first few that were elsewhere, came or went


def check(slot: Slot, state: Mapping[str, Any], timeout: float) -> Check:
    """Have the owner compare now, and wait ``timeout`` seconds at most.  Raises ControlError.

    ``state``: the slot's state document, which names the socket.
    """
    with Conversation(slot, state, timeout) as owner:
        answer = owner.ask({"op": "check", "slot": slot.name})
    if answer.get("ok") is not True:
        raise refusal(slot, answer)
    names = answer.get("tensors")
    checked_at = answer.get("checked_at")
    if not (
        isinstance(answer.get("equal"), bool)
        and isinstance(answer.get("published"), bool)
        and isinstance(checked_at, (int, float))
        and not isinstance(checked_at, bool)
        and math.isfinite(checked_at)
        and isinstance(answer.get("state"), str)
        and isinstance(answer.get("instance"), str)
        and is_size(answer.get("layout_generation"))
        and is_size(answer.get("content_generation"))
        and isinstance(names, list)
        and all(isinstance(name, str) for name in names)
    ):
        raise garbled(slot, "it lacks a field, or one has another type")
    values = {field: answer[field] for field in Check._fields if field != "tensors"}
    return Check(**values, tensors=tuple(names))


def refusal(slot: Slot, answer: Mapping[str, Any]) -> ControlError:
    word, said = answer.get("error"), str(answer.get("message"))[:200]
    if word == "busy":
        return Busy(f"slot {slot.name} cannot be checked now ({said}); ask again when it is over")
    if word == "no_slot":
        return OwnerGone(
            f"the process behind the control socket does not publish slot {slot.name} any more; "
            f"read the state file again"
        )
    if word == "unknown":
        return ControlError(
            f"the owner of slot {slot.name} cannot check ({said}); install the hook's newer "
            f"release in the server's environment"
        )
    return ControlError(f"the owner of slot {slot.name} could not check: {said}; see its log")
