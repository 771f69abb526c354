"""How one field of a published document is declared: its type, what it means, what it may be.

Read by `tools.format`, which makes the JSON Schemas and the tables of ``docs/format.md`` of it.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple, Optional


class Field(NamedTuple):
    """Stands in ``Annotated`` behind the type of a field.

    Not required unless it says so: a document of an earlier release lacks the fields that came
    later, and has to stay valid.  Without a description, that of the field's own type is taken
    (the docstring of a TypedDict).
    """

    description: str = ""
    required: bool = False
    # What JSON Schema calls minimum, maximum, minLength and so on.
    minimum: Optional[float] = None
    maximum: Optional[float] = None
    min_length: Optional[int] = None
    max_length: Optional[int] = None
    pattern: Optional[str] = None
    min_items: Optional[int] = None
    max_items: Optional[int] = None


# How many, or how many bytes.
Count = Annotated[int, Field(minimum=0)]
# A virtual address: 64 bits without a sign.
Address = Annotated[int, Field(minimum=0, maximum=2**64 - 1)]
Seconds = Annotated[float, Field(minimum=0)]
