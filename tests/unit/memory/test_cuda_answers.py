"""The operation ``share`` of the control socket: what an owner answers, and what a reader believes.

Over a stand-in for the CUDA driver: there is no GPU here (`fake_cuda/processes.py`).
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bytes_owner import BytesOwner

from sglang_weight_hook.layout.sharing import (
    COPY_BYTES,
    COPY_RUNS,
    LEGACY_IPC,
    NO_EXPORT,
    POSIX_FD,
    SHARED_ALLOCATIONS,
)
from sglang_weight_hook.publisher.devices import cuda_export
from sglang_weight_hook.reader.conversation import Conversation

pytest.importorskip("torch")

from tests.unit.memory.fake_cuda import processes
from tests.unit.memory.fake_cuda.processes import UUID, Gpu

gpu = processes.gpu
PIECE = 65536
GPU_UUID = f"GPU-{UUID[:8]}-{UUID[8:12]}-{UUID[12:16]}-{UUID[16:20]}-{UUID[20:]}"


def asked(owner: BytesOwner, **request: Any) -> tuple[dict[str, Any], int]:
    """What the owner answers, and how many descriptors came with it."""
    document = owner.read()
    whole = {"op": "share", "slot": "0", "instance": document.instance, **request}
    with Conversation(owner.slot, document.state, 5.0) as conversation:
        answer = conversation.ask(whole)
        descriptors = conversation.take_descriptors()
        for descriptor in descriptors:
            assert "memfd" in os.readlink(f"/proc/self/fd/{descriptor}")
            os.close(descriptor)
    return answer, len(descriptors)


# --- the owner's side ---------------------------------------------------------------------


def test_an_answer_names_the_allocations_under_what_was_asked_for(gpu: Gpu) -> None:
    owner = gpu.owner()
    document = owner.read()
    plain = document.tensor("ipc.plain")
    answer, descriptors = asked(owner, ptr=plain.ptr, size=plain.span)
    assert (answer["ok"], answer["device_uuid"], answer["end"]) == (True, GPU_UUID, plain.end)
    ((allocation),) = answer["allocations"]
    region = document.region_at(plain.ptr)
    assert region is not None
    assert (allocation["ptr"], allocation["size"]) == (
        region.allocation_ptr,
        region.allocation_size,
    )
    assert allocation["export"] == "legacy_ipc"
    assert len(bytes.fromhex(allocation["handle"])) == 64
    assert descriptors == 0

    big = document.tensor("fd.big")
    answer, descriptors = asked(owner, ptr=big.ptr, size=big.span)
    assert descriptors == len(answer["allocations"]) >= 5
    position = big.ptr
    for allocation in answer["allocations"]:
        assert allocation == {"ptr": allocation["ptr"], "size": PIECE, "export": "posix_fd"}
        assert allocation["ptr"] <= position < allocation["ptr"] + PIECE
        position = allocation["ptr"] + PIECE
    assert position >= big.end == answer["end"]

    saver = document.tensor("saver.plain")
    answer, descriptors = asked(owner, ptr=saver.ptr, size=saver.span)
    assert {each["export"] for each in answer["allocations"]} == {"none"}
    assert descriptors == 0


def test_an_answer_has_so_many_allocations_and_says_where_it_ends(gpu: Gpu) -> None:
    owner = gpu.owner()
    before = owner.descriptors()
    large = owner.read().tensor("fd.large")
    answers, position = 0, large.ptr
    while position < large.end:
        answer, descriptors = asked(owner, ptr=position, size=large.end - position)
        assert descriptors == len(answer["allocations"]) <= SHARED_ALLOCATIONS
        assert answer["end"] > position
        position, answers = answer["end"], answers + 1
    assert answers == -(-(large.span // PIECE + 1) // SHARED_ALLOCATIONS)
    processes.descriptors_settle(owner, before)


def test_what_is_outside_of_the_published_regions_is_not_handed_out(gpu: Gpu) -> None:
    owner = gpu.owner()
    document = owner.read()
    regions = list(document.iter_regions())
    for ptr, size in (
        (regions[0].ptr - 1, 2),
        (regions[-1].end - 1, 2),
        (document.tensor("ipc.wide").end + (1 << 20), 1),  # in the same allocation
        (regions[0].ptr, 1 << 40),
        (4096, 1),
    ):
        answer, descriptors = asked(owner, ptr=ptr, size=size)
        assert (answer["error"], descriptors) == ("changed", 0), (ptr, size)
    inside = {"ptr": regions[0].ptr, "size": 1}
    assert asked(owner, **inside)[0]["ok"] is True
    assert asked(owner, **inside, instance="another")[0]["error"] == "changed"
    assert asked(owner, **inside, slot="7")[0]["error"] == "no_slot"
    assert asked(owner, ptr=0, size=0)[0]["allocations"] == []
    for wrong in ({}, {"ptr": 1}, {"ptr": -1, "size": 1}, {"ptr": True, "size": 1},
                  {"ptr": 1 << 64, "size": 1}, {"ptr": "1", "size": 1}, {"ptr": 1.5, "size": 1},
                  {"ptr": None, "size": [1]}):  # fmt: skip
        assert asked(owner, **wrong)[0]["error"] == "malformed", wrong


def test_nothing_is_handed_out_while_weights_are_changing(gpu: Gpu) -> None:
    owner = gpu.owner()
    plain = owner.read().tensor("fd.plain")
    assert owner.tell("pause") == "updating"
    answer, descriptors = asked(owner, ptr=plain.ptr, size=plain.span)
    assert (answer["error"], descriptors) == ("busy", 0)
    assert owner.tell("go on") == "done"
    assert asked(owner, ptr=plain.ptr, size=plain.span)[0]["ok"] is True
    owner.tell("release")
    assert asked(owner, ptr=plain.ptr, size=plain.span)[0]["error"] == "busy"


@pytest.mark.parametrize(
    ("types", "export"),
    [(0, "none"), (1, "posix_fd"), (2, "none"), (8, "fabric"), (9, "posix_fd")],
)
def test_what_memory_was_made_exportable_by_says_how_it_is_opened(types: int, export: str) -> None:
    """CUmemAllocationHandleType: 1 a descriptor, 2 and 4 of Windows, 8 fabric."""
    properties = cuda_export._Properties(requested_handle_types=types)
    assert cuda_export._export_by(properties) == export


def test_a_cpu_servers_memory_is_not_opened(start_owner: Any) -> None:
    owner = start_owner()
    region = next(owner.read().iter_regions())
    assert (region.export, region.rdma_capable) == ("none", True)
    answer, _ = asked(owner, ptr=region.ptr, size=region.size)
    assert (answer["ok"], answer["error"]) == (False, "failed")


def test_another_user_is_handed_nothing(gpu: Gpu) -> None:
    if os.geteuid() != 0:
        pytest.skip("becoming another user needs root")
    gpu.owner()
    for folder in (gpu.maps, *gpu.maps.parents):  # so that only the owner itself can refuse
        if folder.stat().st_mode & 0o055 != 0o055:
            folder.chmod(0o755)
    for path in gpu.maps.iterdir():
        path.chmod(0o666)
    code = """
