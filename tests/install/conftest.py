"""Real virtual environments, of every Python at hand that the hook supports.

They are made once; `target` hands one out with an empty site-packages.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# With a t: free-threaded.
SUPPORTED = ("3.9", "3.10", "3.11", "3.12", "3.13", "3.13t", "3.14", "3.14t", "3.15")

INSTALL = "install_sglang_hook_patch.sh"
UNINSTALL = "uninstall_sglang_hook_patch.sh"

LIVE = "import sys; print(sum(type(f).__module__ == 'sglang_patch_loader' for f in sys.meta_path))"

#: What decides where Python looks, or whether the hook is on, must come from the test alone.
ENVIRONMENT = {
    key: value
    for key, value in os.environ.items()
    if not key.startswith(("PYTHON", "SGLANG", "VIRTUAL_ENV", "PIP_", "UV_"))
}

Tree = dict[str, tuple[str, int, bytes]]


def tree(directory: Path, times: bool = False) -> Tree:
    """Everything under a directory: kind and mode, bytes or link target; also times, if asked."""
    found: Tree = {}
    for path in sorted(directory.rglob("*")):
        status = path.lstat()
        mode = stat.S_IMODE(status.st_mode)
        moment = status.st_mtime_ns if times else 0
        if path.is_symlink():
            kind, data = "link", os.readlink(path).encode()
        elif path.is_dir():
            kind, data = "directory", b""
        else:
            kind, data = "file", path.read_bytes()
        found[str(path.relative_to(directory))] = (f"{kind} {mode:o}", moment, data)
    return found


@dataclass(frozen=True)
class Target:
    """One virtual environment."""

    python: Path
    purelib: Path
    version: str

    def run(
        self, *arguments: str, environment: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.python), *arguments],
            capture_output=True,
            text=True,
            cwd="/",
            env={**ENVIRONMENT, **(environment or {})},
            timeout=60,
            check=False,
        )

    def finders(self, *flags: str, environment: dict[str, str] | None = None) -> int:
        """How many finders of ours a new interpreter has; it must say nothing else."""
        done = self.run(*flags, "-c", LIVE, environment=environment)
        assert (done.returncode, done.stderr) == (0, "")
        return int(done.stdout)

    def script(
        self,
        name: str,
        *arguments: str,
        root: Path = ROOT,
        environment: dict[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(root / name), "--python", str(self.python), *arguments],
            capture_output=True,
            text=True,
            cwd="/",
            env={**ENVIRONMENT, **(environment or {})},
            timeout=120,
            check=False,
        )

    def install(self, *arguments: str, root: Path = ROOT) -> None:
        done = self.script(INSTALL, *arguments, root=root)
        assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr

    def uninstall(self, root: Path = ROOT) -> None:
        done = self.script(UNINSTALL, root=root)
        assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr

    def refused(
        self,
        name: str,
        *arguments: str,
        root: Path = ROOT,
        status: int = 1,
        environment: dict[str, str] | None = None,
    ) -> str:
        """Run a script that must refuse in one sentence and change nothing; the sentence."""
        before = tree(self.purelib, times=True)
        done = self.script(name, *arguments, root=root, environment=environment)
        assert done.returncode == status, done.stdout + done.stderr
        assert done.stderr.startswith(f"{name}: ")
        assert done.stderr.count("\n") == 1
        assert done.stderr.endswith(".\n")
        assert without_times(tree(self.purelib, times=True)) == without_times(before)
        return done.stderr

    def empty(self) -> None:
        for path in self.purelib.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def without_times(found: Tree) -> Tree:
    return {path: (kind, 0, data) for path, (kind, _, data) in found.items()}


def interpreter(version: str) -> Path | None:
    """A CPython of this version: from pyenv, or else from PATH."""
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    plain = version.rstrip("t")
    ending = version[len(plain) :]
    candidates = [
        python
        for python in sorted(versions.glob(f"{plain}.*/bin/python"))
        if python.parents[1].name.endswith("t") == bool(ending)
    ]
    if f"{sys.version_info[0]}.{sys.version_info[1]}{getattr(sys, 'abiflags', '')}" == version:
        candidates.append(Path(sys.executable))
    on_path = shutil.which(f"python{version}")
    if on_path:
        candidates.append(Path(on_path))
    for candidate in candidates:
        # A pyenv shim is on PATH for versions that are not active, and then only complains.
        done = subprocess.run([candidate, "-c", "import venv"], capture_output=True, check=False)
        if done.returncode == 0:
            return candidate
    return None


def make_target(place: Path, version: str) -> Target:
    base = interpreter(version)
    if base is None:
        pytest.skip(f"there is no Python {version} here")
    subprocess.run([base, "-m", "venv", "--without-pip", place], check=True)
    python = place / "bin" / "python"
    asked = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
        env=ENVIRONMENT,
    )
    return Target(python, Path(asked.stdout.strip()), version)


def hand_made(place: Path, version: str) -> Target:
    """A Python of its own prefix, laid out as conda lays it out, with nothing in site-packages.

    The interpreter is a copy; the standard library is links to the one that it comes from.
    """
    base = interpreter(version)
    if base is None:
        pytest.skip(f"there is no Python {version} here")
    ask = "import sysconfig; print(sysconfig.get_path('stdlib'))"
    done = subprocess.run([base, "-c", ask], capture_output=True, text=True, check=True)
    stdlib = done.stdout.strip()
    (place / "bin").mkdir(parents=True)
    (place / "conda-meta").mkdir()
    (place / "conda-meta" / "history").write_text("")
    python = place / "bin" / f"python{version}"
    shutil.copy2(base.resolve(), python)
    for name in ("python", "python3"):
        python.with_name(name).symlink_to(python.name)
    library = place / "lib" / f"python{version}"
    library.mkdir(parents=True)
    for entry in os.scandir(stdlib):
        if entry.name not in ("site-packages", "__pycache__"):
            (library / entry.name).symlink_to(entry.path)
    (library / "site-packages").mkdir()
    made = Target(python.with_name("python"), library / "site-packages", version)
    if made.run("-c", "import sys; print(sys.prefix)").stdout != f"{place}\n":
        pytest.skip("a copy of this interpreter does not take its place for its prefix")
    return made


@pytest.fixture(scope="session", params=SUPPORTED)
def every_python(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Target:
    """A virtual environment with the hook, of each Python; not to be changed."""
    made = make_target(tmp_path_factory.mktemp(f"python{request.param}-"), request.param)
    made.install()
    return made


@pytest.fixture(scope="session")
def _shared_target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    return make_target(tmp_path_factory.mktemp("target-"), here)


@pytest.fixture
def target(_shared_target: Target) -> Target:
    """A virtual environment with nothing in its site-packages."""
    _shared_target.empty()
    return _shared_target


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the scripts need, with a library of three files, for tests to change."""
    place = tmp_path / "checkout"
    place.mkdir()
    for name in (
        INSTALL,
        UNINSTALL,
        "LICENSE",
        "pyproject.toml",
        "sglang_injector.pth",
        "sglang_injector.start",
        "sglang_patch_loader.py",
        "sglang_weight_hook_patch_core.py",
    ):
        shutil.copy2(ROOT / name, place)
    shutil.copytree(
        ROOT / "installer", place / "installer", ignore=shutil.ignore_patterns("__pycache__")
    )
    package = place / "sglang_weight_hook"
    package.mkdir()
    (package / "__init__.py").write_text('__version__ = "0.0.9"\n')
    (package / "reader.py").write_text("READS = True\n")
    (package / "py.typed").write_text("")
    return place


#: What a wheel is made of.
CARRIED = (
    "LICENSE",
    "README.md",
    "pyproject.toml",
    "sglang_injector.pth",
    "sglang_injector.start",
    "sglang_patch_loader.py",
    "sglang_weight_hook_patch_core.py",
)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is built, so that what else lies in the checkout has no say."""
    place = tmp_path_factory.mktemp("source-")
    for name in CARRIED:
        shutil.copy2(ROOT / name, place)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "sglang_weight_hook", place / "sglang_weight_hook", ignore=ignored)
    return place


@pytest.fixture(scope="session")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel-")
    # With the caller's own environment: it may name a registry and a proxy.
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", out, source],
        check=True,
        capture_output=True,
        timeout=300,
    )
    (made,) = out.glob("sglang_weight_hook-*.whl")
    return made
