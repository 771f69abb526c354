"""Ends a server whose starter was killed too abruptly to do it.

Started beside the server, in a session of its own, and told the server's process
group on stdin.  Its stdin closes when the starter ends, however it ends.  A starter
that stopped the server itself says so first.
"""

from __future__ import annotations

import os
import signal
import sys
import time

STOPPED = "stopped"
GRACE_SECONDS = 5.0


def main() -> None:
    # Ctrl-C in a terminal is for the starter; this process outlives it on purpose.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    group = sys.stdin.readline().strip()
    if not group.isdigit() or sys.stdin.readline().strip() == STOPPED:
        return
    for signal_number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(int(group), signal_number)
        except ProcessLookupError:
            return
        time.sleep(GRACE_SECONDS)


if __name__ == "__main__":
    main()
