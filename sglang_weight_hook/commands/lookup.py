"""``sglang-weight-hook lookup``."""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Annotated, Any, NamedTuple, Optional

import typer

from ..reader import CacheBuffer, Document, Hit, HookError, Region
from .app import ACT, NO_ANSWER, Misused, command
from .directories import directory_at
from .options import AllowStaleOption, DirOption, JsonOption, NoHeadersOption, OutputOption
from .output import asked_form
from .render.output import Form, print_answer
from .render.table import Column
from .render.text import (
    address_text,
    complain,
    print_json,
    print_line,
    printable,
    remark,
    size_text,
)
from .selection import document_of, heading, is_path, slots_in, stale_status, standing
from .slot_choice import a_slot_or_file_named

# Below it Linux maps nothing (vm.mmap_min_addr).
_FIRST_ADDRESS = 4096
_FIELDS = (
    *("address", "slot", "what", "name", "role", "layer", "dtype", "element", "token", "offset"),
    *("state", "owner_alive"),
)


class _Found(NamedTuple):
    """What one slot has at one address."""

    document: Document
    address: int
    hits: list[Hit]
    region: Optional[Region]
    buffers: list[CacheBuffer]

    @property
    def is_any(self) -> bool:
        return bool(self.hits or self.region or self.buffers)


_Addresses = Annotated[
    list[str],
    typer.Argument(
        metavar="ADDRESS",
        help="Addresses: hexadecimal (0x...) or decimal; - reads them from stdin.  A slot or a "
        "saved layout file as the last word is the same as --slot.",
    ),
]
_OneSlot = Annotated[
    Optional[str],
    typer.Option(
        "--slot",
        metavar="SLOT",
        help="Only this slot, or a saved layout file; default: all slots.",
        autocompletion=a_slot_or_file_named,
    ),
]


@command(
    "lookup",
    "sglang-weight-hook lookup 0x7f3a5c000000\n"
    "sglang-weight-hook lookup 139887894528000 139887894529024 --slot 0\n"
    "grep -o '0x[0-9a-f]*' faults.log | sglang-weight-hook lookup - -o csv",
)
def lookup(
    addresses: _Addresses,
    slot: _OneSlot = None,
    directory: DirOption = None,
    output: OutputOption = None,
    no_headers: NoHeadersOption = False,
    allow_stale: AllowStaleOption = False,
    as_json: JsonOption = False,
) -> int:
    """Find which tensor, and which element of it, is at an address.

    In the KV cache it finds buffer, layer and token (index along the first dimension).
    Exit status 3 if nothing published is at one of the addresses.
    """
    form = asked_form(output, as_json, no_headers)
    named, slot = _without_slot(addresses, slot, directory)
    places = [_number(text) for text in _words(named)]
    if not places:
        raise Misused("stdin has no address; give one a word: 0x... or a decimal number")
    looked = _documents(directory, slot, places)
    documents = looked.documents
    if not documents and looked.left_out:
        return NO_ANSWER
    answers = {place: [_found(document, place) for document in documents] for place in places}
    told = [found for one in answers.values() for found in one if found.is_any or looked.of == 1]
    # A slot without a part in the answer need not be good for it.
    concerned = {id(found.document): found.document for found in told}
    asked = list(concerned.values()) or documents
    status = max((stale_status(document, allow_stale) for document in asked), default=0)
    if looked.is_partial or not all(any(found.is_any for found in one) for one in answers.values()):
        status = ACT
    if form.is_json and len(places) == 1 and looked.of == 1:
        print_json(_as_json(told[0]))
    elif form.is_json:
        print_json(
            {
                "addresses": [
                    {
                        "address": place,
                        "found": any(found.is_any for found in one),
                        "slots": [_as_json(found) for found in one if found.is_any],
                    }
                    for place, one in answers.items()
                ]
            }
        )
    elif output is not None:
        _print_records(form, told, answers)
    else:
        for place, one in answers.items():
            _print_answers(place, one, len(places) > 1, looked.of)
        for document in asked:
            remark(standing(document))
    return status


def _print_records(form: Form, told: list[_Found], answers: dict[int, list[_Found]]) -> None:
    records = [record for found in told for record in _records(found)]
    columns = [
        *(Column("address"), Column("slot"), Column("role", drop=2)),
        *(Column("layer", right=True, drop=1), Column("dtype", drop=4)),
        *(Column("at", drop=3), Column("name")),
    ]
    print_answer(form, columns, [_row(record) for record in records], records, _FIELDS)
    for place, one in answers.items():
        if not any(found.is_any for found in one):
            remark(f"no published memory at {address_text(place)}")


def _without_slot(
    given: list[str], slot: Optional[str], directory: Optional[str]
) -> tuple[list[str], Optional[str]]:
    """The addresses, and the slot that may stand behind them.

    A small number there is a slot's name, for no process has anything at such an address.
    """
    if slot is not None or len(given) < 2:
        return given, slot
    last = given[-1]
    if is_path(last) or (last.isdecimal() and len(last) <= 4 and int(last) < _FIRST_ADDRESS):
        return given[:-1], last
    try:
        names = {each.name for each in directory_at(directory).slots()}
    except HookError:
        names = set()
    if last in names:
        return given[:-1], last
    try:
        _number(last)
    except Misused:
        if last != "-" and not last.lower().startswith("0x"):
            return given[:-1], last  # no such slot, which is said then
        raise
    return given, None


