"""save, compare, checksum and scrub as commands."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fake_sglang import FakeRunner, event, update

from sglang_weight_hook.memory import Memory

if TYPE_CHECKING:
    from ended_command import Run

safetensors = pytest.importorskip("safetensors.torch")
torch = pytest.importorskip("torch")


def test_save_and_compare(run: Run, runner: FakeRunner, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    saved = run("save", "0", path)
    assert (saved.status, saved.out) == (0, f"{path}\n")
    assert "left out, such as offloaded: it lies on meta" in saved.err
    assert len(safetensors.load_file(path)) > 10
    equal = run("compare", "0", path)
    assert equal.status == 0
    assert equal.err.count("are not compared, such as offloaded: ") == equal.err.count("\n") == 2
    assert equal.out.startswith("equal: ")
    with torch.no_grad():
        update(runner, during=lambda: runner.model.layers[0].mlp.weight.add_(0.5))
    different = run("compare", path, "0")
    assert different.status == 3
    assert "layers.0.mlp.weight" in different.out
    assert "36 of 36" in different.out
    assert "1 of " in different.out
    found = json.loads(run("compare", path, "0", "--json").out)
    (pair,) = found["pairs"]
    assert found["equal"] is False
    assert (pair["one"]["path"], pair["one"]["content_generation"]) == (str(path), "1")
    assert (pair["other"]["owner_alive"], pair["other"]["content_generation"]) == (True, 2)
    assert pair["different"][0]["largest"] == pytest.approx(0.5)
    assert run("compare", path, "0", "--match", "*norm*").status == 0
    assert run("compare", path, path).status == 0


def test_save_in_shards_as_json(run: Run, runner: FakeRunner, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    done = json.loads(run("save", "0", path, "--shard-size", "400B", "--hold", "--json").out)
    assert (done["owner_alive"], done["state"]) == (True, "ready")
    assert len(done["files"]) > 1
    assert run("compare", "0", done["index"]).status == 0
    assert run("compare", "0", tmp_path).status == 0  # the folder
    assert run("compare", "0", path).status == 0  # the name that was asked for


def test_names_of_a_checkpoint_that_are_not_sglangs(
    run: Run, runner: FakeRunner, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint.safetensors"
    safetensors.save_file({"layers.0.q_proj.weight": torch.zeros(2, 2)}, path)
    ended = run("compare", "0", path)
    assert ended.status == 3
    assert "0 names are on both sides" in ended.err
    assert "1 only in the second" in ended.err
    assert "fuses tensors under names of its own" in ended.err


def test_an_update_while_saving_is_an_answer_to_act_on(
    run: Run, runner: FakeRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = Memory.pieces

    def updated_after(self: Memory, name: str) -> Iterator[memoryview]:
        yield from pieces(self, name)
        update(runner)

    monkeypatch.setattr(Memory, "pieces", updated_after)
    ended = run("save", "0", tmp_path / "m.safetensors")
    assert (ended.status, ended.out) == (3, "")
    assert "the weights changed before " in ended.err
    assert "--hold" in ended.err
    assert not list(tmp_path.glob("m.*"))


def test_a_full_disk_is_one_sentence(
    run: Run, runner: FakeRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: object, data: memoryview) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sglang_weight_hook.memory.save._put", full)
    ended = run("save", "0", tmp_path / "m.safetensors")
    assert (ended.status, ended.out) == (1, "")
    assert "No space left on device (" in ended.err
    assert "make room" in ended.err
    assert ended.err.count("\n") == 1
    assert not list(tmp_path.glob("m.*"))  # not even a header was written


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["save", "0", "model.bin"], 2, "does not end in .safetensors"),
        (["save", "0", "m.safetensors", "--shard-size", "many"], 2, "is no size"),
        (["save", "9", "m.safetensors"], 1, "there is no slot 9"),
        (["save", "0", "m.safetensors", "--match", "*nothing*"], 1, "no tensor to be saved"),
        (["save", "0", "/nowhere/m.safetensors"], 1, "No such file or directory"),
        (["compare", "0", "9"], 1, "there is no slot 9"),
        (["compare", "0", "gone.safetensors"], 1, "does not exist"),
        (["compare", "0", "/nowhere"], 1, "does not exist"),
        (["compare", "0", "/"], 1, "neither slots nor safetensors"),
        (["checksum", "--via", "pigeon"], 1, "no way 'pigeon'"),
        (["scrub", "9"], 1, "there is no slot 9"),
    ],
)
def test_what_cannot_be_done_is_a_sentence(
    run: Run,
    runner: FakeRunner,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    status: int,
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = run(*arguments)
    assert (ended.status, ended.out) == (status, "")
    assert says in ended.err
    assert ended.err.count("\n") == 1


def test_checksums_are_those_that_the_server_publishes(
    run: Run, monkeypatch: pytest.MonkeyPatch, maps: Path
) -> None:
    from small_model import a_runner

    from sglang_weight_hook.publisher import settings

    monkeypatch.setenv("SGLANG_WEIGHT_HOOK_CHECKSUM", "1")
    settings._settings = None
    runner = a_runner()
    layout = json.loads((maps / "weight_layout_0.json").read_bytes())
    published = {n: t["checksum"] for n, t in layout["tensors"].items() if t.get("checksum")}
    ended = run("checksum", "--json")
    assert ended.status == 0
    assert json.loads(ended.out)["checksums"] == published
    assert len(published) > 10
    with torch.no_grad():  # behind the hook's back
        runner.model.layers[1].input_layernorm.bias[2] = 1.0
    ended = run("checksum")
    assert ended.status == 3
    assert "layers.1.input_layernorm.bias is not what the server has published" in ended.err


def test_scrub_once(run: Run, runner: FakeRunner) -> None:
    ended = run("scrub", "--once", "--rate", "0")
    assert (ended.status, ended.err) == (0, "")
    assert "baseline of content generation 1" in ended.out
    assert "unchanged  pass 1" in ended.out


def test_scrub_once_ends_where_a_slot_cannot_be_read(
    run: Run, runner: FakeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang_weight_hook.commands import scrub

    monkeypatch.setattr(scrub, "_GIVE_UP", 0.6)
    event("update_weights_from_disk", "update", [runner], result=(False, "no"))
    ended = run("scrub", "--once")
    assert ended.status == 3
    assert "slot 0 could not be read: slot 0 is failed" in ended.err
