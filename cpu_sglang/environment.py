"""Installs an SGLang release that runs without a GPU, once, and finds it again.

One venv holds the base release and is shared by all; every other release is a folder
of the few packages it needs otherwise, put in front of the venv on ``PYTHONPATH``.
Packages come through pip with whatever index and cache pip is configured for.

Nothing is half-installed: a venv counts only once its stamp is written, an overlay
appears under its name by rename.  What an interrupted run downloaded is still in
pip's cache.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cpu_sglang.releases import BASE_RELEASE, Release, find_release

HOME_VARIABLE = "CPU_SGLANG_HOME"
REPOSITORY = Path(__file__).resolve().parent.parent
# The Pythons with which the lock's packages were seen to serve.
PYTHONS = ((3, 11), (3, 12), (3, 13))
# That of the interpreter that asks, so that a newcomer gets a server of the Python at hand.
PYTHON = sys.version_info[:2] if sys.version_info[:2] in PYTHONS else PYTHONS[0]
STAMP = "cpu-sglang-stamp.json"

Report = Callable[[str], None]


class EnvironmentFailed(RuntimeError):
    """An environment could not be made; the message says why and what to do."""


@dataclass(frozen=True)
class Environment:
    """An installed release: the venv's interpreter and what a server needs around it."""

    release: str
    home: Path
    overlay: Path | None = None

    @property
    def venv(self) -> Path:
        return _venv_path(self.home)

    @property
    def python(self) -> Path:
        return self.venv / "bin" / "python"

    @property
    def purelib(self) -> Path:
        return self.venv / "lib" / f"python{PYTHON[0]}.{PYTHON[1]}" / "site-packages"

    @property
    def needs(self) -> Release:
        return find_release(self.release)

    @property
    def python_path(self) -> list[str]:
        """Stand-ins first, then the release, then (by itself) the venv."""
        folders = list(self.needs.shim_paths)
        if self.overlay is not None:
            folders.append(self.overlay)
        return [str(folder) for folder in folders]

    def env(
        self,
        extra: Mapping[str, str] | None = None,
        *,
        python_path: Iterable[str | os.PathLike[str]] = (),
    ) -> dict[str, str]:
        """The variables for a process of this release.

        ``python_path`` goes in front of everything; ``extra`` overrides everything.
        The caller's own ``PYTHONPATH`` is left out on purpose: it was meant for
        another interpreter.
        """
        variables = {
            name: value
            for name, value in os.environ.items()
            if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")
        }
        variables |= {
            "PYTHONPATH": os.pathsep.join(
                [*(os.fspath(p) for p in python_path), *self.python_path]
            ),
            # SGLang asks for its CPU engine by variable as well as by --device.
            "SGLANG_USE_CPU_ENGINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            # The checkpoints are local; a look-up on the hub would only wait for a timeout.
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            # Compiling kernels for a model this size takes longer than the whole test.
            "TORCHDYNAMO_DISABLE": "1",
            "OMP_NUM_THREADS": str(min(2, os.cpu_count() or 1)),
            # A proxy has no business between a server and its own health check.
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }
        return variables | dict(extra or {})


def environments_home() -> Path:
    configured = os.environ.get(HOME_VARIABLE)
    return Path(configured).resolve() if configured else REPOSITORY / ".cache" / "cpu-sglang"


def ensure_environment(release: str = BASE_RELEASE, report: Report = print) -> Environment:
    """Install ``release`` unless it is there already, and say how to run it."""
    needs = find_release(release)
    home = environments_home()
    environment = Environment(
        release=release,
        home=home,
        overlay=None if needs.is_base else home / f"overlay-{release}{_of_python()}",
    )
    # The stamp is written last, so a reader who sees it needs no lock.
    if _is_current(environment):
        return environment
    home.mkdir(parents=True, exist_ok=True)
    (home / ".gitignore").write_text("*\n", encoding="utf-8")  # wherever it was put
    with _only_installer(home, report):
        if not _is_stamped(environment.venv, find_release(BASE_RELEASE)):
            _install_venv(environment, report)
        if environment.overlay and not _is_stamped(environment.overlay, needs):
            _install_overlay(environment, environment.overlay, report)
    return environment


def _venv_path(home: Path) -> Path:
    return home / f"venv-{BASE_RELEASE}{_of_python()}"


def _of_python() -> str:
    """What a folder's name ends in: compiled packages are of one Python."""
    return "" if PYTHONS[0] == PYTHON else f"-python{PYTHON[0]}.{PYTHON[1]}"


def _is_current(environment: Environment) -> bool:
    return _is_stamped(environment.venv, find_release(BASE_RELEASE)) and (
        environment.overlay is None or _is_stamped(environment.overlay, environment.needs)
    )


def _fingerprint(release: Release) -> str:
    return hashlib.sha256(release.pins.read_bytes()).hexdigest()


