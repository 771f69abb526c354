"""A real diffusion server of SGLang's: the published map after the load and every kind of update.

SGLang's own launcher and its worker for CPUs, with a tiny random FLUX.1.  After each step the map
is held against torch's own answers inside the worker; another process, this one, reads what lies at
the published addresses, and makes of it the checksums that SGLang gives of its components.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from cpu_sglang.environment import Environment, ensure_environment
from cpu_sglang.releases import DIFFUSION
from tests.real_sglang.diffusion.serving import (
    PipelineServer,
    make_adapter,
    make_pipeline,
    make_probed_venv,
)
from tests.real_sglang.truth.outside_bytes import Place, PublishedMap, settled_maps
from tests.real_sglang.truth.report import OtherProcess, other_process

pytestmark = [pytest.mark.real_sglang, pytest.mark.truth]

COMPONENTS = {
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "T5EncoderModel",
    "transformer": "FluxTransformer2DModel",
    "vae": "AutoencoderKL",
}
FIELDS = (*("ptr", "size", "device", "dtype", "shape", "stride", "storage_ptr", "storage_size"),)


@pytest.fixture(scope="module")
def diffusion() -> Environment:
    return ensure_environment(DIFFUSION)


@pytest.fixture(scope="module")
def pipelines(diffusion: Environment, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pipelines")
    return [make_pipeline(diffusion, folder, seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def server(
    diffusion: Environment, pipelines: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PipelineServer]:
    python = make_probed_venv(tmp_path_factory.mktemp("probed") / "venv", diffusion)
    folder = tmp_path_factory.mktemp("server")
    with PipelineServer(diffusion, python, pipelines[0], folder) as server:
        yield server


def server_that(what: str) -> AbstractContextManager[OtherProcess]:
    """A row of the truth matrix: one server lives through all of them."""
    name = f"a diffusion server (tiny FLUX.1): {what}"
    return other_process(name, "`GPUWorker` of `sglang.multimodal_gen`")


def look(
    server: PipelineServer, row: OtherProcess, when: str
) -> tuple[PublishedMap, dict[str, dict[str, bytes]]]:
    """The map, compared with all that torch and SGLang say; the values read from outside."""
    (published,) = settled_maps(server.map_directory, 1)
    pid, worker = server.live()
    assert published.pid == pid
    assert worker["components"] == COMPONENTS
    names = published.names()
    unknown = {
        name
        for name, found in published.tensors.items()
        if found["kind"] in ("parameter", "buffer") and name not in worker["tensors"]
    }
    assert unknown == set()
    values: dict[str, dict[str, bytes]] = {component: {} for component in COMPONENTS}
    everything = []
    with published.held():
        for name, truth in worker["tensors"].items():
            found = published.tensors[names[name]]
            told = {field: found[field] for field in FIELDS}
            assert told == {field: truth[field] for field in FIELDS}, name
            read = Place.of(found).read(pid)
            assert hashlib.sha256(read).hexdigest() == truth["sha256"], name
            if name in published.tensors:
                everything.append(read)
            component, _, inner = name.partition(".")
            if truth["kind"] == "parameter" and name in published.tensors:
                values[component][inner] = read
    assert server.checksums() == {
        component: hashlib.sha256(
            b"".join(name.encode() + held[name] for name in sorted(held))
        ).hexdigest()
        for component, held in values.items()
    }
    row.look(when, everything, "`/get_weights_checksum`", "torch's place and SHA-256 of each")
    return published, values


def changed(one: dict[str, dict[str, bytes]], other: dict[str, dict[str, bytes]]) -> set[str]:
    """The components of which a value differs."""
    return {component for component in one if one[component] != other[component]}


def test_the_worker_is_published_as_the_runner_that_it_stands_for(
    server: PipelineServer, pipelines: list[Path]
) -> None:
    with server_that("load") as row:
        published, values = look(server, row, "load")
        assert published.slot == "0"
        assert published.state["event"]["kind"] == "pipeline_ready"
        assert all(values.values())
        identity = published.identity
        assert {
            name: identity[name] for name in ("device", "gpu_id", "role", "tp_rank", "tp_size")
        } == {
            "device": "cpu",
            "gpu_id": 0,
            "role": "target",
            "tp_rank": 0,
            "tp_size": 1,
        }
        assert identity["model_path"] == str(pipelines[0])
        assert identity["model_class"] == "FluxPipeline"
        assert published.layout["validation"]["left_out"] == {}
        assert published.state["missing"] == []


def test_updates_from_disk_and_from_tensors(server: PipelineServer, pipelines: list[Path]) -> None:
    with server_that("updates") as row:
        first, second = pipelines
        before, loaded = look(server, row, "before")
        image = server.draw()
        _, still = look(server, row, "a request")
        assert changed(loaded, still) == set()

        status, answer = server.post("/update_weights_from_disk", {"model_path": str(second)})
        assert (status, answer["success"]) == (200, True), answer
        after, from_disk = look(server, row, "update from disk")
        assert changed(loaded, from_disk) == set(COMPONENTS)
        assert after.state["content_generation"] == before.state["content_generation"] + 1
        assert after.state["event"]["kind"] == "update_weights_from_disk"
        assert server.draw() != image

        body = {"model_path": str(first), "target_modules": ["vae"]}
        status, answer = server.post("/update_weights_from_disk", body)
        assert (status, answer["success"]) == (200, True), answer
        _, of_one = look(server, row, "of one component")
        assert changed(from_disk, of_one) == {"vae"}

        answer = server.send_tensors(first, "transformer")
        assert answer["success"], answer
        after, from_tensor = look(server, row, "update from tensor")
        assert after.state["event"]["kind"] == "update_weights_from_tensor"
        assert changed(of_one, from_tensor) == {"transformer"}
        assert from_tensor["transformer"] == loaded["transformer"]

        status, answer = server.post("/update_weights_from_disk", {"model_path": str(first)})
        assert (status, answer["success"]) == (200, True), answer
        _, back = look(server, row, "the first from disk")
        assert changed(loaded, back) == set()
        assert server.draw() == image


def test_a_failed_update_is_published_and_ends_with_the_next_whole_one(
    server: PipelineServer, pipelines: list[Path], tmp_path: Path
) -> None:
    with server_that("a failed update") as row:
        body = {"model_path": str(tmp_path / "missing")}
        status, answer = server.post("/update_weights_from_disk", body)
        assert (status, answer["success"]) == (400, False), answer
        state = state_of(server)
        assert state["state"] == "failed"
        assert state["event"]["message"].startswith("Failed to download model")
        status, answer = server.post("/update_weights_from_disk", {"model_path": str(pipelines[0])})
        assert (status, answer["success"]) == (200, True), answer
        look(server, row, "update after it")


def test_release_and_resume_say_what_sglang_answered(server: PipelineServer) -> None:
    with server_that("a release that SGLang refuses") as row:
        before, values = look(server, row, "before")
        # It moves the modules to the host's memory and waits for CUDA, which a CPU has not.
        status, answer = server.post("/release_memory_occupation")
        assert (status, answer["success"]) == (500, False), answer
        assert "Torch not compiled with CUDA enabled" in answer["message"]
        state = state_of(server)
        assert (state["state"], state["event"]["success"]) == ("ready", False)
        assert "Torch not compiled with CUDA enabled" in state["event"]["message"]
        status, answer = server.post("/resume_memory_occupation")
        assert (status, answer["success"]) == (200, True), answer
        after, same = look(server, row, "resume after it")
        assert after.state["event"]["kind"] == "resume_memory_occupation"
        assert after.state["content_generation"] == before.state["content_generation"]
        assert changed(values, same) == set()


def test_an_adapter_is_merged_into_the_weights_and_taken_out_again(
    server: PipelineServer, diffusion: Environment, tmp_path: Path
) -> None:
    with server_that("a LoRA adapter") as row:
        adapter = make_adapter(diffusion, tmp_path / "adapter")
        before, loaded = look(server, row, "before")
        image = server.draw()
        body = {"lora_nickname": "tuned", "lora_path": str(adapter)}
        status, answer = server.post("/v1/set_lora", body)
        assert status == 200, answer
        after, merged = look(server, row, "merged")
        assert after.state["event"]["kind"] == "set_lora"
        assert after.state["layout_generation"] == before.state["layout_generation"] + 1
        assert any(".base_layer." in name for name in after.tensors)
        assert changed(loaded, merged) == {"transformer"}
        assert server.draw() != image

        generation = after.state["content_generation"]
        for route in ("unmerge_lora_weights", "merge_lora_weights", "unmerge_lora_weights"):
            status, answer = server.post(f"/v1/{route}", {})
            assert status == 200, answer
            after, values = look(server, row, route)
            generation += 1
            assert after.state["event"]["kind"] == route
            assert after.state["content_generation"] == generation
            assert (values["transformer"] == merged["transformer"]) == (route[0] == "m")
        assert server.hook_warnings() == []


def state_of(server: PipelineServer) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((server.map_directory / "weight_state_0.json").read_text())
    return state
