"""The reader itself: every layout, and a plain error where there is nothing to read."""

from __future__ import annotations

import itertools
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.real_sglang.truth.outside_bytes import Place, as_floats, read_memory

# Numbers 0 to 23, as int32, in a process that knows nothing of us.
OWNER = """
import array, sys
numbers = array.array("i", range(24))
print(numbers.buffer_info()[0], flush=True)
sys.stdin.read()
"""


@contextmanager
def owner() -> Iterator[tuple[int, int]]:
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        assert process.stdin is not None
        yield process.pid, int(process.stdout.readline())
        process.stdin.close()


@pytest.mark.parametrize(
    ("shape", "stride"),
    [
        ((2, 3, 4), (12, 4, 1)),
        ((4, 3, 2), (1, 4, 12)),  # transposed
        ((3, 2), (8, 1)),  # padded rows
        ((2, 3), (0, 5)),  # expanded
        ((4, 3), (6, 0)),
        ((1, 24), (99, 1)),  # the step of a dimension of one means nothing
        ((), ()),
        ((0, 4), (4, 1)),
    ],
)
def test_values_are_read_row_major_whatever_the_strides(
    shape: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    with owner() as (pid, address):
        values = Place(address, "int32", shape, stride).read(pid)
    expected = [
        sum(i * step for i, step in zip(index, stride))
        for index in itertools.product(*map(range, shape))
    ]
    assert list(struct.unpack(f"{len(values) // 4}i", values)) == expected


def test_what_cannot_be_read_is_an_error() -> None:
    with owner() as (pid, _), pytest.raises(OSError, match="Bad address"):
        read_memory(pid, 4096, 16)
    with pytest.raises(OSError, match="No such process"):
        read_memory(pid, 4096, 16)


def test_bfloat16_is_the_upper_half_of_a_float() -> None:
    numbers = [0.0, 1.0, -2.5, 0.09375]
    halves = b"".join(struct.pack("<f", number)[2:] for number in numbers)
    assert as_floats(halves, "bfloat16") == numbers
    assert as_floats(struct.pack("<4f", *numbers), "float32") == numbers
