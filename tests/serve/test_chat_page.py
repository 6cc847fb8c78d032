"""What somebody does with the chat page, in a real browser against a live gate: talk, change their mind, come back."""

from __future__ import annotations

import json
from pathlib import Path

from selenium.webdriver.common.keys import Keys
from starlette.types import Message, Receive, Scope, Send

from danube_ray.config import GateSettings
from danube_ray.serve.engines import EngineBusy, EngineError
from danube_ray.serve.gate import ModelEntry, create_app
from danube_ray.serve.keys import append, make_key
from tests.serve.browser import Browser
from tests.serve.conftest import RecordingEngine, live
from tests.serve.storyteller import Storyteller

FILL_STORAGE = """
let room = 2 ** 23;
for (let n = 0; room > 8; n++) try { localStorage.setItem('filler' + n, 'x'.repeat(room)); } catch { room >>= 1; }"""


def asked(entry: ModelEntry, prompt: list[int]) -> str:
    return entry.tokenizer.decode(prompt)


def test_a_message_is_answered_and_kept(page: Browser, recorder: RecordingEngine, entry: ModelEntry, url: str):
    page.set(max_tokens=40)
    page.send("Which river is longer?")
    assert page.answered()
    assert page.text(".stats")[0].startswith("ended at the token limit · 40 tokens")
    assert page.text("#used")[0].endswith("of 65,536 tokens used")
    page.send("And which is wider?")
    page.wait(lambda: len(page.all(".turn.model .stats")) == 2)
    sent = asked(entry, recorder.prompts[-1])
    assert "Which river is longer?" in sent and "And which is wider?" in sent

    before = page.text(".turn .body")
    page.driver.refresh()
    page.wait(lambda: page.text(".turn .body") == before)
    assert page.text("#chats .open") == ["Which river is longer?"]
    assert page.driver.title == "Which river is longer? · Danube"
    assert page.complaints() == []
    assert {address for address in page.requested() if not address.startswith(("data:", f"{url}/"))} == set()


def test_stop_and_regenerate(page: Browser, recorder: RecordingEngine):
    page.send("Tell me everything")
    page.wait(lambda: any(page.text(".turn.model .body")))
    page.keys(Keys.ESCAPE)
    stopped = page.answered()
    assert page.text(".stats") == ["stopped"]
    assert recorder.idle.wait(20), "the server stops too"

    page.set(max_tokens=12)
    page.press("Regenerate")
    page.wait(lambda: page.text(".stats") and "12 tokens" in page.text(".stats")[0])
    assert page.answered() != stopped and len(page.all(".turn")) == 2


def test_text_streams_and_the_button_stops_it(told: Browser, teller: Storyteller):
    teller.tell(" Once", " upon", None, " a time.")
    told.send("A story")
    told.wait(lambda: told.text(".turn.model .body") == ["Once upon"])
    assert told.one("#send").get_attribute("aria-label") == "Stop" and told.all(".live")
    told.press("Stop")
    assert told.answered() == "Once upon" and told.text(".stats") == ["stopped"]


def test_a_question_is_edited_and_sent_again(told: Browser, teller: Storyteller, entry: ModelEntry):
    told.send("How long is the Rhine?")
    told.answered()
    told.send("And the Elbe?")
    told.wait(lambda: len(told.text(".stats")) == 2)

    told.one(".turn.user [class=tools]").find_elements("tag name", "button")[1].click()
    told.keys(Keys.END, " Really?", Keys.ESCAPE)
    assert told.text(".turn.user .body") == ["How long is the Rhine?", "And the Elbe?"], "cancelled: nothing is lost"

    teller.tell("2,850 km.")
    told.one(".turn.user [class=tools]").find_elements("tag name", "button")[1].click()
    told.keys(Keys.CONTROL, "a")
    told.keys("How long is the Danube?", Keys.ENTER)
    told.wait(lambda: told.text(".turn .body") == ["How long is the Danube?", "2,850 km."])
    assert "Rhine" not in asked(entry, teller.prompts[-1]) and "Elbe" not in asked(entry, teller.prompts[-1])


