"""``sglang-weight-hook report``."""

from __future__ import annotations

import functools
import time
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ..reader import Directory, Document, HookError, Slot, open_file, totals
from ..reader.directory import slot_order
from ..reader.ownership import process_of
from ..reader.slot_names import some_of
from .app import ACT, NO_ANSWER, Misused, command
from .cores import for_each
from .directories import directories_of, slots_of_each
from .options import AllowStaleOption, DirsOption, JsonOption, NoHeadersOption, OutputOption
from .output import asked_form
from .render.output import TABLE, WIDE, Form, print_answer
from .render.table import Column
from .render.text import complain, console, print_json, printable, remark, size_text
from .selection import heading, is_path, stale_status_of_all, why_stale
from .slot_choice import a_slot_or_file_named

if TYPE_CHECKING:
    from rich.console import RenderableType


_Gone = Annotated[
    bool, typer.Option("--gone", help="Also count stale slots, whose owner has exited.")
]
_Slots = Annotated[
    Optional[list[str]],
    typer.Argument(
        metavar="SLOT",
        show_default=False,
        help="Slots (0, 0_draft, ...) or saved layout files; default: all slots.",
        autocompletion=a_slot_or_file_named,
    ),
]
_Watch = Annotated[bool, typer.Option("--watch", help="Keep the table up to date, until Ctrl-C.")]


@command(
    "report",
    "sglang-weight-hook report\n"
    "sglang-weight-hook report 0 0_draft --watch\n"
    "sglang-weight-hook report --dir '/shared/maps/*' --json",
)
def report(
    slots: _Slots = None,
    directories: DirsOption = None,
    count_stale: _Gone = False,
    watch: _Watch = False,
    output: OutputOption = None,
    no_headers: NoHeadersOption = False,
    allow_stale: AllowStaleOption = False,
    as_json: JsonOption = False,
) -> int:
    """Add up each GPU's memory: weights, KV cache, rest, free.

    The rest is what is used by neither weights, LoRA pool nor KV cache.
    A storage that a draft shares with its target is counted once.  Exit status 3 if a slot is
    stale, so left out unless --gone counts it, or is not ready, or cannot be read.
    """
    form = asked_form(output, as_json, no_headers)
    saved = [_Accounted.saved(name) for name in slots or () if is_path(name)]
    names = {name for name in slots or () if not is_path(name)}
    asked = [] if saved and not names else directories_of(directories)
    if watch:
        if form.name not in (TABLE, WIDE) or saved:
            raise Misused(
                "--watch prints tables of live slots; `sglang-weight-hook watch --json` prints "
                "events, and a saved file never changes"
            )
        _watch(asked, names, count_stale)
        return 0
    found, unreadable = _accounted(asked, names, count_stale, not saved)
    return _print(form, asked, [*saved, *found], unreadable, allow_stale)


def _print(
    form: Form, asked: list[Directory], slots: list[_Accounted], unreadable: int, allow_stale: bool
) -> int:
    status = 0
    for slot in slots:
        if slot.is_unreadable:
            complain(f"slot {slot.name} in {slot.directory} is left out: {slot.why_not}")
            unreadable += 1
        elif slot.document is None and not allow_stale:
            status = ACT
    for line in _those_exited(slots):
        complain(line)
    counted = [slot.document for slot in slots if slot.document is not None]
    status = max(status, stale_status_of_all(counted, allow_stale))
    if unreadable:
        # The sums of the others are true, and not of all that was asked for.
        if not counted:
            return NO_ANSWER
        status = ACT
    gpus = totals.per_gpu(counted)
    total = totals.together(gpus)
    if form.is_json:
        print_json(
            {
                "gpus": [_record(gpu) for gpu in gpus],
                "total": _total(total),
                "slots": [slot.as_dict() for slot in slots],
            }
        )
        return status
    if not gpus:
        if slots:
            if form.name not in (TABLE, WIDE):
                _print_gpus(form, gpus, total)  # a program gets its headers, also of no GPU
            return status
        where = ", ".join(found.path for found in asked)
        raise HookError(
            f"no live SGLang publishes in {where}; check --dir and that the server has loaded its "
            f"model"
        )
    _print_gpus(form, gpus, total)
    return status


