"""The live app against its own description: whatever fits it and whatever does not, no crash, and only answers that
the description knows."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings

OPERATIONS = [
    ("GET", "/health"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{name}"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/embeddings"),
]


@pytest.fixture(scope="module")
def description(url: str) -> Any:
    return schemathesis.openapi.from_url(f"{url}/openapi.json")


def test_every_operation_is_tried(description: Any):
    found = {(operation.ok().method.upper(), operation.ok().path) for operation in description.get_all_operations()}
    assert found == set(OPERATIONS)


def tried(description: Any, method: str, path: str, mode: str, max_examples: int) -> set[int]:
    """The statuses that came back."""
    operation, statuses, checks = description[path][method], set(), schemathesis.checks
    known = [checks.not_a_server_error, checks.status_code_conformance]
    known += [checks.content_type_conformance, checks.response_schema_conformance]

    @settings(
        max_examples=max_examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode[mode]))
    def send(case: Any) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = "short"  # a made-up name would be all that is ever judged
            messages = case.body.get("messages")
            if mode == "POSITIVE" and messages and len(messages) % 2:  # so would made-up roles, and empty messages
                for number, message in enumerate(messages):
                    message |= {"role": ("user", "assistant")[number % 2], "content": message["content"] or "River?"}
        response = case.call(headers={"content-type": "application/json"} if method == "POST" else None)
        rejected = mode == "POSITIVE" or response.status_code == 413  # which that check doesn't count as a rejection
        case.validate_response(response, checks=known if rejected else [*known, checks.negative_data_rejection])
        statuses.add(response.status_code)

    send()
    return statuses


GETS = [operation for operation in OPERATIONS if operation[0] == "GET"]
POSTS = [operation for operation in OPERATIONS if operation[0] == "POST"]


@pytest.mark.parametrize(("method", "path"), GETS)
def test_no_name_makes_it_crash(description: Any, method: str, path: str):
    assert tried(description, method, path, "POSITIVE", 50) <= {200, 404}


@pytest.mark.parametrize(("mode", "common"), [("POSITIVE", 200), ("NEGATIVE", 400)])
@pytest.mark.parametrize(("method", "path"), POSTS)
def test_no_request_makes_it_crash(description: Any, method: str, path: str, mode: str, common: int):
    assert common in tried(description, method, path, mode, 50)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
@pytest.mark.parametrize(("method", "path"), POSTS)
def test_no_request_of_many_makes_it_crash(description: Any, method: str, path: str, mode: str):
    tried(description, method, path, mode, 1_000)
