"""Runs the installer of a checkout and says what a power cut could have lost.

    python -I -B flush_order.py CHECKOUT install|uninstall

Kept, as a disk may keep them, are the bytes of a file since its fsync and the names in a directory
since the directory's.  The start-up line is what makes a loss felt, by every interpreter: it must
not be kept longer, or sooner, than what it imports.
"""

import os
import sys
from typing import Any

START_LINES = ("sglang_injector.pth", "sglang_injector.start")
LOADER = "sglang_patch_loader.py"


def main() -> int:
    checkout, *arguments = sys.argv[1:]
    sys.path.insert(0, checkout)
    from installer import command, liveness

    flushed: set[str] = set()
    #: Changes of names that a power cut may still undo.
    pending: dict[str, set[str]] = {}
    wrong: list[str] = []
    real = {name: getattr(os, name) for name in ("fsync", "replace", "unlink", "mkdir")}

    def fsync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        flushed.add(path)
        pending.pop(path, None)
        real["fsync"](descriptor)

    def replace(source: str, destination: str) -> None:
        directory, name = os.path.split(destination)
        if source not in flushed:
            wrong.append(f"{destination} is named before it is flushed")
        if name == START_LINES[0]:
            for place, names in pending.items():
                rest = names - {START_LINES[1]}
                if rest:
                    wrong.append(f"{name} is named before {place} keeps {sorted(rest)}")
        pending.setdefault(directory, set()).add(name)
        real["replace"](source, destination)

    def unlink(path: str, **options: Any) -> None:
        directory, name = os.path.split(path)
        if name == LOADER and pending.get(directory, set()) & set(START_LINES):
            wrong.append(f"{name} is removed before the removal of {START_LINES} is kept")
        if not name.endswith(".tmp") and not name.endswith(".lock"):
            pending.setdefault(directory, set()).add(name)
        real["unlink"](path, **options)

    def mkdir(path: str, *rest: Any) -> None:
        directory, name = os.path.split(path)
        pending.setdefault(directory, set()).add(name)
        real["mkdir"](path, *rest)

    os.fsync, os.replace, os.unlink, os.mkdir = fsync, replace, unlink, mkdir  # type: ignore
    liveness.examine = lambda *_: liveness.Liveness("", "", "")  # type: ignore
    liveness.still_live = lambda: ""  # type: ignore
    status = command.main(arguments)
    # In the end the names at the top are kept as they are.
    for place, names in pending.items():
        if os.path.basename(place) == "site-packages":
            wrong.append(f"at the end {place} may yet lose {sorted(names)}")
    sys.stderr.writelines(line + "\n" for line in wrong)
    return status


if __name__ == "__main__":
    sys.exit(main())
