"""What was read is of one generation, or is thrown away; whatever happens to the owner."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from bytes_owner import BytesOwner

from sglang_weight_hook import Changed, HookError
from sglang_weight_hook.memory import owner as owner_way

numpy = pytest.importorskip("numpy")
pytest.importorskip("torch")

WAYS = ["process", "owner"]


@pytest.mark.parametrize(("way", "reads"), [("process", 3000), ("owner", 400)])
def test_under_a_server_that_updates_without_pause_no_read_is_mixed(
    start_owner: Callable[..., BytesOwner], way: str, reads: int
) -> None:
    """Each tensor of this model holds one number all over, another one after each update."""
    owner = start_owner("even")
    owner.tell("spin 0.002")
    whole = changed = 0
    started = time.monotonic()
    buffer = numpy.empty(3023, numpy.int32)
    while whole < reads and time.monotonic() < started + 60:
        try:
            document = owner.read()
            with document.open_memory(via=way) as memory:
                first = memory.array("part0")[0]
                for n in range(24):
                    count = memory.read_into(f"part{n}", buffer) // 4
                    assert numpy.all(buffer[:count] == first), (n, first)
                    whole += 1
        except Changed:
            changed += 1
    owner.tell("rest")
    assert whole >= reads
    assert changed > 10  # or it would not have been tried


@pytest.mark.parametrize("way", WAYS)
def test_an_update_since_the_document_is_told(owner: BytesOwner, way: str) -> None:
    document = owner.read()
    with document.open_memory(via=way) as memory:
        memory.read("columns")
        owner.tell("fill")
        with pytest.raises(Changed, match="content generation"):
            memory.read("columns")
        with pytest.raises(Changed, match="read it again"):
            memory.check()
    with pytest.raises(Changed, match="read it again"):
        document.open_memory(via=way)
    with owner.read().open_memory(via=way) as memory:
        assert memory.array("of_int32")[0, 0] == 1


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_read_while_weights_are_changing(owner: BytesOwner, way: str) -> None:
    document = owner.read()
    memory = document.open_memory(via=way)
    memory.read("scalar")
    assert owner.tell("pause") == "updating"
    with pytest.raises(Changed, match="is updating"):
        memory.read("scalar")
    with pytest.raises(Changed, match="is updating"):
        owner.read().open_memory(via=way)
    owner.tell("go on")
    memory.close()


@pytest.mark.parametrize("way", WAYS)
def test_a_dead_owner_is_told(owner: BytesOwner, way: str) -> None:
    document = owner.read()
    with document.open_memory(via=way) as memory:
        memory.read("columns")
        owner.kill()
        with pytest.raises(Changed, match="exited"):
            memory.read("columns")
    with document.open_memory(via=way) as memory, pytest.raises(HookError, match="exited"):
        memory.read("columns")


def test_an_owner_that_dies_in_the_middle_of_a_tensor_is_told(owner: BytesOwner) -> None:
    for way in WAYS:
        memory = owner.read().open_memory(via=way)
        pieces = memory.pieces("fp8_columns", 4096)
        next(pieces)
        if way == WAYS[-1]:
            owner.kill()
            with pytest.raises(Changed, match="exited"):
                list(pieces)
        memory.close()


def test_a_stopped_owner_can_be_read_without_its_help(
    owner: BytesOwner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner_way, "_TIMEOUT", 0.3)
    expected = owner.digest("columns")
    document = owner.read()
    with document.open_memory(via="owner") as asked:
        asked.read("columns")
        owner.stop()
        with document.open_memory(via="process") as memory:
            import hashlib

            assert hashlib.sha256(memory.read("columns")).hexdigest() == expected
        with pytest.raises(HookError, match=r"has not answered within 0\.3 s"):
            asked.read("columns")


def test_a_released_model_is_not_read(owner: BytesOwner) -> None:
    document = owner.read()
    owner.tell("release")
    assert owner.read().state["state"] == "released"
    with pytest.raises(Changed, match="released"):
        document.open_memory()


def test_a_reader_may_hold_the_weights_while_an_update_waits(
    owner: BytesOwner,
) -> None:
    """Copies inside the owner go on while an event waits for the lock."""
    result: list[Any] = []
    with owner.slot.weights_held():
        document = owner.read()
        with document.open_memory(via="owner") as memory:
            memory.read("scalar")
            waiting = threading.Thread(target=lambda: result.append(owner.tell("fill")))
            waiting.start()
            time.sleep(0.3)
            for _ in range(20):
                memory.read("lm_head.weight")
            assert not result
    waiting.join(20)
    assert result == ["done"]


def test_an_update_waits_for_no_reader_that_takes_nothing(owner: BytesOwner) -> None:
    """A reader that asks for copies and reads no answer costs the server no time."""
    from sglang_weight_hook.reader.conversation import Conversation

    document = owner.read()
    tensor = document.tensor("lm_head.weight")
    line = (
        f'{{"op": "copy", "slot": "0", "instance": "{document.instance}", '
        f'"runs": [[{tensor.ptr}, {tensor.size}]]}}\n'
    ).encode()
    with Conversation(document.slot, document.state, 5.0) as silent:
        silent._peer.sendall(line * 20)
        time.sleep(0.2)
        assert owner.tell("fill") == "done"
        with owner.read().open_memory(via="owner") as memory:  # and others are served
            assert memory.array("of_int32")[0, 0] == 1


def test_an_answer_that_comes_late_is_not_taken_for_the_next_one(
    owner: BytesOwner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner_way, "_TIMEOUT", 0.3)
    with owner.read().open_memory(via="owner") as memory:
        first, second = memory.read("of_float32"), memory.read("of_int32")
        assert len(first) == len(second)  # or sizes would tell
        owner.stop()
        with pytest.raises(HookError, match="has not answered"):
            memory.read("of_float32")
        owner.go_on()
        monkeypatch.setattr(owner_way, "_TIMEOUT", 10.0)
        assert memory.read("of_int32") == second
        assert memory.read("of_float32") == first


def test_a_reader_that_is_interrupted_in_an_answer_goes_on_with_the_next(
    owner: BytesOwner, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang_weight_hook.reader.conversation import Conversation

    def interrupted(self: Any, target: Any) -> None:
        raise KeyboardInterrupt

    with owner.read().open_memory(via="owner") as memory:
        second = memory.read("of_int32")
        with monkeypatch.context() as patched:
            patched.setattr(Conversation, "_take_into", interrupted)
            with pytest.raises(KeyboardInterrupt):
                memory.read("of_float32")
        assert memory.read("of_int32") == second


def test_readers_that_take_nothing_are_no_change_of_the_weights(
    owner: BytesOwner, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang_weight_hook.reader import Busy
    from sglang_weight_hook.reader.conversation import Conversation

    monkeypatch.setattr(owner_way, "_TIMEOUT", 0.5)
    document = owner.read()
    tensor = document.tensor("lm_head.weight")
    line = (
        f'{{"op": "copy", "slot": "0", "instance": "{document.instance}", '
        f'"runs": [[{tensor.ptr}, {tensor.size}]]}}\n'
    ).encode()
    hogs = [Conversation(document.slot, document.state, 5.0) for _ in range(4)]
    for hog in hogs:
        hog._peer.sendall(line)
    time.sleep(0.3)
    with document.open_memory(via="owner") as memory:
        with pytest.raises(Busy, match="other readers are served"):
            memory.read("lm_head.weight")
        for hog in hogs:
            hog.close()
        memory.read("lm_head.weight")


def test_an_owner_that_is_not_ready_is_not_asked_again_and_again(owner: BytesOwner) -> None:
    owner.tell("fail")
    began = time.monotonic()
    with (
        owner.read().open_memory(via="owner", allow=("failed",)) as memory,
        pytest.raises(Changed, match="copies only while it"),
    ):
        memory.read("scalar")
    assert time.monotonic() - began < 5


def test_a_header_that_was_taken_away_is_no_good_one(owner: BytesOwner) -> None:
    """As by an owner that could not write it: who has it open still reads the old state."""
    import os

    with owner.read().open_memory() as memory:
        memory.read("scalar")
        os.unlink(owner.slot.path("weight_header_{}.bin"))
        with pytest.raises(Changed, match="removed or replaced"):
            memory.read("scalar")
