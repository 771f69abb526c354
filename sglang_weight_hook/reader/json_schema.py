"""The part of JSON Schema (draft 2020-12) that the published schemas use, without a library."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Optional

# What of JSON Schema (draft 2020-12) the two schemas use.
KEYWORDS = (
    *("$schema", "$id", "title", "description", "$ref", "$defs"),
    *("type", "enum", "const", "anyOf", "if", "then", "else"),
    *("minimum", "maximum", "pattern", "minLength", "maxLength"),
    *("items", "minItems", "maxItems"),
    *("properties", "required", "additionalProperties", "propertyNames", "maxProperties"),
)

_TYPES: Mapping[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}


def violations(
    value: Any, schema: Any, root: Optional[Mapping[str, Any]] = None, where: str = ""
) -> Iterator[tuple[str, str]]:
    """Where ``value`` departs from ``schema``, and how; only the keywords in `KEYWORDS`.

    >>> list(violations({"size": -1}, {"properties": {"size": {"minimum": 0}}}))
    [('size', 'is -1, less than 0')]
    """
    if isinstance(schema, bool):
        if not schema:
            yield where, "should not be there"
        return
    root = schema if root is None else root
    if "$ref" in schema:
        target: Any = root
        for part in schema["$ref"].lstrip("#/").split("/"):
            target = target[part]
        yield from violations(value, target, root, where)
    if "type" in schema:
        kinds = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
        if not any(_is_of(value, kind) for kind in kinds):
            yield where, f"is no {' or '.join(kinds)}"
            return
    if "enum" in schema and not any(_same(value, choice) for choice in schema["enum"]):
        yield where, f"is {_short(value)}, none of {_short(schema['enum'])}"
    if "const" in schema and not _same(value, schema["const"]):
        yield where, f"is {_short(value)}, not {_short(schema['const'])}"
    if "anyOf" in schema and all(
        any(True for _ in violations(value, choice, root)) for choice in schema["anyOf"]
    ):
        yield where, "is nothing of what it may be"
    if "if" in schema:
        holds = not any(True for _ in violations(value, schema["if"], root))
        yield from violations(value, schema.get("then" if holds else "else", True), root, where)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if value < schema.get("minimum", -math.inf):
            yield where, f"is {_short(value)}, less than {schema['minimum']}"
        if value > schema.get("maximum", math.inf):
            yield where, f"is {_short(value)}, more than {schema['maximum']}"
    elif isinstance(value, str):
        if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", math.inf):
            yield where, f"has {len(value)} characters"
        if "pattern" in schema and not re.search(schema["pattern"], value):
            yield where, f"is {_short(value)}, which {schema['pattern']} does not match"
    elif isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", math.inf):
            yield where, f"has {len(value)} items"
        for position, item in enumerate(value if "items" in schema else ()):
            yield from violations(item, schema["items"], root, f"{where}[{position}]")
    elif isinstance(value, dict):
        yield from _object_violations(value, schema, root, where)


def _object_violations(
    value: Mapping[str, Any], schema: Mapping[str, Any], root: Mapping[str, Any], where: str
) -> Iterator[tuple[str, str]]:
    for name in schema.get("required", ()):
        if name not in value:
            yield where, f"lacks {name!r}"
    if len(value) > schema.get("maxProperties", math.inf):
        yield where, f"has {len(value)} members"
    properties = schema.get("properties", {})
    for name, item in value.items():
        inner = f"{where}.{name}" if where else name
        if "propertyNames" in schema:
            yield from violations(name, schema["propertyNames"], root, inner)
        if name in properties:
            yield from violations(item, properties[name], root, inner)
        elif "additionalProperties" in schema:
            yield from violations(item, schema["additionalProperties"], root, inner)


def _is_of(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()  # 1.0 is an integer in JSON Schema
    return isinstance(value, _TYPES[kind])


def _same(one: Any, other: Any) -> bool:
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
