from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from pathlib import Path

import openai
import pytest

from danube_ray.config import ConfigError, GateSettings
from danube_ray.serve.engines import Delta, Sampling
from danube_ray.serve.gate import ModelEntry
from danube_ray.serve.guard import check_bind
from danube_ray.serve.keys import ENVIRONMENT, append, make_key
from tests.serve.browser import Browser
from tests.serve.conftest import RecordingEngine
from tests.serve.guarded import LONG, PAGE, SHORT, Gate, gate, keyed_gate
from tests.waiting import wait_for


@pytest.fixture(scope="module")
def keyed(entry: ModelEntry, recorder: RecordingEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gate]:
    with keyed_gate(entry, recorder, tmp_path_factory.mktemp("keys")) as one:
        yield one


# ---- keys ----


def test_a_key_lets_in_and_a_wrong_one_does_not(keyed: Gate):
    assert keyed.client("alice").chat.completions.create(**SHORT).choices[0].message.content
    for wrong in ("sk-wrong", make_key("alice")[0], keyed.secrets["alice"] + "x"):
        with pytest.raises(openai.AuthenticationError) as caught:
            keyed.client(wrong).chat.completions.create(**SHORT)
        assert (caught.value.code, caught.value.type) == ("invalid_api_key", "invalid_request_error")
        assert caught.value.response.headers["www-authenticate"] == "Bearer"
        assert caught.value.request_id == caught.value.response.headers["x-request-id"]


def test_only_page_and_health_are_open(keyed: Gate):
    assert [keyed.ask("GET", path)[0] for path in ("/", "/health")] == [200, 200]
    closed = ("/v1/models", "/v1/models/tiny", "/metrics", "/openapi.json", "/nowhere", "//", "/health/", "/%2e/health")
    for path in closed:
        assert keyed.error("GET", path) == (401, "invalid_api_key"), path
    assert keyed.error("POST", "/v1/chat/completions", SHORT) == (401, "invalid_api_key")
    assert keyed.error("POST", "/v1/chat/completions", b"x" * 3_000_000) == (401, "invalid_api_key")
    assert keyed.error("OPTIONS", "/v1/chat/completions") == (401, "invalid_api_key")
    assert keyed.ask("HEAD", "/v1/models")[0] == 401
    alice = f"Bearer {keyed.secrets['alice']}"
    assert [keyed.ask("GET", path, authorization=alice)[0] for path in closed[:5]] == [200, 200, 200, 200, 404]


def test_how_a_key_may_be_written(keyed: Gate):
    secret = keyed.secrets["alice"]
    for written in (f"Bearer {secret}", f"bearer {secret}", f"BEARER   {secret} "):
        assert keyed.ask("GET", "/v1/models", authorization=written)[0] == 200
    for written in (
        secret,
        f"Basic {secret}",
        "Bearer",
        "Bearer ",
        f"Bearer{secret}",
        "Bearer \xfc\xff",
        f"x {secret}",
    ):
        assert keyed.error("GET", "/v1/models", authorization=written) == (401, "invalid_api_key")


def test_keys_of_the_environment(entry: ModelEntry, recorder: RecordingEngine, monkeypatch: pytest.MonkeyPatch):
    secret, key = make_key("ci")
    monkeypatch.setenv(ENVIRONMENT, key.line)
    with gate(entry, recorder, GateSettings()) as one:
        assert one.ask("GET", "/v1/models")[0] == 401
        assert one.ask("GET", "/v1/models", authorization=f"Bearer {secret}")[0] == 200


