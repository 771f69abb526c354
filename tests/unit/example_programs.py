"""A process that publishes and updates as it is told, for the examples to read from."""

from __future__ import annotations

import subprocess
from pathlib import Path

from sglang_weight_hook.reader import open_slot

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


# Does what it is told on stdin, and says when it is done.
PUBLISHER = """
import sys
import torch
from fake_sglang import FakeRunner, event, load, settle, stream, update

runner = FakeRunner(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 32)))
load(runner)
settle()
pages = {"tags": None, "physical": True}
kept = []
def move():
    kept.append(runner.model[0].weight.data)  # so that its address is not given out again
    runner.model[0].weight.data = torch.zeros(64, 64)
def pause():
    print("updating", flush=True)
    sys.stdin.readline()
print("ready", flush=True)
for line in sys.stdin:
    what = line.strip()
    if what == "update":
        update(runner)
    elif what == "move":
        update(runner, during=move)
    elif what == "pause":
        update(runner, during=pause)
    elif what in ("release", "resume"):
        event(what + "_memory_occupation", what, [runner], details=pages)
    print("done", flush=True)
"""


class Publisher:
    def __init__(self, process: subprocess.Popen[str], maps: Path) -> None:
        self.process = process
        self.maps = maps
        self.slot = open_slot(str(maps), "0")
        assert self.answer() == "ready"

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def tell(self, what: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self.answer()
