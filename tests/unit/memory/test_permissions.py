"""Who may read what: the rows of the table in docs/security.md, with real users and namespaces.

Needs root, which makes the other users; and `setpriv` and `unshare` (Debian's util-linux).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bytes_owner import BytesOwner

pytest.importorskip("torch")
pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv (util-linux)"),
    pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare (util-linux)"),
]

ROOT = Path(__file__).resolve().parents[3]
SOMEBODY, ANOTHER = 61001, 61002  # users that nobody is

# Reads one tensor each way, and says what came of it.
READER = """
import sys
sys.path.insert(0, sys.argv[1])
import sglang_weight_hook as hook
for way in "process", "owner":
    try:
        with hook.open_slot(sys.argv[2], "0").read().open_memory(via=way) as memory:
            print(way, "read", memory.read("scalar").hex())
    except hook.HookError as error:
        print(way, type(error).__name__, error)
"""

# Becomes another user, whose processes then may not look at it either (prctl(2)).
NOT_DUMPABLE = """
import ctypes, os
os.setgroups([])
os.setresgid({0}, {0}, {0})
os.setresuid({0}, {0}, {0})
ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE
"""

READ = "read 00006040"  # 3.5


def reading(directory: str, *prefix: str, tmp_path: Path) -> dict[str, str]:
    """What a reader started by ``prefix`` gets, by way."""
    script = tmp_path / "reader.py"
    script.write_text(READER)
    library = tmp_path / "library"
    if not library.exists():  # where every user may read
        shutil.copytree(ROOT / "sglang_weight_hook", library / "sglang_weight_hook")
    done = subprocess.run(
        [*prefix, "/usr/bin/env", "-i", python(), "-B", str(script), str(library), directory],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return dict(line.split(" ", 1) for line in done.stdout.splitlines())


def python() -> str:
    """An interpreter that every user may run."""
    for path in ("/usr/local/bin/python3", "/usr/bin/python3"):
        if os.path.exists(path):
            return path
    return sys.executable


@pytest.fixture
def place() -> Iterator[Path]:
    """Where every user may look: not below pytest's own folder, which each of its runs closes."""
    with tempfile.TemporaryDirectory(prefix="permissions-") as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.fixture
def maps(place: Path) -> Path:
    return place / "maps"


def user(uid: int, *more: str) -> list[str]:
    return ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", *more]


def test_root_reads_by_both(owner: BytesOwner, place: Path) -> None:
    assert reading(owner.slot.directory, tmp_path=place) == {"process": READ, "owner": READ}


def test_another_user_reads_by_none(owner: BytesOwner, place: Path) -> None:
    found = reading(owner.slot.directory, *user(SOMEBODY), tmp_path=place)
    assert "it is user 0's and this is user 61001; read as that user" in found["process"]
    assert "another user's; ask as the user that runs the server" in found["owner"]


def test_a_user_that_is_listed_has_copies_and_no_more(
    start_owner: Callable[..., BytesOwner], place: Path
) -> None:
    owner = start_owner(SGLANG_WEIGHT_HOOK_SHARE=str(SOMEBODY))
    found = reading(owner.slot.directory, *user(SOMEBODY), tmp_path=place)
    assert "NotReadable" in found["process"]
    assert found["owner"] == READ
    found = reading(owner.slot.directory, *user(ANOTHER), tmp_path=place)
    assert "NotReadable" in found["owner"]
    assert "another user's" in found["owner"]


def test_root_without_ptrace_reads_by_the_owner(owner: BytesOwner, place: Path) -> None:
    """A sidecar container that has fewer capabilities than the server's."""
    bounded = ["setpriv", "--bounding-set=-sys_ptrace", "--inh-caps=-all"]
    found = reading(owner.slot.directory, *bounded, tmp_path=place)
    assert "--cap-add SYS_PTRACE" in found["process"]
    assert found["owner"] == READ


def test_from_another_pid_namespace_the_owner_is_asked(owner: BytesOwner, place: Path) -> None:
    """A sidecar container with a pid namespace of its own and the directory in common."""
    apart = ["unshare", "--pid", "--fork", "--mount-proc"]
    found = reading(owner.slot.directory, *apart, tmp_path=place)
    assert "share the pid namespace" in found["process"]
    assert found["owner"] == READ


def test_an_owner_in_a_pid_namespace_inside_ours_is_found(place: Path, maps: Path) -> None:
    """A server in a container, read from its host (NSpid in /proc/PID/status)."""
    from bytes_owner import OWNER

    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "unit")]),
        "SGLANG_WEIGHT_HOOK_DIR": str(maps),
        "SGLANG_WEIGHT_HOOK_CHECK_SECONDS": "10000",
        "SGLANG_WEIGHT_HOOK_SHARE": "1",
    }
    process = subprocess.Popen(
        [
            *("unshare", "--pid", "--fork", "--mount-proc", "--kill-child"),
            *(sys.executable, "-c", OWNER, "odd"),
        ],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        owner = BytesOwner(process, maps)
        assert owner.read().identity["pid"] < 10  # not the number it has here
        found = reading(owner.slot.directory, tmp_path=place)
        assert found == {"process": READ, "owner": READ}
    finally:
        process.kill()
        process.communicate()


def test_an_owner_that_is_not_dumpable_is_read_by_root_alone(
    start_python: Callable[..., subprocess.Popen[str]], maps: Path, place: Path
) -> None:
    from bytes_owner import OWNER, started

    # When all is imported and published: that user may not read the interpreter's files.
    hidden = OWNER.replace('print("ready"', NOT_DUMPABLE.format(SOMEBODY) + 'print("ready"')
    owner = started(lambda code, *a, **e: start_python(hidden, *a, **e), maps, "odd")
    assert reading(owner.slot.directory, tmp_path=place)["process"] == READ
    found = reading(owner.slot.directory, *user(SOMEBODY), tmp_path=place)
    assert "not dumpable" in found["process"]
