"""Rows of docs/truth-matrix.md, made of what a test really compared.

Where the environment variable TRUTH_TABLE names the page, a row is written as it is through.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from cpu_sglang.releases import BASE_RELEASE
from tests.real_sglang.truth.comparison import BY_NAME, CHECKER, PROBE, Moment
from tests.real_sglang.truth.outside_bytes import PublishedMap
from tests.real_sglang.truth.page import (
    OTHERS_HEAD,
    SERVERS_HEAD,
    Cells,
    Page,
    cell,
    changed_page,
    one_line,
)
from tests.real_sglang.truth.rows import Row

TRUE = "true at every look"


def record_server(
    row: Row, moments: Mapping[str, Moment], maps: Sequence[PublishedMap], problem: str = ""
) -> None:
    """One row of the first table."""
    last = list(moments.values())[-1] if moments else None
    seen: Sequence[object] = [""] * 7
    if last is not None:
        seen = [
            last.tensors,
            f"{last.compared_bytes:,}",
            last.confirmed[CHECKER],
            last.confirmed[BY_NAME],
            last.confirmed[PROBE],
            last.tensors - last.by_sglang,
            len(moments),
        ]
    model_class = maps[0].identity["model_class"] if maps else ""
    cells = _cells(
        SERVERS_HEAD, [row.name, model_class, row.layout, *seen, _result(problem), _when()]
    )
    with _recorded(cells) as page:
        page.servers[row.name] = cells
        if last is not None:
            page.alone[row.name] = f"{', '.join(last.by_probe_alone()) or 'none'}."


class OtherProcess:
    """What a test has compared of one process, or of several that belong together."""

    def __init__(self) -> None:
        self.tensors = 0
        self.compared_bytes = 0
        self.looks: list[str] = []
        self.confirmed_by: list[str] = []
        self.refusal = ""

    def look(self, when: str, values: Sequence[bytes], *confirmed_by: str) -> None:
        """Values read from outside, which those have confirmed."""
        self.looks.append(when)
        self.tensors = len(values)
        self.compared_bytes += sum(map(len, values))
        self.confirmed_by += [each for each in confirmed_by if each not in self.confirmed_by]

    def look_by_probe(self, when: str, moment: Moment) -> None:
        """All tensors of the maps, held against the probe, the mark and what else answered.

        Nothing may be untrue.
        """
        assert not moment.untrue, f"{when}: " + "\n".join(moment.untrue[:20])
        assert not moment.unconfirmed, f"{when}: " + "\n".join(moment.unconfirmed[:20])
        assert moment.confirmed[PROBE] == moment.tensors > 0, (when, moment.confirmed)
        values = [value for named in moment.values.values() for value in named.values()]
        routes = [f"`/{source}`" for source in (CHECKER, BY_NAME) if moment.confirmed[source]]
        self.look(when, values, *routes, "the probe", "the mark")

    def refused(self, message: str) -> None:
        """It does not run here, and that is what SGLang says."""
        self.refusal = message


@contextmanager
def other_process(process: str, program: str, stands_in: str = "nothing") -> Iterator[OtherProcess]:
    """One row of the second table, with what was looked at inside of the block."""
    row = OtherProcess()
    problem = ""
    try:
        yield row
        assert row.looks or row.refusal, "nothing was compared"
    except BaseException as error:
        problem = str(error) or repr(error)
        raise
    finally:
        result = _result(problem)
        if row.refusal and not problem:
            result = f"does not run here; SGLang says: `{row.refusal}`"
        looks = f"{len(row.looks)}: {', '.join(row.looks)}" if row.looks else "0"
        seen = [row.tensors, f"{row.compared_bytes:,}", ", ".join(row.confirmed_by), looks]
        cells = _cells(OTHERS_HEAD, [process, program, *seen, result, stands_in, _when()])
        with _recorded(cells) as page:
            page.others[cells["process"]] = cells


def _cells(head: Sequence[str], values: Sequence[object]) -> Cells:
    assert len(head) == len(values)
    return dict(zip(head, map(cell, values)))


def _result(problem: str) -> str:
    return f"**not**: {problem.splitlines()[0][:200]}" if problem else TRUE


def _when() -> str:
    return f"{BASE_RELEASE}, {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}"


@contextmanager
def _recorded(cells: Cells) -> Iterator[Page]:
    print("\n" + one_line(cells.values()))
    path = os.environ.get("TRUTH_TABLE")
    if not path:
        yield Page()
        return
    with changed_page(Path(path)) as page:
        yield page
