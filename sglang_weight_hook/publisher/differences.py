"""How one layout document differs from the one that a subscriber was given before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional

from .subscribers import Diff, Region

_PLACE = ("ptr", "size", "span", "shape", "stride", "dtype", "device")


def regions_of(document: Mapping[str, Any]) -> tuple[Region, ...]:
    """The document's ``regions``, as a subscriber is told them."""
    return tuple(
        Region(region["ptr"], region["size"], region["device"])
        for region in document.get("regions", ())
    )


def between(before: Optional[Mapping[str, Any]], after: Mapping[str, Any]) -> Diff:
    """What changed from ``before`` (None: nothing was given yet) to ``after``."""
    other = before is None or before["instance"] != after["instance"]
    if before is None or other:
        return Diff(
            regions_of(after),
            regions_of(before) if before is not None else (),
            (),
            (),
            tuple(after["tensors"]),
            tuple(before["tensors"]) if before is not None else (),
            content_changed=True,
            repaged=True,
            other_instance=True,
        )
    content = before["content_generation"] != after["content_generation"]
    repaged = before["physical_epoch"] != after["physical_epoch"]
    if before["layout_generation"] == after["layout_generation"]:
        return Diff((), (), regions_of(after), (), (), (), content, repaged, False)
    old, new = regions_of(before), regions_of(after)
    was, now = frozenset(old), frozenset(new)
    rows, others = before["tensors"], after["tensors"]
    return Diff(
        tuple(region for region in new if region not in was),
        tuple(region for region in old if region not in now),
        tuple(region for region in new if region in was),
        tuple(
            name
            for name, row in others.items()
            if name in rows and any(row[key] != rows[name][key] for key in _PLACE)
        ),
        tuple(name for name in others if name not in rows),
        tuple(name for name in rows if name not in others),
        content,
        repaged,
        False,
    )
