"""What the processes of the bench play: real recorder, real torch tensors, a fake runner.

The map of `Weights` can be checked from outside without asking the process: the length of
every tensor follows from the layout generation (`bench.length_at`).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sglang_weight_hook.layout import files, location, variables
from sglang_weight_hook.publisher import once, recorder, settings
from tests.stress.bench import TENSORS, length_at, measure
from tests.unit.fake_sglang import FakeRunner, event, load, settle, stream, update


class Weights(torch.nn.Module):  # type: ignore[misc,unused-ignore]
    def __init__(self) -> None:
        super().__init__()
        for number in range(TENSORS):
            self.register_parameter(
                f"layer{number}", torch.nn.Parameter(torch.zeros(length_at(1)), requires_grad=False)
            )

    def move(self, generation: int) -> None:
        """Put every tensor elsewhere, as the map of ``generation`` will tell."""
        for parameter in self.parameters():
            parameter.data = torch.zeros(length_at(generation))


class Player:
    """A runner of which everything that SGLang does can be played."""

    def __init__(self, gpu_id: int = 0) -> None:
        self.runner: Any = FakeRunner(Weights(), gpu_id=gpu_id)

    @property
    def tracked(self) -> Any:
        return recorder._tracked.get(id(self.runner))

    @property
    def generation(self) -> int:
        return self.tracked.layout_generation if self.tracked else 0

    def load(self) -> None:
        load(self.runner)
        settle()

    def move(self) -> None:
        update(self.runner, during=lambda: self.runner.model.move(self.generation + 1))

    def bucket(self) -> None:
        stream(self.runner)

    def memory(self, kind: str) -> None:
        event(f"{kind}_memory_occupation", kind, details={"physical": True, "tags": []})

    def session(self) -> None:
        event("weight_update_session", "open", [self.runner])
        self.bucket()
        event("weight_update_session", "close", [self.runner])

    def truth(self) -> dict[str, Any]:
        return {
            name: [parameter.data_ptr(), list(parameter.shape)]
            for name, parameter in self.runner.model.named_parameters()
        }


def fresh(directory: str, lock_timeout: float = 0.2) -> None:
    """The hook as in a new process that publishes in ``directory``."""
    os.environ[location.DIRECTORY] = directory
    os.environ[variables.LOCK_TIMEOUT] = str(lock_timeout)
    forget()


def forget() -> None:
    recorder._after_fork_in_child()
    once._said.clear()
    settings._base = settings._settings = None


def state_of(path: str) -> Any:
    with open(path, "rb") as file:
        return json.load(file)


# --- the fault library ----------------------------------------------------------------------


class Faults:
    """The library of faults.c, if this process was started with it."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(None)
        self.library.fault_count.restype = ctypes.c_long
        self.library.fault_trail.restype = ctypes.c_char_p

    def arm(
        self, prefix: str, at: int, action: int, code: int = 0, mask: int = 127, times: int = 1
    ) -> None:
        self.library.fault_arm(
            os.fsencode(prefix), ctypes.c_long(at), action, code, mask, ctypes.c_long(times)
        )

    def disarm(self) -> None:
        self.library.fault_disarm()

    def rearm(self) -> None:
        self.library.fault_rearm()

    def clock(self, step: int) -> None:
        self.library.fault_clock(ctypes.c_long(step))

    @property
    def count(self) -> int:
        return int(self.library.fault_count())

    @property
    def trail(self) -> list[str]:
        return str(self.library.fault_trail().decode()).splitlines()


