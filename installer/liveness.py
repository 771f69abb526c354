"""Whether the hook is live, checked in newly started processes."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from dataclasses import dataclass

from . import contents

OFF_SWITCH = "SGLANG_WEIGHT_HOOK"

#: A real SGLang environment may import much in its other .pth files.
TIMEOUT = 120

_MARK = "sglang-weight-hook-liveness"

# Runs in the fresh interpreter and again in its child.  The verdict comes on a line of its own
# behind a mark, because other .pth files may print whatever they like.
_LOOK = """
import os, sys
finders = [f for f in sys.meta_path if type(f).__module__ == "sglang_patch_loader"]
module = sys.modules.get("sglang_patch_loader")
if module is None:
    verdict = "its .pth file was not processed, or failed"
elif not os.path.samefile(module.__file__, {loader}):
    verdict = "another copy is loaded instead, from " + module.__file__
elif not finders:
    verdict = "its loader was imported, but no finder is on sys.meta_path"
else:
    verdict = ""
sys.stdout.write("\\n" + " ".join(({mark}, {who}, ascii(verdict))) + "\\n")
sys.stdout.flush()
"""

# The child gets its work as text for exec(), because a function of `python -c` cannot be
# pickled by name.
_SPAWN = """
import multiprocessing
child = multiprocessing.get_context("spawn").Process(target=exec, args=({look},))
child.start()
child.join()
"""


@dataclass(frozen=True)
class Liveness:
    """For the fresh interpreter and the spawned child: what is wrong, or nothing."""

    fresh: str
    child: str

    @property
    def good(self) -> bool:
        return not self.fresh and not self.child

    @property
    def reason(self) -> str:
        if self.fresh:
            return f"in a fresh interpreter {self.fresh}"
        return f"in a spawned child {self.child}"


def examine(purelib: str) -> Liveness:
    """Start this interpreter anew, and a ``multiprocessing`` child from there, and look.

    Isolated, so that neither PYTHONPATH nor the working directory can stand in for what is
    installed; ``-B``, so that looking writes nothing.
    """
    loader = ascii(os.path.join(purelib, contents.LOADER))
    fresh, child = (
        _LOOK.format(loader=loader, mark=ascii(_MARK), who=ascii(who)) for who in ("fresh", "child")
    )
    environment = {key: value for key, value in os.environ.items() if key != OFF_SWITCH}
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-B", "-c", fresh + _SPAWN.format(look=ascii(child))],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=environment,
            timeout=TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Liveness(*(f"nothing answered within {TIMEOUT} s",) * 2)
    except OSError as error:
        return Liveness(*(f"nothing could be started: {error}",) * 2)

    verdicts = {}
    for line in done.stdout.decode(errors="replace").splitlines():
        mark, _, answer = line.partition(" ")
        if mark == _MARK:
            who, _, verdict = answer.partition(" ")
            verdicts[who] = str(ast.literal_eval(verdict))
    complaint = done.stderr.decode(errors="replace").strip().splitlines()
    silence = "nothing answered" + (f": {complaint[-1]}" if complaint else "")
    return Liveness(verdicts.get("fresh", silence), verdicts.get("child", silence))
