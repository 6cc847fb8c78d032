"""The card says what was measured, and what it doesn't mean."""

from __future__ import annotations

import math

import pytest

from danube_ray.artifacts import ArtifactError
from danube_ray.curate.quality.card import read_card, write_card

MEASURED = {
    "auc": 0.9876, "auc_low": 0.98, "auc_high": 0.99, "auc_passing": math.nan, "precision": 0.91, "recall": 0.82,
    "raw_kept": 0.08, "reliability": [(0.05, 0.1, 100), (0.95, 0.9, 1)],
}  # fmt: skip
ROW = {"read": 1_200, "documents": 1_000, "passages": 900, "training": 540, "calibration": 180, "held-out": 180}


def labeling(documents: float, **left_out: float) -> dict:
    return {"good": ["wiki", "books"], "documents": documents, "left_out": left_out}


def facts(true: dict, *shuffled: dict) -> dict:
    return {
        "sources": {"wiki": True, "books": True, "web": False},
        "models": {"gbm": MEASURED, "encoder": MEASURED, "cascade": MEASURED},
        "sent_to_encoder": {"of_raw": 0.2, "of_good": 0.05},
        "documents_per_s": {"rules": 2_000.0, "trees": 80_000.0},
        "max_logit_difference": 0.0123,
        "threshold": 0.5,
        "band": {"low": 0.3, "high": 0.7},
        "control": {"true": true, "shuffled": list(shuffled)},
        "data": {name: {**ROW, "passes": 0.5} for name in ("wiki", "books", "web")},
        "features": ["mean_word_chars"],
        "gain": {"linear": 0.75},
        "seed": 1,
    }


def card(folder, *labelings: dict) -> str:
    write_card(folder, facts(*labelings))
    assert (folder / "calibration.png").stat().st_size > 5_000
    return read_card(folder)


def test_both_aucs_stand_together_with_what_they_mean(tmp_path):
    text = card(tmp_path, labeling(0.99, wiki=0.9, books=0.8), labeling(0.985, wiki=0.6, web=0.5))
    assert "| gradient-boosted trees | 0.9876 | 0.9800 to 0.9900 | nan | 0.910 | 0.820 | 0.080 |" in text
    assert "| true | wiki, books | 0.9900 | 0.850 | wiki 0.900, books 0.800 |" in text
    assert "no evidence that quality was learned" in text
    assert "reach 0.850, shuffled ones 0.550: some of what was learned carries over" in text
    assert "20.0% of held-out raw and 5.0% of good" in text
    assert "no lower than the trees' alone" in text
    assert "| web | raw | 1,200 | 1,000 | 900 | 540 | 180 | 180 | 50% |" in text
    assert "not say what their labels were" in text
    assert "calibration.png" in text


@pytest.mark.parametrize(
    ("labelings", "said"),
    [
        ((labeling(0.99, wiki=0.6), labeling(0.7, wiki=0.6)), "no better than arbitrary labels"),
        ((labeling(0.99, wiki=0.9), labeling(0.7, wiki=0.6)), "not the difference"),
        ((labeling(0.99), labeling(0.99, wiki=0.6)), "there is none to leave out"),
        ((labeling(0.99),), "too few sources to shuffle"),
    ],
)
def test_the_verdict_follows_from_the_control(tmp_path, labelings, said):
    assert said in card(tmp_path, *labelings)


def test_an_encoder_that_does_not_help_is_called_so(tmp_path):
    found = facts(labeling(0.99))
    found["models"]["cascade"] = {**MEASURED, "auc": 0.9}
    write_card(tmp_path, found)
    assert "here it does not help" in read_card(tmp_path)
    found["band"] = {"low": 1.0, "high": 0.0}
    write_card(tmp_path, found)
    assert "The encoder is asked nowhere" in read_card(tmp_path)


def test_the_same_facts_give_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        card(tmp_path / name, labeling(0.9, wiki=0.6))
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_a_folder_without_a_card_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"card.json does not exist"):
        read_card(tmp_path)
