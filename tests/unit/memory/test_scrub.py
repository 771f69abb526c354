"""A flipped bit is found and named; an update is not one."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from bytes_owner import BytesOwner

from sglang_weight_hook.memory.scrub import Baseline, Corruption, Pass, Read, Scrubber, Waiting
from sglang_weight_hook.reader import Tensor

numpy = pytest.importorskip("numpy")
pytest.importorskip("torch")


def until(events: Iterator[Any], kind: type, seconds: float = 60.0) -> list[Any]:
    """What happened up to the first event of ``kind``."""
    deadline, seen = time.monotonic() + seconds, []
    for event in events:
        if not isinstance(event, Read):
            seen.append(event)
        if isinstance(event, kind):
            return seen
        assert time.monotonic() < deadline, seen
        if isinstance(event, Read) and not event.bytes:
            time.sleep(0.01)
    raise AssertionError(seen)


def flip(owner: BytesOwner, tensor: Tensor, byte: int, bit: int) -> tuple[int, ...]:
    """Flip a bit of a value through /proc/PID/mem; the element's index.  ``byte``: row-major."""
    element, inside = divmod(byte, tensor.itemsize)
    index = []
    for length in reversed(tensor.shape):
        element, number = divmod(element, length)
        index.append(number)
    index.reverse()
    address = tensor.ptr + sum(n * s for n, s in zip(index, tensor.stride)) * tensor.itemsize
    with open(f"/proc/{owner.process.pid}/mem", "r+b", buffering=0) as memory:
        memory.seek(address + inside)
        (value,) = memory.read(1)
        memory.seek(address + inside)
        memory.write(bytes([value ^ 1 << bit]))
    return tuple(index)


def test_any_flipped_bit_is_found_with_its_place_and_its_value_before(owner: BytesOwner) -> None:
    draws = random.Random(20261124)
    document = owner.read()
    tensors = [t for t in document.iter_tensors() if t.size and t.name not in ("windows",)]
    events = Scrubber(owner.slot).events()
    (baseline,) = until(events, Baseline)
    assert baseline.tensors == len(tensors) + 1
    assert [event.corruptions for event in until(events, Pass)] == [0]
    for _ in range(40):
        tensor = draws.choice(tensors)
        with document.open_memory() as memory:
            before = memory.read(tensor.name)
        byte, bit = draws.randrange(tensor.size), draws.randrange(8)
        if tensor.name == "expanded":  # each value is there once, and read six times
            byte %= 24 * 4
        index = flip(owner, tensor, byte, bit)
        found = [event for event in until(events, Pass) if isinstance(event, Corruption)]
        with document.open_memory() as memory:
            after = memory.read(tensor.name)
        if tensor.name == "expanded":
            # It is there six times.
            assert [each.element for each in found if each.tensor == "expanded"] == [None]
            continue
        # Two of the tensors are views of one storage, and each tells.
        (event,) = [each for each in found if each.tensor == tensor.name]
        start = byte // tensor.itemsize * tensor.itemsize
        value = slice(start, start + tensor.itemsize)
        assert (event.tensor, event.element) == (tensor.name, index)
        assert event.bit == (byte % tensor.itemsize) * 8 + bit
        assert event.bits == 1
        assert int(event.before, 16) == int.from_bytes(before[value], "little")
        assert int(event.after, 16) == int.from_bytes(after[value], "little")
        assert [event.corruptions for event in until(events, Pass)] == [0]  # told once


def test_a_word_and_a_block_that_were_written_over_are_told_apart(owner: BytesOwner) -> None:
    events = Scrubber(owner.slot).events()
    until(events, Baseline)
    tensor = owner.read().tensor("packed")
    for byte, bit in ((4000, 1), (4001, 7), (4003, 0)):
        flip(owner, tensor, byte, bit)
    (event,) = [e for e in until(events, Pass) if isinstance(e, Corruption)]
    assert (event.element, event.bit, event.bits) == ((15, 40), None, 3)
    for byte in (0, 400, 70_000 % tensor.size):
        flip(owner, tensor, byte, 2)
    (event,) = [e for e in until(events, Pass) if isinstance(e, Corruption)]
    assert (event.element, event.before, event.size) == (None, None, 65536)


def test_an_update_gives_a_new_baseline_and_no_alarm(owner: BytesOwner) -> None:
    events = Scrubber(owner.slot).events()
    first = until(events, Baseline)[-1]
    owner.tell("fill")
    seen = until(events, Baseline)
    assert not [event for event in seen if isinstance(event, Corruption)]
    assert seen[-1].content_generation == first.content_generation + 1
    assert until(events, Pass)[-1].corruptions == 0


def test_under_updates_without_pause_there_is_no_false_alarm(
    start_owner: Callable[..., BytesOwner],
) -> None:
    owner = start_owner("even")
    owner.tell("spin 0.05")
    deadline = time.monotonic() + 8
    seen = []
    for event in Scrubber(owner.slot).events():
        seen.append(event)
        if time.monotonic() > deadline:
            break
    owner.tell("rest")
    assert not [event for event in seen if isinstance(event, Corruption)]
    assert len([event for event in seen if isinstance(event, Baseline)]) > 3


def test_it_waits_out_a_release_and_a_restart(
    owner: BytesOwner, start_owner: Callable[..., BytesOwner]
) -> None:
    events = Scrubber(owner.slot).events()
    until(events, Baseline)
    owner.tell("release")
    assert "is released" in until(events, Waiting)[-1].why
    owner.kill()
    assert "has exited" in until(events, Waiting)[-1].why
    start_owner()
    assert until(events, Baseline)[-1].tensors > 10


def test_what_is_volatile_is_left_alone(owner: BytesOwner) -> None:
    scrubber = Scrubber(owner.slot, lambda tensor: tensor.name == "packed")
    assert until(scrubber.events(), Baseline)[-1].bytes == 256 * 64 * 4
    raw = dict(owner.read().tensors["packed"], volatile=True)
    assert not scrubber._covers(Tensor.from_raw("packed", raw))
