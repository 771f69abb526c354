"""Hostile surroundings: what others plant in the output directory, and names made to confuse."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sglang_weight_hook as hook
from sglang_weight_hook.layout import files
from sglang_weight_hook.reader import verify
from tests.stress.processes import ROOT, ForkServer, published_names, whole_files

torch = pytest.importorskip("torch")

from tests.stress import simulated_server  # noqa: E402
from tests.unit.fake_sglang import FakeRunner, load, settle  # noqa: E402

pytestmark = pytest.mark.usefixtures("in_this_process")

NOBODY = 65534


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "victim"
    path.write_text("precious")
    path.chmod(0o600)
    return path


def untouched(victim: Path) -> bool:
    status = victim.stat()
    return victim.read_text() == "precious" and status.st_mode & 0o777 == 0o600


# --- planted files --------------------------------------------------------------------------

FILES = [name.format("0") for name in files.DOCUMENTS]
TEMPORARY = [f".{name}.tmp-{os.getpid()}" for name in FILES]
HEADER, EVENTS = files.HEADER.format("0"), files.EVENTS.format("0")
LOCKS = [files.SAVING_LOCK.format("0"), files.OWNER_LOCK.format("0")]


@pytest.mark.parametrize("kind", ["hard link", "symbolic link", "dangling link", "loop"])
@pytest.mark.parametrize("when", ["before", "while"])
def test_nothing_planted_is_written_through(
    kind: str, when: str, maps: Path, victim: Path, tmp_path: Path
) -> None:
    """At every name at once, the temporary ones among them."""

    def plant() -> None:
        for name in [*FILES, HEADER, *TEMPORARY, *(LOCKS if kind == "hard link" else [EVENTS])]:
            (maps / name).unlink(missing_ok=True)
            if kind == "hard link":
                os.link(other if name == LOCKS[0] else victim, maps / name)
            else:
                targets = {"symbolic link": victim, "dangling link": tmp_path / "nowhere"}
                (maps / name).symlink_to(targets.get(kind, name))

    maps.mkdir()
    other = tmp_path / "other"  # the two locks on one file would exclude each other
    other.write_text("")
    simulated_server.fresh(str(maps))
    server = simulated_server.SimulatedServer()
    if when == "before":
        plant()
    server.load()
    for _ in range(3):
        if when == "while":
            plant()
        server.move()
    assert untouched(victim)
    assert not (tmp_path / "nowhere").exists()
    assert set(whole_files(maps)) == set(FILES)
    assert not any((maps / name).is_symlink() for name in [*FILES, HEADER])
    assert not [name for name in os.listdir(maps) if name.startswith(".")]
    assert simulated_server.is_true(server)


def test_an_event_log_that_is_a_hard_link_is_not_appended_to(maps: Path, victim: Path) -> None:
    """Of the files that are not replaced but written to, the one that grows."""
    maps.mkdir()
    os.link(victim, maps / EVENTS)
    simulated_server.fresh(str(maps))
    simulated_server.SimulatedServer().load()
    assert untouched(victim)


def test_temporary_files_that_are_planted_all_the_time(
    fork_server: ForkServer, maps: Path, victim: Path
) -> None:
    """Another process puts links at the temporary names as fast as it can."""
    publisher = fork_server.start("publish_for_ever", directory=str(maps))
    names = [f".{name}.tmp-{publisher}" for name in FILES]
    planted = 0
    for _ in range(3000):
        for name in names:
            try:
                os.symlink(victim, maps / name)
                planted += 1
            except OSError:
                pass
    fork_server.kill(publisher)
    assert planted > 0
    assert untouched(victim)
    whole_files(maps)
    assert fork_server.run("successor", directory=str(maps))["slot"] == "0"
    assert untouched(victim)


# --- another user ---------------------------------------------------------------------------


@pytest.fixture
def shared() -> Iterator[Path]:
    """A directory that another user can reach; pytest's own are closed to others."""
    if os.geteuid() != 0:
        pytest.skip("changing the user needs root")
    path = Path(tempfile.mkdtemp(prefix="stress-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def test_documents_are_for_all_to_read_and_for_the_owner_to_write(
    fork_server: ForkServer, shared: Path
) -> None:
    fork_server.run("successor", directory=str(shared / "maps"))
    modes = {path.name: path.stat().st_mode & 0o7777 for path in (shared / "maps").iterdir()}
    (control,) = [name for name in modes if name.startswith("weight_hook_")]
    assert modes.pop(control) == 0o600  # the owner's own, to ask as well as to answer
    assert set(modes.values()) == {0o644}
    assert (shared / "maps").stat().st_mode & 0o7777 == 0o755


@pytest.mark.parametrize("mode", [0o777, 0o1777], ids=["world-writable", "sticky"])
def test_files_of_another_user_in_a_world_writable_directory(
    mode: int, fork_server: ForkServer, shared: Path
) -> None:
    """Documents, temporary files and locks that the server may neither open nor remove."""
    maps = shared / "maps"
    maps.mkdir()
    for name in FILES:
        (maps / name).write_text("{}")
    maps.chmod(mode)
    told = fork_server.run("as_another_user", directory=str(maps), uid=NOBODY)
    slot = hook.open_slot(str(maps), "0")
    assert len(told["said"]) == len(set(told["said"])) <= 4
    if mode == 0o777:
        assert told["said"] == []
        document = slot.read(timeout=0)
        found = {name: [t["ptr"], t["shape"]] for name, t in document.tensors.items()}
        assert found == told["truth"]
    else:
        # It cannot take them away, so it does not say that they are its own.
        assert told["said"]
        assert not slot.owner_alive()
        assert all((maps / name).read_text() == "{}" for name in FILES)


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_file_that_the_server_may_not_open(
    lock: str, fork_server: ForkServer, shared: Path
) -> None:
    maps = shared / "maps"
    maps.mkdir()
    (maps / lock).touch(0o600)
    maps.chmod(0o1777)
    told = fork_server.run("as_another_user", directory=str(maps), uid=NOBODY)
    assert len(told["said"]) == 1
    if lock == LOCKS[0]:
        state = json.loads((maps / "weight_state_0.json").read_bytes())
        assert state["lock"].startswith("unavailable")
    else:
        assert told["slot"] is None
        assert whole_files(maps) == {}


def test_the_hashes_in_the_security_page_are_those_of_the_files() -> None:
    page = (ROOT / "docs" / "security.md").read_text()
    for name in ("sglang_injector.pth", "sglang_injector.start"):
        digest = hashlib.sha256((ROOT / name).read_bytes()).hexdigest()
        assert f"{digest}  {name}" in page


# --- names ----------------------------------------------------------------------------------

# Each is another name, whatever is made of it: escaping, normalising, case, trimming, decoding.
NAMES = [
    "a/b", "a\\b", "a%2Fb", "a_b", "a\\u002fb", "a\0b", "a\\0b", "a\\u0000b", "a\nb", "a\\nb",
    "a\rb", "a b", "a b ", " a b", "a\tb", "é", "e\u0301", "A", "a", "\ud800", "\\ud800", "\udc80",
    "\\udc80", "\ufffd", '"', '\\"', "'", "&amp;", "&", "<b>", "", "__proto__", "constructor",
    "null", "0", "00", "-0", "[bold]", "\x1b[31mred", "\u202eright to left", "../../x", "x" * 4096,
]  # fmt: skip


def named(names: list[str]) -> Any:
    model = torch.nn.Module()
    for number, name in enumerate(names):
        # Past register_parameter, which refuses some of them: a model can do so, too.
        model._parameters[name] = torch.nn.Parameter(torch.zeros(number + 1))
    return model


def published(maps: Path, names: list[str]) -> None:
    model = named(names)
    simulated_server.fresh(str(maps))
    runner = FakeRunner(model)
    load(runner)
    settle()
    truth = {name: model._parameters[name].data_ptr() for name in names}
    document = hook.open_slot(str(maps), "0").read(timeout=0)
    assert document.state["problem"] is None
    assert {tensor.name: tensor.ptr for tensor in document.iter_tensors()} == truth
    meta = json.loads((maps / "weights_meta_0.json").read_bytes())
    assert {name: entry["ptr"] for name, entry in meta.items()} == truth
    there = {*FILES, HEADER, EVENTS, *LOCKS} - {"weight_update_summary_0.json"}
    assert published_names(maps) == there


def test_every_name_is_published_as_it_is_and_apart_from_the_others(maps: Path) -> None:
    assert len(set(NAMES)) == len(NAMES)
    published(maps, NAMES)


def test_a_name_of_ten_megabytes(maps: Path) -> None:
    published(maps, ["x" * 10_000_000, "x" * 9_999_999 + "y"])


def test_the_commands_show_every_name_on_one_line(
    maps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("typer")
    from tests.stress import untrusted_documents

    published(maps, NAMES)
    for arguments in untrusted_documents.commands(maps, maps):
        untrusted_documents.check_command(arguments)
    for command in ("show", "verify"):
        _, said = untrusted_documents.run_command([command, "--dir", str(maps)])
        assert "\x1b[31m" not in said


def test_two_modules_whose_paths_spell_the_same_name_are_not_hushed_up(maps: Path) -> None:
    """Torch gives both the name ``a.b``; it takes a model that goes past register_parameter."""
    model = torch.nn.Module()
    model.a = torch.nn.Module()
    model.a.b = torch.nn.Parameter(torch.zeros(3))
    model._parameters["a.b"] = torch.nn.Parameter(torch.zeros(5))
    truth = {model.a.b.data_ptr(), model._parameters["a.b"].data_ptr()}
    simulated_server.fresh(str(maps))
    runner = FakeRunner(model)
    load(runner)
    settle()
    document = hook.open_slot(str(maps), "0").read(timeout=0)
    found = {tensor.ptr for tensor in document.iter_tensors()}
    assert found < truth  # a document has one tensor of a name
    # ... and says that there is one more.
    validation = document.raw["validation"]
    assert (validation["expected"]["parameter"], validation["captured"]["parameter"]) == (2, 1)
    findings = verify.verify_slot(document.slot).findings
    assert any("another tensor has this name" in finding.message for finding in findings), findings
