"""Reading as typed objects: by name, from a saved copy, and what changed since.

The documents are published by the real recorder over a real torch model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fake_sglang import FakeRunner, update
from hypothesis import given
from hypothesis import strategies as st
from small_model import torch

from sglang_weight_hook import reader
from sglang_weight_hook.layout import files
from sglang_weight_hook.reader import Document, HookError, open_file, open_slot


def test_every_tensor_is_what_torch_says(runner: FakeRunner, document: Document) -> None:
    found = {tensor.name: tensor for tensor in document.iter_tensors()}
    assert found.keys() == document.tensors.keys()
    for name, parameter in runner.model.named_parameters():
        if name == "offloaded":
            continue
        tensor = found[name]
        assert tensor.ptr == parameter.data_ptr()
        assert tensor.shape == tuple(parameter.shape)
        assert tensor.stride == parameter.stride()
        assert tensor.itemsize == parameter.element_size()
        assert tensor.raw is document.tensors[name]
    assert not found["offloaded"].resident
    assert found["offloaded"].ptr == 0


def test_a_tensor_answers_to_its_aliases(document: Document) -> None:
    assert document.tensor("lm_head.weight") is document.tensor("embed_tokens.weight")
    with pytest.raises(HookError, match="no tensor 'nothing'; the names are those of"):
        document.tensor("nothing")


def test_layer_and_role_come_from_the_name(document: Document) -> None:
    tensor = document.tensor("layers.1.self_attn.w_kc")
    assert (tensor.layer, tensor.role) == (1, "attention")
    assert document.tensor("layers.0.input_layernorm.weight").role == "norm"
    assert document.tensor("embed_tokens.weight").layer is None


@pytest.mark.parametrize(
    ("name", "layer", "role"),
    [
        ("model.embed_tokens.weight", None, "embedding"),
        ("transformer.wte.weight", None, "embedding"),
        ("transformer.h.11.attn.c_attn.weight", 11, "attention"),
        ("transformer.h.11.ln_1.weight", 11, "norm"),
        ("transformer.ln_f.weight", None, "norm"),
        ("model.layers.17.self_attn.qkv_proj.weight", 17, "attention"),
        ("model.layers.3.self_attn.kv_a_layernorm.weight", 3, "norm"),
        ("model.layers.3.self_attn.w_kc", 3, "attention"),
        ("model.layers.61.mlp.experts.w13_weight_scale_inv", 61, "moe_expert"),
        ("model.layers.4.mlp.experts.7.down_proj.weight", 4, "moe_expert"),
        ("model.layers.4.mlp.shared_experts.down_proj.weight", 4, "moe_expert"),
        ("model.layers.4.mlp.gate.weight", 4, "mlp"),
        ("model.layers.0.feed_forward.w1.weight", 0, "mlp"),
        ("model.norm.weight", None, "norm"),
        ("lm_head.weight", None, "lm_head"),
        ("model.layers.0.self_attn.rotary_emb.cos_sin_cache", 0, "rotary"),
        ("visual.blocks.5.mlp.fc1.weight", 5, "mlp"),
        ("lora_pool.A_buffer.qkv_proj.0", None, "lora"),
        ("model.layers.2.mixer.A_log", 2, "other"),
        ("model.layers.99999999999999999999.x", None, "other"),
        ("", None, "other"),
    ],
)
def test_the_names_of_real_models_are_understood(name: str, layer: Any, role: str) -> None:
    assert (reader.layer_of(name), reader.role_of(name)) == (layer, role)
    assert role in reader.ROLES


@given(st.text())
def test_any_name_has_a_role(name: str) -> None:
    assert reader.role_of(name) in reader.ROLES
    layer = reader.layer_of(name)
    assert layer is None or layer >= 0


def test_regions_and_kv_cache_are_typed(runner: FakeRunner, document: Document) -> None:
    regions = list(document.iter_regions())
    assert [region.raw for region in regions] == document.regions
    assert all(region.ptr < region.end for region in regions)
    buffers = list(document.iter_kv_cache())
    pool = runner.token_to_kv_pool
    assert {b.ptr for b in buffers} == {pool.k_buffer[0].data_ptr(), pool.v_buffer[0].data_ptr()}


def test_a_saved_copy_is_a_document_that_is_not_live(
    document: Document, maps: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "before.json"
    copy.write_bytes((maps / files.LAYOUT.format(0)).read_bytes())
    saved = open_file(str(copy))
    assert saved.raw == document.raw
    assert saved.layout_generation == document.layout_generation
    assert saved.state["state"] == "ready"
    assert document.is_live
    assert not saved.is_live
    with pytest.raises(HookError, match="does not exist"):
        open_file(str(tmp_path / "nothing.json"))


def test_changes_since_a_saved_copy_are_told(
    runner: FakeRunner, document: Document, maps: Path
) -> None:
    runner.model.layers[0].mlp.weight.data = torch.zeros(6, 6)
    update(runner)
    new = open_slot(str(maps), "0").read()
    for old in (document, document.raw):
        changes = new.changes_since(old)
        assert changes.moved == ["layers.0.mlp.weight"]
        assert changes.must_register_again
    assert not new.changes_since(new).must_register_again


def test_comparing_what_is_no_layout_is_an_error(document: Document) -> None:
    with pytest.raises(HookError, match="one of them is no layout document"):
        document.changes_since({"tensors": [], "regions": 3})
