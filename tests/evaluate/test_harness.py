from __future__ import annotations

import json
import socket

import pytest

from danube_ray.artifacts import content_hash
from danube_ray.config import ConfigError
from danube_ray.data.tokenizer import Tokenizer
from danube_ray.evaluate.harness import evaluate_tasks, hugging_face_lm, multiple_choice_task
from danube_ray.inference.huggingface import HuggingFaceModel
from tests.tasks import arc_easy


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def by_metric(rows):
    return {row["metric"]: row for row in rows}


def test_scores_are_those_of_our_own_tokenizer_and_log_probs(shared_data, model_folder, tmp_path, no_network):
    file = arc_easy(shared_data, tmp_path / "arc.json", 40)
    rows = by_metric(evaluate_tasks(hugging_face_lm(model_folder), [multiple_choice_task("arc_easy", file)]))
    tokenizer, model = Tokenizer.load(model_folder), HuggingFaceModel(model_folder)
    right, right_by_byte = [], []
    for row in json.loads(file.read_text()):
        context = f"Question: {row['question']}\nAnswer:"
        start = len(tokenizer.encode(context))
        texts = [f"{context} {choice}" for choice in row["choices"]]
        scores = model.log_probs([[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts])
        sums = [float(score[start:].sum()) for score in scores]
        by_byte = [total / len(choice) for total, choice in zip(sums, row["choices"], strict=True)]
        right.append(sums.index(max(sums)) == row["answer"])
        right_by_byte.append(by_byte.index(max(by_byte)) == row["answer"])
    assert rows["acc"]["value"] == pytest.approx(sum(right) / 40)
    assert rows["acc_norm"]["value"] == pytest.approx(sum(right_by_byte) / 40)
    share = rows["acc"]["value"]
    assert rows["acc"]["stderr"] == pytest.approx((share * (1 - share) / 39) ** 0.5)
    assert rows["acc"]["n"] == 40
    assert rows["acc"]["lm_eval_version"].startswith("0.4")
    assert rows["acc"]["version"] == 1


def test_limit_and_few_shot_examples_change_the_prompts_and_their_hash(shared_data, model_folder, tmp_path, no_network):
    file = arc_easy(shared_data, tmp_path / "arc.json", 12)
    lm = hugging_face_lm(model_folder)
    plain = multiple_choice_task("arc_easy", file)
    runs = [
        evaluate_tasks(lm, [plain], limit=6),
        evaluate_tasks(lm, [plain], limit=6),
        evaluate_tasks(lm, [plain], limit=5),
        evaluate_tasks(lm, [multiple_choice_task("arc_easy", file, num_fewshot=2)], limit=6),
    ]
    assert [run[0]["n"] for run in runs] == [6, 6, 5, 6]
    assert [run[0]["num_fewshot"] for run in runs] == [0, 0, 0, 2]
    hashes = [run[0]["prompts_sha256"] for run in runs]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


def test_few_shot_prompts_and_scores_are_those_of_lm_evals_own_entry_point(shared_data, model_folder, tmp_path):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    task = multiple_choice_task("arc_easy", arc_easy(shared_data, tmp_path / "arc.json", 30), num_fewshot=2)
    lm = hugging_face_lm(model_folder)
    stock = simple_evaluate(lm, tasks=[task], limit=10, task_manager=TaskManager(include_defaults=False))
    rows = by_metric(evaluate_tasks(lm, [task], limit=10))
    prompts = [sample["arguments"] for sample in stock["samples"]["arc_easy"]]
    assert rows["acc"]["prompts_sha256"] == content_hash(prompts)
    assert rows["acc"]["value"] == stock["results"]["arc_easy"]["acc,none"]
    assert rows["acc_norm"]["stderr"] == stock["results"]["arc_easy"]["acc_norm_stderr,none"]


def test_several_tasks_from_json_lines(model_folder, tmp_path, no_network):
    row = {"question": "Which?", "choices": ["a river", "a sea"], "answer": 1}
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{json.dumps(row)}\n{json.dumps(row)}\n")
    rows = evaluate_tasks(hugging_face_lm(model_folder), [multiple_choice_task(name, file) for name in ("a", "b")])
    assert [(row["task"], row["metric"]) for row in rows] == [
        ("a", "acc"), ("a", "acc_norm"), ("b", "acc"), ("b", "acc_norm"),
    ]  # fmt: skip


GOOD = {"question": "Which?", "choices": ["one", "two"], "answer": 0}


@pytest.mark.parametrize(
    "row",
    [
        {**GOOD, "answer": 2},
        {**GOOD, "answer": "one"},
        {**GOOD, "choices": ["one"]},
        {**GOOD, "choices": ["one", 2]},
        {**GOOD, "question": None},
        {"question": "Which?"},
        "Which?",
    ],
    ids=str,
)
def test_a_row_that_can_not_be_asked_is_named(row, tmp_path):
    (tmp_path / "task.json").write_text(json.dumps([GOOD, row]))
    with pytest.raises(ConfigError, match=r"row 2 of .*task\.json"):
        multiple_choice_task("task", tmp_path / "task.json")


@pytest.mark.parametrize(("text", "problem"), [("", "at least one question"), ("{", "JSON"), ("[]", "at least one")])
def test_a_file_without_questions_is_named(text, problem, tmp_path):
    (tmp_path / "task.json").write_text(text)
    with pytest.raises(ConfigError, match=problem):
        multiple_choice_task("task", tmp_path / "task.json")


def test_a_missing_file_and_too_many_examples_are_named(tmp_path):
    with pytest.raises(ConfigError, match="an existing JSON file"):
        multiple_choice_task("task", tmp_path / "task.json")
    (tmp_path / "task.json").write_text(json.dumps([GOOD]))
    with pytest.raises(ConfigError, match="num_fewshot is 1"):
        multiple_choice_task("task", tmp_path / "task.json", num_fewshot=1)