def test_settings_reach_the_server_and_stay(told: Browser, teller: Storyteller, entry: ModelEntry, told_url: str):
    wanted = {"max_tokens": 77, "seed": 5, "system": "Be brief."}
    told.set(**wanted)
    told.js("""for (const [name, value] of Object.entries(arguments[0])) {
      const knob = document.getElementById(name); knob.value = value; knob.dispatchEvent(new Event('input')); }
      """, {"temperature": 0.25, "top_p": 0.5, "repetition_penalty": 1.3})  # fmt: skip
    told.open(told_url)
    told.send("Hi")
    told.answered()
    sent = teller.samplings[-1]
    assert (sent.temperature, sent.top_p, sent.repetition_penalty) == (0.25, 0.5, 1.3)
    assert (sent.max_tokens, sent.seed) == (77, 5) and "Be brief." in asked(entry, teller.prompts[-1])

    told.press("Settings")
    told.press("Reset to defaults")
    told.press("Done")
    told.press("Regenerate")
    told.wait(lambda: teller.samplings[-1] is not sent)
    told.answered()
    reset = teller.samplings[-1]
    assert (reset.temperature, reset.top_p, reset.repetition_penalty, reset.seed) == (0.7, 0.9, 1.1, None)
    assert reset.max_tokens > 77 and "Be brief." not in asked(entry, teller.prompts[-1])


def test_models_and_adapters_are_switched_in_a_conversation(told: Browser, teller: Storyteller, told_url: str):
    assert [group.get_attribute("label") for group in told.all("#model optgroup")] == ["tiny and its adapters"]
    told.send("Hi")
    told.answered()
    told.choose("letters")
    told.send("A letter")
    told.wait(lambda: len(told.text(".stats")) == 2)
    assert told.text(".who") == ["tiny", "letters"]
    assert [sent.adapter for sent in teller.samplings[-2:]] == [None, "letters"]
    told.open(told_url)
    assert told.one("#model").get_property("value") == "letters", "the choice is kept"
    told.press("New conversation")
    assert told.one("#model").get_property("value") == "letters"


def test_several_conversations(told: Browser, teller: Storyteller):
    teller.tell("Slowly", None, " done.")
    told.send("The first")
    told.wait(lambda: told.text(".turn.model .body") == ["Slowly"])
    told.press("New conversation")
    assert told.one("#empty").is_displayed() and told.text("#chats .busy") == ["The first"]
    teller.story = ["Quick."]
    told.send("The second")
    assert told.answered() == "Quick."
    teller.go.set()
    told.wait(lambda: not told.all("#chats .busy"))
    told.press("The first")
    assert told.text(".turn.model .body") == ["Slowly done."], "it went on while another was on the page"

    told.press("Rename, export or delete The second")
    told.press("Rename")
    told.keys(Keys.CONTROL, "a")
    told.keys("Better", Keys.ENTER)
    told.driver.refresh()
    told.wait(lambda: set(told.text("#chats .open")) == {"Better", "The first"})

    told.press("Rename, export or delete Better")
    told.press("Delete")
    assert told.text("#chats .open") == ["The first"]
    told.press("Undo")
    told.wait(lambda: len(told.text("#chats .open")) == 2)
    told.press("Settings")
    told.press("Delete all chats")
    told.press("Dismiss")
    told.driver.refresh()
    assert told.text("#chats .open") == []


def test_a_conversation_is_exported(told: Browser):
    told.send("Is water wet?")
    told.answered()
    told.press("Rename, export or delete Is water wet?")
    told.press("Export")
    saved = told.downloaded()
    told.wait(lambda: saved.stat().st_size)
    (conversation,) = json.loads(saved.read_text())["conversations"]
    saved.unlink()
    assert conversation["title"] == "Is water wet?"
    assert conversation["messages"] == [
        {"role": "user", "content": "Is water wet?"},
        {"role": "assistant", "content": "Well.", "model": "tiny"},
    ]


