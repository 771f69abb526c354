"""Bytes of a real server: read and saved from outside, compared after an update; and a bit that is
flipped in them while it serves."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sglang_weight_hook as hook
from cpu_sglang.environment import Environment
from tests.real_sglang.hooked import HookedServer, pid_of, wait_for_end

pytestmark = pytest.mark.real_sglang

ROOT = Path(__file__).resolve().parents[2]


def lines_of(process: subprocess.Popen[str], kind: str) -> list[Any]:
    """What it says up to the first event of ``kind``."""
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(json.loads(line))
        if seen[-1]["event"] == kind:
            return seen
    raise AssertionError(f"it ended: {seen}")


def test_a_bit_that_is_flipped_in_a_serving_server_is_named(
    environment: Environment,
    hooked_python: Path,
    checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    with HookedServer(
        environment,
        hooked_python,
        checkpoint(1),
        tmp_path,
        extra_env={"SGLANG_WEIGHT_HOOK_SHARE": "1"},
    ) as server:
        (slot,) = server.maps.slots()
        assert_same_bytes_by_every_way(slot)
        saved = tmp_path / "saved.safetensors"
        assert command("save", "0", saved, "--hold", "--dir", server.maps.path).returncode == 0
        assert command("compare", saved, "0", "--dir", server.maps.path).returncode == 0
        arguments = ["--dir", server.maps.path, "--json", "--rate", "0", "--every", "0.1"]
        scrubber = subprocess.Popen(
            [sys.executable, "-m", "sglang_weight_hook", "scrub", *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            (baseline,) = lines_of(scrubber, "baseline")
            assert baseline["tensors"] == len(slot.read().tensors)
            assert lines_of(scrubber, "pass")[-1]["corruptions"] == 0
            assert server.generate("Once upon a time")
            assert lines_of(scrubber, "pass")[-1]["corruptions"] == 0
            assert_flip_is_found(slot, scrubber)
            # An update writes all of it anew, and is no alarm.
            status, _ = server.update_weights_from_disk(checkpoint(2))
            assert status == 200
            seen = lines_of(scrubber, "baseline")
            assert not [line for line in seen if line["event"] == "corruption"]
            different = command("compare", saved, "0", "--dir", server.maps.path, "--json")
            assert different.returncode == 3
            (pair,) = json.loads(different.stdout)["pairs"]
            assert len(pair["different"]) > 10  # the norms and the rotary cache are the same
            pid = pid_of(slot)
            server.stop()
            wait_for_end(pid)
            assert "exited" in lines_of(scrubber, "waiting")[-1]["why"]
        finally:
            scrubber.terminate()
            scrubber.communicate(timeout=30)
        assert scrubber.returncode == 3


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sglang_weight_hook", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def assert_same_bytes_by_every_way(slot: hook.Slot) -> None:
    document = slot.read()
    with (
        document.open_memory(via="process") as one,
        document.open_memory(via="owner") as other,
    ):
        for name in document.tensors:
            assert one.read(name) == other.read(name), name


def assert_flip_is_found(slot: hook.Slot, scrubber: subprocess.Popen[str]) -> None:
    document = slot.read()
    tensor = document.tensor("model.layers.1.mlp.down_proj.weight")
    byte, bit = random.randrange(tensor.size), random.randrange(8)
    with document.open_memory() as memory:
        before = memory.read(tensor.name)
    with open(f"/proc/{document.identity['pid']}/mem", "r+b", buffering=0) as written:
        written.seek(tensor.ptr + byte)
        written.write(bytes([before[byte] ^ 1 << bit]))
    found = lines_of(scrubber, "corruption")[-1]
    element, inside = divmod(byte, tensor.itemsize)
    assert found["tensor"] == tensor.name
    assert found["element"] == list(divmod(element, tensor.shape[1]))
    assert found["bit"] == 8 * inside + bit
    start = element * tensor.itemsize
    value = int.from_bytes(before[start : start + tensor.itemsize], "little")
    assert int(found["before"], 16) == value
    assert int(found["after"], 16) == value ^ 1 << found["bit"]
