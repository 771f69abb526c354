"""What the server says of its transfer engines, and whether it holds for a document.

``weight_transport_{slot}.json`` lies beside the layout: in the server's output directory, or in a
copy of both on another machine.  What it says is never enough by itself, for neither engine keeps
a reader with old metadata from reading: `remote_header` asks the server's memory.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

from ..layout import files, process
from ..layout.transport_document import (
    ENGINES,
    MOONCAKE,
    REGISTERED,
    REGISTRATION_FAILED,
    TRANSPORT_SCHEMA,
    TRANSPORT_SCHEMA_VERSION,
)
from ..layout.variables import SUBSCRIBERS, TRANSFER_HOST
from ..reader import Document, HookError
from .errors import Changed, NotReadable

if TYPE_CHECKING:
    from ..layout.transport_document import TransportEngine

__all__ = [
    "ENGINES",
    "Transport",
    "content_generation_of",
    "has_rdma_device",
    "is_elsewhere",
    "is_loopback",
    "is_transferred",
    "session_of",
    "transport_of",
    "warnings",
]

_RDMA_DEVICES = "/sys/class/infiniband"


class Transport(NamedTuple):
    """One engine of the server, which has registered a document's regions."""

    engine: str  # `MOONCAKE` or `NIXL`
    path: str  # of the document that says so
    entry: TransportEngine
    header: int  # address of the slot's header in the server's process

    @property
    def protocol(self) -> str:
        """Mooncake's: tcp or rdma."""
        return str(self.entry.get("protocol") or "tcp")


def is_elsewhere(document: Document) -> bool:
    """Whether the document's owner runs on another machine than this process."""
    theirs, mine = document.state.get("boot_id"), process.boot_id()
    return isinstance(theirs, str) and mine is not None and theirs != mine


def is_transferred(document: Document, via: Optional[str]) -> bool:
    """Whether `Document.open_memory` with ``via`` goes through a transfer engine."""
    return via in ENGINES or (via is None and is_elsewhere(document))


def transport_of(document: Document, engine: str) -> Transport:
    """What ``engine`` has registered for ``document``.

    Raises NotReadable where it has not, Changed where what it has is of other generations.
    """
    path = document.slot.path(files.TRANSPORT)
    entry, header = _entry(path, _read(path, document), document, engine)
    name = document.slot.name
    if entry["state"] != REGISTERED:
        problem = entry.get("problem") or "the memory was released, or is being replaced"
        if entry["state"] == REGISTRATION_FAILED:
            raise NotReadable(f"{engine} does not serve slot {name}: {problem}")
        raise Changed(
            f"{engine} serves slot {name} no more at the moment: {problem}; wait until the slot is "
            f"ready and read the document again"
        )
    for what, theirs, mine in (
        ("layout generation", entry.get("layout_generation"), document.layout_generation),
        ("physical epoch", entry.get("physical_epoch"), document.physical_epoch),
    ):
        if mine is not None and theirs != mine:
            raise Changed(
                f"{engine} serves another map of slot {name} ({what} {theirs}, the document's is "
                f"{mine}); read the document again, or copy both files again"
            )
    return Transport(engine, path, entry, header)


def content_generation_of(document: Document, engine: str) -> int:
    """That of a saved map with what lies beside it, whose files were copied together.

    Raises as `transport_of` does.
    """
    value = transport_of(document, engine).entry.get("content_generation")
    return max(document.content_generation, value if isinstance(value, int) else 0)


def _read(path: str, document: Document) -> dict[str, Any]:
    try:
        raw = document.slot.transport()
    except HookError as error:
        raise NotReadable(str(error)) from error
    if raw is None:
        raise NotReadable(
            f"{path} does not exist: the server runs no transfer engine; start it with "
            f"{SUBSCRIBERS}=mooncake (or nixl), and copy this file, too, if the map is a copy"
        )
    if (raw.get("schema"), raw.get("schema_version")) != (
        TRANSPORT_SCHEMA,
        TRANSPORT_SCHEMA_VERSION,
    ) or not isinstance(raw.get("engines"), dict):
        raise NotReadable(
            f"{path} is no {TRANSPORT_SCHEMA} of version {TRANSPORT_SCHEMA_VERSION}; install the "
            f"release that wrote it"
        )
    return raw


