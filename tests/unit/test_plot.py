"""The page that ``plot`` writes: one file, nothing from outside, and a real browser shows it.

The documents are made up here, in the shape of ``docs/format.md``; the browser is Debian's
Chromium, and its tests are skipped where there is none.
"""

from __future__ import annotations

import copy
import doctest
import html.parser
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from sglang_weight_hook.commands.render import page as plot

BASE = 0x7F20_0000_0000
MIB = 1 << 20
GIB = 1 << 30
HOSTILE = (
    "</script><script>document.title='owned'</script>",
    "<!--<script>",
    "<img src=x onerror=document.title='owned'>",
    "a&amp;b\u2028c",
    "\ud800 lone",
    "__proto__",
    "@DATA@ @TITLE@",
    '"\\',
)


def a_tensor(ptr: int, shape: list[int], device: str = "cuda:0", **more: Any) -> dict[str, Any]:
    size = 2
    for length in shape:
        size *= length
    return {
        "ptr": ptr,
        "size": size,
        "span": size,
        "device": device,
        "dtype": "torch.bfloat16",
        "shape": shape,
        "stride": [shape[1], 1] if len(shape) == 2 else [1],
        "storage_offset": 0,
        "storage_ptr": ptr,
        "storage_size": size,
        "kind": "parameter",
        "resident": True,
        "aliases": [],
        **more,
    }


MODULES = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")


def layer_names(count: int) -> Iterable[str]:
    for index in range(count):
        yield f"model.layers.{index // 4}.{MODULES[index % 4]}.weight"


def a_document(
    names: Iterable[str] = tuple(layer_names(8)),
    rank: int = 0,
    size: tuple[int, int] = (1024, 1024),
    gap: int = 0,
    **more: Any,
) -> dict[str, Any]:
    tensors, regions, ptr = {}, [], BASE
    device = f"cuda:{rank}"
    for name in names:
        tensor = tensors[name] = a_tensor(ptr, list(size), device)
        regions.append(
            {
                "ptr": ptr,
                "size": tensor["size"],
                "device": device,
                "allocation_ptr": ptr,
                "allocation_size": tensor["size"],
                "allocation_source": "driver",
                "allocation_kind": "cuda_malloc",
                "tensors": [name],
            }
        )
        ptr += tensor["size"] + gap
    weights = sum(tensor["size"] for tensor in tensors.values())
    kv = {"name": "k_buffer.0", "layer": 0, "role": "k", "ptr": ptr + GIB, "size": 4 * MIB}
    return {
        "schema": "sglang-weight-layout",
        "schema_version": 1,
        "state": "ready",
        "layout_generation": 1,
        "content_generation": 1,
        "physical_epoch": 0,
        "updated_at": 1795355421.0,
        "identity": {
            "hostname": "node",
            "boot_id": "b",
            "pid": 7,
            "process_start_ticks": 9,
            "gpu_id": rank,
            "role": "target",
            "device": "cuda",
            "tp_rank": rank,
            "tp_size": 4,
            "model_path": "/models/Tiny",
            "model_class": "LlamaForCausalLM",
        },
        "event": {"kind": "load_model", "success": True, "finished_at": 1795355420.0},
        "memory": {
            "weights_bytes": weights,
            "kv_cache_bytes": 4 * MIB,
            "device_total_bytes": 80 * GIB,
            "device_free_bytes": 60 * GIB,
            "kv_cache": [{**kv, "device": device, "dtype": "torch.bfloat16", "shape": [2, 2]}],
        },
        "validation": {"expected": {"parameter": len(tensors)}, "captured": {}, "left_out": {}},
        "regions": regions,
        "tensors": tensors,
        **more,
    }


def changed(document: dict[str, Any]) -> dict[str, Any]:
    """One tensor moved, one of another size, one gone, one new."""
    later = copy.deepcopy(document)
    later["layout_generation"] += 1
    later["content_generation"] += 1
    tensors = later["tensors"]
    names = list(tensors)
    tensors[names[0]]["ptr"] += 5 * GIB
    tensors[names[1]]["shape"] = [512, 1024]
    tensors[names[1]]["size"] //= 2
    del tensors[names[2]]
    tensors["model.new.weight"] = a_tensor(BASE + 6 * GIB, [256, 256])
    return later


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