class Said(logging.Handler):
    """What the hook says in the log."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextlib.contextmanager
def listening() -> Any:
    said = Said()
    once.logger.addHandler(said)
    once.logger.propagate = False
    try:
        yield said.lines
    finally:
        once.logger.removeHandler(said)


# --- scenes: called by name in a forked child; what they return is told to the test --------------


_kept: list[Player] = []


def whole_life(player: Player) -> None:
    """Claim, publish in every way there is, and release the slot."""
    player.load()
    player.move()
    player.bucket()
    player.memory("release")
    player.memory("resume")
    player.session()
    player.move()
    player.runner = None
    gc.collect()
    recorder.begin("nothing", "open")  # reaps


def life(directory: str, at: int, action: int) -> dict[str, Any]:
    """`whole_life`, with something happening at the ``at``-th file operation."""
    fresh(directory)
    faults = Faults()
    faults.arm(directory, at, action)
    with listening() as said:
        whole_life(Player())
    faults.disarm()
    return {"operations": faults.count, "trail": faults.trail, "said": said}


def successor(directory: str) -> dict[str, Any]:
    """The next process on the slot; what it knows of itself."""
    fresh(directory)
    player = Player()
    with listening() as said:
        player.load()
        player.move()
    _kept.append(player)  # a runner that is collected takes its documents with it
    return {"slot": player.tracked.slot.name, "truth": player.truth(), "said": said}


def fault(
    directory: str, at: int, action: int, code: int, mask: int = 127, times: int = 1
) -> dict[str, Any]:
    """Updates while a file operation fails; what a reader finds after each, and after the end.

    The reader is this process itself: the truth does not move between an update and a look.
    """
    from sglang_weight_hook import reader

    fresh(directory, lock_timeout=0.05)
    faults, player = Faults(), Player()
    slot = reader.open_slot(directory, "0")
    wrong: list[str] = []

    def look(when: str) -> None:
        try:
            document = slot.read(timeout=0)
        except reader.HookError:
            return
        if not document.owner_alive() or document.state["state"] == "updating":
            return
        published = {name: [t["ptr"], t["shape"]] for name, t in document.tensors.items()}
        if published and published != player.truth():
            wrong.append(f"{when}: old addresses as {document.state['state']}")

    with listening() as said:
        player.load()
        descriptors = len(os.listdir("/proc/self/fd"))
        faults.arm(directory, at, action, code, mask, times)
        for step in ("move", "bucket", "move", "memory"):
            if step == "memory":
                player.memory("release")
                player.memory("resume")
            else:
                getattr(player, step)()
            faults.disarm()
            look(step)
            faults.rearm()
        seen = faults.count
        faults.disarm()
        player.move()
        look("healed")
    name = player.tracked.slot.name
    document = reader.open_slot(directory, name).read(timeout=0)
    healed = {key: [t["ptr"], t["shape"]] for key, t in document.tensors.items()} == player.truth()
    return {
        "operations": seen,
        "wrong": wrong,
        "said": said,
        "slot": name,
        "healed": healed and document.owner_alive() and document.state["problem"] is None,
        "descriptors": len(os.listdir("/proc/self/fd")) - descriptors,
        "left": [entry for entry in os.listdir(directory) if entry.startswith(".")],
    }


def faulty_start(directory: str, at: int, action: int, code: int, times: int) -> dict[str, Any]:
    """A server that starts on a faulty place and is updated when it is well again."""
    fresh(directory, lock_timeout=0.05)
    faults, player = Faults(), Player()
    faults.arm(directory, at, action, code, 127, times)
    with listening() as said:
        player.load()
        faults.disarm()
        player.move()
        player.move()
    return {
        "operations": faults.count,
        "said": said,
        "slot": player.tracked.slot.name if player.tracked else None,
        "truth": player.truth(),
    }


def publish_for_ever(directory: str, gpu_id: int = 0) -> None:
    """As fast as it goes, until killed."""
    fresh(directory, lock_timeout=1.0)
    logging.disable()
    player = Player(gpu_id)
    player.load()
    for number in range(1, 1_000_000_000):
        player.move()
        if number % 7 == 0:
            player.bucket()
        if number % 50 == 0:
            player.memory("release")
            player.memory("resume")
        if number % 10 == 0:
            time.sleep(0.006)  # who polls for the lock has to find it free at times


def update_under_abuse(
    directory: str, talk: str, lock_timeout: float, updates: int
) -> dict[str, Any]:
    """Updates while somebody abuses the lock: how long each asked to sleep, and what it said."""
    fresh(directory, lock_timeout)
    player = Player()
    player.load()
    # The two ends of a conversation, opened in the same order as by `bench.Actor`.
    hearing, telling = open(f"{talk}.in"), open(f"{talk}.out", "w", buffering=1)  # noqa: SIM115
    print("loaded", file=telling)
    hearing.readline()
    slept: list[float] = []
    really = time.sleep

    def sleep(seconds: float) -> None:
        slept[-1] += seconds
        really(seconds)

    time.sleep = sleep  # type: ignore[assignment]  # for publish, too
    statuses = []
    with listening() as said:
        for _ in range(updates):
            slept.append(0.0)
            player.move()
            statuses.append(state_of(player.tracked.slot.path(files.STATE))["lock"])
    print("abused", file=telling)
    hearing.readline()
    slept.append(0.0)
    player.move()
    path = player.tracked.slot.path(files.STATE)
    return {
        "slept": slept,
        "locks": statuses,
        "after": state_of(path)["lock"],
        "said": said,
        "truth": player.truth(),
    }


def clock_backwards(directory: str) -> dict[str, Any]:
    """Every look at the time of day is an hour before the last."""
    from sglang_weight_hook import reader

    fresh(directory)
    player, states = Player(), []
    slot = reader.open_slot(directory, "0")
    with listening() as said:
        player.load()
        Faults().clock(3600)
        known = slot.read_state()
        for _ in range(10):
            player.move()
            changed = slot.wait_for_change(known, timeout=10)
            assert changed is not None
            known = changed
            states.append([known["layout_generation"], known["updated_at"], known["lock"]])
        document = slot.read(timeout=0)
        followed = [found.layout_generation for found in slot.generations(timeout=0)]
    Faults().clock(0)
    return {
        "states": states,
        "said": said,
        "followed": followed,
        "true": {k: [t["ptr"], t["shape"]] for k, t in document.tensors.items()} == player.truth(),
    }


def as_another_user(directory: str, uid: int) -> dict[str, Any]:
    """A server that is not root."""
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)
    fresh(directory)
    player = Player()
    with listening() as said:
        player.load()
        for _ in range(3):
            player.move()
    _kept.append(player)
    return {
        "said": said,
        "slot": player.tracked.slot.name if player.tracked else None,
        "truth": player.truth(),
    }


def is_true(player: Player) -> bool:
    """Whether the slot's files tell what is so, and nobody holds its lock."""
    from sglang_weight_hook import reader

    slot = reader.open_slot(player.tracked.slot.directory, player.tracked.slot.name)
    with slot.weights_held(timeout=0):
        document = slot.read(timeout=0)
    found = {name: [t["ptr"], t["shape"]] for name, t in document.tensors.items()}
    ready = document.state["state"] == "ready" and document.state["problem"] is None
    return found == player.truth() and document.owner_alive() and ready


