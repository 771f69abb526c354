"""The page that ``plot`` writes, as a real browser shows it.

The documents are made up (`made_up_documents`), in the shape of ``docs/format.md``; the
browser is Debian's Chromium, and these tests are skipped where there is none.

Longer than 500 lines because one browser and its fixtures serve all that it shows.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_up_documents import BASE, HOSTILE, MIB, a_document, a_tensor, changed, layer_names

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
        alive: list[bool | None] | None = None,
        events: list[list[dict[str, Any]]] | None = None,
        address: str = "",
        options: tuple[str, ...] = (),
    ) -> str:
        path = tmp_path / "page.html"
        text = plot.page(documents, before, alive, events)
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
                *options,
                "--dump-dom",
                path.as_uri() + address,
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


def test_no_figure_of_the_memory_bar_is_cut_into_another_one(show: Show) -> None:
    document = a_document()
    document["memory"].update(
        weights_bytes=4_700_000_000, kv_cache_bytes=12_345_678_901, device_free_bytes=60 << 30
    )
    act = """
    const shown = [];
    for (const part of document.querySelectorAll(".mem .bar > div:not(.narrow)")) {
      const figure = part.lastElementChild, low = part.getBoundingClientRect().bottom;
      const top = figure.getBoundingClientRect().top;
      shown.push([part.title, top >= low - 4, figure.scrollWidth > figure.clientWidth]);
    }
    document.getElementById("live").textContent = "RESULTS " + JSON.stringify(shown) + " END";
    """
    hidden = {}
    for size in ("1280,1600", "500,1600"):
        shown = answers_of(show([document], act=act, size=size))
        assert len(shown) >= 3
        assert [title for title, is_hidden, is_cut in shown if is_cut and not is_hidden] == []
        hidden[size] = sum(is_hidden for _, is_hidden, _ in shown)
    assert hidden["500,1600"] > 0  # so there was something to hide
    assert hidden["1280,1600"] < len(shown)


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


def answers_of(dom: str) -> Any:
    found = re.search(r"RESULTS (.*) END</div>", dom)
    assert found is not None
    return json.loads(html.unescape(found.group(1)))


def test_search_finds_names_aliases_dtypes_and_addresses(show: Show) -> None:
    document = a_document(gap=MIB)
    document["tensors"]["model.layers.0.mlp.down_proj.weight"]["aliases"] = ["tied.name"]
    document["tensors"]["model.layers.1.mlp.down_proj.weight"]["dtype"] = "torch.float8_e4m3fn"
    inside = hex(BASE + 3 * MIB + 16)  # the second one begins at 3 MiB
    asked = ["mlp down", "tied", "float8", inside, hex(BASE + 2 * MIB + 5), "nothing like it"]
    (buffer,) = document["memory"]["kv_cache"]
    asked.append(str(buffer["ptr"] + 1000))
    dom = show([document], act=SEARCH % json.dumps(asked))
    assert results_of(dom) == [
        "2 tensors",
        "1 tensor",
        "1 tensor",
        "model.layers.0.self_attn.o_proj.weight + 16 bytes",
        "no tensor and no KV cache holds this address",
        "0 tensors",
        "KV cache k_buffer.0 of slot 0 + 1,000 bytes",
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


def a_model(layers: int = 24, experts: int = 0, rank: int = 0) -> dict[str, Any]:
    """Tensors of very different sizes, as a model has them; layers registered out of order."""
    names: list[tuple[str, list[int]]] = [("model.embed_tokens.weight", [8000, 1024])]
    for layer in reversed(range(layers)):
        start = f"model.layers.{layer}."
        names += [
            (start + "input_layernorm.weight", [1024]),
            (start + "self_attn.qkv_proj.weight", [3072, 1024]),
            (start + "self_attn.o_proj.weight", [1024, 1024]),
        ]
        for expert in range(experts):
            names.append((start + f"mlp.experts.{expert}.w13.weight", [700, 1024]))
            names.append((start + f"mlp.experts.{expert}.w2.weight", [1024, 350]))
        if not experts:
            names.append((start + "mlp.gate_up_proj.weight", [6000, 1024]))
            names.append((start + "mlp.down_proj.weight", [1024, 3000]))
    names += [("model.norm.weight", [1024]), ("lm_head.weight", [8000, 1024])]
    document = a_document((), rank=rank)
    place = BASE
    for name, shape in names:
        document["tensors"][name] = a_tensor(place, shape, f"cuda:{rank}")
        place += int(document["tensors"][name]["size"])
    document["memory"]["weights_bytes"] = place - BASE
    return document


TELL = """
const tell = what => {
  document.getElementById("live").textContent = "RESULTS " + JSON.stringify(what) + " END";
};
const map = document.querySelector("canvas.tree"), lines = document.querySelector("canvas.lines");
const box = document.getElementById("search");
const wait = ms => new Promise(done => setTimeout(done, ms));
const search = async text => {
  box.value = text; box.dispatchEvent(new Event("input")); await wait(300);
};
const on = (type, x, y) => {
  const at = map.getBoundingClientRect();
  map.dispatchEvent(new MouseEvent(type, { clientX: at.left + x, clientY: at.top + y }));
};
const tip = () => document.getElementById("tip");
const tone = name => {
  const once = { willReadFrequently: true };
  const pen = document.createElement("canvas").getContext("2d", once);
  const style = getComputedStyle(document.documentElement);
  pen.fillStyle = style.getPropertyValue("--" + name).trim();
  pen.fillRect(0, 0, 1, 1);
  return pen.getImageData(0, 0, 1, 1).data.slice(0, 3).join();
};
const pixels = (canvas, found = {}) => {
  const copy = Object.assign(document.createElement("canvas"), { width: canvas.width,
    height: canvas.height });
  const pen = copy.getContext("2d", { willReadFrequently: true });
  pen.drawImage(canvas, 0, 0);
  const { data } = pen.getImageData(0, 0, canvas.width, canvas.height);
  for (let i = 0; i < data.length; i += 4) {
    const colour = data[i + 3] ? data.slice(i, i + 3).join() : "none";
    found[colour] = (found[colour] || 0) + 1;
  }
  return found;
};
"""
# What the legend says belongs to a colour, and how many pixels have it.
AREAS = """
const keys = {};
for (const key of document.querySelectorAll(".key .swatch")) {
  const name = key.style.background.match(/--([a-z0-9]+)/)[1];
  keys[key.parentElement.textContent.replace(/ [\\d.]+ [KMGT]?i?B$/, "")] = tone(name);
}
tell([keys, pixels(map), map.width * map.height]);
"""


@pytest.mark.parametrize(
    ("layers", "experts", "size"),
    [(24, 0, "1280,1600"), (24, 62, "1280,1600"), (58, 256, "1280,1600"), (24, 8, "500,1600")],
)
def test_areas_are_bytes(show: Show, layers: int, experts: int, size: str) -> None:
    """A group's share of the pixels is its share of the bytes, within 5 % of itself."""
    document = a_model(layers, experts)
    keys, found, area = answers_of(show([document], act=TELL + AREAS, size=size))
    sizes: dict[str, int] = {}
    for name, tensor in document["tensors"].items():
        module = name.split(".")[-2]
        sizes[module] = sizes.get(module, 0) + tensor["size"]
    total = sum(sizes.values())
    compared = 0
    for module, bytes_ in sizes.items():
        if bytes_ * 100 < total:  # less than a column of pixels
            continue
        share = found[keys[module]] / area
        assert share == pytest.approx(bytes_ / total, rel=0.05), module
        compared += 1
    assert compared >= 3
    assert found.get("none", 0) < area * 0.01  # nothing is left between them


