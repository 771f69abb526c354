#!/usr/bin/env python3
"""A parity check between two servers of the same model: are their weights the same, bit by bit?

    python compare_replicas.py /maps/replica1 /maps/replica2
    python compare_replicas.py /copies/replica1 /copies/replica2 --via mooncake

Compares every slot with the one of the same name; prints one JSON object for each tensor that
differs, and exits with 3 if one does.  On this machine it reads both under their locks, so that
neither is updated meanwhile.  With --via mooncake or nixl the servers are elsewhere, the
directories may be copies, and nothing is held: a server that is updated meanwhile is read again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path

try:
    import sglang_weight_hook as hook
except ImportError:  # run from a checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import sglang_weight_hook as hook

from sglang_weight_hook.memory.compare import Finding, compare_sources
from sglang_weight_hook.memory.sources import SlotSource


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare the weights of two servers.")
    parser.add_argument("one", help="the first server's output directory")
    parser.add_argument("other", help="the second server's")
    parser.add_argument("--via", choices=("mooncake", "nixl"), help="read servers elsewhere")
    parser.add_argument("--attempts", type=int, default=5, help="with --via, so many tries a slot")
    options = parser.parse_args()
    try:
        one, other = (
            {slot.name: slot for slot in hook.open_directory(path).slots()}
            for path in (options.one, options.other)
        )
        if one.keys() != other.keys():
            raise hook.HookError(f"they have slots {sorted(one)} and {sorted(other)}")
        different = sum(
            compared_elsewhere(one[name], other[name], options.via, options.attempts)
            if options.via
            else compared(one[name], other[name])
            for name in one
        )
    except hook.HookError as error:
        print(f"compare_replicas: {error}", file=sys.stderr)
        return 1
    print(f"{different} tensors differ" if different else "equal", file=sys.stderr)
    return 3 if different else 0


def compared(one: hook.Slot, other: hook.Slot) -> int:
    """How many tensors of the two slots differ; prints each.  Raises HookError."""
    with contextlib.ExitStack() as stack:
        for slot in (one, other):
            stack.enter_context(slot.weights_held())
        return told(one, findings(one, other, None))


def compared_elsewhere(one: hook.Slot, other: hook.Slot, via: str, attempts: int) -> int:
    """The same without a lock: what an update came into is thrown away.  Raises HookError."""
    for attempt in range(1, attempts + 1):
        try:
            return told(one, findings(one, other, via))
        except hook.Changed:
            if attempt == attempts:
                raise
            time.sleep(0.1 * attempt)
    raise AssertionError("attempts is to be 1 or more")


def findings(one: hook.Slot, other: hook.Slot, via: str | None) -> list[Finding]:
    """The tensors that differ, all of one generation on either side.  Raises HookError."""
    with contextlib.ExitStack() as stack:
        sources = [
            stack.enter_context(contextlib.closing(SlotSource(slot, via))) for slot in (one, other)
        ]
        return [finding for finding in compare_sources(*sources) if not finding.is_equal]


def told(slot: hook.Slot, different: list[Finding]) -> int:
    for finding in different:
        print(json.dumps({"slot": slot.name, **finding._asdict()}))
    return len(different)


if __name__ == "__main__":
    sys.exit(main())
