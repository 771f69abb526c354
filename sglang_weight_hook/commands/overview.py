"""One line a slot: host, GPU, model, ranks, state, last event, and whether its owner lives.

What `slots` prints and `top` shows.  It reads headers and states, and of a layout only its start.
The standard library alone: typer and rich take longer to import than 64 slots to read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Optional

from ..layout.header import LEFT
from ..layout.states import READY
from ..reader import Directory, Header, HookError, Slot
from ..reader.ownership import process_of, same_instance
from .directories import slots_of_each

STALE, UNREADABLE = "stale", "unreadable"
MEMORY = ("weights", "kv_cache", "lora", "other", "free", "total")
_RANKS = ("tp", "pp", "dp", "ep")


class SlotOverview(NamedTuple):
    """What is known of one slot now.  A field is None where the files do not tell it."""

    directory: str
    slot: str
    host: Optional[str]
    gpu: Optional[int]
    device: Optional[str]
    model: Optional[str]
    model_class: Optional[str]
    role: Optional[str]
    ranks: str  # `tp 1/4, pp 0/2`: those of which there is more than one
    state: str  # as published; `stale` once the owner has exited, `unreadable`
    published_state: Optional[str]
    layout_generation: Optional[int]
    content_generation: Optional[int]
    event: Optional[str]
    event_ok: Optional[bool]
    event_at: Optional[float]
    checked_at: Optional[float]
    owner_alive: Optional[bool]
    pid: Optional[int]
    memory: Mapping[str, Optional[int]]
    problem: Optional[str]

    @property
    def is_good(self) -> bool:
        return self.state == READY


def slots_of(directories: list[Directory]) -> tuple[list[SlotOverview], list[str]]:
    """Every slot of the directories, and why any of these cannot be read."""
    found: list[SlotOverview] = []
    problems: list[str] = []
    for slots in slots_of_each(directories).values():
        if isinstance(slots, HookError):
            problems.append(str(slots))
        else:
            found += map(overview_of, slots)
    return found, problems


def overview_of(slot: Slot) -> SlotOverview:
    """The slot as it is now; what cannot be read is said in `problem`, never raised."""
    state: Mapping[str, Any] = {}
    start: Mapping[str, Any] = {}
    header: Optional[Header] = None
    alive: Optional[bool] = None
    problem: Optional[str] = None
    try:
        alive = slot.owner_alive()  # before the look: what it published last counts
        state = slot.read_state()
        start = slot.start_of_layout()
    except HookError as error:
        problem = str(error)
    try:
        header = slot.header()
    except HookError:  # of release 0.1, or on a disk that was full: the state has what counts
        pass
    if start and not _are_of_one_owner(state, start):
        start = {}  # a successor's state with its predecessor's layout
    return _combined(slot, state, start, header, alive, problem)


def _are_of_one_owner(state: Mapping[str, Any], layout: Mapping[str, Any]) -> bool:
    return process_of(dict(state)) == process_of(layout["identity"]) and same_instance(
        state, layout
    )


def _combined(
    slot: Slot,
    state: Mapping[str, Any],
    start: Mapping[str, Any],
    header: Optional[Header],
    alive: Optional[bool],
    problem: Optional[str],
) -> SlotOverview:
    identity = start.get("identity") or {}
    event = state.get("event")
    event = event if isinstance(event, dict) else {}
    published = _text(state.get("state"))
    if header is not None and header.pid == state.get("pid") and header.state == LEFT:
        alive = False
    told = [_number(part.get("checked_at")) for part in (state, start)]
    checked_at = max((at for at in told if at is not None), default=None)
    if header is not None and (header.pid, header.instance) == (
        state.get("pid"),
        state.get("instance"),
    ):
        checked_at = header.checked_at
    shown = published or UNREADABLE
    if alive is False:
        shown = STALE
    if problem is not None:
        shown = UNREADABLE
    return SlotOverview(
        directory=slot.directory,
        slot=slot.name,
        host=_text(identity.get("hostname")) or _text(state.get("hostname")),
        gpu=_whole(identity.get("gpu_id")),
        device=_text(identity.get("device")),
        model=_text(identity.get("model_path")),
        model_class=_text(identity.get("model_class")),
        role=_text(identity.get("role")),
        ranks=_ranks(identity),
        state=shown,
        published_state=published,
        layout_generation=_whole(state.get("layout_generation")),
        content_generation=_whole(state.get("content_generation")),
        event=_text(event.get("kind")),
        event_ok=event.get("success") if isinstance(event.get("success"), bool) else None,
        event_at=_number(event.get("finished_at")) or _number(event.get("started_at")),
        checked_at=checked_at,
        owner_alive=alive,
        pid=_whole(state.get("pid")),
        memory=_memory(start.get("memory")),
        problem=problem,
    )


def _ranks(identity: Mapping[str, Any]) -> str:
    """The ranks of which there are several.

    >>> _ranks({"tp_rank": 1, "tp_size": 4, "pp_rank": 0, "pp_size": 1, "dp_rank": None})
    'tp 1/4'
    """
    told = []
    for kind in _RANKS:
        rank, size = (_whole(identity.get(f"{kind}_{part}")) for part in ("rank", "size"))
        if rank is not None and size is not None and size > 1:
            told.append(f"{kind} {rank}/{size}")
    return ", ".join(told)


def _memory(memory: Any) -> dict[str, Optional[int]]:
    """Bytes by what takes them up; `other` is what is used and none of the slot's own."""
    memory = memory if isinstance(memory, dict) else {}
    found = {
        name: _whole(memory.get(field))
        for name, field in (
            ("weights", "weights_bytes"),
            ("kv_cache", "kv_cache_bytes"),
            ("lora", "lora_bytes"),
            ("free", "device_free_bytes"),
            ("total", "device_total_bytes"),
        )
    }
    own = sum(found[name] or 0 for name in ("weights", "kv_cache", "lora"))
    total, free = found["total"], found["free"]
    # Released memory is still in the slot's own sums and already in what is free.
    found["other"] = None if total is None or free is None else max(total - free - own, 0)
    return {name: found[name] for name in MEMORY}


def age_text(at: Optional[float], now: float) -> str:
    """How long ago that was, for people.

    >>> [age_text(100.0 - ago, 100.0) for ago in (0.2, 59, 61, 7200, 200000)], age_text(None, 1.0)
    (['0s', '59s', '1m', '2h', '2d'], '-')
    """
    if at is None:
        return "-"
    seconds = max(now - at, 0.0)
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length * (2 if unit == "d" else 1):
            return f"{int(seconds // length)}{unit}"
    return f"{int(seconds)}s"


def generations_text(layout: Optional[int], content: Optional[int]) -> str:
    """Layout and content generation: ``3.17``."""
    return f"{'-' if layout is None else layout}.{'-' if content is None else content}"


def _text(value: Any) -> Optional[str]:
    return value if isinstance(value, str) and value else None


def _whole(value: Any) -> Optional[int]:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _number(value: Any) -> Optional[float]:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) < 1e12 else None
