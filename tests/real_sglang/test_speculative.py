"""Speculative decoding: a target and a draft in one process, each with its own true map.

Real SGLang servers on the CPU.  They start, re-bind the draft's embedding and head, and update
their weights; they generate nothing, because that takes compiled kernels which no CPU build is
published of.  `GAPS` declares the two that SGLang asks for by name while it starts, and has
the one that it calls then.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import sglang_weight_hook as hook
from cpu_sglang.environment import Environment, ensure_environment
from tests.real_sglang.hooked import HookedServer, assert_legacy_files, assert_true_map, make_venv

pytestmark = pytest.mark.real_sglang

GAPS = '''
"""Waits for SGLang's import, like the hook's own loader, and then fills what is absent."""
import sys


def copy_all_layer_kv_cache_cpu(data_ptrs, strides, tgt_loc, src_loc):
    import ctypes

    for base, stride in zip(data_ptrs.tolist(), strides.tolist()):
        rows = [ctypes.string_at(base + place * stride, stride) for place in src_loc.tolist()]
        for place, row in zip(tgt_loc.tolist(), rows):
            ctypes.memmove(base + place * stride, row, stride)


class Waiting:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "sglang" and Waiting in sys.meta_path:
            sys.meta_path.remove(Waiting)
            import sgl_kernel
            import torch

            sgl_kernel.copy_all_layer_kv_cache_cpu = copy_all_layer_kv_cache_cpu
            Waiting.library = torch.library.Library("sgl_kernel", "FRAGMENT")
            for name in ("decode_attention_cpu", "extend_attention_cpu"):
                Waiting.library.define(name + "() -> ()")


def start():
    if Waiting not in sys.meta_path:
        sys.meta_path.insert(0, Waiting)
'''

ARGUMENTS = (
    *("--speculative-num-steps", "2"),
    *("--speculative-eagle-topk", "1"),
    *("--speculative-num-draft-tokens", "3"),
    # The one draft backend that SGLang has on a CPU; the target keeps torch_native.
    *("--speculative-draft-attention-backend", "intel_amx"),
    "--skip-server-warmup",
)
# /health asks the scheduler and lets it generate nothing.
VARIABLES = {"SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0"}

SHARED = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.fixture(scope="module")
def python(environment: Environment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hooked interpreter in which SGLang's speculative decoding can start."""
    path = tmp_path_factory.mktemp("speculative") / "venv"
    interpreter = make_venv(path, environment)
    purelib = next(path.glob("lib/python*/site-packages"))
    (purelib / "speculative_gaps.py").write_text(GAPS)
    (purelib / "speculative_gaps.pth").write_text(
        "import speculative_gaps; speculative_gaps.start()\n"
    )
    return interpreter


@pytest.fixture(scope="module")
def drafts(checkpoint: Callable[..., Path]) -> dict[str, Path]:
    """A draft's checkpoint for each algorithm."""
    eagle = checkpoint(2, "--architecture", "llama_eagle", "--layers", "1")
    return {"STANDALONE": checkpoint(2), "EAGLE": eagle}


# The lines before 0.5.18 have no draft backend that runs on a CPU.
CASES = [
    ("0.5.23", "EAGLE"),
    pytest.param(("0.5.23", "STANDALONE"), marks=pytest.mark.matrix),
    pytest.param(("0.5.20", "EAGLE"), marks=pytest.mark.matrix),
    pytest.param(("0.5.18", "EAGLE"), marks=pytest.mark.matrix),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case))
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    release, algorithm = request.param
    return release, algorithm


@pytest.fixture(scope="module")
def algorithm(case: tuple[str, str]) -> str:
    return case[1]


