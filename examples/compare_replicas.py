#!/usr/bin/env python3
"""A parity check between two servers of the same model: are their weights the same, bit by bit?

    python compare_replicas.py /maps/replica1 /maps/replica2

Compares every slot with the one of the same name, on this machine; prints one JSON object for
each tensor that differs, and exits with 3 if one does.  Reads both under their locks, so that
neither is updated meanwhile; servers that are updated too often for that are told.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path

try:
    import sglang_weight_hook as hook
except ImportError:  # run from a checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import sglang_weight_hook as hook

from sglang_weight_hook.memory.compare import compare_sources
from sglang_weight_hook.memory.sources import SlotSource


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare the weights of two servers.")
    parser.add_argument("one", help="the first server's output directory")
    parser.add_argument("other", help="the second server's")
    options = parser.parse_args()
    try:
        one, other = (
            {slot.name: slot for slot in hook.open_directory(path).slots()}
            for path in (options.one, options.other)
        )
        if one.keys() != other.keys():
            raise hook.HookError(f"they have slots {sorted(one)} and {sorted(other)}")
        different = sum(compared(one[name], other[name]) for name in one)
    except hook.HookError as error:
        print(f"compare_replicas: {error}", file=sys.stderr)
        return 1
    print(f"{different} tensors differ" if different else "equal", file=sys.stderr)
    return 3 if different else 0


def compared(one: hook.Slot, other: hook.Slot) -> int:
    """How many tensors of the two slots differ; prints each.  Raises HookError."""
    different = 0
    with contextlib.ExitStack() as stack:
        for slot in (one, other):
            stack.enter_context(slot.weights_held())
        sources = [
            stack.enter_context(contextlib.closing(SlotSource(slot))) for slot in (one, other)
        ]
        for finding in compare_sources(*sources):
            if not finding.is_equal:
                different += 1
                print(json.dumps({"slot": one.name, **finding._asdict()}))
    return different


if __name__ == "__main__":
    sys.exit(main())
