"""The example subscriber, installed by pip beside a real SGLang, is called around its updates."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sglang_weight_hook as hook
from cpu_sglang.environment import Environment
from tests.real_sglang.hooked import HookedServer, make_venv, pid_of, run_client

pytestmark = [pytest.mark.real_sglang, pytest.mark.registry, pytest.mark.transfer]

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def python(environment: Environment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with SGLang, the hook and the example package."""
    found = make_venv(tmp_path_factory.mktemp("with_subscriber") / "venv", environment)
    wheels = tmp_path_factory.mktemp("wheels")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    package = ROOT / "examples" / "subscriber_package"
    for command in (
        [*pip, "wheel", "-q", "--no-deps", "--wheel-dir", str(wheels), str(package)],
        [*pip, "--python", str(found), "install", "-q", "--no-deps", "--no-index",
         "--find-links", str(wheels), "weight-journal"],
    ):  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return found


def test_the_example_is_called_around_every_change(
    environment: Environment,
    python: Path,
    checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    a, b = checkpoint(1), checkpoint(2)
    variables = {
        "SGLANG_WEIGHT_HOOK_SUBSCRIBERS": "weight_journal:make",
        "WEIGHT_JOURNAL": str(tmp_path / "journal-{pid}.jsonl"),
    }
    server = HookedServer(environment, python, a, tmp_path, extra_env=variables)
    server.start_timeout = 900.0  # beside whatever else runs here
    with server:
        slots = server.maps.slots()
        assert [slot.name for slot in slots] == ["0"]
        said = [journal(tmp_path, slot) for slot in slots]
        for slot, lines in zip(slots, said):
            assert {line["slot"] for line in lines} == {slot.name}
            assert (lines[0]["method"], lines[0]["kind"]) == ("before", "load_model")
            assert (lines[-1]["method"], lines[-1]["state"]) == ("after", "ready")
            assert lines[-1]["registered"] == lines[-1]["calls"] == len(slot.read().regions)
            assert slot.read_state()["subscribers"] == {"weight_journal:make": None}

        assert server.update_weights_from_disk(b)[0] == 200
        for slot in slots:
            before, after = journal(tmp_path, slot)[-2:]
            assert (before["method"], before["kind"]) == ("before", "update_weights_from_disk")
            assert (after["method"], after["success"]) == ("after", True)
            assert after["content_generation"] == slot.read_state()["content_generation"]
            assert (after["moved"], after["calls"]) == (0, 0)  # in place

        run_client(
            environment, a, b, "--port", server.port, "--routes", "tensor", "--buckets", 2,
        )  # fmt: skip
        for slot in slots:
            generation = slot.read().content_generation  # waits for the last stream's end
            lines = journal(tmp_path, slot)
            # Alone, or within a session, which is one event and bears its name.
            assert any("stream" in line.get("effects", ()) for line in lines)
            assert lines[-1]["method"] == "after"
            assert lines[-1]["content_generation"] == generation

        server.wait_idle()
        for route in ("/release_memory_occupation", "/resume_memory_occupation"):
            assert server.post(route)[0] == 200
            kind = route.strip("/")
            for slot in slots:
                assert [line["kind"] for line in journal(tmp_path, slot)[-2:]] == [kind, kind]

        status, _ = server.update_weights_from_disk(tmp_path / "missing")
        assert status == 400
        for slot in slots:
            last = journal(tmp_path, slot)[-1]
            assert (last["method"], last["success"]) == ("after", False)
        assert server.generate()


def journal(folder: Path, slot: hook.Slot) -> list[dict[str, Any]]:
    path = folder / f"journal-{pid_of(slot)}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]
