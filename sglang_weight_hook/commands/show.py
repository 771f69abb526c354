"""``sglang-weight-hook show``."""

from __future__ import annotations

import glob
from collections.abc import Callable
from typing import Annotated, Any, Optional

import typer

from ..reader import ROLES, Tensor
from .app import Misused, command
from .options import (
    AllowStaleOption,
    DirOption,
    JsonOption,
    MatchOption,
    NoHeadersOption,
    OutputOption,
    SlotArgument,
)
from .output import asked_form
from .render.output import Form, print_answer
from .render.table import Column
from .render.text import address_text, print_json, remark, size_text
from .selection import document_of, heading, is_wanted, stale_status, standing
from .slot_choice import one_of

_ORDERS: dict[Optional[str], Callable[[Tensor], Any]] = {
    "name": lambda tensor: tensor.name,
    "address": lambda tensor: (tensor.ptr, tensor.name),
    "size": lambda tensor: (-tensor.size, tensor.name),
}
_GROUPS: dict[str, Callable[[Tensor], Any]] = {
    "role": lambda tensor: tensor.role,
    "layer": lambda tensor: tensor.layer,
    "dtype": lambda tensor: tensor.dtype,
}
# Of a record of csv, tsv or parquet.
_FIELDS = (
    *("name", "ptr", "size", "span", "device", "dtype", "shape", "stride", "kind", "role", "layer"),
    *("resident", "volatile", "storage_ptr", "storage_size", "storage_offset", "aliases"),
)


_Sort = Annotated[
    Optional[str],
    typer.Option(
        help="Order by name, address or size (largest first); default: the model's order.",
        metavar="KEY",
        autocompletion=one_of(("name", "address", "size")),
    ),
]
_Role = Annotated[
    Optional[str],
    typer.Option(
        help=f"Only tensors of this role: {', '.join(ROLES)}.",
        metavar="ROLE",
        autocompletion=one_of(ROLES),
    ),
]
_Layer = Annotated[Optional[int], typer.Option(help="Only tensors of layer N.", metavar="N")]
_Top = Annotated[Optional[int], typer.Option(help="Only the first N tensors.", metavar="N", min=1)]
_By = Annotated[
    Optional[str],
    typer.Option(
        help="Only the sums for each KEY: role, layer or dtype.",
        metavar="KEY",
        autocompletion=one_of(_GROUPS),
    ),
]


@command(
    "show",
    "sglang-weight-hook show\n"
    "sglang-weight-hook show 0 --sort size --top 10\n"
    "sglang-weight-hook show --match layers.3. -o csv\n"
    "sglang-weight-hook show --by layer",
)
def show(
    slot: SlotArgument = None,
    directory: DirOption = None,
    sort: _Sort = None,
    match: MatchOption = None,
    role: _Role = None,
    layer: _Layer = None,
    top: _Top = None,
    by: _By = None,
    output: OutputOption = None,
    no_headers: NoHeadersOption = False,
    allow_stale: AllowStaleOption = False,
    as_json: JsonOption = False,
) -> int:
    """List the tensors of a slot: address, size, type, shape, name.

    A terminal that is too narrow leaves out type, then shape, and cuts long names in their middle;
    -o wide shows all.  A storage that several tensors share counts once in the sums.
    """
    if sort not in (None, *_ORDERS):
        raise Misused(f"--sort {sort} is not known; give name, address or size")
    if role not in (None, *ROLES):
        raise Misused(f"--role {role} is not known; give one of {', '.join(ROLES)}")
    if by not in (None, *_GROUPS):
        raise Misused(f"--by {by} is not known; give one of {', '.join(_GROUPS)}")
    form = asked_form(output, as_json, no_headers)
    document = document_of(directory, slot)
    status = stale_status(document, allow_stale)
    every = list(document.iter_tensors())
    chosen = _chosen(every, match, role, layer)
    if sort:
        chosen.sort(key=_ORDERS[sort])
    chosen = chosen[:top]
    summed = _sums(chosen, len(every))
    groups = None if by is None else _grouped(chosen, by)
    if form.is_json and groups is not None:
        print_json({**heading(document), "by": by, "groups": groups, "total": summed})
        return status
    if form.is_json:
        entries = {
            tensor.name: {**tensor.raw, "layer": tensor.layer, "role": tensor.role}
            for tensor in chosen
        }
        print_json({**heading(document), "tensors": entries, "total": summed})
        return status
    if by is not None and groups is not None:
        _print_groups(form, by, groups)
    else:
        _print_tensors(form, chosen)
    count = f"{len(chosen)} of {len(every)}" if len(chosen) < len(every) else f"{len(chosen)}"
    remark(
        f"{count} tensors, {size_text(summed['bytes'])} in storages of "
        f"{size_text(summed['storage_bytes'])}; {standing(document)}"
    )
    if every and not chosen:
        remark(_why_none(every, match))
    return status


