"""The answers as text and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from . import history
from .check import Report
from .findings import (
    BY_NAME,
    EMPTY,
    OVERRIDE,
    RELIANCE,
    REQUEST,
    SIGNATURE,
    UNREADABLE,
    WENT,
    WRITER,
    Finding,
)

_HEADINGS = {
    WENT: "In the table, and no longer there",
    WRITER: "Write weights, and are not wrapped",
    OVERRIDE: "Replace a wrapped method",
    REQUEST: "Answer a request that writes weights, and are not in REQUESTS",
    EMPTY: "Wrapped, and not seen to write",
    SIGNATURE: "Called in another way than before",
    RELIANCE: "Read by the hook, and not there",
    BY_NAME: "Named as if they changed weights",
    UNREADABLE: "Not read",
}


def text(report: Report) -> Iterator[str]:
    """Lines for a person."""
    yield (
        f"SGLang {report.version}: {report.wrapped} methods of the table are there, "
        f"{_number(len(report.to_act_on), 'finding')} to act on, {len(report.judged)} judged before"
    )
    for kind, heading in _HEADINGS.items():
        of_kind = [each for each in report.to_act_on if each.kind == kind]
        if of_kind:
            yield f"\n{heading}:"
        for each in of_kind:
            yield from _lines(each)
    for judgement in report.idle:
        yield f"\nJudged, and not in this release: {judgement.place}"


def _lines(finding: Finding) -> Iterator[str]:
    line = f" (line {finding.line})" if finding.line else ""
    yield f"  {finding.place}{line}"
    yield f"      {finding.what}"
    if len(finding.way) > 1:
        yield "      on the way from " + " > ".join(each.split(":")[-1] for each in finding.way)
    yield f"      to do: {finding.todo}"


def document(report: Report) -> dict[str, Any]:
    return {
        "sglang": report.version,
        "wrapped": report.wrapped,
        "to_act_on": [_object(each) for each in report.to_act_on],
        "judged": [{**_object(each), "reason": reason} for each, reason in report.judged],
        "judged_and_gone": [each.place for each in report.idle],
    }


def _object(finding: Finding) -> dict[str, Any]:
    return {**finding._asdict(), "way": list(finding.way)}


# --- history ------------------------------------------------------------------------------------


def history_text(
    steps: Sequence[history.Step], ranges: Sequence[history.Range], each_finding: bool = False
) -> Iterator[str]:
    yield "| release | to read | of that, rows | further rows | led to no row | rows that went |"
    yield "|---|---|---|---|---|---|"
    for step in steps:
        if not (step.new or step.rows or step.went):
            continue
        found = sum(row.result == history.FOUND for row in step.rows)
        others = len(step.rows) - found
        yield (
            f"| {step.release} | {len(step.new)} | {found} | {others} | {len(step.others)} "
            f"| {len(step.went)} |"
        )
    quiet = sum(not (step.new or step.rows or step.went) for step in steps)
    yield f"\nIn {quiet} of {len(steps)} releases there was nothing to read."
    rows = [row for step in steps for row in step.rows]
    yield ""
    for result in (history.FOUND, history.ON_THE_WAY, history.INSIDE, history.MISSED):
        of_result = [row for row in rows if row.result == result]
        yield f"{result}: {len(of_result)} of {len(rows)} rows"
        if result != history.FOUND:
            for row in of_result:
                by = f" by {row.by}" if row.by else ""
                yield f"  {row.release}: {row.entry.name} ({row.entry.effect}){by}"
    if each_finding:
        for step in steps:
            for finding in step.others:
                yield f"{step.release}: {finding.kind} {finding.place}: {finding.what}"
    yield from _range_lines(steps, ranges)


def _range_lines(steps: Sequence[history.Step], ranges: Sequence[history.Range]) -> Iterator[str]:
    newest = steps[-1].release
    for each in ranges:
        entry = each.entry
        said = f"{entry.first} to {entry.last or 'now'}"
        real = f"{each.first} to {'now' if each.last == newest else each.last}"
        if said != real:
            yield f"  {entry.name}: {said} in the table, {real} in the releases"


def history_document(
    steps: Sequence[history.Step], ranges: Sequence[history.Range]
) -> dict[str, Any]:
    return {
        "releases": [
            {
                "sglang": step.release,
                "rows": [
                    {"method": row.entry.name, "result": row.result, "by": row.by or None}
                    for row in step.rows
                ],
                "went": list(step.went),
                "read": [_object(each) for each in step.new],
                "led_to_no_row": [each.place for each in step.others],
            }
            for step in steps
        ],
        "ranges": [
            {
                "method": each.entry.name,
                "first_in_table": each.entry.first,
                "last_in_table": each.entry.last,
                "first_seen": each.first,
                "last_seen": each.last,
            }
            for each in ranges
        ],
    }


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