def test_full_storage_is_said_and_nothing_breaks(told: Browser):
    told.js(FILL_STORAGE)
    told.send("Hello")
    assert told.answered() == "Well."
    assert told.text("#notice")[0].startswith("The browser's storage is full")
    told.js("localStorage.clear()")
    told.send("Again")
    told.wait(lambda: told.text(".turn.model .body") == ["Well.", "Well."])
    assert told.js("return Object.keys(localStorage).filter(key => key.startsWith('danube.chat.')).length") == 1


def test_junk_in_the_storage_is_passed_over(told: Browser, told_url: str):
    good = {"title": "Good", "at": 1, "turns": [{"role": "user", "content": "Hi"}]}
    junk = [
        "{",
        "null",
        "[]",
        '{"turns": 3}',
        '{"turns": [null, 5, {"role": "system", "content": {}}]}',
        json.dumps(good),
    ]
    told.js("arguments[0].forEach((text, n) => localStorage.setItem('danube.chat.' + n, text))", junk)
    told.js('localStorage.setItem(\'danube.settings\', \'{"temperature": "hot", "seed": {}, "key": 7}\')')
    told.open(told_url)
    assert sorted(told.text("#chats .open")) == ["Good", "Untitled"]
    told.send("Works?")
    assert told.answered() == "Well." and told.complaints() == []


def test_two_tabs_see_each_other(told: Browser, told_url: str):
    first = told.driver.current_window_handle
    told.driver.switch_to.new_window("tab")
    try:
        told.open(told_url)
        told.send("From the other tab")
        told.answered()
    finally:
        told.driver.close()
        told.driver.switch_to.window(first)
    told.wait(lambda: told.text("#chats .open") == ["From the other tab"])


def test_a_missing_and_a_wrong_key(chromium: Browser, entry: ModelEntry, teller: Storyteller, tmp_path: Path):
    secret, key = make_key("ada")
    append(tmp_path / "keys", key)
    with live(create_app({"tiny": entry}, lambda _: teller, GateSettings(keys_file=tmp_path / "keys"))) as url:
        chromium.driver.get(url)
        chromium.wait(lambda: chromium.text("#key-problem") == ["This server asks for an API key."])
        assert chromium.driver.switch_to.active_element == chromium.one("#key")
        chromium.keys("wrong", Keys.ENTER)
        chromium.wait(lambda: chromium.text("#key-problem") == ["The server did not accept this API key."])
        chromium.one("#key").clear()
        chromium.one("#key").send_keys(secret, Keys.ENTER)
        chromium.wait(lambda: chromium.all("#model option"))
        chromium.send("Hello")
        assert chromium.answered() == "Well."

        other, key = make_key("bob")
        (tmp_path / "keys").write_text(key.line + "\n")  # hers is taken back
        chromium.wait(lambda: _refused(chromium))
        assert chromium.text(".problem b") == ["The server did not accept this API key."]
        chromium.one("#key").clear()
        chromium.one("#key").send_keys(f"{other} ", Keys.ENTER)  # copied with a space, as it happens
        chromium.wait(lambda: not chromium.all(".problem") and not chromium.all(".live"))
        assert chromium.answered() == "Well.", "what it was missing for is asked again"


def _refused(page: Browser) -> bool:
    """Ask once more; whether the key was refused. The server looks at its file once a second at most."""
    page.send("Hello?")
    page.wait(lambda: page.js("return document.getElementById('settings').open") or not page.all(".live"))
    return page.js("return document.getElementById('settings').open")


