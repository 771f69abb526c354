"""``sglang-weight-hook regions``."""

from __future__ import annotations

from .app import command
from .options import (
    AllowStaleOption,
    DirOption,
    JsonOption,
    NoHeadersOption,
    OutputOption,
    SlotArgument,
)
from .output import asked_form
from .render.output import print_answer
from .render.table import Column
from .render.text import address_text, print_json, remark, size_text
from .selection import document_of, heading, stale_status, standing

# Of a record of csv, tsv or parquet.
_FIELDS = (
    *("ptr", "size", "device", "allocation_ptr", "allocation_size", "allocation_source"),
    *("allocation_kind", "tensors"),
)


@command("regions", "sglang-weight-hook regions\nsglang-weight-hook regions 0 --json")
def regions(
    slot: SlotArgument = None,
    directory: DirOption = None,
    output: OutputOption = None,
    no_headers: NoHeadersOption = False,
    allow_stale: AllowStaleOption = False,
    as_json: JsonOption = False,
) -> int:
    """List the memory regions of the weights, to be registered.

    A region is a run of weights without gaps inside one allocation, for RDMA or IPC.
    """
    form = asked_form(output, as_json, no_headers)
    document = document_of(directory, slot)
    status = stale_status(document, allow_stale)
    found = list(document.iter_regions())
    if form.is_json:
        print_json({**heading(document), "regions": document.regions})
        return status
    print_answer(
        form,
        [
            Column("address"),
            Column("size", right=True),
            Column("allocation"),
            Column("allocation size", right=True),
            Column("kind", drop=2),
            Column("device", drop=3),
            Column("tensors", right=True),
            Column("first tensor", drop=1),
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
                region.tensors[0] if region.tensors else "-",
            ]
            for region in found
        ],
        [{field: getattr(region, field) for field in _FIELDS} for region in found],
        _FIELDS,
    )
    total = sum(region.size for region in found)
    remark(f"{len(found)} regions, {size_text(total)}; {standing(document)}")
    return status
