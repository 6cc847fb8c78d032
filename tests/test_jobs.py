"""The jobs: thin, each the verb of its name, and run by `ray job submit` on a head started by hand."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import secrets
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import _dir_travel

from danube_ray.artifacts import read_json_lines, read_manifest
from danube_ray.cli import VERBS
from danube_ray.train.checkpoint import newest_verified
from tests.benchmarks.nano import write_noise
from tests.runtime.cluster import Cluster, hand_started

REPOSITORY = Path(__file__).parent.parent
JOBS = sorted((REPOSITORY / "jobs").glob("*.py"))
PROSE = (
    "The river rises in the hills and runs to the sea. It passes ten countries on its way. The people who live on its "
    "banks have built bridges and mills since before anyone wrote about them. In the summer the water is low and it is "
    "easy to cross. In the spring it carries the snow of the mountains."
)
each_job = pytest.mark.parametrize("job", JOBS, ids=lambda path: path.stem)


def test_every_verb_of_a_cluster_has_its_job():
    data, training = {"curate", "quality", "tokenize"}, {"pretrain", "search", "remap", "sft", "dpo"}
    wanted = data | training | {"evaluate", "quantize", "serve"}
    assert {job.stem for job in JOBS} == wanted
    assert wanted <= VERBS.keys()


@each_job
def test_a_job_is_thin_and_says_how_to_submit_it(job: Path):
    text = job.read_text()
    assert len(text.splitlines()) <= 15
    assert max(map(len, text.splitlines())) <= 120
    command = shlex.split((ast.get_docstring(ast.parse(text)) or "").split("\n", 1)[1].replace("\\\n", " "))
    assert command[:4] == ["RAY_AUTH_MODE=token", "ray", "job", "submit"]
    assert command[command.index("--") + 1 :][:2] == ["python", f"jobs/{job.name}"]


@each_job
def test_a_job_runs_its_verb(job: Path, tmp_path: Path):
    """An option nobody has: the verb itself refuses it, by name, before anything starts."""
    preset = ["nano"] if job.stem in ("pretrain", "search") else []
    command = [sys.executable, str(job), *preset, "--no-such-option", "1"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "200"}
    refused = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert f"danube {job.stem}" in refused.stdout + refused.stderr


def test_what_is_submitted_is_the_code_and_neither_data_nor_environments():
    """Ray's own walk over the working folder, reading `.rayignore`. It enters a folder only when it packs it."""
    packed: list[Path] = []
    _dir_travel(REPOSITORY, [], lambda path: packed.append(path.relative_to(REPOSITORY)), include_gitignore=False)
    names = {str(path) for path in packed}
    assert {"danube_ray/data/plan.py", "danube_ray/report/page.html", "jobs/pretrain.py", "pyproject.toml"} <= names
    entered = {part for path in packed for part in path.parts}
    assert entered.isdisjoint({".git", ".venv", "__pycache__", ".ruff_cache", ".pytest_cache"})
    assert {path.parts[0] for path in packed if path.parts}.isdisjoint({"runs", "data", "dist"})


@pytest.fixture(scope="module")
def head() -> Iterator[Cluster]:
    with hand_started(num_cpus=3) as cluster:
        yield cluster


@pytest.mark.ray
@pytest.mark.slow
def test_a_submitted_job_curates_on_the_cluster(head: Cluster, tmp_path: Path):
    texts = [f"Note {n}. {PROSE} This is what the reader of note {n} will find in it." for n in range(4)]
    source = tmp_path / "notes.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, texts[0], "too short"]))
    out = tmp_path / "documents"
    done = head.submit("python", "jobs/curate.py", f"notes={source}", "--no-near-duplicates", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    counts = read_manifest(out)["counts"]["notes"]
    assert (counts["read"], counts["kept"], counts["dropped"]) == (6, 4, 2)


@pytest.mark.ray
@pytest.mark.slow
def test_a_submitted_job_pretrains_the_nano_preset(head: Cluster, tmp_path: Path):
    tokens, runs = write_noise(tmp_path / "tokens", tokens_per_source=20_000), tmp_path / "runs"
    steps = [f"--stages.{stage}.tokens={tokens}" for stage, tokens in enumerate((12_288, 8_192, 8_192))]
    where = ["--name=job", f"--tokens-dir={tokens}", f"--output-dir={runs}", "--loop.cpus-per-worker=2"]
    done = head.submit("python", "jobs/pretrain.py", "nano", *where, *steps)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_json_lines(runs / "job" / "metrics.jsonl")
    assert rows[-1]["step"] == 7 and rows[-1]["stage"] == "anneal"
    assert newest_verified(runs / "job" / "checkpoints") == runs / "job" / "checkpoints" / "step-00000007"
    assert (runs / "job" / "report.html").is_file()


@pytest.mark.ray
def test_a_client_without_the_token_is_refused(head: Cluster):
    stranger = dataclasses.replace(head, environment={**head.environment, "RAY_AUTH_TOKEN": secrets.token_hex(32)})
    refused = stranger.submit("python", "jobs/curate.py", "--help")
    assert refused.returncode != 0
    assert "token authentication is enabled" in refused.stderr
