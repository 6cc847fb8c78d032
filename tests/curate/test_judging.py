"""The judges in their order: which one objects first, what they rewrite, and what is measured until then."""

from __future__ import annotations

import json

import numpy as np
import pytest

from danube_ray.config import RULE_SETS, SIGNALS, ConfigError, CurationConfig
from danube_ray.curate.decontaminate import BenchmarkIndex
from danube_ray.curate.judging import Judge, Judged, Judging, judge_for
from danube_ray.curate.quality import QualityModel
from danube_ray.curate.quality.calibration import Band, Platt
from danube_ray.curate.records import Document
from danube_ray.curate.tables import OTHER_SIGNALS
from tests.curate.test_heuristics import PROSE

QUESTION = "A lighthouse keeper climbs forty two steps every morning and again each night; how many steps in a week?"
CODE = (
    "def area(self, width, height):\n    return width * height\n\nfor name in sorted(self.names):\n    print(name)\n"
    * 5
)
GERMAN = "Der Leuchtturm steht seit mehr als hundert Jahren an der Küste, und sein Wärter kennt jedes Schiff. " * 6


def judged(text: str, url: str = "https://example.org/page", index: BenchmarkIndex | None = None, **settings) -> Judged:
    chosen = CurationConfig(**settings)
    [one] = Judge(chosen, chosen.rules_of("web"), index)([Document(text, url)])
    return one


def test_a_good_document_passes_all_judges_with_every_signal():
    one = judged(PROSE)
    assert (one.text, one.reason, one.language, one.quality, one.masked) == (PROSE, None, "en", None, {})
    assert set(one.signals) == {*SIGNALS, *OTHER_SIGNALS}
    assert one.words is not None and one.words.text == PROSE


def test_each_judge_names_its_reason(tmp_path):
    urls, words = tmp_path / "urls", tmp_path / "words"
    urls.write_text("# farms\nexample.org\n")
    words.write_text("harbour light\n")
    benchmark = tmp_path / "riddles.jsonl"
    benchmark.write_text(json.dumps({"question": QUESTION}))
    index = BenchmarkIndex.build({"riddles": benchmark})

    assert judged(PROSE, blocked_urls=(urls,)).reason == "blocked_url"
    assert judged(PROSE, "https://example.com", blocked_urls=(urls,)).reason is None
    assert judged(GERMAN).reason == "language"
    assert judged(GERMAN, languages=("de", "en"), rule_sets={"web": "none"}).reason is None
    assert judged(CODE, languages=(), rule_sets={"web": "none"}).reason == "max_code_share"
    assert judged(CODE, languages=(), rule_sets={"web": "none"}, max_code_share=1).reason is None
    assert judged(f"{PROSE} A Harbour Light.", blocked_words=(words,)).reason == "blocked_word"
    found = judged(f"{PROSE} {QUESTION}", index=index)
    assert found.reason == "contaminated"
    [item] = found.found
    assert (item.match.benchmark, item.match.item, item.question) == ("riddles", 0, QUESTION)
    assert "forty two steps" in item.evidence
    assert judged(PROSE, index=index).reason is None


def test_personal_data_is_masked_and_the_words_follow_the_text():
    one = judged(f"{PROSE} Write to keeper@lighthouse.net or to 93.184.216.34.")
    assert one.masked == {"email": 1, "ip": 1}
    assert "keeper@" not in one.text and "93.184" not in one.text
    assert one.words is not None and one.words.text == one.text
    assert judged(f"{PROSE} Write to keeper@lighthouse.net.", mask=()).masked == {}


class Marked(QualityModel):
    """Whose score is a text's last word, in hundredths."""

    def score(self, rows) -> np.ndarray:
        return np.array([int(words.text.split()[-1]) / 100 for words, _ in rows])


@pytest.mark.parametrize(("encoder", "unsure"), [(None, "min_quality"), (Platt(1, 0), None)])
def test_what_passed_is_scored_and_dropped_for_a_score_that_stays(monkeypatch, tmp_path, encoder, unsure):
    model = Marked(None, None, Platt(1, 0), Band(0.4, 0.6), 0.5, encoder)  # type: ignore[arg-type]
    monkeypatch.setattr(QualityModel, "load", lambda _: model)
    settings = CurationConfig(min_quality=0.5, quality_model=tmp_path)
    texts = [f"{PROSE} 90", GERMAN, f"{PROSE} 10", f"{PROSE} 45", f"{PROSE} 50"]
    found = Judge(settings, settings.rules_of("web"), None)([Document(text, "") for text in texts])
    assert [one.reason for one in found] == [None, "language", "min_quality", unsure, None]
    assert [one.quality for one in found] == [0.9, None, 0.1, 0.45, 0.5]
    assert [one.text for one in found] == texts


def test_a_process_makes_a_judge_once_for_equal_inputs():
    settings = CurationConfig(rule_sets={"books": "prose"})
    web = judge_for(Judging("a", settings), "web")
    assert judge_for(Judging("a", settings), "web") is web
    assert judge_for(Judging("b", settings), "web") is not web
    assert judge_for(Judging("a", settings), "books").rules == RULE_SETS["prose"]


def test_a_set_of_rules_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="rule_sets is .*bookish.*, allowed is by source one of"):
        CurationConfig(rule_sets={"books": "bookish"})
