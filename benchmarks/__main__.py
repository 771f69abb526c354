"""Run the benchmarks, print one table, write docs/benchmarks.md."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from pathlib import Path

from . import baselines, table

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "benchmarks.md"
MODULES = (
    "imports",
    "capturing",
    "streaming",
    "checking",
    "reading",
    "header",
    "bytes",
    "scrubbing",
    "transfer",
    "subscribing",
    "residence",
    "fleet",
    "agent",
    "fleet_commands",
    "many_machines",
    "serving",
)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure what the hook costs. Exit status: 0 if every target is met, 1 if not.",
    )
    parser.add_argument(
        "--quick", action="store_true", help="run fewer rounds and write no document"
    )
    parser.add_argument(
        "--only", nargs="+", choices=MODULES, help="run only these and write no document"
    )
    parser.add_argument(
        "--prototype",
        default=os.environ.get(baselines.VARIABLE),
        help="directory of this project's prototype, to compare with "
        f"(default: ${baselines.VARIABLE})",
    )
    parser.add_argument("--output", type=Path, help=f"file to write (default: {DOCUMENT.name})")
    options = parser.parse_args()
    if options.prototype:
        os.environ[baselines.VARIABLE] = os.path.abspath(options.prototype)
        baselines.prototype_directory()  # says at once if it is not there
    sections = []
    for name in options.only or MODULES:
        started = time.monotonic()
        sections.append(importlib.import_module(f".{name}", __package__).measure(options.quick))
        print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    print(table.as_text(sections))
    output = options.output
    if output is None and not options.quick and not options.only:
        output = DOCUMENT
    if output is not None:
        command = "python -m benchmarks" + (" --quick" if options.quick else "")
        output.write_text(table.as_document(sections, command), encoding="utf-8")
    return 1 if any(line.met is False for section in sections for line in section.lines) else 0


if __name__ == "__main__":
    sys.exit(main())
