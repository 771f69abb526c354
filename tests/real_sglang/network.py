"""A second network namespace beside this one, as another machine would have: a veth pair between.

Needs root and ``ip`` (iproute2).  What runs in it shares files and processes with the tests, and
reaches nothing of the network here but the one address.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

# Of one run of the tests, for another one may go on beside it.
HERE, THERE = (f"10.213.{os.getpid() % 250}.{end}" for end in (1, 2))

_NAMES = tuple(f"swh{kind}{os.getpid()}" for kind in ("n", "a", "b"))


class NoNamespaces(Exception):
    """Why there can be none."""


@contextmanager
def second_namespace() -> Iterator[list[str]]:
    """What to put before a command for it to run there.  Raises NoNamespaces."""
    if shutil.which("ip") is None:
        raise NoNamespaces("there is no `ip` (iproute2)")
    name, here, there = _NAMES
    _ip("netns", "add", name)
    try:
        _ip("link", "add", here, "type", "veth", "peer", "name", there, "netns", name)
        try:
            _ip("addr", "add", f"{HERE}/30", "dev", here)
            _ip("link", "set", here, "up")
            _ip("-n", name, "addr", "add", f"{THERE}/30", "dev", there)
            _ip("-n", name, "link", "set", there, "up")
            _ip("-n", name, "link", "set", "lo", "up")
            yield ["ip", "netns", "exec", name]
        finally:
            subprocess.run(["ip", "link", "del", here], check=False)
    finally:
        subprocess.run(["ip", "netns", "del", name], check=False)


@contextmanager
def link_cut(end: str) -> Iterator[None]:
    """Nothing passes between the two.

    With the end ``"here"`` what is sent there goes nowhere, as with a switch that has died; with
    ``"there"`` whoever sends is told that there is no network.
    """
    name, here, there = _NAMES
    command = ("link", "set", here) if end == "here" else ("-n", name, "link", "set", there)
    _ip(*command, "down")
    try:
        yield
    finally:
        _ip(*command, "up")


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoNamespaces(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
