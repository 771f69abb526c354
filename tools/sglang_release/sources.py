"""One release of SGLang as source files: a wheel, an unpacked tree or a checkout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sglang_weight_hook_patch_core import OLDEST, release_key

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "sglang-wheels"

_VERSION = re.compile(r"\d+(\.\d+)*((a|b|rc)\d+)?(\.post\d+)?(\.dev\d+)?(\+[\w.]+)?")
_WHEEL = re.compile(r"sglang-([^-]+)-.*\.whl")


class NoRelease(Exception):
    """What was asked for is no release of SGLang, or cannot be fetched; the message says which."""


class Release(NamedTuple):
    version: str  # "unknown" for a checkout without one
    origin: Path  # the wheel, or the folder that contains ``sglang``

    def files(self) -> Iterator[tuple[str, bytes]]:
        """Path, from ``sglang/`` on, and text of each Python file."""
        if self.origin.is_dir():
            for path in sorted((self.origin / "sglang").rglob("*.py")):
                yield path.relative_to(self.origin).as_posix(), path.read_bytes()
            return
        with zipfile.ZipFile(self.origin) as archive:
            for name in archive.namelist():
                if name.startswith("sglang/") and name.endswith(".py"):
                    yield name, archive.read(name)


def open_release(named: str) -> Release:
    """A wheel, a folder, or else a version, which is fetched.  Raises NoRelease."""
    path = Path(named)
    if path.is_dir():
        return _checkout(path)
    if path.is_file():
        return _wheel(path)
    if not _VERSION.fullmatch(named):
        raise NoRelease(f"{named} is no wheel, no folder and no version such as 0.5.23")
    return _wheel(_fetched(named))


def released() -> list[str]:
    """The versions on the index since the oldest in the table, oldest first.  Raises NoRelease."""
    done = _pip("index", "versions", "sglang")
    listed = re.search(r"^Available versions: (.+)$", done, re.MULTILINE)
    if listed is None:
        raise NoRelease("the package index lists no versions of sglang")
    oldest = release_key(OLDEST)
    found = [name for name in listed.group(1).split(", ") if release_key(name) >= oldest]
    return sorted(found, key=release_key)


def cached() -> list[str]:
    """The versions whose wheels are here, oldest first."""
    found = [_WHEEL.fullmatch(path.name) for path in CACHE.glob("sglang-*.whl")]
    return sorted({match.group(1) for match in found if match}, key=release_key)


def _fetched(version: str) -> Path:
    for path in sorted(CACHE.glob(f"sglang-{version}-*.whl")):
        return path
    CACHE.mkdir(parents=True, exist_ok=True)
    # Moved into the cache when it is whole: a download that is cut off leaves nothing behind.
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        # Releases are built for one Python; it is only read, so any will do.
        _pip("download", "--no-deps", "--only-binary=:all:", "--ignore-requires-python",
             "--dest", folder, f"sglang=={version}")  # fmt: skip
        for path in Path(folder).glob("*.whl"):
            return path.replace(CACHE / path.name)
    raise NoRelease(f"the package index has no wheel of sglang {version} for this machine")


def _pip(*arguments: str) -> str:
    command = [sys.executable, "-m", "pip", *arguments, "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise NoRelease(f"pip {arguments[0]} failed: {last}")
    return done.stdout


def _wheel(path: Path) -> Release:
    match = _WHEEL.fullmatch(path.name)
    if match is None or not zipfile.is_zipfile(path):
        raise NoRelease(f"{path} is no wheel of sglang")
    return Release(match.group(1), path)


def _checkout(path: Path) -> Release:
    for origin in (path, path / "python"):
        if (origin / "sglang" / "srt").is_dir():
            return Release(_version_in(origin), origin)
    raise NoRelease(f"{path} holds neither sglang/srt nor python/sglang/srt")


def _version_in(origin: Path) -> str:
    for info in sorted(origin.glob("sglang-*.dist-info")):
        return info.name[len("sglang-") : -len(".dist-info")]
    for name in ("version.py", "_version.py"):
        path = origin / "sglang" / name
        if os.path.exists(path):
            found = re.search(
                r"^_*version_*\b[^'\"\n]*= *['\"](\d[^'\"]*)", path.read_text("utf-8"), re.M
            )
            if found:
                return found.group(1)
    return "unknown"
