"""Make the JSON Schemas and the tables of ``docs/format.md`` from the types in ``layout``.

    python -m tools.format            write what is out of date
    python -m tools.format --check    only name it, and exit 1

In the page, a table stands between ``<!-- begin generated: NAME -->`` and
``<!-- end generated -->``, where NAME is that of a type; the words around are written by hand.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from sglang_weight_hook.layout import layout_document, state_document, transport_document
from sglang_weight_hook.layout.documents import SCHEMA_VERSION
from sglang_weight_hook.layout.field import Field

ROOT = Path(__file__).resolve().parents[1]
SCHEMAS = Path("sglang_weight_hook/layout/schema")
PAGE = Path("docs/format.md")

DOCUMENTS: Mapping[str, Any] = {
    "weight_layout": layout_document.LayoutDocument,
    "weight_state": state_document.StateDocument,
    "weight_transport": transport_document.TransportDocument,
}
CONDITIONS = {
    **state_document.CONDITIONS,
    **layout_document.CONDITIONS,
    **transport_document.CONDITIONS,
}

_SCALARS: Mapping[Any, str] = {str: "string", int: "integer", float: "number", bool: "boolean"}
# In the tables, by JSON Schema's name: one of them, several of them.
_WORDS = {
    "string": ("text", "text"),
    "integer": ("integer", "integers"),
    "number": ("number", "numbers"),
    "boolean": ("boolean", "booleans"),
    "object": ("object", "objects"),
    "array": ("list", "lists"),
    "null": ("null", "null"),
}
_BEGIN, _END = "<!-- begin generated: {} -->", "<!-- end generated -->"
_BLOCK = re.compile(r"<!-- begin generated: (\S+) -->\n.*?<!-- end generated -->", re.DOTALL)


class WrongFormat(Exception):
    """The types, or the page, do not say what has to be known."""


# --- from types to JSON Schema --------------------------------------------------------------


class Objects:
    """The JSON Schemas of all TypedDicts that are met on the way, by the types' names."""

    def __init__(self, conditions: Mapping[str, Mapping[str, Any]]) -> None:
        self.conditions = conditions
        self.found: dict[str, dict[str, Any]] = {}
        # What lists and maps consist of has a name of its own in a schema ("$defs").
        self.shared: dict[str, dict[str, Any]] = {}

    def of(self, kind: Any) -> dict[str, Any]:
        """The schema of a TypedDict."""
        name = kind.__name__
        required, properties = [], {}
        for field, hint in get_type_hints(kind, include_extras=True).items():
            properties[field] = self.part(hint)
            if not properties[field].get("description"):
                raise WrongFormat(f"{name}.{field} has no description")
            if get_origin(hint) is Annotated and any(
                isinstance(note, Field) and note.required for note in get_args(hint)[1:]
            ):
                required.append(field)
        result: dict[str, Any] = {"type": "object"}
        if kind.__doc__:
            result["description"] = " ".join(kind.__doc__.split())
        if required:
            result["required"] = required
        result["properties"] = properties
        condition = self.conditions.get(name, {})
        for unknown in _unknown_fields(condition, properties):
            raise WrongFormat(f"a condition of {name} names {unknown}, which is no field there")
        self.found[name] = {**result, **condition}
        return dict(self.found[name])

    def part(self, hint: Any) -> dict[str, Any]:
        """The schema of the type of one field."""
        origin, arguments = get_origin(hint), get_args(hint)
        if origin is Annotated:
            result = self.part(arguments[0])
            for note in arguments[1:]:
                if isinstance(note, Field):
                    result.update(_keywords(note))
            return result
        if origin is Union and len(arguments) == 2 and type(None) in arguments:
            return _or_null(self.part(next(one for one in arguments if one is not type(None))))
        if origin is Literal:
            choices = list(arguments)
            return {"const": choices[0]} if len(choices) == 1 else {"enum": choices}
        if origin is list:
            return {"type": "array", "items": self.member(arguments[0])}
        if origin is dict:
            names = {} if arguments[0] is str else {"propertyNames": self.part(arguments[0])}
            values = {"additionalProperties": self.member(arguments[1])}
            return {"type": "object", **names, **values}
        if hint in _SCALARS:
            return {"type": _SCALARS[hint]}
        if isinstance(hint, type) and issubclass(hint, dict) and hint is not dict:
            return self.of(hint)
        raise WrongFormat(f"{hint} has no JSON Schema here")

    def member(self, hint: Any) -> dict[str, Any]:
        """The schema of what a list or a map consists of."""
        result = self.part(hint)
        if "properties" not in result:
            return result
        if not isinstance(result["type"], str):
            raise WrongFormat(f"a list or map of {hint}, of which some are null")
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", hint.__name__).lower()
        self.shared[name] = result
        return {"$ref": f"#/$defs/{name}"}


