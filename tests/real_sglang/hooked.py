"""A real SGLang server with the hook installed by its own script, beside torch's own answers.

The hook goes into a thin venv of the test's own, whose ``sys.path`` continues in the shared
venv that holds SGLang: no test touches the shared one, and the hook's ``.pth`` sorts before
the one that makes torch importable, as on machines where torch is outside site-packages.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sglang_weight_hook as hook
from cpu_sglang.environment import Environment
from cpu_sglang.server import Server

ROOT = Path(__file__).resolve().parents[2]


def make_venv(path: Path, environment: Environment) -> Path:
    """A thin venv over ``environment`` with the hook and the probe; its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(path)], check=True)
    python = path / "bin" / "python"
    purelib = next(path.glob("lib/python*/site-packages"))
    (purelib / "zz_shared.pth").write_text(f"{environment.purelib}\n")
    shutil.copy(Path(__file__).with_name("weight_probe.py"), purelib)
    (purelib / "weight_probe.pth").write_text("import weight_probe; weight_probe.start()\n")
    subprocess.run(
        [str(ROOT / "install_sglang_hook_patch.sh"), "--python", str(python)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return python


def make_checkpoint(environment: Environment, path: Path, seed: int, *options: str) -> Path:
    subprocess.run(
        [environment.python, "-m", "cpu_sglang.tiny_model", path, "--seed", str(seed), *options],
        cwd=ROOT,
        env=environment.env(),
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return path


class HookedServer(Server):
    """A server with the hook, its output directory and the probe."""

    def __init__(
        self,
        environment: Environment,
        python: Path,
        model: Path,
        folder: Path,
        extra_args: Sequence[str] = (),
        extra_env: Mapping[str, str] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.probe_directory = folder / f"probe-{time.monotonic_ns()}"
        self.probe_directory.mkdir()
        self.maps = hook.open_directory(str(folder / "weights_metadata"))
        self._asked = 0
        super().__init__(
            environment,
            model,
            cwd=folder,
            log_path=folder / f"server-{time.monotonic_ns()}.log",
            command=[str(python), "-m", "sglang.launch_server"],
            extra_args=extra_args,
            extra_env={"WEIGHT_PROBE_DIR": str(self.probe_directory), **(extra_env or {})},
        )

    def live(self, ranks: int = 1) -> list[dict[str, Any]]:
        """What the processes themselves say now: one entry per runner, with its pid."""
        self._asked += 1
        (self.probe_directory / f"request-{self._asked}").touch()
        deadline = time.monotonic() + 60
        while True:
            answers = list(self.probe_directory.glob(f"answer-{self._asked}-*.json"))
            if len(answers) == ranks:
                break
            assert time.monotonic() < deadline, f"{len(answers)} of {ranks} ranks answered"
            time.sleep(0.05)
        return [
            {**runner, "pid": int(path.stem.rpartition("-")[2])}
            for path in answers
            for runner in json.loads(path.read_text())
        ]

    def hook_log(self) -> list[str]:
        return [line for line in self._log_text().splitlines() if "SGLang weight hook" in line]


def assert_true_map(document: hook.Document, live: Mapping[str, Any]) -> None:
    """Every name that torch knows is published where torch says it is, and nothing twice."""
    assert document.raw["identity"]["pid"] == live["pid"]
    by_name = dict(document.tensors)
    for tensor in document.tensors.values():
        by_name.update(dict.fromkeys(tensor["aliases"], tensor))
    for name, truth in live["tensors"].items():
        published = by_name[name]
        for field in ("ptr", "size", "device", "dtype", "shape", "stride"):
            assert published[field] == truth[field], (name, field)
        for field in ("storage_ptr", "storage_size"):
            assert published[field] == truth[field], (name, field)
    known = {name for name in by_name if by_name[name]["kind"] in ("parameter", "buffer")}
    assert known <= live["tensors"].keys()


def assert_legacy_files(document: hook.Document, live: Mapping[str, Any], updated: bool) -> None:
    """The files in the legacy format hold what the prototype would have written."""
    slot = document.slot
    expected = {}
    for name in live["named_parameters"]:
        truth = live["tensors"][name]
        expected[name] = {key: truth[key] for key in ("ptr", "size", "device", "dtype", "shape")}
        if updated:
            expected[name]["updated"] = True
    assert json.loads(_read(slot, "weights_meta_{}.json")) == expected
    sizes: dict[str, int] = {}
    for entry in expected.values():
        sizes[entry["device"]] = sizes.get(entry["device"], 0) + entry["size"]
    totals = {device: size / 1024**3 for device, size in sizes.items()}
    assert json.loads(_read(slot, "total_weight_meta_{}.json")) == totals
    if updated:
        summary = json.loads(_read(slot, "weight_update_summary_{}.json"))
        assert summary["total_weights"] == len(expected)
        assert summary["device_weight_summary"] == totals
        assert summary["gpu_id"] == live["gpu_id"]


def _read(slot: hook.Slot, name: str) -> str:
    return Path(slot.path(name)).read_text()


@contextmanager
def weights_held(slot: hook.Slot) -> Iterator[None]:
    """A reader's shared lock, taken from a process of its own."""
    holder = subprocess.Popen(
        ["flock", "--shared", slot.path("weight_saving_{}.lock"), "sh", "-c", "echo held; cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    assert holder.stdin is not None
    assert holder.stdout.readline() == b"held\n"
    try:
        yield
    finally:
        holder.stdin.close()
        holder.wait()
        holder.stdout.close()


def run_client(environment: Environment, *arguments: object) -> list[dict[str, Any]]:
    """`cpu_sglang.online_updates` against a running server: one dict per step."""
    finished = subprocess.run(
        [str(environment.python), "-m", "cpu_sglang.online_updates", *map(str, arguments)],
        cwd=ROOT,
        env=environment.env(),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    steps = [json.loads(line) for line in finished.stdout.splitlines() if line.startswith("{")]
    assert finished.returncode == 0, steps
    return steps


def pid_of(slot: hook.Slot) -> int:
    return int(slot.read_state()["pid"])


def wait_for_end(pid: int) -> None:
    deadline = time.monotonic() + 30
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
        time.sleep(0.05)
