"""GPU memory of one process read by another, with a real driver: torch's allocator, its expandable
segments (`test_cuda_expandable_segments.py` runs all of this again), the memory saver.

What the stand-in driver cannot show: that the driver answers so, that nothing waits for a busy
device, that views are the memory itself, that nothing is pinned once it is closed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_weight_hook import Changed, HookError, open_slot
from tests.gpu.cuda_model import IN_CHILD, ROOT

torch: Any = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),
    pytest.mark.usefixtures("maps"),
]


class SharingOwner:
    """The process, and its slot as a reader sees it."""

    def __init__(self, process: subprocess.Popen[str], maps: Path) -> None:
        self.process = process
        if self.answer() != "ready":
            self.end()
            raise RuntimeError(f"the owner ended with {process.returncode}")
        self.slot = open_slot(str(maps), str(torch.cuda.current_device()))

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()

    def tell(self, what: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self.answer()

    def digests(self) -> dict[str, str]:
        return {name: self.tell(f"digest {name}") for name in self.tell("names").split()}


def begun(maps: Path, memory: str) -> SharingOwner:
    environment = {
        **os.environ,
        "SGLANG_WEIGHT_HOOK_DIR": str(maps),
        "SGLANG_WEIGHT_HOOK_SHARE": "1",
        "SGLANG_WEIGHT_HOOK_CHECK_SECONDS": "0",
        "SGLANG_WEIGHT_HOOK_QUIET_MS": "0",
        "PYTHONPATH": str(ROOT),
    }
    around: Any = contextlib.nullcontext()
    if memory == "saver":
        around = pytest.importorskip("torch_memory_saver").configure_subprocess()
        for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
            environment.pop(name, None)  # the saver goes without expandable segments
    with around:
        preload = os.environ.get("LD_PRELOAD")
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.gpu.sharing_owner", memory],
        cwd=ROOT,
        env={**environment, **({"LD_PRELOAD": preload} if preload else {})},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    return SharingOwner(process, maps)


@pytest.fixture
def start(maps: Path) -> Iterator[Callable[..., SharingOwner]]:
    """Start an owner of this test's own."""
    started: list[SharingOwner] = []

    def begin(memory: str = "torch") -> SharingOwner:
        started.append(begun(maps, memory))
        return started[-1]

    yield begin
    for owner in started:
        owner.end()


