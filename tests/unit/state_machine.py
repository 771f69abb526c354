"""Any sequence of events, driven through the real recorder and held against `state_oracle`.

The runners are fakes (`fake_sglang`), their models are real torch modules, the files, locks and
forked children are real.  The background thread does not run: what it does is called at chosen
moments (`end_streams`, `check`), so that each sequence can be told again.

Longer than 500 lines because all that can happen to one process is one class of rules.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import logging
import os
import shutil
import socket
import tempfile
import time
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from fake_sglang import FakeRunner, forget, update
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from slot_look import PUBLISHED, Look, Seen
from state_oracle import TAGS, Call, ProcessModel, SlotModel

from sglang_weight_hook.layout import files
from sglang_weight_hook.publisher import background, publish, recorder

ENVIRONMENT = {
    "SGLANG_WEIGHT_HOOK_CHECK_SECONDS": "0",
    "SGLANG_WEIGHT_HOOK_LOCK_TIMEOUT": "0.002",
}
RUNNERS = 4  # at most
NAMED_EFFECTS = ("update", "partial", "adapt", "stream", "relocate", "commit", "load")
PROCESS_EFFECTS = ("update", "relocate", "release", "resume")

pick = st.integers(0, 7)  # one of what there is
tags = st.lists(st.sampled_from((*TAGS, "of a later release")), unique=True, max_size=2)
outcomes = st.sampled_from(("answers", "returns", "returns", "refuses", "raises"))


class Answer:
    def __init__(self, success: bool) -> None:
        self.success, self.message = success, "as it is said"


def small_model() -> Any:
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))


def places(runner: Any) -> dict[str, tuple[Any, ...]] | None:
    """Where the model's tensors are now, asked of torch alone."""
    model = runner.model if runner is not None else None
    if model is None:
        return None
    found = dict(model.named_parameters(remove_duplicate=False))
    for index, module in enumerate(model):
        found.update(
            {
                f"{index}.{key}": value
                for key, value in vars(module).items()
                if isinstance(value, torch.Tensor)
            }
        )
    return {
        name: (
            one.data_ptr(),
            list(one.shape),
            list(one.stride()),
            one.untyped_storage().data_ptr(),
        )
        for name, one in found.items()
    }


class Begun:
    """A call, or a request, under way: the recorder's side of it and the oracle's."""

    def __init__(self, real: Any, call: Call, runners: list[Any]) -> None:
        self.real, self.call = real, call
        self.runners = runners  # as SGLang's frame does, it keeps them alive