def test_a_public_address_needs_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"):
        check_bind(host, GateSettings())
    public = ("0.0.0.0", "::", "192.168.1.5", "8.8.8.8", "2001:db8::1", "", "localhost.example.com", "127.0.0.1.nip.io")
    for host in public:
        with pytest.raises(ConfigError, match=re.escape(f"host is {host!r}") + ".*danube keys NAME"):
            check_bind(host, GateSettings())
    append(tmp_path / "keys", make_key("alice")[1])
    check_bind("0.0.0.0", GateSettings(keys_file=tmp_path / "keys"))
    with pytest.raises(ConfigError, match="an existing file"):
        check_bind("127.0.0.1", GateSettings(keys_file=tmp_path / "nowhere"))
    monkeypatch.setenv(ENVIRONMENT, make_key("ci")[1].line)
    check_bind("0.0.0.0", GateSettings())
    monkeypatch.setenv(ENVIRONMENT, "sk-danube-plain")
    with pytest.raises(ConfigError, match="DANUBE_API_KEYS, line 1"):
        check_bind("0.0.0.0", GateSettings())


# ---- browsers ----

PREFLIGHT = {
    "origin": PAGE,
    "access_control_request_method": "POST",
    "access_control_request_headers": "authorization,content-type,x-stainless-os",
}


def test_a_page_of_an_allowed_origin_may_ask_and_read(keyed: Gate):
    status, headers, _ = keyed.ask("OPTIONS", "/v1/chat/completions", **PREFLIGHT)
    assert (status, headers["access-control-allow-origin"]) == (200, PAGE) and headers["x-request-id"]
    assert "authorization" in headers["access-control-allow-headers"]
    assert "POST" in headers["access-control-allow-methods"]
    bob = f"Bearer {keyed.secrets['alice']}"
    for authorization, expected in ((bob, 200), ("Bearer wrong", 401)):
        status, headers, _ = keyed.ask("GET", "/v1/models", origin=PAGE, authorization=authorization)
        assert (status, headers["access-control-allow-origin"]) == (expected, PAGE)
        assert {"x-request-id", "retry-after"} <= set(headers["access-control-expose-headers"].split(", "))


def test_a_page_of_another_origin_may_not(keyed: Gate, url: str):
    status, headers, _ = keyed.ask("OPTIONS", "/v1/chat/completions", **{**PREFLIGHT, "origin": "https://evil.example"})
    assert (status, headers["access-control-allow-origin"]) == (400, None)
    _, headers, _ = keyed.ask("GET", "/health", origin="https://evil.example")
    assert headers["access-control-allow-origin"] is None
    _, headers, _ = Gate(url, {}).ask("OPTIONS", "/v1/chat/completions", **PREFLIGHT)  # the default: no origin at all
    assert headers["access-control-allow-origin"] is None


def test_without_keys_no_page_gets_in_by_the_back_door(url: str):
    """A page needs no leave to send a form, nor to have its own name resolve to this machine."""
    open_gate = Gate(url, {})
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "[evil.x"):
        assert open_gate.error("GET", "/v1/models", host=host) == (403, "host_not_allowed")
        assert open_gate.error("POST", "/v1/chat/completions", SHORT, host=host) == (403, "host_not_allowed")
    for host in (
        "localhost",
        "localhost:8000",
        "127.0.0.1:8000",
        "[::1]:8000",
        "chat.localhost:1",
        "danube",
        "10.0.0.1",
    ):
        assert open_gate.ask("GET", "/v1/models", host=host)[0] == 200
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        assert open_gate.ask("POST", "/v1/chat/completions", SHORT, content_type=kind)[0] == 400


def test_headers_that_keep_a_browser_careful(url: str):
    _, headers, _ = Gate(url, {}).ask("GET", "/")
    policy = headers["content-security-policy"]
    assert "unsafe" not in policy and "http" not in policy
    assert {"default-src 'none'", "connect-src 'self'", "frame-ancestors 'none'"} <= set(policy.split("; "))
    assert headers["referrer-policy"] == "no-referrer"
    for path in ("/", "/health", "/nowhere", "/metrics"):
        assert Gate(url, {}).ask("GET", path)[1]["x-content-type-options"] == "nosniff"