def test_a_busy_server_is_asked_again(told: Browser, teller: Storyteller, entry: ModelEntry):
    teller.tell(EngineBusy("every slot is taken"))
    told.send("Hello")
    told.wait(lambda: told.all(".problem"))
    assert told.text(".problem p")[0].startswith("The server is busy. Every slot is taken.")
    told.wait(lambda: told.text(".problem p")[0].endswith("You can try again now."))  # Retry-After is one second
    teller.tell("Here I am.")
    told.press("Try again")
    assert told.answered() == "Here I am." and not told.all(".problem") and len(told.all(".turn")) == 2

    teller.tell(EngineBusy("every slot is taken"))
    told.send("Where?")
    told.wait(lambda: told.all(".problem"))
    teller.tell("There.")
    told.send("Never mind, how?")
    told.wait(lambda: told.text(".turn.model:last-child .body") == ["There."])
    sent = asked(entry, teller.prompts[-1])
    assert "Here I am." in sent and "Where?" not in sent, "a question without an answer is not sent again"


def test_too_many_requests_say_when_to_come_back(chromium: Browser, entry: ModelEntry, teller: Storyteller):
    with live(create_app({"tiny": entry}, lambda _: teller, GateSettings(requests_per_minute=1))) as url:
        chromium.visit(url)
        chromium.send("One")
        chromium.answered()
        chromium.send("Two")
        chromium.wait(lambda: chromium.all(".problem"))
        said = chromium.text(".problem p")[0]
        assert said.startswith("Too many requests. 1 requests a minute is your limit. Try again in ")
        assert 40 < int(said.split()[-2]) <= 60


def test_an_answer_that_breaks_keeps_what_came(told: Browser, teller: Storyteller, entry: ModelEntry):
    teller.tell("Well begun", " is", EngineError("the engine was lost"))
    told.send("Go on")
    assert told.answered() == "Well begun is"
    assert told.text(".problem p") == ["Cut off before the end. The engine was lost."]
    told.driver.refresh()
    told.wait(lambda: told.text(".turn.model .body") == ["Well begun is"] and told.text(".problem p"))
    teller.tell("Half done.")
    told.wait(lambda: told.all("#model option"))
    told.press("Try again")
    assert told.answered() == "Half done." and "Well begun" not in asked(entry, teller.prompts[-1])


def test_a_page_that_closes_keeps_what_came(told: Browser, teller: Storyteller):
    teller.tell("Before the", None, " storm.")
    told.send("Go on")
    told.wait(lambda: told.text(".turn.model .body") == ["Before the"])
    told.driver.refresh()
    told.wait(lambda: told.text(".turn.model .body") == ["Before the"])
    assert told.text(".problem p") == ["Cut off before the end. The page was closed."]


def test_a_conversation_that_outgrew_the_model(told: Browser, entry: ModelEntry, teller: Storyteller):
    told.choose("short")
    told.send("river " * 60)
    told.wait(lambda: told.all(".problem"))
    (said,) = told.text(".problem p")
    assert "context of 64" in said and "shorten an earlier message with Edit" in said
    told.choose("tiny")
    told.press("Try again")
    assert told.answered() == "Well."


def test_a_server_that_is_gone(chromium: Browser, entry: ModelEntry, teller: Storyteller):
    with live(create_app({"tiny": entry}, lambda _: teller)) as url:
        chromium.visit(url)
    chromium.send("Hello")
    chromium.wait(lambda: chromium.all(".problem"))
    assert chromium.text(".problem p")[0].startswith("The server can't be reached.")


def test_a_connection_that_breaks(chromium: Browser, entry: ModelEntry, teller: Storyteller):
    app = create_app({"tiny": entry}, lambda _: teller)

    async def torn(scope: Scope, receive: Receive, send: Send) -> None:
        """The app, until the first piece of an answer has left; then not even an error gets through."""
        gone = False

        async def sending(message: Message) -> None:
            nonlocal gone
            if gone:
                raise ConnectionResetError
            await send(message)
            gone = b"The end is" in message.get("body", b"")

        await app(scope, receive, sending)

    teller.tell("The end is", None, " near.")
    with live(torn) as url:
        chromium.visit(url)
        chromium.send("Hello")
        chromium.wait(lambda: chromium.text(".turn.model .body") == ["The end is"])
        teller.go.set()
        assert chromium.answered() == "The end is"
        assert chromium.text(".problem p") == ["Cut off before the end. The connection broke."]
