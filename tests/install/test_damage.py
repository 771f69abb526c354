"""What was damaged after it was installed is found by --check and mended by installing again."""

from __future__ import annotations

import importlib.util
import marshal
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import ENVIRONMENT, INSTALL, Target, tree

CORE = "sglang_weight_hook_patch_core"
FLUSH_ORDER = Path(__file__).with_name("flush_order.py")


def cut(to: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:to]


def code_of(text: str) -> bytes:
    return marshal.dumps(compile(text, "x.py", "exec"))


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": cut(0),
    "a part of the header": cut(9),
    "the header alone": cut(16),
    "cut to 100 bytes": cut(100),
    "without its last byte": lambda data: data[:-1],
    "zeros behind the header": lambda data: data[:16] + bytes(len(data) - 16),
    "other code": lambda data: data[:16] + code_of("raise SystemExit('other code')"),
    "other code, never compared with the source (PEP 552)": lambda data: (
        importlib.util.MAGIC_NUMBER + b"\1\0\0\0" + bytes(8) + code_of("import sys")
    ),
    "another type": lambda data: data[:16] + marshal.dumps({"no": "code"}),
    "another Python's number": lambda data: b"\x01\x02\r\n" + data[4:],
}


@pytest.fixture
def compiled(target: Target, checkout: Path) -> Path:
    """The compiled core of an installation of the small checkout."""
    target.install(root=checkout)
    (found,) = (target.purelib / "__pycache__").glob(f"{CORE}.*.pyc")
    return found


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_compiled_file_is_found_and_mended(
    target: Target, checkout: Path, compiled: Path, damage: str
) -> None:
    times = compiled.stat()
    compiled.write_bytes(DAMAGES[damage](compiled.read_bytes()))
    os.utime(compiled, ns=(times.st_atime_ns, times.st_mtime_ns))
    done = target.script(INSTALL, "--check", root=checkout)
    assert done.returncode == 1
    assert f"__pycache__/{compiled.name} is not what its source compiles to" in done.stdout
    target.install(root=checkout)
    assert target.run("-B", "-c", f"import {CORE}").returncode == 0
    assert target.script(INSTALL, "--check", root=checkout).returncode == 0


def test_a_link_in_the_place_of_a_compiled_file_is_found_and_replaced(
    target: Target, checkout: Path, compiled: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere.pyc"
    compiled.rename(elsewhere)
    whole = elsewhere.read_bytes()
    compiled.symlink_to(elsewhere)
    assert target.script(INSTALL, "--check", root=checkout).returncode == 1
    target.install(root=checkout)
    assert not compiled.is_symlink()
    assert elsewhere.read_bytes() == whole


def test_compiled_files_that_interpreters_added_are_compared_too(
    target: Target, checkout: Path, compiled: Path
) -> None:
    target.run("-O", "-c", f"import {CORE}")
    before = tree(target.purelib, times=True)
    assert target.script(INSTALL, "--check", root=checkout).returncode == 0
    target.install(root=checkout)
    assert tree(target.purelib, times=True) == before
    (added,) = compiled.parent.glob(f"{CORE}.*.opt-1.pyc")
    added.write_bytes(added.read_bytes()[:100])
    assert f"{added.name} is not what" in target.script(INSTALL, "--check", root=checkout).stdout
    target.install(root=checkout)
    assert not added.exists()


def test_what_another_python_compiled_is_not_called_intact_and_does_not_stay(
    target: Target, checkout: Path, compiled: Path
) -> None:
    other = compiled.with_name(f"{CORE}.cpython-38.pyc")
    other.write_bytes(b"nobody here can tell")
    done = target.script(INSTALL, "--check", root=checkout)
    assert done.returncode == 0
    assert "of the compiled files, 1 of other Pythons, not compared" in done.stdout
    target.install(root=checkout)
    assert not other.exists()


def test_an_image_without_compiled_files_is_no_fault(
    target: Target, checkout: Path, compiled: Path
) -> None:
    for path in target.purelib.rglob("*.pyc"):
        path.unlink()
    done = target.script(INSTALL, "--check", root=checkout)
    assert done.returncode == 0
    assert "absent; Python compiles their sources again" in done.stdout


@pytest.mark.parametrize(
    ("path", "named"),
    [
        (f"{CORE}.py", CORE),
        ("sglang_weight_hook/__init__.py", "sglang_weight_hook"),
        ("sglang_weight_hook/publisher/recorder.py", "sglang_weight_hook.publisher.recorder"),
        ("sglang_weight_hook/reader/__init__.py", "sglang_weight_hook.reader"),
    ],
)
def test_what_a_server_needs_has_to_be_importable(
    target: Target, checkout: Path, path: str, named: str
) -> None:
    package = checkout / "sglang_weight_hook"
    (package / "reader.py").unlink()
    for name in ("publisher/__init__.py", "publisher/recorder.py", "reader/__init__.py"):
        (package / name).parent.mkdir(exist_ok=True)
        (package / name).write_text("")
    target.install(root=checkout)
    target.empty()
    with (checkout / path).open("a") as stream:
        stream.write("raise RuntimeError('broken when imported')\n")
    said = target.refused(INSTALL, root=checkout)
    assert f"{named} cannot be imported: RuntimeError('broken when imported')" in said
    assert tree(target.purelib) == {}


def test_the_files_are_counted_in_one_way(target: Target, checkout: Path) -> None:
    said = [
        target.script(*words, root=checkout).stdout
        for words in (
            (INSTALL,),
            (INSTALL, "--check"),
            ("uninstall_sglang_hook_patch.sh",),
        )
    ]
    target.install(root=checkout)
    count = sum(kind.startswith("file") for kind, _, _ in tree(target.purelib).values())
    assert f"sglang-weight-hook 0.0.9, {count} files\n" in said[0]
    assert f"Files      {count} intact\n" in said[1]
    assert f"sglang-weight-hook 0.0.9, {count} files\n" in said[2]


@pytest.mark.parametrize("action", ["install", "upgrade", "uninstall"])
def test_what_is_written_is_on_the_disk_before_it_is_named(
    target: Target, checkout: Path, action: str
) -> None:
    if action != "install":
        target.install(root=checkout)
        (checkout / "sglang_weight_hook" / "reader.py").write_text("READS = 'otherwise'\n")
    arguments = ["uninstall" if action == "uninstall" else "install"]
    done = subprocess.run(
        [target.python, "-I", "-B", FLUSH_ORDER, checkout, *arguments],
        capture_output=True, text=True, env=ENVIRONMENT, check=False,
    )  # fmt: skip
    assert done.stderr == ""
    assert done.returncode == 0
