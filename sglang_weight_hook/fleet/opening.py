"""What the URL of an agent or of a registry opens."""

from __future__ import annotations

import functools
from typing import Optional

from ..layout.location import without_user
from ..reader import Directory, HookError
from .access import ETCD_USER, TOKEN, access_from_environment
from .identity import Speaker
from .registry_reading import Registry
from .remote_agent import RemoteAgent
from .remote_directory import AgentDirectory, RegistryDirectory
from .remote_slot import RemoteSlot

_REGISTRIES = {"etcd": "http", "etcds": "https"}


def open_url(url: str) -> Directory:
    """``https://node:7411``, ``http://…``, or ``etcd://host:2379,host2:2379`` (``etcds``: TLS).

    An agent's URL without a port means 443 (``http``: 80), a registry's 2379.
    Asks nobody yet.  Token and certificates come from the environment: `access`.
    Raises HookError.
    """
    access = access_from_environment()
    scheme, _, rest = url.partition("://")
    scheme = scheme.lower()
    if "@" in rest:
        raise HookError(
            f"{without_user(url)} has a user in it, which every user of this machine can read; "
            f"give {scheme}://HOST:PORT, and {TOKEN} or {ETCD_USER} in the environment"
        )
    if scheme not in _REGISTRIES:
        return AgentDirectory(f"{scheme}://{rest}", access)
    hosts = [host for host in rest.rstrip("/").split(",") if host]
    if not hosts:
        raise HookError(f"{url!r} names no registry; give {scheme}://HOST:2379")
    with_port = [host if _has_port(host) else f"{host}:2379" for host in hosts]
    registry = Registry([f"{_REGISTRIES[scheme]}://{host}" for host in with_port], access)
    return RegistryDirectory(f"{scheme}://{','.join(with_port)}", registry, access)


def reopened(
    url: str, is_named_by_registry: bool, id: str, name: str, speaker: Optional[Speaker]
) -> RemoteSlot:
    """A slot in another process than the one that has listed it."""
    return RemoteSlot(_agent(url, is_named_by_registry), id, name, speaker=speaker)


@functools.lru_cache(maxsize=256)
def _agent(url: str, is_named_by_registry: bool) -> RemoteAgent:
    return RemoteAgent(url, access_from_environment(), is_named_by_registry)


def _has_port(host: str) -> bool:
    return ":" in host.rpartition("]")[2]