PLACES = """
const places = {};
for (let y = 1; y < map.clientHeight; y += 6) for (let x = 1; x < map.clientWidth; x += 6) {
  on("mousemove", x, y);
  const layer = tip().querySelector("b").textContent.match(/layers\\.(\\d+)/);
  if (!layer) continue;
  const place = places[layer[1]] ||= [Infinity, Infinity];
  place[0] = Math.min(place[0], y); place[1] = Math.min(place[1], x);
}
tell(places);
"""


def test_layers_are_read_like_a_text_whatever_their_order_in_the_document(show: Show) -> None:
    places = answers_of(show([a_model(24)], act=TELL + PLACES))
    # A row of rectangles begins at one height, to the pixels that were not hovered.
    order = sorted(places, key=lambda layer: (round(places[layer][0] / 12), places[layer][1]))
    assert order == [str(layer) for layer in range(24)]


OPENING = """
(async () => {
  const found = [];
  for (const [x, y] of [[0.2, 0.3], [0.5, 0.5], [0.7, 0.8], [0.35, 0.05], [0.9, 0.95]]) {
    document.querySelector(".card .row.soft button").click();
    on("mousemove", x * map.clientWidth, y * map.clientHeight);
    const named = tip().querySelector("b").textContent, says = tip().textContent;
    on("click", x * map.clientWidth, y * map.clientHeight);
    await wait(20);
    const parts = new URLSearchParams(location.hash.slice(1));
    found.push([named, says, parts.get("path"), document.getElementById("live").textContent]);
  }
  tell(found);
})();
"""


