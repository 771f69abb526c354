"""A JSON schema made ready once, for documents of which hundreds are checked.

`json_schema.violations` goes through the schema once for every value.  Here it is gone through once
for all, and becomes functions of whole columns: a document has thousands of tensors with the same
fields, and all values of one field are asked about at once.  What the functions accept has no
violation, and what they do not accept is asked about at length, for the words.  Rare keywords are
left to `json_schema`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from .json_schema import violations

# Whether all of these values are good; they stand in the same place of as many objects.
Accepts = Callable[[Sequence[Any]], bool]

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
_NUMBERS = frozenset((int, float))
_TEXTS = frozenset((str,))
_TEXTS_OR_NONE = frozenset((str, type(None)))
_LISTS = frozenset((list,))
_OBJECTS = frozenset((dict,))
# Keywords that ask nothing of a value, and those that have functions here.
_SILENT = frozenset(("$schema", "$id", "title", "description", "$defs"))
_KNOWN = _SILENT | {
    *("$ref", "type", "enum", "minimum", "maximum", "items", "minItems"),
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
        self._accept_all = self._ready(schema)

    def violations(self, value: Any) -> Iterator[tuple[str, str]]:
        """Where ``value`` departs from the schema, and how."""
        if not self._accepts(value):
            yield from violations(value, self._schema)

    def _accepts(self, value: Any) -> bool:
        return self._accept_all([value])

    def _ready(self, schema: Any) -> Accepts:
        """A function that is true only of what has no violation; of nearly all of that."""
        if isinstance(schema, bool):
            return lambda values: schema or not values
        tests: list[Accepts] = []
        if "$ref" in schema:
            tests.append(self._reference(schema["$ref"]))
        if "type" in schema:
            tests.append(_type_test(schema["type"]))
        if "enum" in schema:
            tests.append(self._choice(schema["enum"]))
        if "minimum" in schema:
            least = schema["minimum"]
            tests.append(lambda values: min(_of(_NUMBERS, values), default=least) >= least)
        if "maximum" in schema:
            most = schema["maximum"]
            tests.append(lambda values: max(_of(_NUMBERS, values), default=most) <= most)
        if "minItems" in schema:
            fewest = schema["minItems"]
            tests.append(
                lambda values: min(map(len, _of(_LISTS, values)), default=fewest) >= fewest
            )
        if "items" in schema:
            item = self._ready(schema["items"])
            tests.append(lambda values: item(list(chain.from_iterable(_of(_LISTS, values)))))
        if schema.keys() & {"properties", "required", "additionalProperties"}:
            tests.append(self._members(schema))
        rest = {key: schema[key] for key in schema if key not in _KNOWN}
        if rest:
            tests.append(self._at_length(rest))
        return lambda values: all(test(values) for test in tests)

    def _members(self, schema: Mapping[str, Any]) -> Accepts:
        named = {key: self._ready(each) for key, each in schema.get("properties", {}).items()}
        others = self._ready(schema.get("additionalProperties", True))
        required = frozenset(schema.get("required", ()))

        def test(values: Sequence[Any]) -> bool:
            objects = _of(_OBJECTS, values)
            if not objects:
                return True
            names = set().union(*objects)
            if not names >= required:
                return False
            unnamed = names - named.keys()
            if unnamed and not others(
                [value for each in objects for key, value in each.items() if key in unnamed]
            ):
                return False
            for name in names - unnamed:
                column = [each[name] for each in objects if name in each]
                if len(column) < len(objects) and name in required:
                    return False
                if not named[name](column):
                    return False
            # Required, and not described: the lengths above were not those of its columns.
            return all(name in each for name in required & unnamed for each in objects)

        return test

    def _choice(self, choices: Sequence[Any]) -> Accepts:
        words = frozenset(choice for choice in choices if isinstance(choice, str))
        others = self._at_length({"enum": choices})
        allows_none = None in choices

        def test(values: Sequence[Any]) -> bool:
            texts = _of(_TEXTS, values)
            if not words.issuperset(texts):
                return False
            if len(texts) == len(values) or (
                allows_none and _TEXTS_OR_NONE.issuperset(map(type, values))
            ):
                return True
            return others([value for value in values if type(value) is not str])

        return test

    def _reference(self, reference: str) -> Accepts:
        if reference not in self._referred:
            target: Any = self._schema
            for part in reference.lstrip("#/").split("/"):
                target = target[part]
            # There before it is ready, for it may refer to itself.
            self._referred[reference] = lambda values: self._referred[reference](values)
            self._referred[reference] = self._ready(target)
        return self._referred[reference]

    def _at_length(self, schema: Mapping[str, Any]) -> Accepts:
        root = self._schema
        return lambda values: (
            not any(True for value in values for _ in violations(value, schema, root))
        )


def _type_test(kinds: Any) -> Accepts:
    kinds = [kinds] if isinstance(kinds, str) else kinds
    types = frozenset(each for kind in kinds for each in _TYPES[kind])
    return lambda values: types.issuperset(map(type, values))


def _of(types: frozenset[type], values: Sequence[Any]) -> Sequence[Any]:
    """Those of the values that are of one of the types: nearly always all of them."""
    if types.issuperset(map(type, values)):
        return values
    return [value for value in values if type(value) in types]
