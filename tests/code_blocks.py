"""The fenced code blocks of the Markdown pages: found, taken apart, their output compared.

What is done with each is in ``tests/unit/test_code_blocks.py``; the tutorial's commands meet a
real server in ``tests/real_sglang/test_tutorial.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


def pages() -> list[Path]:
    """The pages that people are sent to."""
    named = (ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md"))
    return [*named, ROOT / "examples" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


class Block(NamedTuple):
    page: str  # relative to the repository's root
    line: int  # of the opening fence
    language: str  # the first word after the fence, or ""
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


class Command(NamedTuple):
    """A command of a shell block, and the output that the block shows for it."""

    text: str  # continued lines joined, without its comment
    output: str


FENCE = re.compile(r"^ {0,3}(```+|~~~+)\s*(\S*)")


def blocks_of(text: str, page: str = "") -> list[Block]:
    """Every fenced block of a page.

    >>> blocks_of("a\\n```python\\nx = 1\\n```\\n", "p")
    [Block(page='p', line=2, language='python', text='x = 1\\n')]
    """
    found: list[Block] = []
    fence, opened, language, inside = "", 0, "", list[str]()
    for number, line in enumerate(text.splitlines(), 1):
        match = FENCE.match(line)
        if not fence and match:
            fence, opened, language, inside = match[1], number, match[2], []
        elif fence and line.strip().startswith(fence) and not line.strip().strip(fence[0]):
            found.append(Block(page, opened, language, "".join(f"{each}\n" for each in inside)))
            fence = ""
        elif fence:
            inside.append(line)
    if fence:
        raise ValueError(f"{page}:{opened}: the block does not end")
    return found


def all_blocks() -> list[Block]:
    return [
        block
        for page in pages()
        for block in blocks_of(page.read_text(encoding="utf-8"), str(page.relative_to(ROOT)))
    ]


PROMPT = re.compile(r"^[$#] (?=\S)")
COMMENT = re.compile(r"(?:^|\s{2,}|(?<=\S) )#\s.*$")


def commands_of(text: str) -> list[Command]:
    """The commands of a shell block: with a prompt, what has none is output.

    >>> commands_of("$ ls \\\\\\n   a  # why\\nb\\n")
    [Command(text='ls a', output='b\\n')]
    >>> commands_of("make a   # why\\nmake b\\n")
    [Command(text='make a', output=''), Command(text='make b', output='')]
    """
    prompts = any(line.startswith("$ ") for line in text.splitlines()) or text.startswith("# ")
    found: list[list[str]] = []
    going_on = False
    for line in text.splitlines():
        match = PROMPT.match(line)
        if going_on:
            found[-1][0] += " " + line.strip().removesuffix("\\").strip()
        elif match if prompts else line.strip() and not line.startswith("#"):
            command = line[match.end() if match else 0 :]
            found.append([command.removesuffix("\\").strip(), ""])
        elif prompts and found:
            found[-1][1] += line + "\n"
        elif prompts:
            raise ValueError(f"output of no command: {line}")
        going_on = (going_on or not prompts or bool(match)) and line.endswith("\\")
    return [Command(COMMENT.sub("", text).strip(), output) for text, output in found]


# What differs from machine to machine or from run to run, and what stands for it.
ADDRESSES = (
    (re.compile(r"\b0x[0-9a-f]+\b"), "ADDRESS"),
    (re.compile(r"\b\d{12,}\b"), "ADDRESS"),
)
OF_THE_RUN = (
    (re.compile(r"\b\d{4}-\d\d-\d\d[T ]"), ""),
    (re.compile(r"\b\d\d:\d\d:\d\d(\.\d+)?\b"), "TIME"),
    (re.compile(r"\b\d+(\.\d+)? (s|ms|us|µs)\b"), "SECONDS"),
    (re.compile(r"\b\d+(ms|s|m|h|d)\b"), "AGE"),
    (re.compile(r"\bpid \d+\b"), "pid PID"),
    (re.compile(r"\b\d+(\.\d+)? [KMG]i?B/s"), "RATE"),
    (re.compile(r"\b[0-9a-f]{16,}\b"), "DIGEST"),
)
FIGURES = (
    (re.compile(r"\b\d+(\.\d+)? (B|bytes|[KMGT]i?B)(?!\w)"), "SIZE"),
    (re.compile(r"(?<![\w.])-?\d+(\.\d+)?(?:e[+-]?\d+)?(?![\w])"), "N"),
)
Rules = tuple[tuple["re.Pattern[str]", str], ...]


def normalised(text: str, rules: Rules) -> str:
    for pattern, word in rules:
        text = pattern.sub(word, text)
    lines = (re.sub(r"\s+", " ", line).strip() for line in text.splitlines())
    return "".join(f"{line}\n" for line in lines if line)


def shows(shown: str, real: str, *, figures: bool = True) -> bool:
    """Whether a page's output is that of a run: addresses, times and columns' widths aside.

    ``…`` stands for anything in a line, and alone on a line for any lines.  Without ``figures``
    every number is aside, too.

    >>> shows("0x10  4 KiB  a\\n…\\n", "0xff20    4 KiB  a\\nmore\\n")
    True
    >>> shows("4 tensors\\n", "5 tensors\\n"), shows("4 tensors\\n", "5 tensors\\n", figures=False)
    (False, True)
    >>> shows("4 tensors\\n", "4 regions\\n", figures=False)
    False
    """
    rules: Rules = (*OF_THE_RUN, *ADDRESSES, *(() if figures else FIGURES))
    pattern = "".join(
        r"(?:.*\n)*?" if line == "…" else re.escape(line).replace("…", ".*") + r"\n"
        for line in normalised(shown, rules).splitlines()
    )
    return re.fullmatch(pattern, normalised(real, rules)) is not None


def difference(shown: str, real: str) -> str:
    return f"the page shows\n{shown}\nand the run said\n{real}"


def parts(command: str) -> Iterator[list[str]]:
    """The words of each simple command of a line, without what it redirects and its variables.

    >>> list(parts("A=1 make a && cut -f1 x | head -8 > y"))
    [['make', 'a'], ['cut', '-f1', 'x'], ['head', '-8']]
    """
    import shlex

    lexer = shlex.shlex(command, posix=True, punctuation_chars="();<>|&")
    lexer.whitespace_split = True
    words: list[str] = []
    redirected = False
    for word in [*lexer, ";"]:
        if word and set(word) <= set(";|&()"):
            if words:
                yield words
            words = []
        elif word and set(word) <= set("<>&"):
            redirected = True
        elif redirected:
            redirected = False
        elif words or not re.match(r"^[A-Z_]+=", word):
            words.append(word)
