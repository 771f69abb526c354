"""``sglang-weight-hook scrub``."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any, NamedTuple, Optional, Union

import typer

from ..memory.scrub import RETRY_SECONDS, Baseline, Corruption, Event, Pass, Read, Scrubber, Waiting
from ..reader import HookError, Stale, Tensor, open_directory
from ..reader.slot_names import slot_named
from .app import ACT, command
from .options import AddressOption, DirOption, MatchOption, ViaOption
from .render import scrub_metrics
from .render.text import clock, complain, print_line, size_text
from .selection import is_wanted, refuse_path, slots_in
from .slot_choice import slots_named

_RATE = 5.0  # MiB/s: less than 1 % of a core
_BASELINE_RATE = 200.0
_EVERY = 10.0  # seconds
_GIVE_UP = 10.0  # seconds, of a slot that cannot be read, with --once


class Unreadable(NamedTuple):
    """A slot is not watched any more."""

    slot: str


_Slots = Annotated[
    Optional[list[str]],
    typer.Argument(
        metavar="SLOT",
        show_default=False,
        help="Slots to watch (0, 0_draft, ...); default: all slots.",
        autocompletion=slots_named,
    ),
]
_Rate = Annotated[
    float,
    typer.Option(
        metavar="MIB", help="Read at most so many MiB a second; 0: without a bound.", min=0
    ),
]
_BaselineRate = Annotated[
    float,
    typer.Option(
        metavar="MIB",
        help="Read at most so many MiB a second for a baseline, which is taken after each change "
        "of the weights; 0: without a bound.",
        min=0,
    ),
]
_Every = Annotated[
    float,
    typer.Option(metavar="S", help="Let S seconds pass between the starts of two passes.", min=0),
]
_Exclude = Annotated[
    Optional[list[str]],
    typer.Option(
        help="Leave out tensors with TEXT in a name or alias; TEXT may be a pattern, as for "
        "--match; repeatable.",
        metavar="TEXT",
    ),
]
_Once = Annotated[
    bool, typer.Option("--once", help="Stop once each slot was compared with its baseline.")
]
_Stop = Annotated[bool, typer.Option("--stop", help="Stop at the first byte that has changed.")]
_MetricsPort = Annotated[
    Optional[int],
    typer.Option(
        metavar="PORT", help="Serve Prometheus metrics on 127.0.0.1:PORT.", min=1, max=65535
    ),
]
_JsonLines = Annotated[
    bool, typer.Option("--json", help="Print one JSON object a line for each event.")
]


@command(
    "scrub",
    "sglang-weight-hook scrub\n"
    "sglang-weight-hook scrub 0 --once --rate 500\n"
    "sglang-weight-hook scrub --json --metrics-port 9400 >> scrub.jsonl",
)
def scrub(
    slot: _Slots = None,
    directory: DirOption = None,
    rate: _Rate = _RATE,
    baseline_rate: _BaselineRate = _BASELINE_RATE,
    every: _Every = _EVERY,
    match: MatchOption = None,
    exclude: _Exclude = None,
    once: _Once = False,
    stop: _Stop = False,
    via: ViaOption = None,
    address: AddressOption = None,
    metrics_port: _MetricsPort = None,
    as_json: _JsonLines = False,
) -> int:
    """Watch weights for bytes that change without an update.

    Reads all weights after each update, then again and again, and tells of each word that has
    changed its tensor, index and bit and the value before and after.  Runs until Ctrl-C or
    SIGTERM.  Exit status 3 if anything had changed.
    """
    for name in slot or ():
        refuse_path(name, "memory to be read")
    found = open_directory(directory)
    every_slot = slots_in(found)
    slots = [slot_named(found, every_slot, name) for name in slot or []] or every_slot
    scrubbers = [
        Scrubber(each, _chosen(match, exclude or []), via, every, address) for each in slots
    ]
    report = scrub_metrics.serve(metrics_port) if metrics_port else lambda event: None
    show = _print_json if as_json else _print_event
    wrong = 0
    with _ends_with_signals() as ended:
        pace = _Pace({False: rate, True: baseline_rate}, ended)
        try:
            for event in _merged(scrubbers, once, pace, ended):
                if isinstance(event, Unreadable):
                    wrong += 1
                    continue
                report(event)
                if isinstance(event, Read):
                    continue
                show(event)
                if isinstance(event, Corruption):
                    wrong += 1
                    if stop:
                        break
        except HookError as error:
            if not wrong:
                raise
            complain(str(error))
    return ACT if wrong else 0


def _chosen(match: Optional[str], exclude: list[str]) -> Callable[[Tensor], bool]:
    return lambda tensor: (
        is_wanted(tensor, match) and not any(is_wanted(tensor, pattern) for pattern in exclude)
    )


def _merged(
    scrubbers: list[Scrubber], once: bool, pace: _Pace, ended: threading.Event
) -> Iterator[Union[Event, Unreadable]]:
    """The events of all slots, which are read a piece each in turn.

    A slot whose memory cannot be reached is named and stops none of the others.  ``once``: nor does
    it take longer than `_GIVE_UP` seconds.  Raises HookError where no slot is left.
    """
    running = {scrubber: scrubber.events() for scrubber in scrubbers}
    idle_since: dict[Scrubber, float] = {}
    while running and not ended.is_set():
        for scrubber, events in list(running.items()):
            try:
                for event in events:
                    yield event
                    if once and isinstance(event, Pass):
                        del running[scrubber]
                    if isinstance(event, (Pass, Read)):
                        break
                if isinstance(event, Read) and not event.bytes:
                    since = idle_since.setdefault(scrubber, time.monotonic())
                    if once and time.monotonic() - since > _GIVE_UP:
                        raise Stale(f"slot {scrubber.slot.name} could not be read: {scrubber.why}")
                else:
                    idle_since.pop(scrubber, None)
                    if isinstance(event, Read):
                        pace.after(event)
            except HookError as error:
                del running[scrubber]
                if not running:
                    raise
                complain(f"{error}; the other slots are watched on")
                yield Unreadable(scrubber.slot.name)
        if running.keys() <= idle_since.keys():
            ended.wait(RETRY_SECONDS)


class _Pace:
    """Keeps reading below a rate: bytes a second, by whether a baseline is taken."""

    def __init__(self, rates: dict[bool, float], ended: threading.Event) -> None:
        self._rates = {kind: rate * (1 << 20) for kind, rate in rates.items()}
        self._ended = ended
        self._due = time.monotonic()

    def after(self, read: Read) -> None:
        rate = self._rates[read.is_baseline]
        if not rate or not read.bytes:
            return
        now = time.monotonic()
        # What was not used up is not saved for a burst.
        self._due = max(self._due, now - 1.0) + read.bytes / rate
        if self._due > now:
            self._ended.wait(self._due - now)


@contextlib.contextmanager
def _ends_with_signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set."""
    ended = threading.Event()
    before = {
        number: signal.signal(number, lambda *_: ended.set())
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield ended
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _print_json(event: Any) -> None:
    kind = type(event).__name__.lower()
    sys.stdout.write(json.dumps({"event": kind, **event._asdict()}) + "\n")
    sys.stdout.flush()


def _print_event(event: Any) -> None:
    where = f"{clock(time.time())}  {event.slot}  "
    if isinstance(event, Waiting):
        complain(f"{event.why}; waiting")
    elif isinstance(event, Baseline):
        print_line(
            where,
            f"baseline of content generation {event.content_generation}: {event.tensors} tensors, "
            f"{size_text(event.bytes)} in {event.seconds:.1f} s by {', '.join(event.via)}",
        )
    elif isinstance(event, Pass):
        says = f"{event.corruptions} changed" if event.corruptions else "unchanged"
        print_line(
            where,
            (says, "bold red" if event.corruptions else "green"),
            f"  pass {event.number}, {size_text(event.bytes)} in {event.seconds:.1f} s",
        )
    else:
        print_line(where, ("CHANGED", "bold red"), f"  {_described(event)}")
    sys.stdout.flush()


def _described(event: Corruption) -> str:
    if event.element is None:
        end = event.offset + event.size
        return (
            f"{event.tensor}: several words among the bytes {event.offset} to {end} of its values"
        )
    index = ", ".join(map(str, event.element))
    what = f"bit {event.bit}" if event.bit is not None else f"{event.bits} bits"
    values = f", {event.before} -> {event.after}" if event.before else ""
    return f"{event.tensor}[{index}] {what}{values}, at {event.address:#x}"
