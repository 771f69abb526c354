"""Every command beside one running SGLang 0.5.23, and after it has exited.

The tests run in order: the last one ends the server.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import sglang_weight_hook as hook
import sglang_weight_hook_patch_core as core
from cpu_sglang.environment import Environment
from tests.real_sglang.hooked import HookedServer, pid_of, wait_for_end

pytestmark = pytest.mark.real_sglang

ROOT = Path(__file__).resolve().parents[2]

Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def server(
    environment: Environment,
    hooked_python: Path,
    checkpoint: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[HookedServer]:
    folder = tmp_path_factory.mktemp("cli")
    with HookedServer(environment, hooked_python, checkpoint(1), folder) as running:
        yield running


@pytest.fixture
def slot(server: HookedServer) -> hook.Slot:
    (slot,) = server.maps.slots()
    return slot


def invocation(*arguments: object, python: Path | None = None) -> list[str]:
    return [str(python or sys.executable), "-m", "sglang_weight_hook", *map(str, arguments)]


def variables(folder: Path, *paths: str) -> dict[str, str]:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("SGLANG_WEIGHT")
    }
    # Where no --dir is given, as a user in the server's working directory.
    return {**environment, "PYTHONPATH": os.pathsep.join(paths), "PWD": str(folder)}


@pytest.fixture
def command(server: HookedServer) -> Command:
    """Run the command in the directory in which the server was started."""
    folder = Path(server.maps.path).parent

    def run(
        *arguments: object, status: int = 0, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            invocation(*arguments),
            cwd=cwd or folder,
            env=variables(folder, str(ROOT)),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == status, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done

    return run


def answer(done: subprocess.CompletedProcess[str]) -> Any:
    return json.loads(done.stdout)


def test_show_is_what_the_process_itself_says(server: HookedServer, command: Command) -> None:
    (live,) = server.live()
    shown = answer(command("show", "--json"))
    assert shown["pid"] == live["pid"]
    assert shown["owner_alive"] is True
    by_name = dict(shown["tensors"])
    for tensor in shown["tensors"].values():
        by_name.update(dict.fromkeys(tensor["aliases"], tensor))
    for name, truth in live["tensors"].items():
        assert by_name[name]["ptr"] == truth["ptr"]
    assert {tensor["layer"] for tensor in shown["tensors"].values()} == {None, 0, 1}
    assert {tensor["role"] for tensor in shown["tensors"].values()} == {
        *("embedding", "attention", "mlp", "norm", "lm_head", "rotary")
    }
    shown = command("show", "0", "--sort", "size", "--top", "3")
    out = shown.stdout.splitlines()
    assert len(out) == 1 + 3
    assert shown.stderr.startswith("3 of ")


def test_the_sample_in_the_readme_is_what_a_server_publishes(slot: hook.Slot) -> None:
    readme = (ROOT / "README.md").read_text()
    (block,) = re.findall(r'^```json\n("model.*?)\n```$', readme, re.DOTALL | re.MULTILINE)
    ((name, sample),) = json.loads("{" + block + "}").items()
    assert sample["storage_ptr"] == sample["ptr"]
    published = dict(slot.read().tensors[name])
    addresses = {key: sample[key] for key in ("ptr", "storage_ptr")}
    assert sample == {**published, **addresses}


def test_regions_report_and_plot(
    server: HookedServer, slot: hook.Slot, command: Command, tmp_path: Path
) -> None:
    document = slot.read()
    assert answer(command("regions", "--json"))["regions"] == document.regions
    assert len(command("regions").stdout.splitlines()) == len(document.regions) + 1
    (gpu,) = answer(command("report", "--json"))["gpus"]
    assert gpu["weights_bytes"] == document.memory["weights_bytes"]
    assert gpu["kv_cache_bytes"] == document.memory["kv_cache_bytes"]
    assert "cpu:0" in command("report").stdout
    command("plot", "--output", tmp_path / "map.html")
    assert "LlamaForCausalLM" in (tmp_path / "map.html").read_text()


def test_lookup_finds_elements_where_torch_has_them(
    server: HookedServer, slot: hook.Slot, command: Command
) -> None:
    (live,) = server.live()
    name = "model.layers.1.mlp.down_proj.weight"
    truth = live["tensors"][name]
    itemsize = truth["size"] // (truth["shape"][0] * truth["shape"][1])
    element = [3, 5]
    offset = sum(i * step for i, step in zip(element, truth["stride"])) * itemsize
    found = answer(command("lookup", hex(truth["ptr"] + offset), "--json"))
    assert [(hit["name"], hit["element"]) for hit in found["tensors"]] == [(name, element)]
    (buffer, *_) = slot.read().memory["kv_cache"]
    assert buffer["name"] in command("lookup", buffer["ptr"]).stdout
    command("lookup", "0x10", status=3)


def test_watch_and_diff_see_an_update(
    server: HookedServer,
    slot: hook.Slot,
    command: Command,
    checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    saved = tmp_path / "before.json"
    shutil.copy(slot.path("weight_layout_{}.json"), saved)
    assert "contents are the same" in command("diff", saved, "0").stdout
    watching = subprocess.Popen(
        invocation("watch", "--json", "--all-events", "--dir", server.maps.path),
        env=variables(tmp_path, str(ROOT)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert watching.stdout is not None
    first = json.loads(watching.stdout.readline())
    assert (first["initial"], first["state"]["state"]) == (True, "ready")
    status, _ = server.update_weights_from_disk(checkpoint(2))
    assert status == 200
    states = []
    for line in watching.stdout:
        seen = json.loads(line)["state"]
        states.append(seen["state"])
        if seen["event"]["success"] is not None:
            break
    assert states == ["updating", "ready"]
    assert seen["event"]["kind"] == "update_weights_from_disk"
    assert seen["content_generation"] == first["state"]["content_generation"] + 1
    watching.send_signal(2)
    out, err = watching.communicate(timeout=60)
    assert (watching.returncode, out, err) == (0, "", "")
    changes = answer(command("diff", saved, "0", "--json"))
    assert changes["content_changed"] is True
    assert changes["must_register_again"] is False
    server.update_weights_from_disk(checkpoint(1))


def test_waiting_in_python_sees_it_too(
    server: HookedServer, slot: hook.Slot, checkpoint: Callable[..., Path]
) -> None:
    generations = slot.generations(timeout=60)
    before = next(generations)
    server.update_weights_from_disk(checkpoint(2))
    after = next(generations)
    assert after.content_generation == before.content_generation + 1
    assert not after.changes_since(before).must_register_again
    generations.close()  # type: ignore[attr-defined]
    server.update_weights_from_disk(checkpoint(1))


def test_verify_finds_nothing_and_a_failed_update_is_a_warning(
    server: HookedServer, command: Command, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    assert command("verify").stdout.startswith("ok ")
    assert answer(command("verify", "--json")) == {
        "good": True,
        "slots": [{"slot": "0", "good": True, "findings": []}],
    }
    server.update_weights_from_disk(tmp_path / "nothing")
    assert command("verify").stdout.startswith("warning ")
    command("verify", "--strict", status=3)
    server.update_weights_from_disk(checkpoint(1))
    command("verify", "--strict")


def test_doctor_in_the_servers_environment_finds_everything(
    server: HookedServer, hooked_python: Path, tmp_path: Path
) -> None:
    # typer and rich are borrowed from the tests' own environment.
    done = subprocess.run(
        invocation("doctor", "--json", python=hooked_python),
        env=variables(tmp_path, sysconfig.get_path("purelib")),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = answer(done)
    assert found["hook"]["active"] is True
    (installation,) = found["hook"]["installed"]
    assert installation["door"] == "install_sglang_hook_patch.sh"
    assert found["hook"]["library"] == installation["place"]
    assert found["sglang"]["version"] == "0.5.23"
    assert len(found["entry_points"]) == len(core.ENTRY_POINTS)
    assert all(entry["found"] for entry in found["entry_points"] if entry["expected"])
    # What the server itself has found missing, which asked by importing, is the same: nothing.
    assert server.maps.slot("0").read_state()["missing"] == []


def test_doctor_without_the_extra_says_what_to_install(hooked_python: Path, tmp_path: Path) -> None:
    code = "import sys; sys.modules['typer'] = None; from sglang_weight_hook import __main__ as m; "
    done = subprocess.run(
        [str(hooked_python), "-c", code + "sys.exit(m.main())"],
        env=variables(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "pip install typer rich" in done.stderr


def test_after_the_server_has_exited_every_command_says_stale(
    server: HookedServer, slot: hook.Slot, command: Command
) -> None:
    pid = pid_of(slot)
    watching = subprocess.Popen(
        invocation("watch", "--count", "1", "--timeout", "120", "--dir", server.maps.path),
        env=variables(ROOT, str(ROOT)),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert watching.stdout is not None
    watching.stdout.readline()
    server.stop()
    wait_for_end(pid)
    assert f"owner {pid} has exited" in watching.communicate(timeout=120)[0]
    assert watching.returncode == 0
    stale = command("verify", status=3).stdout
    assert "owner" in stale
    assert str(pid) in stale
    for name in ("show", "regions", "plot"):
        assert f"(pid {pid}) has exited" in command(name, status=3).stderr
        assert f"(pid {pid}) has exited" in command(name, "--allow-stale").stderr
    assert "left out" in command("report", status=3).stderr
    gone = ("report", "--gone", "--allow-stale", "--json")
    assert answer(command(*gone))["total"]["weights_bytes"] > 0
    command("watch", "--count", "1", "--timeout", "0.2", status=3)
