"""The page that ``plot`` writes: one file, nothing from outside.

The documents are made up (`made_up_documents`), in the shape of ``docs/format.md``.
"""

from __future__ import annotations

import doctest
import hashlib
import html.parser
import json
import re
from pathlib import Path
from typing import Any

import pytest
from made_up_documents import BASE, HOSTILE, a_document, changed, layer_names

from sglang_weight_hook.commands.render import page as plot


class Page(html.parser.HTMLParser):
    """What the tests ask of the markup; raises AssertionError on unbalanced elements."""

    VOID = ("meta", "input", "link", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.scripts: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.attributes += [(f"{tag}.{name}", value or "") for name, value in attributes]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        else:
            self.texts.append(data)

    @property
    def data(self) -> dict[str, Any]:
        data: dict[str, Any] = json.loads(self.scripts[0])
        return data


def names_of(slot: dict[str, Any]) -> list[str]:
    names, last = [], ""
    for shared, rest in zip(slot["names"][::2], slot["names"][1::2]):
        last = last[:shared] + rest
        names.append(last)
    return names


def addresses_of(slot: dict[str, Any]) -> list[int | None]:
    """As the page reckons them."""
    ends: dict[int, int] = {}
    found: list[int | None] = []
    for form, gap in zip(slot["forms"], slot["gaps"]):
        device, size = slot["formTable"][form][0], slot["formTable"][form][5]
        if gap is None:
            found.append(None)
            continue
        offset = ends.get(device, 0) + gap
        ends[device] = offset + size
        found.append(int(slot["places"][device][1], 16) + offset)
    return found


def test_it_is_one_wellformed_file_that_asks_nobody_for_anything(tmp_path: Path) -> None:
    output = tmp_path / "page.html"
    plot.write_html([a_document()], output)
    text = output.read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.scripts) == 2
    assert not re.search(r"(https?:)?//[a-z0-9-]+\.[a-z]", text)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|WebSocket|import\(", text)
    assert not [value for name, value in page.attributes if name.endswith((".src", ".href"))]
    policies = [value for name, value in page.attributes if name == "meta.content"]
    assert any("default-src 'none'" in policy for policy in policies)


def test_names_kinds_and_addresses_survive_the_packing() -> None:
    document = a_document(gap=4096)
    names = list(document["tensors"])
    document["tensors"][names[2]]["ptr"] = 0
    document["tensors"][names[3]].update(ptr=2**63 + 12345, device="cuda:1", aliases=["other"])
    (slot,) = Page(plot.page([document])).data["slots"]
    assert names_of(slot) == names
    expected = [tensor["ptr"] or None for tensor in document["tensors"].values()]
    assert addresses_of(slot) == expected
    assert slot["aliases"] == {"3": ["other"]}


def test_a_hostile_name_is_only_ever_a_name() -> None:
    document = a_document(HOSTILE)
    document["identity"]["model_path"] = "/x/" + HOSTILE[0].replace("/", "")
    document["validation"]["left_out"] = {HOSTILE[0]: HOSTILE[2]}
    document["state"] = '"><script>'
    text = plot.page([document])
    page = Page(text)
    assert names_of(page.data["slots"][0]) == list(HOSTILE)
    assert len(page.scripts) == 2
    assert "<img" not in text
    assert "owned" not in page.scripts[1]
    text.encode("utf-8")


def test_documents_that_lack_nearly_everything_are_shown() -> None:
    invalidated = {
        "identity": {"pid": 1},
        "tensors": {},
        "regions": [],
        "memory": {},
        "validation": {"problem": "capture failed"},
    }
    slots = Page(plot.page([invalidated, {}])).data["slots"]
    assert len(slots) == 2
    assert slots[0]["validation"]["problem"] == "capture failed"
    assert Page(plot.page([])).data["slots"] == []


def test_slots_are_told_apart_and_matched_with_those_before() -> None:
    documents = [a_document(rank=rank) for rank in range(2)]
    draft = a_document()
    draft["identity"].update(role="draft", draft_index=1)
    elsewhere = a_document()
    elsewhere["identity"]["hostname"] = "other"
    labels = [slot["label"] for slot in Page(plot.page([*documents, draft])).data["slots"]]
    assert labels == ["0", "1", "0_draft1"]
    labels = [slot["label"] for slot in Page(plot.page([documents[0], elsewhere])).data["slots"]]
    assert labels == ["node:0", "other:0"]
    labels = [slot["label"] for slot in Page(plot.page([documents[0], documents[0]])).data["slots"]]
    assert labels[0] == "0"
    assert labels[1] == "0 (pid 7)"


def test_a_diff_says_what_moved_came_and_went() -> None:
    before = [a_document(rank=0), a_document(rank=1)]
    data = Page(plot.page([changed(before[0])], before)).data
    assert data["removed"] == ["1"]
    (slot,) = data["slots"]
    names = names_of(slot)
    kinds = {names[int(index)]: kind for index, kind in slot["changes"].items()}
    assert kinds == {
        "model.layers.0.self_attn.qkv_proj.weight": plot.MOVED,
        "model.layers.0.self_attn.o_proj.weight": plot.RESIZED,
        "model.new.weight": plot.ADDED,
    }
    assert [row[0] for row in slot["removed"]] == ["model.layers.0.mlp.gate_up_proj.weight"]
    assert slot["diff"]["contentChanged"]
    was = slot["was"][str(names.index("model.layers.0.self_attn.qkv_proj.weight"))]
    assert int(slot["places"][0][1], 16) + was[1] == BASE


@pytest.mark.parametrize(("count", "limit"), [(3118, 300_000), (100_000, 5_000_000)])
def test_large_models_stay_small_files(count: int, limit: int) -> None:
    text = plot.page([a_document(layer_names(count), size=(64, 64), gap=512)])
    assert len(text.encode()) < limit


def test_slots_come_by_number_and_drafts_last() -> None:
    documents = [a_document(rank=rank) for rank in (10, 2, 0)]
    draft = a_document(rank=1)
    draft["identity"]["role"] = "draft"
    slots = Page(plot.page([draft, *documents], alive=[True, False, None, True])).data["slots"]
    assert [slot["label"] for slot in slots] == ["0", "2", "10", "1_draft"]
    assert [slot["alive"] for slot in slots] == [True, None, False, True]


def test_names_that_ranks_share_are_kept_once() -> None:
    documents = [a_document(layer_names(400), rank=rank) for rank in range(3)]
    slots = Page(plot.page(documents)).data["slots"]
    assert names_of(slots[0]) == list(documents[0]["tensors"])
    assert [slot["names"] for slot in slots[1:]] == [0, 0]


def test_events_are_cut_to_what_the_timeline_shows() -> None:
    lines: list[dict[str, Any]] = [
        {"kind": f"update_{number}", "message": "x" * 5000, "tensors": ["t" * 900] * 50, "pid": 1}
        for number in range(1000)
    ]
    (slot,) = Page(plot.page([a_document()], events=[lines])).data["slots"]
    assert [event["kind"] for event in slot["events"]] == [f"update_{n}" for n in range(800, 1000)]
    assert len(slot["events"][0]["message"]) == 500
    assert [len(name) for name in slot["events"][0]["tensors"]] == [300] * 5
    assert "pid" not in slot["events"][0]


def test_the_page_without_its_data_is_small_and_names_what_it_carries() -> None:
    text = plot.page([])
    assert len(text.encode()) < 1_000_000
    folder = Path(plot.__file__).parent
    licence = (folder / "page_d3_hierarchy.license.txt").read_text(encoding="utf-8")
    assert "d3-hierarchy 3.1.2" in text
    assert "".join(Page(text).texts).count(licence.strip()) == 1
    library = (folder / "page_d3_hierarchy.js").read_bytes()
    assert library.startswith(b"// https://d3js.org/d3-hierarchy/ v3.1.2 ")
    # As `tools/fetch_page_library.py --check` finds it in the registry's archive.
    digest = "a8771380454be89ec5ffe9a6396ba7c247081e348ae740dc9cb9629abd4c0e43"
    assert hashlib.sha256(library).hexdigest() == digest
    notice = (Path(__file__).parents[2] / "NOTICE").read_text(encoding="utf-8")
    assert "d3-hierarchy 3.1.2" in notice


def test_the_command_tells_the_page_who_lives_and_what_happened(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Slots whose owner has exited: marked as such, with their log."""
    pytest.importorskip("typer")
    from sglang_weight_hook.commands import entry

    for rank in (10, 9):
        document = a_document(rank=rank)
        state = {
            **{name: document[name] for name in SHARED if name in document},
            **document["identity"],
            "schema": "sglang-weight-state",
            "slot": str(rank),
        }
        (tmp_path / f"weight_layout_{rank}.json").write_text(json.dumps(document))
        (tmp_path / f"weight_state_{rank}.json").write_text(json.dumps(state))
    line = {"kind": "load_model", "success": True, "updated_at": 1795355420.0, "state": "ready"}
    (tmp_path / "weight_events_9.jsonl").write_text(json.dumps(line) + "\n")
    output = tmp_path / "page.html"
    monkeypatch.setattr(
        "sys.argv", ["sglang-weight-hook", "plot", "-o", str(output), "--dir", str(tmp_path)]
    )
    assert entry.main() == 3
    slots = Page(output.read_text(encoding="utf-8")).data["slots"]
    assert [slot["label"] for slot in slots] == ["9", "10"]
    assert [slot["alive"] for slot in slots] == [False, False]
    assert [[event["kind"] for event in slot["events"]] for slot in slots] == [["load_model"], []]


SHARED = (
    "schema_version",
    "state",
    "layout_generation",
    "content_generation",
    "physical_epoch",
    "updated_at",
    "event",
)


def test_the_examples_of_the_module_hold() -> None:
    assert doctest.testmod(plot).failed == 0
