"""docs/truth-matrix.md as a file: two tables, in which each row may be of another run.

Rows are written one by one, as they are through; those of other rows stay as they were.  So a run
of some rows (``-k``) renews these alone, and one that breaks off loses nothing.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.real_sglang.truth.rows import LOOKS, ROWS, Row

SERVERS_HEAD = (
    "row",
    "SGLang's class",
    "laid out",
    "tensors",
    "bytes a look",
    "confirmed by `/weights_checker`",
    "by `/get_weights_by_name`",
    "by the probe",
    "by the probe alone",
    "looks",
    "result",
    "SGLang, run on",
)
OTHERS_HEAD = (
    "process",
    "SGLang's class or program",
    "tensors",
    "bytes compared",
    "confirmed by",
    "looks",
    "result",
    "what stands in, and why",
    "SGLang, run on",
)
ALONE = "**Confirmed by the probe alone**"

PAGE = """\
# Truth matrix

Does a published address hold the tensor that the map says it does?  `make test-truth` asks that
of real SGLang servers on the CPU, of which nobody has to take the hook's word:
another process reads the memory with `process_vm_readv(2)`, using nothing but a tensor's `ptr`,
`dtype`, `shape` and `stride`, and compares the values with SGLang's own answers.  A run of some
rows (`-k`) writes these; each row says when it was run.

{servers}

**Sources.** *`/weights_checker`*: SGLang's SHA-256 of each parameter and of the buffers that it
counts, computed again from the bytes read outside. *`/get_weights_by_name`*: SGLang's values of
a parameter, all of them, under its own name and part by part under the checkpoint's names; few
model classes have the method. *The probe*: test equipment inside the server that knows nothing
of the hook, and hashes what torch has there; every tensor is also held against it by place, and
for some (rotary caches, tensors that modules hold as plain attributes, the LoRA pool, stages of
a pipeline that SGLang's routes do not reach) it is the only source. *The mark*: at each look the
server flips one bit in every live tensor, the reader must see all of them flipped, and back:
equal bytes alone could be a copy left behind.

**Looks**, in this order: {looks}.
A second and a third checkpoint are loaded and the first one again; after each, every parameter
must have other values than before, and at the end every tensor the first ones.  Last of all each
row is shown untrue maps (two tensors of one shape swapped, one left out, one an element further)
and has to find fault with each.  Where SGLang refuses buckets, a session of refused ones and an
update from disk are in their place.  Rows of quantised checkpoints take no buckets, and where a
forward needs a kernel that a CPU has not, no requests (the notes say what SGLang says to one).

## Other processes

Programs and servers that are not one model runner behind SGLang's HTTP server.  Their bytes are
read from outside in the same way; *tensors* is of the last look, *bytes compared* of all looks
together.  Where SGLang does not run on this machine, the row has what SGLang said.

{others}

## Notes

{notes}

{alone}, at the last look of each row:

{alone_lines}
"""

Cells = dict[str, str]


@dataclass
class Page:
    """What has been recorded, each row under its name."""

    servers: dict[str, Cells] = field(default_factory=dict)
    others: dict[str, Cells] = field(default_factory=dict)
    alone: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Page:
        page = cls(_table(text, SERVERS_HEAD), _table(text, OTHERS_HEAD))
        for line in text.partition(ALONE)[2].splitlines():
            if line.startswith("* "):
                name, _, said = line[2:].partition(": ")
                page.alone[name] = said
        return page

    def text(self) -> str:
        rows = [row for row in ROWS if row.name in self.servers]
        servers = [self.servers[row.name] for row in rows]
        alone = [f"* {row.name}: {self.alone[row.name]}" for row in rows if row.name in self.alone]
        return PAGE.format(
            servers=_lines(SERVERS_HEAD, servers),
            others=_lines(OTHERS_HEAD, self.others.values()),
            looks=", ".join(LOOKS),
            notes="\n".join(note for row in rows for note in notes(row)),
            alone=ALONE,
            alone_lines="\n".join(alone),
        )


@contextmanager
def changed_page(path: Path) -> Iterator[Page]:
    """The page as it is; written with what was changed.  Two runs may write at the same time."""
    with open(path, "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        page = Page.parse(file.read())
        yield page
        file.truncate(0)
        file.write(page.text())
        file.flush()


def one_line(values: Iterable[str]) -> str:
    return "| " + " | ".join(values) + " |"


def cell(value: object) -> str:
    """In one line of a table, whatever a message of SGLang's has in it."""
    return " ".join(str(value).replace("|", "/").split())


def _lines(head: tuple[str, ...], rows: Iterable[Mapping[str, str]]) -> str:
    lines = [one_line(head), one_line(["---"] * len(head))]
    lines += [one_line(row[column] for column in head) for row in rows]
    return "\n".join(lines)


def _table(text: str, head: tuple[str, ...]) -> dict[str, Cells]:
    """The rows below that head, if the page has it just so."""
    found = {}
    for line in text.partition(one_line(head) + "\n")[2].splitlines()[1:]:
        if not line.startswith("| "):
            break
        cells = [each.strip() for each in line.removeprefix("|").removesuffix("|").split("|")]
        found[cells[0]] = dict(zip(head, cells))
    return found


def notes(row: Row) -> Iterator[str]:
    if row.note:
        yield f"* {row.name}: {row.note}."
    if row.refuses_buckets:
        what = f"update from tensors is impossible; SGLang says: `{row.refuses_buckets}`"
        yield f"* {row.name}: {what}. The row fails once SGLang takes them."
    if row.refuses_disk:
        what = f"another checkpoint is refused; SGLang says: `{row.refuses_disk}`"
        yield f"* {row.name}: {what}. The row fails once SGLang takes one."
    if row.ends_of_disk:
        what = f"another checkpoint ends SGLang's scheduler: `{row.ends_of_disk}`"
        yield f"* {row.name}: {what}. The map then says `failed`."
    if row.silent:
        what = f"no request is made, for SGLang then ends with: `{row.silent}`"
        yield f"* {row.name}: {what}."