import sglang_weight_hook.memory.backends
memory = slot.read().open_memory(via="cuda")  # which has asked nothing yet
os.setresuid(65534, 65534, 0)
with refused(NotReadable, "hung up without an answer|another user's"):
    memory.read("fd.plain")
assert open_here() == NOTHING
"""
    gpu.read(code)


def test_the_format_page_has_the_limits_and_the_words_of_the_answers() -> None:
    text = (processes.ROOT / "docs" / "format.md").read_text()
    section = text[text.index("### Copies and shared memory") :]
    for number in (COPY_RUNS, COPY_BYTES, SHARED_ALLOCATIONS):
        assert f" {number} " in section, number
    for source in ("sharing.py", "background.py", "control.py"):
        code = (processes.ROOT / "sglang_weight_hook" / "publisher" / source).read_text()
        words = set(re.findall(r'refused\("(\w+)"', code))
        assert words
        for word in words:
            assert f"`{word}`" in text[text.index("## Control socket") :], word
    for word in (LEGACY_IPC, POSIX_FD, NO_EXPORT):
        assert f"`{word}`" in section, word


# --- the reader's side --------------------------------------------------------------------


class Liar(threading.Thread):
    """Answers in the owner's place, each time with something else that is wrong."""

    def __init__(self, path: Path, document: Any, seed: int) -> None:
        super().__init__(daemon=True)
        self.random = random.Random(seed)
        self.document = document
        self.answers = 0
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)  # for a short name
        self.listener.bind(f"/proc/self/fd/{folder}/{path.name}")
        os.close(folder)
        self.listener.listen(8)

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                peer, _ = self.listener.accept()
                with peer, contextlib.suppress(OSError, ValueError):
                    self.talk(peer)

    def talk(self, peer: socket.socket) -> None:
        file = peer.makefile("rb")
        while True:
            line = file.readline()
            if not line:
                return
            request = json.loads(line)
            if request["size"] == 0 and self.random.random() < 0.9:
                peer.sendall(b'{"ok": true, "end": 0, "allocations": []}\n')
                continue
            self.answers += 1
            answer, descriptors = self.lie(request)
            opened = [os.open(path, os.O_RDONLY) for path in descriptors]
            try:
                if opened:
                    socket.send_fds(peer, [answer], opened)
                else:
                    peer.sendall(answer)
            finally:
                for descriptor in opened:
                    os.close(descriptor)
            if not answer.endswith(b"\n"):
                return

    def lie(self, request: dict[str, Any]) -> tuple[bytes, list[str]]:
        choose = self.random
        region = self.document.region_at(request["ptr"]) or next(self.document.iter_regions())
        base, size = region.allocation_ptr, region.allocation_size
        numbers = [0, -1, 1, base, base + 1, size, 1 << 61, 1 << 63, 1 << 64, 1.5, True, None, "1",
                   [], {}, base + size, request["ptr"]]  # fmt: skip
        handles = ["", "00" * 64, "00" * 63, "0" * 129, "zz" * 64, None, 7, "fa" * 64, "00" * 65,
                   b"fakecud\0".hex() + "ff" * 56]  # fmt: skip
        entry: Any = {"ptr": base, "size": size, "export": "legacy_ipc", "handle": "00" * 64}
        entries: list[Any] = [entry]
        descriptors: list[str] = []
        if choose.random() < 0.5:
            entry["export"] = "posix_fd"
            descriptors = ["/dev/null"]
        answer: dict[str, Any] = {
            "ok": True,
            "device_uuid": GPU_UUID,
            "end": region.end,
            "allocations": entries,
        }
        for _ in range(choose.randint(1, 3)):
            what = choose.randrange(12)
            if what == 0:
                entry[choose.choice(["ptr", "size"])] = choose.choice(numbers)
            elif what == 1:
                entry["handle"] = choose.choice(handles)
            elif what == 2:
                entry["export"] = choose.choice(["", "fabric", "none", None, 1, "posix_fd", []])
            elif what == 3:
                descriptors = ["/dev/null", "/dev/zero", "/proc/self/maps"][: choose.randrange(4)]
            elif what == 4:
                descriptors = ["/dev/null"] * choose.choice([33, 64, 200])
            elif what == 5:
                answer["allocations"] = choose.choice([None, {}, "x", [], [None], [[]], 5])
            elif what == 6:
                entries += [dict(entry)] * choose.choice([1, 31, 32, 500])
            elif what == 7:
                answer["device_uuid"] = choose.choice(["GPU-0", 5, [], None])
            elif what == 8:
                entry.pop(choose.choice(list(entry)), None)
                entry["more"] = "fields"
            elif what == 9:
                answer["ok"] = choose.choice([False, None, 1, "true"])
                answer["error"] = choose.choice(["failed", "changed", "unknown", None, [], "odd"])
                answer["message"] = choose.choice([None, "x" * 5000, [], "one\\ntwo", 5])
            elif what == 10:
                small = [{**entry, "ptr": base + n, "size": 1} for n in range(32)]
                answer["allocations"] = small
            else:
                text = choose.choice([b"\n", b"{}\n", b"[]\n", b"null\n", b"{", b"\xff\xfe\n",
                                      b"x" * 5000 + b"\n", b'{"ok": true}\n', b""])  # fmt: skip
                return text, descriptors
        return json.dumps(answer).encode() + b"\n", descriptors