def _keywords(field: Field) -> dict[str, Any]:
    """Everything that a `Field` says, in JSON Schema's spelling."""
    result = {}
    for name, value in field._asdict().items():
        if name != "required" and value not in (None, ""):
            first, *rest = name.split("_")
            result[first + "".join(word.title() for word in rest)] = value
    return result


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    if "const" in schema:
        return {"enum": [schema["const"], None]}
    if "enum" in schema:
        return {**schema, "enum": [*schema["enum"], None]}
    return {**schema, "type": [schema["type"], "null"]}


def _unknown_fields(condition: Mapping[str, Any], properties: Mapping[str, Any]) -> Iterator[str]:
    """Names in a condition that are no fields: such a condition would hold of nothing."""
    for keyword, value in condition.items():
        if keyword == "required":
            yield from (name for name in value if name not in properties)
        elif keyword == "properties":
            for name, inner in value.items():
                if name in properties:
                    yield from _unknown_fields(inner, properties[name].get("properties", {}))
                else:
                    yield name
        elif keyword in ("if", "then", "else"):
            yield from _unknown_fields(value, properties)
        elif keyword == "anyOf":
            for choice in value:
                yield from _unknown_fields(choice, properties)


def schema_of(
    name: str, kind: Any, conditions: Mapping[str, Mapping[str, Any]] = CONDITIONS
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The JSON Schema of a document, and those of all types in it by the types' names."""
    objects = Objects(conditions)
    body = objects.of(kind)
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:sglang-weight-hook:{name.replace('_', '-')}:{SCHEMA_VERSION}",
        "title": f"{name}_{{slot}}.json",
        **body,
    }
    if objects.shared:
        schema["$defs"] = objects.shared
    return schema, objects.found


# --- from JSON Schema to the page -----------------------------------------------------------


def words(schema: Mapping[str, Any]) -> str:
    """The type of a field for a reader of the page.

    >>> words({"type": ["integer", "null"]}), words({"enum": ["k", "v", None]})
    ('integer or null', '`k`, `v`, null')
    """
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "enum" in schema:
        return ", ".join("null" if one is None else f"`{one}`" for one in schema["enum"])
    kinds = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
    text = " or ".join(_WORDS[kind][0] for kind in kinds)
    if "items" in schema:
        items = schema["items"]
        of = "object" if "$ref" in items else items.get("type")
        members = _WORDS[of][1] if isinstance(of, str) else words(items)
        return text.replace("list", f"list of {members}", 1)
    return text


def table(schema: Mapping[str, Any]) -> str:
    """What the object is, and its fields."""
    rows = ["| field | type | meaning |", "|---|---|---|"]
    for name, field in schema["properties"].items():
        cells = (f"`{name}`", words(field), field["description"])
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join([schema.get("description", ""), "", *rows]).lstrip("\n")


def page(text: str, objects: Mapping[str, Mapping[str, Any]]) -> str:
    """The page with its tables made anew.  Raises WrongFormat for a type without a table."""
    seen = [match.group(1) for match in _BLOCK.finditer(text)]
    if len(seen) != text.count(_BEGIN.split("{}")[0]):
        raise WrongFormat(f"{PAGE}: a generated table does not end, or has no name")
    if sorted(seen) != sorted(objects):
        wrong = sorted(set(objects) ^ set(seen)) or sorted(seen)
        raise WrongFormat(
            f"{PAGE} needs one table a type, each between {_BEGIN.format('NAME')} and {_END}; "
            f"missing, unknown or there twice: {', '.join(wrong)}"
        )

    def block(match: re.Match[str]) -> str:
        name = match.group(1)
        # Blank lines, because not every Markdown renderer ends a table at a comment.
        return "\n\n".join([_BEGIN.format(name), table(objects[name]), _END])

    return _BLOCK.sub(block, text)


# --- the files ------------------------------------------------------------------------------


def outputs(root: Path = ROOT) -> dict[Path, str]:
    """What each generated file should hold."""
    result, objects = {}, {}
    for name, kind in DOCUMENTS.items():
        schema, found = schema_of(name, kind)
        objects.update(found)
        text = json.dumps(schema, indent=2, ensure_ascii=False)
        result[root / SCHEMAS / f"{name}.schema.json"] = text + "\n"
    result[root / PAGE] = page((root / PAGE).read_text(encoding="utf-8"), objects)
    return result


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.format", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--check", action="store_true", help="only name what is out of date; exit 1"
    )
    check = parser.parse_args(arguments).check
    try:
        wanted = outputs(root)
    except WrongFormat as error:
        print(f"tools.format: {error}", file=sys.stderr)
        return 1
    stale = [
        path
        for path, text in wanted.items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    for path in stale:
        if not check:
            path.write_text(wanted[path], encoding="utf-8")
        print(f"{'out of date' if check else 'written'}: {path.relative_to(root)}")
    if stale and check:
        print("run: python -m tools.format", file=sys.stderr)
    return 1 if stale and check else 0


if __name__ == "__main__":
    sys.exit(main())
