"""Many facts of one running SGLang 0.5.23; each test leaves checkpoint A loaded.

The tests that take the output directory away come last.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import sglang_weight_hook as hook
from cpu_sglang.environment import Environment
from tests.real_sglang import scenario
from tests.real_sglang.hooked import (
    HookedServer,
    assert_true_map,
    pid_of,
    wait_for_end,
    weights_held,
)

pytestmark = pytest.mark.real_sglang


@pytest.fixture(scope="module")
def server(
    environment: Environment,
    hooked_python: Path,
    checkpoint: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[HookedServer]:
    folder = tmp_path_factory.mktemp("server")
    variables = {"SGLANG_WEIGHT_HOOK_LOCK_TIMEOUT": "2"}
    model = checkpoint(1)
    with HookedServer(environment, hooked_python, model, folder, extra_env=variables) as running:
        yield running


@pytest.fixture
def slot(server: HookedServer) -> hook.Slot:
    # By name: a second server that was here has left a slot of its own behind.
    return server.maps.slot("0")


def test_every_file_of_the_contract_is_there(slot: hook.Slot) -> None:
    names = set(os.listdir(slot.directory))
    assert {
        "weights_meta_0.json",
        "total_weight_meta_0.json",
        "merged_weights_meta_0.json",
        "weight_layout_0.json",
        "weight_state_0.json",
        "weight_saving_0.lock",
    } <= names
    assert os.path.getsize(slot.path("weight_state_{}.json")) < 2048


def test_one_session_of_many_buckets_is_one_event(
    server: HookedServer,
    slot: hook.Slot,
    environment: Environment,
    checkpoint: Callable[..., Path],
) -> None:
    before = slot.read()
    for step in ("/begin_weight_update", "/end_weight_update"):
        status, answer = server.post(step)
        assert status == 200, answer
        if step.startswith("/begin"):
            assert slot.read_state()["state"] == "updating"
            with pytest.raises(hook.HookError, match="update"), slot.weights_held(timeout=0.1):
                pass
    after = slot.read()
    assert after.state["event"]["kind"] == "weight_update_session"
    assert after.content_generation == before.content_generation + 1
    assert after.layout_generation == before.layout_generation
    scenario.check(server, [slot], after.state["state"], updated=True)


def test_an_update_waits_for_a_reader_that_holds_the_weights(
    server: HookedServer, slot: hook.Slot, checkpoint: Callable[..., Path]
) -> None:
    before = slot.read_state()["content_generation"]
    answers: list[Any] = []
    server.wait_idle()

    def update() -> None:
        answers.append(server.post("/update_weights_from_disk", {"model_path": str(checkpoint(2))}))

    with slot.weights_held():
        thread = threading.Thread(target=update)
        thread.start()
        thread.join(0.5)
        assert slot.read_state()["content_generation"] == before
    thread.join()
    assert answers[0][0] == 200
    state = slot.read_state()
    assert state["content_generation"] == before + 1
    assert state["lock"] == "held"
    server.update_weights_from_disk(checkpoint(1))


def test_a_reader_that_never_lets_go_costs_the_server_one_timeout(
    server: HookedServer, slot: hook.Slot, checkpoint: Callable[..., Path]
) -> None:
    with weights_held(slot):
        for seed in (2, 1):
            status, answer = server.update_weights_from_disk(checkpoint(seed))
            assert (status, answer["success"]) == (200, True)
            assert slot.read().state["lock"] == "timeout"
    said = [line for line in server.hook_log() if "held by a reader" in line]
    assert len(said) == 1
    server.update_weights_from_disk(checkpoint(1))
    assert slot.read().state["lock"] == "held"
    scenario.check(server, [slot], "ready", updated=True)


def test_overwriting_weights_through_the_weight_checker_is_seen(
    server: HookedServer, slot: hook.Slot, checkpoint: Callable[..., Path]
) -> None:
    before = slot.read()
    server.wait_idle()
    status, answer = server.post("/weights_checker", {"action": "reset_tensors"})
    assert status == 200, answer
    after = slot.read()
    assert after.state["event"]["kind"] == "reset_tensors"
    assert after.content_generation == before.content_generation + 1
    server.update_weights_from_disk(checkpoint(1))


def test_a_second_server_in_the_same_directory_gets_a_slot_of_its_own(
    server: HookedServer,
    slot: hook.Slot,
    environment: Environment,
    hooked_python: Path,
    checkpoint: Callable[..., Path],
) -> None:
    folder = Path(slot.directory).parent
    with HookedServer(environment, hooked_python, checkpoint(2), folder) as second:
        names = {found.name for found in second.maps.slots()}
        (other_name,) = names - {"0"}
        other = second.maps.slot(other_name)
        assert other_name.startswith("0.")
        assert other_name.endswith(f"-{pid_of(other)}")
        (live,) = second.live()
        assert_true_map(other.read(), live)
        assert any("another live process" in line for line in second.hook_log())
    server.update_weights_from_disk(checkpoint(1))
    scenario.check(server, [slot], "ready", updated=True)
    assert not other.owner_alive()


def test_a_killed_server_frees_its_slot_for_the_next(
    environment: Environment,
    hooked_python: Path,
    checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    with HookedServer(environment, hooked_python, checkpoint(1), tmp_path) as first:
        (slot,) = first.maps.slots()
        pid = pid_of(slot)
        os.killpg(first.pid, signal.SIGKILL)
        wait_for_end(pid)
    assert not slot.owner_alive()
    assert slot.read().state["pid"] == pid  # still readable, though stale
    with HookedServer(environment, hooked_python, checkpoint(1), tmp_path) as second:
        (again,) = second.maps.slots()
        assert again.name == "0"
        assert again.owner_alive()
        scenario.check(second, [again], "ready")


def test_an_output_directory_that_turns_into_a_file_changes_no_answer(
    server: HookedServer, slot: hook.Slot, checkpoint: Callable[..., Path]
) -> None:
    directory = Path(slot.directory)
    shutil.rmtree(directory)
    directory.write_text("in the way")
    for seed in (2, 1):
        status, answer = server.update_weights_from_disk(checkpoint(seed))
        assert (status, answer["success"]) == (200, True)
    assert directory.read_text() == "in the way"
    directory.unlink()
    status, answer = server.update_weights_from_disk(checkpoint(1))
    assert (status, answer["success"]) == (200, True)
    scenario.check(server, [slot], "ready", updated=True)


def test_a_full_disk_changes_no_answer_and_leaves_whole_files(
    server: HookedServer, slot: hook.Slot, checkpoint: Callable[..., Path]
) -> None:
    directory = slot.directory
    shutil.rmtree(directory)
    os.mkdir(directory)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", directory],
        stderr=subprocess.DEVNULL,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        assert server.update_weights_from_disk(checkpoint(2))[0] == 200
        layout = slot.read().layout_generation
        with (
            pytest.raises(OSError, match="No space"),
            open(os.path.join(directory, "ballast"), "wb") as ballast,
        ):
            ballast.write(bytes(512 * 1024))
        assert server.update_weights_from_disk(checkpoint(1))[0] == 200
        for name in os.listdir(directory):
            if name.endswith(".json"):
                json.loads(Path(directory, name).read_text())
        os.unlink(os.path.join(directory, "ballast"))
        assert server.update_weights_from_disk(checkpoint(1))[0] == 200
        assert slot.read().layout_generation == layout
        scenario.check(server, [slot], "ready", updated=True)
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)