@pytest.fixture(scope="module")
def server(
    case: tuple[str, str],
    python: Path,
    checkpoint: Callable[..., Path],
    drafts: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[HookedServer]:
    release, algorithm = case
    folder = tmp_path_factory.mktemp(algorithm.lower())
    chosen = ("--speculative-algorithm", algorithm)
    draft = ("--speculative-draft-model-path", str(drafts[algorithm]))
    arguments = [*chosen, *draft, *ARGUMENTS]
    environment, model = ensure_environment(release), checkpoint(1)
    with HookedServer(environment, python, model, folder, arguments, VARIABLES) as running:
        yield running


def documents(server: HookedServer) -> dict[str, hook.Document]:
    return {slot.name: slot.read() for slot in server.maps.slots()}


def live(server: HookedServer) -> dict[str, dict[str, Any]]:
    """What torch says of the target and of the draft, by the name of the slot."""
    found = {"0_draft" if one["draft"] else "0": one for one in server.live()}
    assert set(found) == {"0", "0_draft"}
    return found


def check(server: HookedServer, updated: bool) -> dict[str, hook.Document]:
    """Hold both slots against the runners themselves, and shared storage against its count."""
    published, truth = documents(server), live(server)
    assert set(published) == {"0", "0_draft"}
    storages: dict[int, int] = {}
    for slot, document in published.items():
        assert_true_map(document, truth[slot])
        assert_legacy_files(document, truth[slot], updated)
        for tensor in truth[slot]["tensors"].values():
            if tensor["storage_size"]:
                storages[tensor["storage_ptr"]] = tensor["storage_size"]
    counted = sum(d.memory["weights_bytes"] - d.memory["shared_bytes"] for d in published.values())
    assert counted == sum(storages.values())
    return published


def test_target_and_draft_each_have_their_own_true_map(server: HookedServer) -> None:
    published = check(server, updated=False)
    for document in published.values():
        assert document.state["state"] == "ready"
        assert document.state["event"]["kind"] == "scheduler_ready"
        assert document.state["missing"] == []
        assert document.state["problem"] is None


def test_the_draft_does_not_overwrite_the_targets_files(
    server: HookedServer, checkpoint: Callable[..., Path], drafts: dict[str, Path], algorithm: str
) -> None:
    published = documents(server)
    owners = {slot: document.identity for slot, document in published.items()}
    assert owners["0"]["pid"] == owners["0_draft"]["pid"]
    assert [owners[slot]["role"] for slot in ("0", "0_draft")] == ["target", "draft"]
    assert owners["0"]["model_path"] == str(checkpoint(1))
    assert owners["0_draft"]["model_path"] == str(drafts[algorithm])
    layers = {
        slot: "model.layers.1.mlp.down_proj.weight" in d.tensors for slot, d in published.items()
    }
    assert layers == {"0": True, "0_draft": algorithm == "STANDALONE"}
    meta = json.loads(Path(published["0"].slot.path("weights_meta_{}.json")).read_text())
    assert "model.layers.1.mlp.down_proj.weight" in meta
    places = [
        {tensor["ptr"] for name, tensor in d.tensors.items() if name.endswith("o_proj.weight")}
        for d in published.values()
    ]
    assert places[0].isdisjoint(places[1])


def test_an_eagle_draft_is_published_with_the_targets_embedding_and_head(
    server: HookedServer, algorithm: str
) -> None:
    published = documents(server)
    same = [
        published["0"].tensors[name]["ptr"] == published["0_draft"].tensors[name]["ptr"]
        for name in SHARED
    ]
    assert same == [algorithm == "EAGLE"] * 2
    # It was bound anew after the draft had loaded: what was captured then is not true any more.
    assert published["0_draft"].layout_generation == (2 if algorithm == "EAGLE" else 1)
    assert published["0"].layout_generation == 1
    shared = {
        slot: (document.memory["shared_with"], document.memory["shared_bytes"] > 0)
        for slot, document in published.items()
    }
    # Also without a common embedding: SGLang makes one rotary cache for both.
    assert shared == {"0": (["0_draft"], False), "0_draft": (["0"], True)}


def test_both_maps_are_true_after_an_update(
    server: HookedServer, checkpoint: Callable[..., Path]
) -> None:
    before = documents(server)
    status, answer = server.update_weights_from_disk(checkpoint(3))
    assert (status, answer["success"]) == (200, True), answer
    after = documents(server)
    check(server, updated=True)
    for slot, document in after.items():
        assert document.state["event"]["kind"] == "update_weights_from_disk"
        assert document.state["state"] == "ready"
        assert document.content_generation > before[slot].content_generation
        assert document.layout_generation == before[slot].layout_generation
