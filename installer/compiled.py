"""Whether compiled files are what their sources compile to.

Python takes a ``.pyc`` that bears the time and size of its source without another look.  Cut
short or altered behind its header, it fails the import, or runs something else, beside a source
that is whole.  ``RECORD`` has no hash of it, because an interpreter may rewrite it.

They are read in a process of their own: what is loaded there may be anything, and broken enough
to end the interpreter that loads it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable

from . import contents
from .disk import LARGEST, Disk

GOOD = "good"
#: Belongs to another state of the source; Python passes over it and compiles anew.
STALE = "stale"
#: Taken by Python, or meant to be, and not what the source compiles to.
DAMAGED = "damaged"
#: Made by another Python, which alone could tell.
UNKNOWN = "unknown"

_READ = """
import importlib.util, json, marshal, os, stat, struct, sys, types, warnings
warnings.simplefilter("ignore")

def read(path):
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
    with open(os.open(path, flags), "rb") as stream:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST:
            raise ValueError(path)
        return stream.read(), status

def same(one, two):
    if type(one) is not type(two):
        return False
    if isinstance(one, tuple):
        return len(one) == len(two) and all(map(same, one, two))
    if isinstance(one, frozenset):
        return set(map(repr, one)) == set(map(repr, two))
    if not isinstance(one, types.CodeType):
        return repr(one) == repr(two)
    for name in dir(one):
        # Where it was compiled is no matter: an environment can be copied.
        if name.startswith("co_") and name != "co_filename":
            mine = getattr(one, name)
            if not callable(mine) and not same(mine, getattr(two, name)):
                return False
    return True

def verdict(compiled, source, level):
    data, _ = read(compiled)
    text, status = read(source)
    if len(data) < 16 or data[:4] != importlib.util.MAGIC_NUMBER:
        return DAMAGED
    (flags,) = struct.unpack("<I", data[4:8])
    if flags == 0:
        if struct.unpack("<II", data[8:16]) != (
            int(status.st_mtime) & 0xFFFFFFFF, len(text) & 0xFFFFFFFF
        ):
            return STALE
    elif flags == 3:
        if data[8:16] != importlib.util.source_hash(text):
            return STALE
    elif flags != 1:
        return DAMAGED
    code = compile(text, source, "exec", dont_inherit=True, optimize=level)
    return GOOD if same(marshal.loads(data[16:]), code) else DAMAGED

for work in json.load(sys.stdin):
    try:
        answer = verdict(*work)
    except Exception:
        answer = DAMAGED
    print(answer, flush=True)
"""


def verdicts(disk: Disk, paths: Iterable[str]) -> dict[str, str]:
    """What is to be said of each of these compiled files, which need not be there."""
    answers: dict[str, str] = {}
    work: list[tuple[str, str, int]] = []
    for path in sorted(paths):
        told = contents.compiled_level(path)
        if told is None:
            answers[path] = UNKNOWN
        elif not disk.exists(told[0]):
            answers[path] = STALE
        else:
            work.append((path, *told))
    while work:
        told_of = _ask(disk, work)
        for (path, _, _), answer in zip(work, told_of):
            answers[path] = answer
        work = work[len(told_of) :]
        if work:
            # The next one ended the process that looked at it.
            answers[work.pop(0)[0]] = DAMAGED
    return answers


def _ask(disk: Disk, work: list[tuple[str, str, int]]) -> list[str]:
    places = [(disk.absolute(path), disk.absolute(source), level) for path, source, level in work]
    known = f"GOOD, STALE, DAMAGED, LARGEST = {(GOOD, STALE, DAMAGED, LARGEST)!r}\n"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-B", "-c", known + _READ],
        input=json.dumps(places).encode(),
        capture_output=True,
        check=False,
    )
    return [line for line in done.stdout.decode().splitlines() if line in (GOOD, STALE, DAMAGED)]