@pytest.fixture
def liar(gpu: Gpu) -> Iterator[tuple[BytesOwner, Liar]]:
    """An owner, and another that answers in its place."""
    owner = gpu.owner()
    found = Liar(gpu.maps / "weight_hook_1.sock", owner.read(), 11)
    path = gpu.maps / "weight_state_0.json"
    state = json.loads(path.read_text())
    state["control"] = "weight_hook_1.sock"
    path.write_text(json.dumps(state))
    found.start()
    yield owner, found
    found.listener.close()


def test_a_reader_believes_nothing_that_it_is_told(gpu: Gpu, liar: tuple[BytesOwner, Liar]) -> None:
    code = """
ours = descriptors()
said = set()
for number in range(400):
    for name in ("fd.big", "ipc.plain"):
        try:
            with slot.read().open_memory(via="cuda") as memory:
                memory.read(name)
        except HookError as error:
            assert "\\n" not in str(error), str(error)
            said.add(str(error).partition(":")[0][:60])
        else:
            raise AssertionError("it was believed")
        assert open_here() == NOTHING, open_here()
        assert descriptors() == ours
print(len(said))
"""
    kinds = gpu.read(code)
    assert liar[1].answers >= 400
    assert int(kinds) > 4  # or the lies were all of one kind


def test_an_owner_that_is_busy_is_asked_again_ever_less_often_and_not_for_long(gpu: Gpu) -> None:
    gpu.owner()
    code = """
from sglang_weight_hook.memory import cuda_share
from sglang_weight_hook.reader.conversation import Conversation
asked = []
def busy(self, request):
    asked.append(time.monotonic())
    return {"ok": False, "error": "busy", "message": "it is at work"}
Conversation.ask = busy
started = time.monotonic()
with refused(Changed, "it is at work.*after 2 s"):
    slot.read().open_memory(via="cuda").read("ipc.plain")
assert 1 < time.monotonic() - started < 6
assert 10 < len(asked) < 60, len(asked)  # 2 s in pauses of 2 ms would be a thousand
assert asked[-1] - asked[-2] > 0.045
assert open_here() == NOTHING
"""
    gpu.read(code)


