"""What a model writes, as the chat page shows it: Markdown made of elements, never of markup, while it comes."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.serve.browser import Browser
from tests.serve.storyteller import Storyteller

DOCUMENT = """# Rivers
A *long* one, a **longer _one_**, `a < b`, [a link](https://example.org/a?b=1&c=2), snake_case_name and 2 * 3 * 4.
A line \\*of\\* its own, ~~gone~~, https://example.org/path_(x). Mail <mailto:a@example.org>!

- first
- second
  1. deeper
     with more
  2. again

     and a paragraph
- [x] third

3) starts at three

> quoted
> > twice

```python
if a < b:  # <b>not bold</b>

    print("&amp; **this**")
```

| river | km |
|:--|--:|
| Volga \\| Itil | 3,530 |
| `Ural` | **2,428** |

---
The end of it *is not
"""
# What each piece shows as tags and text: one line a rule.
RULES = {
    "**a**b": "<p><strong>a</strong>b</p>",
    "***both***": "<p><em><strong>both</strong></em></p>",
    "**bold *nested* bold**": "<p><strong>bold <em>nested</em> bold</strong></p>",
    "*foo**bar**baz*": "<p><em>foo<strong>bar</strong>baz</em></p>",
    "** not bold **": "<p>** not bold **</p>",
    "``a ` b``": "<p><code>a ` b</code></p>",
    "one `open": "<p>one `open</p>",
    "a\nb": "<p>a<br>b</p>",
    "1. a\n2. b": "<ol><li><p>a</p></li><li><p>b</p></li></ol>",
    "- a\n\n- b": '<ul class="loose"><li><p>a</p></li><li><p>b</p></li></ul>',
    "- a\nlazy": "<ul><li><p>a<br>lazy</p></li></ul>",
    "Said in\n1986. A year": "<p>Said in<br>1986. A year</p>",
    "text\n- a": "<p>text</p><ul><li><p>a</p></li></ul>",
    "## Two ##": "<h4>Two</h4>",
    "#no": "<p>#no</p>",
    "a | b": "<p>a | b</p>",
    "***": "<hr>",
    "a<br>b": "<p>a<br>b</p>",
    "\\(x\\)": "<p>\\(x\\)</p>",
    "- ```\n  x\n  ```\n  y": "<ul><li><pre>x</pre><p>y</p></li></ul>",
    "[![a](https://b.c)](https://d.e)": "<p><a>a</a></p>",
    "[a *b](https://c.d)*": "<p><a>a *b</a>*</p>",
    "*a [b* c](https://d.e)*": "<p><em>a <a>b* c</a></em></p>",
    "> a\nb\n\nc": "<blockquote><p>a<br>b</p></blockquote><p>c</p>",
}
ATTACKS = [
    "<img src=x onerror=\"document.title='owned'\">",
    "<script>document.title='owned'</script>",
    "<svg/onload=document.title='owned'>",
    "<iframe srcdoc=\"<script>parent.document.title='owned'</script>\"></iframe>",
    "[bad](javascript:document.title='owned')",
    "[bad](JaVaScRiPt:alert(1)) [bad](data:text/html,<script>alert(1)</script>) [bad](vbscript:x)",
    "[bad](\tjavascript:alert(1)) [bad](&#106;avascript:alert(1)) [bad](//evil.example) [bad](/v1/models)",
    '[odd](https://e.org/"onmouseover="x) ![x](https://example.org/x.png) <https://e.org/"><b>',
    "```\"><img src=x onerror=\"document.title='owned'\">\n</code></pre><script>document.title='owned'</script>\n```",
    "| <b onclick=x>a</b> |\n|---|\n| <style>*{display:none}</style> |",
    "\u0000<b>\u0000</b> ${alert(1)} {{7*7}} [a](https://[oops) [b](mailto:)",
]
SHOWN = """
const body = document.createElement('div'), write = markdown(body);
write(arguments[0]);
const tell = node => node.nodeType === 3 ? node.data :
  node.className === 'fence' ? `<pre>${node.code.textContent}</pre>` :
  `<${node.localName}${node.className ? ` class="${node.className}"` : ''}>${[...node.childNodes].map(tell).join('')}` +
  (['br', 'hr'].includes(node.localName) ? '' : `</${node.localName}>`);