# --- the file -----------------------------------------------------------------------------


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
    withdrawn = {
        "identity": {"pid": 1},
        "tensors": {},
        "regions": [],
        "memory": {},
        "validation": {"problem": "capture failed"},
    }
    slots = Page(plot.page([withdrawn, {}])).data["slots"]
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
    assert data["gone"] == ["1"]
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


def test_the_examples_of_the_module_hold() -> None:
    assert doctest.testmod(plot).failed == 0


# --- a browser ----------------------------------------------------------------------------

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")

Show = Callable[..., str]


@pytest.fixture
def show(tmp_path: Path) -> Show:
    """Open a page in a headless browser, run ``act`` in it, and return the document's HTML."""
    if BROWSER is None:
        pytest.skip("no chromium (apt-get install chromium)")
    assert BROWSER is not None
    browser: str = BROWSER

    def show(
        documents: list[dict[str, Any]],
        before: list[dict[str, Any]] | None = None,
        act: str = "",
        size: str = "1280,1600",
    ) -> str:
        path = tmp_path / "page.html"
        text = plot.page(documents, before)
        if act:
            text = text.replace("</body>", f"<script>{act}</script></body>")
        path.write_text(text, encoding="utf-8")
        done = subprocess.run(
            [
                browser,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                f"--user-data-dir={tmp_path / 'profile'}",
                f"--window-size={size}",
                "--virtual-time-budget=10000",
                "--enable-logging=stderr",
                f"--screenshot={tmp_path / 'page.png'}",
                "--dump-dom",
                path.as_uri(),
            ],
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
        assert 'data-errors="0"' in done.stdout
        assert 'data-ready="true"' in done.stdout
        assert (tmp_path / "page.png").stat().st_size > 10_000
        return done.stdout

    return show


def test_a_browser_shows_memory_modules_addresses_and_tensors(show: Show) -> None:
    dom = show([a_document(rank=rank) for rank in range(4)])
    for text in (
        "Weights of Tiny",
        "GPU memory",
        "Weights by module",
        "Address space",
        "KV cache",
        "Not accounted for",  # what the documents of an older hook leave open
        "60.0 GiB",
        "model.layers.0.self_attn.qkv_proj.weight",
        "0x7f2000000000",
        "TP 3 of 4",
    ):
        assert text in dom, text
    assert dom.count('class="tree"') == 4


def test_a_browser_runs_nothing_that_a_name_says(show: Show) -> None:
    dom = show([a_document(HOSTILE)])
    assert "<title>Weights of Tiny</title>" in dom
    shown = dom.partition('id="app"')[2].partition("<script")[0]
    assert "<img" not in shown
    assert "&lt;img src=x" in shown
    assert "\\ud800 lone" in shown


def test_without_device_figures_the_page_says_so(show: Show) -> None:
    document = a_document()
    document["memory"].update(device_total_bytes=None, device_free_bytes=None)
    document["identity"]["device"] = "cpu"
    dom = show([document], size="420,1600")
    assert "No device figures in the document, as the server runs on the CPU" in dom
    assert "<h2>Memory</h2>" in dom
    assert "NaN" not in dom.partition('id="app"')[2].partition("<script")[0]


def test_a_withdrawn_map_is_shown_as_such(show: Show) -> None:
    withdrawn = {
        **a_document(()),
        "state": "failed",
        "regions": [],
        "memory": {},
        "validation": {"problem": "capture failed: no"},
    }
    assert "Withdrawn: capture failed: no" in show([withdrawn])


SEARCH = """
const found = () => document.getElementById("found").textContent;
const box = document.getElementById("search"), results = [];
const search = async text => {
  box.value = text;
  box.dispatchEvent(new Event("input"));
  await new Promise(done => setTimeout(done, 300));
  results.push(found());
};
(async () => {
  for (const text of %s) await search(text);
  document.getElementById("live").textContent = "RESULTS " + JSON.stringify(results) + " END";
})();
"""


def results_of(dom: str) -> list[str]:
    found = re.search(r"RESULTS (.*) END</div>", dom)
    assert found is not None
    results: list[str] = json.loads(found.group(1).replace("&quot;", '"'))
    return results


def test_search_finds_names_aliases_dtypes_and_addresses(show: Show) -> None:
    document = a_document(gap=MIB)
    document["tensors"]["model.layers.0.mlp.down_proj.weight"]["aliases"] = ["tied.name"]
    document["tensors"]["model.layers.1.mlp.down_proj.weight"]["dtype"] = "torch.float8_e4m3fn"
    inside = hex(BASE + 3 * MIB + 16)  # the second one begins at 3 MiB
    asked = ["mlp down", "tied", "float8", inside, hex(BASE + 2 * MIB + 5), "nothing like it"]
    dom = show([document], act=SEARCH % json.dumps(asked))
    assert results_of(dom) == [
        "2 tensors",
        "1 tensor",
        "1 tensor",
        "model.layers.0.self_attn.o_proj.weight + 16 bytes",
        "no tensor holds this address",
        "0 tensors",
    ]


KEYS = """
const map = document.querySelector("canvas.tree"), results = [];
const path = () => results.push(document.querySelector(".card .row.soft").textContent);
const press = key => map.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
map.focus();
path();
press("ArrowRight"); press("Enter"); path();
press("ArrowRight"); press("Enter"); path();
press("Backspace"); press("Backspace"); path();
const box = map.getBoundingClientRect();
map.dispatchEvent(new MouseEvent("mousemove", { clientX: box.left + 60, clientY: box.top + 90 }));
results.push(document.getElementById("tip").textContent);
map.dispatchEvent(new MouseEvent("click", { clientX: box.left + 60, clientY: box.top + 90 }));
path();
const space = document.querySelector("canvas.space");
const clientY = space.getBoundingClientRect().top + 40;
const at = (type, clientX) => space.dispatchEvent(
  new MouseEvent(type, { clientX, clientY, buttons: 1, bubbles: true }));
space.focus();
for (const key of ["+", "+", "ArrowRight", "-", "0"])
  space.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
const left = space.getBoundingClientRect().left;
at("mousemove", left + 40);
results.push(document.getElementById("tip").textContent);
at("mousedown", left + 40); at("mouseup", left + 40);
at("mousedown", left + 40); at("mousemove", left + 90); at("mouseup", left + 90);
document.getElementById("theme").click();
document.querySelector("tbody tr.hit").click();
document.getElementById("live").textContent = "RESULTS " + JSON.stringify(results) + " END";
"""


def test_keys_and_clicks_open_modules_and_hovering_tells_all(show: Show) -> None:
    dom = show([a_document()], act=KEYS)
    results = results_of(dom)
    assert results[0].startswith("all weights")
    assert results[1].startswith("all weightsmodel.layers")
    assert len(results[2]) > len(results[1])
    assert results[3].startswith("all weights")
    tip = results[4]
    for text in ("model.layers.", ".weight", "2.00 MiB (2,097,152)", "bfloat16", "[1024, 1024]"):
        assert text in tip
    assert "parameter" in tip
    assert "0x7f20" in tip
    assert "model.layers.0.self_attn.qkv_proj.weight" in results[6]


def test_a_browser_shows_a_diff(show: Show) -> None:
    before = a_document()
    dom = show([changed(before)], [before])
    for text in (
        "What has changed",
        "1 moved",
        "1 resized",
        "1 added",
        "1 removed",
        "content 1 → 2",
    ):
        assert text in dom, text
    assert "model.layers.0.mlp.gate_up_proj.weight" in dom  # the removed one, in the table


def test_a_hundred_thousand_tensors_are_drawn(show: Show) -> None:
    dom = show([a_document(layer_names(100_000), size=(64, 64), gap=512)])
    assert "1 to 50 of 100,000" in dom
