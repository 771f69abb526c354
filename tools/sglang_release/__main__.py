"""Compare a release of SGLang with the table of the methods that are wrapped.

    python -m tools.sglang_release check VERSION     a release on the package index, or "newest"
    python -m tools.sglang_release check WHEEL       a wheel
    python -m tools.sglang_release check CHECKOUT    SGLang's repository, or an unpacked wheel
    python -m tools.sglang_release history           how the rules did on all releases
    python -m tools.sglang_release record            note down the signatures of all releases

Nothing of SGLang is imported or installed; wheels are kept in .cache/sglang-wheels.

Exit status: 0 nothing to act on; 1 no answer, stderr says why; 2 wrong usage; 3 something to act
on (`history`: a row of the table that the rules would have missed).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence

from . import history, report, signatures
from .check import check
from .sources import NoRelease, cached, open_release, released
from .summaries import Summary, summary_of

NOTHING, NO_ANSWER, ACT = 0, 1, 3


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except (NoRelease, OSError) as error:
        print(f"no answer: {error}", file=sys.stderr)
        return NO_ANSWER
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.sglang_release",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    one = commands.add_parser("check", help="one release against the table")
    one.add_argument("release", help="a version, 'newest', a wheel, or a folder with sglang in it")
    one.set_defaults(run=_check)
    every = commands.add_parser(
        "history", help="what the rules would have found, release by release"
    )
    every.add_argument("--findings", action="store_true", help="name also what led to no row")
    every.set_defaults(run=_history)
    for command in (one, every):
        command.add_argument("--json", action="store_true", help="for programs")
    record = commands.add_parser("record", help="write signatures.json from all releases")
    record.set_defaults(run=_record)
    for command in (every, record):
        command.add_argument(
            "--cached", action="store_true", help="only the wheels that are here already"
        )
    return parser


def _check(options: argparse.Namespace) -> int:
    named = released()[-1] if options.release == "newest" else options.release
    found = check(summary_of(open_release(named)))
    if options.json:
        print(json.dumps(report.document(found), indent=2))
    else:
        _print(report.text(found))
    return ACT if found.to_act_on else NOTHING


def _history(options: argparse.Namespace) -> int:
    versions = _versions(options)
    steps = list(history.steps(_summaries(versions)))
    ranges = history.ranges(steps)
    if options.json:
        print(json.dumps(report.history_document(steps, ranges), indent=2))
    else:
        _print(report.history_text(steps, ranges, options.findings))
    missed = any(row.result == history.MISSED for step in steps for row in step.rows)
    return ACT if missed else NOTHING


def _record(options: argparse.Namespace) -> int:
    signatures.record(signatures.collected(_summaries(_versions(options))))
    return NOTHING


def _versions(options: argparse.Namespace) -> list[str]:
    versions = cached() if options.cached else released()
    if not versions:
        raise NoRelease("there is no wheel in .cache/sglang-wheels")
    return versions


def _summaries(versions: Iterable[str]) -> Iterator[Summary]:
    return (summary_of(open_release(version)) for version in versions)


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)


if __name__ == "__main__":
    sys.exit(main())
