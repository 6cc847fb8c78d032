"""The chat page, in a real browser, against a live gate."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, field, replace

import pytest
from selenium.webdriver.common.keys import Keys

from danube_ray.serve.engines import Delta, EngineError, Sampling
from danube_ray.serve.gate import ModelEntry, create_app
from tests.serve.browser import Browser, headless_chromium
from tests.serve.conftest import RecordingEngine, live

MARKDOWN = """# Rivers
A *long* one, a **longer** one, `a < b`, [a link](https://example.org/a?b=1&c=2), snake_case_name and 2 * 3 * 4.

- first
- second
  1. deeper

> quoted

```python
if a < b:  # <b>not bold</b>
    print("&amp;")
```

| river | km |
|---|---|
| Volga | 3,530 |

<img src=x onerror="document.title='owned'"> <script>document.title='owned'</script>
[bad](javascript:document.title='owned') ![x](https://example.org/x.png) [odd](https://e.org/"onmouseover="x)
"""


@dataclass
class Storyteller:
    """Says what it is told to; `go` lets it past the first word."""

    text: str = ""
    error: EngineError | None = None
    go: threading.Event = field(default_factory=threading.Event)

    async def generate(self, prompt: Sequence[int], sampling: Sampling) -> AsyncGenerator[Delta, None]:
        first, *rest = self.text.split(" ")
        yield Delta(" " + first, 1)
        await asyncio.to_thread(self.go.wait)
        if self.error:
            raise self.error
        yield Delta("".join(f" {word}" for word in rest), 1 + len(rest), "stop")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with headless_chromium() as browser:
        yield browser


@pytest.fixture
def page(chromium: Browser, url: str) -> Browser:
    """The page as at a first visit."""
    chromium.open(url)
    chromium.driver.execute_script("localStorage.clear()")
    chromium.open(url)
    chromium.complaints()
    return chromium


@pytest.fixture(scope="module")
def teller() -> Storyteller:
    return Storyteller()


@pytest.fixture(scope="module")
def told(entry: ModelEntry, teller: Storyteller) -> Iterator[str]:
    with live(create_app({"tiny": replace(entry, context_tokens=4096)}, lambda _: teller)) as url:
        yield url


def longest_answer(page: Browser, tokens: int) -> None:
    page.one("#tune").click()
    page.one("#max_tokens").send_keys(str(tokens))
    page.one("#settings .solid").click()


def test_a_message_is_answered_and_kept(page: Browser, recorder: RecordingEngine, entry: ModelEntry):
    longest_answer(page, 40)
    page.send("Which river is longer?")
    answer = page.answered()
    assert answer and page.text(".stats")[0].startswith("cut at the longest answer, 40 tokens")
    page.send("And which is wider?")
    page.wait(lambda: len(page.all(".turn.model .tools .stats")) == 2)
    decoded = entry.tokenizer.decode(recorder.prompts[-1])
    assert "Which river is longer?" in decoded and "And which is wider?" in decoded

    before = page.text(".turn .body")
    page.driver.refresh()
    page.wait(lambda: page.text(".turn .body") == before)
    assert page.text("#chats .open") == ["Which river is longer?"]
    assert page.complaints() == []


def test_stop_and_regenerate(page: Browser, recorder: RecordingEngine):
    recorder.ended.clear()
    page.send("Tell me everything")
    page.wait(lambda: any(page.text(".turn.model .body")))
    page.one("#text").send_keys(Keys.ESCAPE)
    stopped = page.answered()
    assert page.text(".stats") == ["stopped"]
    assert recorder.ended.wait(20), "the server stops too"

    longest_answer(page, 12)
    page.one("[data-do=again]").click()
    page.wait(lambda: page.text(".stats") and "12 tokens" in page.text(".stats")[0])
    assert page.answered() != stopped and len(page.all(".turn")) == 2


def test_settings_and_model_reach_the_server(page: Browser, recorder: RecordingEngine, entry: ModelEntry):
    page.one("#model option[value=short]").click()
    page.one("#tune").click()
    page.one("#system").send_keys("Be brief.")
    page.one("#settings .solid").click()
    page.send("Hi")
    page.answered()
    assert page.text(".who") == ["short"]
    assert "Be brief." in entry.tokenizer.decode(recorder.prompts[-1])


def test_errors_are_shown_in_the_servers_words(page: Browser):
    page.one("#model option[value=short]").click()
    page.send("river " * 60)
    page.wait(lambda: page.all(".failed"))
    assert "the model's context of 64" in page.text(".failed")[0]
    assert page.text("[data-do=again]") == ["Try again"]


def test_an_answer_that_breaks_keeps_what_came(chromium: Browser, told: str, teller: Storyteller):
    teller.text, teller.error = "Well begun is", EngineError("the engine was lost")
    teller.go.set()
    chromium.open(told)
    chromium.send("Go on")
    assert chromium.answered() == "Well"
    assert chromium.text(".failed") == ["the engine was lost"]
    teller.error = None


def test_text_streams_and_markdown_is_safe(chromium: Browser, told: str, teller: Storyteller):
    teller.text = "Soon " + MARKDOWN
    teller.go.clear()
    chromium.open(told)
    chromium.one("#new").click()
    chromium.send("Show me <b>Markdown</b>")
    chromium.wait(lambda: chromium.text(".turn.model .body") == ["Soon"])
    assert chromium.one("#send").get_attribute("aria-label") == "Stop"
    teller.text = MARKDOWN
    teller.go.set()
    chromium.answered()
    assert chromium.text(".turn.user .body") == ["Show me <b>Markdown</b>"]
    chromium.one("[data-do=again]").click()
    chromium.wait(lambda: chromium.text(".md h3") == ["Rivers"])
    chromium.answered()

    assert chromium.text(".md em") == ["long"] and chromium.text(".md strong") == ["longer"]
    assert chromium.text(".md p code") == ["a < b"] and "snake_case_name and 2 * 3 * 4" in chromium.text(".md p")[0]
    assert chromium.text(".md ul > li ol li") == ["deeper"] and chromium.text(".md blockquote") == ["quoted"]
    assert chromium.text(".md pre code") == ['if a < b:  # <b>not bold</b>\n    print("&amp;")']
    assert chromium.text(".md td") == ["Volga", "3,530"]
    links = [link.get_attribute("href") for link in chromium.all(".md a")]
    assert links[0] == "https://example.org/a?b=1&c=2" and all(link.startswith("https://") for link in links if link)
    assert not chromium.all(".md img, .md script, .md [onmouseover], .md [onerror]")
    assert "owned" not in chromium.driver.title


def test_both_themes_and_a_telephone(chromium: Browser, url: str):
    """Nothing sticks out at 390 pixels; the toggle changes the paper and is remembered."""
    chromium.open(url)
    script = "return getComputedStyle(document.body).backgroundColor"
    before = chromium.driver.execute_script(script)
    chromium.one("#theme").click()
    after = chromium.driver.execute_script(script)
    chromium.driver.refresh()
    assert before != after == chromium.driver.execute_script(script)
    size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    chromium.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        chromium.open(url)
        assert chromium.driver.execute_script("return document.documentElement.scrollWidth") == 390
        assert not chromium.one("#new").is_displayed()
        chromium.one("#menu").click()
        chromium.wait(lambda: chromium.one("#new").is_displayed())
        chromium.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
        chromium.wait(lambda: not chromium.one("#new").is_displayed())
    finally:
        chromium.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_page_asks_nobody_else(page: Browser, url: str):
    page.send("Hi")
    page.one("#send").click()
    page.answered()
    script = "return performance.getEntriesByType('resource').map(entry => entry.name)"
    asked = page.driver.execute_script(script)
    assert asked and all(address.startswith(f"{url}/v1/") for address in asked)
