"""Tiny quantised checkpoints: each scheme's is whole and named as its quantiser does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cpu_sglang.quantized_model import SCHEMES, model_path, write_quantized
from tests.gpu import real_server

pytest.importorskip("torch")
pytest.importorskip("tokenizers")
safetensors = pytest.importorskip("safetensors.torch")

DOWN = "model.layers.1.mlp.down_proj."  # 512 inputs, 256 outputs
EXPERTS = "model.layers.1.mlp.experts.down_proj_"
# What lies in the place of one weight: dtype and shape.
PACKED = {
    "w8a8_int8": {"weight": ("int8", 256, 512), "weight_scale": ("float32", 256, 1)},
    "compressed-int8": {"weight": ("int8", 256, 512), "weight_scale": ("float32", 256, 1)},
    "compressed-fp8": {"weight": ("float8_e4m3fn", 256, 512), "weight_scale": ("float32", 256, 1)},
    "compressed-int4": {
        "weight_packed": ("int32", 256, 64),
        "weight_scale": ("bfloat16", 256, 8),
        "weight_shape": ("int64", 2),
    },
    "fp8": {"weight": ("bfloat16", 256, 512)},
    "fp8-blocks": {"weight": ("float8_e4m3fn", 256, 512), "weight_scale_inv": ("float32", 2, 4)},
    "int8-blocks": {"weight": ("int8", 256, 512), "weight_scale_inv": ("float32", 2, 4)},
    "awq": {
        "qweight": ("int32", 512, 32),
        "qzeros": ("int32", 8, 32),
        "scales": ("float16", 8, 256),
    },
    "gptq": {
        "qweight": ("int32", 64, 256),
        "qzeros": ("int32", 8, 32),
        "scales": ("float16", 8, 256),
        "g_idx": ("int32", 512),
    },
    "bitsandbytes": {"weight": ("bfloat16", 256, 512)},
    "mxfp4": {
        "blocks": ("uint8", 4, 256, 8, 16),
        "scales": ("uint8", 4, 256, 8),
        "bias": ("bfloat16", 4, 256),
    },
}


def described(tensor: Any) -> tuple[Any, ...]:
    return str(tensor.dtype).removeprefix("torch."), *tensor.shape


@pytest.mark.parametrize("scheme", PACKED)
def test_a_weight_is_what_the_scheme_makes_of_it(scheme: str, tmp_path: Path) -> None:
    write_quantized(tmp_path / "a", scheme, seed=1)
    write_quantized(tmp_path / "b", scheme, seed=2)
    one, other = (
        safetensors.load_file(tmp_path / name / "model.safetensors") for name in ("a", "b")
    )
    prefix = EXPERTS if scheme == "mxfp4" else DOWN
    found = {
        name.removeprefix(prefix): described(weight)
        for name, weight in one.items()
        if name.startswith(prefix)
    }
    assert found == PACKED[scheme]
    assert one.keys() == other.keys()
    same = [name for name, weight in one.items() if weight.equal(other[name])]
    # A symmetric quantiser's zeros, the order of groups and shapes are no weights.
    assert {name.rpartition(".")[2] for name in same} <= {"qzeros", "g_idx", "weight_shape"}
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config.get("quantization_config", {}) == SCHEMES[scheme].config
    assert model_path(tmp_path / "a", scheme) == tmp_path / "a"


@pytest.mark.parametrize(("scheme", "kind"), [("gguf-f16", "F16"), ("gguf-q8_0", "Q8_0")])
def test_gguf_is_one_file_with_the_names_of_llama_cpp(
    scheme: str, kind: str, tmp_path: Path
) -> None:
    gguf = pytest.importorskip("gguf")
    write_quantized(tmp_path, scheme, seed=1)
    path = model_path(tmp_path, scheme)
    tensors = {each.name: each for each in gguf.GGUFReader(path).tensors}
    assert tensors["blk.1.ffn_down.weight"].tensor_type.name == kind
    assert list(tensors["blk.1.ffn_down.weight"].shape) == [512, 256]
    assert tensors["blk.1.attn_norm.weight"].tensor_type.name == "F32"
    assert len(tensors) == 2 * 9 + 3
    assert not list(tmp_path.glob("*.safetensors"))
    assert (tmp_path / "tokenizer.json").exists()


def test_every_scheme_has_a_check_for_a_machine_with_a_gpu() -> None:
    checked = set(real_server.QUANTISED_CHECKPOINTS.values())
    # SGLang's own FP8 of an ordinary checkpoint has another; of GGUF the packed one is checked.
    assert set(SCHEMES) - checked == {"fp8", "gguf-f16"}
    assert real_server.CHECKS.keys() > real_server.QUANTISED_CHECKPOINTS.keys()
    assert not real_server.QUANTISED_CHECKPOINTS.keys() & set(real_server.ON_ONE_GPU)
