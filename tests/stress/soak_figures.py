"""What the processes of the soak hold, looked at after each turn and told quarter by quarter."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

QUARTERS = 4


class Held(NamedTuple):
    resident: int  # bytes
    anonymous: int  # bytes of it that are of no file: heap, stacks
    descriptors: int
    threads: int
    seconds: float  # of a core, since the process began


def held_by(pid: int) -> Held:
    sizes = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, value = line.split()[:2]
        sizes[name.rstrip(":")] = int(value) * 1024
    stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return Held(
        sizes["Rss"],
        sizes["Anonymous"],
        len(os.listdir(f"/proc/{pid}/fd")),
        int(stat[17]),
        (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK"),
    )


class Figures:
    """Of the processes with these pids, for so many seconds from now."""

    def __init__(self, pids: Mapping[str, int], seconds: float) -> None:
        self._pids, self.seconds = pids, seconds
        self._began = time.monotonic()
        self._held: list[dict[str, list[Held]]] = []
        print(f"\n{'quarter':<10}" + "".join(f"{name:<44}" for name in pids))
        print(f"{'turns':<10}" + f"{'MB (anonymous) descriptors threads CPU':<44}" * len(pids))

    def is_over(self) -> bool:
        return time.monotonic() - self._began >= self.seconds

    def look(self) -> None:
        """Between turns, when nothing is under way in the servers."""
        passed = (time.monotonic() - self._began) / self.seconds
        now = min(int(QUARTERS * passed), QUARTERS - 1)
        while len(self._held) <= now:
            self.tell()
            self._held.append({name: [] for name in self._pids})
        for name, pid in self._pids.items():
            self._held[now][name].append(held_by(pid))

    def tell(self) -> None:
        """A line about the last quarter that was looked at."""
        if not self._held:
            return
        quarter = self._held[-1]
        cells = [_cell(held) for held in quarter.values()]
        turns = len(next(iter(quarter.values())))
        number = f"{len(self._held)}: {turns}"
        print(f"{number:<10}" + "".join(f"{cell:<44}" for cell in cells), flush=True)

    def growth(self, name: str, of: str = "resident") -> float:
        """By how many bytes the last quarter's median is more than the second's.

        (In the first, a process is still growing to its size.)
        """
        early, late = (_median(self._held[quarter][name], of) for quarter in (1, -1))
        return late - early

    def floors(self, name: str, of: str) -> tuple[int, int]:
        """The least number at any moment of the second quarter, and of the last.

        A request or a pass that is under way has descriptors for a moment; one that is leaked is
        there at every moment after.
        """
        early, late = (
            min(getattr(held, of) for held in self._held[quarter][name]) for quarter in (1, -1)
        )
        return early, late


def _median(held: list[Held], of: str) -> float:
    return float(statistics.median(getattr(one, of) for one in held))


def _cell(held: list[Held]) -> str:
    if not held:
        return "-"
    resident, anonymous = (
        statistics.median(getattr(one, of) for one in held) / 1e6
        for of in ("resident", "anonymous")
    )
    descriptors, threads = (
        "-".join(map(str, sorted({min(numbers), max(numbers)})))
        for numbers in ([one.descriptors for one in held], [one.threads for one in held])
    )
    return f"{resident:.1f} ({anonymous:.1f}) {descriptors} {threads} {held[-1].seconds:.0f}s"
