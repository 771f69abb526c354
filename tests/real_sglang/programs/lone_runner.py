"""A program that makes a ModelRunner itself: SGLang's own benchmark of one batch, stopped midway.

Run by the hooked interpreter:  lone_runner.py MODEL [further arguments of SGLang's]

Builds the runner with ``sglang.benchmark.one_batch``'s own functions, says so, decodes two batches
with them, and says so again; then ends.  One JSON line each time, after which it waits for a line.
"""

from __future__ import annotations

import argparse
import json
import sys


def main() -> None:
    from sglang.benchmark import (  # type: ignore[import-not-found, import-untyped, unused-ignore]
        one_batch,
    )
    from sglang.srt.server_args import (  # type: ignore[import-not-found, import-untyped, unused-ignore]
        ServerArgs,
    )

    arguments = sys.argv[1:]
    answers = sys.stdout
    sys.stdout = sys.stderr  # the benchmark prints
    load_model = one_batch.load_model

    def load(*args: object) -> object:
        loaded = load_model(*args)
        tell("built")
        return loaded

    def tell(what: str) -> None:
        print(json.dumps(what), file=answers, flush=True)
        sys.stdin.readline()

    one_batch.load_model = load
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    one_batch.BenchArgs.add_cli_args(parser)
    # Its test of correctness takes tokens of the model; the benchmark makes up larger ones.
    parsed = parser.parse_args([*arguments, "--correctness-test", "--output-len", "2"])
    one_batch.main(ServerArgs.from_cli_args(parsed), one_batch.BenchArgs.from_cli_args(parsed))
    tell("benchmarked")


if __name__ == "__main__":
    main()
