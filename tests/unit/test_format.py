"""One source for the format: the types in ``layout`` make the schemas and the page's tables."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, TypedDict, get_args

import jsonschema
import pytest

from sglang_weight_hook.layout import documents, layout_document, state_document, states
from sglang_weight_hook.layout.field import Count, Field
from tools import format as generator

ROOT = Path(__file__).parents[2]


class Part(TypedDict, total=False):
    """One part."""

    name: Annotated[str, Field("What it is called.", required=True, pattern="^[a-z]+$")]


class Inner(TypedDict, total=False):
    """Either this | or that."""

    count: Annotated[Optional[Count], Field("How many.")]


class Whole(TypedDict, total=False):
    """Everything."""

    inner: Annotated[Inner, Field(required=True)]
    maybe: Optional[Inner]
    parts: Annotated[list[Part], Field("The parts.", max_items=2)]
    by_name: Annotated[dict[str, Part], Field("The parts by name.")]
    kind: Annotated[Optional[Literal["a", "b"]], Field("Which.")]
    share: Annotated[float, Field("How much.", minimum=0, maximum=1)]
    by_kind: Annotated[dict[Literal["a", "b"], bool], Field("Whether, by kind.")]


def whole(conditions: dict[str, Any] | None = None) -> dict[str, Any]:
    schema, _ = generator.schema_of("whole", Whole, conditions or {})
    return schema


def test_what_is_in_the_repository_is_current() -> None:
    for path, text in generator.outputs().items():
        assert path.read_text(encoding="utf-8") == text, "run python -m tools.format"


# --- from types to JSON Schema ------------------------------------------------------------


def test_types_and_constraints_become_json_schema() -> None:
    schema = whole()
    part = {"$ref": "#/$defs/part"}
    inner = {
        "type": "object",
        "description": "Either this | or that.",
        "properties": {
            "count": {"type": ["integer", "null"], "minimum": 0, "description": "How many."}
        },
    }
    assert schema["required"] == ["inner"]
    assert schema["properties"] == {
        "inner": inner,
        "maybe": {**inner, "type": ["object", "null"]},
        "parts": {"type": "array", "items": part, "description": "The parts.", "maxItems": 2},
        "by_name": {
            "type": "object",
            "additionalProperties": part,
            "description": "The parts by name.",
        },
        "kind": {"enum": ["a", "b", None], "description": "Which."},
        "share": {"type": "number", "description": "How much.", "minimum": 0, "maximum": 1},
        "by_kind": {
            "type": "object",
            "propertyNames": {"enum": ["a", "b"]},
            "additionalProperties": {"type": "boolean"},
            "description": "Whether, by kind.",
        },
    }
    assert schema["$defs"] == {
        "part": {
            "type": "object",
            "description": "One part.",
            "required": ["name"],
            "properties": {
                "name": {
                    "type": "string",
                    "description": "What it is called.",
                    "pattern": "^[a-z]+$",
                }
            },
        }
    }


@pytest.mark.parametrize(
    ("document", "good"),
    [
        ({"inner": {}}, True),
        ({"inner": {"count": None}, "maybe": None, "new": 1}, True),
        ({}, False),
        ({"inner": {"count": -1}}, False),
        ({"inner": {}, "parts": [{"name": "a"}]}, True),
        ({"inner": {}, "parts": [{}]}, False),
        ({"inner": {}, "parts": [{"name": "A"}]}, False),
        ({"inner": {}, "parts": [{"name": "a"}] * 3}, False),
        ({"inner": {}, "by_name": {"x": {}}}, False),
        ({"inner": {}, "kind": None}, True),
        ({"inner": {}, "kind": "c"}, False),
        ({"inner": {}, "by_kind": {"c": True}}, False),
    ],
)
def test_the_made_schema_accepts_and_refuses(document: dict[str, Any], good: bool) -> None:
    assert jsonschema.Draft202012Validator(whole()).is_valid(document) is good


def test_a_condition_is_added_to_its_type() -> None:
    condition = {"if": {"required": ["maybe"]}, "then": {"required": ["kind"]}}
    judge = jsonschema.Draft202012Validator(whole({"Whole": condition}))
    assert judge.is_valid({"inner": {}})
    assert not judge.is_valid({"inner": {}, "maybe": None})


@pytest.mark.parametrize(
    "condition",
    [
        {"required": ["absent"]},
        {"then": {"properties": {"absent": {}}}},
        {"else": {"properties": {"inner": {"required": ["absent"]}}}},
        {"anyOf": [{"required": ["kind"]}, {"required": ["absent"]}]},
    ],
)
def test_a_condition_on_a_field_that_does_not_exist_is_refused(condition: dict[str, Any]) -> None:
    with pytest.raises(generator.WrongFormat, match="names absent"):
        whole({"Whole": condition})


@pytest.mark.parametrize("conditions", [state_document.CONDITIONS, layout_document.CONDITIONS])
def test_every_condition_is_of_a_type_that_a_document_has(conditions: dict[str, Any]) -> None:
    types: set[str] = set()
    for name, kind in generator.DOCUMENTS.items():
        types |= set(generator.schema_of(name, kind)[1])
    assert set(conditions) <= types


def test_a_field_that_nothing_describes_is_refused() -> None:
    class Bare(TypedDict, total=False):
        field: Annotated[int, Field(required=True)]

    # A local name cannot be looked up from its annotation's text.
    Bare.__annotations__["field"] = Annotated[int, Field(required=True)]
    with pytest.raises(generator.WrongFormat, match=r"Bare\.field has no description"):
        generator.schema_of("bare", Bare, {})


@pytest.mark.parametrize("hint", [bytes, Any, dict, list[bytes], Optional[bytes], set[str]])
def test_a_type_that_json_does_not_have_is_refused(hint: Any) -> None:
    with pytest.raises(generator.WrongFormat, match="no JSON Schema"):
        generator.Objects({}).part(hint)


# --- from JSON Schema to the page ---------------------------------------------------------

PAGE = """# Words
<!-- begin generated: Inner -->
what was there before
<!-- end generated -->
more words
<!-- begin generated: Part -->
<!-- end generated -->
<!-- begin generated: Whole -->
<!-- end generated -->
"""


def test_tables_are_made_between_their_markers_and_words_around_them_stay() -> None:
    _, objects = generator.schema_of("whole", Whole, {})
    page = generator.page(PAGE, objects)
    assert page.startswith(
        """# Words
