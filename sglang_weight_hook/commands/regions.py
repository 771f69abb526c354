"""``sglang-weight-hook regions``."""

from __future__ import annotations

from .app import command
from .options import AllowStaleOption, DirOption, JsonOption, SlotArgument
from .render.table import Column, print_table
from .render.text import address_text, print_json, print_line, printable, size_text
from .selection import document_of, heading, stale_status, standing


@command("regions", "sglang-weight-hook regions\nsglang-weight-hook regions 0 --json")
def regions(
    slot: SlotArgument = None,
    directory: DirOption = None,
    allow_stale: AllowStaleOption = False,
    as_json: JsonOption = False,
) -> int:
    """List the regions to register, each inside one allocation."""
    document = document_of(directory, slot)
    status = stale_status(document, allow_stale)
    found = list(document.iter_regions())
    if as_json:
        print_json({**heading(document), "regions": document.regions})
        return status
    print_table(
        [
            Column("address"),
            Column("size", right=True),
            Column("allocation"),
            Column("of", right=True),
            Column("kind", drop=2),
            Column("device", drop=3),
            Column("tensors", right=True),
            Column("first", drop=1),
        ],
        [
            [
                address_text(region.ptr),
                size_text(region.size),
                address_text(region.allocation_ptr),
                size_text(region.allocation_size),
                region.allocation_kind or region.allocation_source,
                region.device,
                str(len(region.tensors)),
                printable(region.tensors[0]) if region.tensors else "-",
            ]
            for region in found
        ],
    )
    total = sum(region.size for region in found)
    print_line(f"{len(found)} regions, {size_text(total)}; {standing(document)}")
    return status
