"""Who is who, where device ordinals, process numbers and host names repeat.

Real processes publish through the real recorder into one directory; only their runners are
fakes.  Host names and process numbers are made to repeat with ``unshare``, which needs root.
The last part is a table of what SGLang's runners look like, release by release (fakes, written
after the released sources).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_sglang import FakeRunner, load, settle

from sglang_weight_hook.layout import files, location
from sglang_weight_hook.layout import process as owner
from sglang_weight_hook.publisher import identity, publish
from sglang_weight_hook.reader import open_directory, open_slot

pytest.importorskip("torch")

# One process of a server: it publishes its runner, says what it knows itself, and waits.
PUBLISHER = """
import json, os, socket, sys
import torch
from fake_sglang import FakeRunner, load, settle, update
from sglang_weight_hook.publisher import recorder

gpu_id, size = int(sys.argv[1]), int(sys.argv[2])
runner = FakeRunner(torch.nn.Linear(size, 3), gpu_id=gpu_id)
load(runner)
settle()
(tracked,) = recorder._tracked.values()
while True:
    print(json.dumps({
        "slot": tracked.slot.name,
        "directory": tracked.slot.directory,
        "pid": os.getpid(),
        "hostname": socket.gethostname(),
        "ptr": runner.model.weight.data_ptr(),
        "size": size,
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
    }), flush=True)
    if not sys.stdin.readline():
        break
    update(runner)
