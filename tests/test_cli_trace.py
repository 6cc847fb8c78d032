"""`danube trace`: from a step of a run to its documents, and from a document to its steps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from danube_ray.artifacts import write_json
from danube_ray.cli import main
from danube_ray.config import RunConfig, to_dict
from danube_ray.data.documents import commit_splits, document_splits, tokenize_split, validation_bounds
from danube_ray.data.shards import VALIDATION, open_sources, open_validation
from danube_ray.data.tokenizer import Tokenizer, train_tokenizer
from danube_ray.data.windows import MixtureReader
from tests.data.documents import document, write_documents
from tests.runtime.text import MODEL, small_run

SIZES = {"web": 200, "docs": 80, "stdlib": 60}
TEXTS = {
    row["id"]: str(row["text"]) for name, size in SIZES.items() for row in (document(name, i) for i in range(size))
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(TEXTS.values(), tmp_path_factory.mktemp("tokenizer"), 300)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> RunConfig:
    folder = tmp_path_factory.mktemp("traced")
    splits = document_splits(write_documents(folder / "documents", {name: [size] for name, size in SIZES.items()}))
    bounds, tokens = validation_bounds(splits), folder / "tokens"
    shards = [tokenize_split(split, tokenizer, bounds[split.source], tokens) for split in splits]
    commit_splits(shards, tokenizer, tokens)
    return replace(small_run(tokens, folder, "run"), model=replace(MODEL, vocab_size=300))


@pytest.fixture
def run(config: RunConfig, tmp_path: Path) -> Path:
    """A run's folder, as far as tracing reads it."""
    write_json(tmp_path / "config.json", {**to_dict(config), "kind": "pretrain"})
    return tmp_path


def rows(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> list[dict]:
    main(["trace", *map(str, arguments), "--json"])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def said(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    main(["trace", *map(str, arguments)])
    return capsys.readouterr().out


def test_a_step_is_named_as_the_metrics_count_it(capsys, run: Path, config: RunConfig, tokenizer: Tokenizer):
    """Put together from the texts named, a step's rows are those that it trains on."""
    reader = MixtureReader(config)
    for step in (1, 12, 13, 24):
        batch = reader(step - 1, 0, 1)["tokens"]
        parts = rows(capsys, run, "--step", str(step), "--text", "--tokenizer", tokenizer.model_file.parent)
        rebuilt = [[] for _ in batch]
        for part in parts:
            ids = tokenizer.encode_documents([TEXTS[part["id"]]])[0].tolist()
            assert part["step"] == step and part["url"] == f"https://{part['source']}.org/{part['id'].split('-')[1]}"
            assert len(rebuilt[part["slot"]]) == part["row_token"]
            mine = ids[part["document_token"] :][: part["tokens"]]
            rebuilt[part["slot"]] += mine
            assert part["text"] == " ".join(tokenizer.decode(mine[:64]).split())[:140]
        assert rebuilt == batch.tolist()


def test_the_table_adds_up_a_document_and_can_be_cut_short(capsys, run: Path, config: RunConfig):
    parts = rows(capsys, run, "--step", "24")
    out = said(capsys, run, "--step", "24", "--rows", "0")
    assert "step 24 of 24, stage second: a row has 64 tokens and a label" in out
    for part in parts:
        (line,) = [line for line in out.splitlines() if f" {part['id']} " in line]
        same = [other["tokens"] for other in parts if other["id"] == part["id"]]
        assert line.split()[:2] == [str(sum(same)), str(part["document_tokens"])] and part["url"] in line
    documents = len({part["id"] for part in parts})
    assert f"and {documents - 2} more" in said(capsys, run, "--step", "24", "--rows", "2")
    (row,) = {part["slot"] for part in rows(capsys, run, "--step", "24", "--slot", "3")}
    assert row == 3


def test_a_document_is_traced_to_its_steps_or_to_validation(capsys, run: Path, config: RunConfig):
    steps = {step: rows(capsys, run, "--step", str(step)) for step in range(1, 25)}
    document_id = steps[24][0]["id"]
    expected = [(step, slot) for step, parts in steps.items()
                for slot in sorted({part["slot"] for part in parts if part["id"] == document_id})]  # fmt: skip
    assert [(place["step"], place["slot"]) for place in rows(capsys, run, "--id", document_id)] == expected
    out = said(capsys, run, "--id", document_id)
    assert f"{document_id} https://" in out and "second" in out
    stores = {**open_sources(Path(config.tokens_dir)), VALIDATION: open_validation(Path(config.tokens_dir))}
    held_out = stores[VALIDATION]["web"].names([0])[0][0]
    assert "held out for validation" in said(capsys, run, "--id", held_out)
    seen = {part["id"] for parts in steps.values() for part in parts}
    names = stores["web"]["q0"].names(range(stores["web"]["q0"].num_documents)).values()
    unseen = next(name for name, _ in names if name not in seen)
    assert "no step of this run reads it" in said(capsys, run, "--id", unseen)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], "--step and --id"),
        (["--step", "1", "--id", "web-1"], "--step and --id"),
        (["--step", "0"], "--step is 0, allowed is between 1 and 24"),
        (["--step", "25"], "--step is 25"),
        (["--step", "1", "--slot", "8"], "--slot is 8, allowed is between 0 and 7"),
        (["--step", "1", "--text"], "--tokenizer is None"),
        (["--id", "nowhere"], "--id is 'nowhere'"),
    ],
)
def test_a_mistake_is_one_error(capsys, run: Path, arguments: list[str], error: str):
    with pytest.raises(SystemExit):
        main(["trace", str(run), *arguments])
    assert error in " ".join(capsys.readouterr().err.split())


def test_what_would_name_other_documents_is_refused(capsys, run: Path, config: RunConfig, tmp_path: Path):
    def refused(*arguments: str) -> str:
        with pytest.raises(SystemExit):
            main(["trace", str(run), "--step", "1", *arguments])
        return " ".join(capsys.readouterr().err.split())

    other = train_tokenizer(TEXTS.values(), tmp_path / "other", 310)
    assert "allowed is the tokenizer of the shards" in refused("--text", "--tokenizer", str(other.model_file.parent))
    state = run / "checkpoints" / "step-00000008" / "state.json"
    write_json(state.parent / "manifest.json", {})
    reader = MixtureReader(config)
    tokenizer_sha256 = open_validation(Path(config.tokens_dir))["web"].tokenizer_sha256
    write_json(state, {"identity": {"data": reader.plan.hash, "tokenizer": tokenizer_sha256}})
    assert rows(capsys, run, "--step", "1")
    write_json(state, {"identity": {"data": reader.plan.hash, "tokenizer": "another"}})
    assert "holds other shards by now" in refused()
    write_json(run / "config.json", {**to_dict(config), "kind": "sft"})
    assert "is 'sft', allowed is 'pretrain'" in refused()
