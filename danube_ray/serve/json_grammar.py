"""JSON schemas as llama.cpp grammars (GBNF).

llama.cpp has a converter of its own, but as built in the wheel it hands schemas to llguidance, and that strips the
leading space of every sentencepiece token before it compares: an answer that "matches" is then not the schema's, and
a schema it can't compile leaves the answer free without a word. The grammar here is matched on the tokens' true text;
every answer it lets through is valid, and a keyword that it could not hold is refused instead of being ignored. (Text
is characters here: llama.cpp does not look whether the bytes of one are well-formed, and random weights break some.)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from danube_ray.serve.json_schemas import MAX_BRANCHES, MAX_OPTIONAL, MAX_REPEATS, MAX_RULES

TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
ANNOTATIONS = {
    *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"),
    *("$schema", "$id", "$comment", "$defs", "definitions"),
}
KEYWORDS = {
    "object": {"properties", "required", "additionalProperties"},
    "array": {"items", "minItems", "maxItems"},
    "string": {"minLength", "maxLength"},
    "integer": {"minimum", "maximum"},
    "number": {"minimum"},
}
# Whitespace as people and models write JSON: none, a space, or a line break with indentation; never without end.
# Characters leave out halves of surrogate pairs and what lies past the last code point: no text could hold them.
PRIMITIVES = r"""
space ::= | " " | "\n" [ \t]{0,20}
char ::= [^"\\\x00-\x1F\x7F\uD800-\uDFFF\U00110000-\U001FFFFF] | "\\" (["\\/bfnrt] | "u" escape)
escape ::= [0-9A-CE-Fa-ce-f] hex{3} | [dD] [0-7] hex{2}
hex ::= [0-9A-Fa-f]
string ::= "\"" char* "\""
natural ::= "0" | [1-9] [0-9]{0,15}
integer ::= "-"? natural
positive ::= natural ("." [0-9]{1,15})? ([eE] [-+]? [0-9]{1,2})?
number ::= "-"? positive
boolean ::= "true" | "false"
null ::= "null"
value ::= object | array | string | number | boolean | null
object ::= "{" space (pair ("," space pair)*)? "}"
pair ::= string ":" space value space
array ::= "[" space (value space ("," space value space)*)? "]"
"""


class UnsupportedSchema(ValueError):
    """The schema is none, or asks for what a grammar of ours can't hold."""


