from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from danube_ray.config import GateSettings
from danube_ray.serve.engines import EngineBusy
from danube_ray.serve.gate import ModelEntry
from danube_ray.serve.metrics import Metrics
from danube_ray.serve.record import RequestRecord
from tests.serve.conftest import RecordingEngine
from tests.serve.guarded import HELLO, LONG, Gate, gate
from tests.waiting import wait_for

CHAT = "/v1/chat/completions"


def samples(text: str) -> dict[str, float]:
    """Every sample by its name and labels, spelt as Prometheus has them."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


def scrape(one: Gate) -> dict[str, float]:
    status, headers, body = one.ask("GET", "/metrics")
    assert status == 200 and headers["content-type"].startswith("text/plain; version=")
    return samples(body.decode())


@pytest.fixture
def one(entry: ModelEntry, recorder: RecordingEngine) -> Iterator[Gate]:
    with gate(entry, recorder, GateSettings(requests_per_minute=4)) as one:
        yield one


def test_answers_are_counted_and_timed(one: Gate):
    client = one.client("x")
    whole = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=7)
    list(client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=5, stream=True))
    client.completions.create(model="tiny", prompt="The Danube", max_tokens=1)
    assert whole.usage
    wait_for(lambda: sum(value for name, value in scrape(one).items() if "requests_total{model=tiny" in name) == 3)
    told = scrape(one)
    assert told["danube_requests_total{model=tiny,path=/v1/chat/completions,status=200}"] == 2
    assert told["danube_requests_total{model=tiny,path=/v1/completions,status=200}"] == 1
    assert told["danube_completion_tokens_total{model=tiny}"] == 13
    assert 2 * whole.usage.prompt_tokens < told["danube_prompt_tokens_total{model=tiny}"]
    assert told["danube_request_duration_seconds_count{model=tiny,path=/v1/chat/completions}"] == 2
    assert told["danube_time_to_first_token_seconds_count{model=tiny}"] == 3
    assert told["danube_time_per_output_token_seconds_count{model=tiny}"] == 2, "one token has no time between"
    assert told["danube_requests_in_flight{model=tiny}"] == 0
    first_s = told["danube_time_to_first_token_seconds_sum{model=tiny}"]
    whole_s = sum(value for name, value in told.items() if name.startswith("danube_request_duration_seconds_sum"))
    assert 0 < first_s < whole_s


def test_an_answer_under_way_is_seen(one: Gate):
    stream = one.client("x").chat.completions.create(**LONG)
    next(stream)
    assert scrape(one)["danube_requests_in_flight{model=tiny}"] == 1
    stream.close()
    wait_for(lambda: scrape(one)["danube_requests_in_flight{model=tiny}"] == 0)


def test_refusals_are_counted_by_reason(one: Gate, entry: ModelEntry):
    for _ in range(6):
        one.ask("POST", CHAT, {"model": "huge", "messages": HELLO})
    one.ask("GET", "/v1/models", host="evil.example")
    told = scrape(one)
    assert told["danube_rejected_requests_total{reason=rate}"] == 2
    assert told["danube_rejected_requests_total{reason=host}"] == 1
    assert told[f"danube_requests_total{{model=,path={CHAT},status=429}}"] == 2

    class BusyEngine:
        async def generate(self, *_):
            raise EngineBusy("full")
            yield

    with gate(entry, BusyEngine(), GateSettings()) as busy:
        assert busy.error("POST", CHAT, {"model": "tiny", "messages": HELLO}) == (503, "engine_busy")
        told = scrape(busy)
    assert told["danube_rejected_requests_total{reason=busy}"] == 1
    assert told["danube_rejected_requests_total{reason=auth}"] == 0, "a counter that is not there yet can't rise"


def test_what_clients_invent_makes_no_metric(one: Gate):
    def labels() -> set[str]:
        return {name for name in scrape(one) if "_created" not in name}

    one.ask("POST", CHAT, {"model": "invented-0", "messages": HELLO})
    for path in ("/v1/models/invented-0", "/invented-0", f"{CHAT}/invented-0"):
        one.ask("GET", path)
    before = labels()
    for number in range(1, 20):
        one.ask("POST", CHAT, {"model": f"invented-{number}", "messages": HELLO}, x_request_id=f"invented-{number}")
        for path in (f"/v1/models/invented-{number}", f"/invented-{number}", f"{CHAT}/invented-{number}"):
            one.ask("GET", path)
        one.ask("GET", "/health", host=f"invented{number}.example")
    after = labels() - before
    assert not [name for name in labels() if "invented" in name]
    assert {name.partition("{")[0] for name in after} <= {"danube_requests_total", "danube_rejected_requests_total"}
    assert len(after) <= 3, "429 and 403 came in, nothing by number"
    assert "danube_requests_total{model=,path=/v1/models/{name:path},status=404}" in labels()


def test_two_gates_of_one_process_count_apart(entry: ModelEntry, recorder: RecordingEngine):
    with gate(entry, recorder, GateSettings()) as one, gate(entry, recorder, GateSettings()) as other:
        one.ask("GET", "/health")
        name = "danube_requests_total{model=,path=/health,status=200}"
        assert scrape(one)[name] == 1 and name not in scrape(other)


def test_times_fall_into_their_buckets():
    metrics, record = Metrics(["tiny"]), RequestRecord(request_id="x", started=time.monotonic() - 3)
    metrics.begin(record)
    record.model, record.completion_tokens, record.first_token_s = "tiny", 11, 1.0
    assert metrics.end(record, CHAT, 200) == pytest.approx(3, abs=0.4)
    told = samples(metrics.text().decode())
    buckets = {name: value for name, value in told.items() if "_bucket" in name}
    assert buckets["danube_time_to_first_token_seconds_bucket{le=1.0,model=tiny}"] == 1
    assert buckets["danube_time_to_first_token_seconds_bucket{le=0.5,model=tiny}"] == 0
    assert buckets["danube_time_per_output_token_seconds_bucket{le=0.25,model=tiny}"] == 1
    assert buckets["danube_time_per_output_token_seconds_bucket{le=0.15,model=tiny}"] == 0
    assert buckets[f"danube_request_duration_seconds_bucket{{le=5.0,model=tiny,path={CHAT}}}"] == 1
    assert buckets[f"danube_request_duration_seconds_bucket{{le=2.5,model=tiny,path={CHAT}}}"] == 0
