"""The command ``sglang-weight-hook``: what the reader finds, for people and for scripts.

Exit status of every command: 0, or 1 with one sentence on stderr if there is no answer, 2 for
wrong usage, and 3 for an answer that a script has to act on (``diff``: register again;
``verify``, ``doctor``: something is wrong; ``lookup``: nothing is there; ``watch --timeout``:
too few events).
"""

from __future__ import annotations

import fnmatch
import functools
import glob
import json
import os
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, Optional, Union

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import __version__, doctor, settings, totals, verify
from .reader import (
    ROLES,
    Change,
    Directory,
    Document,
    HookError,
    Slot,
    Tensor,
    compare,
    open_directory,
    open_file,
)

NO_ANSWER, USAGE, ACT = 1, 2, 3

# Names listed by `diff` for each kind of change, unless all are asked for.
_LISTED = 10


class Misused(Exception):
    """Wrong usage; the message says what is right."""


app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: the same in a terminal, a pipe and a log
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Where the weights of a running SGLang lie, and whether that is still true.",
    epilog=(
        "Exit status: 0 done; 1 no answer, stderr says why; 2 wrong usage; 3 an answer to act "
        "on (see the command's help).  A SLOT is 0, 1, 0_draft, ...; where a command takes one "
        "slot, the only one there is need not be named, and a saved copy of a "
        "weight_layout_SLOT.json may be given instead."
    ),
)


def main() -> int:
    """Run the command line; the exit status."""
    for stream in (sys.stdout, sys.stderr):
        # Names that the terminal's encoding lacks are shown with escapes, not with a traceback.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    invoked = os.path.basename(sys.argv[0])
    name = "python -m sglang_weight_hook" if invoked == "__main__.py" else "sglang-weight-hook"
    try:
        app(prog_name=name)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(bool(end.code))
    return 0


