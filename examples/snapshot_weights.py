#!/usr/bin/env python3
"""A nightly snapshot: the weights of every live slot as safetensors, the newest N kept.

    python snapshot_weights.py weights_metadata /snapshots --keep 7

Writes /snapshots/DATE/SLOT.safetensors (or shards and an index).  Where the weights have not
changed since the last snapshot nothing is written.  Run it from cron or a CronJob; what was
interrupted is written again.  Prints one JSON object a slot.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

try:
    import sglang_weight_hook as hook
except ImportError:  # run from a checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import sglang_weight_hook as hook

from sglang_weight_hook.memory.save import save

NOTE = "saved.json"  # in each snapshot, written last: without it the snapshot is not whole


def main() -> int:
    parser = argparse.ArgumentParser(description="Save the weights of every live slot.")
    parser.add_argument("directory", help="the server's output directory")
    parser.add_argument("target", type=Path, help="where the snapshots are kept")
    parser.add_argument("--keep", type=int, default=7, help="how many (default: %(default)s)")
    options = parser.parse_args()
    try:
        slots = hook.open_directory(options.directory).slots()
        live = [slot for slot in slots if slot.owner_alive()]
        if not live:
            raise hook.HookError(f"no server publishes in {options.directory}; start one")
        snapshot(live, options.target)
        drop_old(options.target, options.keep)
    except (hook.HookError, OSError) as error:
        print(f"snapshot_weights: {error}", file=sys.stderr)
        return 1
    return 0


def snapshot(slots: list[hook.Slot], target: Path) -> None:
    """Save all slots, or none of them if nothing has changed since the last time."""
    now = {slot.name: generation(slot) for slot in slots}
    previous = whole_ones(target)
    if previous and json.loads((previous[-1] / NOTE).read_text()) == now:
        print(json.dumps({"snapshot": str(previous[-1]), "unchanged": True}))
        return
    place = target / time.strftime("%Y-%m-%dT%H-%M-%S")
    place.mkdir(parents=True)
    try:
        for slot in slots:
            done = save(slot, str(place / f"{slot.name}.safetensors"))
            print(json.dumps({"slot": slot.name, "files": done.files, "bytes": done.bytes}))
        if now != {slot.name: generation(slot) for slot in slots}:
            raise hook.HookError("the weights changed between two slots; run it again")
        (place / NOTE).write_text(json.dumps(now))
    except BaseException:
        shutil.rmtree(place)
        raise


def generation(slot: hook.Slot) -> list[Any]:
    """What tells the weights of a slot from all others."""
    state = slot.read_state()
    return [state.get("instance"), state["content_generation"], state.get("physical_epoch")]


def whole_ones(target: Path) -> list[Path]:
    return sorted(note.parent for note in target.glob(f"*/{NOTE}"))


def drop_old(target: Path, keep: int) -> None:
    for old in whole_ones(target)[: -max(keep, 1)]:
        shutil.rmtree(old)


if __name__ == "__main__":
    sys.exit(main())
