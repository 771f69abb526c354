"""What requests cost a real SGLang server on this CPU, with the hook and without."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cpu_sglang.environment import Environment, ensure_environment
from cpu_sglang.server import Server
from sglang_weight_hook.layout.location import DEFAULT_DIRECTORY
from sglang_weight_hook.reader import open_directory
from tests.real_sglang.hooked import make_checkpoint, make_venv

from . import table
from .measure import Sample, ratios, rotated
from .table import Line, Section

# Whether it has the hook.
KINDS = {"without": False, "with": True, "without, again": False, "with, again": True}
AT_ONCE = 16
TOKENS = 16
UPDATE = "/update_weights_from_disk"


def measure(quick: bool) -> Section:
    rounds = 8 if quick else 60
    environment = ensure_environment()
    lines: list[Line] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="serving-")))
        models = [make_checkpoint(environment, folder / str(seed), seed) for seed in (1, 2)]
        servers = _start_all(environment, models[0], folder, stack)
        slots = {kind: open_directory(str(folder / kind / DEFAULT_DIRECTORY)) for kind in KINDS}
        published = {kind: os.path.isdir(place.path) for kind, place in slots.items()}
        assert published == KINDS, published
        tensors = len(slots["with"].slot("0").read().tensors)
        clients = stack.enter_context(ThreadPoolExecutor(AT_ONCE))

        def burst(server: Server, _: int) -> None:
            list(clients.map(lambda _: server.generate(max_new_tokens=TOKENS), range(AT_ONCE)))

        def update(server: Server, turn: int) -> None:
            status, answer = server.post(UPDATE, {"model_path": str(models[turn % 2])})
            assert status == 200, answer

        lines += _compare(f"{AT_ONCE} requests of {TOKENS} tokens at once", burst, servers, rounds)
        lines += _compare(f"update from disk, {tensors} tensors", update, servers, rounds)
    return Section("Requests to a real server", lines, HOW, LIMITS)


def _start_all(
    environment: Environment, model: Path, folder: Path, stack: ExitStack
) -> dict[str, Server]:
    """A server of each kind, stopped (SIGSTOP) until it is to work; they end with ``stack``."""
    hooked = make_venv(folder / "hooked", environment)
    servers: dict[str, Server] = {}
    for kind, has_hook in KINDS.items():
        cwd = folder / kind
        cwd.mkdir()
        python = hooked if has_hook else environment.python
        server = Server(
            environment,
            model,
            cwd=cwd,
            log_path=cwd / "log",
            command=[str(python), "-m", "sglang.launch_server"],
        )
        servers[kind] = stack.enter_context(server)
        # The others stand still while one works: an idle scheduler polls.
        stack.callback(_signal, server, signal.SIGCONT)
        _signal(server, signal.SIGSTOP)
    return servers


def _compare(
    what: str, act: Callable[[Server, int], None], servers: dict[str, Server], rounds: int
) -> list[Line]:
    """``act`` on each server, interleaved: CPU and wall time against the one without the hook."""
    wall: dict[str, list[float]] = {kind: [] for kind in KINDS}
    cpu: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(-2, rounds):  # two to warm up
        for kind in rotated(KINDS, turn):
            with _running(servers[kind]) as server:
                began, used = time.perf_counter(), _cpu_seconds(server)
                act(server, turn)
                if turn >= 0:
                    wall[kind].append(time.perf_counter() - began)
                    cpu[kind].append(_cpu_seconds(server) - used)
    lines = []
    for clock, values in (("CPU of all its processes", cpu), ("wall", wall)):
        samples = {kind: Sample(each) for kind, each in values.items()}
        for kind in list(KINDS)[1:]:
            lines.append(
                Line(
                    f"{what}: {kind}, {clock}",
                    table.timing(samples[kind]),
                    f"without: {table.timing(samples['without'])}",
                    table.times(ratios(samples[kind], samples["without"]), 3),
                )
            )
    return lines


@contextmanager
def _running(server: Server) -> Iterator[Server]:
    _signal(server, signal.SIGCONT)
    try:
        yield server
    finally:
        _signal(server, signal.SIGSTOP)


def _signal(server: Server, number: int) -> None:
    if server.alive:
        os.killpg(server.pid, number)


def _cpu_seconds(server: Server) -> float:
    """Of all threads of all processes of the server, from /proc/PID/task/TID/schedstat."""
    total = 0
    for pid in server.group_pids():
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += int(task.joinpath("schedstat").read_text().split()[0])
    return total / 1e9


HOW = """\
Four servers of SGLang on this CPU with a tiny model, two with the hook and two without, the
others stopped (SIGSTOP) while one works; the order rotates. Every ratio is to the first server
without the hook; the second one without it shows how far two equal servers differ."""
LIMITS = """\
The hook wraps no method that a request goes through, so the true ratio of the first rows is 1
and what they show is the noise. An update captures and publishes once more, which depends on the
number of tensors and not on their size; a server's own update reads the whole checkpoint."""
