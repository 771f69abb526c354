"""``sglang-weight-hook lookup``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..reader import Document, Hit
from .app import ACT, Misused, command
from .options import AllowStaleOption, DirOption, JsonOption, SlotArgument
from .render.text import address_text, print_json, print_line, printable, size_text
from .selection import document_of, heading, stale_status, standing


@command(
    "lookup",
    "sglang-weight-hook lookup 0x7f3a5c000000\nsglang-weight-hook lookup 139887894528000 0 --json",
)
def lookup(
    address: Annotated[str, typer.Argument(help="The address: hexadecimal (0x...) or decimal.")],
    slot: SlotArgument = None,
    directory: DirOption = None,
    allow_stale: AllowStaleOption = False,
    as_json: JsonOption = False,
) -> int:
    """Find the tensors, and the element in each, at an address.

    Exit status 3 if no weight, LoRA buffer or KV cache buffer is there.
    """
    place = _number(address)
    document = document_of(directory, slot)
    status = stale_status(document, allow_stale)
    hits = document.lookup(place)
    region = document.region_at(place)
    buffers = [buffer for buffer in document.iter_kv_cache() if buffer.ptr <= place < buffer.end]
    found = bool(hits or region or buffers)
    if as_json:
        print_json(
            {
                **heading(document),
                "address": place,
                "tensors": [_hit(hit) for hit in hits],
                "region": region.raw if region else None,
                "kv_cache": [buffer.raw for buffer in buffers],
            }
        )
        return status if found else ACT
    for hit in hits:
        _print_hit(hit)
    for buffer in buffers:
        print_line((f"KV cache {printable(buffer.name)}", "bold"))
        print_line(f"  offset   {place - buffer.ptr} of {buffer.size} bytes")
    if region:
        print_line(
            f"region {address_text(region.ptr)}, {size_text(region.size)}, in the allocation at "
            f"{address_text(region.allocation_ptr)}, {size_text(region.allocation_size)}"
        )
    if not found:
        print_line(
            f"no published memory at {address_text(place)}; {_nearest_regions(document, place)}"
        )
    print_line(standing(document))
    return status if found else ACT


def _hit(hit: Hit) -> dict[str, Any]:
    return {
        "name": hit.tensor.name,
        "aliases": list(hit.tensor.aliases),
        "holds": hit.holds,
        "offset": hit.offset,
        "element": None if hit.element is None else list(hit.element),
        "byte": hit.byte,
        "layer": hit.tensor.layer,
        "role": hit.tensor.role,
        "tensor": hit.tensor.raw,
    }


def _print_hit(hit: Hit) -> None:
    tensor = hit.tensor
    what = [tensor.kind, tensor.role.replace("_", " "), tensor.dtype.replace("torch.", "")]
    if tensor.layer is not None:
        what.insert(1, f"layer {tensor.layer}")
    if tensor.volatile:
        what.append("volatile")
    print_line((printable(tensor.name), "bold"))
    if hit.is_unknown:
        print_line(
            "  element  unknown: dimensions overlap in too many ways, or shape and size contradict "
            "each other"
        )
    elif hit.element is None:
        print_line("  element  none: the byte lies between elements (padding)")
    else:
        text = ", ".join(map(str, hit.element))
        print_line(f"  element  [{text}], byte {hit.byte} of {tensor.itemsize}")
    print_line(f"  offset   {hit.offset} of {tensor.span} bytes")
    print_line(f"  what     {', '.join(what)}")
    for alias in tensor.aliases:
        print_line(f"  also     {printable(alias)}")


def _nearest_regions(document: Document, place: int) -> str:
    below = [region for region in document.iter_regions() if region.end <= place]
    above = [region for region in document.iter_regions() if region.ptr > place]
    texts = []
    if below:
        nearest = max(below, key=lambda region: region.end)
        texts.append(
            f"{size_text(place - nearest.end)} above the end of {address_text(nearest.ptr)}"
        )
    if above:
        nearest = min(above, key=lambda region: region.ptr)
        texts.append(f"{size_text(nearest.ptr - place)} below {address_text(nearest.ptr)}")
    return "the nearest regions: " + " and ".join(texts) if texts else "there are no regions"


def _number(text: str) -> int:
    try:
        value = int(text.replace("_", ""), 16 if text.lower().startswith("0x") else 10)
    except ValueError:
        hint = ""
        if text and all(letter in "0123456789abcdefABCDEF" for letter in text):
            hint = f"; with letters it is hexadecimal: 0x{text}"
        raise Misused(f"{text!r} is no address; give 0x... or a decimal number{hint}") from None
    if not 0 <= value < 1 << 64:
        raise Misused(f"{text} is no address: addresses are 0 to 2**64 - 1")
    return value
