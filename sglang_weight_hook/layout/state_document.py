"""The fields of ``weight_state_{slot}.json``, and those that the layout document shares with it.

To add a field: one line in the type that has it, then ``python -m tools.format``, which makes
the JSON Schema and the table in ``docs/format.md`` of these types.  Nothing here is needed at
run time: import it under ``if TYPE_CHECKING``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Optional, TypedDict

from .field import Count, Field, Seconds

# `states.STATES`, `states.RESIDENT` and `documents` hold the same words for the code.
State = Literal["loading", "ready", "updating", "failed", "released"]
Residency = Literal["resident", "released"]


class Standing(TypedDict, total=False):
    """What a slot is in, and which version of it."""

    schema_version: Annotated[
        Literal[1],
        Field(
            "Rises when a reader of the version before would misread the document.", required=True
        ),
    ]
    state: Annotated[
        State,
        Field(
            "loading: the weights are there, the engine is not built yet. ready: they are in use. "
            "updating: a call that changes them is under way. failed: the last call that writes "
            "weights failed, the contents may be half written. released: their physical memory "
            "was given back, and touching the addresses faults.",
            required=True,
        ),
    ]
    instance: Annotated[
        str,
        Field(
            "New for each runner that is published, also within one process: another instance "
            "means that everything known of the slot is stale. 16 hexadecimal digits."
        ),
    ]
    layout_generation: Annotated[
        Count,
        Field(
            "Rises when any address, size, name or allocation changed: register again.",
            required=True,
        ),
    ]
    content_generation: Annotated[
        Count,
        Field(
            "Rises when values changed or may have changed by a call that is known to change them; "
            "volatile tensors are left out of account. A stream of buckets raises it by one.",
            required=True,
        ),
    ]
    physical_epoch: Annotated[
        Count,
        Field(
            "Rises when the physical pages behind unchanged weight addresses were replaced: a "
            "registration (RDMA, IPC) made before is stale, the addresses are not."
        ),
    ]
    kv_physical_epoch: Annotated[
        Count,
        Field(
            "Rises when the physical pages behind unchanged addresses of the KV cache were "
            "replaced: a registration made before is stale, the addresses are not."
        ),
    ]
    residency: Annotated[
        dict[str, Optional[Residency]],
        Field(
            "By SGLang's memory tag (weights, kv_cache, cuda_graph): resident, or released by "
            "release_memory_occupation; null or absent where it is not known."
        ),
    ]
    checked_at: Annotated[
        Optional[float],
        Field(
            "When the map and the memory of the server were last found equal, in seconds since "
            "1970-01-01 UTC, as of this document; the header has the latest time. null: not yet."
        ),
    ]
    updated_at: Annotated[
        float,
        Field("When this document was made, in seconds since 1970-01-01 UTC.", required=True),
    ]


class Process(TypedDict, total=False):
    """What tells the publishing process from every other one."""

    hostname: Annotated[
        str,
        Field(
            "Host name, as the publishing process sees it; cut to 72 bytes in the state document.",
            required=True,
        ),
    ]
    boot_id: Annotated[
        Optional[str],
        Field(
            "The kernel's boot id (/proc/sys/kernel/random/boot_id): the same host, started "
            "again, has another.",
            required=True,
        ),
    ]
    pid: Annotated[
        int, Field("Process id, in the publisher's own pid namespace.", required=True, minimum=1)
    ]
    process_start_ticks: Annotated[
        Optional[int],
        Field(
            "When the process started, in clock ticks since boot (/proc/PID/stat, field 22): a "
            "later process with the same pid has another.",
            required=True,
        ),
    ]


class Event(TypedDict, total=False):
    """The event that led to this publication: one call of SGLang's that changes weights, or one
    session of them."""

    kind: Annotated[
        str,
        Field(
            "What SGLang was asked to do, for example load_model, scheduler_ready, "
            "update_weights_from_disk, weight_update_session, release_memory_occupation, "
            "resume_memory_occupation. unannounced_change: a weight's address changed though no "
            "call that is known to move weights was made.",
            required=True,
        ),
    ]
    success: Annotated[
        Optional[bool],
        Field("Whether the weights were written as asked; null while it lasts.", required=True),
    ]
    answered: Annotated[
        Optional[bool],
        Field(
            "Whether SGLang answered the request with success. It answers false, for example, "
            "where the weights were written and its cache was not flushed. null: no request to "
            "SGLang was made."
        ),
    ]
    message: Annotated[
        Optional[str],
        Field(
            "SGLang's own message, or the exception's type and text; cut to about 200 bytes of "
            "JSON.",
            required=True,
        ),
    ]
    started_at: Annotated[
        float, Field("When it began, in seconds since 1970-01-01 UTC.", required=True)
    ]
    finished_at: Annotated[
        Optional[float],
        Field(
            "When it had returned, in seconds since 1970-01-01 UTC; null while it lasts.",
            required=True,
        ),
    ]
    calls: Annotated[
        int,
        Field(
            "How many calls the event consists of: the buckets of a stream or session, calls "
            "inside calls. 0 for an unannounced change.",
            required=True,
            minimum=0,
        ),
    ]
    nested: Annotated[
        dict[str, Count],
        Field("Calls by kind inside an event of several kinds; at most three kinds."),
    ]
    moved: Annotated[
        Count,
        Field(
            "Tensors whose address, size, shape or stride changed. Absent while the event lasts."
        ),
    ]
    added: Annotated[
        Count,
        Field(
            "Canonical names that were not in the document before. Absent while the event lasts."
        ),
    ]
    removed: Annotated[
        Count,
        Field("Canonical names that are no longer in the document. Absent while the event lasts."),
    ]
    capture_seconds: Annotated[
        Optional[Seconds], Field("Seconds that the capture took inside the server.")
    ]
    tensors: Annotated[
        list[str],
        Field(
            "Of an unannounced change: the first few tensors that moved, came or went.",
            max_items=5,
        ),
    ]


class StateName(TypedDict, total=False):
    """Opens the state document."""

    schema: Annotated[
        Literal["sglang-weight-state"], Field("What this document is.", required=True)
    ]


class StateDocument(StateName, Standing, Process, total=False):
    """The state of one slot, under 2 KB, replaced at the beginning and the end of every event.
    Times in seconds. Fields that are not described here are to be ignored."""

    slot: Annotated[str, Field("The slot's name, as in the file names.", required=True)]
    event: Annotated[Event, Field(required=True)]
    lock: Annotated[
        str,
        Field(
            "held, not held, timeout (a reader held it too long and the server went on), "
            "not waited for (a reader held it during a forward or an unannounced change), or why "
            "there is none.",
            required=True,
        ),
    ]
    missing: Annotated[
        list[str],
        Field(
            "Entry points that this SGLang lacks, so that their changes would not be seen; the "
            "first five.",
            required=True,
            max_items=5,
        ),
    ]
    missing_count: Annotated[
        Count, Field("How many entry points this SGLang lacks.", required=True)
    ]
    control: Annotated[
        Optional[str],
        Field(
            "File name of the process's control socket in the same directory; null where there is "
            "none."
        ),
    ]
    subscribers: Annotated[
        dict[str, Optional[str]],
        Field(
            "By name of each subscriber (SGLANG_WEIGHT_HOOK_SUBSCRIBERS) what went wrong with it; "
            "null where nothing did. The first three. Absent where none is configured."
        ),
    ]
    problem: Annotated[
        Optional[str],
        Field(
            "What keeps the layout document from being current; null where nothing does.",
            required=True,
        ),
    ]


# What the presence or value of one field asks of others, by type, in the words of JSON Schema.
CONDITIONS: Mapping[str, Mapping[str, Any]] = {
    # An event that has ended says what it changed.
    "Event": {
        "if": {"required": ["success"], "properties": {"success": {"type": "boolean"}}},
        "then": {"required": ["moved", "added", "removed"]},
    },
}
