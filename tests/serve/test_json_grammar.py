from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import jsonschema
import pytest

from danube_ray.serve.engines import Delta, EngineRejected, Sampling
from danube_ray.serve.json_grammar import UnsupportedSchema, grammar
from danube_ray.serve.llamacpp_engine import LlamaCppEngine
from tests.serve.asking import PROMPT, answer, text

ORDER = {
    "type": "object",
    "properties": {
        "size": {"enum": ["small", "large", 3, None]},
        "prices": {"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": 3},
        "count": {"type": "integer", "minimum": 1, "maximum": 12},
        "code": {"type": "string", "minLength": 2, "maxLength": 4},
        "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
    },
    "required": ["size", "prices"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    "schema",
    [ORDER, {"type": "object", "additionalProperties": {"type": "boolean"}}, {}],
    ids=["order", "flags", "any object"],
)
def test_an_answer_under_a_schema_is_valid(engine: LlamaCppEngine, schema: dict[str, Any]):
    """Whatever the weights would rather say: these are random, and hot."""

    async def several() -> list[list[Delta]]:
        async def one(seed: int) -> list[Delta]:
            sampling = Sampling(max_tokens=300, temperature=2.0, seed=seed, json_schema=json.dumps(schema))
            return [delta async for delta in engine.generate(PROMPT, sampling)]

        return await asyncio.gather(*map(one, range(30)))

    answers = asyncio.run(several())
    whole = [text(deltas) for deltas in answers if deltas[-1].finish_reason == "stop"]
    assert len(whole) >= 5
    for written in whole:
        if "\ufffd" not in written:  # bytes that are no character, which only random weights draw
            jsonschema.validate(json.loads(written), schema or {"type": "object"})
    cut = [deltas for deltas in answers if deltas[-1].finish_reason == "length"]
    assert all(deltas[-1].num_tokens == 300 for deltas in cut)


def test_a_schema_may_follow_the_space_that_answers_begin_with(engine: LlamaCppEngine):
    schema = json.dumps({"const": {"the river": ["Danube", 2850.5, True]}})
    sampling = Sampling(max_tokens=60, temperature=3, json_schema=schema)
    answers = {text(answer(engine, replace(sampling, seed=seed))) for seed in range(40)}
    assert answers == {'{"the river": ["Danube", 2850.5, true]}', ' {"the river": ["Danube", 2850.5, true]}'}


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"properties": {}, "additionalProperties": False}, {}),
        ({"type": "array", "items": {"const": 1}, "minItems": 3, "maxItems": 3}, [1, 1, 1]),
        ({"type": "integer", "minimum": 7, "maximum": 7}, 7),
        ({"type": "integer", "enum": [True, 7]}, 7),
    ],
    ids=str,
)
def test_a_schema_that_leaves_one_value_gives_it(engine: LlamaCppEngine, schema: dict[str, Any], value: object):
    sampling = Sampling(max_tokens=60, temperature=3, seed=1, json_schema=json.dumps(schema))
    assert json.loads(text(answer(engine, sampling))) == value


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ("{", "no JSON"),
        ("[]", "must be a JSON object"),
        ("[" * 10**5, "nested too deeply"),
        ('{"type": "colour"}', "the type of the schema must be among"),
        ('{"type": "string", "pattern": "a+"}', "pattern of the schema can't be enforced"),
        ('{"oneOf": [{}]}', "oneOf of the schema can't be enforced"),
        ('{"properties": {"a": {"not": {}}}}', "not of 'a' of the schema can't be enforced"),
        ('{"properties": {"a": false}}', "'a' of the schema must be a schema that a value can fit"),
        ('{"required": ["a"], "additionalProperties": false}', "requires properties that it does not allow"),
        ('{"properties": 5}', "properties of the schema must be an object"),
        ('{"enum": []}', "with a value of its type"),
        ('{"type": "string", "enum": [1]}', "with a value of its type"),
        ('{"type": "integer", "enum": [true]}', "with a value of its type"),
        ('{"anyOf": [{}], "type": "string"}', "type of the schema can't be enforced"),
        ('{"const": 1, "enum": [2]}', "enum of the schema can't be enforced"),
        ('{"const": NaN}', "NaN is no number of JSON"),
        ('{"const": "\\ud800"}', "half a surrogate pair"),
        ('{"minItems": 3, "maxItems": 2}', "minItems of the schema is over its maxItems"),
        ('{"maxLength": 100000}', "must lie in 0..1000"),
        ('{"type": "integer", "maximum": 5}', "the bounds of the schema"),
        ('{"type": "number", "minimum": 5}', "the only bound"),
        ('{"$ref": "#/$defs/a"}', "points nowhere"),
        ('{"$ref": "http://example.com/schema"}', "must point into the schema"),
        (json.dumps({"properties": {str(number): {} for number in range(101)}}), "more than 100 properties"),
        (json.dumps({"required": [str(number) for number in range(2000)]}), "more than 5000 grammar rules"),
    ],
    ids=lambda value: value[:40],
)
def test_a_schema_that_can_not_be_held_says_why(schema: str, why: str):
    with pytest.raises(UnsupportedSchema) as error:
        grammar(schema)
    assert why in str(error.value)


@pytest.mark.parametrize("schema", ["{", '{"type": "colour"}', '{"$ref": "#"}'])
def test_an_engine_rejects_it_before_it_says_anything(engine: LlamaCppEngine, schema: str):
    """A schema that is its own part and nothing else is llama.cpp's to refuse."""
    with pytest.raises(EngineRejected):
        answer(engine, Sampling(max_tokens=8, json_schema=schema))
