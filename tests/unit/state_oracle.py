"""What must be published after any sequence of events: a model of one process's slots.

Written from docs/format.md, the table of `state_table` and the rules for sequences of events; it
imports nothing of the publisher.  It is told what happens, and what the models' live addresses
are; it foretells what the files say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Optional

from state_table import ALWAYS, BUILT, FAILED, LOADING, ONCE, READY, RELEASED, ROW, SAME

UPDATING = "updating"
TAGS = ("weights", "kv_cache", "cuda_graph")
STREAMS = {"stream", "relocate"}
SPARING = STREAMS | {"open", "close"}  # effects after which only the state may be written

# Name -> (address, shape, stride, address of the storage); None where there is no model.
Places = Optional[dict[str, tuple[Any, ...]]]


@dataclass(eq=False)
class Call:
    """One call under way, or one of the scheduler's requests around such."""

    kind: str
    effect: str
    named: list[SlotModel] = field(default_factory=list)  # none: all of the process
    names_all: bool = True
    physical: bool = False
    tags: tuple[str, ...] = ()
    participants: list[SlotModel] = field(default_factory=list)
    # Of a request:
    opened: list[tuple[SlotModel, SlotModel]] = field(default_factory=list)
    is_last: bool = False
    is_sessionless: bool = False


@dataclass(eq=False)
class EventModel:
    kind: str
    effects: set[str]
    calls: int = 1
    success: bool = True
    answered: Optional[bool] = None
    changed: bool = False
    write_failed: bool = False
    wrote_whole: bool = False
    is_last: bool = False
    lock: str = "held"
    before: str = LOADING  # the state, but for `released`, when it began

    @property
    def is_stream(self) -> bool:
        return len(self.effects) == 1 and self.effects <= STREAMS


@dataclass(eq=False)
class SlotModel:
    """One runner's slot.  ``live``: the runner's addresses as they are now."""

    wanted: str
    live: Callable[[], Places]
    name: str = ""
    epoch: int = -1  # of the directory in which it was claimed
    beneath: str = LOADING  # the state, but for `released`
    is_built: bool = False
    problem: bool = False
    layout_generation: int = 0
    content_generation: int = 0
    physical_epoch: int = 0
    kv_physical_epoch: int = 0
    residency: dict[str, str] = field(default_factory=lambda: dict.fromkeys(TAGS, "resident"))
    doubtful: set[str] = field(default_factory=set)
    published: Places = None  # the addresses in the layout
    told: str = ""  # the state as published
    event: Optional[EventModel] = None  # under way
    ended: Optional[EventModel] = None  # the last one
    inside: set[Call] = field(default_factory=set)
    openers: set[SlotModel] = field(default_factory=set)
    stream_open: bool = False
    unseen: bool = False
    is_updated: bool = False
    has_layout: bool = False
    is_settled_map: bool = False  # while it loads, a map is of the moment: nothing is spared
    # Of the events since somebody asked: whether each wrote the state alone; None: either.
    spared: list[Optional[bool]] = field(default_factory=list)

    @property
    def storages(self) -> set[int]:
        return {place[3] for place in (self.published or {}).values()}

    def shares_with(self, other: SlotModel) -> bool:
        return bool(self.storages & other.storages)

    @property
    def is_busy(self) -> bool:
        return self.event is not None


