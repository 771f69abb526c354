"""Links, pipes and directories planted at the names of the published files."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

import pytest
from faulty_runner import (
    ModelRunner,
    everything_parses,
    no_leftovers,
    use,
    warnings,
)

from sglang_weight_hook.layout import files

NAMES = [name.format(0) for name in files.DOCUMENTS]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("target", ["victim", "nowhere"])
def test_a_link_at_a_documents_name_is_replaced_and_never_followed(
    name: str, target: str, runner: ModelRunner, maps: Path, tmp_path: Path
) -> None:
    maps.mkdir()
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (maps / name).symlink_to(tmp_path / target)
    use(runner)
    (maps / name).unlink()
    (maps / name).symlink_to(tmp_path / target)
    use(runner)
    assert victim.read_text() == "precious"
    assert not (tmp_path / "nowhere").exists()
    assert not (maps / name).is_symlink()
    assert len(everything_parses(maps)) == 6


@pytest.mark.parametrize("lock", [files.SAVING_LOCK, files.OWNER_LOCK])
@pytest.mark.parametrize("kind", ["victim", "nowhere", "fifo", "directory"])
def test_something_else_at_a_locks_name(
    lock: str,
    kind: str,
    runner: ModelRunner,
    maps: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    maps.mkdir()
    path, victim = maps / lock.format(0), tmp_path / "victim"
    victim.write_text("precious")
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / kind)
    use(runner)
    assert len(warnings(caplog)) == 1
    assert victim.read_text() == "precious"
    assert not (tmp_path / "nowhere").exists()
    everything_parses(maps)
    if lock == files.SAVING_LOCK:
        state = json.loads((maps / "weight_state_0.json").read_bytes())
        assert state["lock"].startswith("unavailable")


@pytest.mark.parametrize("name", NAMES)
def test_a_directory_at_a_documents_name(
    name: str, runner: ModelRunner, maps: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (maps / name).mkdir(parents=True)
    use(runner)
    assert 1 <= len(warnings(caplog)) == len(set(warnings(caplog))) <= 2
    assert no_leftovers(maps)
    others = [path for path in maps.glob("*.json") if path.is_file()]
    for path in others:
        json.loads(path.read_bytes())
    assert len(others) == 5


def test_a_lock_held_by_someone_else(
    request: pytest.FixtureRequest,
    maps: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("SGLANG_WEIGHT_HOOK_LOCK_TIMEOUT", "0.01")
    maps.mkdir()
    with open(maps / "weight_saving_0.lock", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        use(request.getfixturevalue("runner"))
        assert json.loads((maps / "weight_state_0.json").read_bytes())["lock"] == "timeout"
    assert len(warnings(caplog)) == 1
    assert "weight_saving_0.lock" in warnings(caplog)[0]
