from __future__ import annotations

import numpy as np
import pytest

from danube_ray.config import ConfigError
from danube_ray.data.tokenizer import Tokenizer
from danube_ray.inference.gguf import GgufModel
from danube_ray.quantize.divergence import score, summarize
from danube_ray.quantize.gguf import convert
from danube_ray.quantize.long_context import NUM_WORDS, Needle, compare_far, long_context, spans, ten_words
from danube_ray.quantize.measure import reference_logits

TOKENS = np.random.default_rng(0).integers(3, 512, 700).astype(np.uint16)
CONTEXT = 256


@pytest.fixture
def check(model_folder):
    return long_context(TOKENS, CONTEXT, Tokenizer.load(model_folder))


def test_spans_double_and_cover_the_context():
    assert spans(8192) == [(0, 512), (512, 1024), (1024, 2048), (2048, 4096), (4096, 8192)]
    assert [end - start for start, end in spans(4096)][1:] == [256, 512, 1024, 2048]


def test_prompts_hold_their_words_at_the_depth_they_say(check, model_folder):
    tokenizer = Tokenizer.load(model_folder)
    assert len(check.needles) == 18
    assert {(needle.length, needle.depth) for needle in check.needles} == {
        (length, depth) for length in (64, 128, 256) for depth in (0.0, 0.5, 1.0)
    }
    for needle in check.needles:
        words, ids = needle.labels.tolist(), needle.ids.tolist()
        assert len(ids) == needle.length
        assert ids[-NUM_WORDS:] == words and set(words) <= set(needle.choices.tolist()) and len(set(words)) == NUM_WORDS
        first = next(at for at in range(len(ids)) if ids[at : at + NUM_WORDS] == words)
        question = len(tokenizer.encode("The secret words are"))
        assert (first - question) / (needle.length - 2 * (question + NUM_WORDS)) == pytest.approx(
            needle.depth, abs=0.02
        )


def test_a_word_is_found_where_it_is_the_likeliest_of_the_ten():
    choices = np.arange(10, 20)
    needle = Needle(np.array([1, 10, 11, 12]), np.array([0, 1, 2]), length=4, depth=0.0, choices=choices)
    logits = np.zeros((3, 30), np.float32)
    logits[:, 25] = 9  # likelier than all, and no choice
    logits[0, 10] = logits[1, 11] = logits[2, 19] = 1
    assert needle.found(logits) == 2


def test_divergence_by_position_is_that_of_the_rows_in_each_span(check, model_folder, tmp_path):
    convert(model_folder, tmp_path / "Q4_0.gguf", "Q4_0")
    reference = list(reference_logits(model_folder, check.passages))
    with GgufModel(tmp_path / "Q4_0.gguf") as model:
        found = compare_far(model, check, reference)
        scored = [score(reference[i], text.logits(model), text.labels) for i, text in enumerate(check.windows)]
    rows = check.windows[0].rows
    assert len(check.windows) == 2 and rows[-1] == CONTEXT - 2
    assert [(span["start"], span["end"]) for span in found["by_position"]] == spans(CONTEXT)
    for span in found["by_position"]:
        part = summarize([window.at((rows >= span["start"]) & (rows < span["end"])) for window in scored])
        assert span["kld_mean"] == pytest.approx(part.kld_mean, rel=1e-3) and span["kld_mean"] > 0
        assert span["same_top"] == pytest.approx(part.same_top, abs=0.05)
    assert len(found["retrieval"]) == 9
    assert found["found"] == pytest.approx(np.mean([cell["found"] for cell in found["retrieval"]]))
    assert found["reference_found"] == pytest.approx(np.mean([cell["reference_found"] for cell in found["retrieval"]]))


def test_words_are_single_pieces_of_letters(model_folder):
    tokenizer = Tokenizer.load(model_folder)
    words = [tokenizer.pieces[index] for index in ten_words(tokenizer)]
    assert len(set(words)) == 10 and all(word[1:].isalpha() for word in words)


def test_a_text_shorter_than_the_context_is_refused(model_folder):
    with pytest.raises(ConfigError, match="tokens of the long-context check is 255, allowed is at least 256"):
        long_context(TOKENS[:255], CONTEXT, Tokenizer.load(model_folder))
    with pytest.raises(ConfigError, match="at least 128"):
        long_context(TOKENS, 64, Tokenizer.load(model_folder))
