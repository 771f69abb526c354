"""States and events: what each call does to a slot, as a table.

Written from docs/format.md and from the rules for sequences of events, not from the publisher.
`state_oracle` foretells with it what must be published; `rendered` is the section "States and
events" of docs/architecture.md, and `test_state_machine` holds the two equal.
"""

from __future__ import annotations

from typing import NamedTuple

LOADING, READY, FAILED, RELEASED = "loading", "ready", "failed", "released"

SAME = "as before"
BUILT = "ready, or loading"  # ready where the engine is built, else loading

ALWAYS, ONCE, NEVER = "+1", "+1 unless it is the first load", "as before"


class Row(NamedTuple):
    """One call on a runner that it names, or on all of the process."""

    effect: str  # as in publisher/events.py
    succeeds: bool
    loading: str  # the state afterwards, where it was loading before
    ready: str
    failed: str
    content: str  # content_generation
    documents: str  # what is written after it
    note: str = ""

    def after(self, before: str) -> str:
        cell: str = {LOADING: self.loading, READY: self.ready, FAILED: self.failed}[before]
        return before if cell == SAME else cell


_ALL = "all"
_MOVED = "the state; all if a tensor moved"
_NONE = "nothing"

# fmt: off
ROWS = (
    Row("load", True, LOADING, READY, BUILT, ONCE, _ALL),
    Row("load", False, FAILED, FAILED, FAILED, ONCE, _ALL, "without a model: no tensors"),
    Row("build", True, READY, READY, SAME, ONCE, _ALL),
    Row("build", False, SAME, SAME, SAME, NEVER, _NONE, "no event: there is no runner yet"),
    Row("commit", True, LOADING, READY, BUILT, ALWAYS, _ALL),
    Row("commit", False, FAILED, FAILED, FAILED, ALWAYS, _ALL),
    Row("settle", True, READY, READY, SAME, NEVER, _ALL, "begins when the scheduler is built"),
    Row("settle", False, SAME, SAME, SAME, NEVER, _NONE, "no event: there is no scheduler"),
    Row("update", True, READY, READY, READY, ALWAYS, _ALL),
    Row("update", False, FAILED, FAILED, FAILED, ALWAYS, _ALL),
    Row("partial", True, READY, READY, SAME, ALWAYS, _ALL),
    Row("partial", False, FAILED, FAILED, FAILED, ALWAYS, _ALL),
    Row("adapt", True, SAME, SAME, SAME, NEVER, _ALL),
    Row("adapt", False, SAME, SAME, SAME, NEVER, _ALL, "the weights are as they were"),
    Row("stream", True, READY, READY, READY, ALWAYS, _MOVED, "one generation a stream"),
    Row("stream", False, FAILED, FAILED, FAILED, ALWAYS, _MOVED),
    Row("relocate", True, READY, READY, SAME, ALWAYS, _MOVED, "one generation a stream"),
    Row("relocate", False, FAILED, FAILED, FAILED, ALWAYS, _MOVED),
    Row("open", True, SAME, SAME, SAME, NEVER, _NONE, "updating until the session is closed"),
    Row("open", False, FAILED, FAILED, FAILED, ALWAYS, _MOVED, "no session is open then"),
    Row("close", True, READY, READY, SAME, ALWAYS, _MOVED, "its buckets count by themselves"),
    Row("close", False, FAILED, FAILED, FAILED, ALWAYS, _MOVED),
    Row("release", True, SAME, SAME, SAME, NEVER, _ALL, "released, where weights were freed"),
    Row("release", False, SAME, SAME, SAME, NEVER, _ALL, "failed, where weights were to be freed"),
    Row("resume", True, SAME, SAME, SAME, NEVER, _ALL, "+1, where weights got fresh pages"),
    Row("resume", False, SAME, SAME, SAME, NEVER, _ALL, "failed, where weights were to be backed"),
)
# fmt: on

ROW = {(row.effect, row.succeeds): row for row in ROWS}

RULES = """\
* During an event the state is `updating`; while the engine is not built yet it is `loading`, and
  so it is after an event where the table says "ready, or loading".
* **`released`** goes before all others: while the weights have no pages, no call makes it anything
  else. The table then tells what the state will be when they are resumed. An event begins with
  `updating` here too.
* **An event of several calls** (nested, overlapping, a session, a stream, the calls inside one
  request to the scheduler) takes the rows of its calls in the order in which they end. Any failure
  of a call that writes makes the whole event `failed`, whatever succeeds after it in the same
  event. `content_generation` rises by one at most, and the documents are those of the call that
  asks for most.
* **A runner that shares storage** with one that was named takes part in the event, except in a
  `load`. It fails with it; it leaves `failed` only by a write that names it, or that names nobody
  and so means all.
* **A request that SGLang answers with a failure** after a session was opened inside it: the session
  is over, and `failed`. Without a session only `event.answered` says so.
* **The engine counts as built** from the first call on that turns `loading` into `ready` or, if it
  fails, would have. While a scheduler is being built, only `settle` does.
* **A model that cannot be captured** makes any event `failed`, with a `problem` and a layout
  without tensors; both generations rise by one. The next event at which it can be captured ends
  that, unless weights may be half written as well.
* **An unannounced change** raises both generations by one and leaves the state as it was.
* **A call whose end is never told** leaves `updating` until the next event, which then counts as
  one that may have changed contents.
* `layout_generation` rises by one with every publication of which the addresses, sizes, names or
  allocations are others than before, and with no other.
* *Freed* and *backed* are meant of the memory saver. Where SGLang runs without one, or the request
  does not name the weights, a release or resume leaves the state alone, also when it fails.
* `physical_epoch` and `kv_physical_epoch` rise with a successful resume of what a successful
  release, or one that failed half-way, has freed.\
"""


def rendered() -> str:
    """The section's table and rules, as Markdown."""
    lines = [
        "| effect of the call | it | `loading` before | `ready` before | `failed` before "
        "| `content_generation` | documents | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        cells = (
            f"`{row.effect}`",
            "succeeds" if row.succeeds else "fails",
            row.loading,
            row.ready,
            row.failed,
            row.content,
            row.documents,
            row.note,
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n\n" + RULES


if __name__ == "__main__":
    print(rendered())
