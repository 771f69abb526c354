"""Who may ask the agent, and what every answer carries.

Without a token the agent answers on this machine alone, and then a page in somebody's browser must
not get at it through a name of its own that resolves to 127.0.0.1: so the name asked for counts.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import socket
from collections.abc import Collection
from typing import Any, Optional

from .identity import HEADER, Identity
from .representation import failure

HEALTH = "/healthz"  # for whoever only wants to know whether the agent runs

_HEADERS = (
    (b"cache-control", b"no-cache"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)


class Guard:
    """An ASGI application in front of another one."""

    def __init__(
        self,
        app: Any,
        token: Optional[str] = None,
        hosts: Collection[str] = (),
        identity: Optional[Identity] = None,
    ) -> None:
        """``identity``: what the agent registers under, which is told to whoever may ask."""
        self._app = app
        self._told = [] if identity is None else [(HEADER.encode(), identity.header.encode())]
        self._token = None if token is None else _digest(token.encode())
        self._hosts = {"localhost", socket.gethostname().lower(), *(h.lower() for h in hosts)}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        refusal = None
        if scope["path"] != HEALTH:
            refusal = self._refusal(scope)
        told = [] if refusal is not None or scope["path"] == HEALTH else self._told

        async def with_headers(event: Any) -> None:
            if event["type"] == "http.response.start":
                present = {name.lower() for name, _ in event["headers"]}
                more = [pair for pair in _HEADERS if pair[0] not in present]
                event = {**event, "headers": [*event["headers"], *more, *told]}
            await send(event)

        await (refusal or self._app)(scope, receive, with_headers)

    def _refusal(self, scope: Any) -> Any:
        if self._token is not None:
            given = _header(scope, b"authorization")
            kind, _, value = given.partition(b" ")
            is_right = hmac.compare_digest(_digest(value.strip()), self._token)
            if kind.lower() == b"bearer" and is_right:
                return None
            return failure(
                401,
                "this agent wants a token: send Authorization: Bearer TOKEN",
                **{"www-authenticate": "Bearer"},
            )
        if not self._is_known_host(_header(scope, b"host").decode("latin-1")):
            return failure(
                403,
                "this agent is not known under the name asked for; ask for 127.0.0.1, or start it "
                "with a token",
            )
        return None

    def _is_known_host(self, host: str) -> bool:
        """An address, which no other name can stand for, or a name of this machine."""
        name = host.strip().lower()
        name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in self._hosts
        return True


def _digest(value: bytes) -> bytes:
    """Of one length, so that a comparison tells nothing of the token's."""
    return hashlib.sha256(value).digest()


def _header(scope: Any, name: bytes) -> bytes:
    return next((value for key, value in scope["headers"] if key == name), b"")
