from __future__ import annotations

import json

import pytest
import ray

from danube_ray.config import ConfigError
from danube_ray.evaluate.harness import evaluate_tasks, hugging_face_lm, multiple_choice_task
from danube_ray.runtime.evaluation import evaluate
from tests.models import tiny_model
from tests.tasks import arc_easy
from tests.waiting import wait_for


@pytest.mark.ray
def test_requests_spread_over_workers_give_the_stock_runs_prompts_and_scores(ray_session, shared_data, tmp_path):
    folder = tiny_model(tmp_path / "model", context_length=1024)
    file = arc_easy(shared_data, tmp_path / "arc.json", 40)
    tasks = [multiple_choice_task("plain", file), multiple_choice_task("shots", file, num_fewshot=2)]
    found = evaluate(folder, tasks, tmp_path / "results.json", num_workers=2, limit=15)
    assert found == evaluate_tasks(hugging_face_lm(folder), tasks, limit=15)
    assert json.loads((tmp_path / "results.json").read_text()) == found
    wait_for(lambda: ray.available_resources().get("CPU") == 4)  # its workers have gone


def test_a_missing_model_is_named_before_workers_start(tmp_path):
    with pytest.raises(ConfigError, match="model folder"):
        evaluate(tmp_path, [], tmp_path / "results.json")
