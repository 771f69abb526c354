"""``sglang-weight-hook checksum``."""

from __future__ import annotations

from typing import Optional

from ..memory import sums
from ..reader import Document, Tensor
from .app import ACT, command
from .options import (
    AddressOption,
    DirOption,
    JsonOption,
    MatchOption,
    NoHeadersOption,
    OutputOption,
    SlotArgument,
    ViaOption,
)
from .output import asked_form
from .render.output import Form, print_answer
from .render.table import Column
from .render.text import complain, print_json, remark, size_text
from .selection import document_of, heading, is_wanted, standing


@command(
    "checksum",
    "sglang-weight-hook checksum\n"
    "sglang-weight-hook checksum 0 --match '*.layers.3.*' --json\n"
    "sglang-weight-hook checksum -o csv > sums.csv",
)
def checksum(
    slot: SlotArgument = None,
    directory: DirOption = None,
    match: MatchOption = None,
    via: ViaOption = None,
    address: AddressOption = None,
    output: OutputOption = None,
    no_headers: NoHeadersOption = False,
    as_json: JsonOption = False,
) -> int:
    """Read a server's weights and print a checksum of each tensor.

    The checksum is the one that a server started with SGLANG_WEIGHT_HOOK_CHECKSUM=1 publishes
    itself (docs/format.md).  Exit status 3 if the server has published another one for the same
    contents.
    """
    form = asked_form(output, as_json, no_headers)
    document = document_of(directory, slot)
    published = document.raw.get("checksums") or {}
    comparable = (
        published.get("algorithm") == sums.ALGORITHM
        and published.get("content_generation") == document.content_generation
    )
    chosen = [tensor for tensor in document.iter_tensors() if is_wanted(tensor, match)]
    left_out = [tensor.name for tensor in chosen if not tensor.resident or tensor.volatile]
    rows = _summed(document, [each for each in chosen if each.name not in left_out], via, address)
    wrong = [
        tensor.name
        for tensor, found in rows
        if comparable and tensor.checksum is not None and tensor.checksum != found
    ]
    status = ACT if wrong else 0
    if form.is_json:
        print_json(
            {
                **heading(document),
                "algorithm": sums.ALGORITHM,
                "checksums": {tensor.name: found for tensor, found in rows},
                "left_out": left_out,
                "differ_from_published": wrong,
            }
        )
        return status
    _print_rows(form, rows, wrong)
    if left_out:
        remark(
            f"{len(left_out)} tensors are left out, whose contents change on the way of a request "
            f"or are not on the device: {', '.join(left_out[:3])}"
        )
    for name in wrong:
        complain(f"{name} is not what the server has published a checksum of")
    remark(f"{len(rows)} tensors, {sums.ALGORITHM}; {standing(document)}")
    return status


def _print_rows(form: Form, rows: list[tuple[Tensor, str]], wrong: list[str]) -> None:
    print_answer(
        form,
        [Column("checksum"), Column("size", right=True), Column("name")],
        [[found, size_text(tensor.size), tensor.name] for tensor, found in rows],
        [
            {
                "name": tensor.name,
                "size": tensor.size,
                "checksum": found,
                "differs_from_published": tensor.name in wrong,
            }
            for tensor, found in rows
        ],
        ("name", "size", "checksum", "differs_from_published"),
    )


def _summed(
    document: Document, chosen: list[Tensor], via: Optional[str], address: Optional[str]
) -> list[tuple[Tensor, str]]:
    with document.open_memory(via=via, address=address) as memory:
        rows = [(each, sums.checksum(memory.pieces(each.name))) for each in chosen]
        memory.check()  # all of them are of one generation
    return rows
