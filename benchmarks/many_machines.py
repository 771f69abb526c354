"""Many machines: the commands over 64 node agents, and a registry of all their slots.

The machines are folders of this one: real documents under 64 host names, each slot with a process
of its own behind it and a lock that is held, and real agents, some in one process.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Optional

from sglang_weight_hook import reader
from sglang_weight_hook.layout import files, process

from . import table
from .measure import Sample
from .table import Line, Section

REPOSITORY = Path(__file__).resolve().parents[1]
MACHINES = 64
PROCESSES = 4  # in which the agents run
TENSORS, FEW_TENSORS = 1342, 195
SLOTS, MANY_SLOTS = 8, 64  # of each machine
IDLE_SECONDS = 15.0  # three rounds in which an agent looks for files that have gone
TTL = 60  # seconds: the leases of all machines are kept alive by two cores here


def measure(quick: bool) -> Section:
    lines = []
    rounds = 3 if quick else 7
    with machines(SLOTS, TENSORS, with_registry=True) as fleet:
        lines += _eight_slots(fleet, rounds)
    with machines(FEW_SLOTS if quick else MANY_SLOTS, FEW_TENSORS) as fleet:
        lines += _many_slots(fleet, rounds)
    return Section(f"{MACHINES} machines", lines, HOW, LIMITS)


FEW_SLOTS = 16


class Fleet(NamedTuple):
    urls: list[str]
    registry: Optional[str]
    address: int  # where every machine has a weight
    slots: int
    agents: list[int]  # the processes that they run in
    idle: float = 0.0  # cores that all agents take while nobody asks

    @property
    def directories(self) -> list[str]:
        return [word for url in self.urls for word in ("--dir", url)]

    def cpu(self) -> float:
        """Seconds of processor time that the agents have used."""
        ticks = 0
        for pid in self.agents:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")


class Used(NamedTuple):
    """What one command took, in seconds."""

    wall: float
    cpu: float  # its own
    agents: float  # processor time of all agents for it, what they take anyway left out

    @property
    def together(self) -> float:
        """What it takes where nothing else runs, and nothing at the same time."""
        return self.cpu + self.agents


def _eight_slots(fleet: Fleet, rounds: int) -> list[Line]:
    what = f"{MACHINES} agents, {fleet.slots} slots of {table.number(TENSORS)} tensors"
    lines = [
        _command(fleet, f"report, {what}", ["report", *fleet.directories], rounds, 2.0),
        _command(fleet, f"slots, {what}", ["slots", *fleet.directories], rounds),
        Line(
            f"{MACHINES} agents at rest",
            f"{fleet.idle / MACHINES:.2%} of a core each",
            f"{fleet.slots // MACHINES} slots each, every lease of {TTL} s",
            f"{fleet.idle:.2f} cores together",
        ),
    ]
    if fleet.registry is None:
        return lines
    first = _used(fleet, ["lookup", "0x1000", "--dir", fleet.registry])
    lines.append(
        Line(
            f"lookup, {what}, by the registry: the first since the layouts were published",
            f"{_told(first)} n=1",
            "every agent reads its layouts, all on this machine's cores",
            f"{table.seconds(first.agents / fleet.slots)} a slot",
        )
    )
    nowhere = ["lookup", "0x1000", "--dir", fleet.registry]
    lines += [
        _command(fleet, f"lookup, {what}, by the registry, again", nowhere, rounds, 1.0),
        _command(
            fleet, f"report, {what}, by the registry", ["report", "--dir", fleet.registry], rounds
        ),
        _registered(fleet.registry),
    ]
    return lines


def _many_slots(fleet: Fleet, rounds: int) -> list[Line]:
    what = f"{MACHINES} agents, {fleet.slots} slots of {table.number(FEW_TENSORS)} tensors"
    return [
        _command(fleet, f"slots, {what}", ["slots", *fleet.directories], rounds),
        _command(fleet, f"report, {what}", ["report", *fleet.directories], rounds),
    ]


def _command(
    fleet: Fleet, what: str, words: list[str], rounds: int, target: Optional[float] = None
) -> Line:
    _used(fleet, words)  # compiles, and fills caches
    found = [_used(fleet, words) for _ in range(rounds)]
    middle = sorted(found, key=lambda used: used.together)[len(found) // 2]
    start = Sample([_used(fleet, ["--version"]).cpu for _ in range(rounds)])
    return Line(
        what,
        f"{_told(middle)} n={rounds}",
        f"the command's own start: {table.seconds(start.median)} CPU",
        f"{table.seconds(middle.together)} CPU together",
        "" if target is None else f"≤ {table.seconds(target)} together",
        None if target is None else middle.together <= target,
    )


def _told(used: Used) -> str:
    return (
        f"{table.seconds(used.cpu)} CPU, agents {table.seconds(used.agents)} CPU, "
        f"{table.seconds(used.wall)} wall"
    )


def _used(fleet: Fleet, words: list[str]) -> Used:
    """What a command takes that has an answer."""
    before, started = fleet.cpu(), time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-m", "sglang_weight_hook", *words],
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert child.stderr is not None
    said = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.perf_counter() - started
    child.stderr.close()
    child.returncode = os.waitstatus_to_exitcode(status)
    allowed = (0, 3) if words[0] == "lookup" else (0,)
    assert child.returncode in allowed, said.decode()[-2000:]
    agents = max(fleet.cpu() - before - fleet.idle * wall, 0.0)
    return Used(wall, usage.ru_utime + usage.ru_stime, agents)


def _registered(registry: str) -> Line:
    """What the registry holds of a slot, and how long it takes to read all of them."""
    from sglang_weight_hook.fleet.access import Access
    from sglang_weight_hook.fleet.registry_reading import Registry

    etcd = Registry([registry.replace("etcd://", "http://")], Access())
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        rows = etcd.slots()
        seconds.append(time.perf_counter() - started)
    sizes = [len(json.dumps(row.value, separators=(",", ":"))) for row in rows]
    return Line(
        f"the registry's {len(rows)} values, read",
        f"{table.seconds(Sample(seconds).median)} wall n=5",
        f"{sum(sizes) / len(sizes):.0f} bytes a value, {max(sizes)} at most",
        f"{table.seconds(Sample(seconds).median / len(rows))} a slot",
        "values < 4096 bytes",
        max(sizes) < 4096,
    )


# --- machines -----------------------------------------------------------------------------


@contextlib.contextmanager
def machines(slots: int, tensors: int, with_registry: bool = False) -> Iterator[Fleet]:
    """So many slots on each of 64 machines, an agent over each, and a registry if etcd is here."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="machines-")))
        owners = [stack.enter_context(_sleeper()) for _ in range(slots)]
        places, address = stack.enter_context(_maps(folder, owners, tensors))
        registry = None
        if with_registry and shutil.which("etcd"):
            registry = stack.enter_context(_etcd(folder / "etcd"))
        urls, agents = stack.enter_context(_agents(places, registry))
        directories = [reader.open_directory(url) for url in urls]
        count = slots * MACHINES
        _wait_for(lambda: sum(len(directory.slots()) for directory in directories) == count)
        if registry is not None:
            registry = f"etcd://{registry.partition('://')[2]}"
            _wait_for(lambda: len(reader.open_directory(registry).slots()) == count)
        fleet = Fleet(urls, registry, address, count, agents)
        before, started = fleet.cpu(), time.perf_counter()
        time.sleep(IDLE_SECONDS)
        yield fleet._replace(idle=(fleet.cpu() - before) / (time.perf_counter() - started))


