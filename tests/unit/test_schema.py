"""What the recorder publishes is what ``sglang_weight_hook/layout/schema`` says.

Documents of the real recorder over real torch models; ``tests/real_sglang/test_schema.py`` has
those of a real server.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from fake_sglang import FakeRunner, event, load, settle, stream, update, walk_json

import sglang_weight_hook
from sglang_weight_hook.layout import files
from sglang_weight_hook.publisher import capture

torch = pytest.importorskip("torch")

FOLDER = Path(sglang_weight_hook.__file__).parent / "layout" / "schema"
SCHEMAS = {
    files.LAYOUT: json.loads((FOLDER / "weight_layout.schema.json").read_bytes()),
    files.STATE: json.loads((FOLDER / "weight_state.schema.json").read_bytes()),
}


def validator(document: str) -> Any:
    return jsonschema.Draft202012Validator(SCHEMAS[document])


class Model(torch.nn.Module):  # type: ignore[misc, unused-ignore]
    """Parameters, a buffer, a plain attribute, tied names, an expanded and an empty tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(16, 8)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))
        self.head = torch.nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(1).expand(4))
        self.register_buffer("nothing", torch.empty(0))
        self.offloaded = torch.nn.Parameter(torch.empty(4, device="meta"))
        self.w_kc = torch.randn(4, 2).t()


def check(maps: Path, slot: str = "0") -> dict[str, Any]:
    """Both documents of the slot are valid; the state, for what the test wants to add."""
    for name in SCHEMAS:
        path = maps / name.format(slot)
        if path.exists():
            validator(name).validate(json.loads(path.read_bytes()))
    state: dict[str, Any] = json.loads((maps / files.STATE.format(slot)).read_bytes())
    return state


@pytest.fixture
def runner(maps: Path) -> FakeRunner:
    runner = FakeRunner(Model())
    load(runner)
    settle()
    return runner


@pytest.fixture
def layout(runner: FakeRunner, maps: Path) -> dict[str, Any]:
    """A published layout to break."""
    document: dict[str, Any] = json.loads((maps / files.LAYOUT.format("0")).read_bytes())
    return document


# --- what is published is valid -----------------------------------------------------------


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_schemas_are_schemas_and_every_field_is_described(name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMAS[name])
    for part in walk_json(SCHEMAS[name]):
        if isinstance(part, dict) and isinstance(part.get("properties"), dict):
            for field, schema in part["properties"].items():
                # Those without are conditions on fields that are described elsewhere.
                condition = not {"const", "enum", "type", "$ref"} & set(schema) or len(schema) == 1
                assert condition or "description" in schema, field


def test_every_state_from_load_to_update_is_valid(maps: Path) -> None:
    runner = FakeRunner()
    seen = []

    def load_it() -> None:
        seen.append(check(maps)["state"])
        runner.model = Model()

    event("load_model", "load", [runner], during=load_it)
    seen.append(check(maps)["state"])
    settle()
    seen.append(check(maps)["state"])
    update(runner, during=lambda: seen.append(check(maps)["state"]))
    stream(runner)
    check(maps)
    assert seen == ["loading", "loading", "ready", "updating"]


def test_a_failed_update_and_one_that_moves_a_tensor_are_valid(
    runner: FakeRunner, maps: Path
) -> None:
    event("update_weights_from_disk", "update", [runner], error=ValueError("x" * 5000))
    assert check(maps)["state"] == "failed"

    def move() -> None:
        runner.model.layers[0].weight.data = torch.zeros(8, 8)
        runner.model.extra = torch.nn.Linear(2, 2)

    update(runner, during=move)
    state = check(maps)
    assert (state["event"]["moved"], state["event"]["added"]) == (1, 2)


def test_released_weights_are_valid(runner: FakeRunner, maps: Path) -> None:
    details = {"tags": None, "physical": True}
    event("release_memory_occupation", "release", [runner], details=details)
    assert check(maps)["state"] == "released"
    event("resume_memory_occupation", "resume", [runner], details=details)
    assert check(maps)["state"] == "ready"


