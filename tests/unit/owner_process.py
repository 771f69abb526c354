"""A process that publishes a map and changes it as it is told: for the tests that ask the owner."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

from sglang_weight_hook.reader import open_slot

# Does what it is told on stdin, and says when it is done.
OWNER = """
import sys, threading
import torch
from fake_sglang import FakeRunner, load, settle, update
from sglang_weight_hook.publisher import background

background.DELAYS = (10_000.0,)  # it looks when it is asked, and not by itself
runner = FakeRunner(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 32)))
load(runner)
settle()
kept = []
def pause():
    print("updating", flush=True)
    sys.stdin.readline()
waiting = None
print("ready", flush=True)
for line in sys.stdin:
    what = line.strip()
    if what == "move":  # behind the hook's back
        kept.append(runner.model[0].weight.data)
        runner.model[0].weight.data = torch.zeros(64, 64)
    elif what == "update":
        update(runner)
    elif what == "pause":
        update(runner, during=pause)
    elif what == "begin":  # an update that waits for the lock, in a thread of its own
        waiting = threading.Thread(target=update, args=[runner])
        waiting.start()
    elif what == "join":
        waiting.join()
    print("done", flush=True)
"""


class Owner:
    def __init__(self, process: subprocess.Popen[str], directory: Path) -> None:
        self.process = process
        self.slot = open_slot(str(directory), "0")
        assert self.answer() == "ready"

    def stop(self) -> None:
        """SIGSTOP, until every thread has stopped."""
        os.kill(self.process.pid, signal.SIGSTOP)
        for _ in range(1000):
            threads = Path(f"/proc/{self.process.pid}/task").iterdir()
            if all("State:\tT" in (thread / "status").read_text() for thread in threads):
                return
            time.sleep(0.01)
        raise AssertionError("it does not stop")

    def go_on(self) -> None:
        os.kill(self.process.pid, signal.SIGCONT)

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def tell(self, what: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self.answer()
