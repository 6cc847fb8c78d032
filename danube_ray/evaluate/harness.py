"""EleutherAI's lm-eval on local files, with no network: tasks from JSON, a Hugging Face folder as the model.

lm-eval is imported inside functions: it takes seconds, and the hub must be switched off before it loads.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danube_ray.artifacts import content_hash, file_hash
from danube_ray.config import ConfigError, require

if TYPE_CHECKING:
    from lm_eval.api.model import LM

TASK_VERSION = 1  # of the prompt below: another prompt gives another score, so it is recorded with each result
FEWSHOT_SEED = 1234  # lm-eval's own default: which examples are shown before a question
QUESTION = "Question: {{question}}\nAnswer:"


def multiple_choice_task(name: str, file: Path, *, num_fewshot: int = 0) -> dict[str, Any]:
    """An lm-eval task from rows {"question": str, "choices": [str, ...], "answer": index}, as JSON list or JSON lines.

    The choice with the highest log-likelihood after the question is the model's (`acc`; `acc_norm` divides it by the
    choice's bytes). Few-shot examples come from the same file, never the question itself.
    """
    rows = _read_questions(file)
    require(num_fewshot < len(rows), "num_fewshot", num_fewshot, f"less than the {len(rows)} questions of {file}")

    def load(**_: Any) -> Any:
        from datasets import Dataset, DatasetDict

        return DatasetDict({"test": Dataset.from_list(rows)})

    return {
        "task": name,
        "custom_dataset": load,
        "output_type": "multiple_choice",
        "test_split": "test",
        "fewshot_split": "test",
        "num_fewshot": num_fewshot,
        "doc_to_text": QUESTION,
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
        ],
        "metadata": {"version": TASK_VERSION, "sha256": file_hash(file)},
    }


def _read_questions(file: Path) -> list[dict[str, Any]]:
    """Rows of a task file. A row that can't be asked is an error, not a skip: leaving it out would move the score."""
    require(file.is_file(), "task file", str(file), "an existing JSON file")
    text = file.read_text()
    try:
        rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    except json.JSONDecodeError as error:
        raise ConfigError("task file", str(file), "a JSON list or JSON lines", str(error)) from None
    require(bool(rows), "task file", str(file), "at least one question")
    for number, row in enumerate(rows, start=1):
        match row:
            case {"question": str(), "choices": [_, _, *_] as choices, "answer": int(answer)} if 0 <= answer < len(
                choices
            ) and all(isinstance(choice, str) for choice in choices):
                continue
        allowed = 'a "question", a list "choices" of two or more texts, and the index "answer" of the right one'
        raise ConfigError(f"row {number} of {file}", row, allowed)
    return [{key: row[key] for key in ("question", "choices", "answer")} for row in rows]


def hugging_face_lm(model_folder: Path, *, device: str = "cpu", batch_size: int = 8) -> LM:
    """lm-eval's own transformers model over a local folder, in float32: the stock scores, nothing of ours between."""
    require((model_folder / "config.json").is_file(), "model folder", str(model_folder), "a folder with config.json")
    go_offline()
    from lm_eval.models.huggingface import HFLM

    model: Any = HFLM  # its decorators hide its signature from type checkers
    return model(str(model_folder), device=device, dtype="float32", batch_size=batch_size, trust_remote_code=False)


def evaluate_tasks(
    lm: LM, tasks: Sequence[dict[str, Any]], limit: int | None = None, *, per_document: bool = False
) -> list[dict[str, Any]]:
    """Run tasks (`multiple_choice_task`, or any lm-eval task dict) on their first `limit` documents.

    A row for each metric: task, metric, value, stderr, n (documents), num_fewshot, version (of the task),
    lm_eval_version, and prompts_sha256, which two runs must share to be comparable. With `per_document` also values,
    the metric of each document in order, from which two models' difference gets an error bar of its own.
    """
    require(bool(tasks), "tasks", [], "at least one task")
    require(limit is None or limit > 0, "limit", limit, "None or at least 1")
    go_offline()
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    # lm-eval warns of each task that it is made here and not in its registry
    logging.getLogger("lm_eval.api.task").setLevel(logging.ERROR)
    loaded = TaskManager(include_defaults=False).load(list(tasks))
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    output: Any = evaluate(lm=lm, task_dict=loaded, limit=limit, bootstrap_iters=1, log_samples=True)
    return [row for name in loaded["tasks"] for row in _rows(output, name, per_document)]


def _rows(output: dict[str, Any], name: str, per_document: bool) -> Iterator[dict[str, Any]]:
    """One task's metrics from lm-eval's output, whose keys read `acc,none` and `acc_stderr,none`."""
    results = output["results"][name]
    facts = {
        "n": output["n-samples"][name]["effective"],
        "num_fewshot": output["n-shot"][name],
        "version": output["versions"][name],
        "lm_eval_version": version("lm_eval"),
        "prompts_sha256": content_hash([sample["arguments"] for sample in output["samples"][name]]),
    }
    for key in results:
        metric, _, filtered = key.partition(",")
        if filtered and not metric.endswith("_stderr"):
            stderr = results[f"{metric}_stderr,{filtered}"]
            label = metric if filtered == "none" else key
            samples = [sample for sample in output["samples"][name] if sample["filter"] == filtered]
            values = {"values": [sample[metric] for sample in samples]} if per_document else {}
            yield {"task": name, "metric": label, "value": results[key], "stderr": stderr, **facts, **values}


def go_offline() -> None:
    """Switch the hub off, for this process and its children, unless the environment says otherwise already."""
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ.setdefault(variable, "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
