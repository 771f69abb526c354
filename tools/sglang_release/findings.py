"""What a release has that the table does not, and what the table relies on that it has not."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple, Optional

from sglang_weight_hook_patch_core import EntryPoint, release_key

from .paths import Paths, Place, is_library, way_to
from .summaries import NAMED, Summary

WRITER, REQUEST, OVERRIDE, BY_NAME = "writer", "request", "override", "by name"
WENT, EMPTY, SIGNATURE, RELIANCE, UNREADABLE = (
    "went",
    "empty",
    "signature",
    "reliance",
    "unreadable",
)


# What requests are about that can change weights.
_CONCERNS = re.compile(r"(?i)weight|lora|adapter|memory_?occupation|expert|model|checkpoint")


# Wrapped for the moment at which they end, not for what they write.
_MOMENTS = ("settle", "complete", "request")


class Finding(NamedTuple):
    kind: str
    place: str  # of SGLang: "module Class.method"
    line: int  # 0: none
    what: str  # one sentence
    todo: str  # what a maintainer has to decide or do
    way: tuple[str, ...] = ()  # how it is reached outside of every wrapped method


def title(place: Place) -> str:
    """``srt.managers.scheduler:Scheduler.__init__``, as findings and judgements name it."""
    module, owner, name = place
    return f"{module.partition('.')[2]}:{owner + '.' if owner else ''}{name}"


def place_of(entry: EntryPoint) -> Place:
    return (*entry.site, entry.method)


def is_expected(entry: EntryPoint, version: str) -> bool:
    """Whether the table says that the release has it; a release without a number is the newest."""
    key = release_key(version)
    if not any(key[:3]):
        return entry.last is None
    return release_key(entry.first) <= key and (
        entry.last is None or key <= release_key(entry.last)
    )


def uncovered(
    paths: Paths, entries: Sequence[EntryPoint], requests: Sequence[EntryPoint]
) -> Iterator[Finding]:
    """Functions that write weights and are not wrapped, nor run inside one that is."""
    wrapped = {place_of(entry) for entry in entries}
    reached = paths.outside(wrapped)
    writing = {place for place in paths.writers if place in reached}
    for place in sorted(writing):
        callers = paths.callers(place)
        if callers and callers <= writing and not place[2].startswith("__"):
            continue  # each of its callers is told of, and wrapping those wraps this
        function, seen = paths.functions[place], paths.writers[place]
        yield Finding(
            WRITER,
            title(place),
            function.line,
            f"{seen.kind}, outside of every wrapped method: {seen.text} (line {seen.line})",
            "a row of ENTRY_POINTS for it or for a function on its way, or a judgement why not",
            tuple(title(step) for step in way_to(place, reached)),
        )
    reaching = paths.reaching([*paths.writers, *wrapped]) | set(paths.writers)
    yield from _requests(paths, wrapped | {place_of(each) for each in requests}, reaching)
    yield from _overrides(paths, wrapped)
    for place, function in sorted(paths.functions.items()):
        named = any(each.kind == NAMED for each in function.evidence)
        if named and place in reached and place not in reaching and not is_library(place[0]):
            yield Finding(
                BY_NAME,
                title(place),
                function.line,
                "is named like a method that changes weights, and is not seen to write any",
                "read it: a row of ENTRY_POINTS, or a judgement why not",
            )


def _requests(
    paths: Paths, known: Collection[Place], reaching: Collection[Place]
) -> Iterator[Finding]:
    for place, handler in sorted(paths.handlers.items()):
        concerns = _CONCERNS.search(handler.request) or _CONCERNS.search(place[2])
        if concerns and place in reaching and place not in known:
            yield Finding(
                REQUEST,
                title(place),
                paths.functions[place].line,
                f"answers {handler.request} and reaches a method that writes weights",
                "a row of REQUESTS, or a judgement why not",
            )


def _overrides(paths: Paths, wrapped: Collection[Place]) -> Iterator[Finding]:
    for module, owner, name in sorted(wrapped):
        if not owner:
            continue
        for below in paths.subclasses_of(module, owner):
            function = paths.functions.get((below.module, below.name, name))
            if function is None or function.place in wrapped:
                continue
            if any(use.receiver == "super" and use.name == name for use in function.uses):
                continue
            yield Finding(
                OVERRIDE,
                title(function.place),
                function.line,
                f"overrides the wrapped {owner}.{name} and does not call it",
                "a row of ENTRY_POINTS for the subclass, or a judgement why not",
            )


def went(paths: Paths, due: Sequence[EntryPoint], found: Sequence[Finding]) -> Iterator[Finding]:
    """Rows of the table whose method the release no longer has where the row says."""
    for entry in due:
        module, owner, name = place_of(entry)
        if holder(paths, entry) is not None:
            continue
        alike = [each.place for each in found if each.place.endswith((f".{name}", f":{name}"))]
        hint = f"; of that name: {', '.join(alike)}" if alike else ""
        yield Finding(
            WENT,
            title((module, owner, name)),
            0,
            f"is in the table ({entry.event}) and not in this release{hint}",
            "give the row its last release, and add a row for what replaces it",
        )


def holder(paths: Paths, entry: EntryPoint) -> Optional[Place]:
    """Where the method of a row is defined: in the class, in one of its bases, or nowhere."""
    module, owner, name = place_of(entry)
    if not owner:
        return (module, "", name) if (module, "", name) in paths.functions else None
    for each in paths.ancestors(module, owner):
        if each.module != module and each.name == owner:
            break  # a class of that name elsewhere
        if (each.module, each.name, name) in paths.functions:
            return each.module, each.name, name
    return None


def empty(paths: Paths, due: Sequence[EntryPoint]) -> Iterator[Finding]:
    """Wrapped methods that are not seen to write anything."""
    reaching = paths.reaching(paths.writers)
    for entry in due:
        place = holder(paths, entry)
        if place is None or entry.effect in _MOMENTS:
            continue
        if place not in paths.writers and place not in reaching:
            yield Finding(
                EMPTY,
                title(place),
                paths.functions[place].line,
                f"is wrapped ({entry.event}) and is not seen to write weights any more",
                "find what writes now, and wrap that; or a judgement why this is right",
            )


def unreadable(summary: Summary) -> Iterator[Finding]:
    for path in summary.unreadable:
        yield Finding(
            UNREADABLE,
            path,
            0,
            "is no Python for the interpreter that this runs on",
            "run this on the Python that the release is for",
        )
