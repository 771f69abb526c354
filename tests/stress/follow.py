"""A reader at full speed: ``python -m tests.stress.follow DIRECTORY DEAD READS``.

DEAD is a file to which the test appends the pid of a publisher once that is dead.  One line of
JSON at the end: how often what was seen.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from pathlib import Path

import sglang_weight_hook as hook
from tests.stress.processes import is_mixed

PATIENCE = 2.0  # seconds for one read; a publisher that was killed half way has a successor


def main() -> None:
    os.nice(5)  # the publisher is to have its share of a small machine
    directory, dead_file, wanted = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    slot = hook.open_slot(directory, "0")
    seen: Counter[str] = Counter()
    while seen["reads"] < wanted and seen["refused"] < 10 * wanted:
        dead = dead_file.read_text().split()
        try:
            document = slot.read(timeout=PATIENCE)
            alive = document.owner_alive()
        except hook.HookError as error:
            seen["refused"] += 1
            if "is not JSON" in str(error):
                seen["torn"] += 1
            time.sleep(0.002)  # a successor is on its way
            continue
        seen["reads"] += 1
        seen[document.state["state"]] += 1
        seen["mixed"] += is_mixed(document.raw)
        pid = str(document.identity["pid"])
        seen["alive"] += alive
        seen["dead as live"] += alive and pid in dead
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
