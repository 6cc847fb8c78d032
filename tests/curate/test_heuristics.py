"""Rules: each drops what it is for, by its own name; what rewrites a text does that alone."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from danube_ray.config import RULE_SETS, RULES, SIGNALS, WEB_RULES, ConfigError, HeuristicRules, LineRules
from danube_ray.curate.heuristics import judge, measure
from danube_ray.curate.words import tokenize

# Prose that passes every rule: 12 sentences without a repeated line or phrase.
PROSE = """The river rises in the hills to the north, where the snow lies until May.
It is a narrow stream at first and children jump across it on their way to school.
Below the old mill, two brooks that have come down from the forest join it.
From there on it is wide enough to carry boats, and the first village has a landing.
Farmers used to bring their apples to this place and sell them from the boats.
Some of the older people remember how crowded the water was on market days.
Trucks came with the new road, and within ten years nobody sailed any more.
Today visitors rent canoes and drift slowly with the current through quiet meadows.
Herons stand in the shallows, and in the evening you may see an otter swim.
After heavy rain everything changes, for the water turns brown and very quick.
Twice in the last century it has flooded the lower streets of the town.
A wall of stone was built, which holds so far and which everyone hopes will hold."""


def reason(text: str, rules: HeuristicRules = WEB_RULES) -> str | None:
    return judge(text, rules).reason


def test_prose_is_kept_with_every_signal_measured():
    verdict = judge(PROSE, WEB_RULES)
    assert verdict.reason is None
    assert set(verdict.signals) == set(SIGNALS)
    assert verdict.signals["words"] == len(PROSE.split())
    assert verdict.signals["sentences"] == verdict.signals["punctuated_lines"] * 12 == 12


LINES = PROSE.split("\n")
TWICE = " ".join([*LINES[:6], *LINES[:3]])
BROKEN = {
    "max_duplicate_paragraphs": "\n\n".join([PROSE, *["Share"] * 3]),
    "max_duplicate_paragraph_chars": "\n\n".join([*LINES, *LINES[:4]]),
    "max_duplicate_lines": "\n".join([PROSE, *["Home"] * 9]),
    "max_duplicate_line_chars": "\n".join([*LINES, *LINES[:4]]),
    "max_top_2gram_chars": PROSE.replace(" a ", " the ").replace(" the ", " extraordinarily circumstantial "),
    "max_top_3gram_chars": PROSE.replace(" the ", " of the extraordinary "),
    "max_top_4gram_chars": PROSE.replace(" the ", " that is to say "),
    **{f"max_duplicate_{n}gram_chars": TWICE for n in range(5, 11)},
    "min_words": LINES[0],
    "max_words": "word " * 100_001,
    "min_mean_word_chars": " ".join(a + b for a in "abcdefghij" for b in "klmnopqrst"),
    "max_mean_word_chars": PROSE.replace("e", "e" * 20),
    "max_hash_signs": PROSE.replace(".", " # # # #."),
    "max_ellipses": PROSE.replace(",", " …").replace(" a", " … a").replace(" h", " … h").replace(" t", " … t"),
    "max_bullet_lines": "- " + PROSE.replace("\n", "\n  • "),
    "max_ellipsis_lines": PROSE.replace(".\n", "...\n", 5),
    "min_alphabetic_words": PROSE + " " + " ".join(map(str, range(60))),
    "min_stop_words": re.sub(r"\b(the|be|to|of|and|that|have|with)\b", "xyz", PROSE),
    "max_lorem_ipsum": PROSE + " Lorem ipsum dolor sit amet.",
    "max_curly_brackets": PROSE + "\nif (x) {",
    "min_sentences": PROSE.replace(".", ",").replace("\n", " "),
    "min_punctuated_lines": PROSE.replace(".\n", "\n"),
    "max_short_lines": "\n".join([PROSE, *["A short line here"] * 25]),
    "max_repeated_line_chars": "\n".join([PROSE, LINES[3]]),
    "max_newlines_per_word": re.sub(r"(\S+ \S+ \S+) ", r"\1\n", PROSE),
}
OFF = RULE_SETS["none"]


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_drops_what_it_is_for(rule):
    alone = replace(OFF, **{rule: getattr(WEB_RULES, rule)})
    assert reason(BROKEN[rule], OFF) is None
    assert reason(BROKEN[rule], alone) == rule


def test_a_value_on_the_bound_passes():
    signals = judge(PROSE, WEB_RULES).signals
    for rule in RULES:
        assert reason(PROSE, replace(WEB_RULES, **{rule: signals[rule[4:]]})) is None


def test_the_first_broken_rule_is_the_reason_and_ends_the_measuring():
    verdict = judge(PROSE + "\nHome" * 9 + "{", WEB_RULES)
    assert verdict.reason == "max_duplicate_lines"
    assert "duplicate_line_chars" in verdict.signals
    assert "curly_brackets" not in verdict.signals


@pytest.mark.parametrize("text", ["", "\n\n", "…", "\u200b", "\ufeff" * 10, "́" * 1000])
def test_texts_without_words_are_dropped(text):
    assert reason(text) is not None


def test_a_negative_bound_is_refused():
    with pytest.raises(ConfigError, match="max_short_lines"):
        HeuristicRules(max_short_lines=-0.1)


def test_the_order_of_groups_changes_the_reason_and_nothing_else():
    text = "\n".join(["Home"] * 9)
    first = replace(WEB_RULES, repetition_first=True)
    assert (reason(text), reason(text, first)) == ("min_words", "max_duplicate_lines")
    assert judge(PROSE, first).signals == judge(PROSE, WEB_RULES).signals


def with_line(line: str) -> str:
    return "\n".join([*LINES[:6], line, *LINES[6:]])


@pytest.mark.parametrize(
    "line",
    [
        "Read more",
        "   ",
        "Please turn JavaScript on for this page.",
        "By going on you accept our Privacy Policy and the use of cookies.",
        "These are three words and a " + "very" * 300 + "long one.",
        "JavaScript needs { to begin a block.",
    ],
)
def test_lines_that_are_no_text_are_left_out(line):
    rules = replace(WEB_RULES, max_mean_word_chars=1000)
    verdict = judge(with_line(line), rules)
    assert (verdict.reason, verdict.text) == (None, PROSE)
    assert verdict.words.distinct == tokenize(PROSE).distinct
    assert judge(with_line(line), replace(rules, lines=LineRules(rewrite=False))).text == with_line(line)


@pytest.mark.parametrize("line", ["A heading without an end", "Then they went on and on ..."])
def test_lines_without_closing_punctuation_stay_but_in_c4(line):
    assert judge(with_line(line), WEB_RULES).text == with_line(line)
    assert judge(with_line(line), RULE_SETS["c4"]).text == PROSE


def test_marks_of_citations_are_cut_out():
    cited = PROSE.replace("May.", "May.[12]").replace("school.", "school[citation needed].")
    assert judge(cited, WEB_RULES).text == PROSE
    assert judge(cited, replace(WEB_RULES, lines=LineRules(citations=False))).text == cited


def test_the_earlier_of_placeholder_and_bracket_is_the_reason():
    placeholder, bracket = "Here is lorem ipsum again.", "And here { is another thing."
    assert reason(f"{PROSE}\n{placeholder}\n{bracket}") == "max_lorem_ipsum"
    assert reason(f"{PROSE}\n{bracket}\n{placeholder}") == "max_curly_brackets"


def test_what_is_not_rewritten_is_the_same_object():
    kept, dropped = judge(PROSE, WEB_RULES), judge(PROSE + "\n{ is no word", WEB_RULES)
    assert kept.text is PROSE and kept.words.text is PROSE
    assert dropped.reason == "max_curly_brackets" and dropped.text == dropped.words.text == PROSE + "\n{ is no word"


def test_what_is_left_out_is_not_judged_by_fineweb():
    menu = "\n".join([PROSE, *["Click here"] * 20])
    assert reason(menu, replace(OFF, max_short_lines=0.5)) is None
    assert reason(menu, replace(OFF, max_short_lines=0.5, lines=LineRules(min_words=1))) == "max_short_lines"


@pytest.mark.parametrize("name", RULE_SETS)
def test_every_set_measures_the_same_signals(name):
    text = PROSE.replace(".\n", ".\n\n")
    verdict = judge(text, RULE_SETS[name])
    assert verdict.reason is None
    assert verdict.signals == measure(text)
    assert tuple(sorted(verdict.signals)) == tuple(sorted(SIGNALS))


def test_nothing_is_dropped_without_rules():
    assert all(reason(text, OFF) is None for text in ["", "\n", *BROKEN.values()])


VERSE = "\n".join(f"  {line[:26]}" for line in LINES) + "\n  and {all} of it. And so on."


def test_verse_and_formulas_are_prose():
    assert reason(VERSE, WEB_RULES) is not None
    verdict = judge(VERSE, RULE_SETS["prose"])
    assert (verdict.reason, verdict.text) == (None, VERSE)


def test_a_rule_for_lines_is_checked():
    with pytest.raises(ConfigError, match="min_words"):
        LineRules(min_words=0)
