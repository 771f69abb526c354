"""Whether the hook is live, checked in newly started processes.

Alone, as installed: isolated, so that neither PYTHONPATH nor the working directory nor the user
site can stand in for it.  And as this user's programs start, without ``-I``: there another copy
in the user site comes first, whatever is in purelib.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from . import contents

OFF_SWITCH = "SGLANG_WEIGHT_HOOK"

#: Where the user site is; the other PYTHON* variables are one shell's, not the user's.
USER_SITE = ("PYTHONUSERBASE", "PYTHONNOUSERSITE")

#: A real SGLang environment may import much in its other .pth files.
TIMEOUT = 120

_MARK = "sglang-weight-hook-liveness"

# Runs in the fresh interpreter and again in its child.  The verdict comes on a line of its own
# behind a mark, because other .pth files may print whatever they like.
_LOOK = """
import sys
sys.path[:] = [place for place in sys.path if place]
import os
def verdict():
    finders = [f for f in sys.meta_path if type(f).__module__ == "sglang_patch_loader"]
    module = sys.modules.get("sglang_patch_loader")
    if module is None:
        return "its .pth file was not processed, or failed"
    if not os.path.exists(module.__file__) or not os.path.samefile(module.__file__, {loader}):
        return "another copy is loaded instead, from " + module.__file__
    if not finders:
        return "its loader was imported, but no finder is on sys.meta_path"
    for name in {modules}:
        try:
            __import__(name)
        except BaseException as error:
            return "%s cannot be imported: %r" % (name, error)
        place = os.path.realpath(sys.modules[name].__file__)
        if {library} and not place.startswith(os.path.join(os.path.realpath({library}), "")):
            return "another copy of %s is loaded instead, from %s" % (name, place)
    return ""
said = ascii(verdict())
sys.stdout.write("\\n" + " ".join(({mark}, {who}, said)) + "\\n")
sys.stdout.flush()
"""

# The child gets its work as text for exec(), because a function of `python -c` cannot be
# pickled by name.  Without a module of its own to be named after it needs one dictionary for
# names and functions alike.
_SPAWN = """
import multiprocessing
child = multiprocessing.get_context("spawn").Process(target=exec, args=({look}, {{}}))
child.start()
child.join()
"""

# Where the hook is loaded from, for those who have removed it.
_WHERE = """
import sys
module = sys.modules.get("sglang_patch_loader")
active = any(type(f).__module__ == "sglang_patch_loader" for f in sys.meta_path)
said = ascii(module.__file__ if module and active else "")
sys.stdout.write("\\n" + " ".join(({mark}, "where", said)) + "\\n")
"""


@dataclass(frozen=True)
class Liveness:
    """What is wrong, or nothing: in a fresh interpreter that sees only what is installed, in a
    spawned child of it, and in one that starts as this user's programs do."""

    fresh: str
    child: str
    usual: str

    @property
    def good(self) -> bool:
        return not (self.fresh or self.child or self.usual)

    @property
    def shadowed(self) -> bool:
        """Installed and working, but not what this user's programs get."""
        return bool(self.usual) and not (self.fresh or self.child)

    @property
    def reason(self) -> str:
        if self.fresh:
            return f"in a fresh interpreter {self.fresh}"
        if self.child:
            return f"in a spawned child {self.child}"
        return f"in an interpreter as this user starts it (without -I) {self.usual}"


def examine(purelib: str, modules: Sequence[str], editable: bool = False) -> Liveness:
    """Start this interpreter anew, and a ``multiprocessing`` child from there, and look.

    The core and ``modules`` have to be importable, from purelib unless the installation is
    ``editable``.  ``-B``, so that looking writes nothing.
    """
    parts = {
        "loader": ascii(os.path.join(purelib, contents.LOADER)),
        "modules": ascii([contents.CORE[: -len(".py")], *modules]),
        "library": ascii("" if editable else purelib),
        "mark": ascii(_MARK),
    }
    looks = {who: _LOOK.format(who=ascii(who), **parts) for who in ("fresh", "child", "usual")}
    alone = _run(["-I"], looks["fresh"] + _SPAWN.format(look=ascii(looks["child"])), _environment())
    usual = _run([], looks["usual"], _environment(usual=True))
    return Liveness(
        alone.get("fresh", alone[""]),
        alone.get("child", alone[""]),
        usual.get("usual", usual[""]),
    )


def still_live() -> str:
    """The loader that this user's programs still start with, after a removal; or nothing."""
    return _run([], _WHERE.format(mark=ascii(_MARK)), _environment(usual=True)).get("where", "")


def _environment(usual: bool = False) -> dict[str, str]:
    return {
        key: value
        for key, value in os.environ.items()
        if key != OFF_SWITCH and not (usual and key.startswith("PYTHON") and key not in USER_SITE)
    }


def _run(flags: list[str], lines: str, environment: dict[str, str]) -> dict[str, str]:
    """The verdicts by who gave them; under ``""`` what to say of one who gave none."""
    try:
        done = subprocess.run(
            [sys.executable, *flags, "-B", "-c", lines],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            # -c puts the working directory on sys.path until the look takes it away.
            cwd="/",
            env=environment,
            timeout=TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"": f"nothing answered within {TIMEOUT} s"}
    except OSError as error:
        return {"": f"nothing could be started: {error}"}

    complaint = done.stderr.decode(errors="replace").strip().splitlines()
    verdicts = {"": "nothing answered" + (f": {complaint[-1]}" if complaint else "")}
    for line in done.stdout.decode(errors="replace").splitlines():
        mark, _, answer = line.partition(" ")
        if mark == _MARK:
            who, _, verdict = answer.partition(" ")
            verdicts[who] = str(ast.literal_eval(verdict))
    return verdicts
