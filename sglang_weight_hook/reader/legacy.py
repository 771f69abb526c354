"""Whether the files in the legacy format agree with the layout beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from operator import itemgetter
from typing import Any

from ..layout import files
from ..layout.documents import GIB
from .document import Document
from .findings import ERROR, Remark, Unreadable, limited
from .tensors import Tensor


def legacy_files(document: Document, contents: Mapping[str, Any]) -> Iterator[Remark]:
    name_of = document.slot.name
    for name, content in contents.items():
        if isinstance(content, Unreadable):
            yield ERROR, "files", f"{name.format(name_of)} cannot be read: {content.reason}"
            return
        # The summary is of the last update, and there may have been none.
        if content is None and name != files.SUMMARY:
            yield ERROR, "files", f"{name.format(name_of)} is missing"
            return
    meta = contents[files.WEIGHTS_META]
    try:
        if not _is_the_same(document, meta):
            yield from limited("files", _weights_meta(document, meta))
        sums: dict[str, int] = {}
        for entry in meta.values():
            sums[entry["device"]] = sums.get(entry["device"], 0) + entry["size"]
        totals = {device: size / GIB for device, size in sums.items()}
        if contents[files.TOTAL_META] != totals:
            yield ERROR, "files", "total_weight_meta is not the sum of weights_meta"
        summary = contents[files.SUMMARY]
        if summary is not None and (
            summary["total_weights"] != len(meta) or summary["device_weight_summary"] != totals
        ):
            yield ERROR, "files", "weight_update_summary does not agree with weights_meta"
        merged = [
            (entry["ptr"], entry["size"], entry["device"], tuple(entry["weights"]))
            for entry in contents[files.MERGED]
        ]
    except (AttributeError, KeyError, TypeError) as error:
        yield ERROR, "files", f"a file has not its format: {type(error).__name__}: {error}"
        return
    regions = document.regions  # each was looked at before
    if merged != [(r["ptr"], r["size"], r["device"], tuple(r.get("tensors", ()))) for r in regions]:
        yield ERROR, "files", "merged_weights_meta does not agree with the layout's regions"


_FIELDS = ("ptr", "size", "device", "dtype", "shape")


def _is_the_same(document: Document, meta: Mapping[str, Any]) -> bool:
    """Whether `_weights_meta` has nothing to say, asked of all tensors at once."""
    tensors, fields = document.tensors, itemgetter(*_FIELDS)
    try:
        return list(map(fields, meta.values())) == [fields(tensors[name]) for name in meta] and all(
            name in meta
            for name, tensor in tensors.items()
            if tensor["kind"] == "parameter" and tensor["resident"]
        )
    except (AttributeError, KeyError, TypeError):
        return False  # for example a name that is an alias in the layout


def _weights_meta(document: Document, meta: Mapping[str, Any]) -> Iterator[Remark]:
    by_name: dict[str, Tensor] = {}
    for tensor in document.iter_tensors():
        by_name.update(dict.fromkeys(tensor.aliases, tensor))
    for tensor in document.iter_tensors():
        by_name[tensor.name] = tensor
        if tensor.kind == "parameter" and tensor.resident and tensor.name not in meta:
            yield ERROR, "files", f"weights_meta lacks {tensor.name}"
    for name, entry in meta.items():
        found = by_name.get(name)
        if found is None:
            yield ERROR, "files", f"weights_meta has {name}, which is no tensor of the layout"
            continue
        for field in _FIELDS:
            if entry[field] != found.raw.get(field):
                yield (
                    ERROR,
                    "files",
                    f"{name}: {field} is {entry[field]} in weights_meta and "
                    f"{found.raw.get(field)} in the layout",
                )