def test_an_invalidated_map_is_valid(
    runner: FakeRunner, maps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(capture, "capture", fail)
    update(runner)
    assert check(maps)["state"] == "failed"
    invalidated = json.loads((maps / files.LAYOUT.format("0")).read_bytes())
    assert invalidated["tensors"] == {}


def test_a_draft_and_its_target_are_valid(runner: FakeRunner, maps: Path) -> None:
    draft = FakeRunner(Model(), draft=True, draft_index=1)
    draft.model.embed.weight = runner.model.embed.weight
    load(draft)
    settle()
    check(maps)
    check(maps, "0_draft1")


def test_names_that_are_no_text_are_valid(maps: Path) -> None:
    runner = FakeRunner(torch.nn.Module())
    for name in ("</script>", "日本", "\ud800", '"\\\n', ""):
        runner.model._parameters[name] = torch.nn.Parameter(torch.zeros(1))
    load(runner)
    check(maps)


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_documents_of_an_earlier_release_are_valid(name: str) -> None:
    """A field that came later is not required."""
    folder = Path(__file__).parents[1] / "compatibility" / "documents_0_1"
    paths = sorted(folder.glob(f"*/{name.format('0')}"))
    assert paths
    for path in paths:
        validator(name).validate(json.loads(path.read_bytes()))


# --- what is not is refused ---------------------------------------------------------------


def test_fields_of_a_later_release_are_valid(layout: dict[str, Any]) -> None:
    layout["new"] = {}
    layout["identity"]["new"] = 1
    layout["memory"]["new_bytes"] = None
    next(iter(layout["tensors"].values()))["new"] = []
    validator(files.LAYOUT).validate(layout)


def first(layout: dict[str, Any]) -> dict[str, Any]:
    tensor: dict[str, Any] = layout["tensors"]["embed.weight"]
    return tensor


WRONG: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another schema": lambda d: d.update(schema="sglang-weight-state"),
    "a later version": lambda d: d.update(schema_version=2),
    "an unknown state": lambda d: d.update(state="done"),
    "no generation": lambda d: d.pop("layout_generation"),
    "a generation that is text": lambda d: d.update(layout_generation="1"),
    "an address as text": lambda d: first(d).update(ptr="0x7f00"),
    "a negative address": lambda d: first(d).update(ptr=-1),
    "an address beyond 64 bits": lambda d: first(d).update(ptr=2**64),
    "a size that is no integer": lambda d: first(d).update(size=1.5),
    "no span": lambda d: first(d).pop("span"),
    "an unknown kind": lambda d: first(d).update(kind="gradient"),
    "a shape that is text": lambda d: first(d).update(shape="[2, 3]"),
    "a region of nothing": lambda d: d["regions"][0].update(tensors=[]),
    "a region without its allocation": lambda d: d["regions"][0].pop("allocation_ptr"),
    "memory figures that are missing": lambda d: d["memory"].pop("weights_bytes"),
    "memory figures that are text": lambda d: d["memory"].update(weights_bytes="3 GiB"),
    "an event that ended without counts": lambda d: d["event"].pop("moved"),
    "an event without a beginning": lambda d: d["event"].pop("started_at"),
    "no process": lambda d: d["identity"].pop("pid"),
    "invalidated, and still with addresses": lambda d: d.update(validation={"problem": "x"}),
    "tensors as a list": lambda d: d.update(tensors=[]),
}


@pytest.mark.parametrize("spoil", WRONG.values(), ids=list(WRONG))
def test_a_wrong_layout_is_refused(
    spoil: Callable[[dict[str, Any]], Any], layout: dict[str, Any]
) -> None:
    validator(files.LAYOUT).validate(layout)
    wrong = copy.deepcopy(layout)
    spoil(wrong)
    with pytest.raises(jsonschema.ValidationError):
        validator(files.LAYOUT).validate(wrong)


@pytest.mark.parametrize("field", SCHEMAS[files.STATE]["required"])
def test_a_state_that_lacks_a_field_is_refused(field: str, runner: FakeRunner, maps: Path) -> None:
    state = check(maps)
    del state[field]
    with pytest.raises(jsonschema.ValidationError):
        validator(files.STATE).validate(state)


def test_every_field_that_is_published_is_described(layout: dict[str, Any], maps: Path) -> None:
    """A new field comes with its line in the types that the schemas are made of."""
    schema = SCHEMAS[files.LAYOUT]
    parts = schema["properties"]
    undescribed = set(layout) - set(parts)
    for part in ("identity", "event", "memory", "validation"):
        undescribed |= {
            f"{part}.{name}" for name in set(layout[part]) - set(parts[part]["properties"])
        }
    for tensor in layout["tensors"].values():
        undescribed |= set(tensor) - set(schema["$defs"]["tensor"]["properties"])
    for region in layout["regions"]:
        undescribed |= set(region) - set(schema["$defs"]["region"]["properties"])
    undescribed |= set(check(maps)) - set(SCHEMAS[files.STATE]["properties"])
    assert not undescribed


def test_every_field_of_the_schemas_is_in_the_format_page() -> None:
    page = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")
    fields = set()
    for schema in SCHEMAS.values():
        for part in walk_json(schema):
            if isinstance(part, dict) and isinstance(part.get("properties"), dict):
                fields |= set(part["properties"])
    assert [field for field in sorted(fields) if f"`{field}`" not in page] == []