class RecorderSequences(RuleBasedStateMachine):
    """See the module."""

    # -- the beginning and the end

    @initialize(quiet=st.booleans(), serves=st.booleans())
    def start(self, quiet: bool, serves: bool) -> None:
        """``serves``: a target and a draft that shares its embedding are there already."""
        self.stack = contextlib.ExitStack()
        self.folder = Path(tempfile.mkdtemp(prefix="states-"))
        self.stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
        self.maps = self.folder / "maps"
        logging.disable()  # a thousand sequences have much to say
        self.stack.callback(logging.disable, logging.NOTSET)
        environment = {
            **ENVIRONMENT,
            "SGLANG_WEIGHT_HOOK_DIR": str(self.maps),
            "SGLANG_WEIGHT_HOOK_QUIET_MS": "60000" if quiet else "0",
        }
        self.stack.enter_context(mock.patch.dict(os.environ, environment))
        # The thread's own work is called where a rule says so.
        self.stack.enter_context(mock.patch.object(background, "ensure", return_value=True))
        # Nobody asks here whether an owner lives, so nobody has to be waited for.
        self.stack.enter_context(mock.patch.object(publish, "_OWNER_PATIENCE", 0.0))
        self.clock = 0.0
        now = time.time

        def stepping() -> float:
            return now() + self.clock

        self.stack.enter_context(mock.patch.object(time, "time", stepping))
        forget()
        self.stack.callback(forget)
        host = "".join(c if c.isalnum() or c in "_.-" else "_" for c in socket.gethostname())
        self.process = ProcessModel(f"{host}-{os.getpid()}", quiet)
        self.runners: list[Any] = []
        self.slots: list[tuple[SlotModel, Any, Any]] = []  # with the runner, weakly, and Tracked
        self.begun: list[Begun] = []
        self.readers: dict[str, Any] = {}
        self.foreign: dict[str, tuple[Any, dict[str, bytes]]] = {}  # live owners that are not we
        self.hidden: list[tuple[Any, Any]] = []  # models that can't be looked at for a while
        self.seen = Seen(self.maps)
        if serves:
            for draft in (False, True):
                self.begin_load(draft, True)
                self.finish_all("returns")
            self.share(1, 0)
            self.scheduler()

    def teardown(self) -> None:
        if not hasattr(self, "stack"):
            return
        for file in self.readers.values():
            file.close()
        for owner, _ in self.foreign.values():
            owner.close()
        self.begun.clear()
        self.stack.close()

    # -- what is there

    def slot_of(self, runner: Any) -> SlotModel:
        return next(slot for slot, owner, _ in self.slots if owner() is runner)

    def chosen(self, number: int) -> Any:
        return self.runners[number % len(self.runners)]

    def has_runner(self) -> bool:
        return bool(self.runners)

    def _track(self, runner: Any) -> SlotModel:
        """The oracle's slot of a runner that the recorder is about to see for the first time."""
        weak = weakref.ref(runner)
        wanted = "0"
        if runner.is_draft_worker:
            taken = {slot.wanted for slot in self.process.slots}
            names = ("0_draft", *(f"0_draft{number}" for number in range(1, 9)))
            wanted = next(name for name in names if name not in taken)
        slot = SlotModel(wanted, lambda: places(weak()))
        self.process.claim(slot)
        self.process.slots.append(slot)
        self.slots.append((slot, weak, None))
        return slot

    def _bind(self) -> None:
        """The recorder's runners beside the oracle's."""
        self.slots = [
            (slot, weak, real or recorder._tracked.get(id(weak())))
            for slot, weak, real in self.slots
        ]

    # -- calls

    def _begin(self, kind: str, effect: str, named: list[Any], **details: Any) -> None:
        slots = [self.slot_of(runner) for runner in named]
        call = Call(
            kind,
            effect,
            slots,
            not named,
            bool(details.get("physical")),
            tuple(details.get("tags", ())),
        )
        self.process.begin(call)
        real = recorder.begin(kind, effect, named, details)
        self.begun.append(Begun(real, call, named))
        self._bind()

    def _finish(self, begun: Begun, outcome: str) -> None:
        self.begun.remove(begun)
        answer = {
            "answers": Answer(True),
            "returns": (True, "ok"),
            "refuses": (False, "refused"),
            "raises": None,
        }[outcome]
        error = RuntimeError("it failed") if outcome == "raises" else None
        success = outcome in ("answers", "returns")
        if begun.call.effect == "request":
            self.process.finish_request(begun.call, success)
            recorder.finish_request(begun.real, answer, error)
        elif begun.call.effect in ("settle", "build"):  # constructors return nothing
            self.process.finish(begun.call, error is None)
            recorder.finish(begun.real, None, error)
        else:
            self.process.finish(begun.call, success)
            recorder.finish(begun.real, answer, error)
        self._bind()

    @precondition(lambda self: len(self.runners) < RUNNERS)
    @rule(draft=st.booleans(), has_model=st.sampled_from((True, True, True, False)))
    def begin_load(self, draft: bool, has_model: bool) -> None:
        runner = FakeRunner(small_model() if has_model else None, draft=draft)
        self.runners.append(runner)
        self._track(runner)
        self._begin("load_model", "load", [runner])

    @precondition(lambda self: len(self.runners) < RUNNERS)
    @rule(outcome=outcomes)
    def build(self, outcome: str) -> None:
        """An encoder, which loads its model as it is constructed."""
        runner = FakeRunner(small_model())
        real = recorder.begin("encoder_ready", "build", [runner])
        if outcome == "raises":
            recorder.finish(real, None, RuntimeError("it failed"))
            return
        self.runners.append(runner)
        slot = self._track(runner)
        self.process.finish(Call("encoder_ready", "build", [slot], False), True)
        recorder.finish(real, None, None)
        self._bind()

    @rule()
    def begin_scheduler(self) -> None:
        self._begin("scheduler_ready", "settle", [])

    @precondition(has_runner)
    @rule(effect=st.sampled_from(NAMED_EFFECTS), number=pick, kind=st.sampled_from("ab"))
    def begin_named(self, effect: str, number: int, kind: str) -> None:
        self._begin(f"{effect}_{kind}", effect, [self.chosen(number)])

    @precondition(has_runner)
    @rule(effect=st.sampled_from(PROCESS_EFFECTS), physical=st.booleans(), named_tags=tags)
    def begin_of_process(self, effect: str, physical: bool, named_tags: list[str]) -> None:
        self._begin(f"{effect}_all", effect, [], physical=physical, tags=named_tags)

    @precondition(has_runner)
    @rule(effect=st.sampled_from(("open", "close")), number=pick, outcome=outcomes)
    def session(self, effect: str, number: int, outcome: str) -> None:
        self._begin("weight_update_session", effect, [self.chosen(number)])
        self._finish(self.begun[-1], outcome)

    @rule(is_last=st.booleans(), is_sessionless=st.booleans())
    def begin_request(self, is_last: bool, is_sessionless: bool) -> None:
        details = {"is_last": is_last, "is_sessionless": is_sessionless}
        request = Call("request", "request", **details)
        self.process.begin_request(request)
        self.begun.append(Begun(recorder.begin_request(details), request, []))

    @precondition(lambda self: self.begun)
    @rule(number=pick, outcome=outcomes)
    def finish(self, number: int, outcome: str) -> None:
        begun = self.begun[-1 - number % min(len(self.begun), 2)]
        if begun.call.effect == "request":
            inner = self.process.requests
            if begun.call is not inner[-1]:  # a frame inside another returns before it
                return
        self._finish(begun, outcome)

    @precondition(lambda self: self.begun)
    @rule(outcome=outcomes)
    def finish_all(self, outcome: str) -> None:
        while self.begun:
            self._finish(self.begun[-1], outcome)
            self._reap()

    @precondition(lambda self: self.begun)
    @rule(number=pick)
    def lose_call(self, number: int) -> None:
        """An exception out of a signal handler, in one of the hook's own lines."""
        self._lose(number)

    def _lose(self, number: int) -> None:
        # On its own: no name of this frame may keep the recorder's call alive.
        begun = self.begun.pop(number % len(self.begun))
        self.process.lose(begun.call)

    @precondition(has_runner)
    @rule(effect=st.sampled_from(NAMED_EFFECTS), number=pick, outcome=outcomes)
    def call_of_lost_request(self, effect: str, number: int, outcome: str) -> None:
        self.begin_request(False, False)
        self.whole_call(effect, number, outcome)
        self._lose(-1)

    @precondition(has_runner)
    @rule(number=pick, outcome=outcomes)
    def session_of_runner_that_goes(self, number: int, outcome: str) -> None:
        self.session("open", number, outcome)
        self.collect(number)

    @precondition(has_runner)
    @rule(number=pick, count=st.integers(1, 3), outcome=outcomes)
    def buckets(self, number: int, count: int, outcome: str) -> None:
        for index in range(count):
            self._begin("update_weights_from_tensor", "stream", [self.chosen(number)])
            self._finish(self.begun[-1], outcome if index == count - 1 else "returns")

    @precondition(has_runner)
    @rule(effect=st.sampled_from(NAMED_EFFECTS), number=pick, outcome=outcomes)
    def whole_call(self, effect: str, number: int, outcome: str) -> None:
        self._begin(effect, effect, [self.chosen(number)])
        self._finish(self.begun[-1], outcome)

    @precondition(has_runner)
    @rule(
        effect=st.sampled_from(("release", "resume")),
        physical=st.sampled_from((True, True, False)),
        named_tags=tags,
        outcome=outcomes,
    )
    def memory_call(self, effect: str, physical: bool, named_tags: list[str], outcome: str) -> None:
        self._begin(effect, effect, [], physical=physical, tags=named_tags)
        self._finish(self.begun[-1], outcome)

    @precondition(has_runner)
    @rule()
    def scheduler(self) -> None:
        self._begin("scheduler_ready", "settle", [])
        self._finish(self.begun[-1], "returns")

    # -- the models

    @precondition(has_runner)
    @rule(number=pick, index=st.integers(0, 1))
    def move(self, number: int, index: int) -> None:
        """With a call under way or without: a weight gets other memory."""
        model = self.chosen(number).model
        if model is not None:
            model[index].weight.data = torch.zeros_like(model[index].weight)

    @precondition(has_runner)
    @rule(number=pick)
    def add_or_remove(self, number: int) -> None:
        model = self.chosen(number).model
        if model is None:
            return
        if hasattr(model[0], "scale"):
            del model[0].scale
        else:
            model[0].scale = torch.ones(3)

    @precondition(lambda self: len(self.runners) > 1)
    @rule(number=pick, other=pick)
    def share(self, number: int, other: int) -> None:
        """A draft binds the target's embedding."""
        one, two = self.chosen(number).model, self.chosen(other).model
        if one is not None and two is not None:
            one[0].weight = two[0].weight

    @precondition(has_runner)
    @rule(number=pick)
    def hide_or_show_model(self, number: int) -> None:
        runner = self.chosen(number)
        for pair in self.hidden:
            if pair[0]() is runner:
                runner.model = pair[1]
                self.hidden.remove(pair)
                return
        self.hidden.append((weakref.ref(runner), runner.model or small_model()))
        runner.model = None

    @precondition(has_runner)
    @rule(number=pick)
    def collect(self, number: int) -> None:
        runner = self.runners.pop(number % len(self.runners))
        self.hidden = [pair for pair in self.hidden if pair[0]() is not runner]
        del runner

    # -- the background thread

    @rule(everything=st.booleans())
    def end_streams(self, everything: bool) -> None:
        self.process.end_streams(everything)
        recorder._RECORDER.end_streams(time.monotonic(), everything)

    @precondition(has_runner)
    @rule(number=pick)
    def check(self, number: int) -> None:
        runner = self.chosen(number)
        slot = self.slot_of(runner)
        if runner.model is None:
            return
        expected = self.process.checked(slot)
        real = recorder._tracked[id(runner)]
        assert recorder._RECORDER.check(real, True) == expected
        if expected:
            assert real.checked_at is not None
            assert abs(real.checked_at - time.time()) < 60

    # -- the machine around it

    @rule(seconds=st.sampled_from((-3e8, -3600.0, -0.5, 0.0, 3600.0, 3e8)))
    def step_clock(self, seconds: float) -> None:
        self.clock = seconds

    @precondition(has_runner)
    @rule(number=pick)
    def reader_comes_or_goes(self, number: int) -> None:
        slot = self.slot_of(self.chosen(number))
        if not self.process.is_there(slot):
            return
        if slot.name in self.readers:
            self.readers.pop(slot.name).close()
            self.process.readers.discard(slot.name)
            return
        path = self.maps / files.SAVING_LOCK.format(slot.name)
        if path.exists() and not slot.is_busy:
            file = path.open("rb")
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            self.readers[slot.name] = file
            self.process.readers.add(slot.name)

    @rule(claimed=st.sampled_from(((), ("0",), ("0", "0_draft"))))
    def remove_directory(self, claimed: tuple[str, ...]) -> None:
        """Somebody removes it, and another process may make it again for slots of its own."""
        shutil.rmtree(self.maps, ignore_errors=True)
        self.process.directory_removed()
        for file in self.readers.values():
            file.close()
        for owner, _ in self.foreign.values():
            owner.close()
        self.readers.clear()
        self.foreign.clear()
        self.seen.layouts.clear()
        for name in claimed:
            self._claim_as_another(name)

    def _claim_as_another(self, name: str) -> None:
        self.maps.mkdir(exist_ok=True)
        owner = (self.maps / files.OWNER_LOCK.format(name)).open("wb")
        fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (self.maps / files.SAVING_LOCK.format(name)).touch()
        documents = {one.format(name): b'{"another": "process"}' for one in PUBLISHED}
        for document, content in documents.items():
            (self.maps / document).write_bytes(content)
        self.foreign[name] = owner, documents
        self.process.foreign.add(name)

    @precondition(lambda self: self.foreign)
    @rule()
    def other_process_dies(self) -> None:
        name = sorted(self.foreign)[0]
        self.foreign.pop(name)[0].close()
        self.process.foreign.discard(name)

    @rule(what=st.sampled_from(("nothing", "update", "collect", "finish", "thread")), number=pick)
    def fork(self, what: str, number: int) -> None:
        before = self._own_files()
        child = os.fork()
        if child == 0:
            try:
                self._as_child(what, number)
                os._exit(0)
            except BaseException:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert self._own_files() == before

    def _as_child(self, what: str, number: int) -> None:
        if what == "update" and self.runners:
            update(self.chosen(number))
        elif what == "collect":
            self.runners.clear()
            self.begun.clear()
            gc.collect()
            recorder.finish(recorder.begin("scheduler_ready", "settle"), None, None)
        elif what == "finish":
            # The child leaves the frames in which it was forked.
            for begun in reversed(self.begun):
                if begun.call.effect == "request":
                    recorder.finish_request(begun.real, None, SystemExit())
                elif begun.call.effect != "build":
                    recorder.finish(begun.real, None, SystemExit())
        elif what == "thread":
            recorder._RECORDER.end_streams(time.monotonic(), everything=True)
            for _, _, real in self.slots:
                if real is not None:
                    recorder._RECORDER.check(real, True)

    def _own_files(self) -> dict[str, bytes]:
        found = {}
        for slot in filter(self.process.is_there, self.process.slots):
            for document in (*PUBLISHED, files.EVENTS):
                path = self.maps / document.format(slot.name)
                if path.exists():
                    found[path.name] = path.read_bytes()
        return found

    # -- what must hold after every step

    @invariant()
    def all_is_published_as_it_is(self) -> None:
        if not hasattr(self, "process"):
            return
        self._reap()
        for name, (_, documents) in self.foreign.items():
            for document, content in documents.items():
                assert (self.maps / document).read_bytes() == content, (name, document)
        for slot, _, real in self.slots:
            assert real is not None
            if self.process.is_there(slot):
                Look(self.seen, slot, real).hold()
            else:
                self._is_absent(real)

    def _reap(self) -> None:
        gone = [(slot, real) for slot, weak, real in self.slots if weak() is None]
        self.slots = [one for one in self.slots if one[1]() is not None]
        for slot, _ in gone:
            self.process.collected(slot)
        for slot, real in gone:
            assert real not in recorder._tracked.values()
            if not self.process.is_there(slot):
                continue
            for document in PUBLISHED:
                assert not (self.maps / document.format(slot.name)).exists()
            assert self.seen.is_free(files.OWNER_LOCK.format(slot.name))
            self.readers_of_gone(slot)

    def readers_of_gone(self, slot: SlotModel) -> None:
        file = self.readers.pop(slot.name, None)
        if file is not None:
            file.close()
            self.process.readers.discard(slot.name)

    def _is_absent(self, real: Any) -> None:
        """Its directory was removed: nothing in the new one is of that runner."""
        for path in self.maps.glob("weight_state_*.json"):
            assert json.loads(path.read_bytes()).get("instance") != real.instance
