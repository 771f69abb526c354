"""The live view: a line a slot, kept up to date; a slot's tensors, history and regions.

It draws what `polling` has found, and changes only the cells that say something else.
Needs Textual (the extra `top`).
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Optional

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding
from textual.screen import ModalScreen, Screen
from textual.widgets import DataTable, Footer, Input, Static

from ...reader import Document, HookError, Slot
from ..overview import SlotOverview, age_text, generations_text
from ..polling import Key, SlotPolling
from .event import event_parts
from .text import STYLES, address_text, date_and_time, printable, size_text

BAR = 20  # cells
PARTS = (
    ("weights", "blue"),
    ("kv_cache", "green"),
    ("lora", "magenta"),
    ("other", "yellow"),
    ("free", "bright_black"),
)
COLUMNS = (
    *("host", "gpu", "slot", "model", "role", "rank", "state", "gen"),
    *("last event", "age", "checked", "memory", "used"),
)
MOST_ROWS = 20_000  # of a list of tensors or events; a table of more answers no key
HELP = """\
Up, Down     choose a slot          Enter, t   its tensors
s, S         sort by the next,      h          its history
             the previous column    r          its regions
i            reverse the order      Escape, q  back
/            filter by any text; Escape ends it
?            this help              q, Ctrl-C  quit

state   stale: the owner has exited, so every address is invalid
gen     layout and content generation
checked how long ago map and memory were last found equal
"""


def bar(memory: Mapping[str, Optional[int]], width: int = BAR) -> Text:
    """What takes the device's memory up, each part in its colour; free in grey.

    A part that is there has one cell at least.
    """
    sizes = [(max(memory.get(name) or 0, 0), style) for name, style in PARTS]
    total = sum(size for size, _ in sizes)
    if total == 0:
        return Text("-")
    cells = [max(round(size * width / total), 1) if size else 0 for size, _ in sizes]
    cells[cells.index(max(cells))] += width - sum(cells)
    text = Text()
    for (_, style), count in zip(sizes, cells):
        text.append(("░" if style == "bright_black" else "█") * count, style)
    return text


def _used(memory: Mapping[str, Optional[int]]) -> str:
    """What is used of what there is: ``75.2 GiB/79.1 GiB``; without a device, the slot's own."""
    total, free = memory.get("total"), memory.get("free")
    if total is not None and free is not None:
        return f"{size_text(total - free)}/{size_text(total)}"
    own = sum(memory.get(name) or 0 for name in ("weights", "kv_cache", "lora"))
    return size_text(own) if own else "-"


def cells_of(one: SlotOverview, now: float) -> list[Text]:
    """The cells of a slot's line, in the order of `COLUMNS`."""
    model = one.model or one.model_class
    event = (one.event or "-") + (" failed" if one.event_ok is False else "")
    texts = [
        one.host or "-",
        "-" if one.gpu is None else str(one.gpu),
        one.slot,
        "-" if model is None else model.rstrip("/").rsplit("/", 1)[-1],
        one.role or "-",
        one.ranks or "-",
        one.state,
        generations_text(one.layout_generation, one.content_generation),
        event,
        age_text(one.event_at, now),
        age_text(one.checked_at, now),
    ]
    cells = [Text(printable(text), no_wrap=True) for text in texts]
    cells[COLUMNS.index("state")].stylize(STYLES.get(one.state, ""))
    if one.event_ok is False:
        cells[COLUMNS.index("last event")].stylize("bold red")
    return [*cells, bar(one.memory), Text(_used(one.memory))]


def _sort_value(one: SlotOverview, column: str, place: int) -> tuple[Any, ...]:
    """What a line is sorted by; equal ones stay in the order of their numbers (``place``)."""
    numbers = {
        "gpu": one.gpu,
        "gen": one.layout_generation,
        "age": None if one.event_at is None else -one.event_at,
        "checked": None if one.checked_at is None else -one.checked_at,
        "memory": one.memory.get("weights"),
        "used": (one.memory.get("total") or 0) - (one.memory.get("free") or 0),
    }
    texts = {
        "host": one.host,
        "model": one.model,
        "role": one.role,
        "rank": one.ranks,
        "state": one.state,
        "last event": one.event,
    }
    if column in numbers:
        number = numbers[column]
        return (number is None, number or 0, place)
    return (texts.get(column) or "", place)


class Help(ModalScreen[None]):
    """The keys."""

    BINDINGS: ClassVar = [Binding("escape,question_mark,q", "dismiss", "Back")]
    DEFAULT_CSS = """
    Help { align: center middle; }
    Help Static { width: auto; height: auto; padding: 1 2; border: round $primary; }
    """

    def compose(self) -> ComposeResult:
        yield Static(Text(HELP), id="help")


