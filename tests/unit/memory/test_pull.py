"""All weights at once, in views of one buffer; and again where an update came between."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bytes_owner import BytesOwner
from engine_owner import needs, started

from sglang_weight_hook import Changed, HookError, open_file
from sglang_weight_hook.memory.pull import pull
from sglang_weight_hook.reader import NotReady

numpy = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")

pytestmark = pytest.mark.filterwarnings(
    "ignore::sglang_weight_hook.memory.errors.TransferWarning"  # they are all on this machine
)
WAYS = ["process", "owner", "mooncake", "nixl"]
Start = Callable[..., BytesOwner]


@pytest.fixture
def start(
    start_python: Callable[..., Any], maps: Path, start_owner: Callable[..., BytesOwner]
) -> Start:
    def start_it(way: str, kind: str = "odd") -> BytesOwner:
        if way in ("process", "owner"):
            return start_owner(kind)
        needs(way)
        return started(start_python, maps, way, kind)

    return start_it


@pytest.mark.parametrize("way", WAYS)
def test_every_tensor_of_every_type_and_stride_is_a_view_of_what_was_pulled(
    start: Start, way: str
) -> None:
    owner = start(way)
    pulled = pull(owner.slot, via=way)
    assert len(pulled) > 20
    assert pulled.attempts == 1
    for name in owner.names():
        expected = owner.digest(name)
        assert hashlib.sha256(pulled.read(name)).hexdigest() == expected, name
        tensor = pulled.tensor(name)
        data = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor).view(-1)
        data = data.view(torch.uint8).numpy().tobytes() if data.numel() else b""
        assert hashlib.sha256(data).hexdigest() == expected, name
        array = pulled.array(name)
        assert hashlib.sha256(numpy.ascontiguousarray(array).tobytes()).hexdigest() == expected
        assert tuple(array.shape) == tuple(tensor.shape)
    # Tied weights are one here, too.
    assert pulled.tensor("embed.weight").data_ptr() == pulled.tensor("lm_head.weight").data_ptr()
    assert pulled.size < sum(tensor.size for tensor in pulled.tensors.values())  # `expanded`


@pytest.mark.parametrize("way", ["process", "mooncake", "nixl"])
def test_under_a_server_that_updates_every_pull_is_of_one_generation(
    start: Start, way: str
) -> None:
    """Each tensor of this model holds one number all over, the same in all, and then another."""
    owner = start(way, "even")
    owner.tell("spin 0.03")
    seen = set()
    again = 0
    began = time.monotonic()
    while len(seen) < 20 and time.monotonic() < began + 60:
        try:
            pulled = pull(owner.slot, via=way)
        except Changed:  # it does not try for ever
            continue
        again += pulled.attempts - 1
        numbers = {int(n) for name in pulled for n in numpy.unique(pulled.array(name))}
        assert len(numbers) == 1, numbers
        seen |= numbers
    owner.tell("rest")
    assert len(seen) >= 20
    assert again > 0  # or it would not have been tried


@pytest.mark.parametrize("way", ["process", "mooncake"])
def test_a_pull_ends_after_so_many_attempts(start: Start, way: str) -> None:
    owner = start(way)
    assert owner.tell("pause") == "updating"
    with pytest.raises(HookError, match=r"tried 2 times"):
        pull(owner.slot, via=way, attempts=2)
    with pytest.raises(NotReady):
        pull(owner.slot, via=way, attempts=1)
    owner.tell("go on")
    with pytest.raises(HookError, match="no such tensor"):
        pull(owner.slot, wanted=lambda tensor: False, via=way)
    some = pull(owner.slot, wanted=lambda tensor: tensor.name == "packed", via=way)
    assert list(some) == ["packed"]
    with pytest.raises(HookError, match="was not pulled"):
        some.array("scalar")


def test_a_saved_map_is_never_read_again(start: Start, tmp_path: Path) -> None:
    owner = start("mooncake", "even")
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("weight_layout_0.json", "weight_transport_0.json"):
        shutil.copy(Path(owner.slot.directory) / name, copy)
    saved = open_file(str(copy / "weight_layout_0.json"))
    assert (pull(saved, via="mooncake").array("part0") == 0).all()
    owner.tell("fill")
    with pytest.raises(Changed, match="content generation"):
        pull(saved, via="mooncake")


def test_a_saved_map_is_of_the_contents_that_the_document_beside_it_names(start: Start) -> None:
    """An update in place writes no new layout: what is beside it may be newer, and the header is
    held against that."""
    owner = start("mooncake", "even")
    saved = open_file(owner.slot.path("weight_layout_{}.json"))
    owner.tell("fill")
    pulled = pull(saved, via="mooncake")
    assert (pulled.array("part0") == 1).all()
    assert pulled.document.content_generation == owner.read().content_generation
