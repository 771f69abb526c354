"""Weights pulled through a transfer engine, beside the engine alone; registering; idling."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sglang_weight_hook.layout.variables import CHECK_SECONDS, SUBSCRIBER_TIMEOUT, SUBSCRIBERS
from sglang_weight_hook.memory import mooncake, nixl
from sglang_weight_hook.memory.errors import TransferWarning
from sglang_weight_hook.memory.pull import pull
from sglang_weight_hook.memory.staging import Buffer
from sglang_weight_hook.memory.transport import transport_of
from sglang_weight_hook.reader import Slot, open_slot

from . import table
from .measure import Sample, ratios, side_by_side
from .scrubbing import _process
from .table import Line, Section
from .transfer_owner import OUTPUT, ROUNDS

ROOT = Path(__file__).resolve().parents[1]
SPEED = 0.9  # of the engine alone
REGISTERING = 1.2  # of the engine's own time
TENSORS = 3118  # as a model of 61 layers and 256 experts has on one rank

# Publishes a model of so many layers of a shape, and updates it in place when it is told to.
OWNER = """
import sys, torch
from benchmarks.models import Runner, a_module
from sglang_weight_hook.publisher import recorder
count, width = map(int, sys.argv[1:])
model = a_module(**{f"part{n}": torch.nn.Linear(width, width, bias=False) for n in range(count)})
runner = Runner(model)
def event(kind, named=()):
    recorder.finish(recorder.begin(kind, kind, named), None, None)
event("load", [runner])
event("settle")
print("ready", flush=True)
for line in sys.stdin:
    token = recorder.begin("update_weights_from_disk", "update", [runner])
    recorder.finish(token, (True, "done"), None)
    print("updated", flush=True)