return [...body.childNodes].map(tell).join('')"""


def test_a_document_is_shown_as_meant(told: Browser, teller: Storyteller):
    teller.tell(*DOCUMENT.splitlines(keepends=True))
    told.send("Show me <b>Markdown</b>")
    told.answered()
    assert told.text(".turn.user .body") == ["Show me <b>Markdown</b>"]
    assert told.text(".md h3") == ["Rivers"] and told.text(".md p > em") == ["long"]
    assert told.text(".md p > strong") == ["longer one"] and told.text(".md strong em") == ["one"]
    assert told.text(".md p code") == ["a < b"] and told.text(".md del") == ["gone"]
    assert "snake_case_name and 2 * 3 * 4.\nA line *of* its own" in told.text(".md p")[0]
    assert [link.get_attribute("href") for link in told.all(".md a")] == [
        "https://example.org/a?b=1&c=2",
        "https://example.org/path_(x)",
        "mailto:a@example.org",
    ]
    assert {link.get_attribute("rel") for link in told.all(".md a")} == {"noopener noreferrer nofollow"}
    assert told.text(".md > ul > li > ol > li > p") == ["deeper\nwith more", "again", "and a paragraph"]
    assert told.text(".md > ul > li:last-child") == ["☑ third"]
    assert told.one(".md > ol").get_attribute("start") == "3"
    assert told.text(".md blockquote blockquote") == ["twice"]
    assert told.text(".md pre code") == ['if a < b:  # <b>not bold</b>\n\n    print("&amp; **this**")']
    assert told.text(".md .fence span") == ["python"]
    assert told.text(".md th") == ["river", "km"]
    assert told.text(".md td") == ["Volga | Itil", "3,530", "Ural", "2,428"]
    assert [cell.get_attribute("class") for cell in told.all(".md tbody tr:first-child td")] == ["", "right"]
    assert told.text(".md > p:last-child") == ["The end of it *is not"]
    assert told.complaints() == []


def test_small_rules(told: Browser):
    shown = {text: told.js(SHOWN, text) for text in RULES}
    assert shown == RULES


def test_nothing_that_a_model_or_the_storage_says_is_markup(told: Browser, teller: Storyteller, told_url: str):
    text = "\n\n".join(ATTACKS)
    teller.tell(*text.split(" "), text)
    told.send(ATTACKS[0])
    told.answered()
    _assert_harmless(told)

    turns = [{"role": role, "content": text, "model": ATTACKS[0], "ended": "stop"} for role in ("user", "assistant")]
    turns[1]["problem"] = {"text": ATTACKS[1], "detail": ATTACKS[2]}  # type: ignore[assignment]
    poisoned = {"title": ATTACKS[0], "model": ATTACKS[1], "turns": turns, "at": 2**42}
    told.js("localStorage.setItem('danube.chat.bad', JSON.stringify(arguments[0]))", poisoned)
    told.js("localStorage.setItem('danube.open', '\"bad\"')")
    told.open(told_url)
    told.wait(
        lambda: told.text(".turn.user .body") == [text.replace("\u0000", "\ufffd")] or told.text(".turn.user .body")
    )
    _assert_harmless(told)
    assert told.text("#chats .current .open") == [ATTACKS[0]]


def _assert_harmless(page: Browser) -> None:
    """Only the elements that the page itself makes, no handler, and only links to the web or to a mailbox."""
    known = "p h3 h4 h5 h6 ul ol li blockquote hr br em strong del code pre a div span button svg use "
    known += "table thead tbody tr th td"
    made = set(page.js("return [...document.querySelectorAll('#turns .body *')].map(one => one.localName)"))
    assert made <= set(known.split())
    names = "return [...document.querySelectorAll('*')].flatMap(one => one.getAttributeNames())"
    assert not [name for name in page.js(names) if name.startswith("on") or name == "srcdoc"]
    links = page.js("return [...document.querySelectorAll('#turns a')].map(one => one.protocol)")
    assert links and set(links) <= {"http:", "https:", "mailto:"}
    assert "owned" not in page.driver.title or page.driver.title.startswith("<img")
    assert page.complaints() == []
    assert not [address for address in page.requested() if "example" in address or address.endswith("/x")]


def test_markup_is_refused_by_the_browser_itself(told: Browser):
    """Even a mistake in the page could not turn text into elements."""
    script = "try { document.createElement('p').innerHTML = '<b>x</b>'; } catch (error) { return error.name; }"
    assert told.js(script) == "TypeError"


@pytest.mark.parametrize("seed", range(8))
def test_what_comes_in_pieces_ends_as_if_whole(seed: int, told: Browser):
    """Random documents in random pieces: the elements are those made at once, and those before the end stay."""
    rng = random.Random(seed)
    lines = [*DOCUMENT.splitlines(), *ATTACKS, *RULES, "", "", "```", "| a | b |", "|---|---|", "    - x", "2. y"]
    texts = ["\n".join(rng.choices(lines, k=30)) for _ in range(12)]
    script = """
    return arguments[0].map((text, n) => {
      const whole = document.createElement('div'), body = document.createElement('div'), write = markdown(body);
      markdown(whole)(text);
      let first, kept = true;
      for (const end of arguments[1][n]) {
        write(text.slice(0, end), true);
        if (body.children.length > 3) { first ??= body.firstElementChild; kept &&= body.firstElementChild === first; }
      }
      write(text);
      return [whole.isEqualNode(body), kept];
    })"""
    cuts = [sorted(rng.choices(range(len(text)), k=60)) for text in texts]
    assert told.js(script, texts, cuts) == [[True, True]] * len(texts)


def test_a_long_answer_costs_in_proportion(told: Browser):
    """3,000 lines in 1,000 pieces: elements are made a few times each, not once a piece."""
    script = """
    const done = arguments[arguments.length - 1], body = document.createElement('div'), write = markdown(body);
    let made = 0;
    const watch = new MutationObserver(list => { for (const entry of list) made += entry.addedNodes.length; });
    watch.observe(body, { childList: true, subtree: true });
    const line = n => n % 30 < 12 ? `- item **${n}** of it` : n % 30 === 12 ? '|a|b|\\n|---|---|' :
      n % 30 < 20 ? `| ${n} | b |` : n % 10 ? `line ${n}` : '';
    let text = '';
    for (let n = 0; n < 3000; n++) { text += line(n) + '\\n'; if (n % 3 === 2) write(text, true); }
    write(text);
    setTimeout(() => done([made, body.querySelectorAll('*').length]));"""
    made, there = told.driver.execute_async_script(script)
    assert there > 4000 and made < 5 * there


def test_no_text_makes_the_page_hang(told: Browser):
    """Regular expressions that look back and forth would take minutes here, and a browser dies of deep elements."""
    pieces = [
        "*a",
        "*a ",
        "_",
        "**",
        "**a _b ",
        "`",
        "[",
        "](",
        "![",
        "![](https://a.b)",
        "<",
        ">",
        "> ",
        "# ",
        "- ",
        "|",
        "~",
        " ",
    ]
    nested = [
        "*a " * 5000 + "a* " * 5000,
        "![" * 5000 + "](https://a.b)" * 5000,
        "[![" * 5000 + "](https://a.b)" * 9000,
    ]
    texts = [piece * 20_000 + "x" for piece in pieces] + nested
    script = """
    const body = document.createElement('div');
    markdown(body)(arguments[0], arguments[1]);
    let deepest = 0, here = [body];
    for (; here.length; deepest++) here = here.flatMap(node => [...node.children]);
    return [deepest, body.querySelectorAll('a a').length]"""
    told.driver.set_script_timeout(20)
    for text in texts:
        for live in (False, True):
            deepest, links_in_links = told.js(script, text, live)
            assert deepest < 50 and not links_in_links, text[:20]


def test_begun_marks_do_not_show(told: Browser):
    """While text comes, bold begins as bold, and a link's address isn't read out."""
    script = """const body = document.createElement('div'); markdown(body)(arguments[0], true);
    return [body.textContent, [...body.querySelectorAll('strong, em, code, th')].map(one => one.localName)]"""
    live: dict[str, Any] = {
        text: told.js(script, text) for text in ("a **b", "a **b*", "a `b", "[c](https://ex", "| a |")
    }
    assert live == {
        "a **b": ["a b", ["strong"]],
        "a **b*": ["a b", ["strong"]],
        "a `b": ["a b", ["code"]],
        "[c](https://ex": ["c", []],
        "| a |": ["a", ["th"]],
    }


def test_code_and_messages_are_copied(told: Browser, teller: Storyteller, told_url: str):
    told.cdp("Browser.grantPermissions", origin=told_url, permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    read = "navigator.clipboard.readText().then(arguments[0])"
    teller.tell("Here:\n\n```py\nprint(1)\n```\n")
    told.send("Code, please")
    told.answered()
    told.one(".fence button").click()
    told.wait(lambda: told.text(".fence button") == ["Copied"])
    assert told.driver.execute_async_script(read) == "print(1)"
    told.press("Copy")
    told.wait(lambda: told.driver.execute_async_script(read) == "Here:\n\n```py\nprint(1)\n```\n")