class Listing(Screen[None]):
    """One list about a slot: its tensors, its history or its regions."""

    BINDINGS: ClassVar = [Binding("escape,q", "dismiss", "Back")]

    def __init__(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        super().__init__()
        self.heading, self.columns, self.rows = title, columns, rows

    def compose(self) -> ComposeResult:
        yield Static(Text(printable(self.heading), style="bold"), id="heading")
        yield DataTable(cursor_type="row", zebra_stripes=True, id="list")
        yield Footer()

    def on_mount(self) -> None:
        table = self.query_one("#list", DataTable)
        table.add_columns(*self.columns)
        for row in self.rows[:MOST_ROWS]:
            table.add_row(*(Text(printable(cell), no_wrap=True) for cell in row))
        table.focus()


class LiveView(App[None]):
    """Every slot of some directories."""

    BINDINGS: ClassVar = [
        Binding("q", "quit", "Quit"),
        Binding("ctrl+c", "quit", "Quit", show=False, priority=True),
        Binding("question_mark", "help", "Help"),
        Binding("s", "sort(1)", "Sort"),
        Binding("S", "sort(-1)", "Sort back", show=False),
        Binding("i", "reverse", "Reverse"),
        Binding("slash", "filter", "Filter"),
        Binding("t", "tensors", "Tensors"),
        Binding("h", "history", "History"),
        Binding("r", "regions", "Regions"),
        Binding("escape", "end_filter", "End filter", show=False),
    ]
    ENABLE_COMMAND_PALETTE = False
    CSS = """
    #summary, #legend, #heading { height: 1; padding: 0 1; }
    #filter { display: none; height: 3; }
    #slots, #list { height: 1fr; }
    """

    def __init__(self, polling: SlotPolling, interval: float = 1.0) -> None:
        super().__init__()
        self.polling = polling
        self.interval = interval
        self.overviews: dict[Key, SlotOverview] = {}
        self.sort_column: Optional[str] = None  # None: directories and numbers
        self.reverse = False
        self.wanted = ""  # text that a line has to have
        self._is_polling = False
        self._shown: list[Key] = []  # in the table, in its order

    def compose(self) -> ComposeResult:
        yield Static(id="summary")
        yield DataTable(cursor_type="row", id="slots")
        yield Input(placeholder="text in any column", id="filter")
        yield Static(_legend(), id="legend")
        yield Footer()

    def on_mount(self) -> None:
        table = self.query_one("#slots", DataTable)
        for column in COLUMNS:
            table.add_column(column, key=column)
        table.focus()
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
            # Terminated, it gives the terminal back as it was.  Only the main thread may listen.
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self.exit)
        self.set_interval(self.interval, self._look)
        self._look()

    # -- what there is

    def _look(self) -> None:
        """Poll beside the keys: a directory on a file system that hangs keeps nobody from `q`."""
        if not self._is_polling:
            self._is_polling = True
            self.run_worker(self._poll, thread=True, exit_on_error=False)

    def _poll(self) -> None:
        try:
            found = self.polling.poll()
        finally:
            self._is_polling = False
        self.call_from_thread(self._take, found)

    def _take(self, found: dict[Key, SlotOverview]) -> None:
        self.overviews = found
        self._draw()

    def _order(self) -> list[Key]:
        now = time.time()
        places = {key: place for place, key in enumerate(self.overviews)}
        kept = [
            key
            for key, one in self.overviews.items()
            if not self.wanted
            or self.wanted.lower() in " ".join(cell.plain for cell in cells_of(one, now)).lower()
        ]
        if self.sort_column is not None:
            column = self.sort_column
            kept.sort(key=lambda key: _sort_value(self.overviews[key], column, places[key]))
        return kept[::-1] if self.reverse else kept

    def _draw(self) -> None:
        """Bring the table up to date: cells where the lines are the same, else all lines."""
        table = self.screen_stack[0].query_one("#slots", DataTable)
        now = time.time()
        order = self._order()
        if order != self._shown:
            chosen = self.chosen
            table.clear()
            for key in order:
                table.add_row(*cells_of(self.overviews[key], now), key="\0".join(key))
            self._shown = order
            if chosen in order:
                table.move_cursor(row=order.index(chosen), animate=False)
        else:
            for key in order:
                for column, cell in zip(COLUMNS, cells_of(self.overviews[key], now)):
                    name = "\0".join(key)
                    if table.get_cell(name, column) != cell:
                        table.update_cell(name, column, cell, update_width=True)
        self.screen_stack[0].query_one("#summary", Static).update(self._summary())

    def _summary(self) -> Text:
        counts: dict[str, int] = {}
        for one in self.overviews.values():
            counts[one.state] = counts.get(one.state, 0) + 1
        text = Text(f"{len(self.overviews)} slots")
        for state, count in counts.items():
            text.append(f"  {count} ")
            text.append(state, STYLES.get(state, ""))
        if self.wanted:
            text.append(f"  filter: {printable(self.wanted)} ({len(self._shown)} shown)")
        if self.sort_column:
            text.append(f"  by {self.sort_column}" + (", reversed" if self.reverse else ""))
        for problem in self.polling.problems.values():
            text.append(f"  {printable(problem)}", "bold red")
        if not self.overviews and not self.polling.problems:
            places = ", ".join(directory.path for directory in self.polling.directories)
            text.append(f": waiting for a server to publish in {printable(places)}")
        return text

    @property
    def chosen(self) -> Optional[Key]:
        """The slot under the cursor."""
        row = self.screen_stack[0].query_one("#slots", DataTable).cursor_row
        return self._shown[row] if 0 <= row < len(self._shown) else None

    # -- keys

    def action_help(self) -> None:
        self.push_screen(Help())

    def action_sort(self, step: int) -> None:
        orders: list[Optional[str]] = [None, *COLUMNS]
        self.sort_column = orders[(orders.index(self.sort_column) + step) % len(orders)]
        self._draw()

    def action_reverse(self) -> None:
        self.reverse = not self.reverse
        self._draw()

    def action_filter(self) -> None:
        field = self.query_one("#filter", Input)
        field.display = True
        field.focus()

    def action_end_filter(self) -> None:
        field = self.query_one("#filter", Input)
        field.value = ""
        field.display = False
        self.query_one("#slots", DataTable).focus()

    def on_input_changed(self, event: Input.Changed) -> None:
        self.wanted = event.value
        self._draw()

    def on_input_submitted(self) -> None:
        self.query_one("#slots", DataTable).focus()

    def on_data_table_row_selected(self, event: DataTable.RowSelected) -> None:
        if event.data_table.id == "slots":
            self.action_tensors()

    def action_tensors(self) -> None:
        self._open(lambda slot: _tensors(slot.read(2.0)))

    def action_regions(self) -> None:
        self._open(lambda slot: _regions(slot.read(2.0)))

    def action_history(self) -> None:
        self._open(_history)

    def _open(self, listing: Callable[[Slot], Listing]) -> None:
        key = self.chosen
        if key is None or len(self.screen_stack) > 1:
            return

        def read() -> None:
            try:
                found = listing(self.polling.slot(key))
            except HookError as error:
                self.call_from_thread(self.notify, printable(error), severity="error", markup=False)
            else:
                self.call_from_thread(self.push_screen, found)

        self.run_worker(read, thread=True, exit_on_error=False)


