"""Help, versions, wrong usage, and the command without its extra.

On documents of the real recorder; facts are asserted, not screens.  ``tests/real_sglang`` has a
real server.
"""

from __future__ import annotations

from typing import Any

import pytest
from ended_command import COMMANDS, Run

from sglang_weight_hook.commands.render.text import size_text


@pytest.mark.parametrize("name", ["typer", "rich"])
def test_without_the_extra_one_sentence_tells_what_to_install(name: str, run_python: Any) -> None:
    code = f"import sys; sys.modules[{name!r}] = None; import runpy; runpy.run_module("
    code += "'sglang_weight_hook', run_name='__main__')"
    done = run_python("-c", code, check=False)
    assert done.returncode == 2
    assert "pip install typer rich" in done.stderr
    assert done.stderr.count("\n") == 1


def test_reading_from_python_needs_neither_typer_nor_rich(run_python: Any) -> None:
    code = (
        "import sys, sglang_weight_hook as hook, sglang_weight_hook.__main__;"
        "from sglang_weight_hook.commands import diagnosis;"
        "from sglang_weight_hook.reader import totals, verify;"
        "hook.open_slot('x', '0');"
        "assert not [n for n in ('typer', 'rich', 'click', 'torch') if n in sys.modules]"
    )
    run_python("-c", code)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(command: str, run: Run) -> None:
    ended = run(command, "--help")
    assert ended.status == 0
    assert "Examples:" in ended.out
    assert "sglang-weight-hook " + command in ended.out or command == "diff"
    assert max(len(line) for line in ended.out.splitlines()) <= 80
    assert ("--json" in ended.out) == (command not in ("plot", "top", "serve"))
    assert "--dir" in ended.out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_sentence_of_the_help_stands_alone(command: str, run: Run) -> None:
    """None needs the one before it, and no name stands with dots twice."""
    told = " ".join(run(command, "--help").out.split())
    for fragment in (
        *(
            "The same again",
            "Also of a",
            "that user",
            "that certificate",
            "of the certificate (PEM)",
        ),
        *(
            "password of the key.",
            "THIS",
            "Of the KV cache",
            "Most connections",
            "...]...",
            "...}...",
        ),
    ):
        assert fragment not in told, fragment


def test_the_command_itself_lists_all_and_tells_its_version(run: Run) -> None:
    ended = run("--help")
    for command in COMMANDS:
        assert f"  {command}" in ended.out
    listed = ended.out.partition("Commands:")[2].partition("Exit status")[0]
    assert "..." not in listed  # what it does is told whole
    from sglang_weight_hook import __version__

    assert run("--version").out == f"sglang-weight-hook {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [["nonsense"], ["show", "--nonsense"], ["show", "--sort", "colour"], ["show", "--top", "0"]],
)
def test_wrong_usage_is_two(arguments: list[str], run: Run) -> None:
    ended = run(*arguments)
    assert (ended.status, ended.out) == (2, "")
    assert ended.err


def test_sizes_are_for_people() -> None:
    assert [size_text(value) for value in (0, 1023, 1024, 15 << 30, 3 << 40, 5 << 50, None)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "15.0 GiB",
        "3.0 TiB",
        "5120.0 TiB",
        "-",
    ]
