"""Where the output directory is: the same for who publishes and for who reads."""

from __future__ import annotations

import os
import socket
from typing import Optional

DIRECTORY = "SGLANG_WEIGHT_HOOK_DIR"
DEFAULT_DIRECTORY = "weights_metadata"


# What stands before :// in the address of a node agent, or of a registry of agents.
URL_SCHEMES = ("http", "https", "etcd", "etcds")


def is_url(value: str) -> bool:
    """Whether ``value`` is no path but the address of a node agent or of a registry.

    >>> is_url("https://node1:7411"), is_url("etcd://a:2379,b:2379"), is_url("maps/http")
    (True, True, False)
    """
    scheme, mark, _ = value.partition("://")
    return bool(mark) and scheme.lower() in URL_SCHEMES


def without_user(url: str) -> str:
    """A URL to show: user and password, which belong in no URL here, are left out.

    >>> without_user("https://me:secret@node1:7411"), without_user("etcd://a:2379")
    ('https://...@node1:7411', 'etcd://a:2379')
    """
    scheme, mark, rest = url.partition("://")
    return f"{scheme}://...@{rest.rpartition('@')[2]}" if mark and "@" in rest else url


def directory_from(value: Optional[str], base: str) -> str:
    """Absolute output directory for a value of ``SGLANG_WEIGHT_HOOK_DIR``.

    ``{hostname}`` and ``{pid}`` are filled in; other braces stay as they are.

    >>> directory_from("maps/{hostname}", "/srv") == "/srv/maps/" + socket.gethostname()
    True
    >>> directory_from(None, "/srv")
    '/srv/weights_metadata'
    """
    path = value or DEFAULT_DIRECTORY
    path = path.replace("{hostname}", socket.gethostname()).replace("{pid}", str(os.getpid()))
    return os.path.normpath(os.path.join(base, os.path.expanduser(path)))
