"""An encoder-only server, which has no ModelRunner: its map against the checkpoint's bytes.

SGLang's encoder loads the whole of a tiny random Qwen2-VL.  Another process, this one, reads what
lies at the published addresses; nothing inside the server is asked.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cpu_sglang.environment import Environment
from tests.real_sglang.hooked import HookedServer, pid_of, wait_for_end
from tests.real_sglang.truth.outside_bytes import Place, settled_maps
from tests.real_sglang.truth.report import other_process
from tests.real_sglang.truth.serving import make_probed_venv

pytestmark = [pytest.mark.real_sglang, pytest.mark.truth]

# SGLang makes one parameter of these, row after row, in this order.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class EncoderServer(HookedServer):
    ready_line = "Uvicorn running on"


def checkpoint_tensors(folder: Path) -> dict[str, bytes]:
    (path,) = folder.glob("*.safetensors")
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header: dict[str, Any] = json.loads(content[8:start])
    header.pop("__metadata__", None)
    return {
        name: content[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]]
        for name, entry in header.items()
    }


def loaded_parameters(folder: Path) -> Iterator[tuple[str, bytes]]:
    """What the parameters of the loaded model must hold: the checkpoint's, some of them joined."""
    tensors = checkpoint_tensors(folder)
    for parts in FUSED:
        for first in [name for name in tensors if f".{parts[0]}." in name]:
            names = [first.replace(parts[0], part) for part in parts]
            yield first, b"".join(tensors.pop(name) for name in names)
    yield from tensors.items()


def test_an_encoder_only_server_is_published_as_it_lies_in_memory(
    environment: Environment, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    # With what SGLang's multimodal processors look up by name on a machine without a GPU.
    python = make_probed_venv(tmp_path / "venv", environment)
    model = checkpoint(1, "--architecture", "qwen2_vl")
    with (
        other_process(
            "an encoder-only server (Qwen2-VL)",
            "`MMEncoder` of `sglang.launch_server --encoder-only`",
            "names of compiled kernels that are looked up and never called (`absent_hardware.py`)",
        ) as row,
        EncoderServer(
            environment, python, model, tmp_path, extra_args=["--encoder-only"]
        ) as server,
    ):
        (published,) = settled_maps(tmp_path / "weights_metadata", 1)
        assert published.state["event"]["kind"] == "encoder_ready"
        assert published.state["missing"] == []
        assert published.identity["model_path"] == str(model)
        assert published.identity["model_class"] == "Qwen2VLForConditionalGeneration"
        with published.held():
            values = {
                name: Place.of(tensor).read(published.pid)
                for name, tensor in published.tensors.items()
                if tensor["kind"] == "parameter"
            }
        held = {name: hashlib.sha256(value).hexdigest() for name, value in values.items()}
        # The checkpoint's values are random, so equal bytes are of the same tensor.
        wanted = {
            hashlib.sha256(loaded).hexdigest(): name for name, loaded in loaded_parameters(model)
        }
        assert {name: digest for name, digest in held.items() if digest not in wanted} == {}
        assert sorted(held.values()) == sorted(wanted)
        # SGLang's names end as the checkpoint's do, but for what is joined, and the vision's qkv.
        for name, digest in held.items():
            layer = re.compile(r"\.(\d+)\.")
            assert layer.findall(name) == layer.findall(wanted[digest]), name
            assert name.rpartition(".")[2] == wanted[digest].rpartition(".")[2]
            assert name.startswith("visual.") == wanted[digest].startswith("visual.")
        row.look("load", list(values.values()), "the checkpoint's bytes")
        slot = server.maps.slot("0")
        pid = pid_of(slot)
        assert server.hook_log()
    wait_for_end(pid)
    assert not slot.owner_alive()