"""


class Publisher:
    """A publishing process, and what it says of itself."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, "the publisher ended before it had published"
        self.said: dict[str, Any] = json.loads(line)
        self.slot = open_slot(self.said["directory"], self.said["slot"])

    def update(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def publisher(start_python: Callable[..., subprocess.Popen[str]]) -> Callable[..., Publisher]:
    def start(gpu_id: int = 0, size: int = 4, **environment: str) -> Publisher:
        return Publisher(start_python(PUBLISHER, str(gpu_id), str(size), **environment))

    return start


def assert_tells_the_truth(one: Publisher) -> None:
    document = one.slot.read()
    weight = document.raw["tensors"]["weight"]
    assert (weight["ptr"], weight["shape"]) == (one.said["ptr"], [3, one.said["size"]])
    owner = document.raw["identity"]
    assert owner["hostname"] == one.said["hostname"]
    assert owner["cuda_visible_devices"] == one.said["visible"]
    assert owner["pid"] == document.state["pid"] == one.said["pid"]
    assert document.state["slot"] == one.slot.name
    assert one.slot.owner_alive()


# --- device ordinals that repeat ----------------------------------------------------------


def test_ranks_that_each_see_one_device_do_not_overwrite_one_another(
    publisher: Callable[..., Publisher], maps: Path
) -> None:
    # SGLANG_ONE_VISIBLE_DEVICE_PER_PROCESS: every rank's gpu_id is 0.
    ranks = [publisher(0, 4 + rank, CUDA_VISIBLE_DEVICES=str(rank)) for rank in range(4)]
    for rank in ranks:
        rank.update()
        assert_tells_the_truth(rank)
    host = ranks[0].said["hostname"]
    names = [rank.slot.name for rank in ranks]
    assert names == ["0", *(f"0.{host}-{rank.said['pid']}" for rank in ranks[1:])]
    assert sorted(slot.name for slot in open_directory(str(maps)).slots()) == sorted(names)
    visible = {rank.slot.read().raw["identity"]["cuda_visible_devices"] for rank in ranks}
    assert visible == {"0", "1", "2", "3"}


def test_the_death_of_one_rank_is_the_death_of_its_slot_alone(
    publisher: Callable[..., Publisher],
) -> None:
    ranks = [publisher(0, 4 + rank, CUDA_VISIBLE_DEVICES=str(rank)) for rank in range(3)]
    ranks[0].kill()
    assert not ranks[0].slot.owner_alive()
    for rank in ranks[1:]:
        rank.update()
        assert_tells_the_truth(rank)
    successor = publisher(0, 9, CUDA_VISIBLE_DEVICES="0")
    assert successor.slot.name == "0"
    assert_tells_the_truth(successor)


def test_two_servers_of_two_ranks_have_four_slots(publisher: Callable[..., Publisher]) -> None:
    first = [publisher(gpu, 4 + gpu, CUDA_VISIBLE_DEVICES="0,1") for gpu in range(2)]
    second = [publisher(gpu, 8 + gpu, CUDA_VISIBLE_DEVICES="2,3") for gpu in range(2)]
    assert [rank.slot.name for rank in first] == ["0", "1"]
    for gpu, rank in enumerate(second):
        assert rank.slot.name == f"{gpu}.{rank.said['hostname']}-{rank.said['pid']}"
    for rank in [*first, *second]:
        assert_tells_the_truth(rank)
    for rank in first:
        rank.kill()
    assert not any(rank.slot.owner_alive() for rank in first)
    for rank in second:
        rank.update()
        assert_tells_the_truth(rank)


def test_processes_that_start_together_all_get_a_slot(
    start_python: Callable[..., subprocess.Popen[str]], maps: Path
) -> None:
    started = [start_python(PUBLISHER, "0", str(4 + number)) for number in range(5)]
    publishers = [Publisher(process) for process in started]
    assert len({one.slot.name for one in publishers}) == 5
    assert "0" in {one.slot.name for one in publishers}
    for one in publishers:
        assert_tells_the_truth(one)


# --- host names and process numbers that repeat --------------------------------------------


Elsewhere = Callable[..., Publisher]


@pytest.fixture
def elsewhere(tmp_path: Path, maps: Path) -> Iterator[Elsewhere]:
    """Publishers in namespaces of their own: other host names, the same process numbers."""
    started: list[subprocess.Popen[str]] = []

    def start(
        namespaces: list[str], hostname: str, size: int, directory: str | None = None
    ) -> Publisher:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        folders = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
        environment["PYTHONPATH"] = os.pathsep.join(folders)
        environment["SGLANG_WEIGHT_HOOK_DIR"] = directory or str(maps)
        script = f'hostname {hostname} && exec "$0" -c "$1" 0 {size}'
        process = subprocess.Popen(
            ["unshare", *namespaces, "sh", "-c", script, sys.executable, PUBLISHER],
            env=environment,
            cwd=tmp_path,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return Publisher(process)

    yield start
    for process in started:
        for pipe in (process.stdin, process.stdout):
            if pipe:
                pipe.close()
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def needs_namespaces(*namespaces: str) -> pytest.MarkDecorator:
    tried = subprocess.run(
        ["unshare", *namespaces, "sh", "-c", "hostname nodeB"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    return pytest.mark.skipif(
        tried.returncode != 0, reason=f"unshare {' '.join(namespaces)}: {tried.stderr.strip()}"
    )


UTS = ("--uts",)
CONTAINER = ("--uts", "--pid", "--fork", "--kill-child", "--mount-proc")


@needs_namespaces(*UTS)
def test_nodes_on_one_shared_directory_do_not_overwrite_one_another(elsewhere: Elsewhere) -> None:
    nodes = [elsewhere(list(UTS), f"node{letter}", 4 + i) for i, letter in enumerate("ABC")]
    names = [node.slot.name for node in nodes]
    assert names == ["0", *(f"0.{n.said['hostname']}-{n.said['pid']}" for n in nodes[1:])]
    for node, letter in zip(nodes, "ABC"):
        node.update()
        assert node.said["hostname"] == f"node{letter}" != socket.gethostname()
        assert_tells_the_truth(node)


@needs_namespaces(*UTS)
def test_a_directory_for_each_host_has_a_slot_0_in_each(elsewhere: Elsewhere, maps: Path) -> None:
    directory = str(maps / "{hostname}")
    nodes = [
        elsewhere(list(UTS), f"node{letter}", 4 + i, directory) for i, letter in enumerate("AB")
    ]
    assert [node.slot.name for node in nodes] == ["0", "0"]
    assert sorted(path.name for path in maps.iterdir()) == ["nodeA", "nodeB"]
    for node in nodes:
        assert node.slot.directory == str(maps / node.said["hostname"])
        assert_tells_the_truth(node)


@needs_namespaces(*CONTAINER)
@pytest.mark.parametrize("hostnames", ["ABC", "AAA"], ids=["own host names", "one host name"])
def test_containers_in_which_every_server_has_the_same_pid_do_not_overwrite_one_another(
    hostnames: str, elsewhere: Elsewhere
) -> None:
    inside = [
        elsewhere(list(CONTAINER), f"node{letter}", 4 + i) for i, letter in enumerate(hostnames)
    ]
    assert len({one.said["pid"] for one in inside}) == 1
    assert len({one.slot.name for one in inside}) == 3
    for one in inside:
        one.update()
        assert_tells_the_truth(one)
    # Their namespaces and start times tell them apart where their numbers do not.
    owners = [one.slot.read().raw["identity"] for one in inside]
    assert len({owner["pid_namespace"] for owner in owners}) == 3


def test_a_host_name_that_is_no_file_name_still_makes_one(
    publisher: Callable[..., Publisher],
    maps: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    publisher()
    monkeypatch.setattr(socket, "gethostname", lambda: "../no de/ß")
    own = publish.Slot(str(maps), "0", 0.0)
    assert Path(own.path(files.STATE)).parent == maps
    assert own.name == f"0..._no_de__-{os.getpid()}"
    own.abandon()


# --- process numbers that are used again ----------------------------------------------------


def retell(maps: Path, slot: str, **identity_of: object) -> None:
    """Change who a slot's documents say they are of."""
    for name in (files.STATE, files.LAYOUT):
        path = maps / name.format(slot)
        document = json.loads(path.read_bytes())
        document.update({k: v for k, v in identity_of.items() if k in document})
        if "identity" in document:
            document["identity"].update(identity_of)
        path.write_bytes(json.dumps(document).encode())


def hide_the_owner_lock(maps: Path, slot: str = "0") -> None:
    """Leave the reader nothing but what the document says: the lock file can't be opened."""
    path = maps / files.OWNER_LOCK.format(slot)
    path.unlink()
    path.symlink_to(path.name)


@pytest.fixture
def dead(publisher: Callable[..., Publisher], maps: Path) -> Publisher:
    one = publisher()
    one.kill()
    return one


def test_a_pid_that_now_belongs_to_another_live_process_makes_no_owner(
    dead: Publisher, maps: Path
) -> None:
    retell(maps, "0", pid=os.getpid())
    assert not dead.slot.owner_alive()
    hide_the_owner_lock(maps)
    assert not dead.slot.owner_alive()
    assert dead.slot.read().state["pid"] == os.getpid()


def test_without_the_lock_file_the_start_time_tells_a_process_from_the_next_with_its_pid(
    publisher: Callable[..., Publisher], maps: Path
) -> None:
    live = publisher()
    hide_the_owner_lock(maps)
    assert live.slot.owner_alive()
    ticks = live.slot.read_state()["process_start_ticks"]
    retell(maps, "0", process_start_ticks=ticks + 1)
    assert not live.slot.owner_alive()
    retell(maps, "0", process_start_ticks=ticks)
    assert live.slot.owner_alive()
    live.kill()
    assert not live.slot.owner_alive()


def test_a_pid_of_an_earlier_boot_is_stale(publisher: Callable[..., Publisher], maps: Path) -> None:
    # The same host, pid and start time, but before a restart: its lock went with it.
    live = publisher()
    retell(maps, "0", boot_id="of the boot before")
    live.kill()
    assert not live.slot.owner_alive()


def test_start_times_of_two_processes_with_one_pid_differ_by_clock_ticks(
    publisher: Callable[..., Publisher],
) -> None:
    first = publisher(0)
    time.sleep(2 / os.sysconf("SC_CLK_TCK"))
    second = publisher(1)
    ticks = [one.slot.read_state()["process_start_ticks"] for one in (first, second)]
    assert ticks[0] < ticks[1]
    assert ticks == [owner.start_ticks(one.said["pid"]) for one in (first, second)]


def test_a_new_server_takes_nothing_over_from_a_dead_one_with_its_pid(
    dead: Publisher, maps: Path
) -> None:
    retell(maps, "0", pid=os.getpid())
    torch: Any = pytest.importorskip("torch")
    runner = FakeRunner(torch.nn.Linear(7, 3))
    load(runner)
    settle()
    document = dead.slot.read()
    assert document.raw["tensors"]["weight"]["ptr"] == runner.model.weight.data_ptr()
    assert document.layout_generation == 1
    assert dead.slot.owner_alive()


# --- where each release keeps its ranks ------------------------------------------------------

TP, PP = {"tp_rank": 3, "tp_size": 8}, {"pp_rank": 1, "pp_size": 2}
EP = {"moe_ep_rank": 5, "moe_ep_size": 8}
ARGUMENTS = {"tp_size": 8, "pp_size": 2, "dp_size": 4, "ep_size": 8, "node_rank": 1}


def on_the_runner(**attributes: Any) -> Callable[[Any, pytest.MonkeyPatch], None]:
    return lambda runner, monkeypatch: vars(runner).update(attributes)


def on_ps(**attributes: Any) -> Callable[[Any, pytest.MonkeyPatch], None]:
    def put(runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        runner.ps = types.SimpleNamespace(gpu_id=runner.gpu_id, **attributes)

    return put


class ParallelContext:
    """A fake of 0.5.21's and later: what was never written raises RuntimeError when read."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name not in self._values:
            raise RuntimeError(f"parallel name {name!r} has not been written in this process.")
        return self._values[name]


def in_the_context(
    process: dict[str, Any], runner_attributes: dict[str, Any] | None = None, **draft_scope: Any
) -> Callable[[Any, pytest.MonkeyPatch], None]:
    """In the process-wide context, which is another inside a draft's own scope, where its
    weight checker took its placement."""

    def put(runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        module: Any = types.ModuleType("sglang.srt.runtime_context")
        module.get_parallel = lambda: ParallelContext(process)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        vars(runner).update(runner_attributes or {})
        seen = {**process, **draft_scope}
        placement = {name: seen[name] for name in (*TP, *PP)}
        # utils/weight_checker.py: a rank of 0 where there is none, and the attention's size.
        placement.update(dp_rank=seen.get("dp_rank") or 0, dp_size=77)
        runner._weight_checker = types.SimpleNamespace(_placement=placement)

    return put


NO_DP = {"dp_rank": None, "dp_size": 4}
ALL = {**TP, **PP, **EP, "dp_rank": 2, "dp_size": 4}
PUBLISHED = {**TP, **PP, "ep_rank": 5, "ep_size": 8, "dp_rank": 2, "dp_size": 4, "node_rank": 1}

# release -> where its runner has its ranks, and what is to be published of it.
RELEASES: dict[str, tuple[Callable[[Any, pytest.MonkeyPatch], None], dict[str, Any]]] = {
    "0.4.6.post5": (on_the_runner(**TP, **PP), {**PUBLISHED, **NO_DP, "ep_rank": None}),
    "0.4.9.post6": (
        on_the_runner(**TP, **PP, dp_size=4),
        {**PUBLISHED, **NO_DP, "ep_rank": None},
    ),
    "0.4.10.post2": (on_the_runner(**TP, **PP, **EP, dp_size=4), {**PUBLISHED, **NO_DP}),
    # Without DP attention the runner's own size is 1, whatever the argument says.
    "0.5.9": (
        on_the_runner(**TP, **PP, **EP, dp_size=1),
        {**PUBLISHED, "dp_rank": None, "dp_size": 1},
    ),
    "0.5.12.post1": (on_the_runner(**ALL), PUBLISHED),
    "0.5.15.post1": (
        on_the_runner(**{**ALL, "dp_rank": None}),
        {**PUBLISHED, "dp_rank": None},
    ),
    "0.5.18": (on_ps(**ALL), PUBLISHED),
    "0.5.20": (on_ps(**{**ALL, "dp_rank": None}), {**PUBLISHED, "dp_rank": None}),
    "0.5.21": (
        in_the_context(ALL, {**TP, **PP, "dp_rank": 2, "dp_size": 4, "moe_ep_size": 8}),
        PUBLISHED,
    ),
    "0.5.22": (in_the_context(ALL), PUBLISHED),
    "0.5.23": (in_the_context(ALL), PUBLISHED),
    "0.5.23 without data parallel": (
        in_the_context({**ALL, "dp_rank": None, "dp_size": 1}),
        {**PUBLISHED, "dp_rank": None, "dp_size": 1},
    ),
    "0.5.23, a draft on one rank of eight": (
        in_the_context(ALL, tp_rank=0, tp_size=1),
        {**PUBLISHED, "tp_rank": 0, "tp_size": 1},
    ),
    "0.5.23 before its context is written": (
        lambda runner, monkeypatch: monkeypatch.setitem(
            sys.modules,
            "sglang.srt.runtime_context",
            types.SimpleNamespace(get_parallel=lambda: ParallelContext({})),
        ),
        {
            **dict.fromkeys(("tp_rank", "pp_rank", "dp_rank", "ep_rank")),
            **ARGUMENTS,
        },
    ),
}


@pytest.mark.parametrize("release", RELEASES)
def test_the_ranks_of_each_release_are_found_where_it_keeps_them(
    release: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner: Any = FakeRunner(gpu_id=3)
    runner.server_args = types.SimpleNamespace(**ARGUMENTS)
    place, expected = RELEASES[release]
    place(runner, monkeypatch)
    assert identity.ranks(runner) == expected
    assert identity.gpu_id(runner) == 3


def test_one_visible_device_per_process_is_told_apart_by_what_is_visible(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-0f2c")
    found = identity.identity(FakeRunner(gpu_id=0))
    assert (found["gpu_id"], found["cuda_visible_devices"]) == (0, "GPU-0f2c")


def test_a_directory_named_after_the_process_is_its_own(maps: Path) -> None:
    value = str(maps / "{hostname}" / "{pid}")
    expected = str(maps / socket.gethostname() / str(os.getpid()))
    assert location.directory_from(value, "/") == expected
