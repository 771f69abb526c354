"""Both scripts in site-packages where anything may lie at the names that they use.

Planted are files of the user's own, links, FIFOs, directories, other distributions' records,
half-written files and damaged ones of ours.  Whatever lies there:

* a run ends by itself, with what it did or with one sentence;
* a refused installation has changed nothing;
* what belongs to others is neither written over nor removed, nor is anything outside reached;
* after an installation the hook is there, and after a removal what had not been ours is as before.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.stress.processes import ROOT

#: Runs the installer on a directory that no interpreter reads at start-up: Python itself waits for
#: a FIFO that is called .pth, and speaks of one that imports nothing.  Whether the hook is live is
#: not what is tried here.
DRIVER = """
import os, sys
checkout, purelib, *arguments = sys.argv[1:]
sys.path.insert(0, checkout)
from installer import command, liveness, target
os.fsync = lambda descriptor: None  # no power is cut here, and the disk may be busy
target.purelib = lambda: purelib
target.externally_managed = lambda: False
target.sglang = lambda: None
liveness.examine = lambda purelib, modules, editable=False: liveness.Liveness("", "", "")
liveness.still_live = lambda: ""
sys.exit(command.main(arguments))
"""

#: What the scripts of the checkout below install, and a file of the library that it lacks.
SOURCES = (
    "sglang_injector.pth",
    "sglang_injector.start",
    "sglang_patch_loader.py",
    "sglang_weight_hook_patch_core.py",
    "sglang_weight_hook/__init__.py",
    "sglang_weight_hook/reader.py",
)
OURS = "sglang_weight_hook-0.0.9.dist-info"
PLACES = (
    *SOURCES,
    "sglang_weight_hook/notes.txt",
    "sglang_weight_hook/.sglang-weight-hook-7-7.tmp",
    "sglang_weight_hook",
    "__pycache__",
    "sglang_weight_hook/__pycache__",
    f"__pycache__/sglang_patch_loader.{sys.implementation.cache_tag}.pyc",
    "__pycache__/sglang_weight_hook_patch_core.cpython-38.opt-2.pyc",
    "__pycache__/six.cpython-38.pyc",
    OURS,
    f"{OURS}/RECORD",
    f"{OURS}/INSTALLER",
    f"{OURS}/install_state.json",
    "sglang_weight_hook-9.9rc1.dist-info",
    "sglang_weight_hook-9.9rc1.dist-info/RECORD",
    ".sglang-weight-hook-journal.json",
    ".sglang-weight-hook.lock",
    ".sglang-weight-hook-1-1.tmp",
    "acme-1.dist-info/RECORD",
    "acme-1.egg-info/installed-files.txt",
)
KINDS = (
    *("own", "same", "empty", "binary", "read-only", "hard link"),
    *("link to a file", "link to a directory", "link to nothing"),
    *("fifo", "directory", "full directory"),
)
#: What may be installed already when things are planted: nothing, this version, an older one.
BEFORE = ("nothing", "same", "older")


@dataclass(frozen=True)
class Planted:
    place: str
    kind: str


@dataclass(frozen=True)
class Ground:
    """A purelib, a checkout to install from, and something outside that is not to be reached."""

    purelib: Path
    checkout: Path
    outside: Path
    #: site-packages with each of `BEFORE` in it.
    starts: dict[str, Path]


Tree = dict[str, tuple[str, bytes]]


def tree(directory: Path) -> Tree:
    found: Tree = {}
    for path in sorted(directory.rglob("*")):
        status = path.lstat()
        kind = f"{stat.S_IFMT(status.st_mode):o} {stat.S_IMODE(status.st_mode):o}"
        data = b""
        if path.is_symlink():
            data = os.fsencode(os.readlink(path))
        elif path.is_file():
            data = path.read_bytes()
        found[str(path.relative_to(directory))] = kind, data
    return found


def run(ground: Ground, action: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-I", "-S", "-B", "-c", DRIVER, ground.checkout, ground.purelib,
         *action.split()],
        capture_output=True,
        text=True,
        # A run that waits for a FIFO, or for a lock that nobody holds, fails the test here.
        timeout=30,
        check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    base = tmp_path_factory.mktemp("installer-")
    checkout = base / "checkout"
    checkout.mkdir()
    for name in ("LICENSE", "pyproject.toml", *SOURCES[:4]):
        shutil.copy2(ROOT / name, checkout)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "installer", checkout / "installer", ignore=ignored)
    (checkout / "sglang_weight_hook").mkdir()
    (checkout / "sglang_weight_hook" / "reader.py").write_text("READS = True\n")
    purelib = base / "lib" / "site-packages"
    purelib.mkdir(parents=True)
    outside = base / "outside"
    (outside / "directory").mkdir(parents=True)
    for name in ("file", "directory/sglang_patch_loader.py", "directory/__init__.py"):
        (outside / name).write_text("precious, and outside\n")
    made = Ground(purelib, checkout, outside, {})
    version = checkout / "sglang_weight_hook" / "__init__.py"
    for name, number in (("nothing", ""), ("older", "0.0.8"), ("same", "0.0.9")):
        shutil.rmtree(purelib)
        purelib.mkdir()
        if number:
            version.write_text(f'__version__ = "{number}"\n')
            assert run(made, "install").returncode == 0
        made.starts[name] = base / name
        shutil.copytree(purelib, base / name, symlinks=True)
    yield made
    shutil.rmtree(base)


def plant(ground: Ground, planted: Planted, number: int) -> bool:
    """Put it there, in place of what lies there; whether it could be."""
    place = ground.purelib / planted.place
    inner = place.relative_to(ground.purelib).parts[:-1]
    here = ground.purelib
    for part in inner:
        here = here / part
        if here.is_symlink() or not (here.is_dir() or not os.path.lexists(here)):
            return False
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    elif os.path.lexists(place):
        place.unlink()
    kind = planted.kind
    if kind == "own":
        place.write_text(record(number) if "RECORD" in place.name else f"# my own {number}\n")
    elif kind == "same":
        source = ground.checkout / planted.place
        place.write_bytes(source.read_bytes() if source.is_file() else record(number).encode())
    elif kind == "empty":
        place.write_bytes(b"")
    elif kind == "binary":
        place.write_bytes(bytes(range(256)) * (1 + number))
    elif kind == "read-only":
        place.write_text(f"# read {number}\n")
        place.chmod(0o444)
    elif kind == "hard link":
        os.link(ground.outside / "file", place)
    elif kind == "link to a file":
        place.symlink_to(ground.outside / "file")
    elif kind == "link to a directory":
        place.symlink_to(ground.outside / "directory")
    elif kind == "link to nothing":
        place.symlink_to(ground.outside / "nothing")
    elif kind == "fifo":
        os.mkfifo(place)
    else:
        place.mkdir()
        if kind == "full directory":
            (place / "mine").write_text(f"mine {number}\n")
    return True


def record(number: int) -> str:
    """A RECORD, or the like, that claims some of our names and some that it has no right to."""
    rows = ["../../outside/file", "/etc/passwd", "six.py", "sglang_weight_hook/../six.py"]
    rows += [SOURCES[number % len(SOURCES)], SOURCES[(number * 5 + 2) % len(SOURCES)]]
    return "".join(f"{row},,\n" for row in rows) + "a,b\0,\n" + '"open'


def claims(ground: Ground) -> set[str]:
    """What anything that counts as a record of ours claims; conservatively, by any mention."""
    texts = [
        path.read_bytes()
        for pattern in ("sglang_weight_hook-*.dist-info/RECORD", ".sglang-weight-hook-journal.json")
        for path in ground.purelib.glob(pattern)
        if path.is_file() and not path.is_symlink() and not path.parent.is_symlink()
    ]
    return {place for place in PLACES if any(place.encode() in text for text in texts)}


def belongs_to_others(ground: Ground, before: Tree) -> set[str]:
    """What neither script may touch without --force."""
    claimed = claims(ground)
    start_line = before.get("sglang_injector.pth", ("", b""))[1].startswith(b"import sglang_patch")
    others = set()
    for place, (kind, data) in before.items():
        if not kind.startswith("100") or place in claimed:
            continue
        name = place.rpartition("/")[2]
        if place in SOURCES:
            source = (ground.checkout / place).read_bytes()
            if not start_line and data != source:
                others.add(place)
        elif place.startswith("acme") or name in ("notes.txt", "mine", "six.cpython-38.pyc"):
            others.add(place)
    return others


PLANTED = st.lists(
    st.builds(Planted, st.sampled_from(PLACES), st.sampled_from(KINDS)),
    max_size=5,
    unique_by=lambda planted: planted.place,
)
ACTIONS = st.lists(
    st.sampled_from(["install", "uninstall", "install --check", "install --dry-run"]),
    min_size=1,
    max_size=3,
)


def try_it(ground: Ground, start: str, planted: list[Planted], actions: list[str]) -> None:
    shutil.rmtree(ground.purelib)
    shutil.copytree(ground.starts[start], ground.purelib, symlinks=True)
    for number, item in enumerate(planted):
        print(item, "" if plant(ground, item, number) else "could not be planted")
    outside = tree(ground.outside)
    for action in [*actions, "uninstall", "install", "uninstall"]:
        before = tree(ground.purelib)
        others = belongs_to_others(ground, before)
        done = run(ground, action)
        after = tree(ground.purelib)
        said = f"{action}: {done.returncode}\n{done.stdout}{done.stderr}"
        print(said)
        assert done.returncode in (0, 1), said
        assert "Traceback" not in done.stderr, said
        assert done.stderr.count("\n") == (0 if action.endswith("--check") else done.returncode), (
            said
        )
        assert tree(ground.outside) == outside, said
        for place in others:
            assert after.get(place) == before[place], (place, said)
        if "--" in action or done.returncode:
            assert after == before, said
        elif action == "install":
            for place in SOURCES:
                assert after[place][1] == (ground.checkout / place).read_bytes(), (place, said)
        else:
            # What is there after a removal was there before, and is a stranger's.
            left = {path for path, (kind, _) in after.items() if kind.startswith("100")}
            assert left <= before.keys(), said
            if "sglang_injector.pth" in left:
                assert "sglang_injector.pth" in others, said


@pytest.mark.parametrize("place", PLACES)
def test_each_kind_of_thing_at_each_place(ground: Ground, place: str, is_long: bool) -> None:
    kinds = KINDS if is_long else KINDS[PLACES.index(place) % 6 :: 6]
    for number, kind in enumerate(kinds):
        start = BEFORE[(number + PLACES.index(place)) % 3]
        try_it(ground, start, [Planted(place, kind)], ["install --check"])


def test_many_things_at_many_places(ground: Ground, is_long: bool) -> None:
    @settings(
        max_examples=1500 if is_long else 25,
        derandomize=not is_long,  # the same each time here, new ones in `make stress`
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(start=st.sampled_from(BEFORE), planted=PLANTED, actions=ACTIONS)
    def many(start: str, planted: list[Planted], actions: list[str]) -> None:
        try_it(ground, start, planted, actions)

    many()
