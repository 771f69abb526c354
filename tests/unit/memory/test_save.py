"""Saved weights are the server's, of one generation; a half-written file is never taken for whole.

Read back with the safetensors library, which is not what wrote them.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bytes_owner import BytesOwner, started

from sglang_weight_hook import Changed, HookError, NotReadable, NotReady, OwnerGone
from sglang_weight_hook.memory import dtypes, safetensors_file
from sglang_weight_hook.memory.save import Progress, save

safetensors = pytest.importorskip("safetensors.torch")
torch = pytest.importorskip("torch")


def digest(tensor: Any) -> str:
    flat = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor).view(-1)
    data = bytes(flat.view(torch.uint8).numpy().data) if flat.numel() else b""
    return hashlib.sha256(data).hexdigest()


def assert_saved(owner: BytesOwner, saved: dict[str, Any]) -> None:
    document = owner.read()
    assert set(saved) == set(document.tensors)
    for name, tensor in saved.items():
        meta = document.tensor(name)
        assert (str(tensor.dtype), tuple(tensor.shape)) == (meta.dtype, meta.shape), name
        known = next(n for n in (name, *meta.aliases) if n in owner.names())
        assert digest(tensor) == owner.digest(known), name


def test_one_file_holds_every_tensor_as_it_is(owner: BytesOwner, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    done = save(owner.slot, str(path))
    assert (done.files, done.index_file, done.raw, done.left_out) == ([str(path)], None, {}, {})
    assert_saved(owner, safetensors.load_file(path))
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert metadata["content_generation"] == "1"
    assert metadata["model_path"] == "fake/model"
    assert json.loads(metadata["aliases"]) == {"lm_head.weight": ["embed.weight"]}
    assert [each.name for each in tmp_path.iterdir() if each.is_file()] == ["model.safetensors"]


def test_shards_have_an_index_as_hugging_faces_libraries_read_it(
    owner: BytesOwner, tmp_path: Path
) -> None:
    done = save(owner.slot, str(tmp_path / "model.safetensors"), shard_bytes=100_000)
    assert len(done.files) == 3
    assert done.index_file == str(tmp_path / "model.safetensors.index.json")
    index = json.loads(Path(done.index_file).read_text())
    together: dict[str, Any] = {}
    for name in sorted(set(index["weight_map"].values())):
        part = safetensors.load_file(tmp_path / name)
        assert all(index["weight_map"][tensor] == name for tensor in part)
        together.update(part)
    assert index["metadata"]["total_size"] == done.bytes
    assert_saved(owner, dict(sorted(together.items())))


def test_what_exists_is_replaced_only_when_told(owner: BytesOwner, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("mine")
    with pytest.raises(HookError, match="exists already"):
        save(owner.slot, str(path))
    assert path.read_text() == "mine"
    save(owner.slot, str(path), force=True)
    assert_saved(owner, safetensors.load_file(path))


def interrupt_at(wanted: int) -> Callable[[Progress], None]:
    def tell(progress: Progress) -> None:
        if progress.bytes >= wanted:
            raise KeyboardInterrupt

    return tell


@pytest.mark.parametrize("shard_bytes", [10**9, 100_000])
def test_an_interrupted_save_goes_on_where_it_was(
    owner: BytesOwner, tmp_path: Path, shard_bytes: int
) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(KeyboardInterrupt):
        save(owner.slot, str(path), shard_bytes=shard_bytes, tell=interrupt_at(450_000))
    assert not path.exists()
    assert list(tmp_path.glob("*.partial"))
    done = save(owner.slot, str(path), shard_bytes=shard_bytes)
    assert 400_000 <= done.resumed < done.bytes
    saved: dict[str, Any] = {}
    for name in done.files:
        saved.update(safetensors.load_file(name))
    assert_saved(owner, dict(sorted(saved.items())))
    assert not list(tmp_path.glob("*.partial"))


def test_it_does_not_go_on_with_other_weights(owner: BytesOwner, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(KeyboardInterrupt):
        save(owner.slot, str(path), tell=interrupt_at(450_000))
    owner.tell("fill")
    assert save(owner.slot, str(path)).resumed == 0
    assert_saved(owner, safetensors.load_file(path))


def test_an_update_meanwhile_leaves_nothing(owner: BytesOwner, tmp_path: Path) -> None:
    def tell(progress: Progress) -> None:
        if progress.tensor == "packed":
            owner.tell("fill")

    with pytest.raises(Changed, match=r"before \w+ was saved: .*content generation"):
        save(owner.slot, str(tmp_path / "model.safetensors"), tell=tell)
    assert not [each for each in tmp_path.iterdir() if each.is_file()]


def test_an_update_at_the_second_shard_leaves_nothing_of_the_first(
    owner: BytesOwner, tmp_path: Path
) -> None:
    told = []

    def tell(progress: Progress) -> None:
        told.append(progress)
        if progress.bytes > 300_000 and len(told) > 1:
            owner.tell("fill")

    with pytest.raises(Changed):
        save(owner.slot, str(tmp_path / "m.safetensors"), shard_bytes=100_000, tell=tell)
    assert not [each for each in tmp_path.iterdir() if each.is_file()]
    done = save(owner.slot, str(tmp_path / "m.safetensors"), shard_bytes=100_000)
    assert done.resumed == 0


def test_a_set_that_is_replaced_is_never_read_as_a_mixture(
    owner: BytesOwner, tmp_path: Path
) -> None:
    """Until all files are written the old ones stay; then the index goes first and comes last."""
    path = tmp_path / "m.safetensors"
    old = save(owner.slot, str(path), shard_bytes=100_000)
    before = {name: Path(name).read_bytes() for name in (*old.files, str(old.index_file))}
    owner.tell("fill")
    with pytest.raises(KeyboardInterrupt):
        save(owner.slot, str(path), shard_bytes=100_000, force=True, tell=interrupt_at(450_000))
    assert {name: Path(name).read_bytes() for name in before} == before
    new = save(owner.slot, str(path), shard_bytes=100_000, force=True)
    assert new.files == old.files
    assert new.resumed > 0
    saved: dict[str, Any] = {}
    for name in new.files:
        saved.update(safetensors.load_file(name))
    assert_saved(owner, dict(sorted(saved.items())))


@pytest.mark.parametrize("in_place", [1, 2])
def test_files_that_had_their_names_already_are_taken_up(
    owner: BytesOwner, tmp_path: Path, in_place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is killed between two of the renames."""
    path = tmp_path / "m.safetensors"
    renamed, rename = [], os.replace

    def until(source: str, target: str) -> None:
        if len(renamed) == in_place:
            raise KeyboardInterrupt
        renamed.append(target)
        rename(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", until)
        with pytest.raises(KeyboardInterrupt):
            save(owner.slot, str(path), shard_bytes=100_000)
    done = save(owner.slot, str(path), shard_bytes=100_000)
    assert done.resumed == done.bytes
    saved: dict[str, Any] = {}
    for name in done.files:
        saved.update(safetensors.load_file(name))
    assert_saved(owner, dict(sorted(saved.items())))
    assert len(list(tmp_path.glob("m[.-]*"))) == len(done.files) + 1


def test_one_file_in_place_of_several_leaves_no_index_of_theirs(
    owner: BytesOwner, tmp_path: Path
) -> None:
    path = tmp_path / "m.safetensors"
    several = save(owner.slot, str(path), shard_bytes=100_000)
    with pytest.raises(HookError, match=r"index\.json exists already"):
        save(owner.slot, str(path))
    save(owner.slot, str(path), force=True)
    assert not os.path.exists(str(several.index_file))
    save(owner.slot, str(path), shard_bytes=100_000, force=True)
    assert not path.exists()


def test_it_says_when_it_was_saved_also_after_a_pause(
    owner: BytesOwner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.safetensors"
    first, second = time.gmtime(1_700_000_000), time.gmtime(1_800_000_000)
    monkeypatch.setattr(time, "gmtime", lambda: first)
    with pytest.raises(KeyboardInterrupt):
        save(owner.slot, str(path), tell=interrupt_at(450_000))
    monkeypatch.setattr(time, "gmtime", lambda: second)
    assert save(owner.slot, str(path)).resumed > 0
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata()["saved_at"] == "2023-11-14T22:13:20Z"
    save(owner.slot, str(path), force=True)  # from the beginning
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata()["saved_at"] == "2027-01-15T08:00:00Z"


def test_two_saves_of_one_name_do_not_mix(owner: BytesOwner, tmp_path: Path) -> None:
    path = str(tmp_path / "m.safetensors")
    refused = []

    def tell(progress: Progress) -> None:
        if not refused:
            with pytest.raises(HookError, match="by another process") as error:
                save(owner.slot, path)
            refused.append(error)

    save(owner.slot, path, tell=tell)
    assert refused
    assert_saved(owner, safetensors.load_file(path))


def test_what_is_missing_is_said_before_anything_is_written(
    owner: BytesOwner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(NotReadable, match="pip install numpy safetensors ml_dtypes"):
        save(owner.slot, str(tmp_path / "m.safetensors"))
    assert not [each for each in tmp_path.iterdir() if each.is_file()]


def test_a_type_without_a_name_in_safetensors_is_saved_as_bytes(
    owner: BytesOwner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = dtypes.ELEMENT_TYPES["torch.int64"]
    nameless = {**dtypes.ELEMENT_TYPES, "torch.int64": known._replace(safetensors=None)}
    monkeypatch.setattr(safetensors_file, "ELEMENT_TYPES", nameless)
    path = tmp_path / "m.safetensors"
    assert save(owner.slot, str(path)).raw == {"of_int64": "torch.int64"}
    saved = safetensors.load_file(path)["of_int64"]
    assert (saved.dtype, tuple(saved.shape)) == (torch.uint8, (12, 20, 8))
    assert digest(saved) == owner.digest("of_int64")
    with safetensors.safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["raw_dtypes"]) == {"of_int64": "torch.int64"}


def test_a_stale_or_released_slot_is_not_saved(owner: BytesOwner, tmp_path: Path) -> None:
    path = str(tmp_path / "model.safetensors")
    owner.tell("release")
    with pytest.raises(NotReady, match="is released"):
        save(owner.slot, path)
    owner.kill()
    with pytest.raises(OwnerGone, match="has exited"):
        save(owner.slot, path)
    assert not os.path.exists(path)


def test_a_full_disk_is_told_and_leaves_what_can_be_taken_up(
    owner: BytesOwner, tmp_path: Path
) -> None:
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))\n"
        "import sglang_weight_hook as hook\n"
        "from sglang_weight_hook.memory.save import save\n"
        "try:\n"
        "    save(hook.open_slot(sys.argv[1], '0'), sys.argv[2])\n"
        "except OSError as error:\n"
        "    print(error.strerror)\n"
    )
    path = tmp_path / "model.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", code, owner.slot.directory, str(path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "File too large\n"
    assert not path.exists()
    assert save(owner.slot, str(path)).resumed > 0
    assert_saved(owner, safetensors.load_file(path))


def test_a_planted_link_is_not_followed(owner: BytesOwner, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "model.safetensors.partial").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        save(owner.slot, str(tmp_path / "model.safetensors"))
    assert victim.read_text() == "mine"


def test_memory_does_not_grow_with_the_model(
    start_python: Callable[..., subprocess.Popen[str]], maps: Path, tmp_path: Path
) -> None:
    """Its address space may grow by 100 MB once all is imported; the model has 400 MB."""
    owner = started(start_python, maps, "large")
    code = (
        "import os, resource, sys\n"
        "import numpy, safetensors, ml_dtypes\n"
        "import sglang_weight_hook as hook\n"
        "from sglang_weight_hook.memory.save import save\n"
        "taken = int(open('/proc/self/statm').read().split()[0]) * os.sysconf('SC_PAGE_SIZE')\n"
        "resource.setrlimit(resource.RLIMIT_AS, (taken + 100_000_000,) * 2)\n"
        "from sglang_weight_hook.memory import safetensors_file\n"
        "safetensors_file.checked = lambda path: {n: 0 for n in document.tensors}\n"
        "document = hook.open_slot(sys.argv[1], '0').read()\n"
        "print(save(hook.open_slot(sys.argv[1], '0'), sys.argv[2]).bytes)\n"
    )
    path = tmp_path / "model.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", code, owner.slot.directory, str(path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) == 400 << 20
    assert path.stat().st_size > 400 << 20


def test_what_another_user_has_begun_is_not_gone_on_with(owner: BytesOwner, tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("needs root")
    path = tmp_path / "model.safetensors"
    with pytest.raises(KeyboardInterrupt):
        save(owner.slot, str(path), tell=interrupt_at(450_000))
    (partial,) = tmp_path.glob("*.partial")
    os.chown(partial, 61001, 61001)
    with pytest.raises(HookError, match="is another user's"):
        save(owner.slot, str(path))
    assert not path.exists()