# Figures have the names that docs/format.md gives them in a layout.
_NAMES = {
    "uuid": "gpu_uuid",
    "weights": "weights_bytes",
    "lora": "lora_bytes",
    "kv_cache": "kv_cache_bytes",
    "rest": "rest_bytes",
    "other_live": "other_live_bytes",
    "reserved_free": "reserved_free_bytes",
    "outside": "other_bytes",
    "unbacked": "unbacked_bytes",
    "released": "released_bytes",
    "elsewhere": "off_device_bytes",
    "free": "device_free_bytes",
    "total": "device_total_bytes",
}
_OF_ONE = ("hostname", "gpu_id", "gpu_uuid", "device")
_FIELDS = (*("hostname", "gpu_id", "gpu_uuid", "device", "slots"), *list(_NAMES.values())[1:])


def _record(gpu: totals.Gpu) -> dict[str, Any]:
    figures = {**gpu.as_dict(), "rest": _rest(gpu)}
    return {_NAMES.get(name, name): value for name, value in figures.items()}


def _total(total: totals.Gpu) -> dict[str, Any]:
    """Of all devices, so without what names one."""
    figures = {name: value for name, value in _record(total).items() if name not in _OF_ONE}
    return {"gpus": total.gpu_id, **figures}


def _accounted(
    asked: list[Directory], names: set[str], count_stale: bool, are_all: bool
) -> tuple[list[_Accounted], int]:
    """The slots of all directories, or those with ``names``; how many directories can't be read.

    Raises HookError where it is the only one, or where no directory has a slot of a name.
    """
    slots: list[Slot] = []
    unreadable = 0
    for found, listed in slots_of_each(asked).items():
        if isinstance(listed, HookError):
            if len(asked) == 1:
                raise listed
            complain(f"{found.path} is left out: {listed}")
            unreadable += 1
        else:
            slots += listed
    processes = _Processes(slots, are_all)
    slots = _named(slots, names, asked)
    return for_each(functools.partial(_accounted_slot, count_stale, processes), slots), unreadable


def _named(slots: list[Slot], names: set[str], asked: list[Directory]) -> list[Slot]:
    """The slots with one of ``names``; all where none is named.  Raises HookError."""
    missing = sorted(names - {slot.name for slot in slots}, key=slot_order)
    if missing:
        where = ", ".join(found.path for found in asked)
        has = f"it has {some_of([slot.name for slot in slots])}" if slots else "it has none"
        raise HookError(f"there is no slot {some_of(missing)} in {where}; {has}")
    return [slot for slot in slots if slot.name in names] if names else slots


def _accounted_slot(count_stale: bool, processes: _Processes, slot: Slot) -> _Accounted:
    """With a document that is soon handed from one process to another."""
    found = _Accounted(slot, count_stale, processes.has_only(slot))
    if found.document is not None and processes.has_only(slot):
        found.document = totals.without_tensors(found.document)
    return found


class _Processes:
    """How many of some slots each process publishes: several may share storages."""

    def __init__(self, slots: list[Slot], are_all: bool = True) -> None:
        """``are_all``: false where further documents are added up, of whatever process."""
        self._are_all = are_all
        self._of = {(slot.directory, slot.name): self._process(slot) for slot in slots}
        self._counts = Counter(self._of.values())

    def has_only(self, slot: Slot) -> bool:
        """Whether the process of ``slot`` publishes no other; false where that is not known."""
        process = self._of[slot.directory, slot.name]
        return self._are_all and process is not None and self._counts[process] == 1

    @staticmethod
    def _process(slot: Slot) -> Optional[tuple[Any, ...]]:
        try:
            state = slot.read_state()
        except HookError:
            return None
        # As text: who writes something else there is not to be trusted to write what has a hash.
        return tuple(map(str, (state.get("hostname"), *process_of(state))))


def _those_exited(slots: list[_Accounted]) -> list[str]:
    """What is said of those whose owner has exited: a line a directory, however many they are."""
    by_directory: dict[str, list[str]] = {}
    for slot in slots:
        if slot.document is None and not slot.is_unreadable:
            by_directory.setdefault(slot.directory, []).append(slot.name)
    return [
        f"slot {names[0]} in {place} is left out: its owner has exited (--gone counts it)"
        if len(names) == 1
        else f"slots {some_of(names)} in {place} are left out: their owners have exited (--gone "
        f"counts them)"
        for place, names in by_directory.items()
    ]


