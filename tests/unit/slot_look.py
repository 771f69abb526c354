"""One slot's published files, held against what `state_oracle` says of them."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jsonschema
from state_oracle import SlotModel

import sglang_weight_hook
from sglang_weight_hook.layout import files, header

SCHEMA_FOLDER = Path(sglang_weight_hook.__file__).parent / "layout" / "schema"
VALIDATORS = {
    name: jsonschema.Draft202012Validator(json.loads((SCHEMA_FOLDER / schema).read_bytes()))
    for name, schema in (
        (files.STATE, "weight_state.schema.json"),
        (files.LAYOUT, "weight_layout.schema.json"),
    )
}
PUBLISHED = (*files.DOCUMENTS, files.HEADER)


class Seen:
    """What was seen in one output directory before."""

    def __init__(self, maps: Path) -> None:
        self.maps = maps
        self.layouts: dict[SlotModel, tuple[int, int]] = {}  # the file that was there last
        self.generations: dict[str, tuple[int, ...]] = {}  # by instance
        self.checked: dict[Path, tuple[int, int]] = {}  # documents that are known to be valid

    def is_free(self, name: str) -> bool:
        with (self.maps / name).open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True


class Look:
    """One slot's files, against what the oracle says of them."""

    def __init__(self, seen: Seen, slot: SlotModel, real: Any) -> None:
        self.seen, self.slot, self.real = seen, slot, real
        self.state = self.read(files.STATE)
        self.layout = self.read(files.LAYOUT) if slot.has_layout else None

    def path(self, document: str) -> Path:
        return self.seen.maps / document.format(self.slot.name)

    def read(self, document: str) -> Any:
        data = self.path(document).read_bytes()
        content = json.loads(data)
        if document == files.STATE:
            assert len(data) < 2048
        stamp = (self.path(document).stat().st_ino, hash(data))
        if self.seen.checked.get(self.path(document)) != stamp:
            VALIDATORS[document].validate(content)
            self.seen.checked[self.path(document)] = stamp
        return content

    def hold(self) -> None:
        assert self.real.slot.name == self.slot.name == self.state["slot"]
        self.state_is_foretold()
        self.event_is_foretold()
        self.header_says_the_same()
        self.locks_are_foretold()
        self.generations_only_rise()
        self.documents_are_ours()
        if self.layout is not None:
            self.layout_is_foretold()
        else:
            assert not self.path(files.LAYOUT).exists()

    def state_is_foretold(self) -> None:
        slot = self.slot
        expected = {
            "state": slot.told,
            "layout_generation": slot.layout_generation,
            "content_generation": slot.content_generation,
            "residency": slot.residency,
            "instance": self.real.instance,
            "pid": os.getpid(),
        }
        if slot.event is None:  # else as of its beginning, or already as resumed
            expected["physical_epoch"] = slot.physical_epoch
            expected["kv_physical_epoch"] = slot.kv_physical_epoch
        else:
            del expected["residency"]
        found = {key: self.state[key] for key in expected}
        wrong = {key: (found[key], expected[key]) for key in found if found[key] != expected[key]}
        assert not wrong, f"slot {slot.name}: said, foretold: {wrong}"
        assert (self.state["problem"] is not None) == slot.problem

    def event_is_foretold(self) -> None:
        said, event = self.state["event"], self.slot.event or self.slot.ended
        assert event is not None
        assert said["kind"] == event.kind
        if self.slot.event is not None:
            # What is written at its beginning stays until its end.
            assert (said["success"], said["finished_at"], said["calls"]) == (None, None, 1)
            return
        assert (said["success"], said["answered"]) == (event.success, event.answered)
        assert said["calls"] == event.calls
        assert said["finished_at"] is not None

    def header_says_the_same(self) -> None:
        found = header.unpack(self.path(files.HEADER).read_bytes())
        assert found is not None
        for name in (
            *("state", "layout_generation", "content_generation", "physical_epoch"),
            *("kv_physical_epoch", "instance", "pid", "boot_id", "process_start_ticks"),
        ):
            assert getattr(found, name) == self.state[name], name
        if self.slot.event is None and self.layout is not None:
            data = self.path(files.LAYOUT).read_bytes()
            assert found.layout_digest == hashlib.sha256(data).hexdigest()[:32]

    def locks_are_foretold(self) -> None:
        slot, lock = self.slot, files.SAVING_LOCK.format(self.slot.name)
        event = slot.event or slot.ended
        assert event is not None
        if event.lock == "timeout":
            assert self.state["lock"] in ("timeout", "not waited for")
        elif event.lock != "any":
            assert self.state["lock"] == event.lock
        if slot.event is None:
            assert not (self.seen.maps / lock).exists() or self.seen.is_free(lock)
        elif slot.event.lock == "held":
            assert not self.seen.is_free(lock)
        assert not self.seen.is_free(files.OWNER_LOCK.format(slot.name))

    def generations_only_rise(self) -> None:
        names = ("layout_generation", "content_generation", "physical_epoch", "kv_physical_epoch")
        now = tuple(self.state[name] for name in names)
        before = self.seen.generations.get(self.real.instance, now)
        assert all(one >= other for one, other in zip(now, before, strict=True))
        self.seen.generations[self.real.instance] = now

    def documents_are_ours(self) -> None:
        for document in PUBLISHED:
            path = self.path(document)
            if path.exists():
                assert b'"another"' not in path.read_bytes(), document

    def layout_is_foretold(self) -> None:
        slot, layout = self.slot, self.layout
        status = self.path(files.LAYOUT).stat()
        stamp = (status.st_ino, status.st_mtime_ns)
        before = self.seen.layouts.get(slot)
        if slot.event is None:
            assert layout["instance"] == self.real.instance
            assert layout["layout_generation"] == self.state["layout_generation"]
        if before is not None:
            if False in slot.spared:
                assert before != stamp, "the layout was not written"
            elif None not in slot.spared:
                assert before == stamp, "the layout was written"
        self.seen.layouts[slot] = stamp
        slot.spared.clear()
        told = {}
        for name, tensor in layout["tensors"].items():
            for each in (name, *tensor["aliases"]):
                told[each] = (
                    tensor["ptr"],
                    tensor["shape"],
                    tensor["stride"],
                    tensor["storage_ptr"],
                )
        assert told == (slot.published or {})
        self.legacy_says_the_same()

    def legacy_says_the_same(self) -> None:
        if self.slot.event is not None:
            return
        meta = json.loads(self.path(files.WEIGHTS_META).read_bytes())
        for name, entry in meta.items():
            assert self.slot.published is not None
            assert entry["ptr"] == self.slot.published[name][0]
        regions = json.loads(self.path(files.MERGED).read_bytes())
        assert bool(regions) == bool(self.slot.published)
