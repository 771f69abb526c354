"""The page that ``plot`` writes, as a real browser shows it.

The documents are made up (`made_up_documents`), in the shape of ``docs/format.md``; the
browser is Debian's Chromium, and these tests are skipped where there is none.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_up_documents import BASE, HOSTILE, MIB, a_document, changed, layer_names

from sglang_weight_hook.commands.render import page as plot

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


def test_an_invalidated_map_is_shown_as_such(show: Show) -> None:
    invalidated = {
        **a_document(()),
        "state": "failed",
        "regions": [],
        "memory": {},
        "validation": {"problem": "capture failed: no"},
    }
    assert "Invalidated: capture failed: no" in show([invalidated])


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