def _chosen(
    every: list[Tensor], match: Optional[str], role: Optional[str], layer: Optional[int]
) -> list[Tensor]:
    return [
        tensor
        for tensor in every
        if is_wanted(tensor, match)
        and (role is None or tensor.role == role)
        and (layer is None or tensor.layer == layer)
    ]


def _why_none(every: list[Tensor], match: Optional[str]) -> str:
    """Why no tensor is listed, and what to ask for instead."""
    if match is None or any(is_wanted(tensor, match) for tensor in every):
        return (
            "no tensor is of the role, layer and name asked for; `--by role` and `--by layer` list "
            "what there is"
        )
    wider = f"*{match.strip('*')}*"
    if glob.has_magic(match) and any(is_wanted(tensor, wider) for tensor in every):
        hint = f"a pattern is for the whole name: --match '{wider}' finds some"
    else:
        hint = "upper and lower case differ; `sglang-weight-hook show` lists all"
    return f"no tensor has a name like {match}; {hint}"


def _sums(chosen: list[Tensor], of: int) -> dict[str, int]:
    return {
        "tensors": len(chosen),
        "of": of,
        "bytes": sum(tensor.size for tensor in chosen),
        "storage_bytes": sum(
            {t.storage_ptr: t.storage_size for t in chosen if t.storage_ptr}.values()
        ),
    }


def _grouped(chosen: list[Tensor], by: str) -> list[dict[str, Any]]:
    """The sums of the tensors that have a role, layer or dtype in common.

    Roles and dtypes with most bytes first, layers by number; a storage that two groups share is in
    the sums of both.
    """
    groups: dict[Any, list[Tensor]] = {}
    for tensor in chosen:
        groups.setdefault(_GROUPS[by](tensor), []).append(tensor)
    sums = [
        {by: value, **{name: number for name, number in _sums(group, 0).items() if name != "of"}}
        for value, group in groups.items()
    ]
    if by == "layer":
        return sorted(sums, key=lambda one: (one[by] is None, one[by] or 0))
    return sorted(sums, key=lambda one: (-one["bytes"], str(one[by])))


def _print_groups(form: Form, by: str, groups: list[dict[str, Any]]) -> None:
    columns = [
        Column(by, right=by == "layer"),
        Column("tensors", right=True),
        Column("size", right=True),
        Column("storage size", right=True),
    ]
    rows = [
        [
            "-" if one[by] is None else str(one[by]),
            str(one["tensors"]),
            size_text(one["bytes"]),
            size_text(one["storage_bytes"]),
        ]
        for one in groups
    ]
    print_answer(form, columns, rows, groups, (by, "tensors", "bytes", "storage_bytes"))


def _print_tensors(form: Form, chosen: list[Tensor]) -> None:
    columns = [
        Column("address"),
        Column("size", right=True),
        Column("type", drop=2),
        Column("shape", drop=1),
        Column("name"),
    ]
    rows = [
        [
            address_text(tensor.ptr) if tensor.ptr else "-",
            size_text(tensor.size),
            tensor.dtype.replace("torch.", ""),
            "x".join(map(str, tensor.shape)) or "scalar",
            tensor.name + (f"  (on {tensor.device})" if not tensor.resident else ""),
        ]
        for tensor in chosen
    ]
    records = [{field: getattr(tensor, field) for field in _FIELDS} for tensor in chosen]
    print_answer(form, columns, rows, records, _FIELDS)