def command(name: str, show: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a command: its examples go into its help, its errors become one sentence."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> None:
            try:
                status = function(*args, **kwargs) or 0
                sys.stdout.flush()
            except Misused as error:
                _complain(str(error))
                status = USAGE
            except HookError as error:
                _complain(str(error))
                status = NO_ANSWER
            except BrokenPipeError:
                # Who pipes us into `head` has seen enough.  What Python still has to write
                # when it ends must find somewhere to go.
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                status = 0
            except OSError as error:
                where = f" ({error.filename})" if error.filename else ""
                _complain(f"{error.strerror or error}{where}; give another place")
                status = NO_ANSWER
            except KeyboardInterrupt:
                status = 130
            raise typer.Exit(status)

        text = (function.__doc__ or "").strip()
        body = "\n".join(line.strip() for line in text.splitlines())
        run.__doc__ = (
            body + "\n\n\b\nExamples:\n" + "\n".join("  " + line for line in show.split("\n"))
        )
        app.command(name)(run)
        return run

    return register


# --- options that several commands have -----------------------------------------------------

DirOption = Annotated[
    Optional[str],
    typer.Option(
        "--dir",
        metavar="DIR",
        help=f"The server's output directory.  [default: ${settings.DIRECTORY}, else "
        f"./{settings.DEFAULT_DIRECTORY}]",
    ),
]
DirsOption = Annotated[
    Optional[list[str]],
    typer.Option(
        "--dir",
        metavar="DIR",
        help="An output directory, or a pattern such as '/shared/maps/*'; may be repeated.  "
        f"[default: ${settings.DIRECTORY}, else ./{settings.DEFAULT_DIRECTORY}]",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON: exact numbers, in bytes.")]
SlotArgument = Annotated[Optional[str], typer.Argument(metavar="SLOT", show_default=False)]


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        sys.stdout.write(f"sglang-weight-hook {__version__}\n")
        raise typer.Exit(0)


# --- show, regions --------------------------------------------------------------------------


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
        Optional[str], typer.Option(help="name, address or size (largest first).", metavar="KEY")
    ] = None,
    match: Annotated[
        Optional[str], typer.Option(help="Only names or aliases like this.", metavar="GLOB")
    ] = None,
    role: Annotated[
        Optional[str], typer.Option(help=f"Only this: {', '.join(ROLES)}.", metavar="ROLE")
    ] = None,
    layer: Annotated[Optional[int], typer.Option(help="Only this layer.", metavar="N")] = None,
    top: Annotated[
        Optional[int], typer.Option(help="Only the first N.", metavar="N", min=1)
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """List the tensors of a slot: address, size, type, shape, name.

    Without --sort in the model's own order.
    """
    orders: dict[Optional[str], Callable[[Tensor], Any]] = {
        "name": lambda tensor: tensor.name,
        "address": lambda tensor: (tensor.ptr, tensor.name),
        "size": lambda tensor: (-tensor.size, tensor.name),
    }
    if sort not in (None, *orders):
        raise Misused(f"--sort {sort} is not known; give name, address or size")
    if role not in (None, *ROLES):
        raise Misused(f"--role {role} is not known; give one of {', '.join(ROLES)}")
    document = _document(directory, slot)
    every = list(document.iter_tensors())
    chosen = [
        tensor
        for tensor in every
        if (match is None or any(_like(name, match) for name in (tensor.name, *tensor.aliases)))
        and (role is None or tensor.role == role)
        and (layer is None or tensor.layer == layer)
    ]
    if sort:
        chosen.sort(key=orders[sort])
    if top is not None:
        chosen = chosen[:top]
    summed = {
        "tensors": len(chosen),
        "of": len(every),
        "bytes": sum(tensor.size for tensor in chosen),
        "storage_bytes": sum(
            {t.storage_ptr: t.storage_size for t in chosen if t.storage_ptr}.values()
        ),
    }
    if as_json:
        entries = {
            tensor.name: {**tensor.raw, "layer": tensor.layer, "role": tensor.role}
            for tensor in chosen
        }
        return _print_json({**_heading(document), "tensors": entries, "total": summed})
    _warn_if_gone(document)
    _print_table(
        [
            Column("address"),
            Column("size", right=True),
            Column("type", drop=2),
            Column("shape", drop=1),
            Column("name"),
        ],
        [
            [
                _address(tensor.ptr) if tensor.ptr else "-",
                _size(tensor.size),
                tensor.dtype.replace("torch.", ""),
                "x".join(map(str, tensor.shape)) or "scalar",
                _printable(tensor.name)
                + (f"  (on {tensor.device})" if not tensor.resident else ""),
            ]
            for tensor in chosen
        ],
    )
    count = f"{len(chosen)} of {len(every)}" if len(chosen) < len(every) else f"{len(chosen)}"
    _print_line(
        f"{count} tensors, {_size(summed['bytes'])} in storages of "
        f"{_size(summed['storage_bytes'])}; {_standing(document)}"
    )
    return 0


@command("regions", "sglang-weight-hook regions\nsglang-weight-hook regions 0 --json")
def regions(
    slot: SlotArgument = None, directory: DirOption = None, as_json: JsonOption = False
) -> int:
    """List the spans to register: merged, each inside one allocation."""
    document = _document(directory, slot)
    found = list(document.iter_regions())
    if as_json:
        return _print_json({**_heading(document), "regions": document.regions})
    _warn_if_gone(document)
    _print_table(
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
                _address(region.ptr),
                _size(region.size),
                _address(region.allocation_ptr),
                _size(region.allocation_size),
                region.allocation_kind or region.allocation_source,
                region.device,
                str(len(region.tensors)),
                _printable(region.tensors[0]) if region.tensors else "-",
            ]
            for region in found
        ],
    )
    total = sum(region.size for region in found)
    _print_line(f"{len(found)} regions, {_size(total)}; {_standing(document)}")
    return 0


# --- lookup ---------------------------------------------------------------------------------


@command(
    "lookup",
    "sglang-weight-hook lookup 0x7f3a5c000000\nsglang-weight-hook lookup 139887894528000 0 --json",
)
def lookup(
    address: Annotated[str, typer.Argument(help="Hexadecimal (0x...) or decimal.")],
    slot: SlotArgument = None,
    directory: DirOption = None,
    as_json: JsonOption = False,
) -> int:
    """Say which tensors, and which element, hold an address.

    Exit status 3 if nothing of the model, its LoRA pool or its KV cache lies there.
    """
    place = _number(address)
    document = _document(directory, slot)
    hits = document.lookup(place)
    region = document.region_at(place)
    buffers = [buffer for buffer in document.iter_kv_cache() if buffer.ptr <= place < buffer.end]
    found = bool(hits or region or buffers)
    if as_json:
        _print_json(
            {
                **_heading(document),
                "address": place,
                "tensors": [
                    {
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
                    for hit in hits
                ],
                "region": region.raw if region else None,
                "kv_cache": [buffer.raw for buffer in buffers],
            }
        )
        return 0 if found else ACT
    _warn_if_gone(document)
    for hit in hits:
        tensor = hit.tensor
        what = [tensor.kind, tensor.role.replace("_", " "), tensor.dtype.replace("torch.", "")]
        if tensor.layer is not None:
            what.insert(1, f"layer {tensor.layer}")
        _print_line((_printable(tensor.name), "bold"))
        if hit.element is None:
            _print_line("  element  none: the byte lies between elements (padding)")
        else:
            text = ", ".join(map(str, hit.element))
            _print_line(f"  element  [{text}], byte {hit.byte} of {tensor.itemsize}")
        _print_line(f"  offset   {hit.offset} of {tensor.span} bytes")
        _print_line(f"  what     {', '.join(what)}")
        for alias in tensor.aliases:
            _print_line(f"  also     {_printable(alias)}")
    for buffer in buffers:
        _print_line((f"KV cache {_printable(buffer.name)}", "bold"))
        _print_line(f"  offset   {place - buffer.ptr} of {buffer.size} bytes")
    if region:
        _print_line(
            f"region {_address(region.ptr)}, {_size(region.size)}, in the allocation at "
            f"{_address(region.allocation_ptr)}, {_size(region.allocation_size)}"
        )
    if not found:
        _print_line(
            f"nothing that is published lies at {_address(place)}; {_neighbours(document, place)}"
        )
    _print_line(_standing(document))
    return 0 if found else ACT


def _neighbours(document: Document, place: int) -> str:
    below = [region for region in document.iter_regions() if region.end <= place]
    above = [region for region in document.iter_regions() if region.ptr > place]
    texts = []
    if below:
        nearest = max(below, key=lambda region: region.end)
        texts.append(f"{_size(place - nearest.end)} above the end of {_address(nearest.ptr)}")
    if above:
        nearest = min(above, key=lambda region: region.ptr)
        texts.append(f"{_size(nearest.ptr - place)} below {_address(nearest.ptr)}")
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


# --- diff -----------------------------------------------------------------------------------


@command(
    "diff",
    "cp weights_metadata/weight_layout_0.json before.json\n"
    "sglang-weight-hook diff before.json 0\n"
    "sglang-weight-hook diff before.json after.json --json",
)
def diff(
    old: Annotated[str, typer.Argument(metavar="OLD", help="A saved layout file, or a slot.")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="A saved layout file, or a slot.")],
    directory: DirOption = None,
    everything: Annotated[bool, typer.Option("--all", help="List every name.")] = False,
    as_json: JsonOption = False,
) -> int:
    """Compare two layouts: what moved, changed size, came and went.

    Exit status 0: what was registered from OLD is still good (contents may have changed).
    Exit status 3: register again.
    """
    before, after = _document(directory, old), _document(directory, new)
    changes = compare(before.raw, after.raw)
    status = ACT if changes.must_register_again else 0
    # The state knows of buckets that were written in place after the layout.
    content = changes.content_changed or (before.content_generation != after.content_generation)
    if as_json:
        _print_json(
            {
                "old": _heading(before),
                "new": _heading(after),
                **changes.as_dict(),
                "content_changed": content,
            }
        )
        return status
    for word, names in (
        ("moved", changes.moved),
        ("resized", changes.resized),
        ("added", changes.added),
        ("removed", changes.removed),
    ):
        if names:
            _print_line((f"{len(names)} {word}", "bold"))
        for name in names if everything else names[:_LISTED]:
            places = [
                _address(document.tensor(name).ptr)
                for document in (before, after)
                if name in document.tensors
            ]
            _print_line(f"  {' -> '.join(places)}  {_printable(name)}")
        if len(names) > _LISTED and not everything:
            _print_line(f"  and {len(names) - _LISTED} more (--all lists them)")
    reasons = [
        reason
        for reason, holds in (
            ("another process", changes.other_process),
            ("other physical pages", changes.repaged),
            ("other regions", changes.regions_changed),
        )
        if holds
    ]
    contents = "contents changed" if content else "contents are the same"
    if status:
        _print_line(("register again", "bold red"), f": {', '.join(reasons)}; {contents}")
    else:
        _print_line(("registrations hold", "bold green"), f"; {contents}")
    return status


# --- report ---------------------------------------------------------------------------------


@command(
    "report",
    "sglang-weight-hook report\nsglang-weight-hook report --dir '/shared/maps/*' --json",
)
def report(
    directories: DirsOption = None,
    gone: Annotated[
        bool, typer.Option("--gone", help="Count slots whose process is gone, too (copies).")
    ] = False,
    as_json: JsonOption = False,
) -> int:
    """Add up each GPU's memory: weights, KV cache, the rest, free.

    Every storage counts once, also where a draft shares its target's.
    """
    counted: list[Document] = []
    slots: list[dict[str, Any]] = []
    for found in _directories(directories):
        for slot in found.slots():
            alive = slot.owner_alive()
            entry: dict[str, Any] = {"dir": found.path, "owner_alive": alive, "slot": slot.name}
            slots.append(entry)
            entry["counted"] = alive or gone
            if not entry["counted"]:
                if not as_json:
                    _complain(
                        f"slot {slot.name} in {found.path} is left out: its process is gone "
                        f"(--gone counts it)"
                    )
                continue
            document = slot.read()
            counted.append(document)
            entry.update(_heading(document))
            names = ("role", "model_path", "model_class", "quantization", "tp_rank", "tp_size")
            entry["identity"] = {name: document.identity.get(name) for name in names}
    gpus = totals.per_gpu(counted)
    total = totals.together(gpus)
    if as_json:
        return _print_json(
            {
                "gpus": [{**gpu.as_dict(), "rest": _rest(gpu)} for gpu in gpus],
                "total": {**total.as_dict(), "rest": _rest(total)},
                "slots": slots,
            }
        )
    if not gpus:
        where = ", ".join(found.path for found in _directories(directories))
        raise HookError(
            f"no live SGLang publishes in {where}; check --dir and that the server has loaded its "
            f"model"
        )
    lora = any(gpu.lora for gpu in gpus)
    columns = [Column("GPU"), Column("weights", right=True)]
    columns += [Column("LoRA", right=True)] if lora else []
    columns += [Column(name, right=True) for name in ("KV cache", "rest", "free", "total")]
    columns += [Column("slots")]
    rows = []
    for gpu in [*gpus, total] if len(gpus) > 1 else gpus:
        row = ["total" if gpu is total else _printable(gpu.label), _size(gpu.weights)]
        row += [_size(gpu.lora)] if lora else []
        row += [_size(gpu.kv_cache), *map(_size, (_rest(gpu), gpu.free, gpu.total))]
        row += [str(len(gpu.slots)) if gpu is total else _printable(" ".join(gpu.slots))]
        rows.append(row)
    _print_table(columns, rows)
    if total.released:
        _print_line(f"{_size(total.released)} of these are released: no memory is behind them now")
    if total.elsewhere:
        _print_line(f"{_size(total.elsewhere)} of weights lie on another device (offloaded)")
    if total.total is None:
        _print_line("-: not known; only a CUDA device tells its total and free memory")
    return 0


def _rest(gpu: totals.Gpu) -> Optional[int]:
    """Used, and neither weights nor KV cache."""
    if gpu.total is None or gpu.free is None:
        return None
    return gpu.total - gpu.free - (gpu.weights + gpu.lora + gpu.kv_cache - gpu.released)


# --- watch ----------------------------------------------------------------------------------


@command(
    "watch",
    "sglang-weight-hook watch\n"
    "sglang-weight-hook watch 0 --json\n"
    "sglang-weight-hook watch --count 1 --timeout 60",
)
def watch(
    slot: SlotArgument = None,
    directory: DirOption = None,
    begins: Annotated[
        bool, typer.Option("--begins", help="Show beginnings, too: the state `updating`.")
    ] = False,
    count: Annotated[
        Optional[int], typer.Option(help="End after N events.", metavar="N", min=1)
    ] = None,
    timeout: Annotated[
        Optional[float], typer.Option(help="End after so many seconds.", metavar="S", min=0)
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object for each line.")
    ] = False,
) -> int:
    """Print a line for each event, until Ctrl-C.

    First of all a line for each slot as it is.  Events in quick succession may share a line.
    Exit status 3 if --timeout ends it before --count.
    """
    seen = 0
    try:
        for change in open_directory(directory).events(timeout):
            if slot is not None and change.slot.name != slot:
                continue
            finished = not change.alive or _in(change.state, "event", "success") is not None
            if not (finished or begins or change.initial):
                continue
            if as_json:
                sys.stdout.write(json.dumps(_change(change)) + "\n")
            else:
                _print_change(change)
            sys.stdout.flush()  # a pipe gets each line at once
            seen += finished and not change.initial
            if count is not None and seen >= count:
                return 0
    except KeyboardInterrupt:
        return 0
    return ACT if count is not None else 0


def _change(change: Change) -> dict[str, Any]:
    return {
        "slot": change.slot.name,
        "initial": change.initial,
        "owner_alive": change.alive,
        "state": change.state,
    }


def _print_change(change: Change) -> None:
    state = change.state or {}
    event = state.get("event")
    event = event if isinstance(event, dict) else {}
    started, finished = event.get("started_at"), event.get("finished_at")
    stamp = time.time() if not change.alive else state.get("updated_at")
    word = str(state.get("state"))
    parts: list[Union[str, tuple[str, str]]] = [f"{_clock(stamp)}  {change.slot.name}  "]
    if not change.alive:
        pid = state.get("pid")
        _print_line(*parts, ("gone", "bold red"), f"  process {pid} has ended: nobody's addresses")
        return
    parts += [
        (f"{_printable(word):8}", _STYLES.get(word, "")),
        f"  {_printable(event.get('kind'))}",
    ]
    if event.get("success") is not None:
        parts.append("  ok" if event.get("success") else "  failed")
    if isinstance(started, (int, float)) and isinstance(finished, (int, float)):
        parts.append(f"  {max(finished - started, 0.0):.2f} s")
    parts.append(
        f"  layout {state.get('layout_generation')} content {state.get('content_generation')}"
    )
    for word in ("moved", "added", "removed"):
        if event.get(word):
            parts.append(f" {word} {event[word]}")
    if event.get("success") is False and event.get("message"):
        parts.append(f": {_printable(event['message'])}")
    _print_line(*parts)


_STYLES = {
    "ready": "green",
    "updating": "yellow",
    "loading": "yellow",
    "failed": "bold red",
    "released": "magenta",
}


def _clock(stamp: Any) -> str:
    try:
        return time.strftime("%H:%M:%S", time.localtime(stamp))
    except (TypeError, ValueError, OverflowError, OSError):
        return "--:--:--"


# --- verify, doctor, plot -------------------------------------------------------------------


@command(
    "verify",
    "sglang-weight-hook verify && echo good\nsglang-weight-hook verify 0 --json",
)
def verify_(
    slot: SlotArgument = None,
    directory: DirOption = None,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings count as errors.")] = False,
    as_json: JsonOption = False,
) -> int:
    """Check what is published: one line for each finding.

    Schema, generations, overlaps, regions, sums, the prototype's files and whether the owner
    lives; of all slots, unless one is named.  Exit status 3 if any is an
    error.
    """
    if slot is not None and _is_path(slot):
        verdicts = [verify.verify_file(open_file(slot))]
    elif slot is not None:
        verdicts = [verify.verify_slot(open_directory(directory).slot(slot))]
    else:
        found = open_directory(directory)
        verdicts = [verify.verify_slot(each) for each in _slots(found)]
    findings = [finding for verdict in verdicts for finding in verdict.findings]
    good = not findings if strict else all(verdict.good for verdict in verdicts)
    if as_json:
        _print_json(
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
        for finding in verdict.findings:
            style = "bold red" if finding.level == verify.ERROR else "yellow"
            _print_item(
                (f"{finding.level:7}  ", style),
                f"{_printable(verdict.slot)}  ",
                f"{finding.check}: {_printable(finding.message)}",
            )
        if not verdict.findings and verdict.document:
            counts = f"{len(verdict.document.tensors)} tensors"
            counts += f" in {len(verdict.document.regions)} regions"
            _print_item(
                ("ok       ", "green"),
                f"{_printable(verdict.slot)}  ",
                f"{counts}; {_standing(verdict.document)}",
            )
    return 0 if good else ACT


@command(
    "doctor", "sglang-weight-hook doctor\n/path/to/venv/bin/python -m sglang_weight_hook doctor"
)
def doctor_(
    directory: DirOption = None,
    everything: Annotated[bool, typer.Option("--all", help="List every entry point.")] = False,
    as_json: JsonOption = False,
) -> int:
    """Say whether THIS interpreter has the hook, and fits its SGLang.

    SGLang's files are read, not imported.  Exit status 3 if something is wrong.
    """
    found = doctor.diagnose(directory)
    status = 0 if found.good else ACT
    if as_json:
        _print_json(found.as_dict())
        return status
    words = {doctor.GOOD: ("ok    ", "green"), doctor.NOTE: ("note  ", "yellow")}
    for fact in found.facts:
        word = words.get(fact.level, ("BAD   ", "bold red"))
        _print_item(word, f"{fact.topic:12}  ", _printable(fact.text))
        if fact.topic == "Entry points" and fact.level != doctor.BAD and everything:
            for entry in found.entry_points:
                if entry.found or entry.expected:
                    mark = "found  " if entry.found else "MISSING"
                    _print_line(f"      {mark}  {entry.event}: {entry.name}")
    return status


@command(
    "plot",
    "sglang-weight-hook plot --output map.html\nsglang-weight-hook plot 0 1 --before before.json",
)
def plot(
    slots: Annotated[
        Optional[list[str]], typer.Argument(metavar="SLOT...", show_default=False)
    ] = None,
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE", help="The page to write.")
    ] = "weight_map.html",
    before: Annotated[
        Optional[list[str]],
        typer.Option(
            metavar="FILE", help="A saved layout to compare with, one for each slot; repeatable."
        ),
    ] = None,
    directory: DirOption = None,
) -> int:
    """Draw the memory of all slots, or of those named, as an HTML page."""
    try:
        from . import plot as drawing
    except ImportError as error:
        raise HookError(
            f"this installation cannot plot ({error}); install a release that has "
            f"sglang_weight_hook/plot.py"
        ) from error
    names = slots or [slot.name for slot in _slots(open_directory(directory))]
    documents = [_document(directory, name).raw for name in names]
    earlier = [open_file(path).raw for path in before] if before else None
    try:
        drawing.write_html(documents, output, earlier)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise HookError(
            f"one of the documents is not what the hook writes ({type(error).__name__}: {error}); "
            f"`verify` says where"
        ) from error
    _print_line(f"{output}: {len(documents)} {'slot' if len(documents) == 1 else 'slots'}")
    return 0


# --- slots and documents --------------------------------------------------------------------


def _document(directory: Optional[str], slot: Optional[str]) -> Document:
    """The document of a slot, of the only slot, or of a saved file."""
    if slot is not None and _is_path(slot):
        return open_file(slot)
    found = open_directory(directory)
    slots = _slots(found)
    names = [each.name for each in slots]
    if slot is None:
        if len(slots) > 1:
            raise Misused(f"there are slots {', '.join(names)} in {found.path}; name one of them")
        return slots[0].read()
    if slot not in names:
        raise HookError(
            f"there is no slot {slot} in {found.path}; name one of those that are: "
            f"{', '.join(names)}"
        )
    return found.slot(slot).read()


def _slots(found: Directory) -> list[Slot]:
    slots = found.slots()
    if not slots:
        raise HookError(
            f"nothing is published in {found.path}; check --dir, that the server has loaded its "
            f"model, and `doctor` in the server's environment"
        )
    return slots


def _is_path(slot: str) -> bool:
    return os.sep in slot or slot.endswith(".json")


def _directories(given: Optional[list[str]]) -> list[Directory]:
    if not given:
        return [open_directory()]
    found: list[Directory] = []
    for value in given:
        matches = [value]
        if not os.path.exists(value) and glob.has_magic(value):
            matches = [path for path in sorted(glob.glob(value)) if os.path.isdir(path)]
            if not matches:
                raise HookError(f"no directory is like {value}; check the pattern")
        found += [open_directory(match) for match in matches]
    by_place = {os.path.realpath(directory.path): directory for directory in found}
    return list(by_place.values())


def _like(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern)


def _in(value: Any, *path: str) -> Any:
    """What is at ``path`` inside JSON of which nothing is certain."""
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _heading(document: Document) -> dict[str, Any]:
    """What says which document an answer is about."""
    return {
        "slot": document.slot.name,
        "state": document.state["state"],
        "layout_generation": document.layout_generation,
        "content_generation": document.content_generation,
        "physical_epoch": document.physical_epoch,
        "pid": document.state.get("pid"),
        "owner_alive": _alive(document),
    }


def _alive(document: Document) -> Optional[bool]:
    """None for a saved copy: nobody owns that."""
    return document.slot.owner_alive() if document.is_live else None


def _standing(document: Document) -> str:
    return (
        f"slot {_printable(document.slot.name)} {_printable(document.state['state'])}, "
        f"layout {document.layout_generation}, content {document.content_generation}"
    )


def _warn_if_gone(document: Document) -> None:
    if _alive(document) is False:
        _complain(
            f"the process of slot {document.slot.name} (pid {document.state.get('pid')}) is gone: "
            f"these addresses are nobody's; start the server again"
        )


# --- printing -------------------------------------------------------------------------------


class Column(NamedTuple):
    title: str
    right: bool = False
    drop: int = 0  # where the terminal is too narrow: the highest goes first, 0 never


def _print_table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    """A table: fitted to a terminal, whole and aligned in a pipe or a file."""
    widths = [
        max([len(column.title), *(len(row[k]) for row in rows)]) for k, column in enumerate(columns)
    ]
    kept = list(range(len(columns)))
    if not sys.stdout.isatty():
        for row in [[column.title for column in columns], *rows]:
            cells = [
                row[k].rjust(widths[k]) if columns[k].right else row[k].ljust(widths[k])
                for k in kept
            ]
            sys.stdout.write("  ".join(cells).rstrip() + "\n")
        return
    console = _console()
    while sum(widths[k] + 2 for k in kept) - 2 > console.width and any(
        columns[k].drop for k in kept
    ):
        kept.remove(max(kept, key=lambda k: columns[k].drop))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for k in kept:
        last = k == kept[-1]
        table.add_column(
            columns[k].title,
            justify="right" if columns[k].right else "left",
            no_wrap=not last,
            overflow="fold",
        )
    for row in rows:
        table.add_row(*(Text(row[k]) for k in kept))
    console.print(table)


def _print_line(*parts: Union[str, tuple[str, str]]) -> None:
    """A line of text; ``(text, style)`` is coloured where colours are wanted."""
    _console().print(Text.assemble(*parts), soft_wrap=True)


def _print_item(word: tuple[str, str], label: str, text: str) -> None:
    """A line of a list; on a terminal its text continues below itself."""
    indent = len(word[0]) + len(label)
    width = _console().width - indent
    lines = textwrap.wrap(text, width) if sys.stdout.isatty() and width > 20 else [text]
    _print_line(word, label, f"\n{' ' * indent}".join(lines))


def _console() -> Console:
    return Console(file=sys.stdout, highlight=False, markup=False, emoji=False)


def _print_json(value: Mapping[str, Any]) -> int:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")
    return 0


def _complain(text: str) -> None:
    try:
        sys.stderr.write(f"sglang-weight-hook: {_printable(text)}\n")
    except OSError:
        pass


def _printable(value: Any) -> str:
    """Text without anything that a terminal would obey."""
    text = str(value)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _address(value: int) -> str:
    return f"{value:#x}"


def _size(value: Optional[int]) -> str:
    """Bytes for people: ``15.0 GiB``.

    >>> _size(1536), _size(128), _size(None)
    ('1.5 KiB', '128 B', '-')
    """
    if value is None:
        return "-"
    number, unit = float(value), "B"
    for unit in _UNITS:
        if abs(number) < 1024 or unit == _UNITS[-1]:
            break
        number /= 1024
    return f"{value} B" if unit == "B" else f"{number:.1f} {unit}"


_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
