"""``sglang-weight-hook verify``."""

from __future__ import annotations

import functools
from typing import Annotated, NamedTuple, Optional

import typer

from ..reader import Slot, open_file, verify
from ..reader.findings import Finding
from .app import ACT, Misused, command
from .cores import for_each
from .directories import directory_at
from .options import DirOption, JsonOption, NoHeadersOption, OutputOption
from .output import asked_form
from .render.output import TABLE, WIDE, print_answer
from .render.text import print_item, print_json, printable
from .selection import is_path, slots_in, standing
from .slot_choice import a_slot_or_file_named

_Slot = Annotated[
    Optional[str],
    typer.Argument(
        metavar="SLOT",
        show_default=False,
        help="A slot (0, 0_draft, ...) or a saved layout file; default: all slots.",
        autocompletion=a_slot_or_file_named,
    ),
]


@command(
    "verify",
    "sglang-weight-hook verify && echo good\n"
    "sglang-weight-hook verify 0 --json\n"
    "sglang-weight-hook verify --live -o csv",
)
def verify_(
    slot: _Slot = None,
    directory: DirOption = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 3 on warnings, too, not only on errors.")
    ] = False,
    live: Annotated[
        bool,
        typer.Option("--live", help="Also have each server compare its map with its memory now."),
    ] = False,
    output: OutputOption = None,
    no_headers: NoHeadersOption = False,
    as_json: JsonOption = False,
) -> int:
    """Check the published files: one line for each finding.

    Checks schema, generations, overlaps, regions, sums, legacy-format files and whether the owner
    lives.  Exit status 3 if there is an error.
    """
    form = asked_form(output, as_json, no_headers)
    if slot is not None and is_path(slot):
        if live:
            raise Misused("--live asks the owner of a slot, a saved file has none; name a slot")
        answers = [_answer(verify.verify_file(open_file(slot)))]
    elif slot is not None:
        answers = [_verify(live, directory_at(directory).slot(slot))]
    else:
        found = directory_at(directory)
        answers = for_each(functools.partial(_verify, live), slots_in(found))
    findings = [finding for answer in answers for finding in answer.findings]
    good = not findings if strict else all(answer.good for answer in answers)
    if form.is_json:
        print_json(
            {
                "good": good,
                "slots": [
                    {
                        "slot": answer.slot,
                        "good": answer.good,
                        "findings": [finding._asdict() for finding in answer.findings],
                    }
                    for answer in answers
                ],
            }
        )
        return 0 if good else ACT
    if form.name not in (TABLE, WIDE):
        records = [finding._asdict() for finding in findings]
        print_answer(form, (), (), records, Finding._fields)
        return 0 if good else ACT
    for answer in answers:
        _print_answer(answer)
    return 0 if good else ACT


class _Answer(NamedTuple):
    """What is printed about a slot: little enough to be handed from one process to another."""

    slot: str
    good: bool
    findings: list[Finding]
    sum: Optional[str]  # None where no document could be read


def _answer(verdict: verify.Verdict) -> _Answer:
    told = None
    if verdict.document is not None:
        counts = f"{len(verdict.document.tensors)} tensors"
        counts += f" in {len(verdict.document.regions)} regions"
        told = f"{counts}; {standing(verdict.document)}"
    return _Answer(verdict.slot, verdict.good, verdict.findings, told)


def _verify(live: bool, slot: Slot) -> _Answer:
    return _answer(verify.verify_slot(slot, live=live))


def _print_answer(answer: _Answer) -> None:
    for finding in answer.findings:
        style = "bold red" if finding.level == verify.ERROR else "yellow"
        print_item(
            (f"{finding.level:7}  ", style),
            f"{printable(answer.slot)}  ",
            f"{finding.check}: {printable(finding.message)}",
        )
    if not answer.findings and answer.sum is not None:
        print_item(("ok       ", "green"), f"{printable(answer.slot)}  ", answer.sum)
