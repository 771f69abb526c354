"""Values read from another process are the ones that it says it has."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bytes_owner import BytesOwner

from sglang_weight_hook import HookError, NotReadable
from sglang_weight_hook.memory import backends

torch = pytest.importorskip("torch")
numpy = pytest.importorskip("numpy")

WAYS = ["process", "owner"]


def sha(data: Any) -> str:
    return hashlib.sha256(bytes(data)).hexdigest()


def bytes_of(tensor: Any) -> bytes:
    return bytes(tensor.reshape(-1).view(torch.uint8).numpy().data) if tensor.numel() else b""


@pytest.mark.parametrize("way", WAYS)
def test_every_dtype_and_stride_reads_as_it_is(owner: BytesOwner, way: str) -> None:
    names = owner.names()
    assert len(names) > 20
    document = owner.read()
    with document.open_memory(via=way) as memory:
        for name in names:
            expected = owner.digest(name)
            assert sha(memory.read(name)) == expected, name
            assert sha(b"".join(map(bytes, memory.pieces(name, 1000)))) == expected, name
            buffer = bytearray(document.tensor(name).size + 3)
            assert memory.read_into(name, buffer) == len(buffer) - 3
            assert sha(buffer[:-3]) == expected, name
            tensor = memory.tensor(name)
            assert sha(bytes_of(tensor)) == expected, name
            meta = document.tensor(name)
            assert (str(tensor.dtype), tuple(tensor.shape)) == (meta.dtype, meta.shape)
            assert memory.via(name) == way


def test_arrays_have_numpys_types_and_ml_dtypes_for_the_others(owner: BytesOwner) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    with owner.read().open_memory() as memory:
        assert memory.array("of_float32").dtype == numpy.float32
        assert memory.array("of_bfloat16").dtype == ml_dtypes.bfloat16
        assert memory.array("of_float8_e4m3fn").dtype == ml_dtypes.float8_e4m3fn
        assert memory.array("scalar") == 3.5
        assert memory.array("empty").shape == (0, 4)
        for name in owner.names():
            values = memory.array(name)
            assert sha(values.tobytes()) == owner.digest(name), name


def test_an_alias_reads_as_its_tensor(owner: BytesOwner) -> None:
    document = owner.read()
    (alias,) = document.tensor("lm_head.weight").aliases
    with document.open_memory() as memory:
        assert memory.read(alias) == memory.read("lm_head.weight")


def test_a_copy_is_one(owner: BytesOwner) -> None:
    with owner.read().open_memory() as memory:
        copy = memory.array("of_float32")
        copy[:] = 0
        assert sha(memory.read("of_float32")) == owner.digest("of_float32")


def test_without_numpy_and_torch_bytes_can_be_read(
    owner: BytesOwner, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    code = (
        "import hashlib, sys\n"
        "sys.modules.update(numpy=None, torch=None, ml_dtypes=None, safetensors=None)\n"
        "import sglang_weight_hook as hook\n"
        "slot = hook.open_slot(sys.argv[1], '0')\n"
        "with slot.weights_held(), slot.read().open_memory() as memory:\n"
        "    for name in 'padded', 'columns', 'steps', 'scalar':\n"
        "        print(hashlib.sha256(memory.read(name)).hexdigest())\n"
        "    for get in memory.array, memory.tensor:\n"
        "        try:\n"
        "            get('padded')\n"
        "        except hook.NotReadable as error:\n"
        "            print(error)\n"
    )
    lines = run_python("-c", code, owner.slot.directory).stdout.splitlines()
    assert lines[:4] == [owner.digest(name) for name in ("padded", "columns", "steps", "scalar")]
    assert "needs numpy" in lines[4]
    assert "tensors need torch" in lines[5]


@pytest.mark.parametrize(
    ("buffer", "says"),
    [
        (bytearray(3), "takes 480 bytes and the buffer has 3"),
        (bytes(480), "read-only"),
        ("text", "give a bytearray"),
        (memoryview(bytearray(2000))[::2], "contiguous"),
    ],
)
def test_a_buffer_that_will_not_do_is_refused(owner: BytesOwner, buffer: Any, says: str) -> None:
    with owner.read().open_memory() as memory, pytest.raises(HookError, match=says):
        memory.read_into("of_float16", buffer)


def test_what_there_is_not_is_refused(owner: BytesOwner) -> None:
    document = owner.read()
    with pytest.raises(HookError, match="no way 'carrier pigeon'"):
        document.open_memory(via="carrier pigeon")
    with document.open_memory() as memory, pytest.raises(HookError, match="no tensor 'nothing'"):
        memory.read("nothing")
    with document.open_memory(via="cuda") as memory, pytest.raises(NotReadable, match="by cuda"):
        memory.read("scalar")
    with pytest.raises(HookError, match="was closed"):
        memory.read("scalar")


def test_an_owner_that_shares_nothing_says_how_to_start_it(
    start_owner: Callable[..., BytesOwner],
) -> None:
    owner = start_owner(SGLANG_WEIGHT_HOOK_SHARE="0")
    with (
        owner.read().open_memory(via="owner") as memory,
        pytest.raises(NotReadable, match="start the server with SGLANG_WEIGHT_HOOK_SHARE=1"),
    ):
        memory.read("scalar")


def test_an_owner_that_the_kernel_hides_is_read_through_its_socket(
    owner: BytesOwner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise NotReadable("the kernel refuses")

    monkeypatch.setitem(backends.WAYS, "process", refused)
    with owner.read().open_memory() as memory:
        assert sha(memory.read("columns")) == owner.digest("columns")
        assert memory.via("columns") == "owner"


def test_a_saved_map_has_no_bytes(owner: BytesOwner, tmp_path: Path) -> None:
    import shutil

    from sglang_weight_hook import open_file

    saved = tmp_path / "saved.json"
    shutil.copy(owner.slot.path("weight_layout_{}.json"), saved)
    with pytest.raises(HookError, match="saved copy"):
        open_file(str(saved)).open_memory()


def test_what_is_on_no_device_is_refused(owner: BytesOwner) -> None:
    document = owner.read()
    document.tensors["scalar"]["device"] = "meta"
    with document.open_memory() as memory, pytest.raises(NotReadable, match="device meta"):
        memory.read("scalar")


def test_reading_leaves_nothing_open(owner: BytesOwner) -> None:
    before = owner.descriptors()
    for way in WAYS:
        with owner.read().open_memory(via=way) as memory:
            memory.read("columns")
    for _ in range(200):  # the owner closes its end as soon as it looks
        if owner.descriptors() == before:
            break
        owner.tell("names")
    assert owner.descriptors() == before


def test_a_reader_that_was_silent_for_long_asks_anew(
    owner: BytesOwner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The owner has closed the connection meanwhile, as it does after 30 seconds."""
    with owner.read().open_memory(via="owner") as memory:
        expected = memory.read("columns")
        asked = memory._backends._open["owner"]
        asked._conversation.close()  # type: ignore[attr-defined]
        monkeypatch.setattr(asked, "_asked_at", asked._asked_at - 20)  # type: ignore[attr-defined]
        assert memory.read("columns") == expected
