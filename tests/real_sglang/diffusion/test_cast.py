"""A diffusion server that decodes in another precision than it has loaded its VAE in.

No method that is wrapped casts the weights: the check of the map finds that they lie elsewhere.
"""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

import pytest

from cpu_sglang.environment import ensure_environment
from cpu_sglang.releases import DIFFUSION
from tests.real_sglang.diffusion.serving import PipelineServer, make_pipeline, make_probed_venv
from tests.real_sglang.truth.outside_bytes import HasChanged, Place, PublishedMap, settled_maps
from tests.real_sglang.truth.report import OtherProcess, other_process

pytestmark = [pytest.mark.real_sglang, pytest.mark.truth]

FIELDS = ("ptr", "size", "dtype", "shape", "stride", "storage_ptr", "storage_size")


def test_weights_that_a_request_has_cast_are_found_by_the_next_check(tmp_path: Path) -> None:
    environment = ensure_environment(DIFFUSION)
    pipeline = make_pipeline(environment, tmp_path / "pipelines", 1)
    python = make_probed_venv(tmp_path / "venv", environment)
    arguments = ["--vae-precision", "bf16", "--vae-decode-precision", "fp32"]
    with (
        other_process(
            "a diffusion server that casts its VAE for each request (tiny FLUX.1)",
            "`sglang.multimodal_gen`, `--vae-decode-precision`",
        ) as row,
        PipelineServer(environment, python, pipeline, tmp_path / "server", arguments) as server,
    ):
        loaded = once_true(server, row, "load")
        for when in ("first request", "second request"):
            server.draw()
            published = once_true(server, row, f"{when}, once checked")
        assert published.state["event"]["kind"] == "unannounced_change"
        cast = {
            name
            for name, tensor in published.tensors.items()
            if (tensor["ptr"], tensor["dtype"])
            != (loaded.tensors[name]["ptr"], loaded.tensors[name]["dtype"])
        }
        assert {name.partition(".")[0] for name in cast} == {"vae"}
        assert any("vae." in line for line in server.hook_warnings())


def once_true(server: PipelineServer, row: OtherProcess, when: str) -> PublishedMap:
    """The map, when a check has put it right."""
    deadline = time.monotonic() + 120
    while True:
        (published,) = settled_maps(server.map_directory, 1)
        pid, worker = server.live()
        try:
            with published.held():
                wrong, values = compared(published, pid, worker["tensors"])
        except HasChanged as changed:  # a check has published meanwhile
            wrong, values = [str(changed)], []
        if not wrong:
            row.look(when, values, "torch's place and SHA-256 of each tensor")
            return published
        assert time.monotonic() < deadline, wrong
        time.sleep(0.5)


def compared(
    published: PublishedMap, pid: int, tensors: dict[str, dict[str, Any]]
) -> tuple[list[str], list[bytes]]:
    """The tensors that lie elsewhere than published, or have other values there; all values."""
    names = published.names()
    wrong, values = [], []
    for name, truth in tensors.items():
        found = published.tensors[names[name]]
        if any(found[field] != truth[field] for field in FIELDS):
            wrong.append(name)
            continue
        values.append(Place.of(found).read(pid))
        if hashlib.sha256(values[-1]).hexdigest() != truth["sha256"]:
            wrong.append(name)
    return wrong, values
