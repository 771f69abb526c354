"""What was found and is right as it is: each with the reason, read in SGLang's source.

A judgement is of one kind of finding at one place, so something else that is found there later is
told.  A place that ends in a colon is a whole module.
"""

from __future__ import annotations

from typing import NamedTuple


class Judgement(NamedTuple):
    kind: str
    place: str
    reason: str


JUDGED: tuple[Judgement, ...] = ()
