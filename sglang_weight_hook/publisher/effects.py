"""What an event's effect (`events`) means for a runner: settled, updated, released, backed anew."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..layout.states import KV_CACHE, RELEASED, RESIDENT, TAGS, WEIGHTS
from .tracked import Tracked


def apply(
    tracked: Tracked, effect: str, details: Mapping[str, Any], success: bool, is_building: bool
) -> bool:
    """Note what the effect means for ``tracked``; whether its contents may have changed.

    A failed update may have written before it failed, so it counts as a change of contents.
    ``details``: of a release or resume, its ``tags`` and whether it is ``physical``.
    ``is_building``: whether a scheduler is being built in this process.
    """
    if effect in ("release", "resume"):
        return _apply_memory(tracked, effect, details, success)
    if effect in ("settle", "build"):
        tracked.settled = True
        return False
    if effect == "adapt":
        return False
    if effect == "open":
        return not success  # half-way, it has unpacked weights that nobody packs again
    if effect in ("load", "commit"):
        return effect == "commit" or tracked.content_generation > 0  # loaded again
    tracked.updated = True
    # Who updates a runner uses it: that counts as built also where no scheduler is (a program
    # that embeds a ModelRunner of its own).  What happens while one is being built does not.
    if not is_building:
        tracked.settled = True
    return True


def _apply_memory(tracked: Tracked, effect: str, details: Mapping[str, Any], success: bool) -> bool:
    """Note what the memory saver freed or backed anew; whether the weights' contents are other.

    Without a memory saver SGLang's release frees nothing, and nothing is claimed to be freed.
    """
    if not details.get("physical"):
        return False
    tags = [tag for tag in details.get("tags") or TAGS if tag in TAGS]
    if not success:
        # How far a release came before it failed is not known: once resumed, its pages count
        # as other ones.  Whether the weights have pages that hold them shows with the next write.
        tracked.doubtful.update(tags if effect == "release" else ())
        if WEIGHTS in tags and tracked.event is not None:
            tracked.event.write_failed = True
        return False
    fresh = set()
    for tag in tags:
        gone = tracked.residency[tag] == RELEASED or tag in tracked.doubtful
        if effect == "resume" and gone:
            fresh.add(tag)
        tracked.doubtful.discard(tag)
        tracked.residency[tag] = RELEASED if effect == "release" else RESIDENT
    # Other pages behind the same addresses: what was registered with them is stale.
    tracked.physical_epoch += WEIGHTS in fresh
    tracked.kv_physical_epoch += KV_CACHE in fresh
    return WEIGHTS in fresh
