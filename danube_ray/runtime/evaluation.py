"""lm-eval with its requests spread over Ray actors, each holding the model.

Requests are spread, not questions: lm-eval draws few-shot examples for one question after the other, so workers that
took questions of their own would ask other prompts than the stock run. Here the driver makes all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.util import ActorPool

from danube_ray.artifacts import write_json
from danube_ray.config import require
from danube_ray.evaluate.harness import evaluate_tasks, hugging_face_lm
from danube_ray.runtime.session import session

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM

PARTS_PER_WORKER = 4  # so that a worker with long requests does not keep the others waiting at the end


def evaluate(
    model_folder: Path,
    tasks: Sequence[dict[str, Any]],
    results_file: Path,
    *,
    num_workers: int = 1,
    cpus_per_worker: int = 1,
    gpus_per_worker: float = 0,
    batch_size: int = 8,
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """Evaluate a Hugging Face folder on lm-eval tasks; rows as `evaluate_tasks` gives them, also in `results_file`."""
    require(num_workers > 0, "num_workers", num_workers, "at least 1")
    folder = model_folder.resolve()
    require((folder / "config.json").is_file(), "model folder", str(folder), "a folder with config.json")
    device = "cuda" if gpus_per_worker else "cpu"
    with session():
        actor = ray.remote(num_cpus=cpus_per_worker, num_gpus=gpus_per_worker, max_restarts=2, max_task_retries=2)
        workers: list[Any] = [actor(Scorer).remote(folder, device, batch_size) for _ in range(num_workers)]
        try:
            rows = evaluate_tasks(spread_over(workers), tasks, limit)
        finally:
            for worker in workers:  # lm-eval keeps what it was given: by themselves they would hold their CPUs for long
                ray.kill(worker)
    write_json(results_file, rows)
    return rows


class Scorer:
    """One model in one process."""

    def __init__(self, model_folder: Path, device: str, batch_size: int) -> None:
        self.model = hugging_face_lm(model_folder, device=device, batch_size=batch_size)

    def answer(self, kind: str, requests: list[Instance]) -> list[Any]:
        """lm-eval's answers to requests of one kind ("loglikelihood", ...)."""
        return getattr(self.model, kind)(requests, disable_tqdm=True)


def spread_over(workers: Sequence[Any]) -> LM:
    """An lm-eval model that hands its requests to `Scorer` actors."""
    from lm_eval.api.model import LM  # a second of imports: paid by who evaluates

    class SpreadModel(LM):
        def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
            return self._spread("loglikelihood", requests)

        def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
            return self._spread("loglikelihood_rolling", requests)

        def generate_until(self, requests: list[Instance]) -> list[str]:
            return self._spread("generate_until", requests)

        def _spread(self, kind: str, requests: list[Instance]) -> list[Any]:
            """Parts of like size, longest first within each, to whichever worker is free; answers in order."""
            order = sorted(
                range(len(requests)), key=lambda index: -sum(len(str(part)) for part in requests[index].args)
            )
            num_parts = min(len(order), PARTS_PER_WORKER * len(workers))
            parts = [order[start::num_parts] for start in range(num_parts)]
            pool = ActorPool(list(workers))
            found = pool.map(lambda worker, part: worker.answer.remote(kind, [requests[i] for i in part]), parts)
            answers: list[Any] = [None] * len(requests)
            for part, part_answers in zip(parts, found, strict=True):
                for index, answer in zip(part, part_answers, strict=True):
                    answers[index] = answer
            return answers

    return SpreadModel()
