"""What is put into purelib: every file with its bytes, in the order in which it is written.

All of it is made in memory first.  A source that is missing, or that this Python cannot
compile, is found before the first byte of site-packages changes.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib.util
import io
import json
import marshal
import os
import posixpath
import re
import struct
import sys
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

from . import Refusal

DISTRIBUTION = "sglang-weight-hook"
INSTALLER = "install_sglang_hook_patch.sh"

PACKAGE = "sglang_weight_hook"
CORE = "sglang_weight_hook_patch_core.py"
LOADER = "sglang_patch_loader.py"
START = "sglang_injector.start"
PTH = "sglang_injector.pth"
ROOT_FILES = (CORE, LOADER, START, PTH)

#: Kept in the dist-info directory: the state before the installation.
STATE = "install_state.json"

#: What this installer, and others, put directly into a dist-info directory.  Of one of ours they
#: are ours, listed in its RECORD or not: that may be what was lost.
METADATA_FILES = (
    "METADATA", "RECORD", "INSTALLER", "WHEEL", "REQUESTED", "LICENSE", "entry_points.txt",
    "direct_url.json", "top_level.txt", "uv_cache.json", "uv_build.json", STATE,
)  # fmt: skip

#: What has to be importable in a server for its weights to be published and read, beside the
#: loader and the core; in the order in which the installation is tried.
LIBRARY = (PACKAGE, f"{PACKAGE}.publisher.recorder", f"{PACKAGE}.reader")

DIST_INFO = re.compile(r"sglang[-_.]weight[-_.]hook-([^-/]+)\.dist-info", re.IGNORECASE)

_METADATA = """\
Metadata-Version: 2.1
Name: {name}
Version: {version}
Summary: {summary}
License: Apache-2.0
License-File: LICENSE
Requires-Python: >=3.9
"""

# SGLang's plugin entry point (0.5.11 and later): the same idempotent function as in the .pth.
# No console script is listed, because these scripts put nothing outside purelib:
# `python -m sglang_weight_hook` is the command here.
_ENTRY_POINTS = """\
[sglang.srt.plugins]
sglang_weight_hook = sglang_patch_loader:install
"""


@dataclass(frozen=True)
class File:
    """One file to be; ``path`` is relative to purelib, with forward slashes, as in RECORD."""

    path: str
    data: bytes
    mtime: int


#: PEP 440, with the spellings that it allows for a version that is not normalised yet.
_VERSION = re.compile(
    r"""v?(?:(?P<epoch>\d+)!)?(?P<release>\d+(?:\.\d+)*)
    (?:[-_.]?(?P<pre>alpha|a|beta|b|preview|pre|c|rc)[-_.]?(?P<pre_number>\d*))?
    (?P<post>-(?P<post_implied>\d+)|[-_.]?(?:post|rev|r)[-_.]?(?P<post_number>\d*))?
    (?P<dev>[-_.]?dev[-_.]?(?P<dev_number>\d*))?
    (?:\+(?P<local>[a-z0-9]+(?:[-_.][a-z0-9]+)*))?""",
    re.VERBOSE | re.IGNORECASE | re.ASCII,
)
_PRE = {"alpha": "a", "beta": "b", "c": "rc", "pre": "rc", "preview": "rc"}


def version(root: str) -> str:
    """The version of this checkout, read without importing it, in its normalised form.

    That is what a wheel of this checkout says too, and what the name of a dist-info directory
    can hold: in ``0.2.0-rc1`` the hyphen would end the name.
    """
    path = os.path.join(root, PACKAGE, "__init__.py")
    written = _assigned(path, "__version__")
    found = _VERSION.fullmatch(written)
    if found is None:
        raise Refusal(f"{path} has the version {written!r}, which is none by PEP 440.")
    part = found.groupdict()
    release = ".".join(str(int(number)) for number in part["release"].split("."))
    text = f"{int(part['epoch'])}!{release}" if int(part["epoch"] or 0) else release
    if part["pre"]:
        pre = part["pre"].lower()
        text += f"{_PRE.get(pre, pre)}{int(part['pre_number'] or 0)}"
    if part["post"]:
        text += f".post{int(part['post_implied'] or part['post_number'] or 0)}"
    if part["dev"]:
        text += f".dev{int(part['dev_number'] or 0)}"
    if part["local"]:
        words = re.split(r"[-_.]", part["local"].lower())
        text += "+" + ".".join(str(int(word)) if word.isdigit() else word for word in words)
    return text


def _summary(root: str) -> str:
    # By a regular expression, because tomllib comes with Python 3.11.
    return _assigned(os.path.join(root, "pyproject.toml"), "description")


def _assigned(path: str, name: str) -> str:
    found = re.search(rf'^{name} = "([^"]+)"$', _read(path).decode(), re.MULTILINE)
    if found is None:
        raise Refusal(f'{path} has no line {name} = "...", so this checkout is incomplete.')
    return found.group(1)


def sources(root: str) -> list[str]:
    """Paths, relative to both the checkout and purelib, of everything that is copied."""
    found = []
    for directory, directories, names in os.walk(os.path.join(root, PACKAGE)):
        directories[:] = sorted(
            name for name in directories if name != "__pycache__" and not name.startswith(".")
        )
        place = os.path.relpath(directory, root).replace(os.sep, "/")
        found += [
            posixpath.join(place, name)
            for name in sorted(names)
            if not name.startswith(".") and not name.endswith((".pyc", ".pyo", "~"))
        ]
    if posixpath.join(PACKAGE, "__init__.py") not in found:
        raise Refusal(f"{os.path.join(root, PACKAGE)} is missing from this checkout.")
    return [*found, *ROOT_FILES]


def source(root: str, path: str) -> bytes:
    """The bytes of one of `sources`."""
    return _read(os.path.join(root, *path.split("/")))


def build(root: str, purelib: str, state: dict[str, object]) -> list[File]:
    """Every file of an installation, in the order of `rank`; ``state`` goes into `STATE`."""
    now = int(time.time())
    files = []
    for path in sources(root):
        data = source(root, path)
        files.append(File(path, data, now))
        if path.endswith(".py"):
            files.append(_compiled(path, data, now, purelib))

    release = version(root)
    place = f"{PACKAGE}-{release}.dist-info"
    metadata = _METADATA.format(name=DISTRIBUTION, version=release, summary=_summary(root))
    for name, data in (
        ("METADATA", metadata.encode()),
        ("entry_points.txt", _ENTRY_POINTS.encode()),
        ("LICENSE", _read(os.path.join(root, "LICENSE"))),
        ("INSTALLER", f"{INSTALLER}\n".encode()),
        (STATE, json.dumps(state).encode() + b"\n"),
    ):
        files.append(File(f"{place}/{name}", data, now))
    record = f"{place}/RECORD"
    files.append(File(record, _record(files, record), now))
    return sorted(files, key=lambda file: rank(file.path))


def rank(path: str) -> tuple[int, int, str]:
    """Sort key of a path: the order of writing, whose reverse is the order of removal.

    The .pth, which makes every interpreter import the loader, comes when all else is there.
    RECORD closes the dist-info directory: without it pip would not know what to remove.
    """
    top, _, below = path.partition("/")
    if top == PACKAGE:
        step = 0
    elif top == "__pycache__":
        step = 3
    elif DIST_INFO.fullmatch(top):
        step = 4
    else:
        step = {CORE: 1, LOADER: 2, START: 5, PTH: 6}[top]
    closing = ("INSTALLER", STATE, "RECORD")
    last = closing.index(below) + 1 if below in closing else 0
    return (step, last, path)


def removal_rank(path: str) -> tuple[int, int, str]:
    """Sort key of the way out: .pth first, dist-info last, and in it RECORD last.

    An interrupted removal can be finished as long as RECORD is there.
    """
    step, last, name = rank(path)
    return (10 if step == 4 else -step, last, name)


def modules(paths: Iterable[str]) -> list[str]:
    """Those of `LIBRARY` that an installation of these files has: an old one may lack some."""
    present = set(paths)
    return [
        name
        for name in LIBRARY
        if present & {f"{name.replace('.', '/')}{end}" for end in (".py", "/__init__.py")}
    ]


def directories(paths: Iterable[str]) -> set[str]:
    """Every directory on the way from purelib to one of the paths."""
    found = set()
    for path in paths:
        while "/" in path:
            path = posixpath.dirname(path)
            found.add(path)
    return found


def is_ours(path: str) -> bool:
    """Whether a path, out of a RECORD that may have been edited, can be one of our files."""
    parts = path.split("/")
    if path != posixpath.normpath(path) or ".." in parts or path.startswith("/"):
        return False
    if len(parts) == 1:
        return path in ROOT_FILES
    if parts[0] == "__pycache__":
        return len(parts) == 2 and any(
            compiled_name(source).fullmatch(parts[1]) for source in (CORE, LOADER)
        )
    return parts[0] == PACKAGE or DIST_INFO.fullmatch(parts[0]) is not None


def compiled_name(source: str) -> re.Pattern[str]:
    """Names in ``__pycache__`` that come from ``source``: any Python, any optimisation level.

    The number at the end is that of a file which an interpreter had not finished writing.
    """
    stem = re.escape(posixpath.basename(source)[: -len(".py")])
    return re.compile(rf"{stem}\.[A-Za-z0-9_-]+(\.opt-[A-Za-z0-9]+)?\.pyc(\.\d+)?")


def compiled_source(path: str) -> str:
    """The source of a file in ``__pycache__``, whichever Python made it."""
    directory, _, name = path.rpartition("/")
    return posixpath.join(posixpath.dirname(directory), f"{name.partition('.')[0]}.py")


def compiled_level(path: str) -> tuple[str, int] | None:
    """The source of a file in ``__pycache__`` and the level it was optimised at.

    Nothing where the running interpreter would not look for it.
    """
    name = posixpath.basename(path)
    tag = re.escape(str(sys.implementation.cache_tag))
    found = re.fullmatch(rf"[^.]+\.{tag}(?:\.opt-([12]))?\.pyc", name)
    if found is None:
        return None
    return compiled_source(path), int(found.group(1) or 0)


def _compiled(path: str, data: bytes, mtime: int, purelib: str) -> File:
    """The .pyc of a source, so that a read-only site-packages never compiles it again.

    Tied to the source by time and size (PEP 552), as an import would write it, so that
    editing an installed file while debugging takes effect.
    """
    final = os.path.join(purelib, *path.split("/"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            code = compile(data, final, "exec", dont_inherit=True, optimize=0)
    except SyntaxError as error:
        raise Refusal(
            f"{path} of this checkout cannot be compiled by Python "
            f"{sys.version_info[0]}.{sys.version_info[1]}: {error}."
        ) from error
    header = importlib.util.MAGIC_NUMBER + struct.pack(
        "<III", 0, mtime & 0xFFFFFFFF, len(data) & 0xFFFFFFFF
    )
    # Named here and not by cache_from_source, which would follow a pycache_prefix.
    name = f"{posixpath.basename(path)[:-3]}.{sys.implementation.cache_tag}.pyc"
    place = posixpath.join(posixpath.dirname(path), "__pycache__", name)
    return File(place, header + marshal.dumps(code), mtime)


def _record(files: list[File], record: str) -> bytes:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    for file in sorted(files, key=lambda file: file.path):
        # An interpreter may rewrite a .pyc whenever it likes, so its hash would prove nothing
        # (pip leaves it out too, and the specification allows it).
        if file.path.endswith(".pyc"):
            rows.writerow((file.path, "", ""))
        else:
            rows.writerow((file.path, digest(file.data), len(file.data)))
    rows.writerow((record, "", ""))
    return text.getvalue().encode()


def digest(data: bytes) -> str:
    """As RECORD writes it."""
    value = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=")
    return "sha256=" + value.decode()


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as stream:
            return stream.read()
    except OSError as error:
        raise Refusal(
            f"{path} cannot be read ({error.strerror}), so this checkout is incomplete."
        ) from error
