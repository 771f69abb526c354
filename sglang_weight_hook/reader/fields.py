"""Fields of published objects, each of its proper type or a HookError: files are not trusted."""

from __future__ import annotations

from typing import Any, Optional

from .errors import FOREIGN, HookError

ADDRESSES = 2**64
# More dimensions than any tensor has.
DIMENSIONS = 128


class Fields:
    """The fields of a published object, each of its proper type or a HookError."""

    def __init__(self, what: str, raw: Any) -> None:
        self._what = what
        self._raw = raw
        if not isinstance(raw, dict):
            raise HookError(f"{what} is no JSON object; {FOREIGN}")

    def improper(self, name: str) -> HookError:
        return HookError(f"{self._what} has no valid {name!r}; {FOREIGN}")

    def number(self, name: str, default: Optional[int] = None) -> int:
        value = self._raw.get(name, default)
        # As nearly all are; the rest is for what only looks like a number.
        if type(value) is int and 0 <= value < ADDRESSES:
            return value
        if not is_size(value):
            raise self.improper(name)
        return int(value)

    def text(self, name: str, default: Optional[str] = None) -> str:
        value = self._raw.get(name, default)
        if not isinstance(value, str):
            raise self.improper(name)
        return value

    def numbers(self, name: str) -> tuple[int, ...]:
        value = self._raw.get(name)
        if not isinstance(value, list) or len(value) > DIMENSIONS:
            raise self.improper(name)
        for item in value:
            if not (type(item) is int and 0 <= item < ADDRESSES) and not is_size(item):
                raise self.improper(name)
        return tuple(value)

    def texts(self, name: str) -> tuple[str, ...]:
        value = self._raw.get(name, [])
        if not isinstance(value, list):
            raise self.improper(name)
        for item in value:
            if not isinstance(item, str):
                raise self.improper(name)
        return tuple(value)


def is_size(value: Any) -> bool:
    # Longer than 64 bits is no address; of some lies the product would fit into no memory.
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < ADDRESSES