@contextlib.contextmanager
def _sleeper() -> Iterator[dict[str, Any]]:
    """A process that does nothing, in the place of a server's; what its documents say of it."""
    child = subprocess.Popen([shutil.which("cat") or "/bin/cat"], stdin=subprocess.PIPE)
    try:
        yield {"pid": child.pid, "process_start_ticks": process.start_ticks(child.pid)}
    finally:
        child.kill()
        child.communicate()


@contextlib.contextmanager
def _maps(
    folder: Path, owners: list[dict[str, Any]], tensors: int
) -> Iterator[tuple[list[Path], int]]:
    """A directory for each machine, with one real publication under the name of each slot."""
    from .capturing import Load, published
    from .models import make_model

    with published() as place:
        load = Load(make_model(tensors))  # held, for the files go with the runner
        load()
        layout, state = (
            json.loads((Path(place) / name.format("0")).read_bytes())
            for name in (files.LAYOUT, files.STATE)
        )
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = MACHINES * len(owners) + 512
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, needed), hard), hard))
    places = [folder / f"machine{number}" for number in range(MACHINES)]
    layout["state"] = state["state"] = "ready"
    with contextlib.ExitStack() as stack:
        for place_of, machine in zip(places, range(MACHINES)):
            place_of.mkdir()
            for slot, owner in enumerate(owners):
                named = {**owner, "hostname": f"machine{machine}"}
                layout["identity"].update(named, gpu_id=slot)
                state.update(named, slot=str(slot))
                for name, content in ((files.LAYOUT, layout), (files.STATE, state)):
                    text = json.dumps(content, separators=(",", ":"))
                    (place_of / name.format(slot)).write_text(text, "utf-8")
                lock = stack.enter_context(open(place_of / files.OWNER_LOCK.format(slot), "wb"))
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield places, layout["regions"][0]["ptr"]


