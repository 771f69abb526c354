"""Runs the installer of a checkout and stops it at its Nth change to the file system.

    python -I -B kill_at.py CHECKOUT kill|enospc N install|uninstall [options]

The change itself is not made.  "kill" is SIGKILL; "enospc" raises, once, what a full disk
raises.  N = 0 lets everything through.
Liveness is taken for granted: the question here is what lies on the disk.  The installer ships
no seam for this; the functions of `os` are replaced.
"""

import errno
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

CHANGES = ("mkdir", "open", "chmod", "replace", "rmdir", "symlink", "unlink")


def main() -> int:
    checkout, fault, number, *arguments = sys.argv[1:]
    sys.path.insert(0, checkout)
    from installer import command, liveness

    left = int(number)

    def watched(name: str) -> Callable[..., Any]:
        original = getattr(os, name)

        def change(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            if name != "open" or args[1] & os.O_CREAT:
                left -= 1
                if left == 0:
                    if fault == "kill":
                        os.kill(os.getpid(), signal.SIGKILL)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), args[0])
            return original(*args, **kwargs)

        return change

    for name in CHANGES:
        setattr(os, name, watched(name))
    os.fsync = lambda descriptor: None  # no power is cut here, and the disk may be busy
    liveness.examine = lambda purelib, modules, editable=False: liveness.Liveness("", "", "")
    liveness.still_live = lambda: ""
    return command.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
