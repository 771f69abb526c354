"""``sglang-weight-hook compare``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated, Any, Optional

import typer

from ..memory.compare import DIFFERENT, ONLY_ONE, ONLY_OTHER, Finding, compare_sources
from ..memory.sources import FileSource, Pair, SlotSource, Source, saved_source, slots_of
from ..reader import HookError
from .app import ACT, Misused, command
from .options import DirOption, JsonOption, MatchOption, ViaOption
from .render.table import Column, print_table
from .render.text import complain, print_json, print_line, printable
from .selection import heading, is_like

_LISTED = 20

_Addresses = Annotated[
    Optional[list[str]],
    typer.Option(
        "--address",
        metavar="HOST[:PORT]",
        help="With --via mooncake: where the mooncake of A's server is reached, instead of where "
        "it has published; given twice, the second is for B's server.",
    ),
]


@command(
    "compare",
    "sglang-weight-hook compare 0 model.safetensors\n"
    "sglang-weight-hook compare /maps/replica1 /maps/replica2\n"
    "sglang-weight-hook compare before.safetensors after.safetensors --json",
)
def compare(
    one: Annotated[
        str,
        typer.Argument(
            metavar="A",
            help="A slot, DIR:SLOT, a server's output directory (its slots with those of the same "
            "names), a .safetensors file, an index, or a folder of such files.",
        ),
    ],
    other: Annotated[
        str, typer.Argument(metavar="B", help="What to compare A with: any of the same kinds.")
    ],
    directory: DirOption = None,
    match: MatchOption = None,
    everything: Annotated[
        bool,
        typer.Option("--all", help=f"List all tensors that differ, not only the first {_LISTED}."),
    ] = False,
    via: ViaOption = None,
    address: _Addresses = None,
    as_json: JsonOption = False,
) -> int:
    """Compare the bytes of two sets of weights.

    Tells of each tensor that differs how many elements do, the first one's index and the largest
    difference.  Exit status 0 if all are equal, 3 if not.
    """
    found: dict[str, list[Finding]] = {}
    described: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        for pair in _pairs(one, other, directory, via, _both(address or []), stack):
            described[pair.label] = {"one": _heading(pair.one), "other": _heading(pair.other)}
            _tell_left_out(pair)
            found[pair.label] = list(
                compare_sources(
                    pair.one, pair.other, lambda name: match is None or is_like(name, match)
                )
            )
    if not any(found.values()):
        raise HookError(f"{one} and {other} have no tensor to be compared; see --match")
    equal = all(finding.is_equal for each in found.values() for finding in each)
    status = 0 if equal else ACT
    if as_json:
        pairs = [{**_as_dict(label, each), **described[label]} for label, each in found.items()]
        print_json({"equal": equal, "pairs": pairs})
        return status
    for label, findings in found.items():
        _print_findings(label if len(found) > 1 else "", findings, everything)
    return status


def _pairs(
    one: str,
    other: str,
    directory: Optional[str],
    via: Optional[str],
    addresses: tuple[Optional[str], Optional[str]],
    stack: contextlib.ExitStack,
) -> Iterator[Pair]:
    """What is compared with what; closed with ``stack``, and one after the other."""
    mine, yours = slots_of(one, directory), slots_of(other, directory)
    if mine is not None and yours is not None and (len(mine) > 1 or len(yours) > 1):
        if mine.keys() != yours.keys():
            apart = ", ".join(sorted(mine.keys() ^ yours.keys()))
            raise HookError(f"{one} and {other} have not the same slots ({apart}); name two slots")
        for name in mine:
            with (
                contextlib.closing(SlotSource(mine[name], via, addresses[0])) as a,
                contextlib.closing(SlotSource(yours[name], via, addresses[1])) as b,
            ):
                yield Pair(f"slot {name}", a, b)
        return
    opened: list[Any] = []
    for word, slots, address in ((one, mine, addresses[0]), (other, yours, addresses[1])):
        if slots is not None and len(slots) > 1:
            raise HookError(
                f"{word} has slots {', '.join(slots)}; name one of them: {word}:{next(iter(slots))}"
            )
        source: Source = (
            saved_source(word)
            if slots is None
            else SlotSource(next(iter(slots.values())), via, address)
        )
        opened.append(stack.enter_context(contextlib.closing(source)))
    yield Pair("", *opened)


def _both(addresses: list[str]) -> tuple[Optional[str], Optional[str]]:
    """A's address and B's."""
    if len(addresses) > 2:
        raise Misused("--address is given more than twice; give it once for A and once for B")
    one, other, *_ = [*addresses, None, None]
    return one, other


def _print_findings(label: str, findings: list[Finding], everything: bool) -> None:
    different = [finding for finding in findings if not finding.is_equal]
    shown = different if everything else different[:_LISTED]
    if shown:
        print_table(
            [
                Column("elements", right=True),
                Column("first"),
                Column("largest", right=True),
                Column("relative", right=True),
                Column("name"),
            ],
            [_row(finding) for finding in shown],
        )
    if len(shown) < len(different):
        complain(f"{len(different) - len(shown)} more differ (--all lists them)")
    before = f"{label}: " if label else ""
    equal = len(findings) - len(different)
    if different:
        words = (f"{len(different)} of {len(findings)} tensors differ", "bold red")
        print_line(before, words)
        _tell_names(before, findings)
    else:
        print_line(before, ("equal", "bold green"), f": {equal} tensors")


def _tell_names(before: str, findings: list[Finding]) -> None:
    """How many names are on both sides, where not all are."""
    here, there = (sum(f.verdict == kind for f in findings) for kind in (ONLY_ONE, ONLY_OTHER))
    if here or there:
        complain(
            f"{before}{len(findings) - here - there} names are on both sides, {here} only in the "
            f"first, {there} only in the second"
        )
    if here and there:
        complain(
            "SGLang fuses tensors under names of its own (qkv_proj, gate_up_proj): compare with "
            "what `save` has written rather than with a checkpoint"
        )


def _tell_left_out(pair: Pair) -> None:
    for which, source in (("first", pair.one), ("second", pair.other)):
        if source.left_out:
            name, why = next(iter(source.left_out.items()))
            complain(
                f"{len(source.left_out)} tensors of the {which} are not compared, such as "
                f"{printable(name)}: {printable(why)}"
            )


def _heading(source: Source) -> dict[str, Any]:
    """Which weights these are: of which slot and generations, or of which file."""
    if isinstance(source, SlotSource):
        return {"directory": source.document.slot.directory, **heading(source.document)}
    assert isinstance(source, FileSource)
    names = ("slot", "instance", "layout_generation", "content_generation", "saved_at")
    return {"path": source.label, **{name: source.metadata.get(name) for name in names}}


def _row(finding: Finding) -> list[str]:
    name = printable(finding.name)
    if finding.verdict != DIFFERENT:
        note = f": {finding.note}" if finding.note else ""
        return ["-", "-", "-", "-", f"{name}  ({finding.verdict}{note})"]
    return [
        f"{finding.elements} of {finding.of}",
        "[" + ", ".join(map(str, finding.first or ())) + "]",
        _number(finding.largest),
        _number(finding.largest_relative),
        name,
    ]


def _number(value: Optional[float]) -> str:
    return "-" if value is None else f"{value:.3g}"


def _as_dict(label: str, findings: list[Finding]) -> dict[str, Any]:
    return {
        "pair": label,
        "tensors": len(findings),
        "different": [finding._asdict() for finding in findings if not finding.is_equal],
    }