class ProcessModel:
    """The process: its slots, its requests, the directory, and who else has locks there."""

    def __init__(self, own_suffix: str, quiet: bool) -> None:
        self.own_suffix = own_suffix  # "{hostname}-{pid}"
        self.quiet = quiet  # whether buckets of a stream wait for each other
        self.slots: list[SlotModel] = []
        self.requests: list[Call] = []
        self.building: set[Call] = set()
        self.epoch = 0  # rises with each removal of the directory
        self.foreign: set[str] = set()  # slots that another live process owns
        self.readers: set[str] = set()  # slots of which a reader holds the lock

    # -- the directory

    def directory_removed(self) -> None:
        self.epoch += 1
        self.foreign.clear()
        self.readers.clear()
        for slot in self.slots:
            slot.has_layout = False

    def is_there(self, slot: SlotModel) -> bool:
        """Whether the slot's files are to be found."""
        return slot.epoch == self.epoch

    def claim(self, slot: SlotModel) -> None:
        if slot.epoch == self.epoch:
            return
        taken = {one.name for one in self.slots if one.epoch == self.epoch} | self.foreign
        own = f"{slot.wanted}.{self.own_suffix}"
        candidates = [slot.wanted, own, *(f"{own}-{number}" for number in range(2, 10))]
        slot.name = next(name for name in candidates if name not in taken)
        slot.epoch = self.epoch
        slot.has_layout = False

    # -- calls

    def participants(self, call: Call) -> list[SlotModel]:
        if call.names_all:
            return list(self.slots)
        if call.effect == "load":
            return list(call.named)
        others = (one for one in self.slots if one not in call.named)
        sharing = [one for one in others if any(one.shares_with(named) for named in call.named)]
        return [*call.named, *sharing]

    def begin(self, call: Call) -> None:
        if call.effect == "settle":
            self.building.add(call)
        if call.effect not in ("settle", "build"):
            self._join(call, self.participants(call))

    def _join(self, call: Call, participants: Iterable[SlotModel]) -> None:
        participants = list(participants)
        for slot in participants:
            event = slot.event
            if slot.stream_open and event is not None:
                same = event.is_stream and (call.kind, {call.effect}) == (event.kind, event.effects)
                if not same:
                    self._publish(slot)
        for slot in participants:
            call.participants.append(slot)
            self._enter(slot, call)
            if self.requests and slot not in self.requests[-1].participants:
                self.requests[-1].participants.append(slot)
                slot.inside.add(self.requests[-1])

    def _enter(self, slot: SlotModel, call: Call) -> None:
        event = slot.event
        if event is not None and (slot.inside or slot.openers or slot.stream_open):
            event.calls += 1
            event.effects.add(call.effect)
            slot.stream_open = False
            slot.inside.add(call)
            return
        is_lost = event is not None
        if event is not None and (event.write_failed or event.before == FAILED):
            slot.beneath = FAILED  # what it mended was not told
        slot.unseen = slot.unseen or is_lost
        self.claim(slot)
        slot.event = EventModel(call.kind, {call.effect}, changed=is_lost)
        slot.event.before = slot.beneath
        slot.event.lock = "timeout" if slot.name in self.readers else "held"
        slot.inside.add(call)
        slot.told = UPDATING if slot.is_built else LOADING

    def lose(self, call: Call) -> None:
        """Its end is never told."""
        self.building.discard(call)
        self.requests = [one for one in self.requests if one is not call]
        for slot in self.slots:
            slot.inside.discard(call)

    def finish(self, call: Call, succeeds: bool) -> None:
        is_constructor = call.effect in ("settle", "build")
        if is_constructor and not succeeds:
            self.building.discard(call)
            return
        self.building.discard(call)
        if is_constructor:
            named = call.named if not call.names_all else self.slots
            self._join(call, named)
        done = []
        for slot in call.participants:
            if slot not in self.slots:
                continue
            self._apply(slot, call, succeeds)
            slot.inside.discard(call)
            if not slot.inside and not slot.openers and slot.event is not None:
                done.append(slot)
        self._conclude(done)

    def _apply(self, slot: SlotModel, call: Call, succeeds: bool) -> None:
        row, event = ROW[call.effect, succeeds], slot.event
        is_named = call.names_all or slot in call.named
        constructs = call.effect in ("settle", "build")
        # Who writes to a runner uses it, whether or not that succeeds.
        if ROW[call.effect, True].loading == READY and (constructs or not self.building):
            slot.is_built = True
        changed = row.content == ALWAYS or (row.content == ONCE and slot.content_generation > 0)
        failed, fresh = row.ready == FAILED, False
        if call.effect in ("release", "resume") and call.physical:
            failed, fresh = self._apply_memory(slot, call, succeeds)
        after = row.after(slot.beneath)
        if after in (READY, BUILT):
            after = READY if slot.is_built else LOADING
        is_whole = succeeds and row.failed != SAME
        if slot.beneath == FAILED and not (is_whole and is_named):
            after = FAILED
        slot.beneath = FAILED if failed else after
        if call.effect not in ("load", "commit", "adapt", "open", "release", "resume"):
            slot.is_updated = slot.is_updated or not constructs
        if event is not None:
            event.success = event.success and succeeds
            event.changed = event.changed or changed or fresh
            event.write_failed = event.write_failed or failed
        if call.effect == "open" and succeeds:
            for opener in call.named:
                slot.openers.add(opener)
                if self.requests:
                    self.requests[-1].opened.append((slot, opener))
        if call.effect == "close":
            slot.openers -= set(call.named)
        if event is not None and is_whole and is_named:
            event.wrote_whole = True

    def _apply_memory(self, slot: SlotModel, call: Call, succeeds: bool) -> tuple[bool, bool]:
        """Whether that leaves the weights in doubt, and whether they have fresh pages."""
        tags = [tag for tag in call.tags or TAGS if tag in TAGS]
        if not succeeds:
            slot.doubtful.update(tags if call.effect == "release" else ())
            return "weights" in tags, False
        fresh = set()
        for tag in tags:
            if call.effect == "release":
                slot.residency[tag] = RELEASED
            else:
                if slot.residency[tag] == RELEASED or tag in slot.doubtful:
                    fresh.add(tag)
                slot.residency[tag] = "resident"
            slot.doubtful.discard(tag)
        slot.physical_epoch += "weights" in fresh
        slot.kv_physical_epoch += "kv_cache" in fresh
        return False, "weights" in fresh

    # -- requests

    def begin_request(self, request: Call) -> None:
        self.requests.append(request)

    def finish_request(self, request: Call, succeeds: bool) -> None:
        del self.requests[self.requests.index(request) :]
        participants = [slot for slot in request.participants if slot in self.slots]
        if not succeeds:
            for slot, opener in request.opened:
                slot.openers.discard(opener)
                if slot.event is not None:
                    slot.event.write_failed = True
        done = []
        for slot in participants:
            event = slot.event
            slot.inside.discard(request)
            if event is None:
                continue
            event.answered = succeeds if event.answered is None else event.answered and succeeds
            event.is_last = event.is_last or request.is_last
            if request.is_sessionless and succeeds and event.wrote_whole:
                slot.openers.clear()
            if not slot.inside and not slot.openers:
                done.append(slot)
        self._conclude(done)

    # -- the end of an event

    def _conclude(self, done: list[SlotModel]) -> None:
        over = []
        for slot in done:
            assert slot.event is not None
            stays = slot.event.is_stream and slot.is_built and slot.published is not None
            if self.quiet and stays and not slot.problem and not slot.unseen:
                slot.stream_open = True
            else:
                over.append(slot)
        for slot in over:
            self._publish(slot)

    def end_streams(self, everything: bool) -> None:
        for slot in self.slots:
            if slot.event is None or not slot.stream_open:
                continue
            if everything or slot.event.is_last:
                self._publish(slot)

    def _publish(self, slot: SlotModel) -> None:
        event = slot.event
        assert event is not None
        if event.write_failed:
            slot.beneath = FAILED
        elif slot.beneath == FAILED and event.wrote_whole:
            slot.beneath = READY if slot.is_built else LOADING
        is_lost_directory = not self.is_there(slot)
        self.claim(slot)
        if is_lost_directory:
            event.lock = "any"
        live = slot.live()
        if live is None:
            slot.problem, slot.published = True, None
            slot.layout_generation += 1
            slot.content_generation += 1
            slot.told, slot.has_layout = FAILED, True
            slot.spared.append(False)
        else:
            self._publish_map(slot, event, live)
            slot.told = RELEASED if slot.residency["weights"] == RELEASED else slot.beneath
        slot.ended, slot.event, slot.stream_open = event, None, False

    def _publish_map(self, slot: SlotModel, event: EventModel, live: dict[str, Any]) -> None:
        known = slot.published
        is_sparing = event.effects <= SPARING and not slot.problem and not slot.unseen
        is_sparing = is_sparing and slot.has_layout and slot.is_settled_map
        if is_sparing and known is not None:
            if "close" in event.effects:
                stands = known == live
                spares = None if stands else False
            else:
                # What no bucket had before waits for the next look at everything.
                stands = all(live.get(name) == place for name, place in known.items())
                spares = stands
            if stands:
                slot.spared.append(spares)
                slot.content_generation += event.changed
                return
        slot.spared.append(False)
        slot.layout_generation += known != live
        slot.content_generation += event.changed or slot.content_generation == 0
        slot.published, slot.problem, slot.unseen, slot.has_layout = live, False, False, True
        slot.is_settled_map = slot.is_built

    # -- what happens without a call

    def checked(self, slot: SlotModel) -> Optional[bool]:
        """The map is compared with memory; what that answers."""
        live = slot.live()
        if slot.is_busy or slot.published is None or live is None:
            return None
        if slot.published == live:
            return True
        self.claim(slot)
        event = EventModel("unannounced_change", {"unannounced_change"}, calls=0)
        event.lock = "any"
        slot.layout_generation += 1
        slot.content_generation += 1
        slot.published, slot.ended, slot.has_layout = live, event, True
        slot.is_settled_map = True
        slot.spared.append(False)
        return False

    def collected(self, slot: SlotModel) -> None:
        """The runner is gone: its documents go, and nobody closes its sessions any more."""
        self.slots.remove(slot)
        for other in self.slots:
            other.openers.discard(slot)
