"""The fields of ``weight_transport_{slot}.json``: how other machines can read a slot's weights.

To add a field: one line in the type that has it, then ``python -m tools.format``, which makes
the JSON Schema and the table in ``docs/format.md`` of these types.  The types are not needed at
run time: import them under ``if TYPE_CHECKING``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Optional, TypedDict

from .field import Address, Count, Field
from .state_document import Process

TRANSPORT_SCHEMA = "sglang-weight-transport"
TRANSPORT_SCHEMA_VERSION = 1

# The names of the engines, which are also those of their subscribers and of `open_memory(via=…)`.
MOONCAKE, NIXL = "mooncake", "nixl"
ENGINES = (MOONCAKE, NIXL)

# What `state` of an engine says.
REGISTERED, WITHDRAWN, REGISTRATION_FAILED = "registered", "withdrawn", "failed"


class RemoteHeader(TypedDict, total=False):
    """The slot's header in memory of the server's process, for readers on other machines."""

    ptr: Annotated[Address, Field("Address of the header in the server's process.", required=True)]
    size: Annotated[Literal[128], Field("Bytes of the header.", required=True)]


class TransportEngine(TypedDict, total=False):
    """What one transfer engine in the server's process has registered of the slot."""

    state: Annotated[
        Literal["registered", "withdrawn", "failed"],
        Field(
            "registered: the regions of the layout with the generations below can be read. "
            "withdrawn: none can at present (the memory was released, or the weights are being "
            "replaced). failed: none can, and problem says why.",
            required=True,
        ),
    ]
    problem: Annotated[
        Optional[str],
        Field("Why the engine does not serve the weights; null where it does.", required=True),
    ]
    warnings: Annotated[
        list[str],
        Field(
            "What makes transfers slow, or a part of the weights unreachable, as sentences; empty "
            "where nothing is known to.",
            required=True,
        ),
    ]
    layout_generation: Annotated[
        Count,
        Field("The layout generation that the registration holds for.", required=True),
    ]
    content_generation: Annotated[
        Count,
        Field(
            "The content generation when the registration was last published. Values change in "
            "place afterwards without a new registration: the header tells the generation of now.",
            required=True,
        ),
    ]
    physical_epoch: Annotated[
        Count,
        Field("The physical epoch that the registration holds for.", required=True),
    ]
    regions: Annotated[
        Count, Field("How many regions of the layout are registered.", required=True)
    ]
    bytes: Annotated[Count, Field("Bytes of the registered regions.", required=True)]
    header: Annotated[
        Optional[RemoteHeader],
        Field(
            "Where the engine reads the slot's header; null where it is not registered.",
            required=True,
        ),
    ]
    session: Annotated[
        str, Field("mooncake: host:port, as transfer_sync_read takes it. Absent: none was opened.")
    ]
    protocol: Annotated[str, Field("mooncake: tcp or rdma.")]
    agent: Annotated[str, Field("nixl: the name of the server's agent.")]
    metadata: Annotated[
        str,
        Field(
            "nixl: the agent's metadata in base64, as add_remote_agent takes it (decoded). It "
            "covers all slots of the process."
        ),
    ]
    backend: Annotated[str, Field("nixl: the agent's backend, for example UCX.")]
    module: Annotated[str, Field("nixl: the Python module that the server uses, as nixl_cu12.")]
    memory: Annotated[
        Literal["DRAM", "VRAM"], Field("nixl: the memory type that the regions are registered as.")
    ]
    device_id: Annotated[
        Count,
        Field("nixl: the device number that the regions are registered with; 0 for DRAM."),
    ]


class TransportName(TypedDict, total=False):
    """Opens the transport document."""

    schema: Annotated[
        Literal["sglang-weight-transport"], Field("What this document is.", required=True)
    ]
    schema_version: Annotated[
        Literal[1],
        Field(
            "Rises when a reader of the version before would misread the document.", required=True
        ),
    ]


class TransportDocument(TransportName, Process, total=False):
    """How transfer engines reach the weights of one slot. Readable by the server's user alone
    (mode 0600), for who knows its content may be able to write the weights. Present only where
    SGLANG_WEIGHT_HOOK_SUBSCRIBERS names an engine. Fields that are not described here are to be
    ignored."""

    slot: Annotated[str, Field("The slot's name, as in the file names.", required=True)]
    instance: Annotated[
        str,
        Field(
            "The instance that the layout document has, too: with another one nothing here may be "
            "used. 16 hexadecimal digits.",
            required=True,
        ),
    ]
    updated_at: Annotated[
        float,
        Field("When this document was made, in seconds since 1970-01-01 UTC.", required=True),
    ]
    engines: Annotated[
        dict[str, TransportEngine],
        Field("By name (mooncake, nixl) what each engine has registered.", required=True),
    ]


# What the presence or value of one field asks of others, by type, in the words of JSON Schema.
CONDITIONS: Mapping[str, Mapping[str, Any]] = {
    # Where something can be read, the bracket around each reading can be read, too.
    "TransportEngine": {
        "if": {"required": ["state"], "properties": {"state": {"const": "registered"}}},
        "then": {"properties": {"header": {"type": "object"}, "problem": {"type": "null"}}},
    },
}