"""


def measure(quick: bool) -> Section:
    lines: list[Line] = []
    for name in (mooncake.NAME, nixl.NAME):
        module = {"mooncake": "mooncake", "nixl": "nixl_cu12"}[name]
        if importlib.util.find_spec(module) is None:
            lines.append(Line(f"{name} is not installed", "", "", ""))
            continue
        lines += _pulling(name, 64 if quick else 256, 3 if quick else 11)
        lines += _registering(name, 3 if quick else 11)
    lines += _idling(3.0 if quick else 15.0)
    return Section("Weights through a transfer engine", lines, HOW, LIMITS)


@contextmanager
def _owner(
    subscribers: str, count: int, width: int, **more: str
) -> Iterator[tuple[subprocess.Popen[str], Slot]]:
    with tempfile.TemporaryDirectory(prefix="transfer-") as place:
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "SGLANG_WEIGHT_HOOK_DIR": place,
            CHECK_SECONDS: "0",
            "MC_LOG_LEVEL": "ERROR",
            **({SUBSCRIBERS: subscribers} if subscribers else {}),
            **more,
        }
        command = [sys.executable, "-c", OWNER, str(count), str(width)]
        with _process(command, environment) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            try:
                yield process, open_slot(place, "0")
            finally:
                process.terminate()


def _pulling(name: str, mebibytes: int, rounds: int) -> list[Line]:
    """All weights into new memory, by `pull` and by the engine; and in pieces, by both."""
    with _owner(name, mebibytes // 4, 1024) as (_, slot), warnings.catch_warnings():
        warnings.simplefilter("ignore", TransferWarning)
        document = slot.read()
        regions = [(region["ptr"], region["size"]) for region in document.regions]
        total = sum(size for _, size in regions)
        alone = _alone(name, transport_of(document, name).entry)
        warm = Buffer(total)

        def pieces() -> None:
            with document.open_memory(via=name) as memory:
                for tensor in document.iter_tensors():
                    for _ in memory.pieces(tensor.name):
                        pass

        found = side_by_side(
            {
                "pull": lambda: pull(slot, via=name),
                "new": lambda: alone(regions, Buffer(total)),
                "pieces": pieces,
                "warm": lambda: alone(regions, warm),
            },
            rounds,
            clock=time.perf_counter,
        )
        lines = []
        for ours, theirs, what, target in (
            ("pull", "new", "`pull`, into new memory", SPEED),
            ("pieces", "warm", "`pieces` of every tensor, each bracketed", None),
        ):
            share = ratios(found[theirs], found[ours])
            lines.append(
                Line(
                    f"{name}: {what}: {len(document.tensors)} tensors, {table.size(total)}",
                    f"{total / found[ours].median / 1e9:.2f} GB/s",
                    f"the engine alone {total / found[theirs].median / 1e9:.2f} GB/s",
                    table.times(share),
                    f"≥ {target} x" if target else "",
                    share.median >= target if target else None,
                )
            )
        return lines


def _alone(name: str, entry: Any) -> Callable[[list[tuple[int, int]], Buffer], None]:
    """The engine as one would use it without this package: one batch, into registered memory."""
    if name == mooncake.NAME:
        engine = mooncake._engine("tcp")

        def by_mooncake(regions: list[tuple[int, int]], buffer: Buffer) -> None:
            local, offset = [], 0
            for _, size in regions:
                local.append(buffer.address + offset)
                offset += size
            assert engine.register_memory(buffer.address, buffer.size) == 0
            remote, sizes = map(list, zip(*regions))
            code = engine.batch_transfer_sync_read(entry["session"], local, remote, sizes)
            assert code == 0
            assert engine.unregister_memory(buffer.address) == 0

        return by_mooncake
    agent = nixl._new_agent("UCX")
    remote_name = agent.add_remote_agent(base64.b64decode(entry["metadata"]))

    def by_nixl(regions: list[tuple[int, int]], buffer: Buffer) -> None:
        registered = agent.register_memory([(buffer.address, buffer.size, 0, "")], "DRAM")
        local, offset = [], 0
        for _, size in regions:
            local.append((buffer.address + offset, size, 0))
            offset += size
        handle = agent.initialize_xfer(
            "READ",
            agent.get_xfer_descs(local, "DRAM"),
            agent.get_xfer_descs([(ptr, size, 0) for ptr, size in regions], "DRAM"),
            remote_name.decode(),
        )
        state = agent.transfer(handle)
        while state == "PROC":
            state = agent.check_xfer_state(handle)
        assert state == "DONE"
        agent.release_xfer_handle(handle)
        agent.deregister_memory(registered)

    return by_nixl


def _registering(name: str, rounds: int) -> list[Line]:
    with tempfile.NamedTemporaryFile("r", suffix=".jsonl") as output:
        settings = {OUTPUT: output.name, ROUNDS: str(rounds), SUBSCRIBER_TIMEOUT: "600"}
        subscriber = f"benchmarks.transfer_owner:{name}"
        with _owner(subscriber, TENSORS, 32, **settings) as (process, _):
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("update\n")
            process.stdin.flush()
            assert process.stdout.readline() == "updated\n"
        registered, updated = map(json.loads, output.readlines()[-2:])
    hook, alone = Sample(registered["hook"]), Sample(registered["alone"])
    share = ratios(hook, alone)
    return [
        Line(
            f"register {registered['tensors']} tensors ({registered['regions']} regions) with "
            f"{name} and publish it",
            table.timing(hook),
            f"the engine alone {table.timing(alone)}",
            table.times(share),
            f"≤ {REGISTERING} x",
            share.median <= REGISTERING,
        ),
        Line(
            f"an update that moves nothing: calls of {name}",
            str(updated["calls"]),
            "",
            f"{updated['calls']}, in {table.seconds(updated['after'])}",
            "0",
            updated["calls"] == 0,
        ),
    ]


def _cpu_seconds(pid: int) -> float:
    """Of all of its threads."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def _idling(seconds: float) -> list[Line]:
    """CPU time of processes that nobody asks anything, side by side."""
    shares = {}
    for name in ("", mooncake.NAME, nixl.NAME):
        try:
            with _owner(name, 4, 1024) as (process, _):
                time.sleep(1.0)
                before = _cpu_seconds(process.pid)
                time.sleep(seconds)
                shares[name] = (_cpu_seconds(process.pid) - before) / seconds
        except AssertionError:
            continue
    return [
        Line(
            f"a server's process with {name}, idle",
            f"{100 * share:.2f} % of a core",
            f"without {100 * shares.get('', 0.0):.2f} %",
            f"{100 * (share - shares.get('', 0.0)):+.2f} %",
        )
        for name, share in shares.items()
        if name
    ]


HOW = f"""\
Two processes on this machine, over the loopback device for Mooncake's TCP; UCX takes the kernel's
copy between processes there. `pull` (with its connection, the header before and after, and the
memory that it gives the weights) beside the engine by itself: the same regions in one batch, into
memory that is as new, on a connection that stays open. Registering: {TENSORS} layers of 4 KiB in
the process that owns them, by the subscriber (which also writes the transport document) in turn
with the engine alone, until a reader could reach them (NIXL: with a new agent, its metadata
included). Wall-clock time, for the work is done by threads and by another process."""

LIMITS = """\
Mooncake over TCP moves a batch region by region, some 80 µs each, and a new one takes the page
faults of its memory: huge pages where the kernel gives them. In pieces each tensor costs a round
trip more, for the header. RDMA was not measured: no machine here has it."""
