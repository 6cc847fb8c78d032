"""The chat page for everybody: by keyboard, by ear, on a phone, by day and by night; and what its file may hold."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.common.keys import Keys

from danube_ray.serve.engines import EngineError
from danube_ray.serve.gate import CHAT_PAGE
from tests.serve.browser import Browser
from tests.serve.storyteller import Storyteller

ANSWER = """## Rivers
Some *words*, `code` and [a link](https://example.org).

> Quoted.

| river | Donaudampfschifffahrtsgesellschaftskapitaensmuetze | km |
|---|---|--:|
| Volga | Itil | 3,530 |

```python
print("a line of code that is much wider than any phone would ever be, and then some more")
```
"""
CONTRAST = Path(__file__).with_name("contrast.js").read_text()
MARKED = """
const ring = getComputedStyle(arguments[0].closest('.field:has(textarea:focus)') ?? arguments[0]);
return ring.outlineStyle !== 'none' || ring.boxShadow !== 'none'"""
SMALL = """
return [...document.querySelectorAll('button, select')].filter(one => {
  const { width, height } = one.getBoundingClientRect();
  return width && Math.min(width, height) < 24;
}).map(one => one.outerHTML)"""
CONTROLS = "a[href], button, input, select, textarea, [tabindex='0']"


@contextmanager
def _told(page: Browser, teller: Storyteller) -> Iterator[None]:
    """A conversation with everything in it, an error at its end."""
    teller.tell(ANSWER)
    page.send("A question of some length, so that a narrow page has to break it, and then one more line")
    page.answered()
    teller.tell("It was", EngineError("the engine was lost"))
    page.send("And then?")
    page.wait(lambda: page.all(".problem"))
    yield


def test_everything_has_a_name_and_a_place(told: Browser, teller: Storyteller):
    with _told(told, teller):
        roles = {one.aria_role: one.accessible_name for one in told.all("nav, header, main, form#compose, #turns")}
        assert roles == {
            "navigation": "Conversations",
            "banner": "",
            "main": "",
            "form": "Message",
            "log": "Conversation",
        }
        assert told.js("return document.documentElement.lang") == "en"
        assert len([one for one in told.all("h1") if one.get_attribute("hidden") is None and one.accessible_name]) >= 1
        assert _unnamed(told, "body > :not(dialog)") == []
        told.press("Settings")
        assert _unnamed(told, "dialog") == []
        assert told.one("#settings").accessible_name == "Settings" and told.one("#settings").aria_role == "dialog"
        levels = told.js("return [...document.querySelectorAll('#turns :is(h2, h3, h4)')].map(one => one.localName)")
        assert levels[:3] == ["h2", "h2", "h4"], "who speaks is a heading, the answer's own stand below"
        ids = told.js("return [...document.querySelectorAll('[id]')].map(one => one.id)")
        assert len(ids) == len(set(ids))
        told.keys(Keys.ESCAPE)


def _unnamed(page: Browser, where: str) -> list[str]:
    """Controls that a screen reader has no words for."""
    controls = page.all(f":is({where}) :is({CONTROLS})")
    assert len(controls) > 5
    return [str(one.get_attribute("outerHTML")) for one in controls if one.is_displayed() and not one.accessible_name]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_edges_stand_out(scheme: str, told: Browser, teller: Storyteller):
    with told.media(prefers_color_scheme=scheme), _told(told, teller):
        _assert_readable(told, 15)
        told.press("Settings")
        _assert_readable(told, 15)
        told.press("Done")
        told.press("Rename, export or delete A question of some length, so that a narrow…")
        _assert_readable(told, 15)
        told.keys(Keys.ESCAPE)
        told.press("New conversation")
        _assert_readable(told, 10)


def _assert_readable(page: Browser, least: int) -> None:
    seen, faint = page.js(CONTRAST)
    assert seen >= least and faint == []


def test_the_theme_follows_the_system_until_it_is_chosen(told: Browser, told_url: str):
    paper = "return getComputedStyle(document.body).backgroundColor"
    with told.media(prefers_color_scheme="dark"):
        dark = told.js(paper)
        told.press("Light colours")
        light = told.js(paper)
        told.open(told_url)
        assert told.js(paper) == light != dark, "the choice is kept"
    with told.media(prefers_color_scheme="light"):
        assert told.js(paper) == light
        told.press("Dark colours")
        assert told.js(paper) == dark


def test_by_keyboard_alone(told: Browser, teller: Storyteller):
    teller.tell("Well, well.")
    told.keys("One line", Keys.SHIFT, Keys.ENTER, Keys.NULL, "and another", Keys.ENTER)
    told.answered()
    assert told.text(".turn.user .body") == ["One line\nand another"]

    teller.tell("It goes", None, " on.")
    told.keys("More", Keys.ENTER)
    told.wait(lambda: told.text(".turn.model:last-child .body") == ["It goes"])
    told.keys(Keys.ESCAPE)
    assert told.answered() == "It goes"

    told.keys(Keys.ARROW_UP)  # in an empty field: the last message again
    teller.tell("Much more.")
    told.keys(" of it", Keys.ENTER)
    told.wait(lambda: told.text(".turn.model:last-child .body") == ["Much more."])
    assert told.text(".turn.user:nth-last-child(2) .body") == ["More of it"]

    told.keys(Keys.CONTROL, Keys.SHIFT, "o", Keys.NULL)
    assert told.one("#empty").is_displayed()
    assert told.driver.switch_to.active_element == told.one("#text"), "ready for the next question"


def test_tab_reaches_everything_and_shows_where_it_is(told: Browser, teller: Storyteller):
    with _told(told, teller):
        expected = {one.id for one in told.all(CONTROLS) if one.is_displayed() and one.is_enabled()}
        expected -= {told.one("#scrim").id}
        told.js("document.activeElement.blur(); getSelection().removeAllRanges()")
        reached, unseen = set(), []
        for _ in range(3 * len(expected)):
            told.driver.switch_to.active_element.send_keys(Keys.TAB)
            here = told.driver.switch_to.active_element
            if not told.js(MARKED, here):
                unseen.append(here.get_attribute("outerHTML"))
            if here.id in reached and expected <= reached:
                break
            reached.add(here.id)
        missing = [one.get_attribute("outerHTML") for one in told.all(CONTROLS) if one.id in expected - reached]
        assert missing == [] and [one for one in unseen if one and not one.startswith("<body")] == []


def test_whole_sentences_are_read_out(told: Browser, teller: Storyteller):
    """Not each token; without Markdown's marks; code by its name; a break at once."""
    teller.tell("The **Danube** is", None, " long. It", " ends\n```py\nx = 1. \n```\nin a [delta](https://e.org)")
    told.send("Tell me")
    told.wait(lambda: told.text(".turn.model .body") == ["The Danube is"])
    assert told.one("#speech").get_attribute("aria-live") == "polite"
    spoken = "return [...document.querySelectorAll('#speech p')].map(one => one.textContent)"
    assert told.js(spoken) == [] and told.one("#status").get_attribute("textContent") == "The model is answering."
    teller.go.set()
    told.answered()
    assert " ".join(" ".join(told.js(spoken)).split()) == "The Danube is long. It ends py code. in a delta"
    assert told.one("#status").get_attribute("textContent") == "The answer has ended."
    teller.tell(EngineError("the engine was lost"))
    told.send("More")
    told.wait(lambda: told.all(".problem"))
    assert "The engine was lost." in str(told.one("#alert").get_attribute("textContent"))


def test_the_view_follows_until_somebody_scrolls_up(told: Browser, teller: Storyteller):
    teller.tell("line\n\n" * 80, None, "more\n\n" * 40, "end")
    told.send("A long one")
    at_end = (
        "const log = document.getElementById('log'); return log.scrollHeight - log.scrollTop - log.clientHeight < 24"
    )
    told.wait(lambda: len(told.all(".md p")) == 80 and told.js(at_end))
    told.js("document.getElementById('log').scrollTop -= 300")
    told.wait(lambda: told.one("#end").is_displayed())
    top = told.js("return document.getElementById('log').scrollTop")
    teller.go.set()
    told.answered()
    assert told.js("return document.getElementById('log').scrollTop") == top, "it is read, so it stays"
    told.press("To the end")
    assert told.js(at_end) and not told.one("#end").is_displayed()


def test_on_a_phone(told: Browser, teller: Storyteller, told_url: str):
    wide = "return [document.documentElement.scrollWidth, document.getElementById('log').scrollWidth]"
    with told.phone():
        told.open(told_url)
        assert told.js(wide) == [390, 390]
        with _told(told, teller):
            assert told.js(wide) == [390, 390], "table and code scroll by themselves"
            told.press("Settings")
            panel = told.one("#settings")
            assert panel.get_property("scrollWidth") == panel.get_property("clientWidth") and panel.rect["width"] <= 390
            told.press("Done")
            assert not told.one("#new").is_displayed()
            told.press("Conversations")
            told.wait(lambda: told.one("#new").is_displayed())
            assert told.driver.switch_to.active_element == told.one("#new")
            assert told.js("return document.getElementById('log').inert"), "what lies behind is out of reach"
            told.keys(Keys.ESCAPE)
            told.wait(lambda: not told.one("#new").is_displayed())
            assert told.driver.switch_to.active_element == told.one("#menu")
            assert told.js(SMALL) == [], "WCAG 2.2 asks for 24 pixels"


def test_nothing_moves_for_who_wants_it_still(told: Browser, teller: Storyteller):
    teller.tell("Wait", None)
    told.send("Hello")
    told.wait(lambda: told.text(".live") == ["Wait"])
    moves = "return getComputedStyle(document.querySelector('.live'), '::after').animationName"
    assert told.js(moves) == "breathe"
    with told.media(prefers_reduced_motion="reduce"):
        assert told.js(moves) == "none"


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, Any]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_file_needs_nothing_and_keeps_to_its_policy():
    """One script and one style, known by their hashes; no handler or style in an attribute, nothing from elsewhere."""
    text = CHAT_PAGE.read_text()
    page = _Page()
    page.feed(text)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == tags.count("style") == 1
    names = [name for _, attributes in page.tags for name in attributes]
    assert not [name for name in names if name == "style" or (name.startswith("on") and name != "on")]
    sources = [attributes.get("src") or attributes.get("href") for _, attributes in page.tags]
    assert all(source.startswith(("#", "data:")) for source in sources if source)
    unsafe = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|DOMParser|\bimport\b|url\("
    script, style = re.search(r"<script>(.*)</script>", text, re.S), re.search(r"<style>(.*)</style>", text, re.S)
    assert script and style and not re.findall(unsafe, script[1] + style[1])