def grammar(schema_text: str) -> str:
    """The grammar of answers that are valid under a schema (JSON text), with one space before them allowed: the first
    token of a trained answer begins with sentencepiece's mark of a word. An empty schema is any object.

    Raises `UnsupportedSchema`.
    """
    try:
        schema = json.loads(schema_text, parse_constant=_no_number)
        if not isinstance(schema, dict):
            raise UnsupportedSchema("the schema must be a JSON object")
        text = _Rules(schema).text()
        text.encode()
    except RecursionError:
        raise UnsupportedSchema("the schema is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise UnsupportedSchema(f"the schema is no JSON: {error}") from None
    except UnicodeEncodeError:
        raise UnsupportedSchema("the schema has half a surrogate pair in a string") from None
    return text


class _Rules:
    """The rules of one schema, numbered as they are made. Methods return expressions of one piece: a name, a literal
    or something in parentheses. A reference has one rule, however often it is met, so recursion ends."""

    def __init__(self, schema: dict[str, Any]) -> None:
        self._schema = schema
        self._rules: list[str] = []
        self._references: dict[str, str] = {}

    def text(self) -> str:
        root = self.values(self._schema, "the schema") if self._schema else "object"
        numbered = "".join(f"r{number} ::= {rule}\n" for number, rule in enumerate(self._rules))
        return f'root ::= " "? {root}\n{PRIMITIVES}{numbered}'

    def values(self, schema: Any, where: str) -> str:
        """All values that are valid under `schema`, or some of them where their grammar is simpler."""
        if schema is True or schema == {}:
            return "value"
        if not isinstance(schema, dict):
            raise UnsupportedSchema(f"{where} must be a schema that a value can fit, it is {_shown(schema)}")
        if "$ref" in schema:
            _allow(schema, {"$ref"}, where)
            return self.reference(schema["$ref"], where)
        if "anyOf" in schema or "allOf" in schema:
            return self.combination(schema, where)
        kinds = schema.get("type", _implied(schema))
        kinds = kinds if isinstance(kinds, list) else [kinds]
        if not kinds or any(kind not in TYPES for kind in kinds):
            raise UnsupportedSchema(f"the type of {where} must be among {', '.join(TYPES)}, it is {_shown(kinds)}")
        if "const" in schema or "enum" in schema:
            return self.enumeration(schema, kinds, where)
        _allow(schema, {"type"}.union(*(KEYWORDS.get(kind, ()) for kind in kinds)), where)
        makers = {"object": self.object, "array": self.array, "string": self.string, "integer": self.integer}
        makers["number"] = self.number
        return _either([makers[kind](schema, where) if kind in makers else kind for kind in kinds])

    def reference(self, pointer: Any, where: str) -> str:
        """The rule of a schema elsewhere in the same document."""
        if not isinstance(pointer, str) or not pointer.startswith("#"):
            raise UnsupportedSchema(
                f"$ref of {where} must point into the schema (#/$defs/...), it is {_shown(pointer)}"
            )
        if pointer not in self._references:
            target: Any = self._schema
            for part in pointer.removeprefix("#").split("/")[1:]:
                part = part.replace("~1", "/").replace("~0", "~")
                if not isinstance(target, dict) or part not in target:
                    raise UnsupportedSchema(f"$ref of {where} points nowhere: {_shown(pointer)}")
                target = target[part]
            self._references[pointer] = name = self.rule("")
            self._rules[int(name[1:])] = self.values(target, pointer)
        return self._references[pointer]

    def combination(self, schema: dict[str, Any], where: str) -> str:
        keyword = "anyOf" if "anyOf" in schema else "allOf"
        _allow(schema, {keyword}, where)
        parts = schema[keyword]
        if not isinstance(parts, list) or not parts or (keyword == "allOf" and len(parts) > 1):
            raise UnsupportedSchema(f"{keyword} of {where} must be a list of schemas (allOf: of one)")
        return _either([self.values(part, f"{where}, {keyword} {number}") for number, part in enumerate(parts)])

    def enumeration(self, schema: dict[str, Any], kinds: list[str], where: str) -> str:
        keyword = "const" if "const" in schema else "enum"
        _allow(schema, {"type", keyword}, where)
        listed = [schema["const"]] if keyword == "const" else schema["enum"]
        fitting = [value for value in listed if _is_of(value, kinds)] if isinstance(listed, list) else []
        if not fitting:
            raise UnsupportedSchema(f"enum of {where} must be a list with a value of its type, it is {_shown(listed)}")
        return self.rule(_either([_literal(value) for value in fitting]))

    def object(self, schema: dict[str, Any], where: str) -> str:
        """Named properties in their order, those that are not required if the model likes. Where no names are given,
        any; where they are, no others: an answer without them is valid too."""
        named, required = schema.get("properties", {}), schema.get("required", [])
        others = schema.get("additionalProperties", True)
        are_names = isinstance(required, list) and all(isinstance(name, str) for name in required)
        if not are_names or not isinstance(named, dict):
            raise UnsupportedSchema(f"properties of {where} must be an object, and required a list of names")
        if others is False and not set(required) <= named.keys():
            raise UnsupportedSchema(f"{where} requires properties that it does not allow")
        named = {**named, **{name: others for name in required if name not in named}}
        if len(named.keys() - set(required)) > MAX_OPTIONAL:
            raise UnsupportedSchema(f"{where} has more than {MAX_OPTIONAL} properties that are not required")
        if not named and others is False:
            return '("{" space "}")'
        if not named:
            pair = self.rule(f'string ":" space {self.values(others, f"a property of {where}")} space')
            return self.rule(f'"{{" space ({pair} ("," space {pair})*)? "}}"')
        # `first`: what may come where no property has been written yet; `rest`: where one has.
        first = rest = '""'
        for name, part in reversed(named.items()):
            value = self.values(part, f"{name!r} of {where}")
            pair = self.rule(f'{_literal(name)} ":" space {value} space')
            skip_first, skip_rest = ("", "") if name in required else (f" | {first}", f" | {rest}")
            first, rest = self.rule(f"{pair} {rest}{skip_first}"), self.rule(f'"," space {pair} {rest}{skip_rest}')
        return self.rule(f'"{{" space {first} "}}"')

    def array(self, schema: dict[str, Any], where: str) -> str:
        item = self.rule(f"{self.values(schema.get('items', True), f'items of {where}')} space")
        least, most = _bounds(schema, "minItems", "maxItems", where)
        if most == 0:
            return '("[" space "]")'
        more = f'("," space {item}){_repeats(max(least - 1, 0), None if most is None else most - 1)}'
        items = f"{item} {more}" if least else f"({item} {more})?"
        return self.rule(f'"[" space {items} "]"')

    def string(self, schema: dict[str, Any], where: str) -> str:
        if not schema.keys() & KEYWORDS["string"]:
            return "string"
        return self.rule(f'"\\"" char{_repeats(*_bounds(schema, "minLength", "maxLength", where))} "\\""')

    def integer(self, schema: dict[str, Any], where: str) -> str:
        """Between two bounds that are near, or at least 0 or 1: other bounds are no simple grammar."""
        least, most = schema.get("minimum"), schema.get("maximum")
        if isinstance(least, int) and isinstance(most, int) and 0 <= most - least < MAX_BRANCHES:
            return self.rule(_either([f'"{number}"' for number in range(least, most + 1)]))
        if most is not None or least not in (None, 0, 1):
            raise UnsupportedSchema(f"the bounds of {where} must be near each other, or a minimum of 0 or 1 alone")
        return {None: "integer", 0: "natural", 1: "([1-9] [0-9]{0,15})"}[least]

    def number(self, schema: dict[str, Any], where: str) -> str:
        if schema.get("maximum") is not None or schema.get("minimum") not in (None, 0):
            raise UnsupportedSchema(f"the only bound that {where} may have is a minimum of 0")
        return "number" if schema.get("minimum") is None else "positive"

    def rule(self, expression: str) -> str:
        if len(self._rules) == MAX_RULES:
            raise UnsupportedSchema(f"the schema needs more than {MAX_RULES} grammar rules")
        self._rules.append(expression)
        return f"r{len(self._rules) - 1}"


def _allow(schema: dict[str, Any], keywords: set[str], where: str) -> None:
    if unknown := sorted(schema.keys() - keywords - ANNOTATIONS):
        held = ", ".join(sorted(keywords))
        raise UnsupportedSchema(f"{', '.join(unknown)} of {where} can't be enforced here; what can is {held}")


def _implied(schema: dict[str, Any]) -> str | list[str]:
    """The types of a schema that names none: those that its keywords are about, or all."""
    implied = [kind for kind in ("object", "array", "string") if schema.keys() & KEYWORDS[kind]]
    return implied or [kind for kind in TYPES if kind != "integer"]


def _is_of(value: Any, kinds: Sequence[str]) -> bool:
    if isinstance(value, bool):
        return "boolean" in kinds
    names = {dict: "object", list: "array", str: "string", int: "integer", float: "number", type(None): "null"}
    return names[type(value)] in kinds or (isinstance(value, int) and "number" in kinds)


def _bounds(schema: dict[str, Any], least_name: str, most_name: str, where: str) -> tuple[int, int | None]:
    least, most = schema.get(least_name, 0), schema.get(most_name)
    for value in (least, most):
        if value is not None and not (type(value) is int and 0 <= value <= MAX_REPEATS):
            message = f"{least_name} and {most_name} of {where} must lie in 0..{MAX_REPEATS}, one is {_shown(value)}"
            raise UnsupportedSchema(message)
    if most is not None and most < least:
        raise UnsupportedSchema(f"{least_name} of {where} is over its {most_name}")
    return least, most


def _repeats(least: int, most: int | None) -> str:
    return f"{{{least},{'' if most is None else most}}}"


def _either(expressions: list[str]) -> str:
    return expressions[0] if len(expressions) == 1 else f"({' | '.join(expressions)})"


def _literal(value: Any) -> str:
    """The JSON text of a value, as a grammar literal."""
    text = json.dumps(value, ensure_ascii=False, separators=(", ", ": "))
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _no_number(name: str) -> None:
    raise UnsupportedSchema(f"{name} is no number of JSON")
