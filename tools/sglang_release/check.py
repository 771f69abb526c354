"""One release against the table: what to act on, and what a maintainer has judged already."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from sglang_weight_hook_patch_core import ENTRY_POINTS, REQUESTS

from . import signatures
from .findings import WENT, Finding, empty, is_expected, uncovered, unreadable, went
from .judged import JUDGED, Judgement
from .paths import Paths
from .reliances import missing
from .summaries import Summary


class Report(NamedTuple):
    version: str
    wrapped: int  # rows of the table that the release is due to have, and has
    to_act_on: tuple[Finding, ...]
    judged: tuple[tuple[Finding, str], ...]  # with the reason
    # Judgements about what this release has no longer: to be taken out some day.
    idle: tuple[Judgement, ...]


def check(summary: Summary) -> Report:
    paths = Paths(summary)
    entries = [each for each in ENTRY_POINTS if is_expected(each, summary.version)]
    requests = [each for each in REQUESTS if is_expected(each, summary.version)]
    due = [*entries, *requests]
    found = list(uncovered(paths, entries, requests))
    gone = list(went(paths, due, found))
    found = [
        *gone,
        *found,
        *empty(paths, entries),
        *signatures.changed(paths, due, signatures.known()),
        *missing(summary, paths),
        *unreadable(summary),
    ]
    reasons = [(each, _reason(each)) for each in found]
    used = {judgement for _, judgement in reasons if judgement is not None}
    return Report(
        summary.version,
        len(due) - sum(each.kind == WENT for each in gone),
        tuple(each for each, judgement in reasons if judgement is None),
        tuple((each, judgement.reason) for each, judgement in reasons if judgement is not None),
        tuple(each for each in JUDGED if each not in used),
    )


def _reason(finding: Finding) -> Judgement | None:
    return next(_matching(finding), None)


def _matching(finding: Finding) -> Iterator[Judgement]:
    for judgement in JUDGED:
        is_inside = judgement.place.endswith(":") and finding.place.startswith(judgement.place)
        if (is_inside or finding.place == judgement.place) and finding.kind == judgement.kind:
            yield judgement
