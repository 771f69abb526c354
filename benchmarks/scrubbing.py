"""What `scrub` takes: its own share of a core, and what the server's requests notice of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from cpu_sglang.environment import ensure_environment
from cpu_sglang.server import Server
from sglang_weight_hook.layout.location import DEFAULT_DIRECTORY
from tests.real_sglang.hooked import make_checkpoint, make_venv

from . import table
from .measure import Sample, ratios
from .serving import AT_ONCE, TOKENS, _cpu_seconds
from .table import Line, Section

SHARE = 0.01  # of a core
ROOT = Path(__file__).resolve().parents[1]

# Publishes a model of some MiB, and stays.
OWNER = """
import sys, torch
from benchmarks.models import Runner, a_module
from sglang_weight_hook.publisher import recorder
model = a_module(**{f"part{n}": torch.nn.Linear(1024, 1024) for n in range(int(sys.argv[1]) // 4)})
runner = Runner(model)
for kind, named in (("load", [runner]), ("settle", ())):
    recorder.finish(recorder.begin(kind, kind, named), None, None)
print("ready", flush=True)
sys.stdin.read()
"""


def measure(quick: bool) -> Section:
    lines = [_share(64 if quick else 256, 10 if quick else 30)]
    lines += _requests(6 if quick else 40)
    return Section("Scrubbing", lines, HOW, LIMITS)


def _share(mebibytes: int, seconds: float) -> Line:
    """CPU of the command at its default rate, beside a process that does nothing."""
    with ExitStack() as stack:
        place = stack.enter_context(tempfile.TemporaryDirectory(prefix="scrubbing-"))
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "SGLANG_WEIGHT_HOOK_DIR": place,
            "SGLANG_WEIGHT_HOOK_CHECK_SECONDS": "0",
        }
        owner = stack.enter_context(
            _process([sys.executable, "-c", OWNER, str(mebibytes)], environment)
        )
        assert owner.stdout is not None
        assert owner.stdout.readline() == "ready\n"
        scrubber = stack.enter_context(_scrubber(place, environment))
        _wait_for(scrubber, "baseline")
        began, used = time.monotonic(), _cpu_of(scrubber.pid)
        time.sleep(seconds)
        share = (_cpu_of(scrubber.pid) - used) / (time.monotonic() - began)
        scrubber.terminate()
        owner.terminate()
    return Line(
        f"`scrub` at its default rate, {mebibytes} MiB",
        f"{share:.2%} of a core",
        "",
        f"{share:.2%}",
        f"≤ {SHARE:.0%}",
        share <= SHARE,
    )


def _requests(rounds: int) -> list[Line]:
    """Bursts of requests with a scrubber that runs and with one that is stopped, interleaved."""
    environment = ensure_environment()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="scrubbing-")))
        python = make_venv(folder / "hooked", environment)
        server = stack.enter_context(
            Server(
                environment,
                make_checkpoint(environment, folder / "model", 1),
                cwd=folder,
                log_path=folder / "log",
                command=[str(python), "-m", "sglang.launch_server"],
            )
        )
        clients = stack.enter_context(ThreadPoolExecutor(AT_ONCE))
        scrubber = stack.enter_context(
            _scrubber(
                str(folder / DEFAULT_DIRECTORY),
                {**os.environ, "PYTHONPATH": str(ROOT)},
                "--every",
                "0",
            )
        )
        _wait_for(scrubber, "baseline")
        wall: dict[bool, list[float]] = {False: [], True: []}
        cpu: dict[bool, list[float]] = {False: [], True: []}
        for turn in range(-2, rounds):
            for scrubbing in (turn % 2 == 0, turn % 2 == 1):
                scrubber.send_signal(signal.SIGCONT if scrubbing else signal.SIGSTOP)
                began, used = time.perf_counter(), _cpu_seconds(server)
                list(clients.map(lambda _: server.generate(max_new_tokens=TOKENS), range(AT_ONCE)))
                if turn >= 0:
                    wall[scrubbing].append(time.perf_counter() - began)
                    cpu[scrubbing].append(_cpu_seconds(server) - used)
        scrubber.send_signal(signal.SIGCONT)
        scrubber.terminate()
    lines = []
    for clock, values in (("CPU of the server", cpu), ("wall", wall)):
        with_it, without = Sample(values[True]), Sample(values[False])
        lines.append(
            Line(
                f"{AT_ONCE} requests of {TOKENS} tokens at once, scrubbed: {clock}",
                table.timing(with_it),
                f"not scrubbed: {table.timing(without)}",
                table.times(ratios(with_it, without), 3),
            )
        )
    return lines


def _scrubber(place: str, environment: dict[str, str], *more: str) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-m", "sglang_weight_hook", "scrub", "--json", "--dir", place]
    return _process([*arguments, *more], environment)


def _process(arguments: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        arguments, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def _wait_for(scrubber: subprocess.Popen[str], kind: str) -> None:
    assert scrubber.stdout is not None
    for line in scrubber.stdout:
        if json.loads(line)["event"] == kind:
            return
    raise AssertionError(f"the scrubber ended with {scrubber.wait()}")


def _cpu_of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


HOW = """\
The command as one starts it. Its share is what it used of a core between two readings of
/proc/PID/stat after the baseline was taken. The requests go to one server of SGLang on this CPU
with a tiny model; the scrubber is stopped (SIGSTOP) for every other burst, in changing order."""
LIMITS = """\
The sums take a core 0.7 ns a byte, reading another process 0.2 ns; the rest is Python's, some
0.2 ms a MiB. The rate is bounded, so the share is the same for every model and a larger one takes
longer to go round: 140 GB take eight hours at the default rate."""
