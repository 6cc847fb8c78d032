from __future__ import annotations

import json
from typing import Any

import pytest

from danube_ray.serve.json_schemas import MAX_BRANCHES, MAX_BYTES, MAX_DEPTH, bounded

TREE: dict[str, Any] = {
    "$defs": {"tree": {"type": "object", "properties": {"left": {"$ref": "#/$defs/some"}}}}
    | {"some": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]}},
    "$ref": "#/$defs/some",
}


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels - 1):
        schema = {"not": schema}
    return schema


def long(size: int) -> dict[str, Any]:
    return {"description": "x" * (size - len(json.dumps({"description": ""})))}


@pytest.mark.parametrize(
    "schema",
    [
        {},
        TREE,
        nested(MAX_DEPTH),
        long(MAX_BYTES),
        {"enum": list(range(MAX_BRANCHES))},
        {"$ref": "https://example.com"},  # for the engine to refuse
        {"$ref": "#/$defs/none"},
        {"anyOf": "junk", "$ref": 3, "enum": {}},
    ],
    ids=lambda schema: str(schema)[:40],
)
def test_what_may_come_in(schema: dict[str, Any]):
    assert bounded(schema) is schema


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        (nested(MAX_DEPTH + 1), "levels deep"),
        (long(MAX_BYTES + 1), "bytes"),
        ({"enum": list(range(MAX_BRANCHES + 1))}, "alternatives"),
        ({"type": ["string"] * (MAX_BRANCHES + 1)}, "alternatives"),
        ({"items": {"anyOf": [{"enum": list(range(300))}] * 2}}, "alternatives"),
        ({"$ref": "#"}, "circle"),
        ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"oneOf": [{"$ref": "#/$defs/a"}]}}}, "circle"),
        ({"maximum": float("inf")}, "Out of range"),
        ({"const": "\ud800"}, "surrogates"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_may_not(schema: dict[str, Any], problem: str):
    with pytest.raises(ValueError, match=problem):
        bounded(schema)
