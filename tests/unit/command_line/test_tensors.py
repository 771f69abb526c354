"""show, regions, lookup and diff: what they answer of tensors and addresses.

On documents of the real recorder; facts are asserted, not screens.  ``tests/real_sglang`` has a
real server.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from ended_command import Run, sentence
from fake_sglang import FakeRunner, update
from small_model import torch

from sglang_weight_hook.layout import files


def test_show_lists_every_tensor_in_the_models_order(run: Run, layout: Any) -> None:
    ended = run("show")
    assert ended.status == 0
    rows = ended.rows
    assert rows[0] == ["address", "size", "type", "shape", "name"]
    names = list(layout["tensors"])
    assert [row[5] for row in rows[1:]] == names
    by_name = {row[5]: row for row in rows[1:]}
    tensor = layout["tensors"]["layers.0.mlp.weight"]
    assert by_name["layers.0.mlp.weight"][:5] == [hex(tensor["ptr"]), "144", "B", "float32", "6x6"]
    assert f"{len(names)} tensors" in ended.err
    assert "slot 0 ready, layout 1, content 1" in ended.err


def test_show_as_json_is_exact(run: Run, layout: Any) -> None:
    answer = run("show", "0", "--json").json
    for name, raw in layout["tensors"].items():
        shown = answer["tensors"][name]
        assert {key: shown[key] for key in raw} == raw
    assert answer["tensors"]["layers.1.self_attn.w_kc"]["layer"] == 1
    assert answer["tensors"]["layers.1.self_attn.w_kc"]["role"] == "attention"
    assert answer["owner_alive"] is True
    assert answer["total"]["bytes"] == sum(raw["size"] for raw in layout["tensors"].values())
    assert answer["total"]["storage_bytes"] == layout["totals"]["cpu"]["storage_bytes"]


@pytest.mark.parametrize(
    ("sort", "key"),
    [
        ("name", lambda name, raw: name),
        ("address", lambda name, raw: (raw["ptr"], name)),
        ("size", lambda name, raw: (-raw["size"], name)),
    ],
)
def test_show_sorts(sort: str, key: Any, run: Run, layout: Any) -> None:
    shown = list(run("show", "--sort", sort, "--json").json["tensors"])
    assert shown == sorted(layout["tensors"], key=lambda name: key(name, layout["tensors"][name]))
    assert list(run("show", "--sort", sort, "--top", "3", "--json").json["tensors"]) == shown[:3]


def test_show_filters_by_name_alias_role_and_layer(run: Run, layout: Any) -> None:
    def names(*arguments: str) -> set[str]:
        return set(run("show", "--json", *arguments).json["tensors"])

    assert names("--match", "layers.1.*") == {n for n in layout["tensors"] if "layers.1." in n}
    assert names("--match", "lm_head*") == {"embed_tokens.weight"}
    assert names("--layer", "0") == {n for n in layout["tensors"] if "layers.0." in n}
    assert names("--role", "norm") == {n for n in layout["tensors"] if "norm" in n}
    assert names("--match", "nothing") == set()
    assert "0 of" in run("show", "--match", "nothing").err


def test_regions_are_those_of_the_layout(run: Run, layout: Any) -> None:
    assert run("regions", "--json").json["regions"] == layout["regions"]
    rows = run("regions").rows[1:]
    assert [row[0] for row in rows] == [hex(region["ptr"]) for region in layout["regions"]]


def test_lookup_names_the_element_in_hexadecimal_and_decimal(run: Run, runner: FakeRunner) -> None:
    address = runner.model.layers[1].mlp.weight[2, 3].data_ptr() + 1
    for text in (hex(address), hex(address).upper().replace("X", "x"), str(address)):
        ended = run("lookup", text, "--json")
        assert ended.status == 0
        (hit,) = ended.json["tensors"]
        assert (hit["name"], hit["element"], hit["byte"]) == ("layers.1.mlp.weight", [2, 3], 1)
        assert ended.json["region"]["tensors"] == ["layers.1.mlp.weight"]
    out = run("lookup", hex(address)).out
    assert "layers.1.mlp.weight" in out
    assert "[2, 3], byte 1 of 4" in out


def test_lookup_finds_the_kv_cache(run: Run, runner: FakeRunner) -> None:
    pool = runner.token_to_kv_pool  # type: ignore[attr-defined]
    ended = run("lookup", pool.v_buffer[0].data_ptr() + 8, "--json")
    assert ended.status == 0
    assert ended.json["tensors"] == []
    assert [buffer["name"] for buffer in ended.json["kv_cache"]] == ["v_buffer.0"]
    assert "KV cache v_buffer.0" in run("lookup", pool.v_buffer[0].data_ptr()).out


def test_lookup_of_nothing_says_what_is_near(run: Run, layout: Any) -> None:
    ended = run("lookup", "0x10")
    assert ended.status == 3
    assert "no published memory at 0x10" in ended.out
    assert hex(layout["regions"][0]["ptr"]) in ended.out
    assert run("lookup", "0x10", "--json").status == 3


@pytest.mark.parametrize("text", ["", "zebra", "deadbeef", "0xg", "-5", "1.5", "0x" + "f" * 17])
def test_what_is_no_address_is_wrong_usage(text: str, run: Run, layout: Any) -> None:
    err = sentence(run("lookup", "--", text), 2)
    assert "address" in err
    assert ("0xdeadbeef" in err) == (text == "deadbeef")


def test_diff_tells_by_its_status_whether_to_register_again(
    run: Run, runner: FakeRunner, maps: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "before.json"
    shutil.copy(maps / files.LAYOUT.format(0), saved)
    same = run("diff", saved, "0")
    assert same.status == 0
    assert "registrations hold; contents are the same" in same.out
    update(runner)
    written = run("diff", saved, "0", "--json")
    assert written.status == 0
    assert written.json["content_changed"] is True
    assert written.json["must_register_again"] is False
    kept = runner.model.layers[0].mlp.weight.data
    runner.model.layers[0].mlp.weight.data = torch.zeros(6, 6)
    update(runner)
    moved = run("diff", saved, "0")
    assert moved.status == 3
    assert "register again" in moved.out
    new = runner.model.layers[0].mlp.weight.data_ptr()
    assert f"{kept.data_ptr():#x} -> {new:#x}  layers.0.mlp.weight" in moved.out
    answer = run("diff", saved, "0", "--json").json
    assert answer["moved"] == ["layers.0.mlp.weight"]
    assert answer["old"]["owner_alive"] is None
    assert answer["new"]["owner_alive"] is True
    assert run("diff", saved, saved).status == 0


def test_diff_lists_ten_names_unless_all_are_asked_for(
    run: Run, runner: FakeRunner, maps: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "before.json"
    shutil.copy(maps / files.LAYOUT.format(0), saved)
    kept = [parameter.data for parameter in runner.model.parameters()]
    for parameter in runner.model.parameters():
        parameter.data = parameter.data.clone()
    update(runner)
    count = run("diff", saved, "0").out.count(" -> ")
    every = run("diff", saved, "0", "--all").out.count(" -> ")
    assert (count, every) == (10, len(run("diff", saved, "0", "--json").json["moved"]))
    assert every > count
    del kept