@contextlib.contextmanager
def _etcd(folder: Path) -> Iterator[str]:
    urls = [f"http://127.0.0.1:{_free_port()}" for _ in range(2)]
    server = subprocess.Popen(
        [
            *("etcd", "--data-dir", str(folder), "--log-level", "error"),
            *("--listen-client-urls", urls[0], "--advertise-client-urls", urls[0]),
            *("--listen-peer-urls", urls[1], "--initial-advertise-peer-urls", urls[1]),
            *("--initial-cluster", f"default={urls[1]}"),
        ],
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for(lambda: _connects(urls[0]))
        yield urls[0]
    finally:
        server.kill()
        server.wait()


@contextlib.contextmanager
def _agents(places: list[Path], registry: Optional[str]) -> Iterator[tuple[list[str], list[int]]]:
    """The URLs of agents over the places, in that order, and the processes that they run in."""
    each = -(-len(places) // PROCESSES)
    children = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "benchmarks.many_machines", registry or ""),
                *map(str, places[first : first + each]),
            ],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,  # at whose end they end, also where this process is killed
            stdout=subprocess.PIPE,
            text=True,
        )
        for first in range(0, len(places), each)
    ]
    try:
        urls = []
        for child in children:
            assert child.stdout is not None
            urls += child.stdout.readline().split()
        assert len(urls) == len(places)
        yield urls, [child.pid for child in children]
    finally:
        for child in children:
            child.kill()
            child.communicate()


def _wait_for(holds: Any, seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(reader.HookError):
            if holds():
                return
        assert time.monotonic() < deadline
        time.sleep(0.2)


def _connects(url: str) -> bool:
    import socket

    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), 1).close()
        return True
    return False


def _free_port() -> int:
    import socket

    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return int(made.getsockname()[1])


def serve(registry: str, places: list[str]) -> None:
    """Agents in one event loop, as each would be in a process of its own; their URLs on stdout."""
    from sglang_weight_hook.commands.serve import _presentation, url_of
    from sglang_weight_hook.fleet import server
    from sglang_weight_hook.fleet.etcd import Etcd
    from sglang_weight_hook.fleet.registration import Registration

    async def one(place: str, started: asyncio.Event) -> None:
        settings = server.Settings([reader.open_directory(place)])
        made = server.listen("127.0.0.1", 0)
        url = url_of(settings, made)
        registration = None
        if registry:
            registration = Registration(Etcd([registry]), url, os.path.basename(place), TTL)
        urls[place] = url
        await server.serve(settings, made, _presentation(), registration, started.set)

    async def all_of_them() -> None:
        events = {place: asyncio.Event() for place in places}
        running = asyncio.gather(*(one(place, events[place]) for place in places))
        for event in events.values():
            await event.wait()
        sys.stdout.write(" ".join(urls[place] for place in places) + "\n")
        sys.stdout.flush()
        await running

    def end_with_parent() -> None:
        sys.stdin.read()
        os._exit(0)

    urls: dict[str, str] = {}
    threading.Thread(target=end_with_parent, daemon=True).start()
    asyncio.run(all_of_them())


HOW = f"""\
One real publication, written under the names of {MACHINES} machines into a folder each, with a
process behind each slot of a machine and every owner's lock held. Over each folder runs a real
agent, {MACHINES // PROCESSES} in one process; with etcd here (Debian's etcd-server) every agent
registers its slots under leases. Measured is the whole command, from its start to its end: its own
processor time, that of all agents for it (without what they take at rest), and the wall time, which
tells more of what else runs here; the target is held against the first two together."""
LIMITS = """\
Agents and readers share these cores, where a fleet has a machine for each agent. `report` and
`slots` take one request an agent, the sums come from what the layouts say ahead of their tensors.
`lookup` has every agent look into its own documents."""


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2:])
