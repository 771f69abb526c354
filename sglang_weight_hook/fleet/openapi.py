"""The OpenAPI document that the agent serves of itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import __version__

ADDRESS = "0[xX][0-9a-fA-F]{1,16}|[0-9]{1,19}"
LATEST = 10**12  # seconds since 1970

_NULL = {"type": "null"}
_TEXT = {"type": "string"}
_COUNT = {"type": "integer", "minimum": 0}
_NUMBER = {"type": "number"}


def _or_null(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"anyOf": [dict(schema), _NULL]}


def _object(required: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": {**required, **more}}


def _list(of: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": dict(of)}


def _reference(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


_SLOT_FIELDS: dict[str, Any] = {
    "id": {**_TEXT, "description": "Under which the other paths know the slot."},
    "slot": {**_TEXT, "description": "The slot's name in its directory."},
    "directory": _TEXT,
    "owner_alive": {
        "type": "boolean",
        "description": "Whether the SGLang process that publishes the slot lives.",
    },
    "certain": {"type": "boolean", "description": "Whether that is beyond doubt."},
    "why": {**_TEXT, "description": "What it rests on."},
    "problem": {**_or_null(_TEXT), "description": "Why the slot cannot be read; null if it can."},
    "state": {
        **_or_null({"type": "object"}),
        "description": "The published state document (sglang-weight-state).",
    },
    "summary": {
        "type": "object",
        "description": "Identity of the runner and sums of its memory; empty without a layout.",
    },
    "layout": {
        **_or_null(_object({"etag": _TEXT, "size": _COUNT})),
        "description": "Entity tag and bytes of the published layout document.",
    },
}

SCHEMAS: dict[str, Any] = {
    "Error": _object({"error": _TEXT}),
    "Slot": _object(
        _SLOT_FIELDS,
        checked_at={
            **_or_null(_NUMBER),
            "description": "When map and memory were last found equal, in seconds since 1970-01-01 "
            "UTC.",
        },
    ),
    "Slots": _object(
        {
            "schema": {"const": "sglang-weight-agent"},
            "schema_version": {"const": 1},
            "hostname": _TEXT,
            "boot_id": _or_null(_TEXT),
            "agent": {
                **_or_null(_object({"id": _TEXT, "node": _TEXT})),
                "description": "What this run of the agent registers its slots under in etcd; null "
                "where it registers none.",
            },
            "time": _NUMBER,
            "directories": _list(_object({"path": _TEXT, "problem": _or_null(_TEXT)})),
            "slots": _list(_reference("Slot")),
        }
    ),
    "Regions": _object(
        {
            "id": _TEXT,
            "slot": _TEXT,
            "state": _TEXT,
            "owner_alive": {"type": "boolean"},
            "layout_generation": _COUNT,
            "content_generation": _COUNT,
            "regions": _list({"type": "object"}),
        }
    ),
    "History": _object({"events": _list({"type": "object"})}),
    "Lookup": _object(
        {
            "addresses": _list(
                _object(
                    {
                        "address": _COUNT,
                        "found": {"type": "boolean"},
                        "slots": _list({"type": "object"}),
                    }
                )
            ),
            "problems": _list(_object({"id": _TEXT, "problem": _TEXT})),
        }
    ),
}

_FAILURES = {
    "400": "The request is not understood.",
    "401": "The token is missing or wrong.",
    "403": "It is not told to this client.",
    "404": "There is no such slot, or it has no such document now.",
    "416": "The document has no such bytes.",
    "429": "Too many are asking at once.",
    "503": "The published files cannot be read now.",
}

_ID = {
    "name": "id",
    "in": "path",
    "required": True,
    "schema": {"type": "string", "minLength": 1},
    "description": "A slot's id, as /slots lists it.",
}
_SLOT_QUERY = {
    "name": "slot",
    "in": "query",
    "schema": _TEXT,
    "description": "Only the slot of this id.",
}

_HISTORY: tuple[Mapping[str, Any], ...] = (
    _ID,
    {
        "name": "since",
        "in": "query",
        "schema": {"type": "number", "minimum": 0, "exclusiveMaximum": LATEST},
        "description": "Only events published then or later, in seconds since 1970-01-01 UTC.",
    },
    {
        "name": "kind",
        "in": "query",
        "schema": {"type": "string", "maxLength": 200},
        "description": "Only events of a kind like this pattern, for example update_*.",
    },
    {
        "name": "limit",
        "in": "query",
        "schema": {"type": "integer", "minimum": 1, "maximum": 10000, "default": 1000},
        "description": "At most so many, the latest.",
    },
)


def _content(schema: Mapping[str, Any], media_type: str = "application/json") -> dict[str, Any]:
    return {media_type: {"schema": dict(schema)}}


def _operation(
    name: str,
    summary: str,
    content: Mapping[str, Any],
    failures: tuple[str, ...] = (),
    parameters: tuple[Mapping[str, Any], ...] = (),
    is_cached: bool = True,
    ranges: bool = False,
) -> dict[str, Any]:
    responses: dict[str, Any] = {"200": {"description": "The answer.", "content": dict(content)}}
    if ranges:
        responses["206"] = {"description": "The part asked for.", "content": dict(content)}
    if is_cached:
        responses["304"] = {"description": "It is what the client has (If-None-Match)."}
    for status in sorted({"400", "401", "403", "503", *failures}):
        responses[status] = {
            "description": _FAILURES[status],
            "content": _content(_reference("Error")),
        }
    return {
        "get": {
            "operationId": name,
            "summary": summary,
            "parameters": [dict(each) for each in parameters],
            "responses": responses,
        }
    }


def description(has_token: bool = False) -> dict[str, Any]:
    """The whole document.  ``has_token``: whether a bearer token is asked for."""
    found: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "SGLang weight agent",
            "version": __version__,
            "description": "Where the weights of this node's SGLang servers lie, read-only.",
        },
        "paths": {**_of_all(), **_of_one()},
        "components": {"schemas": SCHEMAS},
    }
    if has_token:
        found["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"token": []}]
    return found


def query_parameters(path: str) -> tuple[str, ...]:
    """Names of the query parameters that a path has."""
    parameters = description()["paths"][path]["get"]["parameters"]
    return tuple(each["name"] for each in parameters if each["in"] == "query")


def _of_all() -> dict[str, Any]:
    lookup = _operation(
        "lookup",
        "The tensors, and the element in each, at an address.",
        _content(_reference("Lookup")),
        ("404", "429"),
        (
            {
                "name": "address",
                "in": "path",
                "required": True,
                "schema": {"type": "string", "pattern": f"^({ADDRESS})$"},
                "description": "Hexadecimal (0x...) or decimal.",
            },
            _SLOT_QUERY,
        ),
    )
    health = _operation(
        "health",
        "Whether the agent runs; needs no token.",
        _content(_object({"ok": {"const": True}})),
        is_cached=False,
    )
    health["get"]["security"] = []
    return {
        "/": _operation(
            "page",
            "A page that shows the memory of all slots.",
            _content(_TEXT, "text/html"),
            ("404", "429"),
        ),
        "/openapi.json": _operation(
            "description", "This description.", _content({"type": "object"})
        ),
        "/healthz": health,
        "/slots": _operation(
            "slots", "Every slot of the agent's directories.", _content(_reference("Slots"))
        ),
        "/lookup/{address}": lookup,
        "/events": _operation(
            "events",
            "Server-sent events: every slot as it is, then each change (event: state, data: a "
            "Slot), slots whose files are gone (event: removed, data: their id), and event: reset "
            "where everything is told again. Goes on after Last-Event-ID.",
            _content(_TEXT, "text/event-stream"),
            ("404", "429"),
            (_SLOT_QUERY,),
            is_cached=False,
        ),
        "/metrics": _operation(
            "metrics",
            "Prometheus metrics of all slots.",
            _content(_TEXT, "text/plain"),
            is_cached=False,
        ),
    }


def _of_one() -> dict[str, Any]:
    document = _content({"type": "object"})
    return {
        "/slots/{id}": _operation(
            "slot", "One slot.", _content(_reference("Slot")), ("404",), (_ID,)
        ),
        "/slots/{id}/state": _operation(
            "state",
            "The published state document, byte for byte.",
            document,
            ("404", "416"),
            (_ID,),
            ranges=True,
        ),
        "/slots/{id}/layout": _operation(
            "layout",
            "The published layout document, byte for byte.",
            document,
            ("404", "416"),
            (_ID,),
            ranges=True,
        ),
        "/slots/{id}/regions": _operation(
            "regions",
            "The regions to register, each inside one allocation.",
            _content(_reference("Regions")),
            ("404", "429"),
            (_ID,),
        ),
        "/slots/{id}/history": _operation(
            "history",
            "The logged events, the oldest first.",
            _content(_reference("History")),
            ("404", "429"),
            _HISTORY,
        ),
        "/slots/{id}/transport": _operation(
            "transport",
            "What a transfer engine reads the weights with; only from an agent with a token.",
            document,
            ("404", "416"),
            (_ID,),
            ranges=True,
        ),
    }
