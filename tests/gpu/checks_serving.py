"""What the hook costs requests and updates of servers that run side by side."""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from tests.gpu.gpu_server import GpuServer, hooked_venv, thin_venv
from tests.gpu.map_checks import Report

OFTEN = "with, every 0.1 s"
VARIABLES = {OFTEN: {"SGLANG_WEIGHT_HOOK_CHECK_SECONDS": "0.1"}}


def serving(report: Report, python: Path, a: Path, b: Path, folder: Path) -> None:
    """Requests and updates of servers that run side by side, interleaved.

    Two without anything, two with the hook (one of them compares its map with memory ten times a
    second instead of every ten seconds), and, where ``SEED_PROTOTYPE`` names its folder, one
    with the prototype.  Each figure is compared with the first bare server's of the same turn;
    the second bare one shows how far two equal servers differ.
    """
    folder.mkdir(parents=True)
    with ExitStack() as running:
        servers = _start_all(_interpreters(python, folder), a, folder, running)
        figures = _time_requests(servers)
        figures["update from disk"] = _time_updates(servers, (b, a))
        for what, times in figures.items():
            compare(report, what, times)
        with report.check("serving: device memory of each server") as seen:
            for name, server in servers.items():
                seen[name] = f"{server.device_mib()} MiB"


def _interpreters(python: Path, folder: Path) -> dict[str, Path]:
    """An interpreter for each server, by what it is with."""
    bare = thin_venv(python, folder / "bare")
    # Without the probes: their threads wake twenty times a second.
    hooked = hooked_venv(bare, folder / "hooked", probes=())
    interpreters = {
        "without": bare, "with": hooked, "without, again": bare, OFTEN: hooked
    }  # fmt: skip
    if prototype := os.environ.get("SEED_PROTOTYPE"):
        # It imports torch when the interpreter starts: what makes torch importable goes first.
        interpreters["prototype"] = thin_venv(python, folder / "prototype", "aa")
        purelib = next((folder / "prototype").glob("lib/python*/site-packages"))
        for name in (
            "sglang_injector.pth",
            "sglang_patch_loader.py",
            "sglang_weight_hook_patch_core.py",
        ):
            shutil.copy(Path(prototype, name), purelib)
    return interpreters


def _start_all(
    interpreters: Mapping[str, Path], model: Path, folder: Path, running: ExitStack
) -> dict[str, GpuServer]:
    """A server of each interpreter, started at once; stopped with ``running``."""
    # A small cache under a large fraction: each start sees the others take memory.
    small = ["--max-total-tokens", "8192"]
    servers: dict[str, GpuServer] = {}
    with ThreadPoolExecutor(len(interpreters)) as starting:
        started = {
            name: starting.submit(
                GpuServer(
                    each, model, folder / name, small, VARIABLES.get(name), fraction=0.6
                ).start
            )
            for name, each in interpreters.items()
        }  # fmt: skip
        for name, future in started.items():
            try:
                servers[name] = future.result()
                running.callback(servers[name].stop)
            except Exception as error:
                if name != "prototype":
                    raise
                print(f"the prototype's server did not start: {str(error)[-1500:]}", flush=True)
    return servers


def _time_requests(servers: Mapping[str, GpuServer]) -> dict[str, dict[str, list[float]]]:
    """Seconds of each request, by what is asked and by server."""
    figures: dict[str, dict[str, list[float]]] = {
        "32 tokens": {}, "first token": {}, "16 requests at once": {}
    }  # fmt: skip
    for server in servers.values():
        for _ in range(4):
            server.generate(max_new_tokens=32)
            server.generate(max_new_tokens=1)
    for what, tokens in (("32 tokens", 32), ("first token", 1)):
        interleave(figures[what], servers, 60, lambda server, _: server.generate(
            max_new_tokens=tokens  # noqa: B023
        ))  # fmt: skip
    with ThreadPoolExecutor(16) as clients:

        def burst(server: GpuServer, _: int) -> None:
            list(clients.map(lambda _: server.generate(max_new_tokens=32), range(16)))

        for server in servers.values():
            burst(server, 0)
        interleave(figures["16 requests at once"], servers, 120, burst)
    return figures


def _time_updates(
    servers: Mapping[str, GpuServer], models: Sequence[Path]
) -> dict[str, list[float]]:
    """Seconds of each update from disk, by server."""
    times: dict[str, list[float]] = {}

    def update(server: GpuServer, turn: int) -> None:
        model = models[turn % 2]
        status, answer = server.post("/update_weights_from_disk", {"model_path": str(model)})
        assert status == 200, answer

    ours = {name: server for name, server in servers.items() if name != "prototype"}
    for server in ours.values():
        server.wait_idle()
    interleave(times, ours, 60, update)
    if "prototype" in servers:
        try:
            servers["prototype"].wait_idle()
            only = {"prototype": servers["prototype"]}
            interleave(times, only, 60, update)
        except (OSError, AssertionError, RuntimeError) as error:
            times.pop("prototype", None)
            print(f"the prototype's update: {error}", flush=True)
            print(servers["prototype"].log_tail(40), flush=True)
    return times


def compare(report: Report, what: str, times: Mapping[str, list[float]]) -> None:
    """Each figure against the first bare server's of the same turn."""
    with report.check(f"serving: {what}") as seen:
        first = times["without"]
        seen["without"] = f"{statistics.median(first) * 1e3:.2f} ms"
        if what == "16 requests at once":
            seen["requests per second"] = {
                name: round(16 / statistics.median(mine), 1) for name, mine in times.items()
            }
        for name in [name for name in times if name != "without"]:
            ratios = [mine / its for mine, its in zip(times[name], first)]
            low, middle, high = statistics.quantiles(ratios)
            seen[name] = (
                f"{statistics.median(times[name]) * 1e3:.2f} ms, ratio {middle:.3f}"
                f" (quartiles {low:.3f} to {high:.3f}, n {len(ratios)})"
            )


def interleave(
    times: dict[str, list[float]],
    servers: Mapping[str, GpuServer],
    turns: int,
    act: Callable[[GpuServer, int], object],
) -> None:
    """``act`` on each server, one at a time, the first one changing from turn to turn."""
    for turn in range(turns):
        names = list(servers)
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            started = time.perf_counter()
            act(servers[name], turn)
            times.setdefault(name, []).append(time.perf_counter() - started)
