"""The control tells a model that learned quality from one that learned sources: shown on text where that is known."""

from __future__ import annotations

import math

import numpy as np

from danube_ray.curate.quality.control import control
from tests.curate.quality.corpus import TINY, text
from tests.curate.quality.made import passages_of

QUIRKS = {"a": ["alpha", "anchor"], "b": ["beta", "bridge"], "c": ["gamma", "garden"], "d": ["delta", "desert"]}


def sources(register: bool):
    """Two good and two raw sources; with `register` good ones share their words, without each has its quirks alone."""
    generator = np.random.default_rng(0)
    return {
        name: (
            good,
            [text(generator, good if register else True, quirk * 2, 0.1 if register else 0.0) for _ in range(60)],
        )
        for (name, quirk), good in zip(QUIRKS.items(), (True, True, False, False), strict=True)
    }


def mean_shuffled(found) -> tuple[float, float]:
    return tuple(np.mean([(row.documents, row.mean_left_out) for row in found.shuffled], axis=0))


def test_shared_quality_carries_over_to_unseen_sources_and_shuffled_labels_do_not():
    found = control(passages_of(sources(register=True), TINY), TINY)
    _, left_out = mean_shuffled(found)
    assert found.true.good == ("a", "b")
    assert found.true.documents > 0.95
    assert set(found.true.left_out) == set(QUIRKS)
    assert found.true.mean_left_out > 0.9
    assert {row.good for row in found.shuffled} == {("a", "c"), ("a", "d")}  # the other two are their mirror images
    assert left_out < found.true.mean_left_out - 0.2


def test_quirks_alone_reach_the_same_auc_on_documents_and_do_not_carry_over():
    found = control(passages_of(sources(register=False), TINY), TINY)
    documents, left_out = mean_shuffled(found)
    assert found.true.documents > 0.9  # as good as it looks
    assert documents > 0.9  # and so is any other set of names
    assert found.true.mean_left_out < left_out + 0.15


def test_a_source_that_is_alone_in_its_class_cannot_be_left_out():
    made = {name: rows for name, rows in sources(register=True).items() if name in ("a", "c")}
    found = control(passages_of(made, TINY), TINY)
    assert (found.true.left_out, found.shuffled) == ({}, ())
    assert math.isnan(found.true.mean_left_out)
