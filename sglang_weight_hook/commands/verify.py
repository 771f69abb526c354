"""``sglang-weight-hook verify``."""

from __future__ import annotations

import functools
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from typing import Annotated, Optional

import typer

from ..reader import Document, Slot, open_directory, open_file, verify
from .app import ACT, Misused, command
from .options import DirOption, JsonOption
from .render.text import print_item, print_json, printable
from .selection import is_path, slots_in, standing

_SLOTS_A_CORE = 4


@command(
    "verify",
    "sglang-weight-hook verify && echo good\n"
    "sglang-weight-hook verify 0 --json\n"
    "sglang-weight-hook verify --live",
)
def verify_(
    slot: Annotated[
        Optional[str],
        typer.Argument(
            metavar="SLOT",
            show_default=False,
            help="A slot (0, 0_draft, ...) or a saved layout file; default: all slots.",
        ),
    ] = None,
    directory: DirOption = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 3 on warnings, too, not only on errors.")
    ] = False,
    live: Annotated[
        bool,
        typer.Option("--live", help="Also have each server compare its map with its memory now."),
    ] = False,
    as_json: JsonOption = False,
) -> int:
    """Check the published files: one line for each finding.

    Checks schema, generations, overlaps, regions, sums, legacy-format files and whether the owner
    lives.  Exit status 3 if there is an error.
    """
    if slot is not None and is_path(slot):
        if live:
            raise Misused("--live asks the owner of a slot, a saved file has none; name a slot")
        verdicts = [verify.verify_file(open_file(slot))]
    elif slot is not None:
        verdicts = [verify.verify_slot(open_directory(directory).slot(slot), live=live)]
    else:
        found = open_directory(directory)
        verdicts = _verified(slots_in(found), live)
    findings = [finding for verdict in verdicts for finding in verdict.findings]
    good = not findings if strict else all(verdict.good for verdict in verdicts)
    if as_json:
        print_json(
            {
                "good": good,
                "slots": [
                    {
                        "slot": verdict.slot,
                        "good": verdict.good,
                        "findings": [finding._asdict() for finding in verdict.findings],
                    }
                    for verdict in verdicts
                ],
            }
        )
        return 0 if good else ACT
    for verdict in verdicts:
        _print_verdict(verdict)
    return 0 if good else ACT


def _verified(slots: list[Slot], live: bool) -> list[verify.Verdict]:
    """All of them; many of them on several cores, for each takes a moment."""
    cores = min(os.cpu_count() or 1, len(slots) // _SLOTS_A_CORE)
    work = functools.partial(verify.verify_slot, live=live)
    if cores < 2:
        return list(map(work, slots))
    # Forked, so that nothing is imported again; this process has one thread.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(cores, mp_context=context) as pool:
        return list(pool.map(functools.partial(_slim, live), slots))


def _slim(live: bool, slot: Slot) -> verify.Verdict:
    """A verdict that is soon handed from one process to another: of its tensors only the names."""
    verdict = verify.verify_slot(slot, live=live)
    if verdict.document is not None:
        raw = verdict.document.raw
        slim = {**raw, "tensors": dict.fromkeys(raw["tensors"]), "memory": {}}
        document = Document(slot, slim, verdict.document.state, verdict.document.is_live)
        verdict = verdict._replace(document=document)
    return verdict


def _print_verdict(verdict: verify.Verdict) -> None:
    for finding in verdict.findings:
        style = "bold red" if finding.level == verify.ERROR else "yellow"
        print_item(
            (f"{finding.level:7}  ", style),
            f"{printable(verdict.slot)}  ",
            f"{finding.check}: {printable(finding.message)}",
        )
    if not verdict.findings and verdict.document:
        counts = f"{len(verdict.document.tensors)} tensors"
        counts += f" in {len(verdict.document.regions)} regions"
        print_item(
            ("ok       ", "green"),
            f"{printable(verdict.slot)}  ",
            f"{counts}; {standing(verdict.document)}",
        )
