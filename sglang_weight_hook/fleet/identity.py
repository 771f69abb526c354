"""Which agent speaks: what it has registered under, and says of itself where it is asked.

An address alone does not tell: another agent may have it by now, or two may have registered it.
"""

from __future__ import annotations

from typing import Any, NamedTuple


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


UNREGISTERED = Identity("", "")