OWN = """
const done = [...arguments].at(-1), link = document.createElement("a"), script = document.createElement("script");
const attempts = [
  () => { link.setAttribute("onclick", "window.owned = 'by an attribute'"); document.body.append(link); link.click(); },
  () => { script.textContent = "window.owned = 'by a script'"; document.body.append(script); },
];
for (const attempt of attempts) try { attempt(); } catch { }
const home = fetch(`http://localhost:${location.port}/health`, { mode: "no-cors" });
home.then(() => done("by a letter home"), () => done(window.owned));
"""


def test_what_somebody_writes_into_the_page_does_nothing(page: Browser):
    assert page.driver.execute_async_script(OWN) is None


@pytest.mark.parametrize(
    "origin", ["chat.example", "https://chat.example/", "https://a.example, https://b.example", ""]
)
def test_an_origin_that_no_browser_sends_is_a_mistake(origin: str):
    with pytest.raises(ConfigError, match="cors_origins"):
        GateSettings(cors_origins=(PAGE, origin))
    GateSettings(cors_origins=("*", PAGE, "http://localhost:3000", "chrome-extension://abc"))


# ---- limits ----


def test_a_rate_limit_is_told_and_kept(keyed: Gate):
    bob = keyed.client("bob")
    for left in ("1", "0"):
        answer = bob.chat.completions.with_raw_response.create(**SHORT)
        assert answer.headers["x-ratelimit-limit-requests"] == "2"
        assert answer.headers["x-ratelimit-remaining-requests"] == left
    with pytest.raises(openai.RateLimitError) as caught:
        bob.chat.completions.create(**SHORT, stream=True)
    assert caught.value.code == "rate_limit_exceeded"
    headers = caught.value.response.headers
    assert 0 < int(headers["retry-after"]) <= 30 and headers["x-ratelimit-remaining-requests"] == "0"
    assert headers["x-ratelimit-reset-requests"].endswith("s")
    assert [model.id for model in bob.models.list()] == ["tiny"], "only generating counts"
    keyed.client("alice").chat.completions.create(**SHORT)


def test_without_keys_an_address_has_the_limit(entry: ModelEntry, recorder: RecordingEngine):
    with gate(entry, recorder, GateSettings(requests_per_minute=1)) as one:
        assert one.ask("POST", "/v1/chat/completions", SHORT)[0] == 200
        assert one.error("POST", "/v1/chat/completions", SHORT) == (429, "rate_limit_exceeded")
        assert [one.ask("GET", path)[0] for path in ("/", "/health", "/v1/models", "/metrics")] == [200] * 4


def is_let_in(client: openai.OpenAI) -> bool:
    try:
        return bool(client.chat.completions.create(**SHORT))
    except openai.RateLimitError as error:
        assert error.code == "rate_limit_exceeded" and error.response.headers["retry-after"] == "1"
        return False


def test_a_stream_whose_client_left_is_over(keyed: Gate):
    carol = keyed.client("carol")
    with carol.chat.completions.create(**LONG) as stream:  # its end is the connection's
        next(stream)
        assert not is_let_in(carol) and is_let_in(keyed.client("alice"))
    wait_for(lambda: is_let_in(carol))


class HeldEngine:
    """Says one word, and the other when it may."""

    def __init__(self) -> None:
        self.may_end = threading.Event()

    async def generate(self, prompt: Sequence[int], sampling: Sampling) -> AsyncGenerator[Delta, None]:
        yield Delta(" Hello", 1)
        await asyncio.to_thread(self.may_end.wait)
        yield Delta(" there", 2, "stop")


def test_a_stream_is_under_way_until_it_ends(entry: ModelEntry):
    engine = HeldEngine()
    with gate(entry, engine, GateSettings(concurrent_requests=1)) as one:
        client = one.client("x")
        try:
            stream = client.chat.completions.create(**LONG)
            next(stream)
            assert not is_let_in(client)
        finally:
            engine.may_end.set()
        assert [chunk.choices[0].delta.content for chunk in stream] == [" there"]
        wait_for(lambda: is_let_in(client))
