"""Source code: files of several languages are nearly all code, and prose of every kind has nearly none."""

from __future__ import annotations

import inspect
import json
import random
import string
import sysconfig
from pathlib import Path

import pytest

from danube_ray.curate.source_code import CODE_LINE, COMMANDS, _is_code, code_share
from tests.curate.real_texts import abstracts, articles, novel_pages, web_pages
from tests.curate.test_heuristics import PROSE

JAVASCRIPT = """const list = document.querySelector("#list");
function render(items) {
  // oldest first
  for (const item of items) {
    const row = document.createElement("li");
    row.textContent = `${item.name} (${item.count})`;
    list.append(row);
  }
}
fetch("/items").then((reply) => reply.json()).then(render);"""
SHELL = """#!/bin/sh
set -e
cd "$(dirname "$0")"
for file in *.tar.gz; do
    # unpack beside the archive
    tar -xzf "$file" && rm "$file"
done
if [ ! -d build ]; then
    mkdir build
fi
export PATH="$PWD/build:$PATH\""""
SQL = """CREATE TABLE lakes (
    name TEXT NOT NULL,
    depth REAL
);
INSERT INTO lakes (name, depth) VALUES ('Como', 410);
SELECT name
  FROM lakes
 WHERE depth > 100;"""
CSS = """body {
  margin: 0;
  font-family: sans-serif;
}
.card:hover, #top > a { color: #333; }"""
LOG = """2024-05-01 12:00:01,532 INFO server started on port 8000
2024-05-01 12:00:07,120 WARNING client 7 is slow
2024-05-01 12:00:09,001 ERROR Traceback (most recent call last):
  File "server.py", line 12, in answer
    return handlers[path](request)
KeyError: '/missing'"""
MINIFIED = "!function(e){var t=e.a||{};t.b=function(){return e.c()};t.d={e:1};if(t.b()){e.f()}else{t.g()}}(window);" * 9
PROGRAMS = {
    "python": inspect.getsource(random),
    "python without comments": inspect.getsource(string.Formatter.vformat),
    "javascript": JAVASCRIPT,
    "minified javascript": MINIFIED,
    "shell": SHELL,
    "sql": SQL,
    "css": CSS,
    "log": LOG,
    "json": json.dumps({"lakes": [{"name": "Como", "depth": 410.0}] * 3}, indent=2),
    "html": '<html>\n<body>\n<ul class="menu">\n<li><a href="/a">One</a></li>\n<li>Two</li>\n</ul>\n</body>\n</html>',
}

VERSE = """The curfew tolls the knell of parting day,
  The lowing herd winds slowly o'er the lea;
  Let not ambition mock their useful toil;
For them no more the blazing hearth shall burn,
    Or busy housewife ply her evening care:
No children run to lisp their sire's return;
    Return to me, he said (and so she did);
While yet the cock crew: "Arise!"
"""
TABLE = """Lake | Depth (m) | Country
Como | 410 | Italy
Bled | 30 | Slovenia
Total (2): 440"""
DIALOGUE = """"Where to?" he asked.
"To the lake," she said; "if you like."
He: Why? (laughing)
She: For the boats, of course!
- Is it far?
* Two hours on foot ...
"Then let us go!\""""
FORMULAS = r"""We prove that $\|Tf\|_{L^p} \leq C_{p,q} \|f\|_{L^q}$ for $f \in C_c^\infty(\mathbb{R}^n)$; here
$$P(|f-M_f| > c) \le 4 e^{-t^2/4\sigma ^2}$$ and $\{x_i\}_{i=1}^{n} \subset X := \{0,1\}^n$, so that
\begin{equation} g(x) = \sum_i a_i x^i. \end{equation}
As a consequence, $\mathcal{D}(p_1||p_0) \geq 0$ (see [12])."""
RECIPE = """Ingredients:
2 cups of flour (sifted)
1 tsp. salt; 3 eggs
For the sauce:
Heat the oil, then add: garlic, onions, salt.
Serve with bread (or rice)."""
TUTORIAL = f"{PROSE}\n    import boats\n    boats.row(north=True)\n{PROSE}"


@pytest.mark.parametrize("language", PROGRAMS)
def test_programs_are_code(language):
    assert code_share(PROGRAMS[language]) > 0.7


@pytest.mark.parametrize("text", [PROSE, VERSE, TABLE, DIALOGUE, FORMULAS, RECIPE, "", "\n \n", "{", "= = Title = ="])
def test_other_texts_are_not(text):
    assert code_share(text) <= (0.25 if text != "{" else 1)


def test_a_snippet_in_prose_counts_by_its_lines():
    assert code_share(TUTORIAL) == 2 / len(TUTORIAL.splitlines())


def test_a_comment_is_code_where_it_follows_code_but_a_list_in_prose_is_not():
    assert code_share("x = f(y)\n# as in the paper\n\n    by its authors\nThe end.") == 3 / 4
    assert code_share("The lakes:\n* Como\n* Bled\n    the smaller one") == 0
    assert code_share("x = f(y)\n" + "    set in, like a quotation\n" * 30) < 0.3


def test_files_of_this_python_are_code():
    library = [path.read_text(errors="replace") for path in sorted(Path(inspect.__file__).parent.glob("*.py"))]
    headers = [path.read_text() for path in sorted(Path(sysconfig.get_path("include")).rglob("*.h"))]
    for files in (library, headers):
        shares = [code_share(file[:20_000]) for file in files if len(file) > 1000]
        assert not files or sum(share > 0.5 for share in shares) > 0.9 * len(shares)


def test_what_is_taken_for_prose_at_a_glance_has_no_form_of_code():
    generator, library = random.Random(0), sorted(Path(inspect.__file__).parent.glob("*.py"))[:30]
    lines = [line.strip() for path in library for line in path.read_text(errors="replace").splitlines()]
    pieces = [*COMMANDS.split("|"), "a", "x_y", "at", "line 3", "2024-01-01", *"2,.?'-\"", "--", " ", " ", " "]
    lines += ["".join(generator.choices(pieces, k=generator.randint(1, 8))).strip() for _ in range(10_000)]
    code = {line for line in lines if line and CODE_LINE.match(line)}
    assert {line for line in code if not _is_code(line)} == set()
    assert len(code) > 3_000


def test_real_prose_is_not_code(shared_data):
    """At a share of 0.5: one of 10,000 abstracts (it is HTML), no piece of a novel, no article; and what is left of the
    web pages are tutorials.
    """
    papers = [text for text in abstracts(shared_data, 10_000) if code_share(text) > 0.5]
    assert len(papers) <= 1 and all("<p type=" in text for text in papers)
    for texts in (novel_pages(shared_data)[::4], articles(shared_data)):
        assert max(map(code_share, texts)) <= 0.5
    assert sum(code_share(text) > 0.5 for _, text in web_pages(shared_data)) <= 4


@pytest.mark.parametrize("run", ["a", "(", "$", "<a ", "</", ");{", "a.", "x -"])
def test_a_long_line_is_one_line_and_takes_linear_time(run):
    """Quadratic patterns would take minutes here, and end at the suite's time limit."""
    assert code_share(f"x = f(y)\n{PROSE}\n{run * (10**6 // len(run))} z") in (1 / 14, 2 / 14)