def _words(given: list[str]) -> list[str]:
    words: list[str] = []
    for word in given:
        words += sys.stdin.read().split() if word == "-" else [word]
    return list(dict.fromkeys(words))


class _Looked(NamedTuple):
    """What is looked into."""

    documents: list[Document]  # of those slots in which something may be
    of: int  # how many slots there are
    left_out: int = 0  # of which there is no document
    is_partial: bool = False  # what some of these have, nobody says


def _documents(directory: Optional[str], slot: Optional[str], places: Collection[int]) -> _Looked:
    """Of the slot, or of every slot; one that cannot be read is named and stops no other."""
    if slot is not None:
        return _Looked([document_of(directory, slot)], 1)
    found = directory_at(directory)
    slots = slots_in(found)
    if len(slots) == 1:
        return _Looked([slots[0].read()], 1)
    documents, left_out, is_partial = [], 0, False
    for each in found.slots_at(places):
        try:
            documents.append(each.read(2.0))
        except HookError as error:
            complain(f"slot {each.name} in {each.directory} is left out: {error}")
            left_out += 1
            is_partial = is_partial or each.is_remote
    return _Looked(documents, len(slots), left_out, is_partial)


def answer_at(document: Document, place: int) -> Optional[dict[str, Any]]:
    """What the document has at an address, as `lookup --json` prints it; None: nothing."""
    found = _found(document, place)
    return _as_json(found) if found.is_any else None


def _found(document: Document, place: int) -> _Found:
    buffers = [buffer for buffer in document.iter_kv_cache() if buffer.ptr <= place < buffer.end]
    return _Found(document, place, document.lookup(place), document.region_at(place), buffers)


def _token(buffer: CacheBuffer, place: int) -> Optional[int]:
    """The index along the first dimension; None where the buffer is not without gaps."""
    length = buffer.shape[0] if buffer.shape else 0
    if length <= 0 or buffer.size % length:
        return None
    return (place - buffer.ptr) // (buffer.size // length)


def _as_json(found: _Found) -> dict[str, Any]:
    return {
        **heading(found.document),
        "address": found.address,
        "tensors": [_hit(hit) for hit in found.hits],
        "region": found.region.raw if found.region else None,
        "kv_cache": [
            {**buffer.raw, "token": _token(buffer, found.address)} for buffer in found.buffers
        ],
    }


def _records(found: _Found) -> list[dict[str, Any]]:
    """One for each tensor or buffer at the address."""
    top = heading(found.document)
    shared = {
        "address": found.address,
        **{name: top[name] for name in ("slot", "state", "owner_alive")},
    }
    return [
        {
            **shared,
            "what": "tensor",
            "name": hit.tensor.name,
            "role": hit.tensor.role,
            "layer": hit.tensor.layer,
            "dtype": hit.tensor.dtype,
            "element": None if hit.element is None else list(hit.element),
            "token": None,
            "offset": hit.offset,
        }
        for hit in found.hits
    ] + [
        {
            **shared,
            "what": "kv_cache",
            "name": buffer.name,
            "role": buffer.role,
            "layer": buffer.layer,
            "dtype": buffer.dtype,
            "element": None,
            "token": _token(buffer, found.address),
            "offset": found.address - buffer.ptr,
        }
        for buffer in found.buffers
    ]


def _row(record: dict[str, Any]) -> list[str]:
    at = "-" if record["element"] is None else str(record["element"])
    if record["token"] is not None:
        at = f"token {record['token']}"
    return [
        address_text(record["address"]),
        record["slot"],
        record["role"] or "-",
        "-" if record["layer"] is None else str(record["layer"]),
        record["dtype"].replace("torch.", ""),
        at,
        ("KV cache " if record["what"] == "kv_cache" else "") + record["name"],
    ]


def _print_answers(place: int, answers: list[_Found], with_address: bool, of: int) -> None:
    """What every slot has at an address, for people."""
    if with_address:
        print_line((address_text(place), "bold"))
    for found in answers:
        if not found.is_any:
            continue
        if of > 1:
            print_line(f"slot {printable(found.document.slot.name)}")
        for hit in found.hits:
            _print_hit(hit)
        for buffer in found.buffers:
            _print_buffer(buffer, place)
        if found.region:
            region = found.region
            print_line(
                f"region {address_text(region.ptr)}, {size_text(region.size)}, in the allocation "
                f"at {address_text(region.allocation_ptr)}, {size_text(region.allocation_size)}"
            )
    if not any(found.is_any for found in answers):
        near = (
            f"; {_nearest_regions(answers[0].document, place)}"
            if of == 1
            else f" in any of {of} slots"
        )
        print_line(f"no published memory at {address_text(place)}{near}")


def _print_buffer(buffer: CacheBuffer, place: int) -> None:
    print_line((f"KV cache {printable(buffer.name)}", "bold"))
    token = _token(buffer, place)
    if token is not None:
        print_line(f"  token    {token} of {buffer.shape[0]}")
    what = [] if buffer.layer is None else [f"layer {buffer.layer}"]
    what += [buffer.role] if buffer.role else []
    what.append(buffer.dtype.replace("torch.", ""))
    print_line(f"  offset   {place - buffer.ptr} of {buffer.size} bytes")
    print_line(f"  what     {', '.join(what)}")


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