@pytest.fixture(scope="module")
def owner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharingOwner]:
    """One owner for all tests that leave it as good as it was."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    found = begun(tmp_path_factory.mktemp("sharing") / "maps", "torch")
    yield found
    found.end()


def sha(data: Any) -> str:
    return hashlib.sha256(bytes(data)).hexdigest()


def bytes_of(tensor: Any) -> bytes:
    if not tensor.numel():
        return b""
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).cpu().numpy().data)


def expected_export() -> str:
    return "posix_fd" if os.environ.get(IN_CHILD) else "legacy_ipc"


# --- bytes --------------------------------------------------------------------------------


def test_every_tensor_reads_as_the_owner_has_it(owner: SharingOwner) -> None:
    expected = owner.digests()
    with owner.slot.weights_held():
        document = owner.slot.read()
        assert {region.export for region in document.iter_regions()} == {expected_export()}
        with document.open_memory(via="cuda") as memory:
            for name, digest in expected.items():
                assert sha(memory.read(name)) == digest, name
                assert sha(b"".join(map(bytes, memory.pieces(name, 100_000)))) == digest, name
                assert memory.via(name) == "cuda"
        with document.open_memory(via="owner") as memory:
            for name, digest in expected.items():
                assert sha(memory.read(name)) == digest, name


@pytest.mark.parametrize("kind", ["pages", "saver"])
def test_memory_that_nobody_can_open_is_copied_by_the_owner(
    start: Callable[..., SharingOwner], kind: str
) -> None:
    owner = start(kind)
    expected = owner.digests()
    document = owner.slot.read()
    region = document.region_at(document.tensor("big").ptr)
    assert region is not None
    assert region.export == "none"
    if kind == "saver":
        assert region.rdma_capable is True
    with document.open_memory() as memory:
        assert memory.via("big") == "owner"
        for name, digest in expected.items():
            assert sha(memory.read(name)) == digest, name
    with document.open_memory(via="cuda") as memory, pytest.raises(HookError):
        memory.read("big")


def test_what_regions_say_of_rdma_is_what_the_driver_says(owner: SharingOwner) -> None:
    document = owner.slot.read()
    assert {type(region.rdma_capable) for region in document.iter_regions()} == {bool}


def test_a_reader_that_numbers_its_gpus_otherwise_finds_the_right_one(owner: SharingOwner) -> None:
    gpu_uuid = owner.slot.read().identity["gpu_uuid"]
    code = (
        "import hashlib, sys, sglang_weight_hook as hook\n"
        "with hook.open_slot(*sys.argv[1:]).read().open_memory(via='cuda') as memory:\n"
        "    print(hashlib.sha256(memory.read('big')).hexdigest())\n"
        "assert 'torch' not in sys.modules\n"
    )
    arguments = [sys.executable, "-c", code, owner.slot.directory, owner.slot.name]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu_uuid, "PYTHONPATH": str(ROOT)}
    said = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert said.stdout.strip() == owner.tell("digest big"), said.stderr
    environment["CUDA_VISIBLE_DEVICES"] = ""
    said = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert "NotReadable" in said.stderr
    assert "CUDA_VISIBLE_DEVICES" in said.stderr


# --- views --------------------------------------------------------------------------------


def test_a_view_is_the_owners_memory_without_a_copy(owner: SharingOwner) -> None:
    expected = owner.digests()
    document = owner.slot.read()
    with document.open_memory() as memory:
        before = torch.cuda.memory_allocated()
        views = {name: memory.tensor(name) for name in expected}
        assert torch.cuda.memory_allocated() == before
        for name, view in views.items():
            meta = document.tensor(name)
            assert (str(view.dtype), tuple(view.shape)) == (meta.dtype, meta.shape), name
            if meta.size:
                assert view.device == torch.device("cuda", torch.cuda.current_device()), name
                assert tuple(view.stride()) == meta.stride, name
            assert sha(bytes_of(view)) == expected[name], name
        qweight = views["layers.0.qweight"]
        assert qweight.dtype == torch.float8_e4m3fn
        assert torch.equal(qweight.float().cpu().nan_to_num(), qweight.cpu().float().nan_to_num())
        # What the owner writes is there at once: no copy.
        owner.tell("fill")
        assert sha(bytes_of(views["big"])) == owner.tell("digest big") != expected["big"]
        with pytest.raises(Changed):
            memory.check()
        with pytest.raises(Changed):
            memory.tensor("big")
        del views, view, qweight
    torch.cuda.synchronize()


def test_views_that_outlive_their_memory_are_warned_of(owner: SharingOwner) -> None:
    memory = owner.slot.read().open_memory()
    view = memory.tensor("big")
    with pytest.warns(ResourceWarning, match="1 tensors are still in use"):
        memory.close()
    del view
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        memory.close()
    torch.zeros(8, device="cuda").sum().item()  # the context is as good as before


def test_work_on_views_is_done_before_they_are_closed(owner: SharingOwner) -> None:
    expected = owner.tell("digest big")
    with owner.slot.read().open_memory() as memory:
        torch.cuda._sleep(int(0.5e9))
        copy = memory.tensor("big").clone()  # queued behind the sleep
    assert sha(bytes_of(copy)) == expected


# --- the owner ----------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["cuda", "owner"])
def test_nobody_waits_for_a_busy_device(owner: SharingOwner, way: str) -> None:
    expected = owner.tell("digest big")
    document = owner.slot.read()
    with document.open_memory(via=way) as memory:
        memory.read("layers.0.scale")  # what is made once is made
    owner.tell("busy 6")
    started = time.monotonic()
    with document.open_memory(via=way) as memory:
        assert sha(memory.read("big")) == expected
    took = time.monotonic() - started
    assert owner.tell("idle?") == "False", f"it took {took} s, and the device was done"


@pytest.mark.parametrize("way", ["cuda", "owner"])
def test_what_an_update_has_queued_is_waited_for(owner: SharingOwner, way: str) -> None:
    started = time.monotonic()
    owner.tell("queue 2")
    assert time.monotonic() - started < 1, "the update has waited for the device"
    document = owner.slot.read()
    assert document.state["state"] == "ready"
    with document.open_memory(via=way) as memory:
        values = memory.read("big")
    assert values == b"\x4d" * len(values)


@pytest.mark.parametrize("way", ["cuda", "owner"])
def test_a_graph_that_the_server_captures_meanwhile_is_not_broken(
    start: Callable[..., SharingOwner], way: str
) -> None:
    """In the default mode, in which a call of another thread that allocates breaks a capture."""
    owner = start()
    expected = owner.tell("digest big")
    document = owner.slot.read()
    assert owner.tell("capture") == "capturing"
    with document.open_memory(via=way) as memory:  # the first of all, for which buffers are made
        assert sha(memory.read("big")) == expected
    assert owner.tell("go on") == "1024"


@pytest.mark.parametrize("way", ["cuda", "owner"])
def test_an_event_and_a_death_are_told(start: Callable[..., SharingOwner], way: str) -> None:
    owner = start()
    with owner.slot.read().open_memory(via=way) as memory:
        pieces = memory.pieces("big", 1 << 20)
        next(pieces)
        owner.tell("fill")
        with pytest.raises(Changed, match="have changed"):
            list(pieces)
    with owner.slot.read().open_memory(via=way) as memory:
        pieces = memory.pieces("big", 1 << 20)
        next(pieces)
        owner.process.kill()
        owner.process.wait()
        with pytest.raises(Changed, match="exited"):
            list(pieces)
    torch.zeros(8, device="cuda").sum().item()


def test_what_is_closed_pins_nothing_of_the_owners(owner: SharingOwner) -> None:
    with owner.slot.read().open_memory(via="cuda") as memory:
        memory.read("big")
    free = int(owner.tell("free"))
    for _ in range(20):
        with owner.slot.read().open_memory(via="cuda") as memory:
            memory.read("big")
            view = memory.tensor("layers.0.w_kc")
            del view
    assert abs(int(owner.tell("free")) - free) <= 2 << 20
    descriptors = f"/proc/{owner.process.pid}/fd"
    before = len(os.listdir(descriptors))
    with owner.slot.read().open_memory(via="cuda") as memory:
        memory.read("big")
    time.sleep(0.2)
    assert len(os.listdir(descriptors)) <= before