def _entry(
    path: str, raw: dict[str, Any], document: Document, engine: str
) -> tuple[TransportEngine, int]:
    name = document.slot.name
    if raw.get("slot") != name and document.is_live:
        raise NotReadable(f"{path} is of slot {str(raw.get('slot'))[:40]!r}; copy the right file")
    if document.instance is None or raw.get("instance") != document.instance:
        raise Changed(
            f"{path} is of another runner than the document of slot {name}; read the document "
            f"again, or copy both files again"
        )
    entry: Any = raw["engines"].get(engine)
    if entry is None:
        there = " and ".join(map(str, raw["engines"])) or "none"
        raise NotReadable(
            f"{engine} does not run in the server of slot {name} ({there} does); start it with "
            f"{SUBSCRIBERS}={engine}"
        )
    header = entry.get("header") if isinstance(entry, dict) else None
    address = header.get("ptr") if isinstance(header, dict) else None
    state = entry.get("state") if isinstance(entry, dict) else None
    if not isinstance(state, str) or (
        state == REGISTERED and (not isinstance(address, int) or isinstance(address, bool))
    ):
        raise NotReadable(f"{path} says nothing of {engine} that can be used; copy it again")
    return entry, address if isinstance(address, int) else 0


# --- what is better known before a transfer than after it ---------------------------------


def warnings(document: Document, transport: Transport) -> Iterator[str]:
    """What makes a transfer slow, or could be done without one."""
    engine, entry = transport.engine, transport.entry
    told = entry.get("warnings")
    for each in told if isinstance(told, list) else ():
        yield f"the server says of {engine}: {str(each)[:300]}"
    kinds = _kinds(document)
    if not is_elsewhere(document):
        if "cuda" in kinds:
            yield (
                f"the server is on this machine, where via=cuda reads a GPU's memory without "
                f"{engine}, and up to a thousand times as fast (SGLANG_WEIGHT_HOOK_SHARE=1)"
            )
        else:
            yield (
                f"the server is on this machine, where via=process reads its memory without "
                f"{engine}"
            )
    by_rdma = transport.protocol == "rdma" if engine == MOONCAKE else "cuda" in kinds
    if by_rdma and not has_rdma_device():
        yield (
            f"this machine has no RDMA device ({_RDMA_DEVICES}), so {engine} either fails or falls "
            f"back to software emulation over TCP: some 0.5 GB/s for a GPU's memory (UCX_PROTO_INFO"
            f"=y tells what UCX does)"
        )
    if by_rdma:
        unable = sum(region.get("rdma_capable") is False for region in document.regions)
        if unable:
            yield (
                f"{unable} of {len(document.regions)} regions lie in memory that is not RDMA "
                f"capable (rdma_capable in the layout): {engine} cannot read them directly"
            )


def _kinds(document: Document) -> set[str]:
    return {str(region.get("device", "")).partition(":")[0] for region in document.regions}


def has_rdma_device() -> bool:
    try:
        return bool(os.listdir(_RDMA_DEVICES))
    except OSError:
        return False


def is_loopback(host: str) -> bool:
    """Whether a name or an address only means the machine that asks.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("10.0.0.7")
    (True, True, False)
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def session_of(document: Document, transport: Transport, address: Optional[str]) -> str:
    """``host:port`` of Mooncake's session; ``address`` replaces the host, or host and port.

    Raises NotReadable, also where the data could not arrive: Mooncake's server announces the name
    that it was given, and readers connect to that, whatever the address of the session.
    """
    session = transport.entry.get("session")
    if not isinstance(session, str) or ":" not in session:
        raise NotReadable(f"{transport.path} names no session of mooncake; copy it again")
    host, _, port = session.rpartition(":")
    if is_elsewhere(document) and is_loopback(host):
        raise NotReadable(
            f"the server of slot {document.slot.name} announces itself as {host}, which here means "
            f"this machine; start it with {TRANSFER_HOST} set to its name or address"
        )
    if address is None:
        return session
    given, colon, their_port = address.rpartition(":")
    if not colon or address.endswith("]"):
        return f"{address}:{port}"
    if not given or not their_port.isdecimal():
        raise NotReadable(f"{address} is no address; give HOST or HOST:PORT")
    return address
