"""Installs and runs a real SGLang on this CPU.

python -m cpu_sglang setup [RELEASE ...]      install releases, or check them
python -m cpu_sglang serve [RELEASE] [...]    serve a tiny model until Ctrl-C
python -m cpu_sglang releases                 list the releases that can be installed
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from cpu_sglang.environment import (
    REPOSITORY,
    Environment,
    EnvironmentFailed,
    ensure_environment,
)
from cpu_sglang.releases import BASE_RELEASE, RELEASES
from cpu_sglang.server import Server, ServerFailed


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m cpu_sglang",
        description="Install and run a real SGLang on this CPU.",
    )
    commands = parser.add_subparsers(dest="command", required=True)

    setup = commands.add_parser("setup", help="install SGLang releases that are not installed yet")
    setup.add_argument(
        "releases",
        nargs="*",
        metavar="RELEASE",
        default=[BASE_RELEASE],
        help=f"SGLang releases to install (default: {BASE_RELEASE})",
    )

    serve = commands.add_parser(
        "serve",
        help="serve a tiny model until Ctrl-C",
        epilog="Arguments after -- are passed to SGLang, for instance: -- --tp 2",
    )
    serve.add_argument(
        "release",
        nargs="?",
        metavar="RELEASE",
        default=BASE_RELEASE,
        help=f"SGLang release to run (default: {BASE_RELEASE})",
    )
    serve.add_argument("--model", type=Path, help="checkpoint to serve (default: a new tiny one)")
    serve.add_argument(
        "--cwd", type=Path, default=Path.cwd(), help="the server's working directory"
    )

    commands.add_parser("releases", help="list the SGLang releases that can be installed")

    ours, theirs = _split_at_dashes(sys.argv[1:])
    options = parser.parse_args(ours)
    try:
        if options.command == "releases":
            print("\n".join(RELEASES))
        elif options.command == "setup":
            for release in options.releases:
                print(f"SGLang {release}: {ensure_environment(release).python}")
        else:
            _serve(ensure_environment(options.release), options.model, options.cwd, theirs)
    except KeyError as unknown:
        print(unknown.args[0], file=sys.stderr)
        return 2
    except (EnvironmentFailed, ServerFailed) as failure:
        print(failure, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _serve(environment: Environment, model: Path | None, cwd: Path, extra: list[str]) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    cwd.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="cpu-sglang-") as scratch:
        if model is None:
            model = Path(scratch) / "model"
            command = [str(environment.python), "-m", "cpu_sglang.tiny_model", str(model)]
            subprocess.run(command, cwd=REPOSITORY, env=environment.env(), check=True)
        server = Server(
            environment,
            model,
            cwd=cwd,
            extra_args=extra,
            log_path=Path(scratch) / "server.log",
            on_progress=_progress(),
        )
        with server:
            print(f"ready at {server.url}, process {server.pid}, log {server.log_path}")
            print("Ctrl-C stops the server")
            while server.alive:
                time.sleep(0.5)
            raise ServerFailed(f"the server exited by itself; its log:\n{server.log_tail()}")


def _progress() -> Callable[[float, str], None]:
    """Prints what the server says last, once, and every 10 s that it is still at it."""
    told, at = "", 0.0

    def tell(seconds: float, line: str) -> None:
        nonlocal told, at
        if line != told or seconds - at >= 10:
            told, at = line, seconds
            print(f"{seconds:3.0f} s  {line[:90]}", flush=True)

    return tell


def _split_at_dashes(arguments: list[str]) -> tuple[list[str], list[str]]:
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


if __name__ == "__main__":
    sys.exit(main())