class _Accounted:
    """A slot with its document, or with why it is left out; an unreadable one stops no other."""

    def __init__(self, slot: Slot, count_stale: bool, is_alone: bool) -> None:
        self.name = slot.name
        self.directory = slot.directory
        self.alive: Optional[bool] = None
        self.document: Optional[Document] = None
        self.why_not: Optional[str] = None
        self.is_unreadable = False
        try:
            self.alive = slot.owner_alive()
            if self.alive or count_stale:
                document = slot.read_for_sums(is_alone)
                totals.per_gpu([document])  # raises where the sums would
                self.document = document
            else:
                self.why_not = "its owner has exited"
        except HookError as error:
            self.why_not, self.is_unreadable = str(error), True

    @classmethod
    def saved(cls, path: str) -> _Accounted:
        """A saved layout, which has no owner.  Raises HookError."""
        found = cls.__new__(cls)
        found.document = open_file(path)
        totals.per_gpu([found.document])
        found.name, found.directory = found.document.slot.name, found.document.slot.directory
        found.alive, found.why_not, found.is_unreadable = None, None, False
        return found

    def as_dict(self) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "directory": self.directory,
            "owner_alive": self.alive,
            "slot": self.name,
            "counted": self.document is not None,
        }
        if self.is_unreadable:
            entry["problem"] = self.why_not
        if self.document is not None:
            names = ("role", "model_path", "model_class", "quantization", "tp_rank", "tp_size")
            entry.update(heading(self.document))
            entry["identity"] = {name: self.document.identity.get(name) for name in names}
        return entry


def _table(gpus: list[totals.Gpu], total: totals.Gpu) -> tuple[list[Column], list[list[str]]]:
    """A row a GPU and, of several, their sum."""
    lora = any(gpu.lora for gpu in gpus)
    columns = [Column("GPU"), Column("weights", right=True)]
    columns += [Column("LoRA", right=True)] if lora else []
    columns += [Column(name, right=True) for name in ("KV cache", "rest", "free", "total")]
    columns += [Column("slots")]
    rows = []
    for gpu in [*gpus, total] if len(gpus) > 1 else gpus:
        row = ["total" if gpu is total else printable(gpu.label), size_text(gpu.weights)]
        row += [size_text(gpu.lora)] if lora else []
        row += [size_text(gpu.kv_cache), *map(size_text, (_rest(gpu), gpu.free, gpu.total))]
        row += [str(len(gpu.slots)) if gpu is total else printable(" ".join(gpu.slots))]
        rows.append(row)
    return columns, rows


def _print_gpus(form: Form, gpus: list[totals.Gpu], total: totals.Gpu) -> None:
    columns, rows = _table(gpus, total)
    # Programs add up by themselves: a record of the sum would be counted twice.
    print_answer(form, columns, rows, [_record(gpu) for gpu in gpus], _FIELDS)
    if total.released:
        remark(
            f"{size_text(total.released)} of these are released: addresses without physical memory"
        )
    if total.elsewhere:
        remark(f"{size_text(total.elsewhere)} of weights lie on another device (offloaded)")
    if total.total is None and form.name in (TABLE, WIDE):
        remark("-: unknown; only CUDA devices report total and free memory")


def _watch(asked: list[Directory], names: set[str], count_stale: bool, pause: float = 1.0) -> None:
    """The table, drawn again every second until Ctrl-C; one that is not read is below it."""
    from rich.live import Live

    with Live(console=console(), auto_refresh=False) as live, suppress(KeyboardInterrupt):
        while True:
            live.update(_picture(asked, names, count_stale), refresh=True)
            time.sleep(pause)


def _picture(asked: list[Directory], names: set[str], count_stale: bool) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    found: list[Slot] = []
    told: list[str] = []
    for listed in slots_of_each(asked).values():
        if isinstance(listed, HookError):
            told.append(str(listed))
        else:
            found += listed
    processes = _Processes(found)
    found = [slot for slot in found if not names or slot.name in names]
    slots = [_Accounted(slot, count_stale, processes.has_only(slot)) for slot in found]
    told += _those_exited(slots)
    exited = [slot.name for slot in slots if slot.document is not None and slot.alive is False]
    if exited:
        told.append(f"counted although their owners have exited: slots {some_of(exited)}")
    for slot in slots:
        if slot.is_unreadable:
            told.append(f"slot {slot.name}: {slot.why_not}")
        elif (
            slot.document is not None
            and slot.alive
            and (why := why_stale(slot.document)) is not None
        ):
            told.append(why)
    gpus = totals.per_gpu([slot.document for slot in slots if slot.document is not None])
    columns, rows = _table(gpus, totals.together(gpus))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column.title, justify="right" if column.right else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    return Group(table, *(Text(printable(line), style="bold red") for line in told))


def _rest(gpu: totals.Gpu) -> Optional[int]:
    """Used memory that is neither weights, LoRA pool nor KV cache."""
    if gpu.total is None or gpu.free is None:
        return None
    return gpu.total - gpu.free - (gpu.weights + gpu.lora + gpu.kv_cache - gpu.released)
