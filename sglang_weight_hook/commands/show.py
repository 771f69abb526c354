"""``sglang-weight-hook show``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Optional

import typer

from ..reader import ROLES, Tensor
from .app import Misused, command
from .options import AllowStaleOption, DirOption, JsonOption, MatchOption, SlotArgument
from .render.table import Column, print_table
from .render.text import address_text, print_json, print_line, printable, size_text
from .selection import document_of, heading, is_like, stale_status, standing

_ORDERS: dict[Optional[str], Callable[[Tensor], Any]] = {
    "name": lambda tensor: tensor.name,
    "address": lambda tensor: (tensor.ptr, tensor.name),
    "size": lambda tensor: (-tensor.size, tensor.name),
}


@command(
    "show",
    "sglang-weight-hook show\n"
    "sglang-weight-hook show 0 --sort size --top 10\n"
    "sglang-weight-hook show --match 'model.layers.3.*' --json",
)
def show(
    slot: SlotArgument = None,
    directory: DirOption = None,
    sort: Annotated[
        Optional[str],
        typer.Option(
            help="Order by name, address or size (largest first); default: the model's order.",
            metavar="KEY",
        ),
    ] = None,
    match: MatchOption = None,
    role: Annotated[
        Optional[str],
        typer.Option(help=f"Only tensors of this role: {', '.join(ROLES)}.", metavar="ROLE"),
    ] = None,
    layer: Annotated[
        Optional[int], typer.Option(help="Only tensors of layer N.", metavar="N")
    ] = None,
    top: Annotated[
        Optional[int], typer.Option(help="Only the first N tensors.", metavar="N", min=1)
    ] = None,
    allow_stale: AllowStaleOption = False,
    as_json: JsonOption = False,
) -> int:
    """List the tensors of a slot: address, size, type, shape, name."""
    if sort not in (None, *_ORDERS):
        raise Misused(f"--sort {sort} is not known; give name, address or size")
    if role not in (None, *ROLES):
        raise Misused(f"--role {role} is not known; give one of {', '.join(ROLES)}")
    document = document_of(directory, slot)
    status = stale_status(document, allow_stale)
    every = list(document.iter_tensors())
    chosen = [
        tensor
        for tensor in every
        if (match is None or any(is_like(name, match) for name in (tensor.name, *tensor.aliases)))
        and (role is None or tensor.role == role)
        and (layer is None or tensor.layer == layer)
    ]
    if sort:
        chosen.sort(key=_ORDERS[sort])
    if top is not None:
        chosen = chosen[:top]
    summed = _sums(chosen, len(every))
    if as_json:
        entries = {
            tensor.name: {**tensor.raw, "layer": tensor.layer, "role": tensor.role}
            for tensor in chosen
        }
        print_json({**heading(document), "tensors": entries, "total": summed})
        return status
    _print_tensors(chosen)
    count = f"{len(chosen)} of {len(every)}" if len(chosen) < len(every) else f"{len(chosen)}"
    print_line(
        f"{count} tensors, {size_text(summed['bytes'])} in storages of "
        f"{size_text(summed['storage_bytes'])}; {standing(document)}"
    )
    return status


def _sums(chosen: list[Tensor], of: int) -> dict[str, int]:
    return {
        "tensors": len(chosen),
        "of": of,
        "bytes": sum(tensor.size for tensor in chosen),
        "storage_bytes": sum(
            {t.storage_ptr: t.storage_size for t in chosen if t.storage_ptr}.values()
        ),
    }


def _print_tensors(chosen: list[Tensor]) -> None:
    print_table(
        [
            Column("address"),
            Column("size", right=True),
            Column("type", drop=2),
            Column("shape", drop=1),
            Column("name"),
        ],
        [
            [
                address_text(tensor.ptr) if tensor.ptr else "-",
                size_text(tensor.size),
                tensor.dtype.replace("torch.", ""),
                "x".join(map(str, tensor.shape)) or "scalar",
                printable(tensor.name) + (f"  (on {tensor.device})" if not tensor.resident else ""),
            ]
            for tensor in chosen
        ],
    )