def test_a_click_opens_what_hovering_names(show: Show) -> None:
    """From all weights to one layer's experts with one click."""
    found = answers_of(show([a_model(24, 62)], act=TELL + OPENING))
    opened = []
    for named, says, path, said in found:
        if f"opens {named}" in says:
            assert path == named
            opened.append(path)
        else:
            assert "chooses this tensor" in says
            assert said.startswith(f"{named} at 0x")
    assert [path for path in opened if re.fullmatch(r"model\.layers\.\d+\.mlp\.experts", path)]


FOUND = """
(async () => {
  const results = [], before = map.toDataURL();
  for (const text of %s) {
    scrollTo(0, 0);
    await search(text);
    results.push([document.getElementById("found").textContent, pixels(lines)[tone("hit")] || 0,
      scrollY, map.getBoundingClientRect().top, map.toDataURL() === before]);
  }
  box.dispatchEvent(new KeyboardEvent("keydown", { key: "Enter" }));
  results.push(document.getElementById("found").textContent);
  tell([innerHeight, results]);
})();
"""


def test_search_scrolls_to_its_hits_and_outlines_them(show: Show) -> None:
    """Globs, parts and addresses; of what was not hit nothing is dimmed."""
    document = a_model(24)
    place = document["tensors"]["model.layers.7.input_layernorm.weight"]["ptr"]
    asked = ["model.layers.1?.self_attn.*", "layers.3.mlp", hex(place + 2), "no such", "*.norm.*"]
    dom = show([document], act=TELL + FOUND % json.dumps(asked), size="1280,500")
    height, results = answers_of(dom)
    *each, last = results
    assert [row[0] for row in each] == [
        "20 tensors",
        "2 tensors",
        "model.layers.7.input_layernorm.weight + 2 bytes",
        "0 tensors",
        "1 tensor",
    ]
    for text, (_, outlined, scrolled, top, same) in zip(asked, each):
        assert same, text
        if text == "no such":
            assert outlined == 0
        else:
            assert outlined > 20, text
            assert scrolled > 0, text
            assert 0 < top < height, text
    assert last == "1 of 1 tensor"


SHOWN = """
const shown = () => [document.querySelector(".card .row.soft").textContent, box.value,
  document.documentElement.dataset.theme, document.getElementById("found").textContent,
  [...document.querySelectorAll(".tile[aria-pressed=true]")].map(tile => tile.dataset.slot)];
"""
ADDRESS = """
(async () => {
  document.querySelector(".tile[data-slot='1']").click();
  await search("qkv*");
  await search("o_proj");
  document.getElementById("theme").click(); document.getElementById("theme").click();
  const first = location.hash;
  location.hash = "#path=model.layers.3&slot=0";
  await wait(300);
  tell([first, shown()]);
})();
"""


def test_the_address_says_what_is_shown_and_shows_what_it_says(show: Show) -> None:
    documents = [a_model(rank=0), a_model(rank=1)]
    first, later = answers_of(show(documents, act=TELL + SHOWN + ADDRESS))
    assert first == "#search=o_proj&slot=1&theme=dark"
    assert later == ["all weightsmodellayers3", "", "light", "", ["0"]]
    address = "#search=o_proj&path=model.layers&slot=1&theme=dark"
    act = TELL + SHOWN + "tell([location.hash, shown()])"
    hash_, shown = answers_of(show(documents, act=act, address=address))
    assert hash_ == address
    assert shown == ["all weightsmodellayers", "o_proj", "dark", "48 tensors", ["1"]]
    text = html.unescape(show(documents))
    for part in ("search=TEXT", "path=MODULE", "slot=SLOT", "theme=dark"):
        assert part in text


@pytest.mark.parametrize(("scheme", "theme"), [("0", "dark"), ("1", "light")])
def test_the_theme_is_the_systems_until_it_is_switched(show: Show, scheme: str, theme: str) -> None:
    act = (
        TELL
        + """
    const seen = [];
    const look = () => seen.push([document.documentElement.dataset.theme, location.hash]);
    look();
    for (let i = 0; i < 3; i++) { document.getElementById("theme").click(); look(); }
    tell(seen);
    """
    )
    options = (f"--blink-settings=preferredColorScheme={scheme}",)
    seen = answers_of(show([a_document()], act=act, options=options))
    assert seen == [[theme, ""], ["light", "#theme=light"], ["dark", "#theme=dark"], [theme, ""]]


def a_fleet() -> list[dict[str, Any]]:
    documents = []
    for node in range(8):
        for gpu in range(8):
            document = a_document(rank=gpu)
            document["identity"]["hostname"] = f"node{node + 4}"
            documents.append(document)
    return documents