def threads_and_forks(directory: str, rounds: int) -> dict[str, Any]:
    """Two engines of one process, updated by threads, while children are forked off."""
    fresh(directory, lock_timeout=5.0)
    players = [Player(), Player()]
    with listening() as said:
        for player in players:
            player.load()
        errors: list[str] = []
        forked: list[int] = []

        def work(player: Player, number: int) -> None:
            try:
                for turn in range(rounds):
                    (player.bucket, player.session, player.bucket)[(number + turn) % 3]()
            except BaseException as error:
                errors.append(repr(error))

        threads = [
            threading.Thread(target=work, args=(players[number % 2], number)) for number in range(6)
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) and len(forked) < rounds:
            pid = os.fork()
            if pid == 0:  # wherever the threads were: it locks nothing, publishes nothing, ends
                try:
                    players[0].bucket()
                    players[1].move()
                    gc.collect()
                    os._exit(0)
                except BaseException:
                    os._exit(1)
            forked.append(pid)
            time.sleep(0.005)
        statuses = [os.waitpid(pid, 0)[1] for pid in forked]
        for thread in threads:
            thread.join()
        calm = [not player.tracked.inside and is_true(player) for player in players]
        for player in players:
            player.move()
    return {
        "said": said,
        "errors": errors,
        "forks": len(forked),
        "statuses": sorted(set(statuses)),
        "calm": calm,
        "true": [is_true(player) for player in players],
        "slots": [player.tracked.slot.name for player in players],
    }


def fork_and_go_on(directory: str) -> dict[str, Any]:
    """A child forked after the load outlives its parent; the slot does not live on in it."""
    fresh(directory)
    player = Player()
    player.load()
    _kept.append(player)
    pid = os.fork()
    if pid == 0:
        os.close(1)
        os.close(2)
        time.sleep(600)
        os._exit(0)
    return {"child": pid}


def leave_while_publishing(directory: str, how: str) -> None:
    """The interpreter ends while threads publish."""
    fresh(directory)
    logging.disable()
    player = Player()
    player.load()
    _kept.append(player)

    def work() -> None:
        while True:
            player.bucket()
            player.memory("release")
            player.memory("resume")

    for _ in range(3):
        threading.Thread(target=work, daemon=True).start()
    if how == "at exit":
        import atexit

        atexit.register(player.bucket)
    if how == "collected":
        player.runner.model = None
    time.sleep(0.05)
    if how == "exception":
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    raise SystemExit({"exception": "with a message"}.get(how, 0))


