"""How large a JSON schema of a stranger may be. It becomes a grammar, which an engine holds every token against: small
texts can make that last for ever, for everybody's answers. `bounded` looks at what every engine would suffer from;
the bounds below it are those of our grammar for llama.cpp (`json_grammar`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

MAX_BYTES = 2**15
MAX_DEPTH = 64  # it is read by recursion; an object in an object is two levels deep
MAX_BRANCHES = 500  # alternatives open at one place: each costs about 20 ns times the vocabulary at every token

MAX_OPTIONAL = 100  # properties of one object that may be left out: alternatives too, one after the other
MAX_REPEATS = 1_000  # llama.cpp refuses more than 2,000, and each costs memory at every token
MAX_RULES = 5_000


def bounded(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema itself; `ValueError` for one that is too large, too deep or branches too often."""
    nodes = list(_nodes(schema))
    if len(json.dumps(schema, ensure_ascii=False, allow_nan=False).encode()) > MAX_BYTES:
        raise ValueError(f"a schema may have {MAX_BYTES} bytes")
    known: dict[str, int] = {}
    for node in nodes:
        _branches(node, schema, known, 0)
    return schema


def _nodes(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every object in the schema, level by level."""
    level: list[Any] = [schema]
    for _ in range(MAX_DEPTH):
        yield from (node for node in level if isinstance(node, dict))
        level = [child for node in level for child in (node.values() if isinstance(node, dict) else node)]
        level = [child for child in level if isinstance(child, dict | list)]
    if level:
        raise ValueError(f"a schema may be nested {MAX_DEPTH} levels deep")


def _branches(node: Any, schema: dict[str, Any], known: dict[str, int], depth: int) -> int:
    """How many ways there are to begin what `node` describes: a union has those of its members, a reference those of
    its target. `ValueError` for more than `MAX_BRANCHES`, or for a reference that leads back to itself."""
    if depth > MAX_DEPTH:
        raise ValueError("a schema may not refer from reference to reference so often")
    if not isinstance(node, dict):
        return 1
    ways = 0
    for plain in ("enum", "type"):
        ways += len(members) if isinstance(members := node.get(plain), list) else 0
    for union in ("anyOf", "oneOf", "allOf"):
        if isinstance(members := node.get(union), list):
            ways += sum(_branches(member, schema, known, depth + 1) for member in members)
    if isinstance(reference := node.get("$ref"), str):
        if reference not in known:
            known[reference] = MAX_BRANCHES + 1  # until it is known: for who comes here again on the way
            known[reference] = _branches(_target(reference, schema), schema, known, depth + 1)
        ways += known[reference]
    if ways > MAX_BRANCHES:
        raise ValueError(f"a schema may have {MAX_BRANCHES} alternatives at one place, and no circle of references")
    return max(ways, 1)


def _target(reference: str, schema: dict[str, Any]) -> Any:
    """What a reference into the schema points to; None where it points elsewhere, which is for the engine to refuse."""
    node: Any = schema
    for part in reference.removeprefix("#").split("/")[1:]:
        node = node.get(part) if isinstance(node, dict) else None
    return node
