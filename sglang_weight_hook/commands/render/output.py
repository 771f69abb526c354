"""One answer in the form that is asked for: a table for people, records for programs.

A record has one key a column and whole values: addresses and sizes are numbers (bytes).
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Optional

from .table import Column, print_table
from .text import printable

FORMS = ("table", "wide", "json", "csv", "tsv", "parquet")
TABLE, WIDE, JSON, CSV, TSV, PARQUET = FORMS


class Unwritable(Exception):
    """The form cannot be had here; the message says what is needed."""


class Form(NamedTuple):
    """What ``--output``, ``--json`` and ``--no-headers`` ask for."""

    name: str
    headers: bool

    @property
    def is_json(self) -> bool:
        return self.name == JSON


def form_of(output: Optional[str], as_json: bool, no_headers: bool) -> Form:
    """Raises Unwritable, before anything is read: where the form is unknown or cannot be had."""
    name = output if output is not None else JSON if as_json else TABLE
    if name not in FORMS:
        raise Unwritable(f"--output {name} is not known; give one of {', '.join(FORMS)}")
    if as_json and name != JSON:
        raise Unwritable(f"--json and --output {name} contradict each other; give one of them")
    if name == PARQUET:
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError:
            raise Unwritable(
                "--output parquet needs pyarrow: pip install pyarrow (csv needs nothing)"
            ) from None
        if sys.stdout.isatty():
            raise Unwritable(
                "--output parquet writes a binary file to stdout; redirect it: > weights.parquet"
            )
    return Form(name, not no_headers)


def print_answer(
    form: Form,
    columns: Sequence[Column],
    rows: Sequence[Sequence[str]],
    records: Sequence[Mapping[str, Any]],
    fields: Sequence[str],
) -> None:
    """A table, or the records; JSON is the command's own.  ``fields``: of every record."""
    if form.name in (TABLE, WIDE):
        print_table(columns, rows, form.name == WIDE, form.headers, remedy="-o wide shows them")
    elif form.name == PARQUET:
        _write_parquet(records, fields)
    else:
        _write_separated(form, records, fields)


def _write_separated(
    form: Form, records: Sequence[Mapping[str, Any]], fields: Sequence[str]
) -> None:
    if form.name == CSV:
        writer = csv.writer(sys.stdout, lineterminator="\n")
    else:  # `printable` leaves no tab and no end of line in a value, so nothing is quoted
        writer = csv.writer(
            sys.stdout, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_NONE, quotechar=None
        )
    if form.headers:
        writer.writerow(fields)
    for record in records:
        writer.writerow([_cell(record.get(field)) for field in fields])


def _cell(value: Any) -> str:
    """A value in one cell: text as it is, lists as JSON, nothing for null."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple, dict)):
        value = json.dumps(value)
    return printable(value)


def _write_parquet(records: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> None:
    import pyarrow
    from pyarrow import parquet

    columns = {}
    for field in fields:
        values = [record.get(field) for record in records]
        values = [
            json.dumps(value) if isinstance(value, (list, tuple, dict)) else value
            for value in values
        ]
        if any(isinstance(value, str) for value in values):
            values = [None if value is None else printable(value) for value in values]
        # An address may have its highest bit set; the type is the same whatever the values are.
        is_address = field == "address" or field.endswith("ptr")
        columns[field] = pyarrow.array(values, pyarrow.uint64() if is_address else None)
    file = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), file)
    sys.stdout.flush()
    sys.stdout.buffer.write(file.getvalue())
    sys.stdout.buffer.flush()
