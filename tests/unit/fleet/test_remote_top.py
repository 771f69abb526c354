"""top in a real terminal, over an agent and over a registry of agents."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from agent_process import ROOT, Agent, Publisher, eventually
from etcd_process import EtcdServer
from tmux_terminal import Terminal

from sglang_weight_hook import HookError, open_directory

pytest.importorskip("textual")


@pytest.mark.parametrize("scheme", ["http", "etcd"])
def test_it_shows_what_becomes_of_slots_and_of_their_agent(
    scheme: str,
    etcd: EtcdServer,
    publish: Callable[..., Publisher],
    serve: Callable[..., Agent],
    terminal: Terminal,
    tmp_path: Path,
) -> None:
    publisher, other = publish(2, tmp_path / "two"), publish(1, tmp_path / "other")
    where = ("--dir", tmp_path / "two", "--dir", tmp_path / "other")
    agent = serve(*where, "--etcd", etcd.url, "--node", "node", "--ttl", 60)
    url = agent.url if scheme == "http" else etcd.url.replace("http://", "etcd://")
    prefix = "" if scheme == "http" else "node:"
    eventually(lambda: count(url) == 3)

    command = [sys.executable, "-m", "sglang_weight_hook", "top", "--dir", url]
    told = tmp_path / "pid"
    terminal.start(f"env PYTHONPATH={ROOT} {shlex.join([*command, '--interval', '0.2'])}", told)
    terminal.until("3 ready")
    for name in ("0", "1", "0@2"):
        terminal.matching(rf" {prefix}{name} +model +target ")
    publisher.tell("fail", 1)
    terminal.matching(rf" {prefix}1 .* failed .*update_weights_from_disk")  # cut by the width
    terminal("send-keys", "Enter")  # the tensors of the first one
    terminal.until(f"slot {prefix}0 (ready): 4 tensors")
    terminal("send-keys", "Escape")
    terminal.until("3 slots")
    other.kill()  # an agent tells that it is stale, and a registry forgets it
    if scheme == "http":
        terminal.matching(rf" {prefix}0@2 .* stale ")
    else:
        assert "0@2" not in terminal.until(" 2 slots")
    agent.process.kill()
    agent.process.wait()
    if scheme == "http":
        terminal.matching(f"^ 0 slots .*{url} does not answer")
    else:
        terminal.until("2 unreadable")
    eventually(lambda: " ready" not in terminal.shown())
    terminal("send-keys", "q")
    terminal.until("ended 0")


def count(url: str) -> int:
    try:
        return len(open_directory(url).slots())
    except HookError:
        return 0