def _legend() -> Text:
    text = Text("memory: ")
    for name, style in PARTS:
        text.append("░ " if name == "free" else "█ ", style)
        text.append({"kv_cache": "KV cache", "lora": "LoRA"}.get(name, name) + "  ")
    return text


def _title(document: Document, count: int, what: str) -> str:
    state = document.state["state"] if document.owner_alive() else "stale"
    more = f", the first {MOST_ROWS} shown" if count > MOST_ROWS else ""
    return f"slot {document.slot.name} ({state}): {count} {what}{more}; Escape goes back"


def _tensors(document: Document) -> Listing:
    rows = [
        [
            tensor.name,
            address_text(tensor.ptr) if tensor.ptr else "-",
            size_text(tensor.size),
            tensor.dtype.replace("torch.", ""),
            "x".join(map(str, tensor.shape)) or "scalar",
            tensor.role,
            tensor.device,
        ]
        for tensor in document.iter_tensors()
    ]
    columns = ["name", "address", "size", "type", "shape", "role", "device"]
    return Listing(_title(document, len(rows), "tensors"), columns, rows)


def _regions(document: Document) -> Listing:
    rows = [
        [
            address_text(region.ptr),
            size_text(region.size),
            address_text(region.allocation_ptr),
            size_text(region.allocation_size),
            region.allocation_kind or region.allocation_source,
            str(len(region.tensors)),
            region.tensors[0] if region.tensors else "-",
        ]
        for region in document.iter_regions()
    ]
    columns = ["address", "size", "allocation", "of", "kind", "tensors", "first"]
    return Listing(_title(document, len(rows), "regions"), columns, rows)


def _history(slot: Slot) -> Listing:
    rows = []
    for event in slot.history():
        parts = event_parts(event.raw, event.raw)
        told = "".join(part if isinstance(part, str) else part[0] for part in parts)
        rows.append([date_and_time(event.at), told])
    rows.reverse()
    title = f"slot {slot.name}: {len(rows)} events, the last first; Escape goes back"
    return Listing(title, ["time", "event"], rows)
