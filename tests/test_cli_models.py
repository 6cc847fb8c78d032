"""`danube export`, `danube evaluate`: a model leaves with its own tokenizer, and is scored on its own tokens."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from danube_ray.artifacts import write_json
from danube_ray.cli import main
from danube_ray.config import RunConfig, to_dict
from danube_ray.data.shards import write_tokens
from danube_ray.data.tokenizer import Tokenizer
from danube_ray.train.context import LocalContext
from danube_ray.train.loop import fit
from danube_ray.train.pretrain import PretrainTask
from tests.models import tiny_tokenizer
from tests.runtime.text import MODEL, documents, small_run


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> RunConfig:
    """A run that is over after a step, with what Ray's adapter stores of it."""
    folder = tmp_path_factory.mktemp("run")
    sources = {source: {"unscored": documents(1, 1, 300)} for source in ("web", "docs", "stdlib")}
    held_out = {source: documents(2, 1, 20) for source in sources}
    made_by = Tokenizer.load(tokenizer).sha256
    write_tokens(folder / "tokens", sources, held_out, vocab_size=512, tokenizer_sha256=made_by)
    run = small_run(folder / "tokens", folder, "run")
    stages = tuple(replace(stage, tokens=run.global_batch_tokens) for stage in run.stages)
    run = replace(run, model=replace(MODEL, vocab_size=512), stages=stages)
    fit(PretrainTask(run), folder / "run", run.loop, run.optimizer, LocalContext())
    write_json(folder / "run" / "config.json", {**to_dict(run), "kind": "pretrain"})
    return run


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_a_model_leaves_with_its_own_tokenizer_and_is_scored_on_its_own_tokens(capsys, run, tokenizer, tmp_path):
    folder, out = Path(run.output_dir) / run.name, tmp_path / "model"
    another = tiny_tokenizer(tmp_path / "another", vocab_size=400)
    export = ("export", folder, "--out", out, "--tokenizer")
    assert "the tokenizer of the shards" in refused(capsys, *export, another) and not out.exists()
    main([*map(str, export), str(tokenizer)])
    evaluate = ("evaluate", out, "--out", tmp_path / "scores", "--tokens")
    main([*map(str, evaluate), run.tokens_dir])
    scores = json.loads((tmp_path / "scores" / "perplexity.json").read_text())
    assert scores.keys() == {"web", "docs", "stdlib"} and all(1 < row["value"] < 2_000 for row in scores.values())

    write_tokens(tmp_path / "tokens", {"web": {"unscored": documents(1, 1, 300)}}, {"web": documents(2, 1, 20)},
                 vocab_size=400, tokenizer_sha256=Tokenizer.load(another).sha256)  # fmt: skip
    assert "the model's own tokenizer" in refused(capsys, *evaluate, tmp_path / "tokens")
    assert "a finished tokens folder" in refused(capsys, *evaluate, folder)


def test_only_a_pretraining_run_is_exported(capsys, tokenizer, tmp_path):
    write_json(tmp_path / "config.json", {"kind": "sft", "name": "chat"})
    said = refused(capsys, "export", tmp_path, "--tokenizer", tokenizer, "--out", tmp_path / "model")
    assert "kind of" in said and "'sft'" in said


def test_what_lies_in_the_folder_to_write_to_is_kept(capsys, run, tokenizer, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    folder = Path(run.output_dir) / run.name
    assert "would be lost" in refused(capsys, "export", folder, "--tokenizer", tokenizer, "--out", tmp_path)
    assert (tmp_path / "thesis.tex").exists()