@pytest.mark.parametrize("kind", ["NoSocket", "NoAnswer", "ControlError"])
@pytest.mark.parametrize("when", ["ask", "_connect"])
def test_an_owner_that_could_not_be_asked_says_nothing_of_its_memory(
    gpu: Gpu, kind: str, when: str
) -> None:
    """It is not readable for now, and neither changed nor out of reach."""
    gpu.owner()
    code = f"""
from sglang_weight_hook.reader import errors
from sglang_weight_hook.reader.conversation import Conversation
ours = descriptors()
document = slot.read()
real = Conversation.{when}
def fails(self, *arguments):
    raise errors.{kind}("nobody is there; ask again")
for way in None, "cuda":
    Conversation.{when} = fails
    with refused(errors.{kind}, "^nobody is there; ask again$"):
        document.open_memory(via=way).read("ipc.plain")
    Conversation.{when} = real
with document.open_memory(via="cuda") as memory:
    Conversation.{when} = fails
    with refused(errors.{kind}, "^nobody is there; ask again$"):
        memory.read("ipc.plain")
    Conversation.{when} = real
    memory.read("ipc.plain")  # it was not remembered as a refusal
assert open_here() == NOTHING
assert descriptors() == ours
"""
    gpu.read(code)


def test_a_socket_of_another_users_is_no_way(gpu: Gpu) -> None:
    gpu.owner()
    code = """
from sglang_weight_hook.reader import NotAllowed
from sglang_weight_hook.reader.conversation import Conversation
def refuses(self, request):
    raise NotAllowed("it is another user's")
Conversation.ask = refuses
with refused(NotReadable, "^it is another user's$"):
    slot.read().open_memory(via="cuda").read("ipc.plain")
"""
    gpu.read(code)