def _is_stamped(directory: Path, release: Release) -> bool:
    try:
        stamp = json.loads((directory / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(stamp.get("pins_sha256") == _fingerprint(release))


def _write_stamp(directory: Path, release: Release) -> None:
    stamp = {"release": release.name, "pins_sha256": _fingerprint(release)}
    unfinished = directory / f"{STAMP}.unfinished"
    unfinished.write_text(json.dumps(stamp) + "\n", encoding="utf-8")
    unfinished.replace(directory / STAMP)


@contextlib.contextmanager
def _only_installer(home: Path, report: Report) -> Iterator[None]:
    """One installation at a time; the kernel frees the lock of a killed one."""
    with open(home / "installing.lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("waiting for another process that is installing here")
            fcntl.flock(lock, fcntl.LOCK_EX)
        # pip inherits the lock: should this process be killed, pip goes on for a while,
        # and the next one must not build where it still writes.
        os.set_inheritable(lock.fileno(), True)
        yield


@contextlib.contextmanager
def _timed(what: str, report: Report) -> Iterator[None]:
    report(f"{what} ...")
    start = time.monotonic()
    yield
    report(f"{what}: {time.monotonic() - start:.0f} s")


def _install_venv(environment: Environment, report: Report) -> None:
    release = find_release(BASE_RELEASE)
    venv = environment.venv
    # Scripts in a venv carry its path, so it is built in place; without its stamp it
    # is an unfinished one, and pip cannot be asked to repair what it does not know.
    shutil.rmtree(venv, ignore_errors=True)
    with _timed(f"creating a virtual environment in {_relative(venv)}", report):
        _create_venv(venv)
    with _timed(f"installing SGLang {release.name} and the packages of its lock", report):
        _pip(environment, "--no-deps", "--requirement", str(release.pins))
    with _timed("checking that torch can be imported", report):
        _make_torch_importable(environment, release, report)
    _write_stamp(venv, release)


def _create_venv(venv: Path) -> None:
    base = _base_python()
    made = _run([base, "-m", "venv", str(venv)])
    if made.returncode:
        # Some distributions ship Python without ensurepip; the caller's pip can
        # install into the venv from outside then.
        shutil.rmtree(venv, ignore_errors=True)
        _check(_run([base, "-m", "venv", "--without-pip", str(venv)]), "creating the venv failed")


def _base_python() -> str:
    if sys.version_info[:2] == PYTHON:
        return sys.executable
    wanted = f"{PYTHON[0]}.{PYTHON[1]}"
    found = shutil.which(f"python{wanted}")
    if found is None:
        raise EnvironmentFailed(
            f"SGLang was seen to serve with Python 3.11 to 3.13, and neither is this Python one "
            f"of these nor is there a python{wanted} on PATH: install one"
        )
    return found


def _make_torch_importable(environment: Environment, release: Release, report: Report) -> None:
    if _imports_torch(environment).returncode == 0:
        return
    # The lock lists what a CPU build of torch needs.  Where pip's index only offers
    # the CUDA build of the same version, its libraries are separate packages.
    pinned = re.search(r"^torch==\S+$", release.pins.read_text(encoding="utf-8"), re.MULTILINE)
    if pinned is None:
        raise EnvironmentFailed(f"{release.pins.name} does not pin torch")
    report(
        f"the {pinned[0]} that pip found is a CUDA build and lacks its libraries: "
        "installing them too (several GB)"
    )
    _pip(environment, pinned[0])
    _check(_imports_torch(environment), "torch was installed and cannot be imported")


def _imports_torch(environment: Environment) -> subprocess.CompletedProcess[str]:
    return _run([str(environment.python), "-c", "import torch"], environment.env())


def _install_overlay(environment: Environment, overlay: Path, report: Report) -> None:
    release = environment.needs
    unfinished = overlay.with_name(f"{overlay.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    with _timed(f"installing SGLang {release.name} beside {BASE_RELEASE}", report):
        target = ["--target", str(unfinished)]
        _pip(environment, "--no-deps", *target, "--requirement", str(release.pins))
    _write_stamp(unfinished, release)
    shutil.rmtree(overlay, ignore_errors=True)
    unfinished.rename(overlay)


def _pip(environment: Environment, *arguments: str) -> None:
    pip = [str(environment.python), "-m", "pip"]
    if not (environment.purelib / "pip").is_dir():
        pip = [sys.executable, "-m", "pip", "--python", str(environment.python)]
    # Compiling 20,000 files takes longer than installing them, and a server compiles
    # the few it imports.
    options = ["--no-compile", "--no-input", "--disable-pip-version-check", "--quiet"]
    _check(_run([*pip, "install", *options, *arguments]), "pip could not install the packages")


def _run(
    command: list[str], variables: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    if variables is None:
        outer = ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX", "PIP_USER")
        variables = {name: value for name, value in os.environ.items() if name not in outer}
    return subprocess.run(
        command,
        env=variables,
        close_fds=False,  # for the lock; Python makes nothing else inheritable
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )


def _check(finished: subprocess.CompletedProcess[str], failure: str) -> None:
    if finished.returncode:
        lines = finished.stdout.strip().splitlines()
        # pip warns before it fails; what it failed with comes last.
        reason = [line for line in lines if not line.startswith("WARNING")][-8:] or lines[-8:]
        raise EnvironmentFailed("\n".join([f"{failure}:", *reason]))


def _relative(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
