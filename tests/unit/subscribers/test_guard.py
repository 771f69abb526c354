"""What a subscriber does wrong stays its own: SGLang goes on, the state file says what it was."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_sglang import FakeRunner, event, load, settle, update
from telling import Told

from sglang_weight_hook.layout import files
from sglang_weight_hook.publisher import recorder, subscription
from sglang_weight_hook.publisher.subscribers import Event

torch = pytest.importorskip("torch")

NAME = "a_subscriber:make"
PHYSICAL = {"tags": None, "physical": True}


def published(**more: Any) -> FakeRunner:
    runner = FakeRunner(torch.nn.Linear(4, 4), **more)
    load(runner)
    settle()
    return runner


def state(maps: Path, slot: str = "0") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((maps / files.STATE.format(slot)).read_bytes())
    return found


def problem(maps: Path, name: str = NAME) -> Any:
    return state(maps)["subscribers"][name]


def wait_until(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def fail(error: BaseException) -> Callable[[], None]:
    def raise_it() -> None:
        raise error

    return raise_it


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3), KeyboardInterrupt()])
@pytest.mark.parametrize("method", ["before", "after"])
def test_what_it_raises_is_named_and_goes_no_further(
    subscribe: Any, maps: Path, method: str, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    told = subscribe.told()
    runner = published()
    told.does[method] = fail(error)
    for _ in range(3):
        update(runner)
    said = f"{method} raised {type(error).__name__}"
    if method == "after":
        assert problem(maps).startswith(said)
    assert sum(said in record.getMessage() for record in caplog.records) >= 1
    assert state(maps)["state"] == "ready"
    told.does.clear()
    update(runner)
    assert problem(maps) is None


def test_after_a_failure_the_diff_is_against_what_was_given_successfully(subscribe: Any) -> None:
    told = subscribe.told()
    runner = published()
    was = told.documents[-1]["tensors"]["weight"]["ptr"]
    told.does["after"] = fail(ValueError("no"))
    update(runner, during=lambda: setattr(runner.model.weight, "data", torch.zeros(4, 4)))
    assert told.diffs[-1].moved == ("weight",)
    told.does.clear()
    update(runner)  # moves nothing
    assert told.diffs[-1].moved == ("weight",)
    assert was in {region.ptr for region in told.diffs[-1].regions_removed}
    update(runner)
    assert told.diffs[-1].moved == ()


def test_a_late_one_is_waited_for_no_longer_than_the_timeout(subscribe: Any, maps: Path) -> None:
    told = subscribe.told(timeout=0.2)
    runner = published()
    release = threading.Event()
    told.does["after"] = lambda: release.wait(30) and None
    started = time.monotonic()
    update(runner)
    assert 0.2 <= time.monotonic() - started < 5
    assert problem(maps) == "after took more than 0.2 s"
    assert state(maps)["state"] == "ready"
    release.set()


def test_a_late_one_is_not_called_until_it_is_back_and_then_told_at_once(
    subscribe: Any, maps: Path
) -> None:
    told = subscribe.told(timeout=0.2)
    runner = published()
    release = threading.Event()
    told.does["after"] = lambda: release.wait(30) and None
    update(runner)
    calls = len(told.calls)
    started = time.monotonic()
    update(runner, during=lambda: setattr(runner.model.weight, "data", torch.zeros(4, 4)))
    update(runner, during=lambda: setattr(runner.model.bias, "data", torch.zeros(4)))
    assert time.monotonic() - started < 5
    assert len(told.calls) == calls
    assert problem(maps).startswith("not called: after has taken")
    told.does.clear()
    release.set()
    wait_until(lambda: len(told.calls) > calls)
    # One call for both, without another event.
    wait_until(lambda: problem(maps) is None)
    assert [call[0] for call in told.calls[calls:]] == ["after"]
    assert set(told.diffs[-1].moved) == {"weight", "bias"}
    assert state(maps)["state"] == "ready"


def test_one_that_is_always_late_is_called_once_for_each_event(subscribe: Any) -> None:
    told = subscribe.told(timeout=0.1)
    runner = published()
    told.does["after"] = lambda: time.sleep(0.2)
    calls = len(told.calls)
    update(runner)
    time.sleep(1.5)
    assert [call[0] for call in told.calls[calls:]] == ["before", "after"]


class Missing(Told):
    """One that wants to be told of what went on without it."""

    def missed(self, slot: str, event: Event) -> None:
        self._note("missed", slot, event)


def test_one_that_is_late_at_a_release_hears_of_it_before_anything_else(
    subscribe: Any, maps: Path
) -> None:
    told = Missing()
    subscribe.a_module("a_subscriber", lambda: told)
    subscribe.to(NAME, timeout=0.2)
    runner = published()
    release = threading.Event()
    told.does["after"] = lambda: release.wait(30) and None
    update(runner)
    calls = len(told.calls)
    event("release_memory_occupation", "release", [runner], details=PHYSICAL)
    event("resume_memory_occupation", "resume", [runner], details=PHYSICAL)
    told.does.clear()
    release.set()
    wait_until(lambda: problem(maps) is None)
    # Not `before`: it would touch memory that is gone.  Both events in one call.
    assert [call[0] for call in told.calls[calls:]] == ["missed", "after"]
    missed = told.calls[calls][2]
    assert missed.releases == {"weights", "kv_cache", "cuda_graph"}
    assert missed.effects == {"release", "resume"}
    assert told.diffs[-1].repaged
    assert told.documents[-1]["physical_epoch"] == 1


def test_an_after_that_has_not_begun_is_overtaken_by_the_next_event(subscribe: Any) -> None:
    told = Missing()
    subscribe.a_module("a_subscriber", lambda: told)
    subscribe.to(NAME, timeout=0.2)
    runner, other = published(gpu_id=0), published(gpu_id=1)
    release = threading.Event()
    told.does["after"] = lambda: release.wait(30) and None
    update(other)  # late with the other slot's
    calls = len(told.calls)
    update(runner)
    generation = told.documents[-1]["content_generation"]
    event(
        "release_memory_occupation", "release", [runner], details=PHYSICAL, during=release.set
    )  # while the `after` of the update waits in the queue
    wait_until(lambda: ("after", "0") in told.methods()[calls:])
    of_it = [call for call in told.calls[calls:] if call[1] == "0"]
    assert [call[0] for call in of_it] == ["missed", "after"]
    assert told.documents[-1]["content_generation"] >= generation
    assert told.documents[-1]["event"]["kind"] == "release_memory_occupation"


def test_with_a_timeout_of_0_nobody_waits_and_all_is_told(subscribe: Any, maps: Path) -> None:
    told = Missing()
    subscribe.a_module("a_subscriber", lambda: told)
    subscribe.to(NAME, timeout=0.0)
    runner = published()
    wait_until(lambda: ("after", "0") in told.methods())
    entered, release = threading.Event(), threading.Event()

    def hang() -> None:
        entered.set()
        release.wait(30)

    told.does["missed"] = hang
    update(runner, during=lambda: setattr(runner.model.weight, "data", torch.zeros(4, 4)))
    assert state(maps)["state"] == "ready"
    assert entered.wait(10)
    update(runner, during=lambda: setattr(runner.model.bias, "data", torch.zeros(4)))
    assert problem(maps) is None
    release.set()
    wait_until(lambda: told.methods()[-1] == ("after", "0") and len(told.diffs[-1].moved) > 0)
    wait_until(lambda: set(told.diffs[-1].moved) == {"weight", "bias"})
    assert "before" not in {call[0] for call in told.calls}
    assert problem(maps) is None


def test_one_that_hangs_while_it_is_made_costs_one_timeout_an_event(
    subscribe: Any, maps: Path
) -> None:
    release = threading.Event()

    def make() -> Any:
        release.wait(30)
        raise RuntimeError("too late")

    subscribe.a_module("a_subscriber", make)
    subscribe.to(NAME, timeout=0.2)
    started = time.monotonic()
    runner = published()
    assert time.monotonic() - started < 5
    assert "s so far" in problem(maps) or "more than" in problem(maps)
    release.set()
    wait_until(lambda: subscription.current._threads[0].refused is not None)  # type: ignore[union-attr]
    update(runner)
    assert problem(maps) == "could not be loaded: RuntimeError: too late"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_such_module_here:make", "could not be loaded: ModuleNotFoundError"),
        ("json:no_such_function", "could not be loaded: AttributeError"),
        ("monocake", "could not be loaded: ValueError: there is no subscriber of that name"),
        ("collections:Counter", "could not be loaded: TypeError: what collections:Counter gave"),
    ],
)
def test_one_that_cannot_be_loaded_is_named(
    subscribe: Any, maps: Path, name: str, said: str
) -> None:
    subscribe.to(name)
    runner = published()
    assert problem(maps, name).startswith(said[:45])
    assert runner.model is not None


def test_one_that_fails_keeps_the_others_from_nothing(subscribe: Any, maps: Path) -> None:
    told = subscribe.told()
    subscribe.to("no_such_module_here:make", NAME)
    runner = published()
    update(runner)
    assert [method for method, *_ in told.calls][-2:] == ["before", "after"]
    assert problem(maps) is None


def test_several_hang_for_one_timeout_together(subscribe: Any, maps: Path) -> None:
    release = threading.Event()

    class Hangs:
        def before(self, slot: str, event: Any) -> None: ...
        def after(self, slot: str, document: Any, diff: Any) -> None:
            if document["event"]["kind"].startswith("update"):
                release.wait(30)

        def gone(self, slot: str) -> None: ...

    for name in ("one", "two", "three"):
        subscribe.a_module(f"hangs_{name}", Hangs)
    names = [f"hangs_{name}:make" for name in ("one", "two", "three")]
    subscribe.to(*names, timeout=0.5)
    runner = published()
    started = time.monotonic()
    update(runner)
    assert time.monotonic() - started < 1.4
    assert all(problem(maps, name) for name in names)
    release.set()


@pytest.mark.parametrize("method", ["before", "after"])
def test_one_that_calls_sglang_is_let_through(subscribe: Any, maps: Path, method: str) -> None:
    told = subscribe.told()
    runner = published()
    seen: list[str] = []

    def call_sglang() -> None:
        request = recorder.begin_request({})
        update(runner, during=lambda: seen.append("sglang's own method"))
        event("scheduler_ready", "settle")
        recorder.finish_request(request, (True, "ok"), None)

    told.does[method] = call_sglang
    calls = len(told.calls)
    started = time.monotonic()
    update(runner)
    assert time.monotonic() - started < 4
    assert seen == ["sglang's own method"]
    assert len(told.calls) == calls + 2
    assert problem(maps) is None


def test_a_forked_child_has_none(told: Any, maps: Path) -> None:
    runner = published()
    before = len(told.calls)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # must not return into pytest
        try:
            update(runner)
            threads = [t.name for t in threading.enumerate() if "subscriber" in t.name]
            says = (subscription.current is None, len(told.calls) - before, threads)
            os.write(write, repr(says).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    with os.fdopen(read) as pipe:
        assert pipe.read() == "(True, 0, [])"
    update(runner)
    assert len(told.calls) == before + 2


def test_a_forked_child_that_loads_a_model_says_that_it_has_none(told: Any, maps: Path) -> None:
    runner = published()
    child = os.fork()
    if child == 0:
        try:
            other = published(gpu_id=7)
            ok = "subscribers" not in state(maps, "7") and other is not None
            os._exit(0 if ok else 1)
        except BaseException:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert runner.model is not None


def test_the_state_file_stays_below_2_kb_with_subscribers_that_fail(
    subscribe: Any, maps: Path
) -> None:
    names = [f"a_package_with_a_long_name.and_a_module_{i}:factory" for i in range(9)]
    subscribe.to(*names)
    runner = published()
    event("update_weights_from_disk", "update", [runner], error=ValueError("ü" * 5000))
    data = (maps / files.STATE.format("0")).read_bytes()
    assert len(data) < 2048
    assert len(json.loads(data)["subscribers"]) == 3
