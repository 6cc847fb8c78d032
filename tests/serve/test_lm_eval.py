"""lm-eval through HTTP against lm-eval in this process: the same weights give the same scores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from danube_ray.config import ServedModel
from danube_ray.data.tokenizer import Tokenizer
from danube_ray.evaluate.gguf import language_model_lm
from danube_ray.evaluate.harness import evaluate_tasks, hugging_face_lm, multiple_choice_task
from danube_ray.inference.gguf import GgufModel
from danube_ray.quantize.gguf import convert
from danube_ray.serve.gate import create_app
from danube_ray.serve.llamacpp_engine import LlamaCppEngine
from danube_ray.serve.models import entry_of
from tests.models import tiny_model
from tests.serve.conftest import live
from tests.tasks import arc_easy

CONTEXT_TOKENS = 1024


@dataclass(frozen=True)
class Served:
    """A model of 32-bit weights: its folder, its file, and where it is served."""

    folder: Path
    gguf: Path
    url: str


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tiny_model(tmp_path_factory.mktemp("exact"), context_length=CONTEXT_TOKENS)
    gguf = folder / "model.gguf"
    convert(folder, gguf, "F32")
    entry = entry_of(ServedModel(weights=gguf))
    engine = LlamaCppEngine(gguf, CONTEXT_TOKENS, num_slots=4, num_threads=1)
    with live(create_app({"exact": entry}, lambda _: engine)) as url:
        yield Served(folder, gguf, url)
    engine.close()


def served_lm(served: Served, **options: Any) -> Any:
    """lm-eval's own client, as `lm_eval --model local-completions --model_args ...` makes it."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    return LocalCompletionsAPI(
        model="exact",
        base_url=f"{served.url}/v1/completions",
        tokenizer_backend="huggingface",
        tokenizer=str(served.folder),
        max_length=CONTEXT_TOKENS,
        max_retries=1,
        **options,
    )


WAYS: dict[str, dict[str, Any]] = {
    "ids": {"tokenized_requests": True, "add_bos_token": True},
    "ids, several at once": {"tokenized_requests": True, "add_bos_token": True, "batch_size": 8, "num_concurrent": 2},
    "text": {"tokenized_requests": False},
}


def same_scores(served: Served, file: Path, ways: dict[str, dict[str, Any]]) -> None:
    tasks = [multiple_choice_task("arc_easy", file)]
    with GgufModel(served.gguf) as model:
        here = evaluate_tasks(language_model_lm(model, Tokenizer.load(served.folder)), tasks)
    by_transformers = evaluate_tasks(hugging_face_lm(served.folder), tasks)
    scores = {row["metric"]: row["value"] for row in here}
    assert scores == {row["metric"]: row["value"] for row in by_transformers}
    for name, way in ways.items():
        through_http = evaluate_tasks(served_lm(served, **way), tasks)
        assert {row["metric"]: row["value"] for row in through_http} == scores, name
        assert [row["prompts_sha256"] for row in through_http] == [row["prompts_sha256"] for row in here]


def test_scores_through_http_are_those_of_the_same_model_here(exact: Served, shared_data: Path, tmp_path: Path):
    same_scores(exact, arc_easy(shared_data, tmp_path / "arc.json", 16), WAYS)


@pytest.mark.slow
def test_200_questions_through_http_are_scored_as_here(exact: Served, shared_data: Path, tmp_path: Path):
    same_scores(exact, arc_easy(shared_data, tmp_path / "arc.json", 200), WAYS)


def test_log_likelihoods_are_the_same_to_the_token(exact: Served):
    """Accuracy could be equal by luck; sums and greedy marks could not."""
    from lm_eval.api.instance import Instance

    pairs = [("The Danube rises in", " the Black Forest."), ("Fluß:", " die Donau 🛶"), ("A", " B")]
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    expected = hugging_face_lm(exact.folder).loglikelihood(requests)
    for way in WAYS.values():
        found = served_lm(exact, **way).loglikelihood(requests)
        assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=5e-2)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_answers_are_generated_too(exact: Served):
    from lm_eval.api.instance import Instance

    wish = {"until": ["\n\n"], "max_gen_toks": 12, "temperature": 0}
    requests = [Instance("generate_until", {}, ("The Danube rises in", wish), 0)]
    by_ids, by_text = (served_lm(exact, **WAYS[way]).generate_until(requests) for way in ("ids", "text"))
    assert by_ids == by_text and by_ids[0]
