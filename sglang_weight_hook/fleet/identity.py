"""Which agent speaks: what it has registered under, and says of itself where it is asked.

An address alone does not tell: another agent may have it by now, or two may have registered it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Optional
from urllib.parse import quote, unquote

from ..reader import HookError

HEADER = "sglang-weight-agent"  # of every answer of an agent that registers its slots


class Identity(NamedTuple):
    """Drawn anew with each start of an agent, and the node that it registers its slots under."""

    id: str
    node: str

    @classmethod
    def of(cls, id: Any, node: Any) -> Identity:
        """`UNREGISTERED` for what is none.

        >>> Identity.of("a", "node1"), Identity.of(None, 1) == UNREGISTERED
        (Identity(id='a', node='node1'), True)
        """
        if isinstance(id, str) and id and isinstance(node, str):
            return cls(id, node)
        return UNREGISTERED

    @classmethod
    def told(cls, found: Any) -> Identity:
        """Of ``{"id": …, "node": …}``, as an agent says it; null where it registers nothing."""
        return (
            cls.of(found.get("id"), found.get("node")) if isinstance(found, dict) else UNREGISTERED
        )

    @property
    def header(self) -> str:
        """As a value of `HEADER`.

        >>> Identity("a", "node 1/x").header
        'a/node%201%2Fx'
        """
        return f"{quote(self.id, safe='')}/{quote(self.node, safe='')}"

    @classmethod
    def in_headers(cls, headers: Mapping[str, str]) -> Identity:
        """Of who has answered; ``headers`` by their names in lower case.

        >>> Identity.in_headers({HEADER: "a/node%201"}), Identity.in_headers({}) == UNREGISTERED
        (Identity(id='a', node='node 1'), True)
        """
        id, _, node = headers.get(HEADER, "").partition("/")
        return cls.of(unquote(id), unquote(node))


UNREGISTERED = Identity("", "")


class Speaker:
    """Who has registered a slot, and is believed what it says of it, and nobody else."""

    def __init__(
        self,
        slot: str,
        url: str,
        identity: Identity,
        look_up: Optional[Callable[[], Optional[Identity]]] = None,
    ) -> None:
        """``look_up``: who has registered it at ``url`` by now; None: nobody."""
        self.slot, self.url, self.identity = slot, url, identity
        self._look_up = look_up

    def check(self, answered: Identity) -> None:
        """Raises HookError where another one has answered, and has not registered it since."""
        if answered == self.identity:
            return
        now = None if self._look_up is None else self._look_up()
        if now is None or now != answered:
            raise another(self.slot, self.url)
        self.identity = now

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process nobody asks the registry again."""
        return Speaker, (self.slot, self.url, self.identity)


def another(slot: str, url: str) -> HookError:
    return HookError(
        f"slot {slot} is registered at {url}, and another agent has that address: the one that "
        f"registered it has ended, or two have one --advertise; look again"
    )