<!-- begin generated: Inner -->

Either this | or that.

| field | type | meaning |
|---|---|---|
| `count` | integer or null | How many. |

<!-- end generated -->
more words
<!-- begin generated: Part -->
"""
    )
    for row in (
        "| `inner` | object | Either this \\| or that. |",
        "| `maybe` | object or null | Either this \\| or that. |",
        "| `parts` | list of objects | The parts. |",
        "| `kind` | `a`, `b`, null | Which. |",
        "| `by_kind` | object | Whether, by kind. |",
    ):
        assert row in page.splitlines()
    assert generator.page(page, objects) == page


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (Optional[list[str]], "list of text or null"),
        (list[Optional[int]], "list of integer or null"),
        (list[Literal["a", "b"]], "list of `a`, `b`"),
        (list[dict[str, int]], "list of objects"),
        (Literal["a"], '`"a"`'),
        (Optional[bool], "boolean or null"),
    ],
)
def test_types_are_named_in_words(hint: Any, words: str) -> None:
    assert generator.words(generator.Objects({}).part(hint)) == words


@pytest.mark.parametrize(
    ("page", "problem"),
    [
        (PAGE.replace("Part", "Other"), "Other, Part"),
        (PAGE.replace("Part", "Inner"), "Part"),
        (PAGE + PAGE, "there twice"),
        (PAGE.removesuffix("<!-- end generated -->\n"), "does not end"),
        ("# Words\n", "Inner, Part, Whole"),
    ],
    ids=["unknown", "missing", "twice", "without an end", "no table"],
)
def test_a_page_that_lacks_a_table_is_refused(page: str, problem: str) -> None:
    _, objects = generator.schema_of("whole", Whole, {})
    with pytest.raises(generator.WrongFormat, match=problem):
        generator.page(page, objects)


# --- the command --------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for path in (generator.SCHEMAS, generator.PAGE.parent):
        shutil.copytree(ROOT / path, tmp_path / path)
    return tmp_path


def test_a_stale_file_is_named_by_check_and_made_anew_without(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generator.main(["--check"], checkout) == 0
    schema = checkout / generator.SCHEMAS / "weight_state.schema.json"
    current = schema.read_bytes()
    schema.write_text(json.dumps({}), encoding="utf-8")
    page = checkout / generator.PAGE
    page.write_text(page.read_text(encoding="utf-8").replace("First address.", "x"), "utf-8")
    assert capsys.readouterr().out == ""
    assert generator.main(["--check"], checkout) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"out of date: {generator.SCHEMAS}/weight_state.schema.json",
        f"out of date: {generator.PAGE}",
    ]
    assert schema.read_text(encoding="utf-8") == "{}"
    assert generator.main([], checkout) == 0
    assert schema.read_bytes() == current
    assert page.read_bytes() == (ROOT / generator.PAGE).read_bytes()
    assert generator.main(["--check"], checkout) == 0


def test_a_page_without_tables_fails_with_a_sentence(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkout / generator.PAGE).write_text("# Words\n", encoding="utf-8")
    assert generator.main([], checkout) == 1
    assert "needs one table a type" in capsys.readouterr().err


# --- the types and the code ---------------------------------------------------------------


def test_the_types_and_the_constants_hold_the_same_words() -> None:
    assert get_args(state_document.State) == states.STATES
    assert set(get_args(state_document.Residency)) == {states.RESIDENT, states.RELEASED}
    assert get_args(layout_document.Kind) == (
        documents.PARAMETER,
        documents.BUFFER,
        documents.ATTRIBUTE,
        documents.LORA,
    )
    for name, schema in (
        ("weight_state", documents.STATE_SCHEMA),
        ("weight_layout", documents.SCHEMA),
    ):
        properties = generator.schema_of(name, generator.DOCUMENTS[name])[0]["properties"]
        assert properties["schema"]["const"] == schema
        assert properties["schema_version"]["const"] == documents.SCHEMA_VERSION


def test_neither_half_imports_the_types_at_run_time() -> None:
    """They cost milliseconds, in a server and in every command, and are needed by tools alone."""
    code = (
        "import sys, sglang_weight_hook.publisher.recorder, sglang_weight_hook.reader\n"
        "import sglang_weight_hook.reader.verify, sglang_weight_hook.reader.slot\n"
        "print([name for name in sys.modules if name.endswith(('_document', 'layout.field'))])"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert shown.stdout == "[]\n"
