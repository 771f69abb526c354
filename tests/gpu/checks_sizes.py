"""Checks over two GPUs, and at the sizes of real models."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import sglang_weight_hook as hook
from tests.gpu.gpu_server import GpuServer
from tests.gpu.map_checks import Report, check_bytes, check_geometry, check_memory


def tensor_parallel(report: Report, python: Path, a: Path, b: Path, folder: Path) -> None:
    """Two GPUs: two slots, right devices and ranks, together the one GPU's model."""
    with GpuServer(python, a, folder / "one") as server:
        whole = server.maps.slot("0").read()
    arguments = ["--tp-size", "2", "--enable-memory-saver"]
    with GpuServer(python, a, folder / "two", arguments) as server:
        slots = server.maps.slots()
        with report.check("two slots with their own GPUs and ranks") as seen:
            assert [slot.name for slot in slots] == ["0", "1"]
            documents = [slot.read() for slot in slots]
            uuids = {document.raw["identity"]["gpu_uuid"] for document in documents}
            assert len(uuids) == 2
            assert [d.raw["identity"]["tp_rank"] for d in documents] == [0, 1]
            for document in documents:
                check_geometry(document, seen)
                check_memory(document, {})
            seen.update(uuids=len(uuids))
        with report.check("the two ranks together are the one GPU's model") as seen:
            seen.update(check_shards(whole, documents))
        for what, model in (("the load", a), ("an update from disk", b)):
            with report.check(f"every rank's bytes after {what}") as seen:
                if model is b:
                    status, answer = server.update_weights_from_disk(b)
                    assert status == 200, answer
                for rank, slot in enumerate(slots):
                    check_bytes(server, slot.name, model, seen, rank, len(slots))
        with report.check("release and resume on both ranks, and an update") as seen:
            epochs = [slot.read_state()["physical_epoch"] for slot in slots]
            server.wait_idle()
            status, answer = server.post("/release_memory_occupation", {"tags": ["weights"]})
            assert status == 200, answer
            assert [slot.read_state()["state"] for slot in slots] == ["released"] * 2
            status, answer = server.post("/resume_memory_occupation", {"tags": ["weights"]})
            assert status == 200, answer
            now = [slot.read_state()["physical_epoch"] for slot in slots]
            assert now == [epoch + 1 for epoch in epochs]
            status, answer = server.update_weights_from_disk(a)
            assert status == 200, answer
            for rank, slot in enumerate(slots):
                assert slot.read_state()["state"] == "ready"
                check_bytes(server, slot.name, a, seen, rank, len(slots))


def check_shards(whole: hook.Document, ranks: Sequence[hook.Document]) -> dict[str, int]:
    """Each tensor is whole on every rank, or split along one dimension without a remainder."""
    seen = {"split": 0, "replicated": 0, "bytes": 0}
    assert all(document.tensors.keys() == whole.tensors.keys() for document in ranks)
    for name, tensor in whole.tensors.items():
        shards = [document.tensors[name] for document in ranks]
        if all(shard["shape"] == tensor["shape"] for shard in shards):
            seen["replicated"] += 1
            seen["bytes"] += tensor["size"]
            continue
        differing = [
            dimension
            for dimension, size in enumerate(tensor["shape"])
            if any(shard["shape"][dimension] != size for shard in shards)
        ]
        assert len(differing) == 1, (name, differing)
        (dimension,) = differing
        assert sum(shard["shape"][dimension] for shard in shards) == tensor["shape"][dimension]
        assert sum(shard["size"] for shard in shards) == tensor["size"], name
        seen["split"] += 1
        seen["bytes"] += sum(shard["size"] for shard in shards)
    assert seen["bytes"] == sum(tensor["size"] for tensor in whole.tensors.values())
    assert seen["split"] > seen["replicated"] > 0
    return seen


def real_size(config: Mapping[str, Any], *arguments: str) -> Callable[..., None]:
    """A real model's tensors without its weights: ``--load-format dummy``."""

    def run(report: Report, python: Path, a: Path, b: Path, folder: Path) -> None:
        model = folder / "model"
        model.mkdir(parents=True)
        (model / "config.json").write_text(json.dumps(config))
        options = ["--load-format", "dummy", "--skip-tokenizer-init", *arguments]
        with (
            GpuServer(python, model, folder / "server", options, fraction=0.85) as server,
            report.check(f"{config['architectures'][0]} at real size") as seen,
        ):
            document = server.maps.slot("0").read()
            raw = document.raw
            check_geometry(document, seen)
            check_memory(document, seen)
            event = raw["event"]
            seen.update(
                model_class=raw["identity"]["model_class"],
                captured=raw["validation"]["captured"],
                left_out=raw["validation"]["left_out"],
                capture_seconds=event["capture_seconds"],
                event_seconds=round(event["finished_at"] - event["started_at"], 3),
                startup_seconds=round(server.startup_seconds or 0),
            )

    return run


# Meta's and DeepSeek's published configurations, with fewer layers: what one card holds.
LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192,
    "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8,
    "num_hidden_layers": 40, "vocab_size": 128256, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
    "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "num_attention_heads": 128, "num_key_value_heads": 128, "num_hidden_layers": 8,
    "first_k_dense_replace": 3, "n_routed_experts": 256, "n_shared_experts": 1,
    "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "topk_method": "noaux_tc",
    "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "vocab_size": 129280, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6, "rope_theta": 10000, "hidden_act": "silu", "moe_layer_freq": 1,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 0,
    "eos_token_id": 1, "attention_bias": False, "num_nextn_predict_layers": 0,
    "quantization_config": {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
}  # fmt: skip
