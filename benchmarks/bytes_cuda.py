"""Reading the weights of a GPU server from another process, beside the bare copies of the driver.

Needs a GPU and torch, so it is not one of the benchmarks that run everywhere:
``python -m benchmarks.bytes_cuda [--quick]``.  Exit status 0 if every target is met.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sglang_weight_hook.memory import cuda_calls
from sglang_weight_hook.reader import Document, open_slot

from . import table
from .measure import Sample, ratios, rotated
from .table import Line, Section

ROOT = Path(__file__).resolve().parents[1]
VIEW = 0.8  # of a bare copy from device to device
SAVE = 0.8  # of a bare copy from device to pinned host memory
OPEN = 2e-3  # seconds beyond the driver's own calls
PIECE = 8 << 20

# Publishes one large tensor and 32 small ones, and stays.
OWNER = """
import sys, torch
from benchmarks.models import Runner
from sglang_weight_hook.publisher import recorder
model = torch.nn.Module()
large = torch.randint(0, 256, (int(sys.argv[1]),), dtype=torch.uint8, device="cuda")
model.register_buffer("large", large)
for number in range(32):
    model.register_buffer(f"small{number}", torch.zeros(12 << 20, dtype=torch.uint8, device="cuda"))
runner = Runner(model)
runner.device = "cuda"
torch.cuda.synchronize()
for kind, named in (("load", [runner]), ("settle", ())):
    recorder.finish(recorder.begin(kind, kind, named), None, None)
print("ready", flush=True)
sys.stdin.read()
"""


def measure(quick: bool) -> Section:
    size, rounds = ((256 << 20), 5) if quick else ((2 << 30), 15)
    lines: list[Line] = []
    for name, configuration in (("cudaMalloc", ""), ("segments", "expandable_segments:True")):
        lines += _measured(name, configuration, size, rounds)
    return Section("Bytes of a GPU server", lines, HOW, LIMITS)


def _measured(name: str, configuration: str, size: int, rounds: int) -> list[Line]:
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        environment = {
            **os.environ,
            "SGLANG_WEIGHT_HOOK_DIR": folder,
            "SGLANG_WEIGHT_HOOK_SHARE": "1",
            "PYTHONPATH": str(ROOT),
        }
        if configuration:
            environment["PYTORCH_CUDA_ALLOC_CONF"] = configuration
            environment["PYTORCH_ALLOC_CONF"] = configuration
        owner = subprocess.Popen(
            [sys.executable, "-c", OWNER, str(size)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert owner.stdout is not None
            if owner.stdout.readline().strip() != "ready":
                raise RuntimeError("the owner has not published")
            document = open_slot(folder, "0").read()
            return [
                _view(name, document, size, rounds),
                _save(name, document, size, rounds),
                _copied_by_the_owner(name, document, rounds),
                _opening(name, document, rounds),
            ]
        finally:
            owner.kill()
            owner.communicate()


def _view(name: str, document: Document, size: int, rounds: int) -> Line:
    """A copy from the view of the other process's memory, and one within this process's."""
    import torch

    target = torch.empty(size, dtype=torch.uint8, device="cuda")
    own = torch.zeros_like(target)
    with document.open_memory(via="cuda") as memory:
        views = [memory.tensor("large")]
        found = _side_by_side(
            {"view": lambda: target.copy_(views[0]), "bare": lambda: target.copy_(own)}, rounds
        )
        views.clear()
    return _line(f"copy from a view ({name})", found["view"], found["bare"], size, VIEW)


def _save(name: str, document: Document, size: int, rounds: int) -> Line:
    """The whole tensor to the host, piece by piece, and torch's copies to pinned memory."""
    import torch

    own = torch.zeros(size, dtype=torch.uint8, device="cuda")
    pinned = torch.empty(PIECE, dtype=torch.uint8, pin_memory=True)

    def bare() -> None:
        for start in range(0, size, PIECE):
            pinned.copy_(own[start : start + PIECE], non_blocking=True)
            torch.cuda.synchronize()

    with document.open_memory(via="cuda") as memory:

        def pieces() -> None:
            for _ in memory.pieces("large", PIECE):
                pass

        found = _side_by_side({"pieces": pieces, "bare": bare}, rounds)
    return _line(f"to the host in pieces ({name})", found["pieces"], found["bare"], size, SAVE)


def _copied_by_the_owner(name: str, document: Document, rounds: int) -> Line:
    size = 12 << 20
    with document.open_memory(via="owner") as memory:
        found = _side_by_side({"owner": lambda: memory.read("small0")}, rounds)
    return Line(
        f"copied by the owner ({name})",
        table.timing(found["owner"]),
        "",
        f"{size / found['owner'].median / 1e9:.2f} GB/s",
    )


def _opening(name: str, document: Document, rounds: int) -> Line:
    """Opening one tensor's memory, less what the driver itself takes for it."""
    inside = 0.0
    status: Any = cuda_calls.Driver.status

    def timed(self: Any, call: str, *arguments: Any) -> int:
        nonlocal inside
        started = time.perf_counter()
        try:
            return int(status(self, call, *arguments))
        finally:
            inside += time.perf_counter() - started

    beyond: list[float] = []
    driver: list[float] = []
    cuda_calls.Driver.status = timed  # type: ignore[method-assign, assignment]
    try:
        for number in range(rounds):
            with document.open_memory(via="cuda") as memory:
                memory.read("small31")  # the context, the stream and the buffers are there
                inside, started = 0.0, time.perf_counter()
                memory.via(f"small{number % 31}")
                next(iter(memory.pieces(f"small{number % 31}", 4096)))
                driver.append(inside)
                beyond.append(time.perf_counter() - started - inside)
    finally:
        cuda_calls.Driver.status = status  # type: ignore[method-assign]
    ours = Sample(beyond)
    return Line(
        f"opening an allocation, beyond the driver ({name})",
        table.timing(ours),
        f"the driver's calls {table.timing(Sample(driver))}",
        table.seconds(ours.median),
        f"≤ {table.seconds(OPEN)}",
        ours.median <= OPEN,
    )


def _side_by_side(subjects: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Sample]:
    """Wall-clock seconds until the device is done, interleaved."""
    import torch

    values: dict[str, list[float]] = {name: [] for name in subjects}
    for subject in subjects.values():
        subject()
    torch.cuda.synchronize()
    for number in range(rounds):
        for name in rotated(subjects, number):
            started = time.perf_counter()
            subjects[name]()
            torch.cuda.synchronize()
            values[name].append(time.perf_counter() - started)
    return {name: Sample(seconds) for name, seconds in values.items()}


def _line(what: str, ours: Sample, bare: Sample, size: int, target: float) -> Line:
    share = ratios(bare, ours)
    return Line(
        what,
        f"{size / ours.median / 1e9:.1f} GB/s ±{ours.spread:.0%} n={ours.n}",
        f"bare {size / bare.median / 1e9:.1f} GB/s",
        f"{share.median:.2f} of it",
        f"≥ {target} of it",
        share.median >= target,
    )


HOW = """\
A process publishes one large tensor on the GPU, once in memory of cudaMalloc and once in torch's
expandable segments; another one reads it, between its own copies of as many bytes."""
LIMITS = """\
The link between GPU and host for what goes to the host, the GPU's memory for what stays there."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bytes_cuda")
    parser.add_argument("--quick", action="store_true", help="less memory and fewer rounds")
    section = measure(parser.parse_args().quick)
    print(table.as_text([section]))
    return 1 if any(line.met is False for line in section.lines) else 0


if __name__ == "__main__":
    sys.exit(main())