def interrupted_often(directory: str, updates: int) -> dict[str, Any]:
    """A signal with a handler (as SGLang has for SIGQUIT) every fraction of a millisecond."""
    fresh(directory)
    player, count = Player(), 0

    def handler(number: int, frame: Any) -> None:
        nonlocal count
        count += 1

    signal.signal(signal.SIGALRM, handler)
    with listening() as said:
        player.load()
        signal.setitimer(signal.ITIMER_REAL, 0.0003, 0.0003)
        for _ in range(updates):
            player.move()
        signal.setitimer(signal.ITIMER_REAL, 0)
    return {"said": said, "signals": count, "true": is_true(player)}


def grows(directory: str, rounds: int) -> dict[str, Any]:
    """Everything that a server does, over and over: resident bytes, descriptors and objects.

    Each of them once a quarter of the rounds are over, and at the end.
    """
    fresh(directory)
    player = Player()
    player.load()
    seen = []
    for number in range(rounds + 1):
        if number in (rounds // 4, rounds):
            gc.collect()
            resident, descriptors, files = measure(os.getpid(), Path(directory))
            seen.append(
                {
                    "resident": resident,
                    "descriptors": descriptors,
                    "objects": len(gc.get_objects()),
                    "files": len(files),
                }
            )
        update(player.runner)
        player.bucket()
        player.session()
        player.memory("release")
        player.memory("resume")
        event("update_weights_from_disk", "update", [player.runner], result=(False, "missing"))
    return {"early": seen[0], "late": seen[1]}


class Raised(BaseException):
    """What a signal handler throws into the middle, as Ctrl-C does."""


def thrown_into(directory: str, line: int) -> dict[str, Any]:
    """An exception out of a signal handler at the ``line``-th line of the hook in an update."""
    from sglang_weight_hook import reader

    fresh(directory, lock_timeout=0.05)
    player, left = Player(), line
    player.load()

    def trace(frame: Any, kind: str, argument: Any) -> Any:
        nonlocal left
        if "sglang_weight_hook" not in frame.f_code.co_filename:
            return None
        if kind == "line":
            left -= 1
            if left == 0:
                raise Raised
        return trace

    thrown = False
    with listening() as said:
        sys.settrace(trace)
        try:
            player.move()
        except Raised:
            thrown = True
        finally:
            sys.settrace(None)
        slot, wrong = reader.open_slot(directory, "0"), False
        try:
            document = slot.read(timeout=0)
            found = {name: [t["ptr"], t["shape"]] for name, t in document.tensors.items()}
            shown = document.owner_alive() and document.state["state"] != "updating"
            wrong = shown and bool(found) and found != player.truth()
        except reader.HookError:
            pass
        for _ in range(2):
            player.move()
        try:
            healed = is_true(player)
        except reader.HookError:
            healed = False
    return {"thrown": thrown, "wrong": wrong, "healed": healed, "said": said}


SCENES: dict[str, Callable[..., Any]] = {
    scene.__name__: scene
    for scene in (
        life,
        successor,
        fault,
        faulty_start,
        publish_for_ever,
        update_under_abuse,
        clock_backwards,
        as_another_user,
        threads_and_forks,
        fork_and_go_on,
        leave_while_publishing,
        interrupted_often,
        thrown_into,
        grows,
    )
}


# --- the server of forks --------------------------------------------------------------------


def main() -> None:
    """Play scenes in forked children: torch is imported once.

    A line in, a line out: ``{"scene": …, "arguments": {…}}`` gives ``{"pid": …}``;
    ``{"wait": pid}`` gives ``{"status": …, "said": …}``.
    """
    pipes: dict[int, int] = {}
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            pid = request["wait"]
            with os.fdopen(pipes.pop(pid), "rb") as pipe:
                said = pipe.read()
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            answer: dict[str, Any] = {"status": status, "said": said.decode()}
        else:
            reading, writing = os.pipe()
            pid = os.fork()
            if pid == 0:
                for other in pipes.values():
                    os.close(other)
                _play(writing, request["scene"], request["arguments"])
            os.close(writing)
            pipes[pid] = reading
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)


def _play(writing: int, scene: str, arguments: dict[str, Any]) -> None:
    status = 1
    try:
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        os.close(writing)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        result = SCENES[scene](**arguments)
        os.write(1, json.dumps(result).encode())
        status = 0
    except SystemExit:
        status = -1  # as a program ends, with all that Python does then
        raise
    except BaseException as error:
        import traceback

        os.write(1, "".join(traceback.format_exception(error)).encode())
    finally:
        if status >= 0:
            os._exit(status)


if __name__ == "__main__":
    main()
