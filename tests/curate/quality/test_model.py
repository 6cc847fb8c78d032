"""The gradient-boosted model: what it learns, what a folder keeps of it, and what it refuses."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from danube_ray.artifacts import ArtifactError, commit
from danube_ray.config import NO_RULES, ConfigError
from danube_ray.curate.heuristics import judge
from danube_ray.curate.quality import QualityModel, QualitySettings
from danube_ray.curate.quality.fitting import calibrate_encoder, fit, for_encoder, log_odds, measure, some_of_each
from danube_ray.curate.quality.gbm import FEATURES, class_weights, out_of_fold_scores
from danube_ray.curate.quality.linear import buckets, train
from danube_ray.curate.quality.metrics import auc
from danube_ray.curate.words import tokenize
from tests.curate.quality.corpus import TINY, TINY_ENCODER, text
from tests.curate.quality.made import passages_of

SETTINGS = dataclasses.replace(TINY, encoder=TINY_ENCODER)  # so that a band is chosen


@pytest.fixture(scope="module")
def passages():
    generator = np.random.default_rng(0)
    made = {name: [text(generator, name == "good", register=0.06) for _ in range(150)] for name in ("good", "raw")}
    return passages_of({name: (name == "good", rows) for name, rows in made.items()}, SETTINGS)


@pytest.fixture(scope="module")
def model(passages):
    return fit(passages, SETTINGS)


def test_held_out_documents_are_told_apart_and_probabilities_mean_something(model, passages):
    facts = measure(model, None, passages, SETTINGS)
    found = facts["models"]["gbm"]
    assert found["auc"] > 0.95
    assert found["auc_low"] <= found["auc"] <= found["auc_high"]
    assert found["precision"] > 0.85
    assert found["recall"] > 0.85
    assert 0.05 < facts["sent_to_encoder"]["of_raw"] < 0.5
    assert all(speed > 0 for speed in facts["documents_per_s"].values())


class Oracle:
    """In an encoder's place: log-odds that say of each text what they are told to."""

    def __init__(self, says: dict[str, float]) -> None:
        self.says = says

    def log_odds(self, texts: list[str]) -> np.ndarray:
        return np.array([self.says[text] for text in texts])


def test_an_encoder_is_asked_only_where_it_knows_better_than_the_trees(model, passages):
    truth = {text: 4.0 if good else -4.0 for text, good in zip(passages.texts, passages.good, strict=True)}
    guesses = dict(zip(truth, np.random.default_rng(1).normal(size=len(truth)), strict=True))
    knows, guesser = Oracle(truth), Oracle(guesses)
    assert calibrate_encoder(model, knows, passages, SETTINGS).band == model.band
    asked_nowhere = calibrate_encoder(model, guesser, passages, SETTINGS)
    assert not asked_nowhere.has_encoder and not asked_nowhere.uncertain(np.array([0.5])).any()
    assert calibrate_encoder(
        model, guesser, passages, dataclasses.replace(SETTINGS, always_ask_encoder=True)
    ).has_encoder


def test_score_is_of_words_and_signals_in_the_order_asked(model):
    generator = np.random.default_rng(9)
    texts = [text(generator, good) for good in (True, False, True)]
    rows = [(verdict.words, verdict.signals) for verdict in (judge(row, NO_RULES) for row in texts)]
    scores = model.score(rows)
    assert scores.dtype == np.float64
    assert scores[0] > 0.9 and scores[2] > 0.9 and scores[1] < 0.1
    assert model.score(rows[::-1]).tolist() == scores[::-1].tolist()
    assert model.score([]).shape == (0,)
    assert model.score([(tokenize(""), {})]).shape == (1,)  # no word, no signal: unknown, not an error
    assert model.uncertain(np.array([0.0, 0.5, 1.0])).tolist() == [False, True, False]


def test_a_folder_keeps_the_scores_and_a_changed_one_is_refused(model, passages, tmp_path):
    def saved(name: str, kept: QualityModel) -> QualityModel:
        kept.save(tmp_path / name)
        commit(tmp_path / name)
        return QualityModel.load(tmp_path / name)

    loaded = saved("one", model)
    assert log_odds(loaded, passages).tolist() == log_odds(model, passages).tolist()
    assert (loaded.platt, loaded.band, loaded.has_encoder) == (model.platt, model.band, False)
    assert saved("two", model).sha256 == loaded.sha256
    moved = dataclasses.replace(model, band=dataclasses.replace(model.band, low=0.4))
    assert saved("three", moved).sha256 != loaded.sha256
    (tmp_path / "one" / "card.md").write_text("a card says nothing of the scores")
    commit(tmp_path / "one")
    assert QualityModel.load(tmp_path / "one").sha256 == loaded.sha256
    (tmp_path / "two" / "gbm.txt").write_text("")
    with pytest.raises(ArtifactError, match="gbm.txt is not the file.*danube quality train"):
        QualityModel.load(tmp_path / "two")
    with pytest.raises(ArtifactError, match="danube quality train"):
        QualityModel.load(tmp_path / "nowhere")


def test_the_same_passages_give_the_same_files(model, passages, tmp_path):
    model.save(tmp_path / "one")
    fit(passages, SETTINGS).save(tmp_path / "two")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_trees_are_shown_linear_scores_of_documents_that_were_not_trained_on(passages):
    """In its own training texts the linear model sees what it learned by heart; out of fold it must not."""
    noise = np.random.default_rng(4).random(len(passages)) < 0.5  # labels that nothing in the texts explains
    weights = class_weights(noise)
    seen = train(passages.buckets, noise, weights, SETTINGS.num_buckets, seed=1)
    assert auc(np.array([seen.score(row) for row in passages.buckets]), noise) > 0.95
    unseen = out_of_fold_scores(passages.buckets, noise, weights, passages.document, SETTINGS)
    assert abs(auc(unseen, noise) - 0.5) < 0.1


def test_length_is_no_feature_and_no_part_of_the_linear_score(model):
    assert not {"words", "sentences", "stop_words"} & set(FEATURES)
    once = buckets(tokenize("the river was measured and described"), model.num_buckets)
    assert model.linear.score(np.tile(once, 50)) == pytest.approx(model.linear.score(once), abs=1e-6)


def test_the_encoder_gets_at_most_four_times_as_many_of_one_class(passages):
    good = np.flatnonzero(passages.good)
    few = passages.select(np.concatenate((good, np.flatnonzero(~passages.good)[:10])))
    chosen = for_encoder(few, most=1_000)
    assert (chosen.good.sum(), (~chosen.good).sum()) == (40, 10)
    assert len(some_of_each(passages, 7)) == 14
    assert len(for_encoder(passages, most=20)) == 40


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"held_out_share": 0.5}, "QualitySettings.held_out_share is 0.5, allowed is above 0, at most 0.4"),
        ({"num_buckets": 1000}, "QualitySettings.num_buckets is 1000, allowed is a power of 2"),
        ({"encoder_share": 1.5}, "QualitySettings.encoder_share is 1.5, allowed is between 0 and 1"),
    ],
)
def test_settings_say_what_is_wrong(change, message):
    with pytest.raises(ConfigError, match=message):
        QualitySettings(**change)
