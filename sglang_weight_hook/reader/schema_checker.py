"""A JSON schema made ready once, for documents of which hundreds are checked.

`json_schema.violations` goes through the schema once for every value.  Here it is gone through once
for all, and becomes functions: what they accept has no violation, and what they do not accept is
asked about at length, for the words.  Rare keywords are left to `json_schema`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .json_schema import violations

Accepts = Callable[[Any], bool]

# What json.loads makes of a value of each type.
_TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
# Keywords that ask nothing of a value, and those that have functions here.
_SILENT = frozenset(("$schema", "$id", "title", "description", "$defs"))
_KNOWN = _SILENT | {
    *("$ref", "type", "enum", "minimum", "items", "minItems"),
    *("properties", "required", "additionalProperties"),
}


class Checker:
    """A schema made ready to say of many values whether they are good, and rarely why not.

    >>> checker = Checker({"properties": {"size": {"type": "integer", "minimum": 0}}})
    >>> list(checker.violations({"size": 1})), list(checker.violations({"size": -1}))
    ([], [('size', 'is -1, less than 0')])
    """

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self._schema = schema
        self._referred: dict[str, Accepts] = {}
        self._accepts = self._ready(schema)

    def violations(self, value: Any) -> Iterator[tuple[str, str]]:
        """Where ``value`` departs from the schema, and how."""
        if not self._accepts(value):
            yield from violations(value, self._schema)

    def _ready(self, schema: Any) -> Accepts:
        """A function that is true only of what has no violation; of nearly all of that."""
        if isinstance(schema, bool):
            return lambda value: schema
        tests: list[Accepts] = []
        if "$ref" in schema:
            tests.append(self._reference(schema["$ref"]))
        if "type" in schema:
            tests.append(_type_test(schema["type"]))
        if "enum" in schema:
            words = frozenset(word for word in schema["enum"] if isinstance(word, str))
            others = self._at_length({"enum": schema["enum"]})
            tests.append(lambda value: value in words if type(value) is str else others(value))
        if "minimum" in schema:
            least = schema["minimum"]
            tests.append(lambda value: type(value) not in (int, float) or value >= least)
        if "minItems" in schema:
            fewest = schema["minItems"]
            tests.append(lambda value: type(value) is not list or len(value) >= fewest)
        if "items" in schema:
            item = self._ready(schema["items"])
            tests.append(lambda value: type(value) is not list or all(map(item, value)))
        if schema.keys() & {"properties", "required", "additionalProperties"}:
            tests.append(self._members(schema))
        rest = {key: schema[key] for key in schema if key not in _KNOWN}
        if rest:
            tests.append(self._at_length(rest))
        return _together(schema, tests)

    def _members(self, schema: Mapping[str, Any]) -> Accepts:
        named = {key: self._ready(each) for key, each in schema.get("properties", {}).items()}
        others = self._ready(schema.get("additionalProperties", True))
        required = frozenset(schema.get("required", ()))

        def test(value: Any) -> bool:
            if type(value) is not dict:
                return True
            return value.keys() >= required and all(
                named.get(key, others)(item) for key, item in value.items()
            )

        return test

    def _reference(self, reference: str) -> Accepts:
        if reference not in self._referred:
            target: Any = self._schema
            for part in reference.lstrip("#/").split("/"):
                target = target[part]
            # There before it is ready, for it may refer to itself.
            self._referred[reference] = lambda value: self._referred[reference](value)
            self._referred[reference] = self._ready(target)
        return self._referred[reference]

    def _at_length(self, schema: Mapping[str, Any]) -> Accepts:
        root = self._schema
        return lambda value: not any(True for _ in violations(value, schema, root))


def _type_test(kinds: Any) -> Accepts:
    kinds = [kinds] if isinstance(kinds, str) else kinds
    types = frozenset(each for kind in kinds for each in _TYPES[kind])
    return lambda value: type(value) in types


def _together(schema: Mapping[str, Any], tests: list[Accepts]) -> Accepts:
    if len(tests) == 1:
        return tests[0]
    if schema.keys() <= {"type", "minimum", *_SILENT} and schema["type"] == "integer":
        least = schema["minimum"]  # what nearly all values are
        return lambda value: type(value) is int and value >= least
    if len(tests) == 2:
        first, second = tests
        return lambda value: first(value) and second(value)
    return lambda value: all(test(value) for test in tests)
