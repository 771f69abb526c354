"""A real terminal that a test types into and reads from (tmux)."""

from __future__ import annotations

import os
import re
import subprocess
import time
from pathlib import Path


class Terminal:
    """A terminal of 160 x 24 in a tmux server of its own."""

    def __init__(self, socket: Path) -> None:
        self.base = ["tmux", "-S", str(socket), "-f", "/dev/null"]

    def __call__(self, *arguments: str) -> str:
        # Without the COLUMNS that readline has put into the environment past Python's own.
        done = subprocess.run(
            [*self.base, *arguments], env=os.environ, check=True, capture_output=True, text=True
        )
        return done.stdout

    def shown(self, *more: str) -> str:
        return self("capture-pane", "-p", *more)

    def until(self, text: str, seconds: float = 20.0) -> str:
        return self.matching(re.escape(text), seconds)

    def matching(self, pattern: str, seconds: float = 20.0) -> str:
        """All that is shown once a regular expression is found in it."""
        deadline = time.monotonic() + seconds
        while not re.search(pattern, shown := self.shown()):
            assert time.monotonic() < deadline, shown
            time.sleep(0.05)
        return shown

    def start(self, command: str, told: Path) -> None:
        """Type a command; its process id goes to the file ``told``, and its end is shown."""
        self("send-keys", f"sh -c 'echo $$ >{told}; exec {command}'; echo ended $?", "Enter")
