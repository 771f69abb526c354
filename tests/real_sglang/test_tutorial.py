"""Every command of docs/tutorial.md, in the page's order, beside a real SGLang 0.5.23.

Addresses, process ids, times and the widths of columns aside, each prints what the page shows and
exits as the page says.  ``TUTORIAL_PAGE=docs/tutorial.md`` writes the page anew with the output of
this run.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import sglang_weight_hook as hook
from cpu_sglang.environment import Environment
from tests.code_blocks import Command, blocks_of, commands_of, difference, parts, shows
from tests.real_sglang.hooked import HookedServer, pid_of, wait_for_end

pytestmark = pytest.mark.real_sglang

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "tutorial.md"

Action = Callable[[], None]


class Step(NamedTuple):
    section: str  # the heading above
    command: Command
    status: int  # as the page says after the block


def steps(page: str) -> list[Step]:
    found = []
    lines = page.splitlines()
    for block in blocks_of(page):
        above = [line for line in lines[: block.line] if line.startswith("## ")]
        after = block.line + len(block.text.splitlines()) + 1
        said = re.match(r"\(exit status (\d)\)", lines[after] if after < len(lines) else "")
        if block.language in ("", "console"):
            commands = commands_of(block.text)
            for each in commands:
                status = int(said[1]) if said and each is commands[-1] else 0
                found.append(Step(above[-1][3:] if above else "", each, status))
    return found


class Shell:
    """The page's reader, in the directory in which the server was started."""

    def __init__(self, folder: Path, server: HookedServer) -> None:
        self.folder = folder
        self.server = server
        programs = folder.parent / "programs"
        programs.mkdir()
        program = programs / "sglang-weight-hook"
        program.write_text(
            f"#!/bin/sh\nPYTHONPATH='{ROOT}' exec '{sys.executable}' -m sglang_weight_hook \"$@\"\n"
        )
        program.chmod(0o755)
        self.environment = {
            **{name: value for name, value in os.environ.items() if "SGLANG_WEIGHT" not in name},
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "PYTHONUNBUFFERED": "1",  # stdout and stderr in the order in which they were written
        }

    def here(self, command: Command) -> str:
        """The command, with the address of the tensor that its output names in this server."""
        match = re.search(r"lookup (0x[0-9a-f]+)", command.text)
        if match is None:
            return command.text
        tensors = self.slot.read().tensors
        name = next(word for word in command.output.split() if word in tensors)
        offset = re.search(r"offset\s+(\d+)", command.output)
        assert offset is not None
        return command.text.replace(match[1], hex(tensors[name]["ptr"] + int(offset[1])))

    def run(self, command: str, lines: int, meanwhile: Action) -> tuple[int, str]:
        """Its status and what it says; ``meanwhile`` once it has said so many lines."""
        process = subprocess.Popen(
            ["bash", "-c", command],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        try:
            first = "".join(process.stdout.readline() for _ in range(lines))
            meanwhile()
            said, _ = process.communicate(timeout=120)
        finally:
            if process.poll() is None:
                process.kill()
                process.communicate()
        said = (first + said).replace(str(self.folder.parent), "…")
        return process.returncode, said.replace(socket.gethostname(), "vm")

    @property
    def slot(self) -> hook.Slot:
        return self.server.maps.slot("0")


@pytest.fixture
def shell(
    environment: Environment,
    hooked_python: Path,
    checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> Iterator[Shell]:
    folder = tmp_path / "serve"
    model = tmp_path / "tiny-llama"
    shutil.copytree(checkpoint(1), model)
    with HookedServer(environment, hooked_python, model, folder) as server:
        yield Shell(folder, server)


def flip_a_bit(slot: hook.Slot) -> None:
    """Bit 3 of the byte that the page looks up, in the server's own memory."""
    document = slot.read()
    tensor = document.tensor("model.layers.1.mlp.down_proj.weight")
    with open(f"/proc/{document.identity['pid']}/mem", "r+b", buffering=0) as memory:
        memory.seek(tensor.ptr + 1234)
        (before,) = memory.read(1)
        memory.seek(tensor.ptr + 1234)
        memory.write(bytes([before ^ 1 << 3]))


def test_every_command_says_what_the_page_shows(
    shell: Shell, checkpoint: Callable[..., Path]
) -> None:
    server = shell.server

    def update_three_times() -> None:
        for model, status in ((checkpoint(2), 200), ("no/such/model", 400), (checkpoint(2), 200)):
            assert server.update_weights_from_disk(model)[0] == status

    def stop() -> None:
        pid = pid_of(shell.slot)
        server.stop()
        wait_for_end(pid)

    # What the page says happens: while a command runs, once it has said so many lines (for scrub,
    # between two passes); and before the first command of a section.
    meanwhile: dict[str, tuple[int, Action]] = {
        "sglang-weight-hook watch --count 3": (1, update_three_times),
        "sglang-weight-hook scrub --stop --every 2": (2, lambda: flip_a_bit(shell.slot)),
    }
    before: dict[str, Action] = {"After the server has exited": stop}
    page = PAGE.read_text(encoding="utf-8")
    written, wrong = "", []
    for step in steps(page):
        command = step.command
        if "…" in command.text or "install_sglang_hook_patch.sh" in command.text:
            hold_what_the_fixtures_did(command, server)
            continue
        if step.section in before:
            before.pop(step.section)()
        here = shell.here(command)
        status, said = shell.run(here, *meanwhile.pop(command.text, (0, lambda: None)))
        assert "Traceback" not in said
        if status != step.status:
            wrong.append(f"{command.text}: exit status {status}, not {step.status}\n{said}")
        elif not shows(command.output, in_the_pages_order(said, command)):
            wrong.append(f"{command.text}: {difference(command.output, said)}")
        above, found, page = page.partition(f"$ {command.text}\n{command.output}")
        assert found
        written += f"{above}$ {here}\n{said}"
    assert not meanwhile
    assert not before
    if target := os.environ.get("TUTORIAL_PAGE"):
        Path(target).write_text(written + page, encoding="utf-8")
    assert not wrong, "\n\n".join(wrong)


def in_the_pages_order(said: str, command: Command) -> str:
    """Rows that are sorted by address: in the order that the page has, where they are the same."""
    if not re.match(r"sglang-weight-hook regions\b", command.text):
        return said
    names = [line.split()[-1] for line in command.output.splitlines()]
    rows = said.splitlines(keepends=True)
    return "".join(
        sorted(
            rows, key=lambda row: names.index(name) if (name := row.split()[-1]) in names else 99
        )
    )


def hold_what_the_fixtures_did(command: Command, server: HookedServer) -> None:
    """They have installed by that script and launched by that module, with other paths."""
    (words,) = parts(command.text)
    if words[0] == "./install_sglang_hook_patch.sh":
        assert (ROOT / words[0]).is_file()
        assert words[1] == "--python"
    else:
        assert words[1:3] == ["-m", "sglang.launch_server"]
        options = {word for word in words if word.startswith("--")}
        assert options <= set(server.command)


def test_the_page_names_every_command() -> None:
    from sglang_weight_hook.commands import entry

    page = PAGE.read_text(encoding="utf-8")
    for command in entry.COMMANDS:
        assert re.search(rf"(sglang-weight-hook|sglang_weight_hook) {command}\b", page), command
