"""A GGUF file scored by lm-eval: the same as lm-eval's own transformers model, and as our own arithmetic."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from danube_ray.data.tokenizer import Tokenizer
from danube_ray.evaluate.gguf import answer, continuation_score, language_model_lm
from danube_ray.evaluate.harness import evaluate_tasks, hugging_face_lm, multiple_choice_task
from danube_ray.inference.gguf import GgufModel
from danube_ray.inference.huggingface import HuggingFaceModel
from tests.tasks import arc_easy


@pytest.fixture(scope="session")
def gguf_file(model_folder, tmp_path_factory) -> Path:
    from danube_ray.quantize.gguf import convert

    file = tmp_path_factory.mktemp("gguf") / "F32.gguf"
    convert(model_folder, file, "F32")
    return file


def test_scores_are_those_of_lm_evals_own_model(shared_data, model_folder, gguf_file, tmp_path):
    task = multiple_choice_task("arc_easy", arc_easy(shared_data, tmp_path / "arc.json", 30), num_fewshot=1)
    tokenizer = Tokenizer.load(model_folder)
    stock = evaluate_tasks(hugging_face_lm(model_folder), [task], per_document=True)
    with GgufModel(gguf_file) as model:
        ours = evaluate_tasks(language_model_lm(model, tokenizer), [task], per_document=True)
    same = evaluate_tasks(language_model_lm(HuggingFaceModel(model_folder), tokenizer), [task], per_document=True)
    assert stock == ours == same
    assert len(ours[0]["values"]) == 30 and np.mean(ours[0]["values"]) == pytest.approx(ours[0]["value"])


def requests(*arguments):
    return [SimpleNamespace(args=each) for each in arguments]


def test_log_likelihoods_are_those_of_lm_evals_own_model(model_folder, gguf_file):
    pairs = requests(
        ("The river", " rises in the"), ("", "Black Forest"), ("Question: ", "a sea"), ("a " * 2_000, "b c")
    )
    texts = requests(("A river carries water, sand and stories from the mountains down to the plain. " * 60,))
    stock = hugging_face_lm(model_folder)
    with GgufModel(gguf_file) as model:
        lm = language_model_lm(model, Tokenizer.load(model_folder))
        for mine, theirs in zip(lm.loglikelihood(pairs), stock.loglikelihood(pairs, disable_tqdm=True), strict=True):
            assert mine[0] == pytest.approx(theirs[0], abs=0.02) and mine[1] == theirs[1]
        assert lm.loglikelihood_rolling(texts)[0] == pytest.approx(
            stock.loglikelihood_rolling(texts, disable_tqdm=True)[0], rel=1e-3
        )


def test_a_continuation_is_greedy_where_the_model_would_say_it(model_folder, gguf_file):
    with GgufModel(gguf_file) as model:
        said = model.generate([1, 40, 50], max_tokens=3)
        score, greedy = continuation_score(model, [1, 40, 50], said)
        assert greedy and score == pytest.approx(float(model.log_probs([[1, 40, 50, *said]])[0][2:].sum()), abs=1e-3)
        assert not continuation_score(model, [1, 40, 50], [said[0], (said[1] + 1) % 512])[1]


def test_an_answer_ends_where_the_task_says(model_folder, gguf_file):
    tokenizer = Tokenizer.load(model_folder)
    with GgufModel(gguf_file) as model:
        prompt = [1, *tokenizer.encode("The Danube")]
        whole = answer(model, tokenizer, prompt, {"max_gen_toks": 24, "until": []})
        assert whole == tokenizer.decode(model.generate(prompt, 24))
        end = whole[len(whole) // 2 :][:3]
        assert (
            answer(model, tokenizer, prompt, {"max_gen_toks": 24, "until": ["absent", end]}) == whole[: whole.find(end)]
        )
        lm = language_model_lm(model, tokenizer)
        assert lm.generate_until(requests(("The Danube", {"max_gen_toks": 24, "until": end}))) == [
            whole[: whole.find(end)]
        ]
