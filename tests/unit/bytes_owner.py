"""A process that publishes weights of every kind and says what their bytes are: for the tests that
read them from outside."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from sglang_weight_hook.reader import Document, open_slot

# Does what it is told on stdin, a word and a number a line, and answers a line.
OWNER = """
import hashlib, sys, threading
import torch
from fake_sglang import FakeRunner, event, load, settle, update
from sglang_weight_hook.publisher import background

background.DELAYS = (10_000.0,)  # it looks when it is asked, and not by itself
torch.manual_seed(7)

def bits(*shape, dtype):
    count = torch.empty(shape, dtype=dtype).element_size()
    for n in shape: count *= n
    return torch.randint(0, 256, (count,), dtype=torch.uint8).view(dtype).view(shape)

class Odd(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for kind in (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
                     torch.float8_e5m2, torch.int8, torch.uint8, torch.int32, torch.int64):
            self.register_buffer("of_" + str(kind)[6:], bits(12, 20, dtype=kind))
        self.register_buffer("flags", torch.randint(0, 2, (33,)) > 0)
        self.register_buffer("scalar", torch.tensor(3.5))
        self.register_buffer("empty", torch.empty(0, 4))
        self.register_buffer("one", bits(1, dtype=torch.bfloat16))
        wide = bits(64, 96, dtype=torch.bfloat16)
        self.padded = wide[:, :80]
        self.columns = wide.t()
        self.steps = bits(40, 30, dtype=torch.float16)[::2, ::3]
        self.expanded = bits(1, 24, dtype=torch.float32).expand(6, 24)
        self.windows = bits(64, dtype=torch.int16).unfold(0, 8, 3)
        self.permuted = bits(5, 6, 7, dtype=torch.uint8).permute(2, 0, 1)
        self.packed = bits(256, 64, dtype=torch.int32)  # int4, eight to a word
        self.fp8_columns = bits(512, 300, dtype=torch.uint8).view(torch.float8_e4m3fn).t()
        self.lm_head = torch.nn.Linear(300, 700, bias=False, dtype=torch.bfloat16)
        self.embed = torch.nn.Embedding(700, 300, dtype=torch.bfloat16)
        self.embed.weight = self.lm_head.weight  # tied

class Even(torch.nn.Module):  # each tensor holds one value all over
    def __init__(self):
        super().__init__()
        for n in range(24):
            self.register_buffer(f"part{n}", torch.zeros(3000 + n, dtype=torch.int32))

class Large(torch.nn.Module):  # one tensor of 400 MiB
    def __init__(self):
        super().__init__()
        self.register_buffer("all", torch.zeros(400 << 20, dtype=torch.uint8))

runner = FakeRunner({"odd": Odd, "even": Even, "large": Large}[sys.argv[1]]())
load(runner)
settle()
tensors = {**dict(runner.model.named_buffers()), **dict(runner.model.named_parameters()),
           **{n: t for n, t in vars(runner.model).items() if isinstance(t, torch.Tensor)}}
number = 0
def fill():
    global number
    number += 1
    for tensor in tensors.values():
        tensor.fill_(number)
spinning = None
stop = threading.Event()
pause = threading.Event()
def spin(seconds):
    while not stop.is_set():
        update(runner, during=fill)
        stop.wait(seconds)
print("ready", flush=True)
for line in sys.stdin:
    what, _, argument = line.strip().partition(" ")
    answer = "done"
    with torch.no_grad():
        if what == "digest":
            tensor = tensors[argument]
            data = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor).view(-1)
            data = data.view(torch.uint8) if data.numel() else torch.empty(0, dtype=torch.uint8)
            answer = hashlib.sha256(bytes(data.numpy().data)).hexdigest()
        elif what == "names":
            answer = " ".join(tensors)
        elif what == "fill":
            update(runner, during=fill)
        elif what == "flip":  # one bit, behind the hook's back: NAME ELEMENT BIT
            name, element, bit = argument.split()
            tensors[name].view(torch.uint8).view(-1)[int(element)] ^= 1 << int(bit)
        elif what == "spin":
            spinning = threading.Thread(target=spin, args=[float(argument)])
            spinning.start()
        elif what == "rest":
            stop.set()
            spinning.join()
            stop.clear()
            answer = str(number)
        elif what == "pause":
            def during():
                print("updating", flush=True)
                sys.stdin.readline()
            update(runner, during=during)
        elif what == "fail":
            event("update_weights_from_disk", "update", [runner], result=(False, "no such file"))
        elif what == "release":
            event("release_memory_occupation", "release", [runner],
                  result="released", details={"tags": ["weights"], "physical": True})
    print(answer, flush=True)
"""


class BytesOwner:
    """The process, and its slot as a reader sees it."""

    def __init__(self, process: subprocess.Popen[str], directory: Path) -> None:
        self.process = process
        self.slot = open_slot(str(directory), "0")
        assert self.answer() == "ready"

    def tell(self, what: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def read(self) -> Document:
        return self.slot.read()

    def digest(self, name: str) -> str:
        return self.tell(f"digest {name}")

    def names(self) -> list[str]:
        """As the process calls them, which includes aliases."""
        return self.tell("names").split()

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

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def descriptors(self) -> list[str]:
        """What its open files are."""
        found = []
        for each in Path(f"/proc/{self.process.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # it has just been closed
                found.append(os.readlink(each))
        return sorted(found)


def started(start_python: Any, directory: Path, kind: str, **environment: str) -> BytesOwner:
    settings = {
        "SGLANG_WEIGHT_HOOK_DIR": str(directory),
        "SGLANG_WEIGHT_HOOK_CHECK_SECONDS": "10000",
        "SGLANG_WEIGHT_HOOK_SHARE": "1",
        **environment,
    }
    return BytesOwner(start_python(OWNER, kind, **settings), directory)