def test_many_slots_are_one_overview_and_are_drawn_when_they_are_opened(show: Show) -> None:
    act = (
        TELL
        + """
    const labels = [...document.querySelectorAll(".tile")].map(tile => tile.dataset.slot);
    const height = document.documentElement.scrollHeight;
    const trees = () => document.querySelectorAll("canvas.tree").length;
    const before = trees();
    document.querySelector(".tile[data-slot='node10:3']").click();
    tell([labels, before, trees(), height, location.hash]);
    """
    )
    labels, before, after, height, address = answers_of(show(a_fleet(), act=act, size="1280,800"))
    assert labels == [f"node{node}:{gpu}" for node in range(4, 12) for gpu in range(8)]
    assert (before, after) == (0, 1)
    assert height < 1500
    assert address == "#slot=node10%3A3"


def test_a_search_goes_through_slots_that_are_not_open(show: Show) -> None:
    documents = a_fleet()
    documents[42]["tensors"]["only.here.weight"] = a_tensor(BASE, [8, 8])
    act = TELL + (
        'search("only.here").then(() => tell([found.textContent, location.hash,'
        ' document.querySelectorAll(".tile.found").length]))'
    )
    assert answers_of(show(documents, act=act)) == [
        "1 tensor",
        "#search=only.here&slot=node9%3A2",
        1,
    ]


@pytest.mark.parametrize(
    ("state", "alive", "says"),
    [
        ("ready", False, "The owner of slot 0 has exited"),
        ("updating", True, "Slot 0 is updating: weights are being changed"),
        ("released", True, "Slot 0 is released"),
        ("failed", None, "Slot 0 is failed"),
    ],
)
def test_a_stale_slot_has_a_red_banner(
    show: Show, state: str, alive: bool | None, says: str
) -> None:
    dom = show([a_document(state=state)], alive=[alive])
    shown = dom.partition('id="app"')[2].partition("<script")[0]
    assert '<div class="banner" id="stale" role="alert">' in shown
    assert says in shown
    assert ">ready<" not in shown


def test_a_slot_that_is_ready_has_no_banner(show: Show) -> None:
    dom = show([a_document()], alive=[True])
    assert 'id="stale"' not in dom
    assert '<span class="pill ready">ready</span>' in dom


def test_the_timeline_is_the_event_log(show: Show) -> None:
    log: list[dict[str, Any]] = [
        {"kind": "load_model", "success": True, "state": "ready", "finished_at": 1795355420.0},
        {"kind": "unannounced_change", "moved": 2, "finished_at": 1795355480.0},
        {"kind": HOSTILE[2], "success": False, "message": HOSTILE[0], "finished_at": 1795355500.0},
        {"kind": None, "finished_at": None},
    ]
    dom = show([a_document()], alive=[True], events=[log])
    shown = dom.partition('id="timeline"')[2].partition("</section></div></section>")[0]
    for text in ("4 events", "load_model", "2 moved", "2026-11-22 13:50:20 UTC"):
        assert text in shown, text
    assert shown.count("<li>") == 4
    assert "<img" not in shown
    assert 'id="timeline"' not in show([a_document()], alive=[True])


@pytest.mark.parametrize("size", ["500,900", "390,844"])
def test_nothing_is_wider_than_a_phone(show: Show, size: str) -> None:
    act = (
        TELL
        + """
    const size = each => parseFloat(getComputedStyle(each).fontSize);
    const small = [...document.querySelectorAll("#app *")].filter(each => !each.children.length
      && each.textContent.trim() && each.offsetWidth && size(each) < 12 && size(each) > 0);
    tell([document.documentElement.scrollWidth, innerWidth, small.map(each => each.textContent)]);
    """
    )
    log = [{"kind": "load_model", "success": True, "finished_at": 1795355420.0}]
    documents = [a_model(8, 8, rank) for rank in range(2)]
    dom = show(documents, act=act, size=size, alive=[True, False], events=[log, log])
    wide, inner, small = answers_of(dom)
    assert wide <= inner
    assert small == []


def test_the_strip_of_addresses_says_how_it_is_zoomed(show: Show) -> None:
    act = (
        TELL
        + """
    const ends = () => document.querySelector(".ends.mono").textContent, seen = [ends()];
    for (const name of ["Zoom in", "Zoom in", "Move to higher addresses", "Zoom out", "Show all"]) {
      document.querySelector(`[aria-label="${name}"]`).click();
      seen.push(ends());
    }
    tell(seen);
    """
    )
    dom = show([a_model()], act=act)
    seen = answers_of(dom)
    assert len(set(seen[:5])) == 5
    assert seen[5] == seen[0]
    assert "Zoom with the buttons, by dragging over a range, with Ctrl + wheel, or with keys" in dom
